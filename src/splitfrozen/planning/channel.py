"""Uplinks of one cell: path loss, shadowing, equally wide FDMA subchannels, and what gets through.

Section V-A of the FedsLLM paper (arXiv 2504.14667). Each client reaches two servers, over a link of
its own for each: K clients share the N subchannels of a link, and no two share one subchannel.

The paper's gain is that of a client's position, the same on all subchannels of a link; then only
their number matters to a client. With Rayleigh fading every client has better and worse ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Owners = npt.NDArray[np.int64]

NEAREST_M = 1.0
"""The path loss holds for no shorter distance, and a client may be drawn on top of a server."""


@dataclass(frozen=True, slots=True)
class Link:
    """All uplinks to one server.

    Attributes:
        gain: [K, N], signal-to-noise ratio for each W/Hz sent: G_c G_s gamma_k / sigma^2.
        subchannel_hz: B_i, the same for all.
        client_w: transmit power of a client at most (C4).
        total_w: of all clients together at most (C5).
    """

    gain: Doubles
    subchannel_hz: float
    client_w: float
    total_w: float

    @property
    def clients(self) -> int:
        """K."""
        return len(self.gain)

    @property
    def subchannels(self) -> int:
        """N."""
        return len(self.gain[0])


@dataclass(frozen=True, slots=True)
class Allocation:
    """How a link is used.

    Attributes:
        owner: int [N], the client that has the subchannel.
        psd: [N], W/Hz sent on it.
    """

    owner: Owners
    psd: Doubles


def watts(dbm: float) -> float:
    """Power of so many dBm."""
    return float(10 ** ((dbm - 30) / 10))


def path_gain(distance_m: Doubles, shadowing_db: Doubles) -> Doubles:
    """gamma: 128.1 + 37.6 log10(distance in km) dB are lost; section VII-A."""
    loss_db = 128.1 + 37.6 * np.log10(np.maximum(distance_m, NEAREST_M) / 1000)
    return np.asarray(10 ** ((shadowing_db - loss_db) / 10))


def positions(clients: int, radius_m: float, random: np.random.Generator) -> Doubles:
    """Draw [K, 2], metres from the centre of a disc, uniform over its area."""
    radius = radius_m * np.sqrt(random.random(clients))
    angle = 2 * math.pi * random.random(clients)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def path_gains(
    distance_m: Doubles,
    subchannels: int,
    shadowing_db: float,
    random: np.random.Generator,
    *,
    rayleigh: bool,
) -> Doubles:
    """Draw gamma [K, N] for clients at these distances [K].

    Args:
        shadowing_db: standard deviation, one draw a client.
        rayleigh: each subchannel fades by a factor of its own, exponential with mean 1.
    """
    clients = len(distance_m)
    shadowing = shadowing_db * random.standard_normal(clients)
    gamma = path_gain(distance_m, shadowing)[:, None] * np.ones(subchannels)
    return gamma * random.exponential(size=gamma.shape) if rayleigh else gamma


def rates(link: Link, allocation: Allocation) -> Doubles:
    """Bit/s of each client, [K]: equations 9 and 14."""
    own = link.gain[allocation.owner, np.arange(link.subchannels)]
    each = link.subchannel_hz * np.log2(1 + allocation.psd * own)
    return np.asarray(np.bincount(allocation.owner, each, link.clients), dtype=np.float64)


def uniform(link: Link, owner: Owners) -> Allocation:
    """The same density on all subchannels, as high as C4 and C5 let it be."""
    most = int(np.bincount(owner, minlength=link.clients).max())
    watt = min(link.client_w / most, link.total_w / link.subchannels)
    return Allocation(owner, np.full(link.subchannels, watt / link.subchannel_hz))


def shared_out(link: Link, random: np.random.Generator) -> Owners:
    """Equal numbers of subchannels for all clients, or one more for some, drawn at random."""
    return random.permutation(np.arange(link.subchannels) % link.clients)
