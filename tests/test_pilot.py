"""A device changes its front between two chunks, and tells of its speed when that has moved."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from splitfrozen.device.pilot import WINDOW, Steered
from splitfrozen.device.pipeline import Making, Work, upload_all
from splitfrozen.device.plan import plan_chunks, planned_bytes
from splitfrozen.device.progress import Progress
from splitfrozen.errors import ModelError, RefusedError, StoreError, UnreachableError, WireError
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
        self.wants = 2
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
        wanted = self.wants if chunk.index >= self.deeper_from else 1
        return Receipt(chunk.index, len(samples), wanted)

    def assigned(self) -> Assignment:
        self.asked += 1
        return assignment(self.wants)


def steered(
    server: Server, fails: Exception | None = None, opened: list[int] | None = None
) -> Steered:
    """`fails`: what opening depth 3 raises; `opened`: depths that were tried."""

    def open_making(given: Assignment) -> Making:
        if opened is not None:
            opened.append(given.depth)
        if given.depth == 3 and fails:
            raise fails
        origin = Origin("run", "device-00", given.front.hash, given.depth, WIDTH, "float32")
        return Making(Deep(given.depth), codec("float32"), origin)

    return Steered(assignment(1), open_making, server.assigned, server.told.append, PROFILE)


def work(pilot: Steered) -> Work:
    rows = [
        Sample(i, np.zeros(200, np.int32), None, None, np.zeros(1, np.int32), 200)
        for i in range(150)
    ]
    size = planned_bytes(codec("float32"), WIDTH)
    chunks = plan_chunks(rows, size, 1 << 14, 0, "device-00")
    assert len(chunks) > 20
    return Work(rows, chunks, pilot)


def test_a_receipt_changes_the_depth_of_the_chunks_to_come() -> None:
    server = Server(deeper_from=3)
    task = work(steered(server))
    report = upload_all(task, server, Progress(len(task.samples)), threading.Event())
    depths = [server.depths[index] for index in range(len(task.chunks))]
    assert depths == sorted(depths)
    assert set(depths) == {1, 2}
    assert depths[:4] == [1] * 4
    assert server.values == {index: float(depth) for index, depth in server.depths.items()}
    assert server.asked == 1
    assert [span.depth for span in report.spans] == depths


KINDS = (StoreError, ModelError, WireError, RefusedError, UnreachableError)
FAILURES = [
    *(kind("it fails", got="this", allowed="that", remedy="mend") for kind in KINDS),
    MemoryError("it fails"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_front_that_cannot_be_opened_changes_nothing(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(deeper_from=3)
    server.wants = 3
    pilot = steered(server, failure)
    task = work(pilot)
    report = upload_all(task, server, Progress(len(task.samples)), threading.Event())
    assert report.chunks == len(task.chunks) == len(server.depths)
    assert set(server.depths.values()) == {1}
    assert (pilot.depth, server.asked) == (1, 1), "it is not tried again for each chunk"
    # Progress tells its own where an earlier test has asked for it.
    [message] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith(f"staying at depth 1, not 3: {type(failure).__name__}: it fails")


def test_another_word_is_followed_after_one_that_could_not_be() -> None:
    server = Server(0)
    pilot = steered(server, MemoryError())
    for wanted, depth in ((3, 1), (2, 2), (3, 2), (1, 1)):
        server.wants = wanted
        pilot.sent(span(0, 1.0, 1.0), 100, Receipt(0, 1, wanted))
        assert pilot.making().origin.depth == pilot.depth == depth
        assert pilot.making().front.depth == depth
    assert server.asked == 4


def test_a_receipt_that_is_older_than_the_assignment_is_no_word() -> None:
    server = Server(0)
    opened: list[int] = []
    pilot = steered(server, MemoryError(), opened)
    server.wants = 3
    pilot.sent(span(0, 1.0, 1.0), 100, Receipt(0, 1, 2))
    for _ in range(3):
        assert pilot.making().origin.depth == 1
    assert opened == [1, 3], "asked again, but not opened again"
    server.wants = 2
    pilot.sent(span(1, 1.0, 1.0), 100, Receipt(1, 1, 2))
    assert pilot.making().origin.depth == 2


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
    # Chunks in less than two seconds say nothing yet, though they are twenty times as fast.
    hear(pilot, 0.05, 0.05, 39)
    assert server.told == []
    hear(pilot, 0.05, 0.05, 1)
    assert [one.flops for one in server.told] == [pytest.approx(2e4)]


def test_a_window_in_which_a_speed_changed_is_not_told() -> None:
    server = Server(0)
    pilot = steered(server)
    # Two chunks as before and three that took five times as long: 294 FLOP/s if they were told.
    hear(pilot, 1.0, 1.0, 2)
    hear(pilot, 5.0, 1.0, 3)
    assert server.told == []
    hear(pilot, 5.0, 1.0, 2)
    assert [one.flops for one in server.told] == [200.0]


def test_a_speed_that_never_settles_is_told_all_the_same() -> None:
    server = Server(0)
    pilot = steered(server)
    for index in range(4 * WINDOW):
        pilot.sent(span(index, 3.0 * 2**index, 1.0), 100, Receipt(index, 1))
    first = server.told[0].flops
    # Two windows were cut in half: the third has chunks 4 to 8.
    assert first == pytest.approx(5 * 1e3 / sum(3.0 * 2**index for index in range(4, 9)))


def test_chunks_of_the_depth_before_say_nothing_of_the_one_now() -> None:
    server = Server(0)
    pilot = steered(server)
    pilot.sent(span(0, 1.0, 1.0), 100, Receipt(0, 1, 2))
    assert pilot.making().origin.depth == 2
    hear(pilot, 50.0, 50.0, 4 * WINDOW)
    assert server.told == []
