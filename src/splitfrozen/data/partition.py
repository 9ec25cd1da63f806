"""Who holds which sample, for experiments: pure functions of what is split and a seed.

    iid         parts of one size, at random
    dirichlet   label skew: each class falls to the parts in unequal shares
    quantity    quantity skew: parts of unequal sizes, each of them IID
    by_value    one part for each value of a column

Shares are drawn before anything else, so that some of the rows are split with the same seed as
unequally as all of them: what is tuned on a few says something about the whole.

Every index is in exactly one part, no part is empty, and each part is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from splitfrozen.errors import RequestError
from splitfrozen.records import Ints
from splitfrozen.rng import stream

EQUAL = 1e12
"""A parameter of Dir with which shares are equal but for rounding; with far larger ones its sums
overflow, and the shares are no numbers."""


def iid(count: int, parts: int, seed: int) -> list[Ints]:
    """Split 0 .. count-1 at random into parts whose sizes differ by one at most.

    Raises RequestError for fewer samples than parts.
    """
    _check(count, parts)
    order = stream(seed, "partition", "iid").permutation(count)
    return [_sorted(part) for part in np.array_split(order, parts)]


def dirichlet(labels: Sequence[int] | Ints, parts: int, alpha: float, seed: int) -> list[Ints]:
    """Split with label skew: each class falls to the parts in shares drawn from Dir(alpha).

    The smaller `alpha`, the fewer parts share a class (Hsu et al. 2019, arXiv 1909.06335, with the
    draw per class as in Yurochkin et al. 2019, arXiv 1905.12022). A part left empty takes a sample
    from the largest one, so that every device has something to do.

    Raises RequestError for fewer samples than parts, or an alpha that is not above 0.
    """
    classes = np.asarray(labels)
    _check(len(classes), parts)
    _check_alpha(alpha)
    source = stream(seed, "partition", "dirichlet")
    found = np.unique(classes)
    held: list[list[int]] = [[] for _ in range(parts)]
    for label, shares in zip(found, _shares(source, len(found), parts, alpha), strict=True):
        members = source.permutation(np.flatnonzero(classes == label))
        for part, taken in zip(held, _shared_out(members, shares), strict=True):
            part.extend(taken.tolist())
    return _none_empty(held)


def quantity(count: int, parts: int, alpha: float, seed: int) -> list[Ints]:
    """Split 0 .. count-1 at random into parts whose sizes are shares drawn from Dir(alpha).

    The smaller `alpha`, the more unequal the sizes (the quantity skew of Li et al. 2022, arXiv
    2102.02079). A part left empty takes a sample from the largest one.

    Raises RequestError for fewer samples than parts, or an alpha that is not above 0.
    """
    _check(count, parts)
    _check_alpha(alpha)
    source = stream(seed, "partition", "quantity")
    [shares] = _shares(source, 1, parts, alpha)
    held = [taken.tolist() for taken in _shared_out(source.permutation(count), shares)]
    return _none_empty(held)


def by_value(values: Sequence[str]) -> dict[str, Ints]:
    """Split by what each sample has in a column: one part for each value, sorted by value."""
    held: dict[str, list[int]] = {value: [] for value in sorted(set(values))}
    for index, value in enumerate(values):
        held[value].append(index)
    return {value: np.array(part, np.int32) for value, part in held.items()}


def _shares(
    source: np.random.Generator, count: int, parts: int, alpha: float
) -> npt.NDArray[np.float64]:
    """[count, parts] drawn from Dir(alpha)."""
    return source.dirichlet(np.full(parts, min(alpha, EQUAL)), count)


def _shared_out(
    members: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]
) -> list[npt.NDArray[np.int64]]:
    """Cut `members` into consecutive pieces of these shares."""
    cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
    return np.split(members, cuts)


def _none_empty(held: list[list[int]]) -> list[Ints]:
    for part in held:
        if not part:
            part.append(max(held, key=len).pop())
    return [_sorted(np.array(part)) for part in held]


def _sorted(part: npt.NDArray[np.int64]) -> Ints:
    return np.sort(part).astype(np.int32)


def _check_alpha(alpha: float) -> None:
    if not (alpha > 0 and np.isfinite(alpha)):
        raise RequestError(
            "the Dirichlet parameter is wrong",
            got=alpha,
            allowed="a finite number above 0",
            remedy="take 0.1 for strong skew, 100 for nearly none",
        )


def _check(count: int, parts: int) -> None:
    if not 1 <= parts <= count:
        raise RequestError(
            "the samples cannot be split so",
            got=f"{count} samples for {parts} parts",
            allowed="at least one part, and one sample for each",
            remedy="take fewer parts or more samples",
        )
