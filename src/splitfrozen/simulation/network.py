"""What a simulation runs on: machines, links, and how their speeds change over time.

A party's machine and a link are looked up by name first and by role second, so that ten thousand
equal devices need one entry:

    Network(
        machines={"device": Machine(8e12), "server": Machine(330e12), "phone": Machine(1e12)},
        links={("device", "server"): Link(600e6, shared="cell"), ("server", "device"): Link(1e9)},
    )
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from splitfrozen.errors import RequestError

Trace = tuple[tuple[float, float], ...]
"""((second, factor), ...): from that second on, the speed is `factor` times the nominal one. The
factor is 1 before the first second, and the last one holds for ever."""

SHOWN = 6
"""Names that an error message lists."""


class Speed:
    """Work per second as a function of time; constant between the seconds of a trace."""

    __slots__ = ("_constant", "_done", "_rates", "_times")

    def __init__(self, rate: float, trace: Trace) -> None:
        begins_late = not trace or trace[0][0] > 0
        pieces = ((0.0, 1.0), *trace) if begins_late else trace
        self._constant = 0.0 if trace else rate
        """The speed where it never changes; that is the usual case, and a short way."""
        self._times = [second for second, _ in pieces]
        self._rates = [rate * factor for _, factor in pieces]
        self._done = [0.0]
        """Work done from second 0 to each of `_times`."""
        for piece in range(len(pieces) - 1):
            lasts = self._times[piece + 1] - self._times[piece]
            self._done.append(self._done[-1] + lasts * self._rates[piece])

    def end(self, begin: float, work: float) -> float:
        """The second at which `work`, begun at `begin`, is done; infinite if that is never."""
        if self._constant:
            return begin + work / self._constant
        if work <= 0:
            return begin
        times, rates, done = self._times, self._rates, self._done
        last = len(times) - 1
        piece = bisect_right(times, begin) - 1
        if piece < last:
            room = (times[piece + 1] - begin) * rates[piece]
            if work > room:
                # The boundary before which it ends: an outage that begins then does not delay it.
                target = done[piece + 1] + (work - room)
                piece = bisect_left(done, target, piece + 2) - 1
                begin, work = times[piece], target - done[piece]
        if work <= 0:  # The rest is less than the last bit of what was done.
            return begin
        return begin + work / rates[piece] if rates[piece] else math.inf

    def work(self, begin: float, end: float) -> float:
        """What is done between two seconds."""
        if self._constant:
            return (end - begin) * self._constant
        times, rates = self._times, self._rates
        first, last = bisect_right(times, begin) - 1, bisect_right(times, end) - 1
        if first == last:
            return (end - begin) * rates[first]
        head = (times[first + 1] - begin) * rates[first]
        tail = (end - times[last]) * rates[last]
        return head + (self._done[last] - self._done[first + 1]) + tail


@dataclass(frozen=True)
class Machine:
    """What a party computes with.

    Attributes:
        flops: FLOP/s at its peak.
        efficiency: the part of the peak that is reached, above 0 and at most 1.
        trace: how its speed changes over time.
    """

    flops: float
    efficiency: float = 1.0
    trace: Trace = ()

    def __post_init__(self) -> None:
        _positive("the speed of a machine", self.flops, "FLOP/s")
        if not 0 < self.efficiency <= 1:
            raise RequestError(
                "the efficiency of a machine is no fraction of its peak",
                got=self.efficiency,
                allowed="above 0 and at most 1",
                remedy="give the part of the peak that is reached, such as 0.4",
            )
        _check(self.trace)

    @cached_property
    def speed(self) -> Speed:
        """FLOP/s over time."""
        return Speed(self.flops * self.efficiency, self.trace)


@dataclass(frozen=True)
class Link:
    """One way from a party to another.

    Attributes:
        bps: bit/s.
        latency_s: from the end of the transmission to the arrival; it does not occupy the link.
        shared: name of the medium whose rate all its links divide; None for a dedicated link.
        trace: how its rate changes over time.
    """

    bps: float
    latency_s: float = 0.0
    shared: str | None = None
    trace: Trace = ()

    def __post_init__(self) -> None:
        _positive("the rate of a link", self.bps, "bit/s")
        if not 0 <= self.latency_s < math.inf:
            raise RequestError(
                "the latency of a link is no time",
                got=self.latency_s,
                allowed="finite seconds, 0 or more",
                remedy="give the seconds between the end of a transmission and its arrival",
            )
        _check(self.trace)

    @cached_property
    def speed(self) -> Speed:
        """Bit/s over time."""
        return Speed(self.bps, self.trace)


@dataclass(frozen=True)
class Network:
    """Machines and links by name or by role; see the module's docstring.

    Links that name one medium say the same rate and trace of it; their latencies may differ.
    """

    machines: Mapping[str, Machine]
    links: Mapping[tuple[str, str], Link]

    def __post_init__(self) -> None:
        media: dict[str, Link] = {}
        for (source, target), link in self.links.items():
            if link.shared is None:
                continue
            first = media.setdefault(link.shared, link)
            if (link.bps, link.trace) != (first.bps, first.trace):
                raise RequestError(
                    f"two links say different things of the medium {link.shared}",
                    got=f"{link.bps:g} bit/s with {len(link.trace)} pieces from {source} to"
                    f" {target}, {first.bps:g} bit/s with {len(first.trace)} before",
                    allowed="one rate and one trace for a medium",
                    remedy="give all links of the medium the same bps and trace",
                )

    def machine(self, who: str) -> Machine:
        """The machine of a party. Raises RequestError."""
        found = self.machines.get(who) or self.machines.get(role(who))
        if found is None:
            raise RequestError(
                "a party has no machine",
                got=repr(who),
                allowed=_some(self.machines),
                remedy=f"give it a machine, or one to the role {role(who)!r}",
            )
        return found

    def link(self, source: str, target: str) -> Link:
        """The link from one party to another. Raises RequestError."""
        for pair in (
            (source, target),
            (source, role(target)),
            (role(source), target),
            (role(source), role(target)),
        ):
            if pair in self.links:
                return self.links[pair]
        raise RequestError(
            "two parties have no link",
            got=f"{source!r} to {target!r}",
            allowed=_some(f"{one} to {other}" for one, other in self.links),
            remedy=f"add one, or one for their roles ({role(source)!r} to {role(target)!r})",
        )


def role(who: str) -> str:
    """ "server" for the server and its stages, "federated" for itself, "device" for all others."""
    if who == "server" or who.startswith("server/"):
        return "server"
    return "federated" if who == "federated" else "device"


def _positive(what: str, value: float, unit: str) -> None:
    if not 0 < value < math.inf:
        raise RequestError(
            f"{what} is no speed",
            got=value,
            allowed=f"finite {unit} above 0",
            remedy="give a measured speed; outages go into `trace`",
        )


def _check(trace: Trace) -> None:
    before = -1.0
    for second, factor in trace:
        if not (max(before, 0.0) <= second < math.inf and second != before):
            raise _bad_trace(second, "seconds that grow, from 0 on")
        if not 0 <= factor < math.inf:
            raise _bad_trace(factor, "finite factors, 0 or more")
        before = second


def _bad_trace(got: float, allowed: str) -> RequestError:
    return RequestError(
        "a trace cannot be followed",
        got=got,
        allowed=f"pairs of second and factor; {allowed}",
        remedy="sort the trace, leave out doubles, and mend that value",
    )


def _some(names: Iterable[str]) -> str:
    """Some of many names, for a message."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return (", ".join(listed[:SHOWN]) or "none is given") + more
