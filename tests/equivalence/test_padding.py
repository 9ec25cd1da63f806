"""Padding is nothing: however samples are put together, loss and gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from splitfrozen.config import LoraSpec, TrainSpec
from splitfrozen.records import IGNORED, SampleKey
from splitfrozen.training.batching import split
from splitfrozen.training.evaluate import Evaluator

SAMPLES = 7
LORA = LoraSpec(rank=4, alpha=8.0)
# The first step of a warm-up has the learning rate 0: it leaves the parameters as they are.
SPEC = TrainSpec(clip=1e9, warmup=0.5)


@pytest.fixture
def run(family: Any, tiny_run: Callable[..., Any]) -> Any:
    made = tiny_run(family.id, samples=SAMPLES, lora=LORA, train=SPEC)
    # LoRA's B starts at zero, and with it the gradient of A.
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.adapted.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return made


def gradients(run: Any, micro_tokens: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of all samples as one batch, before any update."""
    run.method.gradients.micro_tokens = micro_tokens
    keys = [SampleKey("only", id_) for id_ in range(SAMPLES)]
    result = run.method.step(keys, run.read(keys), 0)
    assert result.lr == 0
    return result.loss, {name: p.grad.clone() for name, p in run.adapted.parameters().items()}


def test_micro_batches_of_any_size_give_the_same_gradient(run: Any) -> None:
    lengths = run.samples().tokens
    assert len(split(lengths, 1)) == SAMPLES
    assert 1 < len(split(lengths, 40)) < SAMPLES
    assert len(split(lengths, 1000)) == 1
    loss, alone = gradients(run, 1)
    for micro_tokens in (40, 1000):
        other_loss, together = gradients(run, micro_tokens)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name], gradient, rtol=1e-5, atol=1e-6)
    assert all(gradient.abs().max() > 1e-5 for gradient in alone.values())


def test_evaluation_does_not_depend_on_its_batches(run: Any) -> None:
    alone, together = (
        Evaluator(run.part, run, run.sliced.kind, micro_tokens=bound, device=torch.device("cpu"))()
        for bound in (1, 1000)
    )
    assert together.metrics == pytest.approx(alone.metrics, rel=1e-5)
    assert together.score == pytest.approx(alone.score, rel=1e-5)


@pytest.mark.parametrize("id_", ["gpt2-causal_lm", "llama-causal_lm"])
def test_a_sample_without_targets_weighs_nothing(id_: str, tiny_run: Callable[..., Any]) -> None:
    run = tiny_run(id_, samples=2, lora=LORA)
    mute = replace(run.activations[1], targets=np.full_like(run.activations[1].targets, IGNORED))
    one, other = SampleKey("only", 0), SampleKey("only", 1)
    alone = run.method.step([one], [run.activations[0]], 0)
    both = run.method.step([one, other], [run.activations[0], mute], 0)
    assert both.loss == pytest.approx(alone.loss, rel=1e-6)
    nothing = run.method.step([other], [mute], 0)
    assert (nothing.loss, nothing.grad_norm, nothing.targets) == (0, 0, 0)
