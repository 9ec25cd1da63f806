"""The event log of a network run, put together from its parts, and read back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from splitfrozen.config import Config, DevicesSpec, ModelSpec, RunSpec, TaskConfig
from splitfrozen.device.pipeline import QUEUE
from splitfrozen.errors import StoreError
from splitfrozen.model.costs import ModelShape, Tokens, forward_flops
from splitfrozen.records import (
    PROTOCOL,
    Announcement,
    ChunkSpan,
    Compute,
    DeviceReport,
    EncodedSample,
    Enrolment,
    Event,
    Send,
)
from splitfrozen.runs import networklog
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.networklog import EventList, Piece, Work
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, header_of

SHAPE = ModelShape(
    blocks=4, width=8, maps=((8, 8), (8, 8)), entry=((8, 8),), heads=2, attention=8, inner=16
)
NOON = 1000.0
"""The first work of the server, on its clock."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A run folder with a registry, a store and what a worker would have written."""

    def __init__(self, folder: Path, start: str = "complete") -> None:
        self.clock = Clock()
        config = Config(
            model=ModelSpec(name="gpt2", cut=2),
            task=TaskConfig(labels=("a", "b")),
            devices=DevicesSpec(count=2),
            run=RunSpec(
                folder=str(folder), start="streaming" if start == "streaming" else "complete"
            ),
        )
        self.folder = RunFolder.create(config)
        self.registry = Registry(folder, self.clock)
        self.registry.ensure_slots(2)
        self.store = Store(self.folder.store)
        self.folder.report({"event": "shape", "shape": msgspec.to_builtins(SHAPE)})

    def join(self, device: str, depth: int, chunks: Sequence[Sequence[int]]) -> None:
        """A device of some depth whose chunks hold samples of these lengths."""
        token = self.registry.tokens()[device]
        self.registry.enrol(Enrolment(PROTOCOL, token, f"{device:s>43}", device, "0.1.0"))
        lengths = [length for chunk in chunks for length in chunk]
        self.registry.announce(device, Announcement(len(lengths), sum(lengths), 0, "0" * 64))
        self.registry.assign({device: depth})
        origin = Origin("run", device, "0" * 64, depth, 8, "float32")
        number = 0
        for index, chunk in enumerate(chunks):
            encoded = []
            for length in chunk:
                payload = codec("float32").encode(np.ones((length, 8), np.float32))
                target = np.zeros(1, np.int32)
                encoded.append(EncodedSample(number, length, target, payload))
                number += 1
            self.store.add(header_of(origin, index, encoded), "0" * 64, encoded)

    def report(self, device: str, at: float, seconds: float, *spans: ChunkSpan) -> None:
        self.clock.now = at
        self.registry.report(device, DeviceReport(seconds=seconds, padding=0.0, spans=spans))

    def works(self, *works: Work) -> None:
        for work in works:
            self.folder.report(msgspec.to_builtins(work))

    def log(self) -> list[Event]:
        networklog.write(self.folder, self.registry, self.store)
        return networklog.read(self.folder.root)


@contextmanager
def opened(folder: Path, start: str = "complete") -> Iterator[Run]:
    run = Run(folder, start)
    with closing(run.registry), closing(run.store):
        yield run


def work(phase: str, step: int, begin: float, device: str = "") -> Work:
    """Half a second of work, `begin` seconds after noon."""
    table = {"event": "work", "phase": phase, "step": step, "flops": 10.0}
    times = {"begin": NOON + begin, "end": NOON + begin + 0.5}
    return msgspec.convert({**table, **times, "device": device}, Work)


def span(index: int, begin: float, size: int = 100, depth: int = 1) -> ChunkSpan:
    return ChunkSpan(
        index, index, depth, 1, size, (begin, 0.2), (begin + 0.2, 0.1), (begin + 0.5, 0.25)
    )


def two_devices(run: Run) -> None:
    run.join("device-00", 1, [[3, 5], [4]])
    run.join("device-01", 2, [[6]])
    run.report("device-00", NOON + 3.0, 2.0, span(0, 0.0), span(1, 0.3, 70))
    run.report("device-01", NOON + 4.0, 0.9, span(0, 0.0, depth=2))


def named(events: Sequence[Event]) -> dict[tuple[str, str, int], Event]:
    """By who (or from whom), phase and step."""
    found = {(e.who if isinstance(e, Compute) else e.source, e.phase, e.step): e for e in events}
    assert len(found) == len(events)
    return found


