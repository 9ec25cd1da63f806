"""Networks that SplitFrozen is planned for: as the planner sees them, and as the simulator does.

A `Case` is both: `problem` goes to `planning.splitfrozen.plan`, and `Case.judge` replays a plan's
schedule and says its makespan. `draw` makes small random networks, and `brute_force` finds the best
plan of one, to measure the planner by; `crowd` is a large cell with subchannels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from splitfrozen import rng
from splitfrozen.model import costs
from splitfrozen.model.costs import FLOAT_BYTES, ModelShape, Tokens
from splitfrozen.planning.division import owned
from splitfrozen.planning.makespan import (
    Device,
    Knob,
    Medium,
    Pipeline,
    Plan,
    Point,
    Problem,
    Server,
    Subchannels,
    plan_of,
)
from splitfrozen.records import SERVER
from splitfrozen.simulation.encoding import ENCODER, encoded
from splitfrozen.simulation.network import Link, Machine, Network
from splitfrozen.simulation.schedules import events
from splitfrozen.simulation.setting import AHEAD, Setting, Share, Step, Wire
from splitfrozen.simulation.timeline import Timeline, replay
from splitfrozen.simulation.work import Work


@dataclass(frozen=True, slots=True)
class Flow:
    """How the data goes through training.

    Attributes:
        tokens: T of every sample.
        batch: samples of a step, over all devices.
        epochs: how often each sample is trained on.
        once: whether it is sent once (`reuse`), rather than in every epoch.
    """

    tokens: int
    batch: int
    epochs: int = 1
    once: bool = True


@dataclass(frozen=True, slots=True)
class Party:
    """A device: id, FLOP/s that it reaches, bytes that it can use, samples, bit/s of its link."""

    id: str
    flops: float
    memory_bytes: float
    samples: float
    bps: float


@dataclass(frozen=True, slots=True)
class Case:
    """A problem, and what the simulator needs besides it.

    Attributes:
        setting: shape, rank, cut and counting; the rest of it is a plan's and the flow's.
        flow: of the data.
        problem: what is planned.
    """

    setting: Setting
    flow: Flow
    problem: Problem

    def judge(self, plan: Plan) -> float:
        """Makespan of a plan, s."""
        return self.replay(plan).makespan

    def replay(self, plan: Plan) -> Timeline:
        """A plan's schedule in virtual time."""
        problem = self.problem
        knob = next(knob for knob in problem.knobs if knob.name == plan.codec)
        per_value = knob.bytes_per_token / self.setting.shape.width
        # A device may be one step ahead for each stage of the pipeline, and a codec is one.
        ahead = None if self.flow.once else AHEAD + (knob.encode_s > 0)
        setting = replace(self.setting, depths=plan.depth, wire=Wire(per_value), ahead=ahead)
        machines = {device.id: Machine(device.flops) for device in problem.devices}
        machines[SERVER] = Machine(problem.server.flops)
        log = events("splitfrozen", setting, self._steps(plan))
        if knob.encode_s:
            values_per_s = self.setting.shape.width / knob.encode_s
            machines |= {one.id + ENCODER: Machine(values_per_s) for one in problem.devices}
            log = encoded(log, per_value)
        links = {(name, SERVER): Link(bps) for name, bps in plan.bps.items()}
        return replay(log, Network(machines, links))

    def _steps(self, plan: Plan) -> Iterator[Step]:
        """All steps; a device's samples in one need not be whole: it is the mean."""
        flow = self.flow
        sent = sum(device.samples for device in self.problem.devices)
        sizes = _batches(sent if flow.once else sent / flow.epochs, flow.batch)
        shares = {
            size: tuple(
                Share(name, Tokens.uniform(size * part, flow.tokens))
                for name, part in plan.share.items()
            )
            for size in set(sizes)
        }
        for epoch, (place, size) in itertools.product(range(flow.epochs), enumerate(sizes)):
            number = epoch * len(sizes) + place
            yield Step(number, shares[size], stored=flow.once and epoch > 0)


def _batches(samples: float, batch: int) -> list[float]:
    """Sizes of the steps of an epoch: at least one, and none that only rounding has left over."""
    full, rest = divmod(samples, batch)
    return [float(batch)] * int(full) + ([rest] if not full or rest > 1e-9 * batch else [])


