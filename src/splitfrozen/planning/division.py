"""Who gets which part of a band: shares of a medium, and subchannels, for equal arrivals.

A device's last bits arrive later the slower its link is (equation 1 of `makespan`), so the latest
arrival is least where nobody can be helped without making another later. Shares of a medium follow
from bisection on the common arrival, each being a closed form of it. To divide subchannels is hard
in general (it contains scheduling on unrelated machines): here one for each device is chosen
exactly, the others go one by one to whoever is last, and exchanges, or chains of them, follow while
they help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csr_array, hstack, vstack
from scipy.sparse.csgraph import maximum_bipartite_matching

from splitfrozen.errors import PlanError

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

ROUNDS = 60
"""Of bisection: each halves an interval."""
GAIN = 1e-4
"""Of an exchange of subchannels at least, as a part of the last second."""
LONGEST = 4
"""Exchanges in a chain."""
TRIALS = 20_000
"""Exchanges in chains that are looked at, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Wants:
    """What devices' links carry, and when it would be there. K devices.

    Attributes:
        bits: float64 [K].
        before: float64 [K], s that a step takes before it reaches the link.
        behind: float64 [K], s that a step takes after it, before it can be trained on.
        pace: float64 [K], whole seconds of what is slowest on the way besides the link.
        first: f, the part of the data in one step.
    """

    bits: Array
    before: Array
    behind: Array
    pace: Array
    first: float

    def ready(self, bps: Array) -> Array:
        """Seconds [K] at rates [K], or [K, I] at rates [K, I]; infinite where a rate is 0."""
        wide = (..., None) if bps.ndim > 1 else ...
        with np.errstate(divide="ignore"):
            link: Array = self.bits[wide] / bps
        slowest = np.maximum(self.pace[wide], link)
        besides: Array = (self.before + self.behind)[wide]
        return besides + self.first * link + (1 - self.first) * slowest

    def slowest_link(self, ready: float) -> Array:
        """Whole seconds [K] that each link may take: the inverse of `ready`."""
        f, left = self.first, ready - self.before - self.behind
        return np.where(left >= self.pace, left, (left - (1 - f) * self.pace) / f)


def shares(wants: Wants, band: float) -> Array:
    """bit/s [K] of a medium of `band` bit/s, for the least common second at which all is ready."""
    low = float((wants.before + wants.behind + (1 - wants.first) * wants.pace).max())
    high = float(wants.ready(np.full(len(wants.bits), band / len(wants.bits))).max())
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        links = wants.slowest_link(middle)
        fits = links.min() > 0 and float((wants.bits / links).sum()) <= band
        low, high = (low, middle) if fits else (middle, high)
    # Nobody needs more than all of it, whatever is lost in rounding where links are no matter.
    links = np.maximum(wants.slowest_link(high), wants.bits / band)
    rates: Array = wants.bits / links
    return rates * (band / float(rates.sum()))


def most_even(rates: Array) -> float:
    """The most that everybody can have at once where subchannels may be divided over time.

    A linear programme: the most z such that parts x[k, i] of subchannel i, together at most 1, give
    every k at least z = sum_i x[k, i] rates[k, i]. No division of whole subchannels gives more.
    What is returned is that of its dual, for which every weights w of the devices are a bound,

        z <= sum_k w_k sum_i x[k, i] rates[k, i] <= sum_i max_k w_k rates[k, i]   (sum_k w_k = 1)

    and so those are, too, that a solver finds within its tolerances. Where rates differ by more
    than it takes, it is what the poorest device would have of all.
    """
    devices, channels = rates.shape
    # Variables: x by rows, then z. First the devices' constraints, then the subchannels'. Nobody
    # has more than all, so 1 is a bound of z in that unit.
    size, scale = rates.size, float(rates.sum(axis=1).min())
    device, channel = np.divmod(np.arange(size), channels)
    gets = csr_array((-rates.ravel() / scale, (device, np.arange(size))), (devices, size))
    uses = csr_array((np.ones(size), (channel, np.arange(size))), (channels, size))
    z = csr_array(np.repeat([1.0, 0.0], [devices, channels])[:, None])
    uppers = np.repeat([0.0, 1.0], [devices, channels])
    matrix = hstack([vstack([gets, uses]), z], format="csr")
    aim = np.append(np.zeros(size), -1.0)
    solved = linprog(aim, A_ub=matrix, b_ub=uppers, method="highs")
    weights = np.zeros(devices)
    if solved.status == 0:
        weights = np.maximum(-solved.ineqlin.marginals[:devices], 0.0)
    if not weights.any():
        return scale
    bound = (weights[:, None] * rates).max(axis=0).sum() / weights.sum()
    return min(scale, float(bound))


def assign(wants: Wants, rates: Array, names: list[str]) -> tuple[int, ...]:
    """Owner of each subchannel, [I]: a device's index.

    Args:
        rates: float64 [K, I], bit/s of each subchannel for each device.
        names: [K], of the devices, for messages.

    Raises:
        PlanError: there are not enough subchannels for every device to have one that it can use.
    """
    devices, channels = rates.shape
    owner = np.full(channels, -1)
    chosen = _one_each(wants.ready(rates), names)
    owner[chosen] = np.arange(devices)
    bps = rates[np.arange(devices), chosen].copy()
    free = [channel for channel in range(channels) if owner[channel] < 0]
    while free:
        last = int(wants.ready(bps).argmax())
        best = max(free, key=lambda channel: (rates[last, channel], -channel))
        free.remove(best)
        owner[best] = last
        bps[last] += rates[last, best]
    _Exchange(wants, rates, owner).run()
    return tuple(owner.tolist())


