"""Compute, encode and upload at the same time: three threads with short queues between them.

The slowest stage sets the pace and the queues bound the memory. An error in any stage stops all
three and is raised once. What is stored is what the uploader says is stored; only the rest is
computed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from splitfrozen.device.plan import PlannedChunk, padding_share
from splitfrozen.device.progress import Progress
from splitfrozen.records import (
    Chunk,
    Codec,
    DeviceReport,
    EncodedSample,
    Floats,
    Front,
    Sample,
    Uploader,
)
from splitfrozen.wire.frame import Origin, pack

QUEUE = 2
"""Chunks between two stages: enough to overlap, little memory."""

STOP_S = 0.8
"""How long stopping waits for the stages; they are daemon threads and hold nothing on disk."""

THREADS = "splitfrozen stage"
"""How the names of the three threads begin."""

_POLL_S = 0.1
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Work:
    """What a device does in a run.

    Attributes:
        samples: all samples of the device; `samples[i].id == i`.
        chunks: the whole plan.
        front: computes.
        codec: encodes.
        origin: what every frame says of itself.
        interrupt: makes a forward pass in another thread fail soon.
    """

    samples: Sequence[Sample]
    chunks: Sequence[PlannedChunk]
    front: Front
    codec: Codec
    origin: Origin
    interrupt: Callable[[], None] = lambda: None


def upload_all(
    work: Work,
    uploader: Uploader,
    progress: Progress,
    stop: threading.Event,
) -> DeviceReport:
    """Compute and upload the chunks that the server does not have.

    Args:
        work: what to do.
        uploader: where it goes.
        progress: is told of every chunk once it is stored.
        stop: set when a stage fails or someone interrupts; whatever waits inside the uploader
            should end its waiting then.

    Raises what a stage raises: ModelError, WireError, RefusedError, UnreachableError; and
    KeyboardInterrupt, within a second, also where `stop` is set from outside.
    """
    had = uploader.stored()
    missing = [chunk for chunk in work.chunks if chunk.index not in had]
    progress.begin(len(work.samples) - sum(len(chunk.samples) for chunk in missing))
    return _Pipeline(work, uploader, progress, stop).run(missing)


class _Pipeline:
    def __init__(
        self,
        work: Work,
        uploader: Uploader,
        progress: Progress,
        stop: threading.Event,
    ) -> None:
        self._work = work
        self._uploader = uploader
        self._progress = progress
        self._stop = stop
        self._computed = _Channel[tuple[PlannedChunk, list[Floats]]](stop)
        self._encoded = _Channel[tuple[PlannedChunk, Chunk]](stop)
        self._errors: list[BaseException] = []
        self._compute_s = self._encode_s = self._upload_s = 0.0
        self._bytes_up = self._chunks = 0

    def run(self, missing: Sequence[PlannedChunk]) -> DeviceReport:
        begin = time.perf_counter()
        threads = [
            threading.Thread(target=self._guard, args=(stage,), name=f"{THREADS} {i}", daemon=True)
            for i, stage in enumerate((lambda: self._compute(missing), self._encode, self._upload))
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads) and not self._stop.is_set():
                for thread in threads:
                    thread.join(_POLL_S)
        except BaseException:
            self._stop.set()
            raise
        finally:
            if self._stop.is_set():
                self._work.interrupt()
            deadline = time.monotonic() + STOP_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._errors:
            raise self._errors[0]
        if self._stop.is_set():
            raise KeyboardInterrupt
        return DeviceReport(
            seconds=time.perf_counter() - begin if missing else 0.0,
            compute_s=self._compute_s,
            encode_s=self._encode_s,
            upload_s=self._upload_s,
            bytes_up=self._bytes_up,
            chunks=self._chunks,
            padding=padding_share(self._work.chunks, self._work.samples),
        )

    def _guard(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except _Stopped:
            pass
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()

    def _compute(self, missing: Sequence[PlannedChunk]) -> None:
        for planned in missing:
            hidden: list[Floats] = []
            for batch in planned.batches:
                start = time.perf_counter()
                hidden += self._work.front([self._work.samples[i] for i in batch])
                self._compute_s += time.perf_counter() - start
                if self._stop.is_set():
                    raise _Stopped
            self._computed.put((planned, hidden))
        self._computed.close()

    def _encode(self) -> None:
        for planned, hidden in self._computed:
            start = time.perf_counter()
            encoded = [
                EncodedSample(
                    sample=number,
                    tokens=len(one),
                    targets=self._work.samples[number].targets,
                    payload=self._work.codec.encode(one),
                )
                for number, one in zip(planned.samples, hidden, strict=True)
            ]
            chunk = pack(self._work.origin, planned.index, encoded)
            self._encode_s += time.perf_counter() - start
            self._encoded.put((planned, chunk))
        self._encoded.close()

    def _upload(self) -> None:
        for planned, chunk in self._encoded:
            start = time.perf_counter()
            self._uploader.put(chunk)
            self._upload_s += time.perf_counter() - start
            self._bytes_up += len(chunk.frame)
            self._chunks += 1
            self._progress.add(len(planned.samples), len(chunk.frame))


class _Stopped(Exception):  # noqa: N818 -- not an error: the way out of a stage
    """Another stage failed, or someone stopped the work."""


class _Channel(Generic[_T]):
    """A short queue that ends, and that nobody waits at once `stop` is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._queue: queue.Queue[_T | None] = queue.Queue(QUEUE)

    def put(self, item: _T | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
        raise _Stopped

    def close(self) -> None:
        self.put(None)

    def __iter__(self) -> Iterator[_T]:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item
        raise _Stopped
