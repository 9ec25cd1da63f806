"""E(r), the rounds that training with LoRA of rank r takes to a target, from measured runs.

Section VI of the FedsLLM paper estimates it by a short training on little data. Such a measurement
is noisy, and a planner that took its dents for advantages would choose ranks by chance. So a
decreasing form is fitted to it: a + b / r^c or a + b exp(-c r), whichever is nearer in the least
squares, with a, b >= 0 and c > 0.

The paper's target is fixed beforehand. For a model and data of one's own there is none, so
`target_of` takes the hardest that every run gets to, or an easier one on the way there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from splitfrozen.planning.channel import Doubles

Form = Literal["a + b / r^c", "a + b exp(-c r)"]

FORMS: dict[Form, Callable[[Doubles, float], Doubles]] = {
    "a + b / r^c": lambda ranks, c: np.asarray(ranks**-c),
    "a + b exp(-c r)": lambda ranks, c: np.exp(-c * ranks),
}
STEEPEST = np.geomspace(0.02, 10, 500)
"""Values of c that are tried: from hardly falling to over after the first rank."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Called with a rank, it gives E(r).

    Attributes:
        form: with a, b and c in it.
        error: root of the mean square over the mean of what was fitted.
    """

    form: Form
    a: float
    b: float
    c: float
    error: float

    def __call__(self, rank: int) -> float:
        return self.a + self.b * float(FORMS[self.form](np.array([float(rank)]), self.c)[0])


def fit(measured: Mapping[int, float]) -> Fit:
    """Fit rounds by rank. For a given c, a and b follow from linear least squares."""
    ranks = np.array(list(measured), dtype=float)
    rounds = np.array(list(measured.values()), dtype=float)
    level = float(rounds.mean())
    # Where nothing falls, a constant is the best that does not rise.
    found = [Fit("a + b / r^c", level, 0.0, 1.0, float(rounds.std()) / level)]
    for form, falling in FORMS.items():
        for c in STEEPEST:
            shape = falling(ranks, float(c))
            for first in (np.ones_like(ranks), np.zeros_like(ranks)):
                a, b = np.linalg.lstsq(np.stack([first, shape], axis=1), rounds)[0]
                if a >= 0 and b >= 0:
                    error = float(np.sqrt(np.mean((a * first + b * shape - rounds) ** 2))) / level
                    found.append(Fit(form, float(a), float(b), float(c), error))
    return min(found, key=lambda one: one.error)


def target_of(runs: Sequence[Sequence[float]], way: float = 1.0) -> float:
    """A loss that every run gets to: the highest of their lowest, or a part of the way there.

    The whole way is as far as the slowest run came, so that one takes about as many rounds as it
    had, whatever their number.

    Args:
        runs: losses after 0, 1, 2 ... rounds.
        way: above 0, to 1: how much of the way from the mean first loss is gone.
    """
    begin = sum(run[0] for run in runs) / len(runs)
    # In this order, so that rounding cannot take it below what every run has.
    lowest = max(min(run) for run in runs)
    return lowest + (1 - way) * (begin - lowest)


def rounds_to(target: float, losses: Sequence[float]) -> float:
    """Rounds until the loss first is at the target, on a straight line between two rounds.

    Args:
        losses: after 0, 1, 2 ... rounds; one of them is at most the target.
    """
    after = next(number for number, loss in enumerate(losses) if loss <= target)
    if not after:
        return 0.0
    before = losses[after - 1]
    return after - (target - losses[after]) / (before - losses[after])
