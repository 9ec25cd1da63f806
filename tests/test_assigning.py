"""`depth = "auto"`: when depths are planned, and planned anew."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from splitfrozen.config import Config, DevicesSpec, ModelSpec, RunSpec, TaskConfig, WireSpec
from splitfrozen.model.costs import Tokens, forward_flops, gpt2_small
from splitfrozen.planning.makespan import Pipeline, Point
from splitfrozen.records import (
    PROTOCOL,
    Activation,
    Announcement,
    DeviceProfile,
    EncodedSample,
    Enrolment,
    FrontManifest,
    Prepared,
    TaskSpec,
)
from splitfrozen.runs.assigning import Assigning
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.forecast import Forecast, chunks_of, foretell
from splitfrozen.runs.serve import _Server
from splitfrozen.runs.summary import summarize
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, header_of

CUT = 3
SHAPE = gpt2_small()
SAMPLES, LENGTH = 200, 64
BLOCK = forward_flops(SHAPE, 1, Tokens.uniform(SAMPLES, LENGTH))
"""FLOP of one block over all samples of a device."""


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A run whose devices announce and measure what they are told."""

    def __init__(self, folder: Path, spec: DevicesSpec) -> None:
        config = Config(
            model=ModelSpec(name="gpt2", cut=CUT),
            task=TaskConfig(labels=("a", "b")),
            devices=spec,
            run=RunSpec(folder=str(folder)),
            wire=WireSpec(codec="float16", compression="none"),
        )
        self.clock = Clock()
        self.run = RunFolder.create(config)
        self.registry = Registry(folder, self.clock)
        self.registry.ensure_slots(spec.count)
        self.store = Store(self.run.store)
        self.now = 0.0
        self.assigning = Assigning(self.run, self.registry, self.store, lambda: self.now)

    def prepare(self, lifts: float) -> None:
        fronts = tuple(
            FrontManifest(n, SHAPE.width, "float32", f"{n}" * 64, "g", (), n, 1000 * n)
            for n in range(1, CUT + 1)
        )
        task = TaskSpec(kind="classification", columns={}, labels=("a", "b"), max_tokens=LENGTH)
        made = Prepared(task, None, fronts, SHAPE.blocks, SHAPE.width, 9, "0" * 64, "float16")
        self.run.write_prepared(made)
        self.run.report({"event": "shape", "shape": msgspec.to_builtins(SHAPE)})
        self.run.report({"event": "speed", "flops": lifts})

    def join(self, slot: int, block_s: float, link_s: float = 0.01, memory: int = 10_000) -> None:
        """A device that takes so long for a block, and for its link."""
        device = f"device-0{slot}"
        self.registry.enrol(
            Enrolment(PROTOCOL, self.registry.tokens()[device], f"{slot}" * 43, device, "0.1.0")
        )
        tokens = SAMPLES * LENGTH
        self.registry.announce(device, Announcement(SAMPLES, tokens, 0, "0" * 64))
        self.measure(slot, block_s, link_s, memory)

    def measure(
        self, slot: int, block_s: float, link_s: float = 0.01, memory: int = 10_000
    ) -> None:
        bits = 8 * 2 * SHAPE.width * SAMPLES * LENGTH
        said = DeviceProfile(BLOCK / block_s, memory, bits / link_s, 1, "")
        self.registry.profile(f"device-0{slot}", said)

    def send(self, slot: int, samples: int, depth: int) -> None:
        device = f"device-0{slot}"
        origin = Origin("run", device, "0" * 64, depth, SHAPE.width, "float16")
        payload = codec("float16").encode(np.zeros((LENGTH, SHAPE.width), np.float32))
        target = np.zeros(1, np.int32)
        encoded = [EncodedSample(i, LENGTH, target, payload) for i in range(samples)]
        self.store.add(header_of(origin, 0, encoded), "0" * 64, encoded)

    def depths(self) -> list[int | None]:
        self.now += 60.0
        self.assigning.look()
        return [row.depth for row in self.registry.devices()]

    def plans(self) -> list[dict[str, object]]:
        return self.run.events("plan")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "run", DevicesSpec(count=3))
    with closing(made.registry), closing(made.store):
        yield made


