"""Who holds which sample, for experiments: pure functions of labels and a seed.

Every index is in exactly one part, no part is empty, and each part is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from splitfrozen.errors import RequestError
from splitfrozen.records import Ints
from splitfrozen.rng import stream


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
    if not (alpha > 0 and np.isfinite(alpha)):
        raise RequestError(
            "the Dirichlet parameter is wrong",
            got=alpha,
            allowed="a finite number above 0",
            remedy="take 0.1 for strong skew, 100 for nearly none",
        )
    source = stream(seed, "partition", "dirichlet")
    held: list[list[int]] = [[] for _ in range(parts)]
    for label in np.unique(classes):
        members = source.permutation(np.flatnonzero(classes == label))
        shares = source.dirichlet(np.full(parts, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, taken in zip(held, np.split(members, cuts), strict=True):
            part.extend(taken.tolist())
    for part in held:
        if not part:
            part.append(max(held, key=len).pop())
    return [_sorted(np.array(part)) for part in held]


def _sorted(part: npt.NDArray[np.int64]) -> Ints:
    return np.sort(part).astype(np.int32)


def _check(count: int, parts: int) -> None:
    if not 1 <= parts <= count:
        raise RequestError(
            "the samples cannot be split so",
            got=f"{count} samples for {parts} parts",
            allowed="at least one part, and one sample for each",
            remedy="take fewer parts or more samples",
        )
