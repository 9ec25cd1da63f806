"""Append-only files of activations, one kind of activation of one device a file.

    <folder>/<device>/d<depth>-<id>.seg      payload, then targets as int32 little-endian, and so on

Who appends holds the file's lock, first cuts off what a crash left behind the committed length,
and makes the bytes durable before the index names them. A lock is the kernel's and ends with its
process. Ids are never used twice, so a reader that has an old row finds the old bytes or no file.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from splitfrozen.disk import explained, sync_folder
from splitfrozen.records import Ints


@dataclass(frozen=True, slots=True)
class Kind:
    """What all activations of a segment have in common."""

    depth: int
    width: int
    codec: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample's bytes are. `length` is the payload's; `targets` counts numbers."""

    segment: int
    offset: int
    length: int
    crc32: int
    tokens: int
    targets: int


def segment_path(folder: Path, device: str, depth: int, number: int) -> Path:
    """The file of a segment."""
    return folder / device / f"d{depth}-{number}.seg"


class OpenSegment:
    """A segment that this thread may append to while it holds the lock of `locked`."""

    def __init__(self, number: int, path: Path, descriptor: int, committed: int) -> None:
        self.number = number
        self.end = committed
        self._path = path
        self._descriptor = descriptor
        self._committed = committed

    def append(self, payload: bytes | memoryview, tokens: int, targets: Ints) -> Place:
        """Write one sample behind the others. Raises DiskFullError, StoreError."""
        tail = targets.astype("<i4").tobytes()
        start = self.end
        with explained(self._path):
            self._write(payload)
            self._write(tail)
        crc32 = zlib.crc32(tail, zlib.crc32(payload))
        return Place(self.number, start, len(payload), crc32, tokens, len(targets))

    def sync(self) -> None:
        """Make what was appended durable, and the file's name when it is new."""
        with explained(self._path):
            os.fsync(self._descriptor)
            if self._committed == 0:
                for folder in (self._path.parent, *self._path.parents[1:3]):
                    sync_folder(folder)

    def undo(self) -> None:
        """Give back the space of what was appended and not committed."""
        with explained(self._path):
            os.ftruncate(self._descriptor, self._committed)

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            count = os.pwrite(self._descriptor, left, self.end)
            self.end += count
            left = left[count:]


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Open or create a segment's file and wait until nobody else appends to it."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with explained(path):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def read_place(descriptor: int, place: Place) -> tuple[memoryview, Ints] | None:
    """Payload and targets of a sample; None where its bytes are damaged."""
    whole = os.pread(descriptor, place.length + 4 * place.targets, place.offset)
    if zlib.crc32(whole) != place.crc32 or len(whole) != place.length + 4 * place.targets:
        return None
    targets = np.frombuffer(whole, "<i4", offset=place.length).astype(np.int32)
    return memoryview(whole)[: place.length], targets
