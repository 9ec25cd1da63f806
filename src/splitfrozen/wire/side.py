"""Side data of `ecsq`: what is fitted once on public text and known to both sides.

Coefficients are activations in another basis: `hidden @ basis / unit`, float32 [T, D]. There the
nearest of K centres is subtracted: a token's activation is much like those of its kind elsewhere.
The basis is the Karhunen-Loeve basis of what is left, so its channels are uncorrelated, and of
known spread. `unit` makes the mean square of an activation's coefficients about their mean 1.

    4 bytes     magic "SFSD"
    uint32 x 2  D, K
    float32     unit
    float16     basis [D, D], row by row; centres [K, D]
    int8        spreads [D]

All little-endian. They hold means, directions and scales of public text, and nothing of a device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from splitfrozen import rng
from splitfrozen.errors import WireError
from splitfrozen.records import Floats

MAGIC = b"SFSD"
MAX_WIDTH = 65536
MAX_CENTRES = 65536

CENTRES = 1024
"""K, where there are tokens enough: 4096 take 10 % off the bytes, and four times the work."""

_TOKENS_PER_CENTRE = 16
"""Fewer would be learned by heart."""
_FIT_BYTES = 512 * 1024 * 1024
_CLUSTER_TOKENS = 65536
_ROUNDS = 8
_HEAD = 16

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Side:
    """Basis, centres and spreads.

    Attributes:
        basis: float32 [D, D], orthonormal columns but for the rounding to 16 bits.
        unit: above 0.
        centres: float32 [K, D], in coefficients.
        spreads: int8 [D]: 2^(spread / 2) is the standard deviation of a coefficient about its
            centre.
    """

    basis: Floats
    unit: np.float32
    centres: Floats
    spreads: npt.NDArray[np.int8]

    @classmethod
    def fit(cls, activations: Iterable[Floats], centres: int = CENTRES) -> Side:
        """Fit on activations, float32 [T, D] each, of text that is nobody's secret.

        Args:
            activations: one or more; the first 512 MiB are used.
            centres: K at most; fewer where there are fewer than 16 tokens for each.

        Raises WireError where they are not finite.
        """
        hidden = _first(activations)
        if not np.isfinite(hidden).all():
            raise WireError(
                "side data cannot be fitted to activations that are not finite",
                got="NaN or infinity",
                allowed="finite numbers",
                remedy="look at the model's weights and the public rows",
            )
        mean = hidden.mean(axis=0, dtype=np.float64)
        centred = hidden - mean.astype(np.float32)
        found = _cluster(centred, max(1, min(centres, len(centred) // _TOKENS_PER_CENTRE)))
        left = centred - found[nearest(centred, found)]
        variances, basis = np.linalg.eigh(left.T.astype(np.float64) @ left / len(left))
        variances, basis = variances[::-1], basis[:, ::-1]
        unit = np.float32(np.sqrt(np.mean(np.square(centred, dtype=np.float64))) or 1)
        # Half octaves of the deviation are octaves of the variance.
        spreads = np.log2(np.maximum(variances, 2.0**-120) / float(unit) ** 2)
        return cls(
            basis=_halved(basis),
            unit=unit,
            centres=_halved((mean + found) @ basis / unit),
            spreads=np.rint(np.clip(spreads, -126, 126)).astype(np.int8),
        )

    def forward(self, hidden: Floats) -> Floats:
        """Activations, float32 [T, D], to coefficients."""
        coefficients: Floats = hidden @ self.basis
        coefficients /= self.unit
        return coefficients

    def backward(self, coefficients: Floats) -> Floats:
        """Coefficients, float32 [T, D], to activations."""
        hidden: Floats = coefficients @ self.basis.T
        hidden *= self.unit
        return hidden

    @property
    def width(self) -> int:
        return len(self.basis)

    @cached_property
    def sha256(self) -> str:
        """Of `to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        head = MAGIC + np.array([self.width, len(self.centres)], "<u4").tobytes()
        halves = (array.astype("<f2").tobytes() for array in (self.basis, self.centres))
        unit = np.array([self.unit], "<f4").tobytes()
        return b"".join([head, unit, *halves, self.spreads.tobytes()])

    @classmethod
    def from_bytes(cls, data: bytes) -> Side:
        """Read back what `to_bytes` wrote. Raises WireError."""
        if len(data) < _HEAD or data[:4] != MAGIC:
            raise _wrong(f"{bytes(data[:_HEAD])!r}", f"{MAGIC!r} and three numbers")
        width, count = (int(number) for number in np.frombuffer(data, "<u4", 2, 4))
        unit = np.frombuffer(data, "<f4", 1, 12).astype(np.float32)[0]
        if not (1 <= width <= MAX_WIDTH and 1 <= count <= MAX_CENTRES):
            raise _wrong(f"D = {width}, K = {count}", f"1..{MAX_WIDTH} and 1..{MAX_CENTRES}")
        expected = _HEAD + 2 * (width + count) * width + width
        if len(data) != expected:
            raise _wrong(f"{len(data)} bytes", f"{expected} for D = {width}, K = {count}")
        halves = np.frombuffer(data, "<f2", (width + count) * width, _HEAD).astype(np.float32)
        if not (np.isfinite(halves).all() and 0 < unit < np.inf):
            raise _wrong("numbers that are not finite, or no unit", "finite numbers")
        rows = halves.reshape(width + count, width)
        spreads = np.frombuffer(data, np.int8, width, len(data) - width)
        return cls(rows[:width], unit, rows[width:], spreads)


def nearest(rows: Floats, centres: Floats) -> npt.NDArray[np.int64]:
    """int64 [T]: which of `centres` [K, D] is nearest to each of `rows` [T, D]."""
    half = np.square(centres).sum(axis=1) / np.float32(2)
    parts = np.array_split(rows, len(rows) // 4096 + 1)
    return np.concatenate([(half - part @ centres.T).argmin(axis=1) for part in parts])


def _first(activations: Iterable[Floats]) -> Floats:
    parts: list[Floats] = []
    taken = 0
    for hidden in activations:
        parts.append(hidden)
        taken += hidden.nbytes
        if taken >= _FIT_BYTES:
            break
    return np.concatenate(parts)


def _cluster(rows: Floats, count: int) -> Floats:
    """Lloyd's algorithm from rows drawn at random: float32 [count, D]."""
    draw = rng.stream(0, "centres")
    rows = rows[draw.permutation(len(rows))[:_CLUSTER_TOKENS]]
    centres = rows[:count].copy()
    for _ in range(_ROUNDS if count > 1 else 0):
        chosen = nearest(rows, centres)
        order = np.argsort(chosen, kind="stable")
        used, starts = np.unique(chosen[order], return_index=True)
        sizes = np.diff(starts, append=len(rows))
        centres[used] = np.add.reduceat(rows[order], starts) / sizes[:, None]
    return centres if count > 1 else np.zeros_like(centres)


def _halved(values: Doubles) -> Floats:
    """As it is read back."""
    limit = float(np.finfo(np.float16).max)
    return np.clip(values, -limit, limit).astype(np.float16).astype(np.float32)


def _wrong(got: str, allowed: str) -> WireError:
    return WireError(
        "side data are not what they should be",
        got=got,
        allowed=allowed,
        remedy="fetch them again",
    )
