"""Split fine-tuning on wireless devices: problem P1 of the SFT paper, of the large timescale.

P1 chooses the keep rate rho, the levels E and the devices' blocks l. The first two act on the delay
by the compression ratio beta alone, and on nothing else but the accuracy, so `solve` takes the
least ratio that is accurate enough and then the best of all l. `search` is brute force, `lagrange`
the paper's Algorithm 2; both look at every combination of a `Grid`. In each, bandwidth is what P2
gives on the channel that is planned for, so it is the paper's joint problem (27) that is solved.
A grid may miss what is allowed; only `solve` knows that there is nothing.

P2, of the small timescale, is solved anew in each round, for the channel as it is then:
`bandwidth.exact(sft_delay.round_demand(...), system.band)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from splitfrozen.errors import PlanError
from splitfrozen.model import costs
from splitfrozen.model.costs import Tokens
from splitfrozen.planning.bandwidth import Reals, least_delay
from splitfrozen.planning.sft_delay import FLOAT_BITS, System, first_round_s, round_demand
from splitfrozen.planning.surface import Surface

BLIND = 1e-9
"""Accuracies that differ by less are equal: a root of the surface is not found more exactly."""
MOST_STEPS, MOST_MU = 500, 1e12
"""Algorithm 2 ends there if it does not settle."""
NAMED = 3
"""Devices that a message names; of the others it says how many there are."""
SETTLED = 1e-9
ACCURACY_UNIT = 0.01
"""Algorithm 2 counts lacking accuracy in points, so that it weighs like a percent of delay."""


def entropy_bits(rho: npt.ArrayLike, levels: npt.ArrayLike) -> Reals:
    """Bits an element that Top-K with stochastic quantisation takes at least, when coded well.

    The entropy of the mask, H(rho), and for each kept element a sign and one of E levels, all as
    likely. Levels seldom are: a measured rate is a little lower. Concave in the keep rate.
    """
    kept = np.asarray(rho, np.float64)
    rest = 1 - kept
    with np.errstate(divide="ignore", invalid="ignore"):
        mask = -kept * np.log2(kept) - np.where(rest > 0, rest * np.log2(rest), 0.0)
    return np.asarray(mask + kept * (1 + np.log2(levels)))


@dataclass(frozen=True, slots=True)
class Bounds:
    """Equations 28d to 28f: least and most."""

    rho: tuple[float, float]
    levels: tuple[int, int]
    blocks: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Problem:
    """P1.

    Attributes:
        system: who trains what.
        snr: float64 [N], of the uplinks that are planned for, as ratios.
        surface: A(rho, E).
        least_accuracy: A_th.
        bounds: of the three variables.
    """

    system: System
    snr: Reals
    surface: Surface
    least_accuracy: float
    bounds: Bounds

    def ratio(self, rho: npt.ArrayLike, levels: npt.ArrayLike) -> Reals:
        """beta."""
        return entropy_bits(rho, levels) / FLOAT_BITS

    def delay(self, blocks: int, ratio: npt.ArrayLike) -> Reals:
        """Seconds of all rounds, equation 20, of one or more ratios."""
        system = self.system
        demand = round_demand(system, blocks, ratio, self.snr)
        later = least_delay(demand, system.band)
        return system.rounds * later + first_round_s(system, blocks)

    def every_blocks(self) -> range:
        return range(self.bounds.blocks[0], self.bounds.blocks[1] + 1)

    def every_levels(self) -> range:
        return range(self.bounds.levels[0], self.bounds.levels[1] + 1)

    def memory_bytes(self, blocks: int) -> float:
        """M_c(l), equation 26."""
        own = self.system
        batch = Tokens.uniform(own.batch, own.tokens)
        return costs.sft_device_bytes(own.shape, blocks, batch, own.rank, own.moments)


@dataclass(frozen=True, slots=True)
class Choice:
    """An answer to P1.

    Attributes:
        rho, levels, blocks: the variables.
        ratio: beta.
        accuracy: by the surface.
        delay_s: of all rounds.
        steps: updates of the multipliers that it took; 0 for what has none.
        settled: whether it came to rest by itself, as what does not iterate always does.
    """

    rho: float
    levels: int
    blocks: int
    ratio: float
    accuracy: float
    delay_s: float
    steps: int = 0
    settled: bool = True


def solve(problem: Problem) -> Choice:
    """Solve P1 exactly. Raises PlanError where no accuracy, or no memory, is enough."""
    fitting = _fitting(problem)
    ratio, levels, rho = _least_ratio(problem)
    delay, blocks = min((float(problem.delay(blocks, ratio)), blocks) for blocks in fitting)
    accuracy = float(problem.surface.accuracy(rho, levels))
    return Choice(rho, levels, blocks, ratio, accuracy, delay)


def violated(problem: Problem, choice: Choice) -> str | None:
    """The first constraint of P1 that a choice breaks, by name and how; None where it keeps all."""
    accuracy = float(problem.surface.accuracy(choice.rho, choice.levels))
    if accuracy < problem.least_accuracy - BLIND:
        return f"accuracy: {accuracy:.6f}, of {problem.least_accuracy:.6f} at least"
    needed = problem.memory_bytes(choice.blocks)
    for device in problem.system.devices:
        if needed >= device.memory_bytes:
            return f"memory: {needed:.0f} bytes of {device.id}, which has {device.memory_bytes:.0f}"
    for name, value, (least, most) in (
        ("keep rate:", choice.rho, problem.bounds.rho),
        ("levels:", choice.levels, problem.bounds.levels),
        ("blocks:", choice.blocks, problem.bounds.blocks),
    ):
        if not least <= value <= most:
            return f"{name} {value:g}, of {least:g} to {most:g}"
    return None


@dataclass(frozen=True, slots=True)
class Grid:
    """Every combination of so many keep rates with all levels and all blocks of a problem.

    Attributes:
        rho, levels, ratio, accuracy: [K], one for each keep rate with each number of levels.
        blocks: the rows of `delays`.
        delays: seconds [len(blocks), K].
    """

    rho: Reals
    levels: npt.NDArray[np.int64]
    ratio: Reals
    accuracy: Reals
    blocks: tuple[int, ...]
    delays: Reals

    @classmethod
    def of(cls, problem: Problem, rates: int) -> Grid:
        axes = np.linspace(*problem.bounds.rho, rates), np.array(problem.every_levels())
        rho, levels = (one.ravel() for one in np.meshgrid(*axes, indexing="ij"))
        ratio, blocks = problem.ratio(rho, levels), tuple(problem.every_blocks())
        return cls(
            rho,
            levels,
            ratio,
            problem.surface.accuracy(rho, levels),
            blocks,
            np.stack([problem.delay(one, ratio) for one in blocks]),
        )

    def choice(self, row: int, place: int) -> Choice:
        """What stands there."""
        return Choice(
            rho=float(self.rho[place]),
            levels=int(self.levels[place]),
            blocks=self.blocks[row],
            ratio=float(self.ratio[place]),
            accuracy=float(self.accuracy[place]),
            delay_s=float(self.delays[row, place]),
        )


def search(problem: Problem, grid: Grid) -> Choice | None:
    """The best of a grid; None where nothing in it is accurate enough. Raises PlanError where no
    memory is enough."""
    fitting = np.isin(grid.blocks, _fitting(problem))
    accurate = grid.accuracy >= problem.least_accuracy - BLIND
    if not accurate.any():
        return None
    delays = np.where(fitting[:, None] & accurate, grid.delays, np.inf)
    row, place = np.unravel_index(delays.argmin(), delays.shape)
    return grid.choice(int(row), int(place))


def lagrange(problem: Problem, grid: Grid) -> Choice | None:
    """Algorithm 2: multipliers for the constraints, exhaustive l, a grid for rho and E.

    The paper maximises tau + lambda g; a delay is to be small, so this minimises it, with what is
    violated on the side that costs. Plain multipliers need not settle on variables that are whole
    numbers; as in the paper's abstract the Lagrangian is augmented: of each violation g

        (max(0, lambda + mu g)^2 - lambda^2) / (2 mu),   lambda <- max(0, lambda + mu g)

    where mu, the step of the paper's update, grows while the violation does not shrink.

    Returns:
        The best allowed combination that it came by; None where it came by none. It has `settled`
        where the Lagrangian stood still at an allowed one, and not where steps or mu ran out.
    """
    lacking = (problem.least_accuracy - grid.accuracy) / ACCURACY_UNIT
    held = np.array([one.memory_bytes for one in problem.system.devices])
    over = np.array([problem.memory_bytes(blocks) / held - 1 for blocks in grid.blocks])
    force = _Multipliers(0.0, np.zeros(len(held)))
    before, steps, settled, unit = np.inf, 0, False, grid.delays.min()
    best: tuple[int, int] | None = None
    while not settled and steps < MOST_STEPS and force.mu < MOST_MU:
        steps += 1
        values = grid.delays / unit + force.of_memory(over)[:, None] + force.of_accuracy(lacking)
        row, place = (int(one) for one in np.unravel_index(values.argmin(), values.shape))
        allowed = force.update(float(lacking[place]), over[row])
        if allowed and (best is None or grid.delays[row, place] < grid.delays[best]):
            best = row, place
        settled = allowed and abs(float(values[row, place]) - before) < SETTLED
        before = float(values[row, place])
    if best is None:
        return None
    return replace(grid.choice(*best), steps=steps, settled=settled)


@dataclass(slots=True)
class _Multipliers:
    """Those of Algorithm 2: for the accuracy, and [N] for the devices' memory."""

    lacks: float
    overs: Reals
    mu: float = 1.0
    worst: float = np.inf

    def of_accuracy(self, violations: Reals) -> Reals:
        return _augmented(violations, self.lacks, self.mu)

    def of_memory(self, violations: Reals) -> Reals:
        """Of violations [..., N], summed over devices."""
        return np.asarray(_augmented(violations, self.overs, self.mu).sum(axis=-1))

    def update(self, lacking: float, over: Reals) -> bool:
        """Push against what is violated; whether nothing is."""
        self.lacks = max(0.0, self.lacks + self.mu * lacking)
        self.overs = np.maximum(0.0, self.overs + self.mu * over)
        worst = max(lacking, float(over.max()))
        if worst > max(BLIND, self.worst / 2):
            self.mu *= 2
        self.worst = worst
        return worst <= BLIND


