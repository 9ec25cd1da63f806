"""SplitFrozen's planner: depths, codec setting and links for the least makespan.

A judge, passed in, says what a plan takes; the planner is careful with it. Given how long a front
may take at most, each device does best with the deepest front that keeps to that, as every block on
a device is one less for the server; so plans are a family with one parameter, and the best of it by
`Pipeline.estimate` are where a local search begins that the judge leads: other depths of one or two
devices, other links, other codec settings, the most promising first, none whose `Pipeline.floor`
says that it cannot win. Everything is deterministic; ties go to the first device by id, and among
codec settings to the most exact.

When devices' speeds or links have `moved`, the samples still to come are planned anew (`replan`):
what was sent stays as it is, since chunks carry their depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import numpy as np

from splitfrozen.planning.division import Wants, assign, exchanges, owned, shares
from splitfrozen.planning.makespan import (
    Array,
    Device,
    Medium,
    Pipeline,
    Plan,
    Point,
    Problem,
    Subchannels,
    plan_of,
)

Judge = Callable[[Plan], float]
"""Seconds that a plan takes."""

MOVED = 0.2
"""What a speed or link may change by before depths are planned anew, as a part of what it was."""
THRESHOLDS = 64
"""Members of the family that are estimated, at most."""
BEST = 4
"""Of them, so many are improved by their estimates."""
FINALISTS = 8
"""Of all estimated plans, so many of the best are judged before the local search."""
SUMMITS = 4
"""Where the local search begins, with few devices; with many, once."""
FEW = 6
"""Up to so many devices, two may change at once, and the band is divided otherwise, too."""
TRANSFERS = (0.3, 0.1, 0.03, 0.01)
"""Parts of a device's share of a medium that are given to another device."""
GAIN = 1 - 1e-3
"""A transfer is worth another round of estimates if it gains so much."""
BETTER = 1 - 1e-9
"""A plan must be better than by rounding to replace one that was found before."""


@dataclass(frozen=True, slots=True)
class Found:
    """A plan and how good it is.

    Attributes:
        plan: the best that was judged.
        makespan_s: what the judge says of it.
        bound_s: what no plan can be faster than.
        judged: how many plans the judge was shown.
    """

    plan: Plan
    makespan_s: float
    bound_s: float
    judged: int


