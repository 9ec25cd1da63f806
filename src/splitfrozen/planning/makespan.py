"""What a plan for SplitFrozen's pipeline takes: the problem, the plan, an estimate and two bounds.

Every device brings its samples through three stages that work side by side (front, codec, link;
section III-B of the SplitFrozen paper), a part of the data in each optimiser step; the server lifts
what comes from depth n to the cut, and trains a step when all devices' parts of it are there.

Stages of constant speed form a flow shop. With C, E, U a device's whole seconds in front, codec and
link, S the server's whole seconds and f the part of the data in one step, the last step of that
device reaches the server after

    f (C + E + U) + (1 - f) max(C, E, U)                                                    (1)

and what is slowest on its way, the server included, sets the pace of all: `Pipeline.estimate`.
What no schedule can be faster than is `Pipeline.floor` for one plan, and `Pipeline.bound` for all.
None of them is the makespan: that is for a judge to say, a simulator, which is passed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitfrozen.errors import PlanError
from splitfrozen.planning.division import most_even

Array = npt.NDArray[np.float64]

MENTIONED = 4
"""Devices that a message names."""
ROUNDS = 60
"""Of bisection: each halves an interval."""


# --- the problem -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Device:
    """What a device has still to do, and with what.

    Attributes:
        id: names it.
        flops: FLOP/s that it reaches.
        memory_bytes: that it can use.
        samples, tokens: to come, over all epochs in which it sends them.
        front: FLOP [M] to bring them all to depth 1 .. M on the device.
        lift: FLOP [M] to bring them all from depth 1 .. M to the cut on the server; the last is 0.
        bps: bit/s of its own link; unused where the network's `air` is divided.
    """

    id: str
    flops: float
    memory_bytes: float
    samples: float
    tokens: float
    front: tuple[float, ...]
    lift: tuple[float, ...]
    bps: float = math.inf


@dataclass(frozen=True, slots=True)
class Knob:
    """A setting of a codec.

    Attributes:
        name: of codec and setting.
        bytes_per_token: as uploaded.
        accuracy_loss: against exact activations, as a fraction (0.01 is one point).
        encode_s: seconds a token on a device, beside its front.
    """

    name: str
    bytes_per_token: float
    accuracy_loss: float = 0.0
    encode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Medium:
    """A band that all uplinks divide: bit/s, in any parts."""

    bps: float


@dataclass(frozen=True, slots=True)
class Subchannels:
    """A band in pieces, each for one device. `bps`: [K][I], what each would carry for each device
    in the order of their ids."""

    bps: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Server:
    """The server's work.

    Attributes:
        flops: FLOP/s that it reaches.
        train: FLOP of training on all that comes, step by step as it comes.
        after: FLOP that begin when everything is there: epochs over stored activations.
        first, last: parts of the data in the first step, which is full, and in the last one.
        backlog: FLOP of lifting what came before and waits: done while devices work.
    """

    flops: float
    train: float
    after: float
    first: float
    last: float
    backlog: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything a plan depends on. K devices, cut M.

    Attributes:
        devices: those that still have to send something, sorted by id.
        memory_bytes: [M], what front(1) .. front(M) need.
        server: speed and work.
        knobs: settings of codecs to choose from.
        air: what uplinks divide; None where each device has its own.
        most_loss: the accuracy budget, a fraction.
        least_depth: no device may be shallower.
    """

    devices: tuple[Device, ...]
    memory_bytes: tuple[float, ...]
    server: Server
    knobs: tuple[Knob, ...]
    air: Medium | Subchannels | None = None
    most_loss: float = 0.0
    least_depth: int = 1

    @property
    def cut(self) -> int:
        return len(self.memory_bytes)

    def depths(self) -> list[tuple[int, ...]]:
        """Depths that each device may have. Raises PlanError where one may have none."""
        least, cut = self.least_depth, self.cut
        if not 1 <= least <= cut:
            raise PlanError(
                "no device can be as deep as is asked",
                got=f"a least depth of {least}",
                allowed=f"1..{cut}, the cut",
                remedy=f"lower the least depth to {cut}, or raise the cut to {least}",
            )
        found = [self._held(device, least) for device in self.devices]
        if not all(found):
            raise self._no_memory(
                [d for d, some in zip(self.devices, found, strict=True) if not some]
            )
        return found

    def _held(self, device: Device, least: int) -> tuple[int, ...]:
        needs = enumerate(self.memory_bytes, 1)
        return tuple(n for n, need in needs if n >= least and need <= device.memory_bytes)

    def _no_memory(self, short: list[Device]) -> PlanError:
        least = self.least_depth
        need = min(self.memory_bytes[least - 1 :])
        listed = short[:MENTIONED]
        lacks = [f"{d.id} {math.ceil(need - d.memory_bytes)}" for d in listed]
        more = f" and {len(short) - len(listed)} more devices" if len(short) > len(listed) else ""
        lower = min(max(self._held(device, 1), default=0) for device in short)
        instead = f", or lower the least depth to {lower}" if lower else ""
        return PlanError(
            f"{', '.join(d.id for d in listed)}{more} have not the memory for depth {least}",
            got=", ".join(f"{d.memory_bytes:.0f} bytes" for d in listed),
            allowed=f"{need:.0f} bytes or more",
            remedy=f"free so many more bytes: {', '.join(lacks)}{instead}",
        )

    def affordable(self) -> list[int]:
        """Knobs within the budget, the most exact first. Raises PlanError where there is none."""
        order = sorted(
            range(len(self.knobs)),
            key=lambda i: (self.knobs[i].accuracy_loss, self.knobs[i].bytes_per_token, i),
        )
        found = [i for i in order if self.knobs[i].accuracy_loss <= self.most_loss]
        if not found:
            best = self.knobs[order[0]]
            raise PlanError(
                "no codec keeps the accuracy budget",
                got=f"a budget of {self.most_loss:g}; the most exact, {best.name}, loses"
                f" {best.accuracy_loss:g}",
                allowed=f"{best.accuracy_loss:g} or more",
                # As it is: rounded, it might not be enough.
                remedy=f"raise the budget to {best.accuracy_loss!r}",
            )
        return found


