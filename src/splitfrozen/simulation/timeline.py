"""Events replayed in virtual time, and what can be read off the result.

`replay` is a discrete-event simulation on one heap. An event is ready when all of its `after` have
ended. A party computes one event at a time and a dedicated link carries one, in the order in which
they became ready, ties by id. A shared medium carries all of its sends at once, each at an equal
part of the rate. At one instant all ends are handled before anything begins. Times are seconds
from 0; nothing is random, so equal input gives equal output to the bit.
"""

from __future__ import annotations

import csv
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path
from typing import TypedDict

import msgspec
import numpy as np
import numpy.typing as npt

from splitfrozen.disk import explained
from splitfrozen.errors import RequestError
from splitfrozen.records import Compute, Event, Send
from splitfrozen.simulation.engine import Engine, Lane
from splitfrozen.simulation.network import Network, role

Seconds = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

SHOWN = 40
"""Rows of the table for people."""
SHARED = "shared "
"""Stands before the name of a medium, whose row sums up its links."""
COLUMNS = tuple(
    "id event who target phase step flops bytes begin_s left_s end_s after".split()  # noqa: SIM905
)


# --- the result ------------------------------------------------------------------------------


class Row(TypedDict):
    """What `Timeline.rows` says of a party, a link or a shared medium."""

    who: str
    events: int
    flops: float
    bytes: float
    first_s: float
    last_s: float
    busy_s: float
    busy: float
    bubble_s: float
    bubble: float
    idle: float
    phases: dict[str, float]


