"""Cuts a transformers model into its blocks. The only file that knows transformers' internals.

No family's forward is copied here. Every computation is the model's own forward, run on a shallow
copy of the few modules between the root and the block list, in which blocks that are not wanted
have stand-ins:

    front(n)      [b0 .. b(n-1)*]                  * hands out what the block returns
    lift(n, M)    [enter, skip .., bn .. b(M-1)*]  enter returns the stored activation
    logits(M)     [enter, skip .., bM .. b(L-1)]

so masks, rotary positions, sliding windows, soft-capping, pooling and heads are the family's, and
a list keeps its positions where a family looks a block up by index. The copies share every
parameter with the model, live for one call and leave nothing behind; LoRA put into the blocks
later acts. Before the entered block the model sees dummy tokens, which cost an embedding lookup.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from splitfrozen import rng
from splitfrozen.errors import ModelError
from splitfrozen.model.costs import MapShape, ModelShape
from splitfrozen.model.shapes import shape_of
from splitfrozen.records import TaskKind

_NEW = "splitfrozen_new_parameters"
_POOLER = ".pooler."
_FAMILIES = (
    "choose a model of a family such as GPT-2, Llama, Qwen, Mistral, Gemma, OPT, GPT-NeoX, BERT, "
    "DistilBERT, RoBERTa or ViT"
)


def load_model(name: str, kind: TaskKind, labels: Sequence[str], seed: int) -> PreTrainedModel:
    """Load a model with the head for `kind`, float32, in evaluation mode, on the CPU.

    A head that the checkpoint lacks is drawn from `seed`. Code that comes with a checkpoint is
    never run, and weights are read from safetensors only.

    Args:
        name: Hugging Face hub name or folder.
        labels: class names in order; not used for causal_lm.

    Raises:
        ModelError: not found, not of a known architecture, without a head for `kind`, or with
            weights of the body missing.
    """
    auto, options = _loader(kind, labels)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.derive(seed, "head"))
            model, report = auto.from_pretrained(
                name,
                dtype=torch.float32,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unloadable(name, kind, error) from error
    new = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    setattr(model, _NEW, frozenset(new))
    _refuse_missing_body(model, name, kind, new)
    config = model.config.get_text_config()
    if kind != "image" and config.pad_token_id not in range(config.vocab_size):
        # Pooling decoders find a sample's last token by comparing ids with the padding id.
        end = config.eos_token_id
        config.pad_token_id = (end[0] if isinstance(end, list) else end) or 0
    return model.eval()


class SlicedModel:
    """A transformers model with its head, frozen, that runs from any block to any other.

    Attributes:
        model: the wrapped model; LoRA is put into it in place.
        kind: what its head answers.
        block_count: L.
        width: D.
        takes_token_types: whether `front` takes segment ids.
        blocks_path: dotted name of the block list inside `model`.
        head: dotted names of the modules above the blocks that are task-specific or that the
            checkpoint lacked; they are trained in full.

    Raises:
        ModelError: the block list cannot be located, or slicing does not reproduce the model's
            own output (tried once, on a small random batch).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self._config = model.config.get_text_config()
        self.kind: TaskKind = _kind(model)
        self.blocks_path, self._blocks = _locate(model)
        self.block_count = len(self._blocks)
        self.width = int(self._config.hidden_size)
        self.takes_token_types = (
            self.kind != "image" and getattr(self._config, "type_vocab_size", 0) > 1
        )
        self.head = _head(model, self.kind)
        self._image = _image_shape(model.config) if self.kind == "image" else ()
        pad = self._config.pad_token_id if self.kind != "image" else None
        self._pad = 0 if pad is None else int(pad)
        takes = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}
        self._maps = [
            {
                f"{self.blocks_path}.{index}.{name}": _map_shape(module)
                for name, module in block.named_modules()
                if isinstance(module, nn.Linear | Conv1D)
            }
            for index, block in enumerate(self._blocks)
        ]
        # References, taken before peft renames modules: the hash stays that of the base model.
        self._weights = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if not any(name.startswith(f"{head}.") for head in self.head)
        ]
        self._refuse_wrong_slices()
        if self.kind == "causal_lm":
            self._refuse_encoder()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what `front(n)` takes, in order."""
        if self.kind == "image":
            return ("pixel_values",)
        types = ("token_type_ids",) if self.takes_token_types else ()
        return ("input_ids", "attention_mask", *types)

    def example(self, lengths: Sequence[int], seed: int) -> tuple[Tensor, ...]:
        """Random inputs for `front`, padded on the right: one sample for each length (B).

        Returns:
            int64 [B, T] each, or float32 [B, channels, height, width].
        """
        draw = rng.stream(seed, "example", *lengths)
        shape = (len(lengths), max(lengths))
        if self.kind == "image":
            return (torch.from_numpy(draw.standard_normal((shape[0], *self._image), "float32")),)
        mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        # The padding id is left out of the real tokens: decoders pool at the last other one.
        ids = torch.from_numpy(draw.integers(0, self._config.vocab_size - 1, shape))
        ids = torch.where(mask, ids + (ids >= self._pad), self._pad)
        types = torch.from_numpy(draw.integers(0, 2, shape)) * mask
        return (ids, mask.long(), types)[: len(self.inputs)]

    @property
    def longest(self) -> int:
        """Most tokens of a sample that the model has positions for."""
        positions = int(getattr(self._config, "max_position_embeddings", None) or 2**31)
        # RoBERTa's table of positions begins with one for padding and those below it.
        unused = [
            module.padding_idx + 1
            for name, module in self.model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None)
        ]
        return positions - max(unused, default=0)

    def linear_maps(self, start: int, stop: int) -> dict[str, MapShape]:
        """(inputs, outputs) of each linear map in blocks[start:stop], by dotted name in `model`.

        They are those of the base model, whether LoRA was attached or not.
        """
        return {name: shape for maps in self._maps[start:stop] for name, shape in maps.items()}

    @property
    def shape(self) -> ModelShape:
        """What the model's cost depends on; it takes a forward pass of two short samples."""
        return shape_of(self)

    @property
    def fan_in_first(self) -> bool:
        """Whether the blocks keep the weights of linear maps as [inputs, outputs], like GPT-2."""
        return any(isinstance(module, Conv1D) for module in self._blocks.modules())

    def front(self, depth: int) -> nn.Module:
        """Return front(depth): takes `inputs` in order, returns the hidden state [B, T, D].

        Text is padded on the right; `attention_mask` is 1 on real tokens. The module shares its
        weights with `model` and puts embedding and blocks[:depth] into evaluation mode.

        Raises:
            ModelError: `depth` is not in 1..L.
        """
        if not 1 <= depth <= self.block_count:
            raise ModelError(
                "this depth does not exist",
                got=depth,
                allowed=f"1..{self.block_count}, the blocks of the model",
                remedy="lower the depth",
            )
        return _Front(self, depth)

    def lift(self, hidden: Tensor, lengths: Tensor, start: int, stop: int) -> Tensor:
        """Apply blocks[start:stop] to activations of depth `start` >= 1.

        Those blocks go into evaluation mode: an activation is computed without dropout.

        Args:
            hidden: [B, T, D], padded on the right; padding holds any finite value.
            lengths: int [B], real tokens of each sample.

        Returns:
            [B, T, D] of depth `stop`; padding holds arbitrary values.
        """
        assert 1 <= start <= stop <= self.block_count
        if start == stop:
            return hidden
        catch, blocks = self._up_to(self._entered(hidden, start), stop)
        self._view(_backbone(self.model), blocks)(**self._dummies(hidden, lengths))
        return catch.take()

    def logits(
        self, hidden: Tensor, lengths: Tensor, cut: int, positions: Tensor | None = None
    ) -> Tensor:
        """Apply blocks[cut:L], the final norm and the head to activations of depth `cut` >= 1.

        Gradients flow into whatever is trainable there, that is LoRA and a trained head.

        Args:
            hidden: [B, T, D], padded on the right; padding holds any finite value.
            lengths: int [B], real tokens of each sample. A pooled answer is that of the last one.
            positions: causal_lm only: sorted, unique int64 [P]; the others are not projected on
                the vocabulary.

        Returns:
            [B, C] for classification and images; [B, T, V], or [B, P, V] with `positions`, for
            causal_lm.
        """
        assert 1 <= cut <= self.block_count
        assert positions is None or self.kind == "causal_lm"
        inputs = self._dummies(hidden, lengths)
        if positions is not None:
            inputs["logits_to_keep"] = positions
        blocks = [*self._entered(hidden, cut), *self._blocks[cut:]]
        output: Tensor = self._view(self.model, blocks)(**inputs).logits
        return output

    def weights_hash(self) -> str:
        """sha256 over the base model's weights: names, dtypes, shapes and bytes, without `head`.

        LoRA attached after construction does not change it.
        """
        digest = hashlib.sha256()
        for name, parameter in self._weights:
            value = parameter.detach().contiguous().cpu()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _view(self, root: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """A copy of `root` (the model or its backbone) whose block list is `blocks`."""
        path = self.blocks_path
        if root is not self.model:
            path = path.removeprefix(f"{self.model.base_model_prefix}.")
        return _replaced(root, path.split("."), nn.ModuleList(blocks))

    def _entered(self, hidden: Tensor, depth: int) -> list[nn.Module]:
        """Stand-ins for blocks[:depth]: the first returns `hidden`, the others what they get."""
        value = hidden.to(self.model.dtype)
        enter = _stand_in(self._blocks[0], lambda *_args, **_kwargs: value)
        skips = [_stand_in(block, _skip) for block in self._blocks[1:depth]]
        return [enter, *skips]

    def _up_to(self, head: Sequence[nn.Module], stop: int) -> tuple[_Catch, Sequence[nn.Module]]:
        """`head` followed by the blocks up to `stop`, and what catches the last one's result.

        Catching it there rather than at the model's output leaves out the final norm, projections
        and poolers without having to know them. These blocks never run with dropout.
        """
        for block in self._blocks[len(head) : stop]:
            block.eval()
        last = self._blocks[stop - 1]
        catch = _Catch(last)
        return catch, [*head, *self._blocks[len(head) : stop - 1], _stand_in(last, catch)]

    def _dummies(self, hidden: Tensor, lengths: Tensor) -> dict[str, Any]:
        """Inputs that make the model see padding where `hidden` has it; their values are moot."""
        device = hidden.device
        if self.kind == "image":
            # One image is enough: it is replaced by the whole batch that enters.
            return {"pixel_values": torch.zeros((1, *self._image), device=device)}
        real = torch.arange(hidden.shape[1], device=device) < lengths.to(device)[:, None]
        token = int(self._pad == 0)
        return {
            "input_ids": torch.where(real, token, self._pad),
            "attention_mask": real.long(),
            **self._options,
        }

    def _refuse_wrong_slices(self) -> None:
        """Slicing rests on what the known families have in common; this tells when one differs."""
        longest = min(8, self.longest)
        inputs = [x.to(self.model.device) for x in self.example((longest, (longest + 1) // 2), 0)]
        middle = (self.block_count + 1) // 2
        try:
            with torch.no_grad():
                whole = self.model(**dict(zip(self.inputs, inputs, strict=True))).logits
                hidden = self.front(1)(*inputs)
                shape = hidden.shape[:2]
                mask = hidden.new_ones(shape) if self.kind == "image" else inputs[1]
                lengths = mask.sum(1).long()
                hidden = self.lift(hidden, lengths, 1, middle)
                gap = (self.logits(hidden, lengths, middle) - whole).abs()
            gap = gap * mask[:, :, None] if self.kind == "causal_lm" else gap
            # The same operations on the same shapes: what differs is rounding.
            allowed = 1e3 * torch.finfo(whole.dtype).eps * max(1.0, float(whole.abs().max()))
            problem = "" if float(gap.max()) <= allowed else f"logits off by {float(gap.max()):.2g}"
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise ModelError(
                f"{type(self.model).__name__} does not run in slices",
                got=problem,
                allowed="a model whose blocks pass on one hidden state [B, T, D]",
                remedy=_FAMILIES,
            )

    def _refuse_encoder(self) -> None:
        """An encoder with a language-modelling head would read the token it is to predict."""
        ids = self.example((min(8, self.longest),), 0)[0].to(self.model.device)
        other = ids.clone()
        other[:, -1] = (ids[:, -1] + 1) % self._config.vocab_size
        with torch.no_grad():
            one, two = (self.model(input_ids=x).logits[:, :-1] for x in (ids, other))
        if not torch.allclose(one, two, rtol=1e-4, atol=1e-4):
            raise ModelError(
                f"{type(self.model).__name__} cannot learn to continue text",
                got="an encoder, whose tokens see those after them",
                allowed="a decoder such as GPT-2 or Llama",
                remedy='choose a decoder or set task.kind = "classification"',
            )


class _Front(nn.Module):
    """Embedding and blocks[:depth]."""

    def __init__(self, sliced: SlicedModel, depth: int) -> None:
        super().__init__()
        self.inputs = sliced.inputs
        self._options = sliced._options
        self._catch, blocks = sliced._up_to((), depth)
        self.backbone = sliced._view(_backbone(sliced.model), blocks)
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        self.backbone(**dict(zip(self.inputs, inputs, strict=True)), **self._options)
        return self._catch.take()


class _Catch:
    """Runs a block and keeps what it returns until it is taken.

    An object rather than a list: torch.export copies lists that it finds on a module.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._caught: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self._block(*args, **kwargs)
        self._caught = output
        return output

    def take(self) -> Tensor:
        caught, self._caught = self._caught, None
        assert caught is not None
        return caught


def _backbone(model: PreTrainedModel) -> nn.Module:
    backbone: nn.Module = getattr(model, model.base_model_prefix)
    return backbone


def _replaced(root: nn.Module, path: Sequence[str], child: nn.Module) -> nn.Module:
    """Shallow copy of `root` in which the module at `path` is `child`; all else is shared."""
    clone = copy.copy(root)
    clone._modules = dict(root._modules)
    # OPT drops whole blocks at random while it trains, the one that enters among them.
    clone.training = False
    if len(path) > 1:
        child = _replaced(getattr(root, path[0]), path[1:], child)
    clone._modules[path[0]] = child
    return clone


def _stand_in(block: nn.Module, forward: Callable[..., Tensor]) -> nn.Module:
    """A copy of `block`, with the attributes that its family may ask for, that runs `forward`."""
    clone = copy.copy(block)
    clone.forward = forward
    return clone


def _skip(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden_states


def _map_shape(module: nn.Linear | Conv1D) -> MapShape:
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _image_shape(config: Any) -> tuple[int, int, int]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return (config.num_channels, height, width)


def _kind(model: PreTrainedModel) -> TaskKind:
    if model.main_input_name == "pixel_values":
        return "image"
    if model.get_output_embeddings() is None:
        return "classification"
    return "causal_lm"


def _locate(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The block list and its dotted name: the one ModuleList with num_hidden_layers items."""
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found[name] = module
    prefix = f"{model.base_model_prefix}."
    if (
        model.config.is_encoder_decoder
        or len(found) != 1
        or not next(iter(found)).startswith(prefix)
    ):
        got = "an encoder-decoder, " if model.config.is_encoder_decoder else ""
        raise ModelError(
            f"cannot cut {type(model).__name__} into blocks",
            got=f"{got}lists of {count} modules: {', '.join(found) or 'none'}",
            allowed=f"exactly one list of config.num_hidden_layers modules in `{prefix[:-1]}`",
            remedy=_FAMILIES,
        )
    return next(iter(found.items()))


def _head(model: PreTrainedModel, kind: TaskKind) -> tuple[str, ...]:
    if kind == "causal_lm":
        return ()
    names = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    new = {name.rpartition(_POOLER)[0] for name in getattr(model, _NEW, ()) if _POOLER in name}
    return (*names, *(f"{name}.pooler" for name in sorted(new)))


def _loader(kind: TaskKind, labels: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    if kind == "causal_lm":
        return AutoModelForCausalLM, {}
    options = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        # A head trained for other classes is replaced by a new one.
        "ignore_mismatched_sizes": True,
    }
    if kind == "image":
        return AutoModelForImageClassification, options
    return AutoModelForSequenceClassification, options


def _refuse_missing_body(model: PreTrainedModel, name: str, kind: TaskKind, new: set[str]) -> None:
    head = _head(model, kind)
    body = sorted(key for key in new if not any(key.startswith(f"{part}.") for part in head))
    if body:
        raise ModelError(
            f"the checkpoint {name} lacks weights of the model's body",
            got=f"{len(body)} missing or of another shape, such as {body[0]}",
            allowed="a checkpoint whose body is complete; only a head may be new",
            remedy="check that weights and config.json belong together",
        )


def _unloadable(name: str, kind: TaskKind, error: Exception) -> ModelError:
    return ModelError(
        f"cannot load the model {name} for {kind}",
        got=str(error).strip().split("\n")[0],
        allowed="a hub name or a folder with config.json and safetensors weights, of a family "
        f"with a head for {kind}",
        remedy="check the name and the connection to the hub, or give a folder",
    )