# --- the plan --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """Who does what, by device id.

    Attributes:
        depth: n of each device's front.
        codec: name of the knob, one for all.
        bps: bit/s of each uplink: its own, its part of the medium, or of its subchannels together.
        share: each device's part of every step.
        subchannels: of each device, by number; empty where there are none.
    """

    depth: dict[str, int]
    codec: str
    bps: dict[str, float]
    share: dict[str, float]
    subchannels: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Point:
    """A plan as numbers, in the order of the problem's devices.

    Attributes:
        knob: index.
        depths: n [K].
        bps: [K].
        owner: [I], index of the device that has each subchannel.
    """

    knob: int
    depths: tuple[int, ...]
    bps: tuple[float, ...]
    owner: tuple[int, ...] = ()


def plan_of(problem: Problem, point: Point) -> Plan:
    """A point in words.

    A device's part of a step is its part of the data. Every sample has to come once an epoch, so
    another division over the steps can only put some devices' samples earlier and others' later:
    the stages' whole work, and with it the pace, stays. It could save the filling of the pipeline
    in the first step, and would cost the mixing of devices in every batch.
    """
    names = [device.id for device in problem.devices]
    samples = sum(device.samples for device in problem.devices)
    owned: dict[str, list[int]] = {name: [] for name in names} if point.owner else {}
    for channel, owner in enumerate(point.owner):
        owned[names[owner]].append(channel)
    return Plan(
        depth=dict(zip(names, point.depths, strict=True)),
        codec=problem.knobs[point.knob].name,
        bps=dict(zip(names, point.bps, strict=True)),
        share={device.id: device.samples / samples for device in problem.devices},
        subchannels={name: tuple(channels) for name, channels in owned.items()},
    )


# --- what it takes ---------------------------------------------------------------------------


class Pipeline:
    """Seconds of a problem's stages.

    Attributes:
        front, lift: float64 [K, M], s, of all samples by depth.
        encode: float64 [knobs, K], s.
        bits: float64 [knobs, K], to be sent.
        train, after, backlog: s of the server.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, server, devices = problem, problem.server, problem.devices
        speeds = np.array([device.flops for device in devices])
        tokens = np.array([device.tokens for device in devices])
        self.front: Array = np.array([device.front for device in devices]) / speeds[:, None]
        self.lift: Array = np.array([device.lift for device in devices]) / server.flops
        self.encode: Array = np.array([knob.encode_s * tokens for knob in problem.knobs])
        self.bits: Array = np.array([8 * knob.bytes_per_token * tokens for knob in problem.knobs])
        self.train, self.after = server.train / server.flops, server.after / server.flops
        self.backlog = server.backlog / server.flops
        self._every = np.arange(len(devices))

    def stages(self, point: Point) -> tuple[Array, Array, Array, Array]:
        """Whole seconds of front, codec, link and lift, each [K]."""
        place = np.array(point.depths) - 1
        front, lift = self.front[self._every, place], self.lift[self._every, place]
        return front, self.encode[point.knob], self.bits[point.knob] / np.array(point.bps), lift

    def estimate(self, point: Point) -> float:
        """About the makespan: the first and the last step in detail, a constant pace between.

        Before it can train, the server lifts what waits already, and then what comes early, also of
        later steps.
        """
        f = self.problem.server.first
        front, encode, link, lift = self.stages(point)
        enters = f * (front + encode + link)
        begins = self._lifted(enters, f * lift, self.backlog)
        slowest = np.maximum(np.maximum(front, encode), link)
        there = np.clip(f + (begins - enters) / slowest, f, 1.0)
        free = max(float(enters.min()), self.backlog)
        ahead = min(float((there * lift).sum()), begins - free)
        lifts = float(lift.sum())
        paced = begins + lifts - max(f * lifts, ahead) + (1 - f) * self.train
        last = self._lifted(enters + (1 - f) * slowest, f * lift)
        return max(paced, last) + f * self.train + self.after

    @staticmethod
    def _lifted(arrives: Array, lift: Array, free: float = 0.0) -> float:
        """When all of a step is at the cut, lifted in the order of arrival from `free` on."""
        order = np.argsort(arrives, kind="stable")
        rest = np.cumsum(lift[order][::-1])[::-1]
        return max(float((arrives[order] + rest).max()), free + float(rest[0]))

    def floor(self, point: Point) -> float:
        """What no schedule of this plan can be faster than.

        A device's stages work one step at a time, each after the one before; what it sends last is
        lifted and trained on; the server, which does one thing at a time, has its backlog to lift
        and begins with what comes first, and trains on nothing before all of the first step is
        there.
        """
        first, last = self.problem.server.first, self.problem.server.last
        front, encode, link, lift = self.stages(point)
        sent = np.maximum(front + last * (encode + link), first * front + encode + last * link)
        sent = np.maximum(sent, first * (front + encode) + link)
        device = sent + last * (lift + self.train)
        enters = first * (front + encode + link)
        server = max(float(enters.min()), self.backlog) + float(lift.sum()) + self.train
        trained = float((enters + first * lift).max()) + self.train
        return max(float(device.max()), server, trained) + self.after

    def bound(self) -> float:
        """What no plan can be faster than: the fluid bound. Raises PlanError.

        In a time T a device can be as deep as its own speed lets it, its bits need a part of the
        band, and the server has to lift the rest, after its backlog, and to train; each condition
        by itself holds from some T on.
        """
        held, first = self.problem.depths(), self.problem.server.first
        lightest = [min(some) - 1 for some in held]
        least = self.front[self._every, lightest]
        found = []
        for knob in self.problem.affordable():
            encode = self.encode[knob]
            link = self._least_link(knob)
            carried = self._carried(knob)
            sent = np.maximum(np.maximum(least, encode), link)
            low = max(float(sent.max()), float((first * least).min()) + carried)
            low += self.problem.server.last * self.train
            low = max(low, float((first * (least + encode + link)).max()) + self.train)
            enters = float((first * (least + encode + link)).min())
            free = max(enters, self.backlog)
            high = max(low, free + self._served(held, low))
            for _ in range(ROUNDS):
                middle = (low + high) / 2
                served = free + self._served(held, middle)
                low, high = (low, middle) if served <= middle else (middle, high)
            found.append(low)
        return min(found) + self.after

    def _served(self, held: list[tuple[int, ...]], seconds: float) -> float:
        """Least seconds of the server where no front may take longer than `seconds`."""
        lift = 0.0
        for k, some in enumerate(held):
            fits = [n for n in some if self.front[k, n - 1] <= seconds] or some[:1]
            lift += float(min(self.lift[k, n - 1] for n in fits))
        return lift + self.train

    def _least_link(self, knob: int) -> Array:
        """Seconds [K] of each link if all of the band were for it."""
        air, devices = self.problem.air, self.problem.devices
        rates: Array = np.array([device.bps for device in devices])
        if isinstance(air, Medium):
            rates = np.full(len(devices), air.bps)
        elif isinstance(air, Subchannels):
            rates = np.array(air.bps).sum(axis=1)
        return np.asarray(self.bits[knob] / rates)

    def _carried(self, knob: int) -> float:
        """Seconds in which the band can carry everything, divided as is best for that."""
        air = self.problem.air
        if isinstance(air, Medium):
            return float(self.bits[knob].sum()) / air.bps
        if isinstance(air, Subchannels):
            return 1 / most_even(np.array(air.bps) / self.bits[knob][:, None])
        return 0.0
