"""Depths for `depth = "auto"`: planned when all devices are measured, and anew when one has moved.

The planner's judge is the simulator, over the very events by which a served run is forecast, with
the speeds that devices and server measured. What counts is when everything is at the cut: training
begins then, or has to wait for it, and takes the same whatever the depths.

A new plan is for what is still to come, and chunks carry their depth, so nothing that was sent
changes; what the server has still to lift of it keeps the server busy meanwhile. A new plan is
followed where it saves GAIN of the time that is left.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from splitfrozen.config import Config
from splitfrozen.model.costs import ModelShape, Tokens, forward_flops
from splitfrozen.planning import makespan
from splitfrozen.planning.makespan import Knob, Plan, Problem, Server
from splitfrozen.planning.splitfrozen import Found, moved, plan, replan
from splitfrozen.records import SERVER, SampleTable
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.forecast import Expected, Part, Speeds, believed, chunks_of, pieces, simulate
from splitfrozen.runs.networklog import model_shape
from splitfrozen.server.assignment import bytes_per_token
from splitfrozen.server.registry import DeviceRow, Registry
from splitfrozen.server.store import Store
from splitfrozen.simulation.network import Link

GAIN = 0.05
"""Part of the time left that a new plan must save."""

CHANGE = 0.01
"""Part of the time left that another depth of one device must save."""

LOOKS, LOOKS_ALL = 200, 4000
"""How often the judge is asked at most, for a device and for all: it takes longer with more."""

KEPT = 20
"""Where more devices than that get another depth, it is not asked for each whether it has to."""

REST_S, REST, RETRY_S = 1.0, 10, 30.0
"""Between two looks: so long, and so many times as long as the last one took; after an error."""

log = logging.getLogger("splitfrozen.assigning")


class Assigning:
    """Gives devices their depths; `look` is called again and again."""

    def __init__(
        self,
        run: RunFolder,
        registry: Registry,
        store: Store,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._registry, self._store, self._clock = run, registry, store, clock
        self._due = -math.inf
        self._house: _House | None = None
        self._devices: dict[str, makespan.Device] = {}
        """As they were when depths were planned last."""

    def look(self) -> bool:
        """Plan, if it is time to; returns whether there is a new plan.

        Where that fails, depths stay as they are, and the run goes on.
        """
        begin = self._clock()
        if self._run.config.devices.depth != "auto" or begin < self._due:
            return False
        planned = False
        try:
            planned = self._look()
            self._due = begin + max(REST_S, REST * (self._clock() - begin))
        except Exception as error:
            # What devices say decides nothing but depths, and must not end anything else.
            log.warning("depths stay as they are: %s: %s", type(error).__name__, error)
            self._due = begin + RETRY_S
        return planned

    def _look(self) -> bool:
        self._house = self._house or _house(self._run)
        rows = self._able(self._house) if self._house else []
        fresh = [row.id for row in rows if row.depth is None]
        if self._house is None or not rows or (fresh and self._awaited()):
            return False
        problem = self._house.problem(rows, self._left(rows))
        devices = {device.id: device for device in problem.devices}
        told = [d.id for d in problem.devices if moved(self._devices.get(d.id, d), d)]
        if fresh or told:
            why = f"{', '.join(told)} moved" if told else f"{len(fresh)} devices to place"
            self._plan(self._house, problem, rows, why)
        if fresh or told or not self._devices:
            self._devices = devices
        return bool(fresh or told)

    def _able(self, house: _House) -> list[DeviceRow]:
        """Devices that take part, sorted by id."""
        least = min(house.memory_bytes[house.least_depth - 1 :])
        able = [
            row
            for row in self._registry.devices()
            if not row.revoked
            and row.failure is None
            and row.announcement is not None
            and row.profile is not None
            and row.profile.memory_bytes >= least
        ]
        return sorted(able, key=lambda row: row.id)

    def _awaited(self) -> bool:
        """Whether devices that were not measured yet are still waited for."""
        missing, first = self._registry.gathering()
        waited = math.inf if first is None else self._registry.clock() - first
        return bool(missing) and waited < self._run.config.devices.gather_s

    def _left(self, rows: Sequence[DeviceRow]) -> dict[str, tuple[int, int]]:
        """Samples and tokens that are not stored yet."""
        stored = self._store.totals()
        left = {}
        for row in rows:
            assert row.announcement is not None
            samples, tokens = row.announcement.samples, row.announcement.tokens
            if row.id in stored:
                samples -= stored[row.id].samples
                tokens -= stored[row.id].tokens
            # Who announced fewer tokens than it sent has one a sample left.
            left[row.id] = samples, max(samples, tokens)
        return left

    def _plan(self, house: _House, problem: Problem, rows: Sequence[DeviceRow], why: str) -> None:
        problem = house.behind(problem, self._store.samples())
        names = {device.id for device in problem.devices}
        known = {row.id: row.depth for row in rows if row.depth is not None and row.id in names}

        def judge(one: Plan) -> float:
            return house.seconds(problem, one.depth)

        looks = min(LOOKS, max(20, LOOKS_ALL // len(problem.devices)))
        if not known:
            found = plan(problem, judge, looks=looks)
            depths, seconds = dict(found.plan.depth), found.makespan_s
        else:
            # Who has no depth yet has to start somewhere; the plan says where.
            depths = {d.id: known.get(d.id, house.shallowest(d)) for d in problem.devices}
            seconds = house.seconds(problem, depths)
            found = replan(problem, _followed(problem, depths), judge, looks)
            if len(known) < len(names) or found.makespan_s < (1 - GAIN) * seconds:
                depths, seconds = house.kept(problem, known, found)
        self._registry.assign(depths)
        log.info("%s: everything at the cut in %.1f s from now", why, seconds)
        self._run.report(
            {
                "event": "plan",
                "time": time.time(),
                "why": why,
                "depths": dict(depths),
                "seconds": seconds,
                "bound": found.bound_s,
            }
        )


@dataclass(frozen=True, slots=True)
class _House:
    """What of a problem stays as it is.

    Attributes:
        memory_bytes: [M], of front(1) .. front(M).
        lifts: FLOP/s of the server.
    """

    config: Config
    shape: ModelShape
    knob: Knob
    memory_bytes: tuple[float, ...]
    lifts: float

    @property
    def least_depth(self) -> int:
        return self.config.devices.least_depth

    def problem(self, rows: Sequence[DeviceRow], left: Mapping[str, tuple[int, int]]) -> Problem:
        """What is still to be sent, and by whom. `left`: samples and tokens by device."""
        cut, devices = len(self.memory_bytes), []
        for row in rows:
            samples, tokens = left[row.id]
            if samples <= 0 or row.profile is None:
                continue
            load = Tokens.uniform(samples, tokens / samples)
            devices.append(
                makespan.Device(
                    id=row.id,
                    flops=believed(row.profile.flops),
                    memory_bytes=row.profile.memory_bytes,
                    samples=samples,
                    tokens=tokens,
                    front=tuple(forward_flops(self.shape, n + 1, load) for n in range(cut)),
                    lift=tuple(forward_flops(self.shape, cut - n - 1, load) for n in range(cut)),
                    bps=believed(row.profile.uplink_bps),
                )
            )
        most = max((device.tokens for device in devices), default=0.0)
        chunks = chunks_of(most, self.config, self.shape, self.knob.bytes_per_token)
        # No larger than the judge's pieces, or a bound would be none.
        part = 1 / min(pieces(len(devices)), chunks)
        server = Server(flops=self.lifts, train=0.0, after=0.0, first=part, last=part)
        return Problem(
            tuple(devices), self.memory_bytes, server, (self.knob,), least_depth=self.least_depth
        )

    def behind(self, problem: Problem, table: SampleTable) -> Problem:
        """The problem with what the server has still to lift of the samples that it has."""
        cut, backlog = len(self.memory_bytes), 0.0
        for depth in range(1, cut):
            tokens = table.tokens[table.depth == depth].astype(np.float64)
            load = Tokens(len(tokens), float(tokens.sum()), float((tokens**2).sum()))
            backlog += forward_flops(self.shape, cut - depth, load)
        return replace(problem, server=replace(problem.server, backlog=backlog))

    def kept(
        self, problem: Problem, known: Mapping[str, int], found: Found
    ) -> tuple[dict[str, int], float]:
        """A plan's depths, and its seconds, where devices whose change gains nothing stay as they
        are: to change costs a download and the opening of a front."""
        depths, seconds = dict(found.plan.depth), found.makespan_s
        changed = [device for device in sorted(known) if depths[device] != known[device]]
        for device in changed if len(changed) <= KEPT else ():
            trial = {**depths, device: known[device]}
            if (found_s := self.seconds(problem, trial)) <= (1 + CHANGE) * found.makespan_s:
                depths, seconds = trial, found_s
        return depths, seconds

    def shallowest(self, device: makespan.Device) -> int:
        """Depth of the shallowest front that a device holds and may run."""
        needs = list(enumerate(self.memory_bytes, 1))[self.least_depth - 1 :]
        return next(n for n, need in needs if need <= device.memory_bytes)

    def seconds(self, problem: Problem, depths: Mapping[str, int]) -> float:
        """Until everything is at the cut, by the simulator."""
        expected = Expected(self.config, self.shape, self.knob.bytes_per_token)
        expected.stored(problem.server.backlog)
        parts = (Part(d.id, depths[d.id], d.samples, d.tokens) for d in problem.devices)
        expected.send(parts, pieces(len(problem.devices)))
        flops = {(device.id, "front"): device.flops for device in problem.devices}
        links = {(device.id, SERVER): Link(device.bps) for device in problem.devices}
        speeds = Speeds({**flops, (SERVER, "lift"): self.lifts}, links)
        return simulate(expected.log.events, speeds).makespan


def _house(run: RunFolder) -> _House | None:
    """None until model and server are known."""
    prepared, shape, lifts = run.prepared(), model_shape(run), _lift_speed(run)
    if prepared is None or shape is None or lifts is None:
        return None
    fronts = sorted(prepared.fronts, key=lambda front: front.depth)
    memory = tuple(float(front.memory_bytes) for front in fronts)
    knob = Knob(prepared.codec, bytes_per_token(prepared))
    return _House(run.config, shape, knob, memory, lifts)


def _lift_speed(run: RunFolder) -> float | None:
    for event in reversed(run.events("speed")):
        flops = event.get("flops")
        if isinstance(flops, int | float) and 0 < flops < math.inf:
            return flops
    return None


def _followed(problem: Problem, depths: Mapping[str, int]) -> Plan:
    """The plan that devices follow now."""
    samples = sum(device.samples for device in problem.devices)
    return Plan(
        depth=dict(depths),
        codec=problem.knobs[0].name,
        bps={device.id: device.bps for device in problem.devices},
        share={device.id: device.samples / samples for device in problem.devices},
        subchannels={},
    )
