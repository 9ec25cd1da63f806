"""Compute, encode and upload at the same time: three threads with short queues between them.

The slowest stage sets the pace and the queues bound the memory. An error in any stage stops all
three and is raised once. What is stored is what the uploader says is stored; only the rest is
computed.

Each stage notes when it worked on a chunk. The report carries that on the device's own clock, from
the first forward on: clocks of devices differ, so the server places it by when the report arrives.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from splitfrozen.device.plan import PlannedChunk, padding_share
from splitfrozen.device.progress import Progress
from splitfrozen.records import (
    MAX_SPANS,
    Chunk,
    ChunkSpan,
    Codec,
    DeviceReport,
    EncodedSample,
    Floats,
    Front,
    Receipt,
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

_Stage = tuple[float, float]
"""Begin and seconds of work, as in `ChunkSpan`."""


@dataclass(frozen=True, slots=True)
class Making:
    """What chunks are made with.

    Attributes:
        front: computes.
        codec: encodes.
        origin: what every frame says of itself.
        interrupt: makes a forward pass in another thread fail soon.
    """

    front: Front
    codec: Codec
    origin: Origin
    interrupt: Callable[[], None] = lambda: None


class Pilot(Protocol):
    """Says what the next chunk is made with, and hears how the last one went."""

    def making(self) -> Making:
        """For the next chunk. It may take long, where a front has to be fetched."""
        ...

    def sent(self, span: ChunkSpan, tokens: int, receipt: Receipt) -> None:
        """A chunk of so many tokens is stored. Called from another thread than `making`."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """A pilot that changes nothing."""

    always: Making

    def making(self) -> Making:
        return self.always

    def sent(self, span: ChunkSpan, tokens: int, receipt: Receipt) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Work:
    """What a device does in a run.

    Attributes:
        samples: all samples of the device; `samples[i].id == i`.
        chunks: the whole plan.
        pilot: what they are made with.
    """

    samples: Sequence[Sample]
    chunks: Sequence[PlannedChunk]
    pilot: Pilot


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
        self._computed = _Channel[tuple[PlannedChunk, Making, list[Floats], _Stage]](stop)
        self._encoded = _Channel[tuple[PlannedChunk, Chunk, ChunkSpan]](stop)
        self._making: Making | None = None
        self._errors: list[BaseException] = []
        self._spans: list[ChunkSpan] = []
        self._begin = 0.0

    def run(self, missing: Sequence[PlannedChunk]) -> DeviceReport:
        self._begin = time.perf_counter()
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
            if self._stop.is_set() and self._making is not None:
                self._making.interrupt()
            deadline = time.monotonic() + STOP_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._errors:
            raise self._errors[0]
        if self._stop.is_set():
            raise KeyboardInterrupt
        return DeviceReport(
            seconds=time.perf_counter() - self._begin if missing else 0.0,
            padding=padding_share(self._work.chunks, self._work.samples),
            spans=merged(self._spans, MAX_SPANS),
        )

    def _since(self, start: float) -> _Stage:
        """The stage that began at `start` and ends now."""
        return start - self._begin, time.perf_counter() - start

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
            making = self._making = self._work.pilot.making()
            hidden: list[Floats] = []
            start = time.perf_counter()
            for batch in planned.batches:
                if self._stop.is_set():
                    raise _Stopped
                hidden += making.front([self._work.samples[i] for i in batch])
            self._computed.put((planned, making, hidden, self._since(start)))
        self._computed.close()

    def _encode(self) -> None:
        for planned, making, hidden, front in self._computed:
            start = time.perf_counter()
            encoded = [
                EncodedSample(
                    sample=number,
                    tokens=len(one),
                    targets=self._work.samples[number].targets,
                    payload=making.codec.encode(one),
                )
                for number, one in zip(planned.samples, hidden, strict=True)
            ]
            chunk = pack(making.origin, planned.index, encoded)
            made = front, self._since(start), (0.0, 0.0)
            depth, size = making.origin.depth, len(chunk.frame)
            span = ChunkSpan(planned.index, planned.index, depth, 1, size, *made)
            self._encoded.put((planned, chunk, span))
        self._encoded.close()

    def _upload(self) -> None:
        for planned, chunk, made in self._encoded:
            start = time.perf_counter()
            receipt = self._uploader.put(chunk)
            span = msgspec.structs.replace(made, send=self._since(start))
            self._spans.append(span)
            tokens = sum(self._work.samples[i].length for i in planned.samples)
            self._work.pilot.sent(span, tokens, receipt)
            self._progress.add(len(planned.samples), span.bytes)


def merged(spans: Sequence[ChunkSpan], most: int) -> tuple[ChunkSpan, ...]:
    """At most `most` spans: consecutive ones are added up, as many at a time as it takes.

    Those of unlike depth are not, but where the depth changed very often. A stage of the sum begins
    when the first began and is as long as all together, so that what a stage waited does not count
    as work.
    """
    runs = [list(run) for _, run in itertools.groupby(spans, lambda span: span.depth)]
    runs = runs if 2 * len(runs) <= most else [list(spans)] * bool(spans)
    size = max(1, math.ceil(len(spans) / (most - len(runs) + 1)))
    return tuple(
        _sum(run[start : start + size]) for run in runs for start in range(0, len(run), size)
    )


def _sum(spans: Sequence[ChunkSpan]) -> ChunkSpan:
    def stage(stages: Sequence[_Stage]) -> _Stage:
        return stages[0][0], sum(seconds for _, seconds in stages)

    return ChunkSpan(
        first=spans[0].first,
        last=spans[-1].last,
        depth=spans[-1].depth,
        chunks=sum(span.chunks for span in spans),
        bytes=sum(span.bytes for span in spans),
        front=stage([span.front for span in spans]),
        encode=stage([span.encode for span in spans]),
        send=stage([span.send for span in spans]),
    )


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