def plan(
    problem: Problem, judge: Judge, starts: Sequence[Plan] = (), looks: int | None = None
) -> Found:
    """Find the plan with the least makespan.

    Args:
        judge: the makespan of a plan in seconds.
        starts: plans for (at least) these devices, whose depths and codecs are tried first, with
            links divided anew.
        looks: how often the judge may be asked; by default less often the more devices there are,
            as it then takes longer.

    Raises:
        PlanError: a device's memory, the accuracy budget, the least depth or the number of
            subchannels allows no plan; the remedy is the least change.
    """
    return _Search(problem, judge, looks or max(20, 4000 // len(problem.devices))).run(starts)


def moved(before: Device, now: Device) -> bool:
    """Whether a device's speed or link differs so much that depths should be planned anew."""
    pairs = ((before.flops, now.flops), (before.bps, now.bps))
    return any(not (1 - MOVED) * then <= this <= (1 + MOVED) * then for then, this in pairs)


def replan(problem: Problem, current: Plan, judge: Judge, looks: int | None = None) -> Found:
    """Plan what is still to come; the codec stays, and so may all depths.

    Args:
        problem: of the devices with samples left, and of those samples; speeds and links as they
            were measured last; lifts of what has come, which the server has still to do, are its
            `backlog`.
        current: the plan that was followed so far.
        judge: the makespan, from now on, of a plan for what is still to come, with the backlog.
        looks: as in `plan`.

    Raises:
        PlanError: as in `plan`, where memory or subchannels have become fewer.
    """
    knobs = tuple(knob for knob in problem.knobs if knob.name == current.codec)
    fixed = replace(problem, knobs=knobs, most_loss=max(knob.accuracy_loss for knob in knobs))
    return plan(fixed, judge, [current], looks)


class _Search:
    """One search: what was judged so far, and the best of it."""

    def __init__(self, problem: Problem, judge: Judge, looks: int) -> None:
        self._problem, self._judge, self._looks = problem, judge, looks
        self._names = [device.id for device in problem.devices]
        self._held, self._knobs = problem.depths(), problem.affordable()
        self._pipeline = Pipeline(problem)
        air = problem.air
        self._rates: Array = np.array(air.bps if isinstance(air, Subchannels) else [])
        self._seen: dict[Point, float] = {}
        self._best: Point | None = None
        self._seconds = math.inf

    def run(self, starts: Sequence[Plan]) -> Found:
        for one in starts:
            self._look(self._start(one))
        family = [self._descend(point) for knob in self._knobs for point in self._family(knob)]
        for point in self._promising(family)[:FINALISTS]:
            self._look(point)
        for point in self._summits():
            while better := self._improved(point):
                point = better
        assert self._best is not None, "the first look is always taken"
        return Found(
            plan_of(self._problem, self._best),
            self._seconds,
            self._pipeline.bound(),
            len(self._seen),
        )

    def _look(self, point: Point) -> float:
        """Judge a point unless it cannot win or enough was judged: infinite then."""
        if point not in self._seen:
            first, full = self._best is None, len(self._seen) >= self._looks
            if not first and (full or self._pipeline.floor(point) >= self._seconds):
                return math.inf
            self._seen[point] = self._judge(plan_of(self._problem, point))
            if first or self._seen[point] < self._seconds * BETTER:
                self._best, self._seconds = point, self._seen[point]
        return self._seen[point]

    def _summits(self) -> list[Point]:
        """Where to climb from: the best that was judged of each choice of depths and codec."""
        ranked = sorted(self._seen, key=self._seen.__getitem__)
        best = {(point.knob, point.depths): point for point in reversed(ranked)}
        found = sorted(best.values(), key=self._seen.__getitem__)
        return found[: SUMMITS if len(self._names) <= FEW else 1]

    def _improved(self, point: Point) -> Point | None:
        """The first neighbour that is better, the most promising first."""
        aim = self._seen[point] * BETTER
        near = self._promising(self._neighbours(point))
        return next((other for other in near if self._look(other) < aim), None)

    def _promising(self, points: Iterable[Point]) -> list[Point]:
        """Those not judged yet, by their estimates, ties in their order."""
        fresh = [point for point in dict.fromkeys(points) if point not in self._seen]
        return sorted(fresh, key=self._pipeline.estimate)

    # --- points ------------------------------------------------------------------------------

    def _start(self, one: Plan) -> Point:
        """The depths and the codec of a plan, as far as they are allowed, with links of our own."""
        named = (i for i in self._knobs if self._problem.knobs[i].name == one.codec)
        knob = next(named, self._knobs[0])
        depths = tuple(
            max((n for n in held if n <= one.depth[name]), default=held[0])
            for name, held in zip(self._names, self._held, strict=True)
        )
        return self._divided(knob, depths)

    def _divided(self, knob: int, depths: tuple[int, ...], *, in_turn: bool = False) -> Point:
        """A point with the band divided so that all of a step is ready at once.

        `in_turn`: as the server lifts one after the other, those for whom it takes longest come
        first.
        """
        air = self._problem.air
        if isinstance(air, Medium):
            rates = shares(self._wants(knob, depths, in_turn), air.bps)
            return Point(knob, depths, tuple(rates.tolist()))
        if isinstance(air, Subchannels):
            wants = self._wants(knob, depths, in_turn)
            return self._owned(knob, depths, assign(wants, self._rates, self._names))
        return Point(knob, depths, tuple(device.bps for device in self._problem.devices))

    def _owned(self, knob: int, depths: tuple[int, ...], owner: tuple[int, ...]) -> Point:
        rates = owned(self._rates, np.array(owner))
        return Point(knob, depths, tuple(rates.tolist()), owner)

    def _wants(self, knob: int, depths: tuple[int, ...], in_turn: bool) -> Wants:
        infinite = Point(knob, depths, (math.inf,) * len(depths))
        front, encode, _, lift = self._pipeline.stages(infinite)
        server, first = float(lift.sum()) + self._pipeline.train, self._problem.server.first
        behind = first * lift
        if in_turn:
            order = np.argsort(-lift, kind="stable")
            behind[order] = np.cumsum(behind[order][::-1])[::-1]
        return Wants(
            bits=self._pipeline.bits[knob],
            before=first * (front + encode),
            behind=behind,
            pace=np.maximum(np.maximum(front, encode), server),
            first=first,
        )

    def _family(self, knob: int) -> list[Point]:
        """The best by estimate of the family with one parameter."""
        fronts = self._pipeline.front
        times = {float(fronts[k, n - 1]) for k, held in enumerate(self._held) for n in held}
        limits: Array = np.quantile(sorted(times), np.linspace(0, 1, THRESHOLDS), method="lower")
        members = dict.fromkeys(
            tuple(
                max((n for n in held if fronts[k, n - 1] <= limit), default=held[0])
                for k, held in enumerate(self._held)
            )
            for limit in limits.tolist()
        )
        shallow = tuple(held[0] for held in self._held)
        if isinstance(self._problem.air, Subchannels) and len(self._names) > FEW:
            # To divide them takes long: they stay while depths change, and the other way round.
            owner = self._divided(knob, shallow).owner
            points = [self._owned(knob, depths, owner) for depths in members]
            best = min(points, key=self._pipeline.estimate)
            return [best, self._divided(knob, best.depths)]
        points = [
            self._divided(knob, depths, in_turn=turn)
            for depths in members
            for turn in (False, True)
        ]
        return sorted(dict.fromkeys(points), key=self._pipeline.estimate)[:BEST]

    def _descend(self, point: Point) -> Point:
        """Change the depth of one device after the other, and few devices' parts of a medium,
        while the estimate gets less."""
        seconds, again = self._pipeline.estimate(point), True
        few = len(self._names) <= FEW
        links = few and isinstance(self._problem.air, Medium)
        while again:
            again = False
            for k in range(len(self._names)):
                for n in self._others(k, point, few):
                    for other in self._with_depths(point, {k: n}):
                        found = self._pipeline.estimate(other)
                        if found < seconds * BETTER:
                            point, seconds, again = other, found, True
            for other in self._other_links(point) if links else ():
                found = self._pipeline.estimate(other)
                if found < seconds * GAIN:
                    point, seconds, again = other, found, True
                    break
        return point

    def _others(self, k: int, point: Point, every: bool = False) -> list[int]:
        """The next shallower and deeper depths that a device may have, or every other one."""
        held = self._held[k]
        place = held.index(point.depths[k])
        return [n for i, n in enumerate(held) if i != place and (every or abs(i - place) == 1)]

    def _with_depths(self, point: Point, depths: Mapping[int, int]) -> Iterator[Point]:
        """Other depths of some devices; the band as it is, and divided anew where that is quick."""
        changed = tuple(depths.get(k, n) for k, n in enumerate(point.depths))
        yield replace(point, depths=changed)
        air, few = self._problem.air, len(self._names) <= FEW
        if air is not None and (few or isinstance(air, Medium)):
            yield self._divided(point.knob, changed)
            if few:
                yield self._divided(point.knob, changed, in_turn=True)

    def _neighbours(self, point: Point) -> Iterator[Point]:
        few = len(self._names) <= FEW
        changes = [{k: n} for k in range(len(self._names)) for n in self._others(k, point, few)]
        if few:
            steps = [{k: n} for k in range(len(self._names)) for n in self._others(k, point)]
            changes += [one | other for one, other in combinations(steps, 2)]
        for change in changes:
            yield from self._with_depths(point, change)
        for knob in self._knobs:
            if knob != point.knob:
                yield self._divided(knob, point.depths)
        if few:
            yield from self._other_links(point)

    def _other_links(self, point: Point) -> Iterator[Point]:
        """The band divided otherwise between two devices."""
        count = len(self._names)
        if isinstance(self._problem.air, Subchannels):
            for k in range(count):
                for change in exchanges(np.array(point.owner), k):
                    owner = tuple(change.get(i, own) for i, own in enumerate(point.owner))
                    other = self._owned(point.knob, point.depths, owner)
                    if min(other.bps) > 0:
                        yield other
        elif isinstance(self._problem.air, Medium):
            for giver, taker in permutations(range(count), 2):
                for part in TRANSFERS:
                    bps = list(point.bps)
                    bps[giver], bps[taker] = bps[giver] * (1 - part), bps[taker] + bps[giver] * part
                    yield replace(point, bps=tuple(bps))