@dataclass(frozen=True, eq=False)
class Timeline:
    """When everything happened. N events; arrays are indexed by their ids.

    Attributes:
        events: as they were given.
        begin: float64 [N], s.
        left: float64 [N], s: when the party or link was free again.
        end: float64 [N], s: `left`, plus the latency of a link.
        lane: int64 [N], index into `lanes`.
        lanes: parties and links, in the order of their first events.
    """

    events: Sequence[Event]
    begin: Seconds
    left: Seconds
    end: Seconds
    lane: Numbers
    lanes: tuple[Lane, ...]

    @property
    def makespan(self) -> float:
        """Seconds from 0 to the last end."""
        return float(self.end.max(initial=0.0))

    @property
    def sent(self) -> float:
        """Bytes of all sends."""
        return sum(event.bytes for event in self.events if isinstance(event, Send))

    @cached_property
    def phases(self) -> tuple[str, ...]:
        """Names of the phases, in the order of their first event."""
        return tuple(dict.fromkeys(event.phase for event in self.events))

    @cached_property
    def phase(self) -> Numbers:
        """int64 [N], index into `phases`."""
        index = {name: number for number, name in enumerate(self.phases)}
        return np.fromiter((index[event.phase] for event in self.events), np.int64)

    def busy(self, who: str) -> float:
        """Seconds in which a party computes, or a link or medium ("shared NAME") carries anything.

        0 where it has no event.
        """
        return next((covered(*self._span(ids)) for name, ids in self._groups if name == who), 0.0)

    @cached_property
    def rows(self) -> list[Row]:
        """One row for every party, link and shared medium.

        `bubble_s` is the time without work between the first begin and the last end, `bubble` its
        part of that span; `idle` is the part of the whole makespan without work, `busy` the rest.
        A link is at work until the last bit has left; latency does not count. `phases` gives the
        busy seconds of each phase; on a medium phases may overlap and sum up to more than `busy_s`.
        """
        return [self._row(name, ids) for name, ids in self._groups]

    def _row(self, name: str, ids: Numbers) -> Row:
        begin, left = self._span(ids)
        busy, first, last = covered(begin, left), float(begin.min()), float(left.max())
        span, whole, phase = last - first, self.makespan, self.phase[ids]
        events = [self.events[i] for i in ids.tolist()]
        return Row(
            who=name,
            events=len(ids),
            flops=sum(event.flops for event in events if isinstance(event, Compute)),
            bytes=sum(event.bytes for event in events if isinstance(event, Send)),
            first_s=first,
            last_s=last,
            busy_s=busy,
            busy=busy / whole if whole else 0.0,
            bubble_s=max(0.0, span - busy),
            bubble=max(0.0, 1 - busy / span) if span else 0.0,
            idle=max(0.0, 1 - busy / whole) if whole else 0.0,
            phases={
                self.phases[one]: covered(begin[phase == one], left[phase == one])
                for one in np.unique(phase)
            },
        )

    def table(self) -> str:
        """`rows` for people: seconds, and percentages of the makespan and (bubble) of the span.

        Servers and media stand first; where rows are many, it is devices that are left out.
        """
        header = ("who", "events", "busy s", "busy %", "bubble %", "idle %")
        lines = [(*header, *(f"{phase} s" for phase in self.phases))]
        devices = [_is_of_device(row["who"]) for row in self.rows]
        for place in sorted(range(len(devices)), key=devices.__getitem__)[:SHOWN]:
            row = self.rows[place]
            parts = (f"{100 * part:.1f}" for part in (row["busy"], row["bubble"], row["idle"]))
            spent = (f"{row['phases'][p]:.3f}" if p in row["phases"] else "-" for p in self.phases)
            lines.append((row["who"], f"{row['events']}", f"{row['busy_s']:.3f}", *parts, *spent))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        ]
        more = len(self.rows) - SHOWN
        text += [f"and {more} more rows"] if more > 0 else []
        return "\n".join([*text, f"makespan {self.makespan:.3f} s"])

    def write_csv(self, path: Path) -> None:
        """One line an event. Raises StoreError."""
        times = zip(self.begin.tolist(), self.left.tolist(), self.end.tolist(), strict=True)
        with explained(path), path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for event, (begin, left, end) in zip(self.events, times, strict=True):
                kind: tuple[object, ...] = (
                    ("compute", event.who, "", event.phase, event.step, event.flops, "")
                    if isinstance(event, Compute)
                    else (
                        "send",
                        event.source,
                        event.target,
                        event.phase,
                        event.step,
                        "",
                        event.bytes,
                    )
                )
                after = " ".join(map(str, event.after))
                writer.writerow((event.id, *kind, begin, left, end, after))

    def write_trace(self, path: Path) -> None:
        """Write a Chrome trace-event file, which ui.perfetto.dev opens. Raises StoreError.

        Parties are the threads of one process and links those of another; a link on which sends
        overlap gets as many threads as it needs. Times are in microseconds.
        """
        order = np.argsort(self.begin, kind="stable").tolist()
        row = self._rows_without_overlap(order)
        tracks = sorted(set(zip(self.lane.tolist(), row, strict=True)))
        number = {track: tid for tid, track in enumerate(tracks, start=1)}
        entries = itertools.chain(
            self._tracks(number),
            (self._slice(i, number[int(self.lane[i]), row[i]]) for i in order),
        )
        with explained(path), path.open("wb") as file:
            file.write(b'{"displayTimeUnit":"ms","traceEvents":[')
            before = b"\n"
            for entry in entries:
                file.write(before + msgspec.json.encode(entry))
                before = b",\n"
            file.write(b"\n]}\n")

    def _tracks(self, number: dict[tuple[int, int], int]) -> Iterator[dict[str, object]]:
        """Names of the processes and threads, and the order of the threads."""
        for pid, name in ((1, "parties"), (2, "links")):
            yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
        for (lane, row), tid in number.items():
            thread = {"ph": "M", "pid": 1 if self.lanes[lane].target is None else 2, "tid": tid}
            name = self.lanes[lane].name + (f" #{row + 1}" if row else "")
            yield {"name": "thread_name", **thread, "args": {"name": name}}
            yield {"name": "thread_sort_index", **thread, "args": {"sort_index": tid}}

    def _slice(self, number: int, tid: int) -> dict[str, object]:
        event, begin = self.events[number], float(self.begin[number])
        computes = isinstance(event, Compute)
        amount = {"flops": event.flops} if isinstance(event, Compute) else {"bytes": event.bytes}
        ended = {"id": event.id, "step": event.step, "end_s": float(self.end[number])}
        return {
            "name": event.phase,
            "cat": "compute" if computes else "send",
            "ph": "X",
            "ts": begin * 1e6,
            "dur": (float(self.left[number]) - begin) * 1e6,
            "pid": 1 if computes else 2,
            "tid": tid,
            "args": {"phase": event.phase, **ended, **amount},
        }

    def _rows_without_overlap(self, order: Iterable[int]) -> list[int]:
        """For each event, a row of its lane that is free from its begin to its end."""
        free: list[list[tuple[float, int]]] = [[] for _ in self.lanes]
        row = [0] * len(self.events)
        for i in order:
            rows = free[self.lane[i]]
            row[i] = heappop(rows)[1] if rows and rows[0][0] <= self.begin[i] else len(rows)
            heappush(rows, (float(self.left[i]), row[i]))
        return row

    @cached_property
    def _groups(self) -> list[tuple[str, Numbers]]:
        """Ids of the events of each lane, then of each medium, by their begin."""
        order = np.lexsort((self.begin, self.lane))
        cuts = np.searchsorted(self.lane[order], np.arange(len(self.lanes) + 1))
        groups = [(lane.name, order[cuts[i] : cuts[i + 1]]) for i, lane in enumerate(self.lanes)]
        media: dict[str, list[Numbers]] = {}
        for lane, (_, ids) in zip(self.lanes, groups, strict=True):
            if lane.medium is not None:
                media.setdefault(lane.medium, []).append(ids)
        for name, parts in media.items():
            ids = np.concatenate(parts)
            groups.append((SHARED + name, ids[np.argsort(self.begin[ids], kind="stable")]))
        return groups

    def _span(self, ids: Numbers) -> tuple[Seconds, Seconds]:
        return self.begin[ids], self.left[ids]


