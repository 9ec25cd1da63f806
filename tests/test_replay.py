"""A log replayed at its own speeds, and what is shown of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from splitfrozen.cli import main
from splitfrozen.config import Config, DevicesSpec, ModelSpec, RunSpec, TaskConfig
from splitfrozen.errors import RequestError
from splitfrozen.model.costs import gpt2_small
from splitfrozen.records import (
    Announcement,
    Compute,
    DeviceProfile,
    Event,
    Prepared,
    TaskSpec,
)
from splitfrozen.runs import networklog
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.networklog import EventList, Piece
from splitfrozen.server.registry import Registry
from splitfrozen.simulation import timeline
from splitfrozen.simulation.network import Link, Machine, Network
from splitfrozen.studies.replay import measure, replay, simulate

STEPS = 6


def bare() -> list[Event]:
    """Two devices with some chunks, lifts of the first one's, and training."""
    log = EventList()
    ready = []
    for device, sizes in (("device-00", (4e4, 1e5, 2e4, 9e4, 5e4)), ("device-01", (3e5,))):
        setup = (log.compute((device, "setup", 0), 1.0),)
        pieces = [Piece(i, size / 10, size / 2, size) for i, size in enumerate(sizes)]
        sends = log.pipeline(device, pieces, setup)
        ready += [
            log.compute(("server", "lift", i), sizes[i] / 20, (send,))
            for i, send in enumerate(sends)
            if device == "device-00"
        ] or sends
    last: Sequence[int] = ready
    for step in range(STEPS):
        last = [log.compute(("server", "train", step), 500.0 + step, last)]
    return log.events


MACHINES = {
    "device-00": Machine(1e4),
    "device-00/encode": Machine(1e5),
    "device-01": Machine(3e3),
    "device-01/encode": Machine(1e5),
    "server": Machine(2e3),
}
LINKS = {
    ("device-00", "server"): Link(1e6, latency_s=0.05),
    ("device-01", "server"): Link(3e6),
}


def log_of(events: Sequence[Event]) -> list[Event]:
    """What a run on that network would have measured."""
    found = timeline.replay(events, Network(MACHINES, LINKS))
    times = zip(found.begin.tolist(), found.end.tolist(), strict=True)
    return [
        msgspec.structs.replace(event, begin_s=begin, end_s=end)
        for event, (begin, end) in zip(events, times, strict=True)
    ]


def test_speeds_are_found_again() -> None:
    speeds = measure(log_of(bare()))
    for who, phase in (("device-00", "front"), ("device-01", "front"), ("server", "lift")):
        assert speeds.flops[who, phase] == pytest.approx(MACHINES[who].flops)
    assert speeds.flops["device-00/encode", "encode"] == pytest.approx(1e5)
    several = speeds.links["device-00", "server"]
    assert (several.bps, several.latency_s) == pytest.approx((1e6, 0.05))
    assert speeds.links["device-01", "server"].bps == pytest.approx(3e6)
    assert speeds.links["device-01", "server"].latency_s == 0


def test_a_replay_at_the_measured_speeds_is_the_measured_run() -> None:
    events = log_of(bare())
    real = timeline.measured(events)
    again = simulate(events, measure(events))
    assert again.makespan == pytest.approx(real.makespan)
    assert again.end.tolist() == pytest.approx(real.end.tolist())
    assert again.sent == real.sent == 6e5
    assert all(event.begin_s is None for event in again.events), "times are not carried over"
    assert [msgspec.structs.replace(e, begin_s=None, end_s=None) for e in events] == again.events


