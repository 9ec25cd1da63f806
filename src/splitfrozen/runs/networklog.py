"""The event log of a network run: who computed and sent what, when, and what it waited for.

It is put together when the run ends, from parts that are durable as they come, so it can be made
again from the run folder at any time:

- Devices report when the stages of their pipeline worked on each chunk (`records.ChunkSpan`), on
  their own clocks. A report is the last thing that a device sends, so it is taken to come when its
  `seconds` are over; it comes a round trip later, and much later where the server was away.
- The worker writes what it computed into `metrics.jsonl` as `Work`, on the server's clock.

What happened on a device that was killed is lost with it: its report tells of the rest. FLOP are
those of `model.costs` for real tokens: what is lost to padding shows as lower speed. A device's
front and codec work side by side, so they are two parties: "device-03" and "device-03/encode". An
encoder's work is counted in values, as FLOP say nothing of it.

`setup` is what comes before a party's first event: starting, reading data, measuring, waiting for
others. It counts as 1, whatever it takes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from splitfrozen.config import Config
from splitfrozen.device.pipeline import QUEUE
from splitfrozen.disk import write_whole
from splitfrozen.errors import StoreError
from splitfrozen.model.costs import (
    ModelShape,
    Tokens,
    activation_values,
    backward_flops,
    forward_flops,
    head_backward_flops,
    head_flops,
)
from splitfrozen.records import SERVER, Compute, Count, DeviceReport, Event, SampleTable, Send
from splitfrozen.runs.folder import RunFolder
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store

LOG = "events.jsonl"
SETUP = "setup"

Interval = tuple[float, float]
"""Begin and end, in seconds."""

Draws = dict[int, list[tuple[str, int]]]
"""Step -> (device, chunk) of what it drew while devices were sending."""


class Work(Struct, frozen=True, forbid_unknown_fields=True, tag_field="event", tag="work"):
    """Something that the worker computed, as `metrics.jsonl` keeps it.

    Attributes:
        phase: what.
        step: steps done before it; for a lift the chunk.
        flops: by `model.costs`.
        begin, end: seconds since 1970.
        device: whose chunk was lifted.
    """

    phase: Literal["lift", "train", "evaluate"]
    step: Count
    flops: Annotated[float, Meta(ge=0)]
    begin: float
    end: float
    device: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """What goes through a device's pipeline at once: a chunk, or some that were added up.

    Attributes:
        step: index of the first chunk.
        flops: of the front.
        values: that are encoded.
        bytes: that are sent.
        times: of front, encode and send; None in a forecast.
    """

    step: int
    flops: float
    values: float
    bytes: float
    times: tuple[Interval, Interval, Interval] | None = None


class EventList:
    """Events in causal order; each method adds some and returns what others may wait for."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def compute(
        self,
        what: tuple[str, str, int],
        flops: float,
        after: Iterable[int] = (),
        at: Interval | None = None,
    ) -> int:
        """`what`: who, phase and step. Returns the event's number."""
        event = Compute(len(self.events), *what, flops, tuple(after), *(at or (None, None)))
        self.events.append(event)
        return event.id

    def send(
        self, device: str, step: int, size: float, after: Iterable[int], at: Interval | None
    ) -> int:
        """Activations from a device to the server. Returns the event's number."""
        what = (device, SERVER, "activations", step)
        event = Send(len(self.events), *what, size, tuple(after), *(at or (None, None)))
        self.events.append(event)
        return event.id

    def setup(self, who: str, first: float) -> tuple[int, ...]:
        """What comes before a party's first event, which begins at `first`."""
        return (self.compute((who, SETUP, 0), 1.0, (), (0.0, first)),) if first > 0 else ()

    def pipeline(
        self, device: str, pieces: Iterable[Piece], after: tuple[int, ...] = ()
    ) -> list[int]:
        """Front, encode and send of a device. Returns the numbers of the sends.

        Each stage takes the pieces in order. Between two stages is a queue of QUEUE pieces, and
        who finds it full waits: front k begins when piece k-1 was put, that is, when k-1-QUEUE was
        taken, which the encoder does when k-2-QUEUE is encoded and was put in turn.
        """
        fronts: list[int] = []
        encodes: list[int] = []
        sends: list[int] = []
        for k, piece in enumerate(pieces):
            front_at, encode_at, send_at = piece.times or (None, None, None)
            waits = _past((fronts, k - 1), (encodes, k - 2 - QUEUE), (sends, k - 3 - 2 * QUEUE))
            what = (device, "front", piece.step)
            fronts.append(self.compute(what, piece.flops, waits or after, front_at))
            waits = _past((fronts, k), (encodes, k - 1), (sends, k - 2 - QUEUE))
            what = (f"{device}/encode", "encode", piece.step)
            encodes.append(self.compute(what, piece.values, waits, encode_at))
            waits = _past((encodes, k), (sends, k - 1))
            sends.append(self.send(device, piece.step, piece.bytes, waits, send_at))
        return sends


