"""model.costs against what torch counts in real forward and backward passes, and what it keeps.

Models are built from configuration classes, wide enough that maps outweigh what the formulas leave
out, and run as training on the CPU does: slices of a SlicedModel with LoRA of `adapters.attach`.
Attention is computed in single steps; a fused kernel computes parts of it again in its backward
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from splitfrozen.config import LoraSpec
from splitfrozen.model import adapters, costs
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.model.costs import ModelShape, Tokens

BLOCKS, CUT, RANK, BATCH, LENGTH = 5, 2, 4, 4, 48
CLOSE = 0.02

WIDE = {"num_hidden_layers": BLOCKS, "hidden_size": 128, "num_attention_heads": 4}
DENSE = {**WIDE, "intermediate_size": 512, "vocab_size": 300}
GPT2 = {**DENSE, "n_inner": 512}
GROUPED = {**DENSE, "intermediate_size": 344, "num_key_value_heads": 2}
IMAGE = {**WIDE, "intermediate_size": 512, "image_size": 42}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2-causal_lm": GPT2,
    "gpt2-classification": GPT2,
    "llama-causal_lm": GROUPED,
    "llama-classification": GROUPED,
    "gpt_neox-causal_lm": DENSE,
    "bert-classification": DENSE,
    "vit-image": IMAGE,
}


@dataclass
class Adapted:
    """A model with LoRA on blocks[CUT:] and a batch of it."""

    sliced: SlicedModel
    shape: ModelShape
    inputs: tuple[Tensor, ...]
    hidden: Tensor

    @property
    def load(self) -> Tokens:
        return Tokens.uniform(*self.hidden.shape[:2])

    @property
    def entering(self) -> float:
        """FLOP of the dummies that slices above the front put through the embedding: one image."""
        return costs.embedding_flops(self.shape, Tokens.uniform(1, self.hidden.shape[1]))

    def logits(self, cut: int, hidden: Tensor | None = None) -> Tensor:
        taken = self.hidden if hidden is None else hidden
        lengths = torch.full((len(taken),), taken.shape[1])
        return self.sliced.logits(taken, lengths, cut)


@pytest.fixture(scope="module", params=MODELS)
def adapted(request: pytest.FixtureRequest, tiny: Callable[..., Any]) -> Adapted:
    model = tiny(request.param, **MODELS[request.param])
    model.set_attn_implementation("eager")
    sliced = SlicedModel(model)
    shape = sliced.shape
    adapters.attach(sliced, LoraSpec(rank=RANK), CUT, seed=0)
    assert sliced.shape == shape, "LoRA does not change the shape"
    inputs = sliced.example([LENGTH] * BATCH, seed=0)
    with torch.no_grad():
        hidden = sliced.front(1)(*inputs)
    return Adapted(sliced, shape, inputs, hidden)


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("depth", [1, CUT])
def test_front(adapted: Adapted, depth: int) -> None:
    front = adapted.sliced.front(depth)
    with torch.no_grad():
        flops = counted(lambda: front(*adapted.inputs))
    formula = costs.embedding_flops(adapted.shape, adapted.load)
    formula += costs.forward_flops(adapted.shape, depth, adapted.load)
    assert formula == pytest.approx(flops, rel=CLOSE)


def test_lift(adapted: Adapted) -> None:
    lengths = torch.full((BATCH,), adapted.hidden.shape[1])
    with torch.no_grad():
        flops = counted(lambda: adapted.sliced.lift(adapted.hidden, lengths, 1, CUT))
    formula = costs.forward_flops(adapted.shape, CUT - 1, adapted.load)
    assert formula == pytest.approx(flops - adapted.entering, rel=CLOSE)


@pytest.mark.parametrize("cut", [CUT, BLOCKS - 1])
def test_server_forward(adapted: Adapted, cut: int) -> None:
    with torch.no_grad():
        flops = counted(lambda: adapted.logits(cut))
    formula = costs.forward_flops(adapted.shape, BLOCKS - cut, adapted.load, RANK)
    formula += costs.head_flops(adapted.shape, adapted.load)
    assert formula == pytest.approx(flops - adapted.entering, rel=CLOSE)


def test_head(adapted: Adapted) -> None:
    with torch.no_grad():
        flops = counted(lambda: adapted.logits(BLOCKS))
        answers = torch.full((BATCH,), adapted.hidden.shape[1])
        if adapted.sliced.kind == "causal_lm":
            three = torch.arange(3)
            few = counted(lambda: adapted.sliced.logits(adapted.hidden, answers, BLOCKS, three))
            assert costs.head_flops(adapted.shape, Tokens.uniform(BATCH, 3)) == few
    formula = costs.head_flops(adapted.shape, adapted.load)
    # A head of classes is small beside the one token of the dummy image that is no patch.
    no_patch = costs.embedding_flops(adapted.shape, Tokens.uniform(1, 1))
    assert formula == pytest.approx(flops - adapted.entering, rel=CLOSE, abs=no_patch)


@pytest.mark.parametrize("cut", [CUT, BLOCKS - 1])
def test_server_backward_below_which_nothing_is_trained(adapted: Adapted, cut: int) -> None:
    flops = counted(adapted.logits(cut).square().mean().backward)
    formula = {
        wanted: sum(
            costs.backward_flops(
                adapted.shape, BLOCKS - cut, adapted.load, RANK, input_gradient=wanted
            )
        )
        + sum(costs.head_backward_flops(adapted.shape, adapted.load))
        for wanted in (False, True)
    }
    assert formula[False] == pytest.approx(flops, rel=CLOSE)
    assert formula[True] > (1 + 2 * CLOSE) * flops, "what the lowest block leaves out shows"


def test_server_backward_in_two_parts(adapted: Adapted) -> None:
    hidden = adapted.hidden.clone().requires_grad_()
    loss = adapted.logits(CUT, hidden).square().mean()
    b_flops = counted(lambda: torch.autograd.grad(loss, hidden, retain_graph=True))
    both = counted(loss.backward)
    b, w = costs.backward_flops(
        adapted.shape, BLOCKS - CUT, adapted.load, RANK, input_gradient=True
    )
    head_b, head_w = costs.head_backward_flops(adapted.shape, adapted.load)
    assert b + head_b == pytest.approx(b_flops, rel=CLOSE)
    assert w + head_w == pytest.approx(both - b_flops, rel=CLOSE)


def test_two_way_device(adapted: Adapted) -> None:
    """Blocks with LoRA above a frozen one, and a gradient that comes from outside."""
    depth = BLOCKS - 1
    front = adapted.sliced.front(depth)
    output: list[Tensor] = []
    flops = counted(lambda: output.append(front(*adapted.inputs)))
    forward = costs.embedding_flops(adapted.shape, adapted.load)
    forward += costs.forward_flops(adapted.shape, CUT, adapted.load)
    forward += costs.forward_flops(adapted.shape, depth - CUT, adapted.load, RANK)
    assert forward == pytest.approx(flops, rel=CLOSE)
    flops = counted(lambda: output[0].backward(torch.randn_like(output[0])))
    backward = costs.backward_flops(
        adapted.shape, depth - CUT, adapted.load, RANK, input_gradient=False
    )
    assert sum(backward) == pytest.approx(flops, rel=CLOSE)


def test_whole_model(adapted: Adapted) -> None:
    """The model's own forward and backward pass, LoRA in all blocks that have any."""
    model, shape, load = adapted.sliced.model, adapted.shape, adapted.load
    inputs = dict(zip(adapted.sliced.inputs, adapted.inputs, strict=True))
    output: list[Tensor] = []
    flops = counted(lambda: output.append(model(**inputs).logits))
    flops += counted(output[0].square().mean().backward)
    formula = costs.embedding_flops(shape, load) + costs.head_flops(shape, load)
    formula += costs.forward_flops(shape, CUT, load)
    formula += costs.forward_flops(shape, BLOCKS - CUT, load, RANK)
    formula += sum(costs.backward_flops(shape, BLOCKS - CUT, load, RANK, input_gradient=False))
    formula += sum(costs.head_backward_flops(shape, load))
    assert formula == pytest.approx(flops, rel=CLOSE)


def test_kept_values(adapted: Adapted) -> None:
    """What autograd holds between the passes: every storage once, weights not at all."""
    weights = {p.untyped_storage().data_ptr() for p in adapted.sliced.model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        if value.is_floating_point() and value.untyped_storage().data_ptr() not in weights:
            held[value.untyped_storage().data_ptr()] = value
        return value

    kept = {}
    for cut in (CUT, BLOCKS - 1):
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = adapted.logits(cut)
        kept[cut] = sum(value.untyped_storage().nbytes() for value in held.values()) / 4
        del loss
    measured = kept[CUT] - kept[BLOCKS - 1]
    formula = costs.kept_values(adapted.shape, BLOCKS - 1 - CUT, adapted.load, RANK)
    assert formula == pytest.approx(measured, rel=0.06)
