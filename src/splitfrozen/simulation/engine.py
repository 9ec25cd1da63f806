"""The discrete-event engine: one heap of what is to come, and a queue for each party and link.

It takes O(log n) for an event or a dependency, also on a medium with n sends under way: what is
sorted there are virtual finish times, which do not change when others come and go. Columns are
flat arrays, so that millions of events fit.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from splitfrozen.errors import RequestError
from splitfrozen.records import Compute, Event
from splitfrozen.simulation.network import Network
from splitfrozen.simulation.queues import Queue, Serial, Shared


@dataclass(frozen=True, slots=True)
class Lane:
    """A party, or a link from one party to another.

    Attributes:
        who: the party that computes or sends.
        target: the party that a link leads to; None for a party.
        medium: what a link shares its rate with others on; None where it is dedicated.
    """

    who: str
    target: str | None = None
    medium: str | None = None

    @property
    def name(self) -> str:
        """The party, or "who>target"."""
        return self.who if self.target is None else f"{self.who}>{self.target}"


class Engine:
    """The state of one replay."""

    def __init__(
        self, events: Sequence[Event], lanes: Sequence[Lane], lane: Sequence[int], network: Network
    ) -> None:
        """Take N checked events, and for each of them the index of its lane.

        Raises RequestError where `network` lacks what a lane needs.
        """
        size = len(events)
        self._events, self._lanes, self._lane = events, lanes, lane
        self._work = array("d", map(_work, events))
        self._begin, self._left, self._end = (array("d", bytes(8 * size)) for _ in range(3))
        self._queues: list[Queue] = []
        self._serves: list[int] = []
        """For each lane, the index of its queue."""
        self._latency: list[float] = []
        """For each lane."""
        self._make_queues(network)
        self._children, self._first_child, self._waiting = _dependants(events)
        self._coming: list[tuple[float, int]] = []
        """A heap of (second, q): queue q is due; or, where q is no queue, the arrival of event
        q - len(queues) at the end of its link."""
        self._touched: dict[int, None] = {}
        """Queues that events joined or left at this instant, in a reproducible order."""

    def run(self) -> tuple[array[float], array[float], array[float]]:
        """Return for each event when it begins, leaves its queue and ends, in seconds.

        Raises RequestError for work that is never done.
        """
        coming = self._coming
        for event in [event for event, count in enumerate(self._waiting) if not count]:
            self._join(0.0, event)
        self._turn(0.0)
        while coming:
            now = coming[0][0]
            while coming and coming[0][0] == now:
                self._happen(now, heappop(coming)[1])
            self._turn(now)
        assert not any(self._waiting), "events wait for earlier ones only, so all of them ran"
        return self._begin, self._left, self._end

    def _happen(self, now: float, number: int) -> None:
        if number >= len(self._queues):
            self._arrive(now, number - len(self._queues))
            return
        queue = self._queues[number]
        if queue.due != now:
            return  # Announced before another event joined, which moved it.
        self._touched[number] = None
        for event in queue.leave(now):
            self._left[event] = now
            latency = self._latency[self._lane[event]]
            if latency:
                heappush(self._coming, (now + latency, len(self._queues) + event))
            else:
                self._arrive(now, event)

    def _arrive(self, now: float, event: int) -> None:
        self._end[event] = now
        waiting = self._waiting
        for child in self._children[self._first_child[event] : self._first_child[event + 1]]:
            waiting[child] -= 1
            if not waiting[child]:
                self._join(now, child)

    def _join(self, now: float, event: int) -> None:
        number = self._serves[self._lane[event]]
        self._queues[number].join(now, event)
        self._touched[number] = None

    def _turn(self, now: float) -> None:
        for number in self._touched:
            due = self._queues[number].turn(now)
            if due == math.inf:
                raise self._never(self._queues[number].serving, now)
            if due is not None:
                heappush(self._coming, (due, number))
        self._touched.clear()

    def _make_queues(self, network: Network) -> None:
        media: dict[str, int] = {}
        for lane in self._lanes:
            link = None if lane.target is None else network.link(lane.who, lane.target)
            self._latency.append(link.latency_s if link else 0.0)
            if lane.medium in media:
                self._serves.append(media[lane.medium])
                continue
            speed = link.speed if link else network.machine(lane.who).speed
            kind = Serial if lane.medium is None else Shared
            self._serves.append(len(self._queues))
            self._queues.append(kind(speed, self._work, self._begin))
            if lane.medium is not None:
                media[lane.medium] = self._serves[-1]

    def _never(self, event: int, now: float) -> RequestError:
        lane = self._lanes[self._lane[event]]
        on = "" if lane.medium is None else f", on the medium {lane.medium},"
        unit = "FLOP" if lane.target is None else "bytes"
        return RequestError(
            f"{lane.name}{on} never ends event {event} ({self._events[event].phase})",
            got=f"a speed that stays at 0 (or nearly so) from second {now:g} on, with {unit} left",
            allowed="a trace whose last factor is above 0, or an end of the work before",
            remedy="add a later piece with a factor above 0 to the trace",
        )


def _work(event: Event) -> float:
    """FLOP or bits."""
    return event.flops if isinstance(event, Compute) else 8 * event.bytes


def _dependants(events: Sequence[Event]) -> tuple[array[int], array[int], list[int]]:
    """Who waits for whom, as flat arrays: a list of lists would take gigabytes.

    Returns:
        children: of all events, those of event n from first[n] to first[n + 1].
        first: [N + 1].
        waiting: for each event, how many it waits for.
    """
    counts = np.fromiter((len(event.after) for event in events), np.int64, len(events))
    parents = np.fromiter((one for event in events for one in event.after), np.int64, counts.sum())
    children = np.repeat(np.arange(len(events)), counts)[np.argsort(parents, kind="stable")]
    first = np.cumsum(np.bincount(parents + 1, minlength=len(events) + 1))
    return array("q", children.tobytes()), array("q", first.tobytes()), counts.tolist()
