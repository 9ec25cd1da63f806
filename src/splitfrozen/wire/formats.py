"""Formats: how the numbers of an activation, float32 [T, D], are written, each behind one protocol.

Here are the protocol and the formats whose length follows from T and D alone. All bytes are
little-endian.

    format     layout                               bytes                 error at most
    float32    [T, D]                               4 T D                 0
    float16    [T, D]                               2 T D                 |x| 2^-11, or 2^-25
    bfloat16   [T, D]                               2 T D                 |x| 2^-8, or 2^-134
    int8       float32 scales [T], int8 [T, D]      4 T + T D             0.5 max|token| / 127
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from splitfrozen.errors import WireError
from splitfrozen.records import Floats
from splitfrozen.wire import entropy


class Format(Protocol):
    """Turns finite activations of a possible shape into bytes and back."""

    @property
    def lifted(self) -> str:
        """Codec for the lifted activation. The server keeps no less than 16 bits: lifting would
        add the error of fewer a second time."""
        ...

    def most_bytes(self, tokens: int, width: int) -> int:
        """Upper bound of `len(encode(hidden))` for float32 [tokens, width]."""
        ...

    def encode(self, hidden: Floats) -> bytes:
        """Finite float32 [T, D] -> bytes. Raises WireError on values that it cannot carry."""
        ...

    def decode(self, payload: bytes | memoryview, tokens: int, width: int) -> Floats:
        """At most `most_bytes` -> float32 [tokens, width], its own memory, perhaps not finite.

        Raises WireError on other bytes, before it takes memory for what they claim.
        """
        ...

    def bound(self, hidden: Floats) -> Floats:
        """float32 [T, D] -> largest error, broadcastable to [T, D]."""
        ...


class Sized(Protocol):
    """A format whose length follows from T and D; `Fixed` and `Compressed` make a `Format` of it.

    Attributes:
        itemsize: bytes of most elements, for the compressor.
    """

    @property
    def lifted(self) -> str: ...

    @property
    def itemsize(self) -> int: ...

    def size(self, tokens: int, width: int) -> int:
        """Length of the bytes."""
        ...

    def pack(self, hidden: Floats) -> bytes:
        """Finite float32 [T, D] -> bytes. Raises WireError on values that it cannot carry."""
        ...

    def unpack(self, raw: bytes | memoryview, tokens: int, width: int) -> Floats:
        """Bytes of the right length -> float32 [tokens, width], perhaps not finite."""
        ...

    def bound(self, hidden: Floats) -> Floats: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """A sized format as it is; a `Format`."""

    form: Sized

    @property
    def lifted(self) -> str:
        return self.form.lifted

    def most_bytes(self, tokens: int, width: int) -> int:
        return self.form.size(tokens, width)

    def encode(self, hidden: Floats) -> bytes:
        return self.form.pack(hidden)

    def decode(self, payload: bytes | memoryview, tokens: int, width: int) -> Floats:
        size = self.form.size(tokens, width)
        if len(payload) != size:
            raise WireError(
                "a payload has the wrong length",
                got=f"{len(payload)} bytes",
                allowed=f"{size} bytes for {tokens} tokens of width {width}",
                remedy="send the chunk again",
            )
        return self.form.unpack(payload, tokens, width)

    def bound(self, hidden: Floats) -> Floats:
        return self.form.bound(hidden)


@dataclass(frozen=True, slots=True)
class Compressed:
    """A sized format behind a lossless compression (`wire.entropy`); a `Format`."""

    form: Sized
    method: str

    @property
    def lifted(self) -> str:
        return self.form.lifted

    def most_bytes(self, tokens: int, width: int) -> int:
        return entropy.most_bytes(self.form.size(tokens, width))

    def encode(self, hidden: Floats) -> bytes:
        return entropy.compress(self.form.pack(hidden), self.form.itemsize, self.method)

    def decode(self, payload: bytes | memoryview, tokens: int, width: int) -> Floats:
        size = self.form.size(tokens, width)
        raw = entropy.decompress(payload, size, self.form.itemsize, self.method)
        return self.form.unpack(raw, tokens, width)

    def bound(self, hidden: Floats) -> Floats:
        return self.form.bound(hidden)


@dataclass(frozen=True, slots=True)
class Numbers:
    """One row of the table below; a `Sized`."""

    lifted: str
    itemsize: int
    size: Callable[[int, int], int]
    pack: Callable[[Floats], bytes]
    unpack: Callable[[bytes | memoryview, int, int], Floats]
    bound: Callable[[Floats], Floats]


def _pack_float32(hidden: Floats) -> bytes:
    return hidden.astype("<f4", copy=False).tobytes()


def _unpack_float32(raw: bytes | memoryview, tokens: int, width: int) -> Floats:
    return np.frombuffer(raw, "<f4").reshape(tokens, width).astype(np.float32)


def _bound_float32(hidden: Floats) -> Floats:
    return np.zeros((1, 1), hidden.dtype)


def _pack_float16(hidden: Floats) -> bytes:
    with np.errstate(over="ignore", under="ignore"):
        half = hidden.astype("<f2")
    _check_fits(hidden, bool(np.isfinite(half).all()), "float16", "65504", "bfloat16")
    return half.tobytes()


def _unpack_float16(raw: bytes | memoryview, tokens: int, width: int) -> Floats:
    return np.frombuffer(raw, "<f2").reshape(tokens, width).astype(np.float32)


def _bound_float16(hidden: Floats) -> Floats:
    # Half a unit in the last of 11 bits, or of the subnormals' 2^-24.
    return np.maximum(np.abs(hidden) * np.float32(2**-11), np.float32(2**-25))


def _pack_bfloat16(hidden: Floats) -> bytes:
    bits = np.ascontiguousarray(hidden).view(np.uint32)
    # Round to nearest, ties to even: the carry runs into the upper half where it should.
    upper = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    _check_fits(hidden, not ((upper & 0x7F80) == 0x7F80).any(), "bfloat16", "3.39e38", "float32")
    return upper.astype("<u2").tobytes()


def _unpack_bfloat16(raw: bytes | memoryview, tokens: int, width: int) -> Floats:
    bits = np.frombuffer(raw, "<u2").reshape(tokens, width).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _bound_bfloat16(hidden: Floats) -> Floats:
    # Half a unit in the last of 8 bits, or of the subnormals' 2^-133.
    return np.maximum(np.abs(hidden) * np.float32(2**-8), np.float32(2**-134))


_LEAST_SCALE = np.float32(2**-126)
"""Below it a float32 is subnormal and x / scale is no longer exact to 24 bits."""

_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
"""127 times it is finite."""


def _int8_scales(hidden: Floats) -> Floats:
    """float32 [T, 1]: the step of each token."""
    scales: Floats = np.clip(_largest(hidden) / np.float32(127), _LEAST_SCALE, _LARGEST_SCALE)
    return scales


def _largest(hidden: Floats) -> Floats:
    """float32 [T, 1]: the largest size of each token's values."""
    largest: Floats = np.abs(hidden).max(axis=1, keepdims=True)
    return largest


