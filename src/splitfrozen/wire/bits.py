"""Numbers and masks as single bits, most significant first, written and read in whole arrays.

A payload of `topk` or `ecsq` is one string of bits, filled up with zeros to a byte. It is made of

    fields   numbers of known widths
    runs     numbers in unary: n zeros and a one
    masks    booleans in groups, each group with its own share of ones: Golomb-Rice runs

A group of n booleans begins with the number of its ones, a field of the width that n needs. Where
more than half are ones the zeros are coded instead. A run, r zeros before a one, is split: r >> k
in unary, the k lower bits as a field. The count gives k, so nothing has to be known of a group
before but its length; zeros behind the last one are not written. All counts come first, then all
fields, then all unary numbers: arrays are read at once, without a loop over the ones.

Measured against the entropy of independent booleans, counts not included: at most 5 % more, with
ones in 38 of 100, and 1 to 3 % elsewhere. k = 0 writes the booleans as they are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from splitfrozen.errors import WireError

Bits = npt.NDArray[np.uint8]
"""uint8 [any], each 0 or 1."""
Bools = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

WIDEST = 25
"""Bits of a field at most: a count of the values of the largest activation takes so many."""

_SHARES = np.array(
    [25032, 14014, 7428, 3825, 1941, 978, 490, 245, 123, 61, 31, 15, 8, 4, 2, 1], np.int64
)
"""Below _SHARES[k] / 65536 ones, 2^(k+1) is a better divisor than 2^k: 1 - 0.618^(2^-k)."""


class BitWriter:
    """Collects bits."""

    def __init__(self) -> None:
        self._parts: list[Bits] = []

    def bits(self, values: Bools) -> None:
        """One bit each."""
        self._parts.append(values.view(np.uint8))

    def fields(self, values: Numbers, widths: Numbers) -> None:
        """Each value, int64 [n], in as many bits as `widths`, int64 [n], says; 0 bits for none."""
        ends = np.cumsum(widths)
        total = int(ends[-1]) if len(ends) else 0
        # Bit j of the string is bit ends[i] - 1 - j of the value i that it belongs to.
        shifts = np.repeat(ends, widths) - np.arange(1, total + 1)
        self._parts.append(((np.repeat(values, widths) >> shifts) & 1).astype(np.uint8))

    def runs(self, values: Numbers) -> None:
        """Each value, int64 [n], as so many zeros and a one."""
        ends = np.cumsum(values + 1)
        bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
        bits[ends - 1] = 1
        self._parts.append(bits)

    def masks(self, mask: Bools, sizes: Numbers) -> None:
        """Booleans [sum(sizes)] in groups of int64 [groups] `sizes`, each 1 or more."""
        starts = np.cumsum(sizes) - sizes
        counts = np.add.reduceat(mask, starts, dtype=np.int64) if len(sizes) else sizes
        self.fields(counts, _widths(sizes))
        rarer, flip, divisors = _code(counts, sizes)
        positions = np.flatnonzero(mask ^ np.repeat(flip, sizes) if flip.any() else mask)
        runs = np.diff(positions, prepend=-1) - 1
        # The first run of a group counts from the group's start.
        firsts = (np.cumsum(rarer) - rarer)[rarer > 0]
        runs[firsts] = positions[firsts] - starts[rarer > 0]
        widths = np.repeat(divisors, rarer)
        self.fields(runs & ((1 << widths) - 1), widths)
        self.runs(runs >> widths)

    def to_bytes(self) -> bytes:
        """Everything written, filled up to a byte."""
        return np.packbits(np.concatenate(self._parts)).tobytes() if self._parts else b""


class BitReader:
    """Reads what a `BitWriter` wrote, in the same order.

    Every method raises WireError where the bits end before what they should hold, and takes no
    memory for more than what they can hold. The reader itself takes nine times the payload.
    """

    def __init__(self, payload: bytes | memoryview) -> None:
        data = np.frombuffer(payload, np.uint8)
        self._bits: Bools = np.unpackbits(data).view(np.bool_)
        self._at = 0
        # The 32 bits that begin at each byte: a field of up to WIDEST bits is within one of them.
        padded = np.concatenate([data, np.zeros(4, np.uint8)])
        self._words: npt.NDArray[np.uint32] = np.ndarray(
            (len(data) + 1,), ">u4", padded, strides=(1,)
        )

    def bits(self, count: int) -> Bools:
        return self._take(count)

    def fields(self, widths: Numbers) -> Numbers:
        assert widths.max(initial=0) <= WIDEST
        begin = self._at
        ends = begin + np.cumsum(widths)
        self._take(int(ends[-1]) - begin if len(ends) else 0)
        starts = ends - widths
        words = self._words[starts >> 3].astype(np.int64)
        values: Numbers = (words >> (32 - (starts & 7) - widths)) & ((1 << widths) - 1)
        return values

    def runs(self, count: int, most: int) -> Numbers:
        """So many, which take `most` bits at most."""
        ends = np.flatnonzero(self._bits[self._at : self._at + most])[:count]
        if len(ends) < count:
            raise _wrong(f"no more than {len(ends)} runs", f"{count} runs")
        self._at += int(ends[-1]) + 1 if count else 0
        values: Numbers = np.diff(ends, prepend=-1) - 1
        return values

    def masks(self, sizes: Numbers) -> Bools:
        counts = self.fields(_widths(sizes))
        if (counts > sizes).any():
            raise _wrong(f"{counts.max()} ones in a group", "no more than its length")
        rarer, flip, divisors = _code(counts, sizes)
        self._expect(int((rarer * (divisors + 1)).sum()))
        widths = np.repeat(divisors, rarer)
        runs = self.fields(widths)
        most = ((sizes - rarer) >> divisors) + rarer
        runs |= self.runs(len(widths), int(most.sum())) << widths
        ends = np.cumsum(sizes)
        # Positions in all groups: the sum of runs and ones before, less those of other groups.
        positions = np.cumsum(runs + 1) - 1
        before = np.append(0, positions + 1)[np.cumsum(rarer) - rarer]
        positions += np.repeat(ends - sizes - before, rarer)
        if (positions >= np.repeat(ends, rarer)).any():
            raise _wrong("a run that leaves its group", "runs within their groups")
        mask = np.repeat(flip, sizes)
        mask[positions] ^= True
        return mask

    def end(self) -> None:
        """Raises WireError where more is left than what fills the last byte."""
        rest = self._bits[self._at :]
        if len(rest) > 7 or rest.any():
            raise _wrong(f"{len(rest)} bits behind the last number", "zeros to the next byte")

    def _expect(self, count: int) -> None:
        left = len(self._bits) - self._at
        if count > left:
            raise _wrong(f"{left} bits", f"{count} or more at this place")

    def _take(self, count: int) -> Bools:
        self._expect(count)
        self._at += count
        return self._bits[self._at - count : self._at]


def most_bits(total: int, groups: int) -> int:
    """Upper bound of what `masks` writes for `total` booleans in that many groups or fewer."""
    # k = 0 writes n bits at most. Others write 1 + k for a one and at most 2^-k for a zero, which
    # is most for k = 1, where 0.382 n are ones: 2 x 0.382 n + 0.5 x 0.618 n = 1.073 n. A count
    # takes 1 + log2 n bits at most: together most where groups are equal.
    return total + total * 3 // 40 + 1 + groups * (1 + (-(-total // groups)).bit_length())


def _widths(sizes: Numbers) -> Numbers:
    """Bits that a number up to `size` needs, for sizes below 2^53."""
    exponents: Numbers = np.frexp(sizes.astype(np.float64))[1].astype(np.int64)
    return exponents


def _code(counts: Numbers, sizes: Numbers) -> tuple[Numbers, Bools, Numbers]:
    """How groups with so many ones are coded: numbers of runs, whether zeros are coded, and k."""
    flip = counts > sizes - counts
    rarer = np.where(flip, sizes - counts, counts)
    divisors = ((rarer << 16)[:, None] < sizes[:, None] * _SHARES).sum(axis=1, dtype=np.int64)
    return rarer, flip, divisors


def _wrong(got: str, allowed: str) -> WireError:
    return WireError(
        "a payload holds other bits than it should",
        got=got,
        allowed=allowed,
        remedy="send the chunk again",
    )