def test_nobody_is_placed_before_everybody_is_measured(world: World) -> None:
    world.join(0, 1.0)
    world.join(1, 1.0)
    assert world.depths() == [None] * 3, "nothing is prepared"
    world.prepare(lifts=BLOCK)
    assert world.depths() == [None] * 3, "one is missing"
    world.join(2, 1.0)
    placed = world.depths()
    assert None not in placed
    assert world.depths() == placed
    assert len(world.plans()) == 1, "once"


def test_fast_devices_go_deeper_than_slow_ones(world: World) -> None:
    # The server lifts a device's block in two seconds; the slow one takes ten for its first.
    world.prepare(lifts=BLOCK / 2)
    for slot, block_s in enumerate((10.0, 0.1, 0.1)):
        world.join(slot, block_s)
    assert world.depths() == [1, 2, 2]
    (plan,) = world.plans()
    # Ten seconds of the slow one, its link, and the lift of its last piece.
    assert float(str(plan["seconds"])) == pytest.approx(10.0, rel=0.1)


def test_a_server_that_is_far_faster_takes_all(world: World) -> None:
    world.prepare(lifts=1e4 * BLOCK)
    for slot in range(3):
        world.join(slot, 5.0)
    assert world.depths() == [1, 1, 1]


def test_memory_bounds_the_depth(world: World) -> None:
    world.prepare(lifts=BLOCK / 10)
    world.join(0, 0.1, memory=2500)
    world.join(1, 0.1)
    world.join(2, 0.1, memory=100)
    assert world.depths() == [2, 3, None], "the last holds no front, and holds nobody up"


def test_gather_s_ends_the_waiting_and_who_is_late_is_placed_too(tmp_path: Path) -> None:
    world = World(tmp_path / "run", DevicesSpec(count=2, gather_s=60))
    with closing(world.registry), closing(world.store):
        world.prepare(lifts=2 * BLOCK)
        world.join(0, 0.1)
        world.clock.now += 59
        assert world.depths() == [None, None]
        world.clock.now += 1
        assert world.depths() == [3, None]
        world.join(1, 0.1)
        assert world.depths() == [3, 3]
        assert len(world.plans()) == 2


def test_a_device_that_becomes_slow_gets_a_shallower_front(world: World) -> None:
    world.prepare(lifts=2 * BLOCK)
    for slot in range(3):
        world.join(slot, 0.1)
    assert world.depths() == [3, 3, 3]
    world.send(0, 50, depth=3)
    world.measure(0, 0.11)
    assert world.depths() == [3, 3, 3]
    assert len(world.plans()) == 1, "a tenth is no move"
    world.measure(0, 4.0)
    assert world.depths() == [1, 3, 3]
    assert world.registry.device("device-00").depths == (1, 3)
    last = world.plans()[-1]
    assert "device-00 moved" in str(last["why"])
    # Three quarters of its samples are left, at four seconds for all of one block.
    assert float(str(last["seconds"])) == pytest.approx(3.0, rel=0.2)
    assert world.depths() == [1, 3, 3]
    assert len(world.plans()) == 2


@pytest.fixture
def behind(world: World) -> World:
    """Devices at depth 1 have sent nearly everything, and the server takes 5 s for a block."""
    world.prepare(lifts=BLOCK / 5)
    for slot in range(3):
        world.join(slot, 0.1)
        world.registry.assign({f"device-0{slot}": 1})
        world.send(slot, 180, depth=1)
    assert world.depths() == [1, 1, 1]
    return world


BACKLOG_S = 3 * 2 * 5 * 180 / SAMPLES
"""Three devices' samples, two blocks each."""


def test_what_waits_to_be_lifted_counts(behind: World) -> None:
    behind.measure(0, 0.15)
    placed = behind.depths()
    (last,) = behind.plans()
    assert float(str(last["bound"])) == pytest.approx(BACKLOG_S)
    assert float(str(last["seconds"])) == pytest.approx(BACKLOG_S, rel=0.01)
    assert placed == [3, 3, 3], "the server has enough to lift"


def test_what_was_lifted_or_came_at_the_cut_does_not_wait(behind: World) -> None:
    for slot in (0, 1):
        lifted = [
            Activation(i, CUT, np.zeros((LENGTH, SHAPE.width), np.float32), np.zeros(1, np.int32))
            for i in range(180)
        ]
        behind.store.replace(f"device-0{slot}", lifted)
    behind.measure(0, 0.15)
    behind.depths()
    (last,) = behind.plans()
    assert float(str(last["bound"])) == pytest.approx(BACKLOG_S / 3)
    assert float(str(last["seconds"])) == pytest.approx(BACKLOG_S / 3, rel=0.01)