def _augmented(violations: Reals, multipliers: Reals | float, mu: float) -> Reals:
    pushed = np.maximum(0.0, multipliers + mu * violations)
    return np.asarray((pushed**2 - np.square(multipliers)) / (2 * mu))


def _fitting(problem: Problem) -> list[int]:
    """Blocks that every device has the memory for. Raises PlanError."""
    least = min(one.memory_bytes for one in problem.system.devices)
    found = [blocks for blocks in problem.every_blocks() if problem.memory_bytes(blocks) < least]
    if not found:
        raise _no_memory(problem, least)
    return found


def _no_memory(problem: Problem, least: float) -> PlanError:
    fewest = problem.bounds.blocks[0]
    needed = problem.memory_bytes(fewest)
    short = sorted(
        (one for one in problem.system.devices if one.memory_bytes <= needed),
        key=lambda one: (one.memory_bytes, one.id),
    )
    named, others = short[:NAMED], short[NAMED:]
    # Equation 28c wants less than all of it.
    lacks = [math.floor(needed - one.memory_bytes) + 1 for one in short]
    given = [f"{one.id} {more}" for one, more in zip(named, lacks, strict=False)]
    have = [f"{one.memory_bytes:.0f} bytes" for one in named]
    names = ", ".join(one.id for one in named)
    if others:
        names += f" and {len(others)} more devices"
        have.append(f"{others[0].memory_bytes:.0f} bytes or more")
        given.append(f"the others up to {lacks[NAMED]}")
    fewer = [one for one in range(1, fewest) if problem.memory_bytes(one) < least]
    return PlanError(
        f"{names} {'has' if len(short) == 1 else 'have'} not the memory for {fewest} of the blocks",
        got=", ".join(have),
        allowed=f"more than {needed:.0f} bytes",
        remedy=f"give so many more bytes: {', '.join(given)}"
        + (f"; or lower the least blocks to {fewer[-1]}" if fewer else ""),
    )


