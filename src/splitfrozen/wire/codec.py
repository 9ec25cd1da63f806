"""Codecs: one sample's activation, float32 [T, D], to bytes and back within a declared error.

A codec's name is a format, alone or with a compression: "float16", "int8+zstd". A new format is one
row of the table; names, compression, checks and the contract tests follow from it. All bytes are
little-endian, and the same activation gives the same bytes.

    format     layout                               bytes                 error at most
    float32    [T, D]                               4 T D                 0
    float16    [T, D]                               2 T D                 |x| 2^-11, or 2^-25
    bfloat16   [T, D]                               2 T D                 |x| 2^-8, or 2^-134
    int8       float32 scales [T], int8 [T, D]      4 T + T D             0.5 max|token| / 127

A length, a number or a compressed stream that is not what it should be is a WireError, found
before memory is taken for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitfrozen.errors import WireError
from splitfrozen.records import Floats
from splitfrozen.wire import entropy

MAX_HIDDEN_BYTES = 64 * 1024 * 1024
"""Largest activation of one sample, as float32."""


@dataclass(frozen=True, slots=True)
class _Format:
    """One row of the table.

    Attributes:
        lifted: codec for the lifted activation. The server keeps no less than 16 bits: lifting
            would add int8's error a second time.
        itemsize: bytes of most elements, for the compressor.
        size: (T, D) -> length of the bytes.
        encode: finite float32 [T, D] -> bytes.
        decode: bytes of the right length, T, D -> float32 [T, D], perhaps not finite.
        bound: float32 [T, D] -> largest error, broadcastable to [T, D].
    """

    lifted: str
    itemsize: int
    size: Callable[[int, int], int]
    encode: Callable[[Floats], bytes]
    decode: Callable[[bytes | memoryview, int, int], Floats]
    bound: Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True)
class TensorCodec:
    """A format with or without a compression; implements `records.Codec`."""

    name: str
    format: _Format
    compression: str | None

    @property
    def lifted(self) -> str:
        return self.format.lifted

    def most_bytes(self, tokens: int, width: int) -> int:
        """Upper bound of `len(encode(hidden))` for float32 [tokens, width]."""
        size = self.format.size(tokens, width)
        return size if self.compression is None else entropy.most_bytes(size)

    def encode(self, hidden: Floats) -> bytes:
        """float32 [T, D] -> bytes. Raises WireError on values that it cannot carry."""
        assert hidden.dtype == np.float32
        assert hidden.ndim == 2
        _check_shape(*hidden.shape)
        _check_finite(hidden, "an activation", "look at the model's weights and the input")
        raw = self.format.encode(hidden)
        if self.compression is None:
            return raw
        return entropy.compress(raw, self.format.itemsize, self.compression)

    def decode(self, payload: bytes | memoryview, tokens: int, width: int) -> Floats:
        """bytes -> float32 [tokens, width], writable and its own memory. Raises WireError."""
        _check_shape(tokens, width)
        size = self.format.size(tokens, width)
        if self.compression is not None:
            payload = entropy.decompress(payload, size, self.format.itemsize, self.compression)
        if len(payload) != size:
            raise WireError(
                f"a payload of {self.name} has the wrong length",
                got=f"{len(payload)} bytes",
                allowed=f"{size} bytes for {tokens} tokens of width {width}",
                remedy="send the chunk again",
            )
        with np.errstate(all="ignore"):
            hidden = self.format.decode(payload, tokens, width)
        _check_finite(hidden, "a decoded activation", "leave that device out")
        return hidden

    def error_bound(self, hidden: Floats) -> Floats:
        """Largest |decode(encode(hidden)) - hidden|: float32, broadcastable to [T, D]."""
        return self.format.bound(hidden)


def codec(name: str) -> TensorCodec:
    """Return the codec of that name. Raises WireError."""
    found = _TABLE.get(name)
    if found is None:
        near = difflib.get_close_matches(name, CODECS, n=1)
        raise WireError(
            "there is no such codec",
            got=repr(name),
            allowed=", ".join(CODECS),
            remedy=f"did you mean {near[0]}?" if near else "choose one of these",
        )
    return found


def _check_shape(tokens: int, width: int) -> None:
    if tokens < 1 or width < 1 or tokens * width * 4 > MAX_HIDDEN_BYTES:
        raise WireError(
            "an activation has an impossible size",
            got=f"{tokens} tokens of width {width}",
            allowed=f"1 token or more, {MAX_HIDDEN_BYTES} bytes at most as float32",
            remedy="lower task.max_tokens",
        )


def _check_finite(hidden: Floats, what: str, remedy: str) -> None:
    finite = np.isfinite(hidden)
    if not finite.all():
        raise WireError(
            f"{what} is not finite",
            got=f"{hidden.size - np.count_nonzero(finite)} such values of {hidden.size}",
            allowed="finite numbers",
            remedy=remedy,
        )


# --- formats -------------------------------------------------------------------------------------


def _encode_float32(hidden: Floats) -> bytes:
    return hidden.astype("<f4", copy=False).tobytes()


def _decode_float32(raw: bytes | memoryview, tokens: int, width: int) -> Floats:
    return np.frombuffer(raw, "<f4").reshape(tokens, width).astype(np.float32)


def _bound_float32(hidden: Floats) -> Floats:
    return np.zeros((1, 1), hidden.dtype)


def _encode_float16(hidden: Floats) -> bytes:
    with np.errstate(over="ignore", under="ignore"):
        half = hidden.astype("<f2")
    _check_fits(hidden, bool(np.isfinite(half).all()), "float16", "65504", "bfloat16")
    return half.tobytes()


def _decode_float16(raw: bytes | memoryview, tokens: int, width: int) -> Floats:
    return np.frombuffer(raw, "<f2").reshape(tokens, width).astype(np.float32)


def _bound_float16(hidden: Floats) -> Floats:
    # Half a unit in the last of 11 bits, or of the subnormals' 2^-24.
    return np.maximum(np.abs(hidden) * np.float32(2**-11), np.float32(2**-25))


def _encode_bfloat16(hidden: Floats) -> bytes:
    bits = np.ascontiguousarray(hidden).view(np.uint32)
    # Round to nearest, ties to even: the carry runs into the upper half where it should.
    upper = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    _check_fits(hidden, not ((upper & 0x7F80) == 0x7F80).any(), "bfloat16", "3.39e38", "float32")
    return upper.astype("<u2").tobytes()


def _decode_bfloat16(raw: bytes | memoryview, tokens: int, width: int) -> Floats:
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


def _encode_int8(hidden: Floats) -> bytes:
    scales = _int8_scales(hidden)
    steps: npt.NDArray[np.int8] = np.rint(hidden / scales).astype(np.int8)
    return scales.astype("<f4", copy=False).tobytes() + steps.tobytes()


def _decode_int8(raw: bytes | memoryview, tokens: int, width: int) -> Floats:
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


_FORMATS = {
    "float32": _Format(
        lifted="float32",
        itemsize=4,
        size=lambda tokens, width: 4 * tokens * width,
        encode=_encode_float32,
        decode=_decode_float32,
        bound=_bound_float32,
    ),
    "float16": _Format(
        lifted="float16",
        itemsize=2,
        size=lambda tokens, width: 2 * tokens * width,
        encode=_encode_float16,
        decode=_decode_float16,
        bound=_bound_float16,
    ),
    "bfloat16": _Format(
        lifted="bfloat16",
        itemsize=2,
        size=lambda tokens, width: 2 * tokens * width,
        encode=_encode_bfloat16,
        decode=_decode_bfloat16,
        bound=_bound_bfloat16,
    ),
    "int8": _Format(
        lifted="float16",
        itemsize=1,
        size=lambda tokens, width: 4 * tokens + tokens * width,
        encode=_encode_int8,
        decode=_decode_int8,
        bound=_bound_int8,
    ),
}

_TABLE = {
    name: TensorCodec(name, form, compression)
    for base, form in _FORMATS.items()
    for name, compression in [
        (base, None),
        *((f"{base}+{method}", method) for method in entropy.METHODS),
    ]
}

CODECS = tuple(_TABLE)
"""All names: every format alone and with every compression."""
