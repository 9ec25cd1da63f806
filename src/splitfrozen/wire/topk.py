"""Top-K with stochastic quantisation and lossless coding (SFT, section IV-B): `topk:RATE:LEVELS`.

The largest values are kept, by size: RATE of all of the activation, or with `:token` of each token.
Sizes are rounded at random to one of LEVELS values in equal steps from the least kept size to the
greatest, so that the expectation of what is decoded is what was kept; all others become 0. The
paper's levels lack the least size, below whose first level nothing could be rounded without bias.

    float32 x 2   least and greatest kept size
    mask          what is kept: one group of T x D
    level         bit by bit from the highest, as masks in groups of equal higher bits
    bits          signs of what is kept, in order: 1 for below 0

What is rounded how follows from the values themselves: the same activation gives the same bytes,
any other an independent rounding.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitfrozen import rng
from splitfrozen.errors import WireError
from splitfrozen.records import Floats
from splitfrozen.wire.bits import BitReader, BitWriter, Bools, Numbers, most_bits

LEVELS = 256
"""Most levels."""

_ENDS = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class TopK:
    """The format; implements `formats.Format`.

    Attributes:
        rate: share of values that are kept, above 0 and at most 1; one value at least.
        levels: 2 to LEVELS.
        per_token: whether each token keeps its share.
    """

    rate: float
    levels: int
    per_token: bool

    @property
    def lifted(self) -> str:
        return "float16"

    @property
    def _level_bits(self) -> int:
        return (self.levels - 1).bit_length()

    def most_bytes(self, tokens: int, width: int) -> int:
        """Upper bound of `len(encode(hidden))` for float32 [tokens, width]."""
        kept = self._kept(tokens, width)
        bits = most_bits(tokens * width, 1) + kept
        bits += sum(most_bits(kept, min(2**place, kept)) for place in range(self._level_bits))
        return 2 * _ENDS.itemsize + bits // 8 + 1

    def encode(self, hidden: Floats) -> bytes:
        """Finite float32 [T, D] -> bytes."""
        flat = np.ascontiguousarray(hidden).ravel()
        mask = self._largest(hidden).ravel()
        kept = flat[mask]
        levels, least, greatest = self._round(np.abs(kept), _chance(flat, len(kept)))
        bits = BitWriter()
        bits.masks(mask, np.array([len(flat)]))
        for place in reversed(range(self._level_bits)):
            order, groups = _by_prefix(levels >> (place + 1))
            bits.masks((levels[order] >> place & 1).astype(np.bool_), groups)
        bits.bits(np.signbit(kept))
        return np.array([least, greatest], _ENDS).tobytes() + bits.to_bytes()

    def decode(self, payload: bytes | memoryview, tokens: int, width: int) -> Floats:
        """bytes -> float32 [tokens, width]. Raises WireError."""
        least, greatest = self._ends(payload)
        bits = BitReader(memoryview(payload)[2 * _ENDS.itemsize :])
        mask = bits.masks(np.array([tokens * width]))
        count = int(np.count_nonzero(mask))
        if count != self._kept(tokens, width):
            raise _wrong(f"{count} kept values", f"{self._kept(tokens, width)}")
        levels = np.zeros(count, np.int64)
        for _ in range(self._level_bits):
            order, groups = _by_prefix(levels)
            levels *= 2
            levels[order] += bits.masks(groups)
        if (levels >= self.levels).any():
            raise _wrong(f"level {levels.max()}", f"0..{self.levels - 1}")
        sizes = least + levels.astype(np.float32) * self._step(least, greatest)
        sizes = np.minimum(sizes, greatest)  # Rounding might have led beyond the largest float32.
        hidden = np.zeros(tokens * width, np.float32)
        hidden[mask] = np.where(bits.bits(count), -sizes, sizes)
        bits.end()
        return hidden.reshape(tokens, width)

    def bound(self, hidden: Floats) -> Floats:
        """Largest error, float32 [T, D]: a value that is not kept, or one step."""
        mask = self._largest(hidden)
        sizes = np.abs(hidden)
        least, greatest = sizes[mask].min(), sizes[mask].max()
        # What levels and their distance are off by rounding, subnormal ones too.
        step = self._step(least, greatest) + greatest * np.float32(2**-22)
        step += np.float32(self.levels * 2.0**-149)
        bound: Floats = np.where(mask, step, sizes)
        return bound

    def _kept(self, tokens: int, width: int) -> int:
        if self.per_token:
            return tokens * max(1, round(self.rate * width))
        return max(1, round(self.rate * tokens * width))

    def _largest(self, hidden: Floats) -> Bools:
        """bool [T, D]: what is kept; of values of one size the first."""
        rows = np.abs(hidden if self.per_token else hidden.reshape(1, -1))
        count = self._kept(*hidden.shape) // len(rows)
        place = rows.shape[1] - count
        threshold = np.partition(rows, place, axis=1)[:, place, None]
        mask: Bools = rows > threshold
        equal = rows == threshold
        missing = count - np.count_nonzero(mask, axis=1, keepdims=True)
        if (np.count_nonzero(equal, axis=1, keepdims=True) > missing).any():
            equal &= np.cumsum(equal, axis=1) <= missing
        mask |= equal
        return mask.reshape(hidden.shape)

    def _round(self, sizes: Floats, chance: Floats) -> tuple[Numbers, np.float32, np.float32]:
        """Levels of the kept sizes, and their least and greatest."""
        least, greatest = np.float32(sizes.min()), np.float32(sizes.max())
        step = self._step(least, greatest)
        if step == 0:
            return np.zeros(len(sizes), np.int64), least, greatest
        # s in [Q_e, Q_e+1] becomes Q_e+1 with probability (s - Q_e) / step, else Q_e.
        levels = np.floor((sizes - least) / step + chance).astype(np.int64)
        return np.minimum(levels, self.levels - 1), least, greatest

    def _step(self, least: np.float32, greatest: np.float32) -> np.float32:
        return np.float32((greatest - least) / np.float32(self.levels - 1))

    def _ends(self, payload: bytes | memoryview) -> tuple[np.float32, np.float32]:
        if len(payload) < 2 * _ENDS.itemsize:
            raise _wrong(f"{len(payload)} bytes", f"{2 * _ENDS.itemsize} or more")
        least, greatest = np.frombuffer(payload, _ENDS, 2)
        if not 0 <= least <= greatest < math.inf:
            raise _wrong(f"sizes from {least} to {greatest}", "0 <= least <= greatest")
        return least, greatest


def _chance(flat: Floats, count: int) -> Floats:
    """float32 [count] in [0, 1), the same for the same values."""
    content = zlib.crc32(flat.astype("<f4", copy=False).data)
    return rng.stream(0, "topk", content).random(count, np.float32)


def _by_prefix(prefix: Numbers) -> tuple[npt.NDArray[np.intp], Numbers]:
    """The order that puts equal prefixes together, ascending, and the sizes of these groups."""
    # Stable sorting of 8-bit numbers takes time in proportion to their count.
    small = prefix.astype(np.uint8)
    sizes = np.bincount(small)
    return np.argsort(small, kind="stable"), sizes[sizes > 0]


def _wrong(got: str, allowed: str) -> WireError:
    return WireError(
        "a payload of topk is not what it should be",
        got=got,
        allowed=allowed,
        remedy="send the chunk again",
    )
