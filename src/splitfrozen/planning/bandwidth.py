"""Bandwidth for devices whose delay is fixed_s + hertz_s / bandwidth: problem P2 of the SFT paper.

    least over b of  max_n (fixed_n + hertz_n / b_n)   with   b_n <= most_n,  sum b_n <= total

Each device's delay falls with its bandwidth, so a common delay T can be had where what it takes
fits, and `exact` finds the least T by bisection:

    sum_n hertz_n / (T - fixed_n) <= total   and   T >= fixed_n + hertz_n / most_n for all n

`successive` is the paper's own way, Algorithm 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

Reals = npt.NDArray[np.float64]

ROUNDING = 1e-12
"""Of a delay, relative: bisection ends there."""
STOP = 1e-9
"""Algorithm 3 ends where a step promises less than that part of the delay."""
MOST_STEPS = 100
BOLD = 0.8
"""How near to its least bandwidth a step may take a device: 0 not at all, 1 all the way."""
LITTLE = 1e-12
"""Of the total; tangents are taken nowhere below."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What devices need in a round; leading dimensions are instances.

    Attributes:
        fixed_s: float64 [..., N], seconds that do not depend on the bandwidth.
        hertz_s: float64 [..., N], seconds times Hz: bits over spectral efficiency.
    """

    fixed_s: Reals
    hertz_s: Reals

    def delays(self, band_hz: Reals) -> Reals:
        """Seconds [..., N] with so much bandwidth [..., N]; infinite where some is needed, and
        there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            sending = np.where(self.hertz_s > 0, self.hertz_s / band_hz, 0.0)
        return self.fixed_s + sending


@dataclass(frozen=True, slots=True)
class Band:
    """What there is: `total_hz` for all together, float64 [N] `most_hz` for each; all above 0."""

    total_hz: float
    most_hz: Reals


@dataclass(frozen=True, slots=True)
class Allocation:
    """A solution.

    Attributes:
        band_hz: float64 [N]. Equation 29c wants its sum to be the total; here it may be less, where
            devices have all that they may have, or more would not help the slowest one.
        delay_s: of the slowest device.
        steps: linear problems that were solved for it; 0 for `exact`.
    """

    band_hz: Reals
    delay_s: float
    steps: int = 0


def least_delay(demand: Demand, band: Band) -> Reals:
    """The least common delay [...] of each instance, by bisection from above: it can be had."""
    fixed, hertz = demand.fixed_s, demand.hertz_s
    low = (fixed + hertz / band.most_hz).max(axis=-1)
    # With T above every device's own least delay by that much, each needs at most its part.
    high = (low + hertz.sum(axis=-1) / band.total_hz) * (1 + ROUNDING)
    while np.any(high - low > ROUNDING * high):
        middle = (low + high) / 2
        fits = _needed(demand, middle).sum(axis=-1) <= band.total_hz
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return np.asarray(high)


def exact(demand: Demand, band: Band) -> Allocation:
    """Solve P2 for one instance [N]."""
    delay = least_delay(demand, band)
    return Allocation(np.minimum(_needed(demand, delay), band.most_hz), float(delay))


def successive(demand: Demand, band: Band) -> Allocation:
    """Solve P2 for one instance [N] by Algorithm 3: sequential programming from equal shares.

    Each step solves equations 34, the delays replaced by their tangents (33). The objective there
    is linear, so the paper's quadratic programme is a linear one, and needs what the paper leaves
    out: bounds of the step. The tangent of c / b meets zero at 2b, so a device with more than twice
    what it needs could be left with nothing, and its delay is infinite there. Here none is left
    with so little that it would be slower than the slowest is now; so every step is an improvement.
    """
    usable = min(band.total_hz, float(band.most_hz.sum()))  # Else equation 34c cannot hold.
    now = shares(np.ones_like(band.most_hz), band)
    delay, steps = float(demand.delays(now).max()), 0
    while steps < MOST_STEPS:
        steps += 1
        proposed, promised = _tangent_step(demand, band.most_hz, now, usable)
        reached = float(demand.delays(proposed).max())
        if reached < delay:
            now = proposed
        if delay - promised <= STOP * delay or reached >= delay:
            break
        delay = reached
    return Allocation(now, min(delay, reached), steps)


def shares(weights: Reals, band: Band) -> Reals:
    """Bandwidth [..., N] in proportion to weights [..., N] above 0; what one may not have goes to
    the others."""
    order = np.argsort(band.most_hz / weights, axis=-1, kind="stable")
    most, own = band.most_hz[order], np.take_along_axis(weights, order, axis=-1)
    left = band.total_hz - (np.cumsum(most, axis=-1) - most)
    rest = np.cumsum(own[..., ::-1], axis=-1)[..., ::-1]
    # For a weight of 1, were all before in this order capped. This grows as long as they should be.
    level = (left / rest).max(axis=-1, keepdims=True)
    return np.asarray(np.minimum(band.most_hz, weights * level))


def _needed(demand: Demand, delay: Reals) -> Reals:
    """Bandwidth [..., N] with which devices take so long; none for who has nothing to send."""
    room = delay[..., None] - demand.fixed_s
    none = np.zeros(np.broadcast_shapes(room.shape, demand.hertz_s.shape))
    with np.errstate(divide="ignore"):  # Where sending is lost in the rounding of the rest.
        return np.asarray(np.divide(demand.hertz_s, room, out=none, where=demand.hertz_s > 0))


def _tangent_step(demand: Demand, most_hz: Reals, now: Reals, usable: float) -> tuple[Reals, float]:
    """Solve equations 34: bandwidth [N], and the delay that the tangents promise.

    In units of the total and of the present delay, so that the solver's tolerances mean something.
    """
    delays = demand.delays(now)
    unit, count, part = delays.max(), len(now), now / usable
    enough = _needed(demand, unit) / usable
    least = np.clip(enough**BOLD * part ** (1 - BOLD), np.minimum(LITTLE, part), part)
    most = np.maximum(most_hz / usable, part)
    slopes = -demand.hertz_s / now**2 * usable / unit
    solved = linprog(
        c=[0.0] * count + [1.0],
        A_ub=np.hstack([np.diag(slopes), -np.ones((count, 1))]),
        b_ub=slopes * part - delays / unit,
        A_eq=[[1.0] * count + [0.0]],
        b_eq=[part.sum()],
        bounds=[*zip(least, most, strict=True), (None, None)],
        method="highs",
    )
    assert solved.success, solved.message  # The present allocation satisfies everything.
    band_hz = np.clip(solved.x[:-1], least, most) * usable
    return band_hz * min(1.0, usable / band_hz.sum()), float(solved.x[-1] * unit)
