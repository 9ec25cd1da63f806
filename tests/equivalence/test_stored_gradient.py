"""LoRA gradients from stored activations are those of the whole model with blocks[:M] frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from splitfrozen.config import LoraSpec
from splitfrozen.errors import ModelError
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import IGNORED

LENGTHS = (14, 12, 5, 2)


def targets_for(sliced: SlicedModel, lengths: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    if sliced.kind != "causal_lm":
        return torch.randint(0, 3, (len(LENGTHS),), generator=draw)
    longest = int(lengths.max())
    targets = torch.randint(0, 60, (len(LENGTHS), longest), generator=draw)
    return targets.masked_fill(torch.arange(longest) >= lengths[:, None], IGNORED)


def gradients(peft_model: Any, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    loss = cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)
    peft_model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in adapters.trainable(peft_model).items()
    }


def attached(model: Any, cut: int) -> tuple[SlicedModel, Any]:
    sliced = SlicedModel(model)
    peft_model = adapters.attach(sliced, LoraSpec(rank=2), cut, seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # B starts at zero, where A has no gradient.
        for value in adapters.trainable(peft_model).values():
            value.add_(torch.randn(value.shape, generator=draw), alpha=0.1)
    return sliced, peft_model


def test_gradients_equal_those_of_the_whole_model(family: Any) -> None:
    for cut in (1, 2):
        sliced, peft_model = attached(family.build(), cut)
        inputs = sliced.example(LENGTHS, seed=1)
        with torch.no_grad():
            stored = sliced.front(cut)(*inputs)
        lengths = torch.tensor(LENGTHS)
        if sliced.kind == "image":
            lengths = torch.full((len(LENGTHS),), stored.shape[1])
        targets = targets_for(sliced, lengths)
        whole = peft_model(**dict(zip(sliced.inputs, inputs, strict=True))).logits
        expected = gradients(peft_model, whole, targets)
        got = gradients(peft_model, sliced.logits(stored, lengths, cut), targets)
        assert got.keys() == expected.keys()
        for name, value in got.items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(
                value, expected[name], rtol=1e-5, atol=1e-5 * max(scale, 0.1), msg=name
            )
        moved = [name for name, value in got.items() if value.abs().max() > 0]
        assert any("lora_A" in name for name in moved)
        assert any(name.split(".lora_")[0].count(f".{cut}.") for name in moved)


def test_only_what_is_trainable_gets_a_gradient(tiny: Callable[..., Any]) -> None:
    sliced, peft_model = attached(tiny("gpt2-classification"), cut=2)
    stored = sliced.front(2)(*sliced.example(LENGTHS, seed=1))
    assert not stored.requires_grad
    logits = sliced.logits(stored, torch.tensor(LENGTHS), 2)
    gradients(peft_model, logits, targets_for(sliced, torch.tensor(LENGTHS)))
    with_gradient = {
        name for name, value in peft_model.named_parameters() if value.grad is not None
    }
    assert with_gradient <= adapters.trainable(peft_model).keys()
    assert not any(f".h.{block}." in name for name in with_gradient for block in (0, 1))


def test_training_mode_never_drops_the_block_that_enters(tiny: Callable[..., Any]) -> None:
    """OPT drops half of its blocks at random while it trains; a dropped entrance would let the
    dummy tokens through, and the logits would not depend on the activation."""
    sliced, peft_model = attached(tiny("opt-causal_lm"), cut=2)
    stored = sliced.front(2)(*sliced.example(LENGTHS, seed=1))
    peft_model.train()
    for _ in range(8):
        logits = sliced.logits(stored, torch.tensor(LENGTHS), 2)
        other = sliced.logits(stored * 2, torch.tensor(LENGTHS), 2)
        assert (logits - other).abs().max() > 1e-3


@pytest.mark.parametrize("id_", ["gpt2-causal_lm", "opt-causal_lm", "bert-classification"])
def test_an_activation_is_computed_without_dropout(tiny: Callable[..., Any], id_: str) -> None:
    sliced, peft_model = attached(tiny(id_), cut=2)
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():
        inputs = sliced.example(LENGTHS, seed=1)
        expected = sliced.front(2)(*inputs)
        shallow = sliced.front(1)(*inputs)
        peft_model.train()
        one, two = (sliced.logits(expected, lengths, 2) for _ in range(2))
        assert not torch.equal(one, two)
        peft_model.train()
        assert torch.equal(sliced.lift(shallow, lengths, 1, 2), expected)
        peft_model.train()
        assert torch.equal(sliced.front(2)(*inputs), expected)


@pytest.mark.parametrize("cut", [-1, 3, 4])
def test_a_cut_outside_the_model_is_refused(tiny: Callable[..., Any], cut: int) -> None:
    with pytest.raises(ModelError, match=rf"got {cut}; allowed: {int(cut > 0)}\.\.2"):
        adapters.attach(SlicedModel(tiny("gpt2-causal_lm")), LoraSpec(), cut, seed=0)
