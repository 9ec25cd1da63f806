"""The parts of an adapted model: what of it drops, and that parts together are the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splitfrozen import rng
from splitfrozen.config import LoraSpec
from splitfrozen.methods.parts import Adapted, Lower, Upper, Whole
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import IGNORED, Activation, Sample

CUT = 2
LENGTHS = (9, 4, 7)
EXACT = {"rtol": 1e-5, "atol": 1e-5}


class Watched(torch.nn.Identity):
    """Counts how often the whole tree of modules is switched."""

    switched = 0

    def train(self, mode: bool = True) -> Watched:
        self.switched += 1
        return super().train(mode)


def adapt(model: Any, cut: int, dropout: float = 0.0) -> Adapted:
    """An adapted model whose adapters are not at their initial value, where B is zero."""
    sliced = SlicedModel(model)
    peft_model = adapters.attach(sliced, LoraSpec(rank=2, dropout=dropout), cut, 0)
    peft_model.train()
    adapted = Adapted(sliced, peft_model, "tiny")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return adapted


def samples_of(sliced: SlicedModel) -> tuple[list[Sample], tuple[torch.Tensor, ...]]:
    """Samples of several lengths, and the same as inputs of the model. Prompts carry no loss."""
    inputs = sliced.example(LENGTHS, seed=1)
    samples = []
    for id_, length in enumerate(LENGTHS):
        own = dict(zip(sliced.inputs, (values[id_].numpy() for values in inputs), strict=True))
        label = int(rng.stream(0, "label", id_).integers(3))
        if sliced.kind == "image":
            none = np.zeros(0, np.int32)
            patches = 1 + (24 // 6) ** 2
            label_alone = np.array([label], np.int32)
            samples.append(Sample(id_, none, None, own["pixel_values"], label_alone, patches))
            continue
        tokens = own["input_ids"][:length].astype(np.int32)
        types = own.get("token_type_ids")
        targets = np.array([label], np.int32)
        if sliced.kind == "causal_lm":
            targets = np.append(tokens[1:], IGNORED).astype(np.int32)
            targets[: id_ + 1] = IGNORED
        types = None if types is None else types[:length].astype(np.int32)
        samples.append(Sample(id_, tokens, types, None, targets, length))
    return samples, inputs


def activations(hidden: torch.Tensor, samples: Sequence[Sample], depth: int) -> list[Activation]:
    """What a device sends of hidden states [B, T, D]."""
    return [
        Activation(sample.id, depth, row[: sample.length].numpy(), sample.targets)
        for sample, row in zip(samples, hidden.detach(), strict=True)
    ]


def gradients(adapted: Adapted) -> dict[str, torch.Tensor]:
    """Take the gradients away from the parameters."""
    found = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in adapted.parameters().items()
    }
    adapted.model.zero_grad()
    return found


def of_the_model(adapted: Adapted, samples: Sequence[Sample], inputs: Any) -> torch.Tensor:
    """The targets' logits as the model itself gives them."""
    sliced = adapted.sliced
    adapted.drop(False)
    with torch.no_grad():
        logits = sliced.model(**dict(zip(sliced.inputs, inputs, strict=True))).logits
    if sliced.kind != "causal_lm":
        return logits
    return torch.cat(
        [
            row[: sample.length][torch.from_numpy(sample.targets != IGNORED)]
            for row, sample in zip(logits, samples, strict=True)
        ]
    )


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = max(float(value.abs().max()), 0.1)
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_only_loras_dropout_is_switched_on(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2-classification", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    adapted = adapt(model, cut=0, dropout=0.5)
    adapted.model.add_module("watched", watched := Watched())
    samples, _ = samples_of(adapted.sliced)
    lower, upper, whole = Lower(adapted, CUT), Upper(adapted, CUT), Whole(adapted)
    watched.switched = 0
    hidden = lower.hidden(samples, dropout=False).detach()
    items = activations(hidden, samples, CUT)
    modules = dict(adapted.model.named_modules())
    calls: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (lambda: upper.loss(items), lambda: upper.logits(items)[0]),
        (lambda: upper.loss_and_input(items)[0], lambda: upper.logits(items)[0]),
        (lambda: whole.loss(samples), lambda: whole.logits(samples)[0]),
        (
            lambda: lower.hidden(samples, dropout=True),
            lambda: lower.hidden(samples, dropout=False),
        ),
    ]
    for dropping, calm in calls:
        draws = {float(dropping().detach().sum()) for _ in range(3)}
        on = {name for name, module in modules.items() if module.training} - {"watched"}
        assert on
        assert all("lora_dropout" in name for name in on)
        assert len(draws) == 3
        answers = {float(calm().detach().flatten()[0]) for _ in range(3)}
        assert len(answers) == 1
        on = {name for name, module in modules.items() if module.training} - {"watched"}
        assert not on
    assert torch.equal(lower.hidden(samples, dropout=False), hidden)
    # A walk over all modules takes longer than the step of a small model.
    assert watched.switched == 0


