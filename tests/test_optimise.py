"""Gradients and optimisers by themselves: who draws what, and several results as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional

from splitfrozen.config import TrainSpec
from splitfrozen.records import IGNORED, Ints
from splitfrozen.training.optimise import (
    Gradients,
    NotFiniteError,
    Optimiser,
    StepResult,
    targets_of,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Item:
    targets: Ints


ITEMS = [Item(np.array(row, np.int32)) for row in ([1], [IGNORED, 2, 0], [2, IGNORED])]


class Dropping:
    """Pulls each weight towards the items' targets, where dropout lets it through."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(64))
        self.draws: list[torch.Tensor] = []

    def length(self, item: Item) -> int:
        return len(item.targets)

    def loss(self, items: Sequence[Item]) -> torch.Tensor:
        left = functional.dropout(self.weight, 0.5)
        self.draws.append((left != 0).detach())
        return left.sum() * sum(targets_of([item]) for item in items)


def gradients(seed: int = 0, micro_tokens: int = 64) -> Gradients:
    return Gradients(TrainSpec(micro_tokens=micro_tokens), seed=seed, device=CPU)


def drawn(seed: int, step: int, *who: str) -> bytes:
    part = Dropping()
    gradients(seed).of(part, [part.weight], ITEMS, step, *who)
    assert part.weight.grad is not None
    [draw] = part.draws
    assert torch.equal(part.weight.grad != 0, draw)
    return draw.numpy().tobytes()


def test_dropout_depends_on_seed_step_and_who_computes() -> None:
    whos: list[tuple[str, ...]] = [(), ("a",), ("b",), ("server", "a")]
    ways = [(seed, step, who) for seed in (0, 1) for step in (0, 1) for who in whos]
    first = [drawn(seed, step, *who) for seed, step, who in ways]
    assert len(set(first)) == len(ways)
    torch.manual_seed(9)
    assert [drawn(seed, step, *who) for seed, step, who in reversed(ways)] == first[::-1]


def test_drawing_is_what_gradients_draw_from_and_leaves_torchs_own_state_alone() -> None:
    before = torch.get_rng_state()
    with gradients().drawing(3, "a"):
        left = functional.dropout(torch.ones(64), 0.5)
    assert (left != 0).numpy().tobytes() == drawn(0, 3, "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loss_is_the_mean_over_targets_and_old_gradients_are_forgotten() -> None:
    part = Dropping()
    part.weight.grad = torch.full((64,), 1e9)
    other = torch.nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    for micro_tokens, micro_batches in ((64, 1), (1, 3)):
        part.draws.clear()
        loss, targets = gradients(0, micro_tokens).of(part, [part.weight], ITEMS, 0)
        assert targets == targets_of(ITEMS) == 4
        assert len(part.draws) == micro_batches
        # What dropout lets through counts twice; of each draw, as many quarters as it has targets.
        weights = [4] if micro_batches == 1 else [2, 1, 1]
        shares = torch.stack(
            [2 * n / 4 * draw for n, draw in zip(weights, part.draws, strict=True)]
        )
        assert part.weight.grad is not None
        torch.testing.assert_close(part.weight.grad, shares.sum(0))
        assert loss == pytest.approx(float(shares.sum()))
    # It is not among the parameters that were asked for.
    assert float(other.grad) == 1


def test_an_optimiser_changes_its_own_parameters_alone() -> None:
    mine, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    mine.grad, other.grad = torch.full((2,), 3.0), torch.full((2,), 3.0)
    spec = TrainSpec(lr=0.1, warmup=0.0)
    assert Optimiser({"mine": mine}, spec, steps=4).step(2) == pytest.approx((18**0.5, 0.05))
    # The first step of Adam is as long as its learning rate.
    torch.testing.assert_close(mine.detach(), torch.full((2,), 0.95))
    assert torch.equal(other, torch.ones(2))
    assert torch.equal(other.grad, torch.full((2,), 3.0))


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(gradient: float) -> None:
    mine = torch.nn.Parameter(torch.ones(2))
    mine.grad = torch.full((2,), gradient)
    optimiser = Optimiser({"mine": mine}, TrainSpec(warmup=0.0), steps=4)
    with pytest.raises(NotFiniteError, match="diverged at step 3: got gradient norm"):
        optimiser.step(2)
    assert torch.equal(mine, torch.ones(2))
    assert optimiser.state().keys() == {"parameter.mine"}


def test_several_results_are_one_with_the_loss_of_all_targets() -> None:
    results = [StepResult(1.0, 0.3, 0.1, 6), StepResult(4.0, 0.9, 0.1, 2), StepResult(0, 0, 0.1, 0)]
    assert StepResult.of(results) == StepResult(14 / 8, 0.9, 0.1, 8)
    assert StepResult.of(results[:1]) == results[0]
    # Samples without a target weigh nothing.
    assert StepResult.of(results[2:]) == StepResult(0, 0, 0.1, 0)