def test_the_estimate_knows_the_backlog_and_bounds_stay_bounds(world: World) -> None:
    world.prepare(lifts=BLOCK / 2)
    for slot, block_s in enumerate((8.0, 3.0, 1.0)):
        world.join(slot, block_s, link_s=2.0)
    assert None not in world.depths()
    house = world.assigning._house
    assert house is not None
    rows = world.registry.devices()
    free = house.problem(rows, {row.id: (SAMPLES, SAMPLES * LENGTH) for row in rows})
    assert free.server.backlog == 0
    bps = tuple(device.bps for device in free.devices)
    for waits_s, depths in itertools.product((0, 1, 5, 20, 80), ((1, 1, 1), (1, 2, 3), (3, 3, 3))):
        server = replace(free.server, backlog=waits_s * free.server.flops)
        problem, point = replace(free, server=server), Point(0, depths, bps)
        judged = house.seconds(problem, dict(zip((row.id for row in rows), depths, strict=True)))
        pipeline = Pipeline(problem)
        assert waits_s * (1 - 1e-9) <= pipeline.bound() <= pipeline.floor(point) * (1 + 1e-9)
        assert pipeline.floor(point) <= judged * (1 + 1e-9)
        assert pipeline.estimate(point) == pytest.approx(judged, rel=0.1)


def test_depths_stay_where_others_would_gain_little(world: World) -> None:
    world.prepare(lifts=BLOCK / 2)
    for slot, block_s in enumerate((10.0, 0.1, 0.1)):
        world.join(slot, block_s)
    assert world.depths() == [1, 2, 2]
    world.measure(1, 0.2)
    assert world.depths() == [1, 2, 2]
    assert len(world.plans()) == 2, "it was planned, and the old plan is as good"


def test_a_server_that_starts_again_plans_nothing_by_itself(world: World) -> None:
    world.prepare(lifts=2 * BLOCK)
    for slot in range(3):
        world.join(slot, 0.1)
    assert world.depths() == [3, 3, 3]
    world.assigning = Assigning(world.run, world.registry, world.store, lambda: world.now)
    assert world.depths() == [3, 3, 3]
    assert len(world.plans()) == 1
    world.measure(2, 9.0)
    assert world.depths() == [3, 3, 1]


def test_a_list_of_depths_is_nobodys_business(tmp_path: Path) -> None:
    world = World(tmp_path / "run", DevicesSpec(count=2, depth=(1, 2)))
    with closing(world.registry), closing(world.store):
        world.prepare(lifts=BLOCK)
        world.join(0, 0.1)
        world.join(1, 0.1)
        assert world.depths() == [None, None]


def test_no_device_is_shallower_than_the_least_depth(tmp_path: Path) -> None:
    world = World(tmp_path / "run", DevicesSpec(count=4, least_depth=2, gather_s=60))
    with closing(world.registry), closing(world.store):
        # The server is far faster than they are.
        world.prepare(lifts=1e4 * BLOCK)
        world.join(0, 5.0)
        world.join(1, 5.0, memory=2500)
        world.join(2, 5.0, memory=1500)
        world.clock.now += 60
        assert world.depths() == [2, 2, None, None], "what holds only front 1 is not placed"
        world.join(3, 5.0)
        assert world.depths() == [2, 2, None, 2]


def test_look_says_whether_there_is_a_new_plan(world: World) -> None:
    world.prepare(lifts=2 * BLOCK)
    said = []
    for slot in range(3):
        world.join(slot, 0.1)
        world.now += 60
        said.append(world.assigning.look())
    world.now += 60
    said.append(world.assigning.look())
    world.measure(0, 4.0)
    said.append(world.assigning.look())
    world.now += 60
    said.append(world.assigning.look())
    assert said == [False, False, True, False, False, True], "one comes too early"


