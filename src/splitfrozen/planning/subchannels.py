"""Who gets which subchannel of a link, so that the last upload ends as early as it can.

    greedy   Algorithm 2 of the FedsLLM paper, at one density for all subchannels
    improve  local search from any assignment: as long as handing over a subchannel, or swapping
             two, lets the uploads end earlier with the best power for the new assignment
    best     all assignments, for links that are small enough

`improve` need not solve the power problem for every neighbour. At the present end T every client
needs a known rate, so a neighbour changes the power of two clients only, which water-filling gives
in closed form; if then all limits are kept with room to spare, the neighbour's end is before T.
"""

from __future__ import annotations

import numpy as np

from splitfrozen.errors import PlanError
from splitfrozen.planning.channel import Doubles, Link, Owners
from splitfrozen.planning.power import (
    Upload,
    earliest_end,
    least_density,
    needed,
    owned_floors,
)

ROOM = 1e-6
"""Part of a limit on power that must become free for a neighbour to count as better."""
AT_ONCE = 4096
"""Assignments that `best` looks at together."""
VALUES = 2**22
"""Floors that are looked at together: with all at once, many subchannels would fill the memory."""


def greedy(upload: Upload) -> Owners:
    """Algorithm 2: int [N].

    First every client gets one subchannel, the slowest client (by its best subchannel alone) first;
    then each of the others goes to the client that is the last at the time. A client takes the best
    that is left. Ties go to the lower index. The density is what C4 and C5 allow where all clients
    have equally many subchannels.

    Raises PlanError where there are fewer subchannels than clients.
    """
    link = upload.link
    _refuse_too_few(link)
    watts = min(link.total_w, link.clients * link.client_w)
    density = watts / link.subchannels / link.subchannel_hz
    rate = link.subchannel_hz * np.log2(1 + density * link.gain)
    owner = np.full(link.subchannels, -1)
    got = np.zeros(link.clients)

    def give(client: int) -> None:
        chosen = int(np.argmax(np.where(owner < 0, rate[client], -1.0)))
        owner[chosen] = client
        got[client] += rate[client, chosen]

    alone = upload.start_s + upload.bits / rate.max(axis=1)
    for client in np.argsort(-alone, kind="stable"):
        give(int(client))
    for _ in range(link.subchannels - link.clients):
        give(int(np.argmax(upload.start_s + upload.bits / got)))
    return owner


def improve(upload: Upload, owner: Owners) -> Owners:
    """Local search from `owner` [N], which gives every client at least one subchannel.

    A step takes the neighbours that leave most room under the tightest limit, the first of equals
    first, as long as each touches two clients that no other has: what they change adds up, so
    together they are better too. The end falls with every step, so it comes to rest; where it does
    not, the uploads' share of it is lost in rounding, and nothing more can be had.
    """
    end = earliest_end(upload, owner)
    while True:
        moves, swaps = _tightest(upload, owner, end)
        scores = np.concatenate([moves.ravel(), swaps.ravel()])
        better = np.flatnonzero(scores < 1 - ROOM)
        changed = _apply(upload.link, owner, better[np.argsort(scores[better], kind="stable")])
        ended = earliest_end(upload, changed)
        if not ended < end:
            return owner
        owner, end = changed, ended


def _apply(link: Link, owner: Owners, neighbours: Owners) -> Owners:
    """Make those changes, as `improve` numbers them, whose clients none before has touched."""
    changed, touched = owner.copy(), set[int]()
    for number in neighbours:
        if number < link.subchannels * link.clients:
            one, taker = divmod(int(number), link.clients)
            given = {one: taker}
        else:
            one, other = divmod(int(number) - link.subchannels * link.clients, link.subchannels)
            taker = int(owner[other])
            given = {one: taker, other: int(owner[one])}
        pair = {int(owner[one]), taker}
        if not pair & touched:
            touched |= pair
            for subchannel, client in given.items():
                changed[subchannel] = client
    return changed


