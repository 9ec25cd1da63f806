import hashlib
import tracemalloc
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfrozen.errors import WireError
from splitfrozen.records import IGNORED, PROTOCOL, EncodedSample, FrameHeader
from splitfrozen.rng import stream
from splitfrozen.wire import frame
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, header_of, pack, unpack

GOLDEN = Path(__file__).parent / "golden" / "frame-v1.bin"
ORIGIN = Origin("run-1", "device-a", "ab" * 32, depth=3, width=4, codec="float32")


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def samples() -> list[EncodedSample]:
    """A labelled sample of 3 tokens and a causal one of 2, as float32 of width 4."""
    hidden = np.arange(20, dtype=np.float32).reshape(5, 4) / 8
    encode = codec("float32").encode
    return [
        EncodedSample(7, 3, ints(1), encode(hidden[:3])),
        EncodedSample(9, 2, ints(50256, IGNORED), encode(hidden[3:])),
    ]


def valid(**changes: object) -> bytes:
    """The frame of `samples()`, with fields of its header changed after the fact."""
    chunk = pack(ORIGIN, 5, samples()).frame
    size = int.from_bytes(chunk[4:8], "little")
    fields = msgspec.msgpack.decode(chunk[8 : 8 + size]) | changes
    return envelope(msgspec.msgpack.encode(fields), chunk[8 + size :])


def envelope(header: bytes, body: bytes = b"") -> bytes:
    return frame.MAGIC + len(header).to_bytes(4, "little") + header + body


def test_round_trip():
    chunk = pack(ORIGIN, 5, samples())
    header, back = unpack(chunk.frame)
    assert header == FrameHeader(
        protocol=PROTOCOL,
        run="run-1",
        device="device-a",
        index=5,
        front="ab" * 32,
        depth=3,
        width=4,
        codec="float32",
        samples=(7, 9),
        tokens=(3, 2),
        targets=(1, 2),
        payloads=(48, 32),
    )
    assert header == header_of(ORIGIN, 5, samples())
    assert len(back) == 2
    for ours, theirs in zip(samples(), back, strict=True):
        assert (ours.sample, ours.tokens) == (theirs.sample, theirs.tokens)
        assert theirs.targets.dtype == np.int32
        assert np.array_equal(ours.targets, theirs.targets)
        assert ours.payload == theirs.payload
        assert isinstance(theirs.payload, memoryview)
        assert theirs.payload.obj is chunk.frame
    assert np.array_equal(
        codec("float32").decode(back[1].payload, 2, 4)[0], [1.5, 1.625, 1.75, 1.875]
    )


def test_address_is_the_hash_of_the_bytes_and_the_same_every_time():
    first, again = pack(ORIGIN, 5, samples()), pack(ORIGIN, 5, samples())
    assert first == again
    assert first.index == 5
    assert first.sha256 == hashlib.sha256(first.frame).hexdigest()
    assert pack(ORIGIN, 6, samples()).sha256 != first.sha256


def test_golden_frame_of_version_1():
    """Frames of old devices stay readable: this file is never rewritten for protocol 1."""
    golden = GOLDEN.read_bytes()
    assert unpack(golden)[0].protocol == PROTOCOL == 1
    header, back = unpack(golden)
    assert (header.samples, header.tokens, header.index) == ((7, 9), (3, 2), 5)
    assert back[1].targets.tolist() == [50256, IGNORED]
    assert codec(header.codec).decode(back[0].payload, 3, 4)[2].tolist() == [1, 1.125, 1.25, 1.375]
    assert pack(ORIGIN, 5, samples()).frame == golden


def test_another_version_is_named_with_ours_even_if_its_header_is_unlike_ours():
    for header in (
        msgspec.msgpack.encode({"protocol": 2, "new": [1, {"field": None}]}),
        msgspec.msgpack.encode({"protocol": 2}),
    ):
        with pytest.raises(WireError, match=r"version 2; .*version 1"):
            unpack(envelope(header))
    with pytest.raises(WireError, match=r"version 0; .*version 1"):
        unpack(valid(protocol=0))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"samples": [7]}, "four lists of one length"),
        ({"tokens": [3, 2, 1]}, "four lists of one length"),
        ({"samples": [], "tokens": [], "targets": [], "payloads": []}, "got 0 samples"),
        ({"samples": [7, 7]}, "repeats a sample"),
        ({"samples": [7, 2**31]}, "2147483648"),
        ({"index": 2**64 - 1}, "18446744073709551615"),
        ({"depth": 2**31}, "2147483648"),
        ({"tokens": [2**60, 2]}, "too large a sample"),
        ({"tokens": [2**22, 2], "targets": [1, 1]}, "wrong length"),
        ({"tokens": [2**22 + 1, 2]}, "too large a sample"),
        ({"width": 65536, "tokens": [257, 2]}, "too large a sample"),
        ({"width": 65537}, "width"),
        ({"width": 0}, "width"),
        ({"width": -1}, "width"),
        ({"targets": [2, 2]}, "2 targets for 3 tokens"),
        ({"targets": [1, 1]}, "wrong length"),
        ({"payloads": [48, 33]}, "wrong length"),
        ({"payloads": [2**63, 2**63]}, "wrong length"),
        ({"payloads": [0, 80]}, "payloads"),
        ({"front": "AB" * 32}, "front"),
        ({"codec": "x" * 41}, "codec"),
        ({"run": 3}, "run"),
        ({"extra": 1}, "extra"),
    ],
)
def test_lies_in_the_header_are_refused(changes: dict[str, object], match: str):
    unpack(valid())
    with pytest.raises(WireError, match=match):
        unpack(valid(**changes))