def test_a_run_becomes_events_on_one_clock(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        two_devices(run)
        run.works(
            work("evaluate", 0, 0.0),
            work("lift", 0, 2.0, "device-00"),
            work("lift", 1, 2.5, "device-00"),
            work("train", 0, 4.5),
            work("train", 1, 5.0),
            work("evaluate", 2, 5.5),
        )
        events = run.log()
    assert [event.id for event in events] == list(range(len(events)))
    at = named(events)
    front = at["device-00", "front", 0]
    assert isinstance(front, Compute)
    assert front.flops == forward_flops(SHAPE, 1, Tokens.of([3, 5]))
    # The report came 3 s after noon and tells of 2 s.
    assert (front.begin_s, front.end_s) == pytest.approx((1.0, 1.2))
    deeper = at["device-01", "front", 0]
    assert isinstance(deeper, Compute)
    assert deeper.flops == forward_flops(SHAPE, 2, Tokens.of([6]))
    encode = at["device-00/encode", "encode", 1]
    assert isinstance(encode, Compute)
    assert (encode.flops, encode.begin_s) == (4 * 8, pytest.approx(1.5))
    send = at["device-00", "activations", 1]
    assert isinstance(send, Send)
    assert (send.bytes, send.target) == (70, "server")
    assert (send.begin_s, send.end_s) == pytest.approx((1.8, 2.05))
    assert at["device-00", "setup", 0].end_s == pytest.approx(1.0)
    assert at["device-01", "setup", 0].end_s == pytest.approx(3.1)
    assert ("server", "setup", 0) not in at, "the log begins with the server's first work"

    assert front.after == (at["device-00", "setup", 0].id,)
    assert encode.after == (
        at["device-00", "front", 1].id,
        at["device-00/encode", "encode", 0].id,
    )
    assert send.after == (encode.id, at["device-00", "activations", 0].id)
    assert at["server", "lift", 1].after == (send.id,)
    assert at["server", "evaluate", 0].after == ()
    assert at["server", "train", 0].after == tuple(
        sorted(
            {
                at["server", "evaluate", 0].id,
                *(at["device-00", "activations", step].id for step in (0, 1)),
                at["device-01", "activations", 0].id,
                *(at["server", "lift", step].id for step in (0, 1)),
            }
        )
    )
    assert at["server", "train", 1].after == (at["server", "train", 0].id,)
    assert at["server", "evaluate", 2].after == (at["server", "train", 1].id,)


def test_a_streaming_step_waits_for_what_it_drew(tmp_path: Path) -> None:
    with opened(tmp_path / "run", "streaming") as run:
        two_devices(run)
        run.works(
            work("lift", 0, 2.0, "device-00"),
            work("lift", 1, 2.5, "device-00"),
            *(work("train", step, 4.5 + step) for step in range(3)),
        )
        run.folder.training.mkdir()
        drawn = [[["device-00", 0]], [["device-01", 0], ["device-00", 2]]]
        lines = [json.dumps({"batch": n, "keys": keys}) for n, keys in enumerate(drawn)]
        (run.folder.training / "ledger.jsonl").write_text("\n".join(lines) + "\n")
        at = named(run.log())
        lifts = [at["server", "lift", step].id for step in (0, 1)]
        steps = [at["server", "train", step] for step in range(3)]
        setup = at["server", "setup", 0].id
        assert steps[0].after == tuple(sorted((setup, lifts[0])))
        sent = at["device-01", "activations", 0].id
        assert set(steps[1].after) == {steps[0].id, sent, lifts[1]}
        assert steps[2].after == (steps[1].id,)
        (run.folder.training / "ledger.jsonl").write_text("{\n")
        with pytest.raises(StoreError, match=r"ledger\.jsonl is damaged"):
            run.log()


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.join("device-00", 1, [[3], [4]])
        # It was killed after chunk 0, so its report knows the rest only.
        run.report("device-00", NOON + 3.0, 1.0, span(1, 0.0))
        run.works(work("lift", 0, 2.0, "device-00"), work("lift", 1, 2.5, "device-00"))
        run.folder.report({"event": "work", "phase": "nonsense"})
        run.folder.report({"event": "work", "phase": "train", "step": -1})
        at = named(run.log())
        assert at["server", "lift", 0].after == ()
        assert at["server", "lift", 1].after == (at["device-00", "activations", 1].id,)
        assert ("device-00", "front", 0) not in at
        run.registry.revoke("device-00")
        assert {who for who, _, _ in named(run.log())} == {"server"}


def test_nothing_to_tell_is_an_empty_log(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        (run.folder.root / "metrics.jsonl").unlink()
        assert run.log() == []


def test_a_pipeline_is_bounded_by_its_queues() -> None:
    log = EventList()
    sends = log.pipeline("d", [Piece(step, 1.0, 1.0, 1.0) for step in range(10)])
    at = named(log.events)

    def waits(who: str, phase: str, step: int) -> set[tuple[str, int]]:
        after = [log.events[i] for i in at[who, phase, step].after]
        return {(event.phase, event.step) for event in after}

    assert [at["d", "activations", step].id for step in range(10)] == sends
    assert waits("d", "front", 0) == set()
    assert waits("d", "front", 9) == {
        ("front", 8),
        ("encode", 7 - QUEUE),
        ("activations", 6 - 2 * QUEUE),
    }
    assert waits("d/encode", "encode", 9) == {
        ("front", 9),
        ("encode", 8),
        ("activations", 7 - QUEUE),
    }
    assert waits("d", "activations", 9) == {("encode", 9), ("activations", 8)}


GOOD = '{"event":"compute","id":0,"who":"d","phase":"front","step":0,"flops":1.0}'


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2"),
        ('{"event":"sleep","id":1}', "line 2"),
        (GOOD, "number 0"),
        (GOOD.replace('"id":0', '"id":1,"after":[1]'), "waits for what does not come before"),
        (GOOD.replace('"id":0', '"id":1,"after":[-1]'), "waits for what does not come before"),
        (GOOD.replace('"id":0', '"id":1,"begin_s":1.0'), "times 1.0 and None"),
        (GOOD.replace('"id":0', '"id":1,"begin_s":1.0,"end_s":0.5'), "times 1.0 and 0.5"),
        (GOOD.replace('"id":0', '"id":1,"begin_s":-1.0,"end_s":0.5'), "times -1.0 and 0.5"),
        (GOOD.replace('"id":0', '"id":1').replace("1.0", "-1.0"), "an amount of -1.0"),
    ],
)
def test_a_damaged_log_is_refused_by_line(tmp_path: Path, line: str, match: str) -> None:
    (tmp_path / networklog.LOG).write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(StoreError, match=match):
        networklog.read(tmp_path)


def test_a_folder_without_a_log_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has no event log"):
        networklog.read(tmp_path)