@pytest.mark.parametrize("cut", [1, CUT])
def test_the_lower_part_and_the_upper_are_the_whole(family: Any, cut: int) -> None:
    adapted = adapt(family.build(), cut=0)
    samples, inputs = samples_of(adapted.sliced)
    expected = of_the_model(adapted, samples, inputs)
    lower, upper, whole = Lower(adapted, cut), Upper(adapted, cut), Whole(adapted)
    with torch.no_grad():
        logits, targets = whole.logits(samples)
        received = activations(lower.hidden(samples, dropout=False), samples, cut)
        others, same = upper.logits(received)
    torch.testing.assert_close(logits, expected, **EXACT)
    torch.testing.assert_close(others, expected, **EXACT)
    assert targets.tolist() == same.tolist()
    carrying = [target for sample in samples for target in sample.targets if target != IGNORED]
    assert targets.tolist() == carrying

    loss = whole.loss(samples)
    loss.backward()
    wanted = gradients(adapted)
    reference = torch.nn.functional.cross_entropy(expected, targets, reduction="sum")
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)

    # The device's pass, what it sends, the server's pass, what comes back, the device's backward.
    hidden = lower.hidden(samples, dropout=True)
    loss, arrived = upper.loss_and_input(activations(hidden, samples, cut))
    loss.backward()
    above = gradients(adapted)
    assert arrived.grad is not None
    hidden.backward(arrived.grad)
    below = gradients(adapted)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert_same({name: above[name] + below[name] for name in above}, wanted)
    theirs = set(adapters.below(adapted.sliced, wanted, cut))
    assert {name for name, value in below.items() if value.abs().max() > 0} <= theirs
    assert {name for name, value in above.items() if value.abs().max() > 0}.isdisjoint(theirs)
    assert all(value.abs().max() > 0 for name, value in wanted.items() if name in theirs)


def test_above_frozen_blocks_the_upper_part_is_the_whole(family: Any) -> None:
    adapted = adapt(family.build(), cut=CUT)
    samples, _ = samples_of(adapted.sliced)
    hidden = Lower(adapted, CUT).hidden(samples, dropout=True)
    assert not hidden.requires_grad
    upper, whole = Upper(adapted, CUT), Whole(adapted)
    items = activations(hidden, samples, CUT)
    torch.testing.assert_close(upper.logits(items)[0], whole.logits(samples)[0], **EXACT)
    upper.loss(items).backward()
    got = gradients(adapted)
    whole.loss(samples).backward()
    assert_same(got, gradients(adapted))
    assert max(float(value.abs().max()) for value in got.values()) > 1e-3


def test_parts_know_lengths_and_the_adapter_is_saved(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    adapted = adapt(tiny("bert-classification"), cut=1)
    samples, _ = samples_of(adapted.sliced)
    items = activations(Lower(adapted, 1).hidden(samples, dropout=False), samples, 1)
    assert tuple(map(Lower(adapted, 1).length, samples)) == LENGTHS
    assert tuple(map(Whole(adapted).length, samples)) == LENGTHS
    assert tuple(map(Upper(adapted, 1).length, items)) == LENGTHS
    adapted.save(tmp_path / "adapter")
    opened = adapters.open_adapter(tiny("bert-classification"), tmp_path / "adapter")
    again = Adapted(SlicedModel(tiny("bert-classification")), opened, "tiny")
    assert not again.parameters()
    for name, value in adapters.state(opened).items():
        assert torch.equal(value, adapters.state(adapted.model)[name])
