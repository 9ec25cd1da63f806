"""A(rho, E): how accurate a model stays when activations at its cut are compressed (SFT, IV-C).

A polynomial of third order in the keep rate and the bits of a level, fitted by least squares to
points that scripts/measure_surface.py measured on a model. A file of one is read by fitting its
points again; the coefficients and the error in it are for people.

    A(rho, E) = sum over i + j <= 3 of  coefficient_ij  rho^i  (log2 E)^j

Bits, where the paper has levels: quality changes from 2 to 4 levels as from 4 to 8, which a
polynomial of low order in E itself cannot follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from splitfrozen.errors import DataError

Reals = npt.NDArray[np.float64]

ORDER = 3
POWERS = tuple((i, j) for i in range(ORDER + 1) for j in range(ORDER + 1 - i))
"""(i, j) of each coefficient, in their order."""

Share = Annotated[float, Meta(ge=0, le=1)]
Kept = Annotated[float, Meta(gt=0, le=1)]
Levels = Annotated[int, Meta(ge=2, le=2**16)]
Point = tuple[Kept, Levels, Share]
"""Keep rate, levels, accuracy."""


class Surface(Struct, frozen=True):
    """A fitted surface.

    Attributes:
        model, data: whose accuracy, on what.
        reference: accuracy without compression.
        points: as measured.
        coefficients: in the order of POWERS.
        mse: mean of the squared differences between points and surface; accuracies are shares of 1.
        about: how it was measured, for people.
    """

    model: str
    data: str
    reference: Share
    points: tuple[Point, ...]
    coefficients: tuple[float, ...]
    mse: float
    about: dict[str, Any] = {}

    def accuracy(self, rho: npt.ArrayLike, levels: npt.ArrayLike) -> Reals:
        """A(rho, E), of arrays of one shape, or of shapes that numpy broadcasts."""
        x, y = np.asarray(rho, np.float64), np.log2(np.asarray(levels, np.float64))
        return np.asarray(_terms(x, y) @ np.array(self.coefficients))

    def cubic(self, levels: int) -> Reals:
        """Coefficients [4] of A(rho, levels) as a polynomial of rho, the constant first."""
        found = np.zeros(ORDER + 1)
        for (i, j), value in zip(POWERS, self.coefficients, strict=True):
            found[i] += value * np.log2(levels) ** j
        return found

    def residuals(self) -> Reals:
        """By how much the surface is above each of the points."""
        table = np.array(self.points, np.float64)
        return self.accuracy(table[:, 0], table[:, 1]) - table[:, 2]

    def measured(self, rho: float, levels: int) -> float | None:
        """The accuracy that was measured there; None where none was."""
        return next((point[2] for point in self.points if point[:2] == (rho, levels)), None)

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


class _Stored(Struct):
    """What is read of a file."""

    model: str
    data: str
    reference: Share
    points: tuple[Point, ...]
    about: dict[str, Any] = {}


def fit(
    points: Sequence[Point],
    reference: float,
    model: str,
    data: str,
    about: dict[str, Any] | None = None,
) -> Surface:
    """Fit a surface. Raises DataError where the points do not determine one."""
    coefficients, mse = _solve(points)
    own = tuple((float(rho), int(levels), float(accuracy)) for rho, levels, accuracy in points)
    return Surface(model, data, float(reference), own, coefficients, mse, about or {})


def read(data: bytes, name: str) -> Surface:
    """Read what `to_json` wrote. Raises DataError; `name` is what it calls the data."""
    try:
        stored = msgspec.json.decode(data, type=_Stored)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{name} is no accuracy surface",
            got=str(error),
            allowed="what scripts/measure_surface.py writes",
            remedy="measure it again",
        ) from error
    return fit(stored.points, stored.reference, stored.model, stored.data, stored.about)


def _solve(points: Sequence[Point]) -> tuple[tuple[float, ...], float]:
    table = np.array(points, np.float64).reshape(-1, 3)
    terms = _terms(table[:, 0], np.log2(table[:, 1]))
    if not len(table) or np.linalg.matrix_rank(terms) < len(POWERS):
        rates, levels = (len(set(table[:, column])) for column in (0, 1))
        raise DataError(
            "the points do not determine an accuracy surface",
            got=f"{len(table)} points with {rates} keep rates and {levels} numbers of levels",
            allowed=f"{len(POWERS)} or more, with at least {ORDER + 1} of each",
            remedy="measure more, such as every rate with every number of levels",
        )
    coefficients, *_ = np.linalg.lstsq(terms, table[:, 2])
    return tuple(map(float, coefficients)), float(
        np.mean((terms @ coefficients - table[:, 2]) ** 2)
    )


def _terms(x: Reals, y: Reals) -> Reals:
    """Powers [..., 10] of keep rates and bits."""
    return np.stack([x**i * y**j for i, j in POWERS], axis=-1)