def case(
    setting: Setting,
    flow: Flow,
    parties: Sequence[Party],
    server_flops: float,
    knobs: Sequence[Knob],
) -> Case:
    """A network whose devices have links of their own; no accuracy may be lost.

    Other links and limits are put into its problem with `dataclasses.replace`.
    """
    work, cut = setting.work(), setting.cut
    times = 1 if flow.once else flow.epochs
    samples = sum(party.samples for party in parties)
    every = Tokens.uniform(times * samples, flow.tokens)
    above = work.passes(setting.shape.blocks - cut, every, first=False, head=every)
    train = above.forward + above.b + above.w
    sizes = _batches(samples, flow.batch)
    problem = Problem(
        devices=tuple(
            _device(work, cut, party, Tokens.uniform(times * party.samples, flow.tokens))
            for party in sorted(parties, key=lambda party: party.id)
        ),
        memory_bytes=memory(setting.shape, cut, flow.tokens),
        server=Server(
            flops=server_flops,
            train=train,
            after=(flow.epochs - 1) * train if flow.once else 0.0,
            first=sizes[0] / (times * samples),
            last=sizes[-1] / (times * samples),
        ),
        knobs=tuple(knobs),
    )
    return Case(setting, flow, problem)


def _device(work: Work, cut: int, party: Party, load: Tokens) -> Device:
    """As the planner sees it, with so much to send."""
    depths = range(1, cut + 1)
    return Device(
        id=party.id,
        flops=party.flops,
        memory_bytes=party.memory_bytes,
        samples=load.samples,
        tokens=load.tokens,
        front=tuple(work.frozen(n, load, first=True) for n in depths),
        lift=tuple(work.frozen(cut - n, load, first=False) for n in depths),
        bps=party.bps,
    )


def memory(shape: ModelShape, cut: int, tokens: int) -> tuple[float, ...]:
    """Bytes that front(1) .. front(M) need on a device, float32."""
    return tuple(
        costs.front_memory_bytes(
            shape, FLOAT_BYTES * costs.block_parameters(shape, n), tokens, costs.CHUNK_BYTES
        )
        for n in range(1, cut + 1)
    )


# --- small networks, and the best plan of one --------------------------------------------------

STEPS = (4, 12)
"""Of a small network, at least and at most."""
GRID = {2: 40, 3: 20, 4: 12}
"""In how many parts brute force divides a medium between so many devices."""
REFINED, HALVINGS = 3, 4
"""Points of the grid that are refined, and how often the parts are halved."""


def draw(seed: int, number: int) -> Case:
    """A network of 2 to 4 unequal devices with unequal data, none of whose stages is always the
    slowest: links of their own, a medium, or (2 or 3 devices) 3 to 5 subchannels."""
    chance = rng.stream(seed, "network", number)
    air = ("own", "medium", "subchannels")[number % 3]
    count = int(chance.integers(2, 4 if air == "subchannels" else 5))
    cut = int(chance.integers(3, 5))
    setting = Setting(costs.gpt2_small(), rank=8, cut=cut)
    samples = 10 * chance.lognormal(0, 0.7, count)
    flow = Flow(
        tokens=64,
        batch=max(1, round(float(samples.sum()) / float(chance.uniform(*STEPS)))),
        epochs=int(chance.integers(1, 4)),
        once=bool(chance.integers(2)),
    )
    flops = 1e12 * 10 ** chance.uniform(0, 1, count)
    knobs = _knobs(chance, setting.shape.width, float(flops.mean()))
    token = setting.work().frozen(2, Tokens.uniform(1, flow.tokens), first=True) / flow.tokens
    # Seconds of a link are 0.1 to 10 times those of two blocks, with the middle one of the codecs.
    bps = 8 * knobs[1].bytes_per_token * flops.mean() / token * 10 ** chance.uniform(-1, 1, count)
    needs = memory(setting.shape, cut, flow.tokens)
    held = chance.choice([needs[0], needs[-2], needs[-1], needs[-1]], count)
    parties = [
        Party(f"device-{k}", float(flops[k]), float(held[k]), float(samples[k]), float(bps[k]))
        for k in range(count)
    ]
    server_flops = float(flops.sum()) * 10 ** float(chance.uniform(-0.2, 1))
    made = case(setting, flow, parties, server_flops, knobs)
    band: Medium | Subchannels | None = None
    if air == "medium":
        band = Medium(float(bps.sum()))
    elif air == "subchannels":
        channels = int(chance.integers(count, 6))
        band = _fading(chance, bps * count / channels, channels)
    least = int(chance.integers(1, 3)) if held.min() > needs[0] else 1
    problem = replace(made.problem, air=band, most_loss=0.02, least_depth=least)
    return replace(made, problem=problem)