def _is_of_device(name: str) -> bool:
    """Whether a row is of a device or a dedicated link."""
    return role(name) == "device" and not name.startswith(SHARED)


def covered(begin: Seconds, left: Seconds) -> float:
    """Length of the union of intervals that are sorted by `begin`."""
    reach = np.maximum.accumulate(left)
    fresh = np.clip(left[1:] - np.maximum(begin[1:], reach[:-1]), 0, None)
    return float(left[0] - begin[0] + fresh.sum())


# --- the log ---------------------------------------------------------------------------------


class _Log:
    """Events, checked, and the lane of each."""

    def __init__(
        self, events: Iterable[Event], medium: Callable[[str, str], str | None] = lambda *_: None
    ) -> None:
        """`medium` says what a link is on. Raises RequestError."""
        self.events: list[Event] = []
        self.lanes: list[Lane] = []
        self.lane = array("q")
        index: dict[str | tuple[str, str], int] = {}
        for number, event in enumerate(events):
            _check(event, number)
            key = event.who if isinstance(event, Compute) else (event.source, event.target)
            if key not in index:
                index[key] = len(self.lanes)
                self.lanes.append(
                    Lane(key) if isinstance(key, str) else Lane(*key, medium=medium(*key))
                )
            self.events.append(event)
            self.lane.append(index[key])

    def timeline(self, begin: array[float], left: array[float], end: array[float]) -> Timeline:
        return Timeline(
            events=self.events,
            begin=np.frombuffer(begin, np.float64),
            left=np.frombuffer(left, np.float64),
            end=np.frombuffer(end, np.float64),
            lane=np.frombuffer(self.lane, np.int64),
            lanes=tuple(self.lanes),
        )


def _check(event: Event, number: int) -> None:
    """Raises RequestError for an event that cannot be replayed as number `number` of its log."""
    if event.id != number:
        raise RequestError(
            "the events of a log are not numbered in order",
            got=f"id {event.id} at place {number}",
            allowed="ids 0, 1, 2 ... in the order of the log",
            remedy="number the events as they are written",
        )
    amount, unit = (event.flops, "flops") if isinstance(event, Compute) else (event.bytes, "bytes")
    if not 0 <= amount < math.inf:
        raise RequestError(
            f"{unit} of event {number} ({event.phase}) is no amount",
            got=amount,
            allowed="a finite number, 0 or more",
            remedy="mend the cost of that phase",
        )
    if event.after and not (min(event.after) >= 0 and max(event.after) < number):
        raise RequestError(
            f"event {number} ({event.phase}) waits for events that are not before it",
            got=f"after {min(event.after)} .. {max(event.after)}",
            allowed=f"ids below {number}",
            remedy="write an event after all that it waits for",
        )


def replay(events: Iterable[Event], network: Network) -> Timeline:
    """Run the events in virtual time.

    Raises:
        RequestError: an event that is malformed or out of order, a party or link that `network`
            lacks, or work that is never done as a speed stays at 0.
    """
    log = _Log(events, lambda source, target: network.link(source, target).shared)
    return log.timeline(*Engine(log.events, log.lanes, log.lane, network).run())


def measured(events: Iterable[Event]) -> Timeline:
    """The timeline of a log that was measured, to lay beside a replay. Raises RequestError."""
    log, begin, end = _Log(events), array("d"), array("d")
    for event in log.events:
        first, last = event.begin_s, event.end_s
        if first is None or last is None or not 0 <= first <= last < math.inf:
            raise RequestError(
                f"event {event.id} ({event.phase}) was not measured",
                got=f"begin_s {first}, end_s {last}",
                allowed="two times, the end not before the begin",
                remedy="take the log of a served run, or give it a network: --network",
            )
        begin.append(first)
        end.append(last)
    return log.timeline(begin, end, end)
