"""Transmit power for given subchannels, so that the last upload ends as early as it can.

Client k starts `start_s[k]` late, sends the same number of bits as the others and may use up to
`client_w`, all together `total_w`. Two solvers, which must agree:

    by_bisection  exact, the one to use: for a common end T a client needs a known rate, which
                  water-filling over its subchannels gets for the least power; more time never needs
                  more power, so the least T is where a limit is met
    by_convex     problem 25 of the FedsLLM paper, convex in the rates, by an interior-point method

Both see a density as a height: subchannel i carries log2(level / floor_i) bit/s/Hz for a density of
level - floor_i, where floor_i = 1 / gain is the height of its noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitfrozen.planning.channel import Allocation, Doubles, Link, Owners, rates, uniform

EXACT = 1e-13
"""Relative width of the bracket where bisection ends."""
HALVINGS = 200
"""At most: the bracket is down to neighbouring numbers long before."""

GAP = 1e-10
"""Relative to the end: how far from the optimum the interior-point method stops."""
STRICTER = 20.0
"""Factor by which it weighs the goal more from one centre to the next."""
CENTRED = 1e-6
"""A point is a centre where another Newton step promises no more than this."""
NEWTON = 200
"""Newton steps to a centre at most; some ten are usual."""


@dataclass(frozen=True, slots=True)
class Upload:
    """What every client sends over a link.

    Attributes:
        link: over which.
        start_s: [K], when each has it ready.
        bits: how much each sends.
    """

    link: Link
    start_s: Doubles
    bits: float


def end_s(upload: Upload, allocation: Allocation) -> float:
    """When the last upload ends: the maximum over k of start_k + bits / R_k; inf without a rate."""
    with np.errstate(divide="ignore"):
        return float(np.max(upload.start_s + upload.bits / rates(upload.link, allocation)))


# --- water-filling ---------------------------------------------------------------------------


def owned_floors(link: Link, owner: Owners) -> Doubles:
    """Floors of each client's own subchannels in rising order, filled up with inf.

    Args:
        owner: int [..., N]: one assignment, or many at once.

    Returns:
        [..., K, m], m as many as any client has.
    """
    mine = owner[..., None, :] == np.arange(link.clients)[:, None]
    floors = np.where(mine, 1 / link.gain, np.inf)
    most = int(np.count_nonzero(mine, axis=-1).max())
    return np.sort(floors, axis=-1)[..., :most]


def least_density(floors: Doubles, need: Doubles) -> Doubles:
    """Sum of densities [...], W/Hz, that gets `need` bit/s/Hz over floors [..., m] in rising order.

    The level over the j lowest floors is 2 ** ((need + sum of their log2) / j). Filling one floor
    more moves the logarithm of the level towards that floor's: down while it is below the level.
    So the least of these levels is the right one.
    """
    return _filled(floors, _level(floors, need))


def _level(floors: Doubles, need: Doubles) -> Doubles:
    count = np.arange(1, floors.shape[-1] + 1)
    with np.errstate(over="ignore"):
        return np.asarray(
            2 ** ((need[..., None] + np.cumsum(np.log2(floors), -1)) / count).min(axis=-1)
        )


def _filled(floors: Doubles, level: Doubles) -> Doubles:
    with np.errstate(invalid="ignore"):
        # inf - inf, where no power is enough, is no number, which fmax passes over.
        densities = np.fmax(level[..., None] - floors, 0.0).sum(axis=-1)
    return np.where(np.isinf(level), np.inf, densities)


def _most_rate(floors: Doubles, density: float) -> Doubles:
    """Bit/s/Hz [...] over floors [..., m] in rising order for a sum of densities."""
    count = np.arange(1, floors.shape[-1] + 1)
    level = ((density + np.cumsum(floors, axis=-1)) / count).min(axis=-1)
    return np.asarray(np.log2(np.fmax(level[..., None] / floors, 1.0)).sum(axis=-1))


# --- the exact solver ------------------------------------------------------------------------


def needed(upload: Upload, end: Doubles) -> Doubles:
    """Bit/s/Hz [..., K] for uploads that end at `end` [...]; inf where one starts later."""
    left = np.maximum(end[..., None] - upload.start_s, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(upload.bits / upload.link.subchannel_hz / left)


def earliest_end(upload: Upload, owner: Owners) -> Doubles:
    """The least end [...], s, for each assignment of owner [..., N], where no client has none.

    Bisection between the end when nobody needs more than `client_w`, whatever all need together,
    and the end when everybody has an equal part of `total_w`; what it returns keeps all limits.
    """
    link = upload.link
    floors = owned_floors(link, owner)
    low = _end_at(upload, floors, link.client_w)
    high = _end_at(upload, floors, min(link.client_w, link.total_w / link.clients))
    limit = link.total_w / link.subchannel_hz
    high = np.where(_density(upload, floors, low) <= limit, low, high)
    for _ in range(HALVINGS):
        if np.all(high - low <= EXACT * high):
            break
        middle = 0.5 * (low + high)
        enough = _density(upload, floors, middle) <= limit
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high


def _density(upload: Upload, floors: Doubles, end: Doubles) -> Doubles:
    return np.asarray(least_density(floors, needed(upload, end)).sum(axis=-1))


def _end_at(upload: Upload, floors: Doubles, client_w: float) -> Doubles:
    """The end [...] when every client sends at `client_w`; later by what may be lost in rounding,
    of which there is much where uploads are a small part of it."""
    rate = upload.link.subchannel_hz * _most_rate(floors, client_w / upload.link.subchannel_hz)
    return np.asarray((upload.start_s + upload.bits / rate).max(axis=-1) * (1 + EXACT))


def by_bisection(upload: Upload, owner: Owners) -> Allocation:
    """The densities with which the last upload ends first; a client that could be faster than the
    last one saves power instead."""
    floors = owned_floors(upload.link, owner)
    level = _level(floors, needed(upload, earliest_end(upload, owner)))
    own = upload.link.gain[owner, np.arange(upload.link.subchannels)]
    return Allocation(owner, np.maximum(level[owner] - 1 / own, 0.0))


# --- the convex programme --------------------------------------------------------------------


def by_convex(upload: Upload, owner: Owners) -> Allocation:
    """The same by problem 25, for owners [N] with at least one subchannel each.

    Unknown are theta_i >= 0, the bit/s/Hz of each subchannel, and the end T. In logarithms, which
    keep the problem convex and bring constraints that differ by ten orders of magnitude to one
    scale:

        C8, C10  log(T - start_k) + log(sum of theta_i) >= log(bits / B)
        C4, C5   logsumexp(theta_i log 2 + log floor_i) <= log(P / B + sum of floor_i)

    with sums over the subchannels of a client, and in C5 over all. From a point inside, Newton's
    method follows the minima of weight * T - sum of log(slack) as the weight grows; at each, T is
    at most (number of constraints) / weight above the optimum.
    """
    programme = _Programme(upload, owner)
    x, weight = programme.inside(), 1.0
    while True:
        x = _centre(programme, x, weight)
        if programme.constraints < GAP * weight:
            return Allocation(owner, (2 ** x[:-1] - 1) * programme.floors)
        weight *= STRICTER


def _centre(programme: _Programme, x: Doubles, weight: float) -> Doubles:
    """The minimum of the barrier function for a weight, by damped Newton steps from x inside."""
    for _ in range(NEWTON):
        value, slope, curve = programme.barrier(x, weight)
        step = -np.linalg.solve(curve, slope)
        fall = float(-slope @ step)
        # Below this the fall is lost in the rounding of the value.
        if fall < max(CENTRED, 1e-15 * abs(value)):
            break
        length = 1.0
        while programme.value(x + length * step, weight) > value - 0.1 * length * fall:
            length /= 2
            if length < 1e-9:
                return x
        x = x + length * step
    return x


class _Programme:
    """The constraints at x = (theta [N], T / `scale`), as a barrier with its derivatives."""

    def __init__(self, upload: Upload, owner: Owners) -> None:
        link = upload.link
        self.floors = 1 / link.gain[owner, np.arange(link.subchannels)]
        self.scale = end_s(upload, uniform(link, owner))
        self.constraints = 2 * link.clients + 1 + link.subchannels
        self._start = upload.start_s / self.scale
        self._mine = (owner == np.arange(link.clients)[:, None]).astype(float)
        # The sums of C4, a row for each client, and of C5.
        sums = np.vstack([self._mine, np.ones((1, link.subchannels))])
        limits = np.append(np.full(link.clients, link.client_w), link.total_w)
        self._limits = np.log(limits / link.subchannel_hz + sums @ self.floors)
        with np.errstate(divide="ignore"):
            self._heights = np.log(self.floors) + np.log(sums)
        self._need = np.log(upload.bits / link.subchannel_hz / self.scale)
        self._first = 0.5 * uniform(link, owner).psd

    def inside(self) -> Doubles:
        """A point that keeps all constraints with room: half the uniform density, and time."""
        theta = np.log2(1 + self._first / self.floors)
        ends = self._start + np.exp(self._need) / (self._mine @ theta)
        return np.append(theta, 2.0 * ends.max())

    def value(self, x: Doubles, weight: float) -> float:
        """Of the barrier function; inf outside."""
        if np.any(x[:-1] <= 0) or np.any(x[-1] <= self._start):
            return np.inf
        slack = self._slack(x)
        if np.any(slack <= 0):
            return np.inf
        return float(weight * x[-1] - np.log(slack).sum() - np.log(x[:-1]).sum())

    def barrier(self, x: Doubles, weight: float) -> tuple[float, Doubles, Doubles]:
        """Value, gradient [N + 1] and Hessian [N + 1, N + 1] at a point inside."""
        clients = len(self._start)
        slack = self._slack(x)
        rate = self._mine / (self._mine @ x[:-1])[:, None]
        left = 1 / (x[-1] - self._start)
        share = np.log(2) * np.exp(self._log_terms(x) - self._log_sums(x)[:, None])
        zero = np.zeros((len(share), 1))
        jacobian = np.block([[rate, left[:, None]], [-share, zero]])
        late, loud = 1 / slack[:clients], 1 / slack[clients:]
        slope = -(jacobian.T @ (1 / slack))
        slope[:-1] -= 1 / x[:-1]
        slope[-1] += weight
        curve = (jacobian.T / slack**2) @ jacobian
        curve[:-1, :-1] += (rate.T * late) @ rate - (share.T * loud) @ share
        curve[:-1, :-1] += np.diag(np.log(2) * (share.T @ loud) + x[:-1] ** -2.0)
        curve[-1, -1] += late @ left**2
        return self.value(x, weight), slope, curve

    def _slack(self, x: Doubles) -> Doubles:
        on_time = np.log(x[-1] - self._start) + np.log(self._mine @ x[:-1]) - self._need
        return np.append(on_time, self._limits - self._log_sums(x))

    def _log_terms(self, x: Doubles) -> Doubles:
        return np.asarray(x[:-1] * np.log(2) + self._heights)

    def _log_sums(self, x: Doubles) -> Doubles:
        return np.asarray(np.logaddexp.reduce(self._log_terms(x), axis=1))
