"""The frame: one chunk as bytes, in a versioned envelope.

    4 bytes   magic "SFZC"
    4 bytes   length of the header, uint32 little-endian
    header    `records.FrameHeader` as MessagePack
    targets   int32 little-endian, of all samples in order
    payloads  of all samples in order, as the codec made them

The header says the length of every part, and the parts must fill the frame exactly. Every claim is
checked before anything is allocated; payloads are views into the frame. A chunk is addressed by the
sha256 of its frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from splitfrozen.errors import WireError
from splitfrozen.records import PROTOCOL, Activation, Chunk, Codec, EncodedSample, FrameHeader
from splitfrozen.wire.codec import MAX_HIDDEN_BYTES

MAGIC = b"SFZC"
MAX_HEADER_BYTES = 1024 * 1024
MAX_SAMPLES = 65536
MAX_DECODED_BYTES = 2 * 1024 * 1024 * 1024
"""Of all activations of one frame as float32: bounds the work that a small frame can ask for."""
MAX_NUMBER = 2**31 - 1
"""Largest sample id, chunk index and depth: the store and the shuffle keep them as int32."""

_PREFIX = len(MAGIC) + 4
_TARGET_BYTES = 4


@dataclass(frozen=True, slots=True)
class Origin:
    """What all chunks of a device in a run have in common: the first fields of `FrameHeader`."""

    run: str
    device: str
    front: str
    depth: int
    width: int
    codec: str


class _Version(msgspec.Struct):
    """The one field that every version of the header has."""

    protocol: int


def header_of(origin: Origin, index: int, samples: Sequence[EncodedSample]) -> FrameHeader:
    """What a frame of these samples says of them; nothing is checked."""
    return FrameHeader(
        protocol=PROTOCOL,
        run=origin.run,
        device=origin.device,
        index=index,
        front=origin.front,
        depth=origin.depth,
        width=origin.width,
        codec=origin.codec,
        samples=tuple(sample.sample for sample in samples),
        tokens=tuple(sample.tokens for sample in samples),
        targets=tuple(len(sample.targets) for sample in samples),
        payloads=tuple(len(sample.payload) for sample in samples),
    )


def pack(origin: Origin, index: int, samples: Sequence[EncodedSample]) -> Chunk:
    """Make chunk `index` of a device's plan. The same input gives the same bytes.

    Raises WireError where `unpack` would refuse the result.
    """
    header = header_of(origin, index, samples)
    _check(header)
    head = msgspec.msgpack.encode(header)
    _check_header_length(len(head))
    parts: list[bytes | memoryview] = [MAGIC, len(head).to_bytes(4, "little"), head]
    parts += (sample.targets.astype("<i4", copy=False).tobytes() for sample in samples)
    parts += (sample.payload for sample in samples)
    frame = b"".join(parts)
    return Chunk(index=index, sha256=hashlib.sha256(frame).hexdigest(), frame=frame)


def unpack(frame: bytes) -> tuple[FrameHeader, list[EncodedSample]]:
    """Check a frame and take it apart; payloads are views that keep `frame` alive.

    Raises WireError, and nothing else, for bytes that are not a frame of this protocol. Whether the
    payloads decode is the codec's to say.
    """
    view = memoryview(frame)
    header, offset = _read_header(view)
    _check(header)
    expected = offset + _TARGET_BYTES * sum(header.targets) + sum(header.payloads)
    if len(view) != expected:
        raise _wrong("has the wrong length", f"{len(view)} bytes", f"{expected}, by its header")
    targets = offset
    offset += _TARGET_BYTES * sum(header.targets)
    samples = []
    for sample, tokens, count, size in zip(
        header.samples, header.tokens, header.targets, header.payloads, strict=True
    ):
        values = np.frombuffer(view, "<i4", count, targets).astype(np.int32)
        samples.append(EncodedSample(sample, tokens, values, view[offset : offset + size]))
        targets += _TARGET_BYTES * count
        offset += size
    return header, samples


def activations(frame: bytes, decoder: Codec) -> tuple[FrameHeader, list[Activation]]:
    """Check a frame, take it apart and decode it. Raises WireError, also for another codec's."""
    header, samples = unpack(frame)
    if header.codec != decoder.name:
        raise _wrong("has another codec", repr(header.codec), repr(decoder.name))
    return header, [
        Activation(
            sample.sample,
            header.depth,
            decoder.decode(sample.payload, sample.tokens, header.width),
            sample.targets,
        )
        for sample in samples
    ]