def _knobs(chance: np.random.Generator, width: int, flops: float) -> list[Knob]:
    """An exact codec and two or one that lose little; and one that loses too much."""
    least = 14e6 / flops
    found = [Knob("exact", 4.0 * width)]
    for number in range(int(chance.integers(1, 3))):
        bits = float(chance.uniform(1, 8))
        slow = float(chance.choice([0.0, least * 10 ** chance.uniform(-1, 0.7)]))
        found.append(Knob(f"codec-{number}", width * bits / 8, 0.01 * number + 0.005, slow))
    return [*found, Knob("too-coarse", width / 80, 0.05)]


def _fading(
    chance: np.random.Generator, bps: npt.NDArray[np.float64], channels: int
) -> Subchannels:
    """Rates under Rayleigh fading at a mean ratio of signal to noise of 10; `bps`: their means."""
    power = chance.exponential(1.0, (len(bps), channels))
    rates = bps[:, None] * np.log2(1 + 10 * power) / np.log2(11)
    return Subchannels(tuple(tuple(row) for row in rates.tolist()))


def crowd(seed: int, devices: int, channels: int) -> Case:
    """A cell of unequal devices (1 to 10 TFLOPS, 20 to 200 samples) with fading subchannels."""
    chance = rng.stream(seed, "crowd")
    setting = Setting(costs.gpt2_small(), rank=8, cut=4)
    flops = 1e12 * 10 ** chance.uniform(0, 1, devices)
    parties = [
        Party(f"device-{k:03}", float(flops[k]), 8e9, float(chance.integers(20, 201)), 1.0)
        for k in range(devices)
    ]
    width = setting.shape.width
    knobs = [Knob("float32", 4.0 * width), Knob("int8", 1.0 * width)]
    samples = sum(party.samples for party in parties)
    flow = Flow(tokens=128, batch=round(samples / 20))
    made = case(setting, flow, parties, 3 * float(flops.sum()), knobs)
    band = _fading(chance, np.full(devices, 400e6), channels)
    return replace(made, problem=replace(made.problem, air=band))


def brute_force(case: Case) -> float:
    """The least makespan over all depths, codecs and divisions of the band.

    A medium is divided in a grid, and the best points of it are then refined. Plans whose
    `Pipeline.floor` is no better than what was found need no judge.
    """
    pipeline = Pipeline(case.problem)
    found: list[tuple[float, Point]] = []
    for point in sorted(_all_points(case.problem), key=pipeline.floor):
        if found and pipeline.floor(point) >= found[0][0]:
            break
        found.append((case.judge(plan_of(case.problem, point)), point))
        found.sort(key=lambda one: one[0])
        del found[REFINED:]
    if isinstance(case.problem.air, Medium):
        return min(_refined(case, seconds, point) for seconds, point in found)
    return found[0][0]


def _refined(case: Case, seconds: float, point: Point) -> float:
    """Move ever smaller parts of a medium between two devices while it helps."""
    assert isinstance(case.problem.air, Medium)
    count = len(point.bps)
    part = case.problem.air.bps / GRID[count]
    for _ in range(HALVINGS):
        part, better = part / 2, True
        while better:
            better = False
            for giver, taker in itertools.permutations(range(count), 2):
                bps = list(point.bps)
                bps[giver], bps[taker] = bps[giver] - part, bps[taker] + part
                if bps[giver] > 0:
                    other = replace(point, bps=tuple(bps))
                    took = case.judge(plan_of(case.problem, other))
                    if took < seconds * (1 - 1e-6):
                        seconds, point, better = took, other, True
    return seconds


def _all_points(problem: Problem) -> Iterator[Point]:
    links = list(_all_links(problem))
    for knob in problem.affordable():
        for depths in itertools.product(*problem.depths()):
            for bps, owner in links:
                yield Point(knob, depths, bps, owner)


def _all_links(problem: Problem) -> Iterator[tuple[tuple[float, ...], tuple[int, ...]]]:
    """Every division of the band: rates, and owners of subchannels."""
    air, count = problem.air, len(problem.devices)
    if isinstance(air, Subchannels):
        rates = np.array(air.bps)
        for owner in itertools.product(range(count), repeat=rates.shape[1]):
            bps = owned(rates, np.array(owner))
            if bps.min() > 0:
                yield tuple(bps.tolist()), owner
    elif isinstance(air, Medium):
        parts = GRID[count]
        for cuts in itertools.combinations(range(1, parts), count - 1):
            edges = (0, *cuts, parts)
            yield tuple(air.bps * (b - a) / parts for a, b in itertools.pairwise(edges)), ()
    else:
        yield tuple(device.bps for device in problem.devices), ()
