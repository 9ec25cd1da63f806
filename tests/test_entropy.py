import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfrozen.errors import WireError
from splitfrozen.rng import stream
from splitfrozen.wire import entropy

MIB = 1024 * 1024


@pytest.mark.parametrize("method", entropy.METHODS)
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@settings(max_examples=60, deadline=None)
@given(elements=st.binary(min_size=1, max_size=400))
def test_round_trip(method: str, itemsize: int, elements: bytes):
    raw = elements * itemsize
    packed = entropy.compress(raw, itemsize, method)
    assert entropy.decompress(packed, len(raw), itemsize, method) == raw
    assert len(packed) <= entropy.most_bytes(len(raw))
    assert entropy.compress(raw, itemsize, method) == packed


@pytest.mark.parametrize("method", entropy.METHODS)
@pytest.mark.parametrize("size", [1, 16_384, 131_072, 1_000_000])
def test_noise_grows_by_no_more_than_promised(method: str, size: int):
    raw = stream(0, "noise").bytes(size)
    packed = entropy.compress(raw, 1, method)
    assert size < len(packed) <= entropy.most_bytes(size)


@pytest.mark.parametrize("method", entropy.METHODS)
@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_planes_compress_better_than_the_plain_bytes(method: str, dtype: str):
    raw = stream(0, "hidden").normal(size=20_000).astype(dtype).tobytes()
    itemsize = np.dtype(dtype).itemsize
    plain = zlib.compress(raw, 9) if method == "zlib" else zstandard.compress(raw, 9)
    assert len(entropy.compress(raw, itemsize, method)) < 0.97 * len(plain)


def _zstd_that_lies() -> bytes:
    """1 KiB of content under a header that claims 2^40 bytes."""
    frame = bytearray(zstandard.ZstdCompressor().compress(b"\0" * 1024))
    header = bytes([0xE0]) + (2**40).to_bytes(8, "little")
    return bytes(frame[:4]) + header + bytes(frame[7:])


def _zstd_of_unknown_size() -> bytes:
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(b"\0" * (64 * MIB)) + stream.flush()


def _zstd_wide_window() -> bytes:
    """A frame whose decoder would want a window of 2 GiB."""
    return b"\x28\xb5\x2f\xfd" + bytes([0x80, 21 << 3]) + (1024).to_bytes(4, "little") + b"\1\0\0"


@pytest.mark.parametrize(
    ("method", "payload"),
    [
        ("zstd", zstandard.compress(b"\0" * (256 * MIB))),
        ("zstd", _zstd_that_lies()),
        ("zstd", _zstd_of_unknown_size()),
        ("zstd", _zstd_wide_window()),
        ("zstd", zstandard.compress(b"\0" * 1024) * 2),
        ("zstd", zstandard.compress(b"\0" * 1024) + b"x"),
        ("zstd", zstandard.compress(b"\0" * 1024)[:-1]),
        ("zstd", b"\x50\x2a\x4d\x18\0\0\0\0"),  # a skippable frame
        ("zstd", b""),
        ("zstd", b"not zstd at all"),
        ("zlib", zlib.compress(b"\0" * (64 * MIB), 9)),
        ("zlib", zlib.compress(b"\0" * 1025)),
        ("zlib", zlib.compress(b"\0" * 1023)),
        ("zlib", zlib.compress(b"\0" * 1024) * 2),
        ("zlib", zlib.compress(b"\0" * 1024) + b"x"),
        ("zlib", zlib.compress(b"\0" * 1024)[:-1]),
        ("zlib", b""),
        ("zlib", b"not zlib at all"),
    ],
)
def test_bombs_and_lies_are_refused_without_taking_memory(method: str, payload: bytes):
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="exactly 1024 bytes"):
            entropy.decompress(payload, 1024, 2, method)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", entropy.METHODS)
def test_what_fits_is_read_from_other_encoders_too(method: str):
    raw = bytes(range(256)) * 4
    foreign = {"zlib": zlib.compress(raw, 9), "zstd": zstandard.compress(raw, 19)}
    assert entropy.decompress(foreign[method], 1024, 1, method) == raw