def test_a_replay_follows_the_speeds_and_not_the_measured_times() -> None:
    events = log_of(bare())
    speeds = measure(events)
    slow = {
        key: speed / 3 if key == ("server", "train") else speed
        for key, speed in speeds.flops.items()
    }
    again = simulate(events, type(speeds)(slow, speeds.links))
    training = sum(500.0 + step for step in range(STEPS)) / 2e3
    real = timeline.measured(events)
    assert again.makespan == pytest.approx(real.makespan + 2 * training)
    # One slow step among many is their mean in a replay, so the times are not copied.
    late = [msgspec.structs.replace(event) for event in events]
    late[-1] = msgspec.structs.replace(late[-1], end_s=(late[-1].end_s or 0) + 1.0)
    again = simulate(late, measure(late))
    assert again.makespan == pytest.approx(real.makespan + 1.0)
    assert again.end[-2] > timeline.measured(late).end[-2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = RunFolder.create(
        Config(
            model=ModelSpec(name="gpt2", cut=2),
            task=TaskConfig(labels=("a", "b")),
            devices=DevicesSpec(count=2),
            run=RunSpec(folder=str(tmp_path / "run")),
        )
    )
    return folder.root


def write(run: Path, events: Sequence[Event]) -> None:
    lines = [msgspec.json.encode(event) + b"\n" for event in events]
    (run / networklog.LOG).write_bytes(b"".join(lines))


def test_the_command_shows_both_and_draws_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, log_of(bare()))
    out = tmp_path / "out"
    assert main(["replay", str(run), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["difference"]["makespan"] == pytest.approx(0, abs=1e-9)
    assert found["difference"]["bytes"] == 0
    assert found["measured"]["bytes"] == found["replayed"]["bytes"] == 6e5
    assert found["forecast"] is None, "nothing was announced"
    assert found["measured"]["phases"].keys() == {"front", "encode", "activations", "lift", "train"}
    server = next(one for one in found["parties"] if one["who"] == "server")
    assert server["events"] == 5 + STEPS
    assert server["busy_s"] == pytest.approx(3e5 / 20 / 2e3 + 3015 / 2e3)
    assert (out / "gantt.png").read_bytes().startswith(b"\x89PNG")
    for name in ("measured", "replayed"):
        trace = json.loads((out / f"{name}.trace.json").read_text())
        slices = [one for one in trace["traceEvents"] if one["ph"] == "X"]
        assert len(slices) == len(bare())
    assert main(["replay", str(run)]) == 0
    text = capsys.readouterr().out
    assert "makespan s" in text
    assert "+0.0%" in text
    assert "device-01>server" in text


def test_what_cannot_be_replayed_is_told(run: Path) -> None:
    write(run, [])
    with pytest.raises(RequestError, match="empty event log"):
        replay(run, None, None)
    write(run, bare())
    with pytest.raises(RequestError, match="was not measured"):
        replay(run, None, None)


def test_names_are_no_formulas(run: Path, tmp_path: Path) -> None:
    odd = [
        msgspec.structs.replace(event, phase="$\\frac{", who="$\\alpha_{")
        if isinstance(event, Compute)
        else event
        for event in log_of(bare())
    ]
    write(run, odd)
    assert main(["replay", str(run), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "gantt.png").read_bytes().startswith(b"\x89PNG")


def test_work_too_small_to_be_measured_takes_no_time() -> None:
    events = [
        msgspec.structs.replace(event, flops=5e-324) if isinstance(event, Compute) else event
        for event in log_of(bare())
    ]
    assert simulate(events, measure(events)).makespan < timeline.measured(events).makespan


HONEST: dict[str, Any] = {"samples": 100, "tokens": 1000, "flops": 1e9, "uplink_bps": 1e6}


@pytest.mark.parametrize(
    "claim",
    [{"samples": 2**62, "tokens": 2**62}, {"uplink_bps": math.inf}, {"flops": 5e-324}],
    ids=str,
)
def test_what_a_device_claims_does_not_keep_a_run_from_being_replayed(
    run: Path, claim: dict[str, Any]
) -> None:
    write(run, log_of(bare()))
    folder = RunFolder(run)
    folder.report({"event": "shape", "shape": msgspec.to_builtins(gpt2_small())})
    task = TaskSpec(kind="classification", columns={}, labels=("a", "b"), max_tokens=16)
    folder.write_prepared(Prepared(task, None, (), 12, 768, 0, "0" * 64, "float16"))
    with closing(Registry(run)) as registry:
        registry.ensure_slots(2)
        for device, said in (("device-00", HONEST), ("device-01", HONEST | claim)):
            registry.announce(device, Announcement(said["samples"], said["tokens"], 0, "0" * 64))
            registry.profile(device, DeviceProfile(said["flops"], 1, said["uplink_bps"], 1, ""))
        registry.assign({"device-00": 1})
        assert replay(run, None, None).data["forecast"] is not None
        registry.assign({"device-01": 1})
    found = replay(run, None, None).data
    assert found["forecast"] is None
    assert found["difference"] == {"makespan": pytest.approx(0, abs=1e-9), "bytes": 0}
