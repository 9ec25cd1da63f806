"""A device changes its front between two chunks, and tells of its speed when that has moved."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from splitfrozen.device.pilot import WINDOW, Steered
from splitfrozen.device.pipeline import Making, Work, upload_all
from splitfrozen.device.plan import plan_chunks
from splitfrozen.device.progress import Progress
from splitfrozen.records import (
    Assignment,
    Chunk,
    ChunkSpan,
    DeviceProfile,
    FileRef,
    Floats,
    FrontManifest,
    Receipt,
    Sample,
)
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, unpack

WIDTH = 4
PROFILE = DeviceProfile(flops=1e3, memory_bytes=1, uplink_bps=8e3, cores=1, platform="")


class Deep:
    """Its activations are its depth."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def __call__(self, batch: Sequence[Sample]) -> list[Floats]:
        return [np.full((one.length, WIDTH), self.depth, np.float32) for one in batch]


def assignment(depth: int) -> Assignment:
    graph = FileRef("graph", "0" * 64, 1)
    front = FrontManifest(
        depth, WIDTH, "float32", f"{depth}" * 64, "graph", (graph,), 10 * depth, 1
    )
    return Assignment(depth, front, "float32")


class Server:
    """Wants another depth from some chunk on, and keeps what it hears."""

    def __init__(self, deeper_from: int) -> None:
        self.deeper_from = deeper_from
        self.depths: dict[int, int] = {}
        self.values: dict[int, float] = {}
        self.asked = 0
        self.told: list[DeviceProfile] = []

    def stored(self) -> set[int]:
        return set()

    def put(self, chunk: Chunk) -> Receipt:
        header, samples = unpack(chunk.frame)
        self.depths[chunk.index] = header.depth
        first = codec(header.codec).decode(samples[0].payload, samples[0].tokens, WIDTH)
        self.values[chunk.index] = float(first[0, 0])
        return Receipt(chunk.index, len(samples), 2 if chunk.index >= self.deeper_from else 1)

    def assigned(self) -> Assignment:
        self.asked += 1
        return assignment(2)


def steered(server: Server) -> Steered:
    def open_making(given: Assignment) -> Making:
        origin = Origin("run", "device-00", given.front.hash, given.depth, WIDTH, "float32")
        return Making(Deep(given.depth), codec("float32"), origin)

    return Steered(assignment(1), open_making, server.assigned, server.told.append, PROFILE)


def test_a_receipt_changes_the_depth_of_the_chunks_to_come() -> None:
    rows = [
        Sample(i, np.zeros(200, np.int32), None, None, np.zeros(1, np.int32), 200)
        for i in range(150)
    ]
    bound = codec("float32").most_bytes
    chunks = plan_chunks(rows, lambda t: bound(t, WIDTH), 1 << 14, 0, "device-00")
    assert len(chunks) > 20
    server = Server(deeper_from=3)
    work = Work(rows, chunks, steered(server))
    report = upload_all(work, server, Progress(len(rows)), threading.Event())
    depths = [server.depths[index] for index in range(len(chunks))]
    assert depths == sorted(depths)
    assert set(depths) == {1, 2}
    assert depths[:4] == [1] * 4
    assert server.values == {index: float(depth) for index, depth in server.depths.items()}
    assert server.asked == 1
    assert [span.depth for span in report.spans] == depths


def span(index: int, compute_s: float, send_s: float) -> ChunkSpan:
    return ChunkSpan(index, index, 1, 1, 1000, (0.0, compute_s), (0.0, 0.0), (0.0, send_s))


def hear(pilot: Steered, compute_s: float, send_s: float, chunks: int) -> None:
    for index in range(chunks):
        pilot.sent(span(index, compute_s, send_s), 100, Receipt(index, 1))


def test_a_speed_that_stays_is_not_told() -> None:
    server = Server(0)
    pilot = steered(server)
    # 100 tokens of 10 FLOP in a second are the 1e3 FLOP/s of the profile, 1000 bytes its 8e3 bit/s.
    hear(pilot, 1.1, 0.9, 4 * WINDOW)
    assert server.told == []


def test_a_speed_that_moved_is_told_once() -> None:
    server = Server(0)
    pilot = steered(server)
    hear(pilot, 5.0, 1.0, WINDOW - 1)
    assert server.told == []
    hear(pilot, 5.0, 1.0, 3 * WINDOW + 1)
    assert [(one.flops, one.uplink_bps) for one in server.told] == [(200.0, 8e3)]
    hear(pilot, 5.0, 2.0, WINDOW)
    assert [(one.flops, one.uplink_bps) for one in server.told[1:]] == [(200.0, 4e3)]


def test_speeds_are_means_over_chunks_and_over_time() -> None:
    server = Server(0)
    pilot = steered(server)
    # Five chunks in a quarter of a second say nothing yet, though they are twenty times as fast.
    hear(pilot, 0.05, 0.05, 2 * WINDOW)
    assert server.told == []
    hear(pilot, 9.5, 0.05, 1)
    assert [one.flops for one in server.told] == [1.1e3]


def test_chunks_of_the_depth_before_say_nothing_of_the_one_now() -> None:
    server = Server(0)
    pilot = steered(server)
    pilot.sent(span(0, 1.0, 1.0), 100, Receipt(0, 1, 2))
    assert pilot.making().origin.depth == 2
    hear(pilot, 50.0, 50.0, 4 * WINDOW)
    assert server.told == []