def _read_header(view: memoryview) -> tuple[FrameHeader, int]:
    """Return the header and the offset behind it."""
    if len(view) < _PREFIX or view[: len(MAGIC)] != MAGIC:
        start = bytes(view[:_PREFIX])
        raise _wrong("does not begin as one", f"{start!r}", f"{MAGIC!r} and a length")
    size = int.from_bytes(view[len(MAGIC) : _PREFIX], "little")
    _check_header_length(size)
    end = _PREFIX + size
    if end > len(view):
        raise _wrong("is shorter than its header", f"{len(view)} bytes", f"{end} or more")
    head = view[_PREFIX:end]
    try:
        header = msgspec.msgpack.decode(head, type=FrameHeader)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        _check_version(_peek_version(head))
        raise _wrong("has a bad header", str(error), f"protocol {PROTOCOL}'s fields") from error
    _check_version(header.protocol)
    return header, end


def _peek_version(head: memoryview) -> int:
    """Version of a header of another protocol; ours if even that cannot be read."""
    try:
        return msgspec.msgpack.decode(head, type=_Version).protocol
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return PROTOCOL


def _check_version(protocol: int) -> None:
    if protocol != PROTOCOL:
        raise WireError(
            "a chunk speaks another protocol version",
            got=f"version {protocol}",
            allowed=f"version {PROTOCOL}",
            remedy="install the same splitfrozen on device and server",
        )


def _check_header_length(size: int) -> None:
    if size > MAX_HEADER_BYTES:
        raise _wrong("has too long a header", f"{size} bytes", f"{MAX_HEADER_BYTES} at most")


def _check(header: FrameHeader) -> None:
    """Check a header's claims against the limits and each other, in Python's unbounded integers."""
    count = len(header.samples)
    lengths = {len(header.tokens), len(header.targets), len(header.payloads), count}
    if len(lengths) > 1 or not 1 <= count <= MAX_SAMPLES:
        got = f"{count} samples, lists of {sorted(lengths)}"
        raise _wrong("has bad lists", got, f"four lists of one length, 1 to {MAX_SAMPLES}")
    if len(set(header.samples)) != count:
        raise _wrong("repeats a sample", f"{count} ids", "each id once")
    largest = max(header.index, header.depth, *header.samples)
    if largest > MAX_NUMBER:
        raise _wrong("has too large a number", largest, f"{MAX_NUMBER} at most")
    row_bytes = 4 * header.width
    if max(header.tokens) * row_bytes > MAX_HIDDEN_BYTES:
        got = f"{max(header.tokens)} tokens of width {header.width}"
        raise _wrong("has too large a sample", got, f"{MAX_HIDDEN_BYTES} bytes as float32")
    if sum(header.tokens) * row_bytes > MAX_DECODED_BYTES:
        got = f"{sum(header.tokens)} tokens of width {header.width}"
        raise _wrong("has too many tokens", got, f"{MAX_DECODED_BYTES} bytes as float32")
    for tokens, targets in zip(header.tokens, header.targets, strict=True):
        if targets not in (0, 1, tokens):
            got = f"{targets} targets for {tokens} tokens"
            raise _wrong("has a wrong number of targets", got, "none, one, or one a token")


def _wrong(what: str, got: object, allowed: str) -> WireError:
    return WireError(f"a chunk {what}", got=got, allowed=allowed, remedy="send the chunk again")