def _tightest(upload: Upload, owner: Owners, end: Doubles) -> tuple[Doubles, Doubles]:
    """How much of the tightest limit every neighbour uses at the present end: below 1 it is better.

    Returns:
        Of subchannel i for client k, [N, K]; of i and j swapped, [N, N].
    """
    link = upload.link
    need = needed(upload, end)
    floors = owned_floors(link, owner)
    power = least_density(floors, need)
    # [N, m]: what the owner of i has, without i.
    others = np.arange(link.subchannels) != np.arange(link.subchannels)[:, None]
    others &= owner == owner[:, None]
    without = np.sort(np.where(others, 1 / link.gain[owner], np.inf), axis=-1)
    without = without[:, : floors.shape[-1]]
    lost = least_density(without, need[owner])
    gained = _with_one_more(floors, 1 / link.gain, need)
    # [N, N]: what the owner of i needs with j in place of i.
    swapped = _with_one_more(without, 1 / link.gain[owner], need[owner])

    rest = _largest_of_others(power)
    hands = np.arange(link.clients)
    moves = _use(link, power, owner[:, None], hands, (lost[:, None], gained.T, rest))
    swaps = _use(link, power, owner[:, None], owner, (swapped, swapped.T, rest))
    return moves, swaps


def _with_one_more(floors: Doubles, more: Doubles, need: Doubles) -> Doubles:
    """`least_density` [A, N] for needs [A] over sets of floors [A, m], each with one of its row in
    `more` [A, N]."""
    count, size = more.shape[-1], floors.shape[-1]
    found = np.empty(more.shape)
    rows = max(1, VALUES // (count * (size + 1)))
    for first in range(0, len(floors), rows):
        some = slice(first, first + rows)
        own = np.repeat(floors[some, None], count, axis=1)
        both = np.sort(np.concatenate([own, more[some, :, None]], axis=-1), axis=-1)
        found[some] = least_density(both, need[some, None])
    return found


def _use(
    link: Link,
    power: Doubles,
    giver: Owners,
    taker: Owners,
    after: tuple[Doubles, Doubles, Doubles],
) -> Doubles:
    """Part of the tightest limit that is used when two clients' densities change.

    Args:
        power: [K], densities before.
        giver, taker: the two clients of each neighbour, broadcast against each other.
        after: densities of the giver and the taker, and [K, K] the largest of the others'.
    """
    theirs, ours, rest = after
    total = power.sum() - power[giver] - power[taker] + theirs + ours
    largest = np.maximum(np.maximum(theirs, ours), rest[giver, taker])
    used = np.maximum(total / link.total_w, largest / link.client_w) * link.subchannel_hz
    return np.where(giver == taker, np.inf, used)


def _largest_of_others(power: Doubles) -> Doubles:
    """[K, K]: the largest of `power` [K] but two; 0 where there are only these."""
    clients = np.arange(len(power))
    found = np.zeros((len(power), len(power)))
    for client in np.argsort(-power, kind="stable")[2::-1]:
        free = (clients != client)[:, None] & (clients != client)
        found[free] = power[client]
    return found


def best(upload: Upload) -> tuple[Owners, float]:
    """The best of all assignments [N], the first of equals, and its end; there are K^N.

    Raises PlanError where there are fewer subchannels than clients.
    """
    link = upload.link
    _refuse_too_few(link)
    every = np.arange(link.clients**link.subchannels)
    found, end = np.zeros(link.subchannels, dtype=np.int64), np.inf
    for first in range(0, len(every), AT_ONCE):
        part = every[first : first + AT_ONCE, None]
        owners = part // link.clients ** np.arange(link.subchannels) % link.clients
        owners = owners[(owners[..., None] == np.arange(link.clients)).any(axis=1).all(axis=1)]
        if not len(owners):
            continue
        ends = earliest_end(upload, owners)
        if ends.min() < end:
            found, end = owners[np.argmin(ends)], float(ends.min())
    return found, end


def _refuse_too_few(link: Link) -> None:
    if link.subchannels < link.clients:
        raise PlanError(
            "C1 and C2, a subchannel for one client only, leave a client without any",
            got=f"{link.subchannels} subchannels for {link.clients} clients",
            allowed="as many subchannels as clients, or more",
            remedy=f"give the link {link.clients} subchannels, or plan for {link.subchannels} "
            "clients",
        )
