"""What a served run is expected to do: its events by formula, and their times at given speeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes

import msgspec

from splitfrozen.config import Config
from splitfrozen.device.plan import VALUE_BYTES
from splitfrozen.errors import RequestError
from splitfrozen.model.costs import ModelShape, Tokens, forward_flops
from splitfrozen.records import SERVER, Compute, Event, Send
from splitfrozen.runs.networklog import EventList, Piece, step_flops
from splitfrozen.server.registry import DeviceRow
from splitfrozen.simulation import timeline
from splitfrozen.simulation.network import Link, Machine, Network
from splitfrozen.simulation.timeline import Timeline

MOST_PIECES = 1_000_000
"""Chunks and steps of a forecast: each is some events, which are held in memory."""

CHUNKS, LEAST_CHUNKS, CHUNKS_ALL = 30, 4, 3000
"""Of a device where they are added up, at most and at least, and of all: more take longer and make
hardly a difference."""

SLOWEST, FASTEST = 1e3, 1e18
"""What devices say of their speeds is taken to lie between, in FLOP/s or bit/s."""


@dataclass(frozen=True)
class Speeds:
    """How fast everybody is.

    Attributes:
        flops: FLOP/s by (party, phase); values/s of an encoder.
        links: by (source, target).
    """

    flops: Mapping[tuple[str, str], float]
    links: Mapping[tuple[str, str], Link]


@dataclass(frozen=True, slots=True)
class Part:
    """What a device sends: samples of the same length, computed to some depth."""

    device: str
    depth: int
    samples: float
    tokens: float

    def load(self, share: float) -> Tokens:
        """A share of it."""
        length = self.tokens / self.samples
        return Tokens.uniform(share * self.samples, length)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one device is expected to do.

    Attributes:
        device: id.
        depth: n of its front.
        samples, tokens: as announced.
        seconds: from its first forward to the end of its last upload.
        bytes: to be uploaded.
    """

    device: str
    depth: int
    samples: int
    tokens: int
    seconds: float
    bytes: int


def foretell(
    rows: Iterable[DeviceRow], config: Config, shape: ModelShape, bytes_per_token: float
) -> list[Forecast]:
    """What devices are expected to do, by the simulator, in the order of ids.

    Of each, all that it announced, at the depth that it has now and with the speed and link that it
    measured last. Who has announced nothing, or has no depth or profile, is left out.
    """
    found, parts, flops, links = [], [], {}, {}
    for row in sorted(rows, key=lambda row: row.id):
        said, profile, depth = row.announcement, row.profile, row.depth
        if said is None or profile is None or depth is None:
            continue
        size = round(said.tokens * bytes_per_token)
        found.append(Forecast(row.id, depth, said.samples, said.tokens, 0.0, size))
        parts.append(Part(row.id, depth, said.samples, said.tokens))
        flops[row.id, "front"] = believed(profile.flops)
        links[row.id, SERVER] = Link(believed(profile.uplink_bps))
    expected = Expected(config, shape, bytes_per_token)
    expected.send(parts, pieces(len(parts)))
    # No device waits for the server's lifts.
    line = simulate(expected.log.events, Speeds(flops | {(SERVER, "lift"): math.inf}, links))
    ends = {
        event.source: float(line.end[event.id])
        for event in expected.log.events
        if isinstance(event, Send)
    }
    return [with_changes(one, seconds=ends[one.device]) for one in found]


class Expected:
    """The events of a run in which everybody begins at once.

    Devices encode in no time, chunks of a device are equal, and nothing is evaluated. Chunks and
    steps follow from announcements, which are only numbers that devices sent: RequestError where
    they would be more than MOST_PIECES.
    """

    def __init__(self, config: Config, shape: ModelShape, bytes_per_token: float) -> None:
        self.log = EventList()
        self._config, self._shape, self._cost = config, shape, bytes_per_token
        self._pieces = 0

    def stored(self, flops: float) -> None:
        """What the server has still to lift of what came before: it can begin at once."""
        if flops:
            self.log.compute((SERVER, "lift", 0), flops)

    def send(self, parts: Iterable[Part], most_chunks: int | None = None) -> tuple[int, ...]:
        """Everything is computed, sent and lifted; returns the events that end it.

        `most_chunks` of a device: coarser than it will be, so that it is told sooner.
        """
        ready: list[int] = []
        for part in parts:
            chunks = chunks_of(part.tokens, self._config, self._shape, self._cost)
            chunks = chunks if most_chunks is None else min(chunks, most_chunks)
            self._refuse_endless(chunks)
            load = part.load(1 / chunks)
            front = forward_flops(self._shape, part.depth, load)
            piece = Piece(0, front, 0.0, load.tokens * self._cost)
            pieces = (with_changes(piece, step=step) for step in range(chunks))
            sends = self.log.pipeline(part.device, pieces)
            lift = forward_flops(self._shape, self._config.model.cut - part.depth, load)
            ready += [
                self.log.compute((SERVER, "lift", step), lift, (send,)) if lift else send
                for step, send in enumerate(sends)
            ]
        return tuple(ready)

    def train(self, parts: Sequence[Part], ready: tuple[int, ...]) -> None:
        """All steps, once all of it is there."""
        samples, size = sum(part.samples for part in parts), self._config.train.batch_size
        mean = sum((part.load(size / samples) for part in parts), Tokens(0, 0, 0))
        flops = step_flops(self._shape, self._config, mean, mean)
        steps = math.ceil(samples / size) * self._config.train.epochs
        self._refuse_endless(steps)
        for step in range(steps):
            ready = (self.log.compute((SERVER, "train", step), flops, ready),)

    def _refuse_endless(self, more: int) -> None:
        self._pieces += more
        if self._pieces > MOST_PIECES:
            raise RequestError(
                "devices announced too much for a forecast",
                got=f"{self._pieces:.2g} chunks and steps",
                allowed=f"{MOST_PIECES:,} together",
                remedy="see `splitfrozen status` for who announced it",
            )


def pieces(devices: int) -> int:
    """Chunks of a device at most, where they are added up."""
    return max(LEAST_CHUNKS, min(CHUNKS, CHUNKS_ALL // max(1, devices)))


def believed(speed: float) -> float:
    """A speed that a device told, within what can be."""
    return min(max(speed, SLOWEST), FASTEST)


def chunks_of(tokens: float, config: Config, shape: ModelShape, bytes_per_token: float) -> int:
    """How many chunks a device makes of its tokens."""
    planned = max(bytes_per_token, VALUE_BYTES * shape.width)
    return max(1, math.ceil(tokens * planned / config.wire.chunk_bytes))


def simulate(events: Sequence[Event], speeds: Speeds) -> Timeline:
    """Replay events, without the times they may have, at these speeds. Raises RequestError.

    A machine of the simulator has one speed for all phases, so it is given seconds of work at a
    speed of 1; the result has the events with their FLOP.
    """
    bare = [msgspec.structs.replace(event, begin_s=None, end_s=None) for event in events]
    seconds = [
        msgspec.structs.replace(event, flops=_seconds(event, speeds))
        if isinstance(event, Compute)
        else event
        for event in bare
    ]
    machines = {event.who: Machine(1.0) for event in bare if isinstance(event, Compute)}
    found = timeline.replay(seconds, Network(machines, speeds.links))
    return with_changes(found, events=bare)


def _seconds(event: Compute, speeds: Speeds) -> float:
    if not event.flops:
        return 0.0
    speed = speeds.flops[event.who, event.phase]
    return event.flops / speed if speed else 0.0
