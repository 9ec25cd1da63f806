"""The shape of a loaded model, read off one forward pass: which linear maps it runs, and on what.

Nothing is known here of families: what is a map of a block, of the embedding or of the head follows
from when it runs, and what reads a block's input follows from what autograd says of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from splitfrozen.model.costs import HeadMap, MapShape, ModelShape

if TYPE_CHECKING:
    from splitfrozen.model.blocks import SlicedModel

_BATCH = 2
_LONGEST = 4


@dataclass(frozen=True, slots=True)
class _Call:
    """One run of a linear map: its shape, samples or tokens that it saw, and whether what it read
    depends on an earlier map of the same block."""

    shape: MapShape
    rows: int
    later: bool


def shape_of(sliced: SlicedModel) -> ModelShape:
    """The shape; LoRA that was attached does not change it. All blocks are like the first."""
    config = sliced.model.config.get_text_config()
    block, embedding, head = _calls(sliced)
    heads = int(config.num_attention_heads)
    each = int(getattr(config, "head_dim", None) or sliced.width // heads)
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    # The last map of a block ends its MLP; what is neither that nor attention's begins it.
    inner = block[-1].shape[0]
    begins = sum(call.shape[1] for call in block) - each * (heads + 2 * keys) - 2 * sliced.width
    gated = begins > inner
    spelled_out = "gelu_new" in (
        getattr(config, "activation_function", ""),
        getattr(config, "hidden_act", ""),
    )
    return ModelShape(
        blocks=sliced.block_count,
        width=sliced.width,
        maps=tuple(call.shape for call in block),
        entry=tuple(call.shape for call in block if not call.later),
        heads=heads,
        attention=heads * each,
        inner=inner,
        gated=gated,
        kept=4 if gated else 5 if spelled_out else 2,
        norms=_norms(sliced),
        embedding=tuple(call.shape for call in embedding.values()),
        head=tuple(
            HeadMap(*call.shape, pooled=call.rows == _BATCH, trained=_within(name, sliced.head))
            for name, call in head.items()
        ),
        vocabulary=0 if sliced.kind == "image" else int(config.vocab_size),
    )


def _calls(sliced: SlicedModel) -> tuple[list[_Call], dict[str, _Call], dict[str, _Call]]:
    """What runs in the first block, before the blocks and above them, the latter two by name."""
    inputs = sliced.example([min(_LONGEST, sliced.longest)] * _BATCH, seed=0)
    inputs = tuple(value.to(sliced.model.device) for value in inputs)
    first = sliced.linear_maps(0, 1)
    with _watched(sliced.model, first) as below, torch.enable_grad():
        hidden = sliced.front(1)(*inputs).detach()
    lengths = torch.full((_BATCH,), hidden.shape[1], device=hidden.device)
    with _watched(sliced.model, {}) as above, torch.no_grad():
        sliced.logits(hidden, lengths, sliced.block_count)
    # A pooler runs behind the block; the embedding runs again above it, on dummies.
    embedding = dict(itertools.takewhile(lambda item: item[0] not in first, below.items()))
    head = {name: call for name, call in above.items() if name not in embedding}
    return [below[name] for name in first], embedding, head


@contextmanager
def _watched(model: nn.Module, adapted: Mapping[str, MapShape]) -> Iterator[dict[str, _Call]]:
    """Note each linear map that runs, by name; outputs of `adapted` depend on trained weights."""
    calls: dict[str, _Call] = {}
    handles = []
    for name, module in model.named_modules():
        shape = adapted.get(name) or _map_shape(module)
        # Of a map with LoRA, only the whole is of interest.
        if shape is not None and not any(name.startswith(f"{one}.") for one in adapted):
            hook = _note(calls, name, shape, train=name in adapted)
            handles.append(module.register_forward_hook(hook))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _note(
    calls: dict[str, _Call], name: str, shape: MapShape, *, train: bool
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        calls[name] = _Call(shape, output.numel() // shape[1], args[0].requires_grad)
        return output.detach().requires_grad_() if train else output

    return hook


def _map_shape(module: nn.Module) -> MapShape | None:
    if not isinstance(module, nn.Linear | Conv1D | nn.Conv2d):
        return None
    weight = module.weight
    if isinstance(module, Conv1D):
        return int(weight.shape[0]), int(weight.shape[1])
    return weight[0].numel(), int(weight.shape[0])


def _norms(sliced: SlicedModel) -> int:
    block = sliced.model.get_submodule(f"{sliced.blocks_path}.0")
    return sum("norm" in type(module).__name__.lower() for module in block.modules())


def _within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)