def _one_each(arrival: Array, names: list[str]) -> Indices:
    """A subchannel for each device [K]: the last arrival is least, then the sum of all is."""
    found = _match(arrival, np.inf)
    without = [name for name, channel in zip(names, found, strict=True) if channel < 0]
    if without:
        devices, channels = arrival.shape
        raise PlanError(
            f"{without[0]} gets no subchannel that it can use",
            got=f"{channels} subchannels, of which {devices - len(without)} of {devices} devices"
            " can have one each",
            allowed="one for each device, at a rate above 0",
            remedy=f"add {len(without)} subchannels, or take {len(without)} devices out",
        )
    steps = np.unique(arrival[np.isfinite(arrival)])
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        all_have = bool((_match(arrival, float(steps[middle])) >= 0).all())
        low, high = (low, middle) if all_have else (middle + 1, high)
    allowed = arrival <= steps[low]
    # What is not allowed costs more than everything allowed together.
    dear = float(arrival[allowed].sum()) + 1.0
    chosen: Indices = linear_sum_assignment(np.where(allowed, arrival, dear))[1]
    return chosen


def _match(arrival: Array, until: float) -> Indices:
    """A largest matching of devices to subchannels on which they arrive in time; -1 for none."""
    usable = csr_array(np.isfinite(arrival) & (arrival <= until))
    found: Indices = maximum_bipartite_matching(usable, perm_type="column")
    return found


class _Exchange:
    """Subchannels changing hands until the last device cannot be helped any more."""

    def __init__(self, wants: Wants, rates: Array, owner: Indices) -> None:
        """Takes `owner` as it is, and changes it."""
        self._wants, self._rates, self._owner = wants, rates, owner
        self._bps = owned(rates, owner)
        self._trials = TRIALS
        # Scalars of Python: one device at a time is looked at, very often.
        self._table, self._besides = rates.tolist(), (wants.before + wants.behind).tolist()
        self._bits, self._pace = wants.bits.tolist(), wants.pace.tolist()

    def run(self) -> None:
        """Exchanges while they make the last second earlier; longer chains where shorter do not."""
        while True:
            seconds = self._wants.ready(self._bps)
            last = int(seconds.argmax())
            aim = float(seconds[last]) * (1 - GAIN)
            if not (
                self._one(last, aim)
                or any(self._chain(last, aim, {}, length) for length in range(2, LONGEST + 1))
            ):
                return
            self._bps = owned(self._rates, self._owner)

    def _one(self, last: int, aim: float) -> bool:
        """The exchange for the last device that is best for all."""
        best: dict[int, int] = {}
        for change in exchanges(self._owner, last):
            found = max(self._ready(k, more) for k, more in self._gains(change).items())
            if found < aim:
                aim, best = found, change
        self._apply(best)
        return bool(best)

    def _chain(self, late: int, aim: float, gains: dict[int, float], length: int) -> bool:
        """Help a device that is too late with an exchange, then the one that lost by it, and so
        on, at most so many times, until nobody is; the first chain that does is kept.

        `gains`: bit/s by the exchanges before it in the chain.
        """
        for change in list(exchanges(self._owner, late)):
            self._trials -= 1
            if self._trials <= 0:
                return False
            found = self._gains(change)
            both = gains | {k: gains.get(k, 0.0) + more for k, more in found.items()}
            [loser] = [k for k in found if k != late]
            if self._ready(late, both[late]) >= aim:
                continue
            before = {channel: int(self._owner[channel]) for channel in change}
            self._apply(change)
            if self._ready(loser, both[loser]) < aim:
                return True
            if length > 1 and self._chain(loser, aim, both, length - 1):
                return True
            self._apply(before)
        return False

    def _gains(self, change: dict[int, int]) -> dict[int, float]:
        """bit/s that devices gain by a change, the losers' below 0."""
        found: dict[int, float] = {}
        for channel, to in change.items():
            has = int(self._owner[channel])
            found[has] = found.get(has, 0.0) - self._table[has][channel]
            found[to] = found.get(to, 0.0) + self._table[to][channel]
        return found

    def _ready(self, k: int, more: float) -> float:
        """`Wants.ready` of one device with so many bit/s more than it has."""
        rate, f = float(self._bps[k]) + more, self._wants.first
        link = self._bits[k] / rate if rate > 0 else math.inf
        found: float = self._besides[k] + f * link + (1 - f) * max(self._pace[k], link)
        return found

    def _apply(self, change: dict[int, int]) -> None:
        for channel, to in change.items():
            self._owner[channel] = to


def exchanges(owner: Indices, device: int) -> Iterator[dict[int, int]]:
    """Changes of owner that may help a device: subchannel -> whose it becomes."""
    counts = np.bincount(owner)
    own = np.flatnonzero(owner == device).tolist()
    for channel in np.flatnonzero(owner != device).tolist():
        other = int(owner[channel])
        if counts[other] > 1:
            yield {channel: device}
        for mine in own:
            yield {channel: device, mine: other}


def owned(rates: Array, owner: Indices) -> Array:
    """bit/s [K] of what each device owns."""
    found = np.zeros(len(rates))
    np.add.at(found, owner, rates[owner, np.arange(len(owner))])
    return found