def _past(*wanted: tuple[Sequence[int], int]) -> tuple[int, ...]:
    """Those that exist of some items."""
    return tuple(ids[k] for ids, k in wanted if k >= 0)


def evaluation_flops(shape: ModelShape, config: Config, load: Tokens, head: Tokens) -> float:
    """Everything above the cut, forward; `head` is what of `load` gets to the head."""
    above = shape.blocks - config.model.cut
    return forward_flops(shape, above, load, config.lora.rank) + head_flops(shape, head)


def step_flops(shape: ModelShape, config: Config, load: Tokens, head: Tokens) -> float:
    """Everything above the cut, forward and backward, above a frozen front."""
    above = shape.blocks - config.model.cut
    backward = backward_flops(shape, above, load, config.lora.rank, input_gradient=False)
    forward = evaluation_flops(shape, config, load, head)
    return forward + sum(backward) + sum(head_backward_flops(shape, head))


# --- the file --------------------------------------------------------------------------------


def write(run: RunFolder, registry: Registry, store: Store) -> None:
    """Write the log of a run that has ended, whole. Raises StoreError."""
    lines = [msgspec.json.encode(event) + b"\n" for event in assemble(run, registry, store)]
    write_whole(run.root / LOG, b"".join(lines))


def read(folder: Path) -> list[Event]:
    """Read the log in a run folder. Raises StoreError, which names the line that is damaged."""
    path = folder / LOG
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StoreError(
            f"{folder} has no event log",
            got=error.strerror or str(error),
            allowed="a run that has ended",
            remedy=f"see: splitfrozen status {folder}",
        ) from error
    decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
    events: list[Event] = []
    for number, line in enumerate(lines):
        try:
            events.append(decoder.decode(line))
            problem = _problem(events[-1], number)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            problem = str(error)
        if problem:
            raise StoreError(
                f"{path} is damaged",
                got=f"line {number + 1}: {problem}",
                allowed="one event a line, as splitfrozen wrote it",
                remedy=f"delete it and run: splitfrozen serve {folder}; it is made again",
            )
    return events


def _problem(event: Event, number: int) -> str:
    """What is wrong with an event; empty where nothing is."""
    if event.id != number:
        return f"number {event.id}"
    if any(not 0 <= before < number for before in event.after):
        return "it waits for what does not come before it"
    begin, end = event.begin_s, event.end_s
    if (begin, end) != (None, None) and not (
        begin is not None and end is not None and 0 <= begin <= end < math.inf
    ):
        return f"times {begin} and {end}"
    amount = event.flops if isinstance(event, Compute) else event.bytes
    return "" if 0 <= amount < math.inf else f"an amount of {amount}"


# --- putting it together ---------------------------------------------------------------------


def assemble(run: RunFolder, registry: Registry, store: Store) -> list[Event]:
    """The events of a run, from what its folder keeps; none where nothing was computed yet."""
    shape, works = model_shape(run), _works(run)
    if shape is None:
        return []
    table = store.samples()
    log, reported = EventList(), list(_reported(registry))
    zero = min([work.begin for work in works] + [one.begin for one in reported], default=0.0)
    arrived = {}
    for one in reported:
        setup = log.setup(one.device, one.begin - zero)
        pieces = _pieces(one, shape, _Loads(table, one.device), zero)
        arrived[one.device] = _Arrived(one.report, log.pipeline(one.device, pieces, setup))
    _server_events(log, works, zero, arrived, _draws(run, table))
    return log.events


def model_shape(run: RunFolder) -> ModelShape | None:
    """The shape of the run's model, as the worker wrote it; None before that."""
    for event in reversed(run.events("shape")):
        try:
            return msgspec.convert(event.get("shape"), ModelShape)
        except msgspec.ValidationError:
            continue
    return None


@dataclass(frozen=True, slots=True)
class _Reported:
    """A device's report; `begin` is its first forward on the server's clock."""

    device: str
    report: DeviceReport
    begin: float


def _reported(registry: Registry) -> Iterable[_Reported]:
    for row in registry.devices():
        report, at = row.report, row.reported_at
        if report and report.spans and at is not None and not row.revoked:
            yield _Reported(row.id, report, at - report.seconds)