def test_many_samples_of_the_largest_size_are_refused():
    many = list(range(33))
    lie = valid(samples=many, tokens=[2**22] * 33, targets=[1] * 33, payloads=[1] * 33)
    with pytest.raises(WireError, match=str(frame.MAX_DECODED_BYTES)):
        unpack(lie)


def test_too_many_samples_are_refused_on_both_sides():
    many = [EncodedSample(i, 1, ints(0), b"x") for i in range(frame.MAX_SAMPLES + 1)]
    unpack(pack(ORIGIN, 0, many[:-1]).frame)
    with pytest.raises(WireError, match=str(frame.MAX_SAMPLES)):
        pack(ORIGIN, 0, many)
    n = list(range(frame.MAX_SAMPLES + 1))
    ones = [1] * len(n)
    with pytest.raises(WireError, match=str(frame.MAX_SAMPLES)):
        unpack(valid(samples=n, tokens=ones, targets=ones, payloads=ones))


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"SFZC",
        b"SFZC\1\0\0\0",
        b"SFZC\xff\xff\xff\xff" + b"\0" * 64,
        b"SFZC" + (frame.MAX_HEADER_BYTES + 1).to_bytes(4, "little") + b"\0" * 64,
        b"sfzc" + b"\0" * 64,
        b"\x80\x04\x95pickle",
        envelope(b""),
        envelope(b"\xc0"),
        envelope(b"\x81\xa1\xff\x01"),
        envelope(b"\x81\xa7samples\xdd\xff\xff\xff\xff\x01"),
        envelope(b"\x81\xa7samples\xdb\xff\xff\xff\xff\x01"),
        envelope(b"\x82\xa1x" + b"\x91" * 900_000),
        envelope(b"\xdf\xff\xff\xff\xff"),
    ],
)
def test_bombs_are_refused_without_taking_memory(damaged: bytes):
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            unpack(damaged)
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_every_truncation_and_any_extra_byte_is_refused():
    whole = valid()
    for length in range(len(whole)):
        with pytest.raises(WireError):
            unpack(whole[:length])
    with pytest.raises(WireError, match="wrong length"):
        unpack(whole + b"\0")


def test_pack_refuses_what_unpack_would():
    with pytest.raises(WireError, match="repeats"):
        pack(ORIGIN, 0, [samples()[0], samples()[0]])
    with pytest.raises(WireError, match="got 0 samples"):
        pack(ORIGIN, 0, [])
    with pytest.raises(WireError, match="targets"):
        pack(ORIGIN, 0, [replace(samples()[0], targets=ints(1, 2))])


def test_random_mutations_never_raise_anything_else():
    source, whole = stream(0, "mutations"), valid()
    refused = 0
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(int(source.integers(1, 6))):
            place = int(source.integers(0, len(damaged)))
            kind = int(source.integers(0, 3))
            if kind == 0:
                damaged[place] = int(source.integers(0, 256))
            elif kind == 1:
                damaged[place:place] = source.bytes(int(source.integers(1, 9)))
            else:
                del damaged[place : place + int(source.integers(1, 9))]
        refused += _is_refused(bytes(damaged))
    assert 1500 < refused < 3000


@settings(max_examples=300, deadline=None)
@given(header=st.binary(max_size=60), body=st.binary(max_size=20))
def test_arbitrary_headers_never_raise_anything_else(header: bytes, body: bytes):
    assert _is_refused(envelope(header, body))


def _is_refused(data: bytes) -> bool:
    try:
        header, back = unpack(data)
    except WireError:
        return True
    assert len(back) == len(header.samples)
    assert sum(len(sample.payload) for sample in back) == sum(header.payloads)
    return False