def _pack_int8(hidden: Floats) -> bytes:
    scales = _int8_scales(hidden)
    steps: npt.NDArray[np.int8] = np.rint(hidden / scales).astype(np.int8)
    return scales.astype("<f4", copy=False).tobytes() + steps.tobytes()


def _unpack_int8(raw: bytes | memoryview, tokens: int, width: int) -> Floats:
    scales = np.frombuffer(raw, "<f4", tokens).astype(np.float32).reshape(tokens, 1)
    hidden = np.frombuffer(raw, np.int8, offset=4 * tokens).astype(np.float32)
    hidden = hidden.reshape(tokens, width)
    hidden *= scales
    return hidden


def _bound_int8(hidden: Floats) -> Floats:
    # Half a step, and 1e-4 of one for what the division and the product round off (2 x 127 x 2^-24
    # steps at most). A token below half a step decodes to zeros, so its error is its size.
    half = _int8_scales(hidden) * np.float32(0.5001)
    bound: Floats = np.minimum(half, _largest(hidden))
    return bound


def _check_fits(hidden: Floats, fits: bool, name: str, largest: str, wider: str) -> None:
    if not fits:
        raise WireError(
            f"an activation is too large for {name}",
            got=f"a value of {np.abs(hidden).max():.6g}",
            allowed=f"at most {largest}",
            remedy=f'set wire.codec = "{wider}"',
        )


NUMBERS = {
    "float32": Numbers(
        lifted="float32",
        itemsize=4,
        size=lambda tokens, width: 4 * tokens * width,
        pack=_pack_float32,
        unpack=_unpack_float32,
        bound=_bound_float32,
    ),
    "float16": Numbers(
        lifted="float16",
        itemsize=2,
        size=lambda tokens, width: 2 * tokens * width,
        pack=_pack_float16,
        unpack=_unpack_float16,
        bound=_bound_float16,
    ),
    "bfloat16": Numbers(
        lifted="bfloat16",
        itemsize=2,
        size=lambda tokens, width: 2 * tokens * width,
        pack=_pack_bfloat16,
        unpack=_unpack_bfloat16,
        bound=_bound_bfloat16,
    ),
    "int8": Numbers(
        lifted="float16",
        itemsize=1,
        size=lambda tokens, width: 4 * tokens + tokens * width,
        pack=_pack_int8,
        unpack=_unpack_int8,
        bound=_bound_int8,
    ),
}
"""The formats without parameters, by name."""