class _Loads:
    """How much the stored chunks of one device hold."""

    def __init__(self, table: SampleTable, device: str) -> None:
        known = device in table.devices
        mine = table.device == (table.devices.index(device) if known else -1)
        order = np.argsort(table.chunk[mine], kind="stable")
        self._chunk = table.chunk[mine][order]
        tokens = table.tokens[mine][order].astype(np.float64)
        self._tokens = np.concatenate([[0.0], np.cumsum(tokens)])
        self._squares = np.concatenate([[0.0], np.cumsum(tokens**2)])

    def of(self, first: int, last: int) -> Tokens:
        """Chunks first..last."""
        begin = int(np.searchsorted(self._chunk, first))
        end = int(np.searchsorted(self._chunk, last, "right"))
        tokens, squares = (float(sums[end] - sums[begin]) for sums in (self._tokens, self._squares))
        return Tokens(end - begin, tokens, squares)


def _pieces(one: _Reported, shape: ModelShape, loads: _Loads, zero: float) -> Iterable[Piece]:
    offset = one.begin - zero
    for span in one.report.spans:
        load = loads.of(span.first, span.last)
        front, encode, send = (
            (offset + begin, offset + begin + seconds)
            for begin, seconds in (span.front, span.encode, span.send)
        )
        flops = forward_flops(shape, span.depth, load)
        values = activation_values(shape, load)
        yield Piece(span.first, flops, values, span.bytes, (front, encode, send))


class _Arrived:
    """What a device's chunks wait for before they can be trained on: sends, and lifts."""

    def __init__(self, report: DeviceReport, sends: Sequence[int]) -> None:
        self._spans = report.spans
        self._lasts = [span.last for span in report.spans]
        self._sends = sends
        self._lifts: defaultdict[int, list[int]] = defaultdict(list)

    def send(self, chunk: int) -> tuple[int, ...]:
        """The send that brought a chunk; none where no report tells of it."""
        span = bisect_left(self._lasts, chunk)
        known = span < len(self._spans) and self._spans[span].first <= chunk
        return (self._sends[span],) if known else ()

    def lifted(self, chunk: int, event: int) -> None:
        self._lifts[chunk].append(event)

    def chunk(self, chunk: int) -> Sequence[int]:
        """What makes one chunk ready."""
        return self._lifts.get(chunk) or self.send(chunk)

    def everything(self) -> list[int]:
        return [*self._sends, *(event for events in self._lifts.values() for event in events)]


def _server_events(
    log: EventList,
    works: Sequence[Work],
    zero: float,
    arrived: dict[str, _Arrived],
    draws: Draws | None,
) -> None:
    """Lifts wait for their chunk; steps and evaluations follow each other.

    The first step waits for everything; in a streaming run (`draws`) each waits for what it drew,
    and not for the window to fill.
    """
    last = log.setup(SERVER, works[0].begin - zero) if works else ()
    trained = False
    for work in works:
        what, at = (SERVER, work.phase, work.step), (work.begin - zero, work.end - zero)
        if work.phase == "lift":
            device = arrived.get(work.device)
            waits = device.send(work.step) if device else ()
            event = log.compute(what, work.flops, waits, at)
            if device:
                device.lifted(work.step, event)
            continue
        after = set(last)
        if work.phase == "train" and draws is not None:
            for name, chunk in draws.get(work.step, ()):
                after.update(arrived[name].chunk(chunk) if name in arrived else ())
        elif work.phase == "train" and not trained:
            trained = True
            for device in arrived.values():
                after.update(device.everything())
        last = (log.compute(what, work.flops, sorted(after), at),)


def _works(run: RunFolder) -> list[Work]:
    """What the worker wrote, in the order in which it was done; damaged lines are left out."""
    found = []
    for event in run.events("work"):
        try:
            work = msgspec.convert(event, Work)
        except msgspec.ValidationError:
            continue
        if work.begin <= work.end:
            found.append(work)
    return sorted(found, key=lambda work: work.begin)


class _Drawn(Struct):
    """A line of the ledger."""

    batch: int
    keys: list[tuple[str, int]]


def _draws(run: RunFolder, table: SampleTable) -> Draws | None:
    """What each step of the first epoch drew; None where nothing was streamed.

    Raises StoreError where the ledger is damaged.
    """
    path = run.training / "ledger.jsonl"
    if run.config.run.start != "streaming" or not path.exists():
        return None
    rows = zip(table.device.tolist(), table.sample.tolist(), table.chunk.tolist(), strict=True)
    chunk_of = {(table.devices[device], sample): chunk for device, sample, chunk in rows}
    try:
        drawn = [msgspec.json.decode(line, type=_Drawn) for line in path.read_bytes().splitlines()]
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{path} is damaged",
            got=str(error),
            allowed="one batch a line",
            remedy="restore the file",
        ) from error
    return {
        one.batch: sorted({(key[0], chunk_of[key]) for key in one.keys if key in chunk_of})
        for one in drawn
    }