def test_forecasts_have_stages_side_by_side_and_follow_depths_and_speeds(world: World) -> None:
    world.prepare(lifts=BLOCK)
    for slot in range(2):
        world.join(slot, 2.0, link_s=3.0)
        world.registry.assign({f"device-0{slot}": slot + 1})

    def told() -> list[Forecast]:
        return foretell(world.registry.devices(), world.run.config, SHAPE, 2 * SHAPE.width)

    first, second = told()
    assert (first.device, first.depth, first.samples) == ("device-00", 1, SAMPLES)
    assert first.tokens == SAMPLES * LENGTH
    assert first.bytes == 2 * SHAPE.width * SAMPLES * LENGTH
    # A few chunks: the link is at work while later ones are computed, and the other way round.
    assert 3 < first.seconds < 2 + 3 - 0.5
    assert 4 < second.seconds < 4 + 3 - 0.5
    world.measure(0, 20.0, link_s=3.0)
    assert 20 < told()[0].seconds < 23


def test_what_status_shows_is_foretold_when_all_have_depths_and_with_every_plan(
    world: World,
) -> None:
    server = _Server(world.run, world.registry, world.store, hide_joins=True)

    def shown() -> float | None:
        (first, *_) = summarize(world.run, world.registry, world.store)["devices"]
        seconds: float | None = first["forecast_seconds"]
        return seconds

    world.prepare(lifts=2 * BLOCK)
    for slot in range(3):
        server._forecast(anew=False)
        assert shown() is None
        world.join(slot, 0.1)
    world.depths()
    server._forecast(anew=False)
    assert shown() == pytest.approx(0.3, rel=0.1)
    world.measure(0, 4.0)
    server._forecast(anew=False)
    assert shown() == pytest.approx(0.3, rel=0.1)
    world.depths()
    server._forecast(anew=True)
    assert shown() == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("rate", [1e-308, 1e308])
def test_no_claim_of_a_device_ends_the_planning(world: World, rate: float) -> None:
    world.prepare(lifts=BLOCK / 2)
    for slot, block_s in enumerate((10.0, 0.1, 0.1)):
        world.join(slot, block_s)
    world.registry.profile("device-02", DeviceProfile(rate, 10_000, rate, 1, ""))
    assert all(depth in range(1, CUT + 1) for depth in world.depths())
    (plan,) = world.plans()
    assert 0 < float(str(plan["bound"])) <= float(str(plan["seconds"])) < math.inf


def test_more_tokens_than_announced_end_nothing(world: World) -> None:
    world.prepare(lifts=BLOCK / 2)
    for slot in range(3):
        world.join(slot, 0.1)
    before = world.depths()
    said = Announcement(SAMPLES, SAMPLES, 0, "0" * 64)
    with world.registry._database.write() as database:
        database.execute(
            "UPDATE devices SET announcement = ? WHERE id = 'device-00'",
            (msgspec.msgpack.encode(said),),
        )
    world.send(0, 50, depth=3)
    world.measure(1, 0.5)
    assert None not in world.depths()
    assert len(before) == 3
    assert len(world.plans()) == 2


def test_an_error_leaves_depths_as_they_are_and_is_tried_again_later(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.prepare(lifts=BLOCK / 2)
    for slot in range(3):
        world.join(slot, 0.1)
    metrics = world.run.root / "metrics.jsonl"
    kept = metrics.read_bytes()
    (world.run.root / "prepared.json").write_text("{")
    assert world.depths() == [None] * 3
    assert "depths stay as they are" in caplog.text
    (world.run.root / "prepared.json").unlink()
    metrics.write_bytes(kept)
    world.prepare(lifts=BLOCK / 2)
    assert None not in world.depths()


def test_who_is_late_moves_nobody_else_for_nothing(tmp_path: Path) -> None:
    world = World(tmp_path / "run", DevicesSpec(count=3, gather_s=60))
    with closing(world.registry), closing(world.store):
        world.prepare(lifts=BLOCK / 2)
        for slot, block_s in ((0, 10.0), (1, 0.1)):
            world.join(slot, block_s)
        world.clock.now += 60
        before = world.depths()
        world.join(2, 0.1)
        after = world.depths()
        assert after[2] is not None
        assert after[0] == before[0]


def test_a_chunk_is_forecast_to_hold_what_a_device_puts_into_it(world: World) -> None:
    config = world.run.config
    tokens = 10 * config.wire.chunk_bytes / (2 * SHAPE.width)
    for bytes_per_token, chunks in ((4 * SHAPE.width, 20), (2 * SHAPE.width, 10), (40.0, 10)):
        assert chunks_of(tokens, config, SHAPE, bytes_per_token) == chunks
    assert chunks_of(0, config, SHAPE, 40.0) == 1
