"""A run's events on another network."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from splitfrozen.errors import ConfigError, RequestError, StoreError
from splitfrozen.records import Compute, Event, Send
from splitfrozen.studies.replay import replay

NETWORK = """\
[server]
flops = 100.0

[link]
bps = 80.0
latency_s = 1.0

[[devices]]
name = "slow"
count = 1
flops = 10.0

[[devices]]
name = "fast"
count = 1
flops = 40.0
efficiency = 0.5
"""
EVENTS: list[Event] = [
    Compute(0, "device-00", "setup", 0, 1.0, (), 0.0, 5.0),
    Compute(1, "device-00", "front", 0, 100.0, (0,), 5.0, 6.0),
    Compute(2, "device-00/encode", "encode", 0, 1e6, (1,), 6.0, 7.0),
    Send(3, "device-00", "server", "activations", 0, 50.0, (2,), 7.0, 8.0),
    Compute(4, "device-01", "front", 0, 100.0, (), 0.0, 1.0),
    Send(5, "device-01", "server", "activations", 0, 100.0, (4,), 1.0, 2.0),
    Compute(6, "server", "train", 0, 200.0, (3, 5), 8.0, 9.0),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [msgspec.json.encode(event) for event in EVENTS]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "network.toml").write_text(NETWORK)
    return tmp_path


def test_the_times_are_those_of_the_network(run: Path) -> None:
    data = replay(run, run / "network.toml", run / "out").data
    # Device 0: 100 / 10 s, then 50 x 8 / 80 s and 1 s; device 1 is ready after 5 + 10 + 1 s.
    assert data["makespan_s"] == pytest.approx(16.0 + 200 / 100)
    assert data["bytes"] == 150
    drawn = {path.name for path in (run / "out").iterdir()}
    assert drawn == {"gantt.png", "trace.json", "events.csv"}


def test_what_has_no_times_is_replayed_alike(run: Path) -> None:
    before = replay(run, run / "network.toml", None).data
    bare = [msgspec.structs.replace(event, begin_s=None, end_s=None) for event in EVENTS]
    lines = [msgspec.json.encode(event) for event in bare]
    (run / "events.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert replay(run, run / "network.toml", None).data == before


def test_a_slower_link_takes_longer(run: Path) -> None:
    (run / "slow.toml").write_text(NETWORK.replace("bps = 80.0", "bps = 8.0"))
    slow = replay(run, run / "slow.toml", None).data["makespan_s"]
    assert slow == pytest.approx(5 + 100 + 1 + 2)


def test_another_number_of_devices_is_refused(run: Path) -> None:
    (run / "network.toml").write_text(NETWORK.replace("count = 1", "count = 2", 1))
    with pytest.raises(RequestError, match="got 3 devices; allowed: 2"):
        replay(run, run / "network.toml", None)


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(run: Path) -> None:
    with pytest.raises(StoreError, match="out"):
        replay(run, run / "network.toml", run / "network.toml" / "out")


def test_an_unknown_key_is_named(run: Path) -> None:
    (run / "network.toml").write_text(NETWORK.replace("bps", "bsp"))
    with pytest.raises(ConfigError, match=r"link\.bsp"):
        replay(run, run / "network.toml", None)


def test_what_has_no_devices_needs_none(run: Path) -> None:
    alone = Compute(0, "server", "forward", 0, 200.0)
    (run / "events.jsonl").write_bytes(msgspec.json.encode(alone) + b"\n")
    assert replay(run, run / "network.toml", None).data["makespan_s"] == 2.0
