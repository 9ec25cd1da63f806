"""How one thing serves many events: one at a time (`Serial`), or all at once (`Shared`).

`engine.Engine` drives both in the same way: `join` when an event becomes ready, `leave` at the
second that `turn` announced last, and `turn` once everything of an instant has joined and left.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Protocol

from splitfrozen.simulation.network import Speed


class Queue(Protocol):
    """What serves events; `due` is when it is done with the next ones, None while it is idle."""

    @property
    def due(self) -> float | None: ...

    @property
    def serving(self) -> int:
        """The event that is done first."""
        ...

    def join(self, now: float, event: int) -> None:
        """Take an event that became ready now."""
        ...

    def leave(self, now: float) -> Sequence[int]:
        """Give back the events that are done now; `now` is `due`."""
        ...

    def turn(self, now: float) -> float | None:
        """Begin what can begin; return `due` where it is new. Infinite: it is never done."""
        ...


class Serial:
    """One event at a time, in the order in which they became ready, ties by id."""

    __slots__ = ("_begin", "_fresh", "_instant", "_speed", "_waiting", "_work", "due", "serving")

    def __init__(self, speed: Speed, work: Sequence[float], begin: array[float]) -> None:
        """`work` of all events, in the unit of `speed`; `begin` of all events, filled in here."""
        self._speed, self._work, self._begin = speed, work, begin
        self._waiting: deque[int] = deque()
        """In order; they became ready before `_instant`."""
        self._fresh: list[int] = []
        """A heap of those that became ready at `_instant`."""
        self._instant = 0.0
        self.serving = -1
        self.due: float | None = None

    def join(self, now: float, event: int) -> None:
        if now != self._instant:
            self._waiting.extend(sorted(self._fresh))
            self._fresh.clear()
            self._instant = now
        heappush(self._fresh, event)

    def leave(self, now: float) -> Sequence[int]:  # noqa: ARG002
        self.due = None
        return (self.serving,)

    def turn(self, now: float) -> float | None:
        if self.due is not None or not (self._waiting or self._fresh):
            return None
        event = self._waiting.popleft() if self._waiting else heappop(self._fresh)
        self.serving = event
        self._begin[event] = now
        self.due = self._speed.end(now, self._work[event])
        return self.due


class Shared:
    """All at once, each at an equal part of the speed (processor sharing).

    The virtual time is the work that each event under way has been given since the queue was last
    empty. It runs at speed / events under way, and an event that joins at virtual time v with work
    w leaves at v + w whoever else comes and goes, so a heap of those tags is all there is to keep.
    """

    __slots__ = ("_begin", "_last", "_speed", "_tags", "_virtual", "_work", "due")

    def __init__(self, speed: Speed, work: Sequence[float], begin: array[float]) -> None:
        """As in `Serial`."""
        self._speed, self._work, self._begin = speed, work, begin
        self._tags: list[tuple[float, int]] = []
        self._virtual = 0.0
        self._last = 0.0
        """The second up to which `_virtual` was brought."""
        self.due: float | None = None

    @property
    def serving(self) -> int:
        return self._tags[0][1]

    def join(self, now: float, event: int) -> None:
        if not self._tags:
            self._virtual = 0.0
        elif now > self._last:
            self._virtual += self._speed.work(self._last, now) / len(self._tags)
        self._last = now
        self._begin[event] = now
        heappush(self._tags, (self._virtual + self._work[event], event))

    def leave(self, now: float) -> Sequence[int]:
        tags = self._tags
        # Not what the speed gives, which is the same but for rounding: equal tags leave together.
        self._virtual, self._last = tags[0][0], now
        gone = []
        while tags and tags[0][0] <= self._virtual:
            gone.append(heappop(tags)[1])
        self.due = None
        return gone

    def turn(self, now: float) -> float | None:
        if not self._tags:
            return None
        left = max(0.0, self._tags[0][0] - self._virtual)
        self.due = self._speed.end(now, left * len(self._tags))
        return self.due