def _least_ratio(problem: Problem) -> tuple[float, int, float]:
    """The least compression ratio that is accurate enough, with its levels and its keep rate.

    For given levels the allowed keep rates are intervals, between bounds of rho and roots of a
    cubic; the concave rate is least at an end of one. Where the accuracy turns it is greatest, and
    an interval may be that point alone. Raises PlanError.
    """
    found: list[tuple[float, int, float]] = []
    most = -np.inf
    for levels in problem.every_levels():
        cubic = problem.surface.cubic(levels)
        ends = np.array([*problem.bounds.rho, *_roots(cubic[1:] * np.arange(1, 4))])
        cubic[0] -= problem.least_accuracy
        ends = np.clip(np.append(ends, _roots(cubic)), *problem.bounds.rho)
        accuracy = problem.surface.accuracy(ends, levels)
        most = max(most, float(accuracy.max()))
        allowed = ends[accuracy >= problem.least_accuracy - BLIND]
        found += [(float(problem.ratio(rho, levels)), levels, float(rho)) for rho in allowed]
    if not found:
        raise _inaccurate(problem, most)
    return min(found)


def _roots(polynomial: Reals) -> Reals:
    """Real roots, none of a constant; an imaginary part within rounding is none."""
    # numpy.polynomial's loses small roots beside those that a coefficient of rounding makes.
    roots = np.roots(polynomial[::-1])
    return np.asarray(roots[np.abs(roots.imag) < BLIND].real)


def _inaccurate(problem: Problem, most: float) -> PlanError:
    # Rounded so that what is asked for can be had.
    lowered = math.floor(most * 1e4) / 1e4
    more = math.ceil((problem.least_accuracy - most) * 1e4) / 1e4
    return PlanError(
        "no compression within the bounds is accurate enough",
        got=f"{problem.least_accuracy:.4f} wanted",
        allowed=f"at most {lowered:.4f} by the accuracy surface of {problem.surface.model}",
        remedy=f"allow {more:.4f} more to be lost, or widen the bounds of rho and levels",
    )
