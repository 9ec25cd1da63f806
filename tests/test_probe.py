"""What the probe says of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from splitfrozen.device import probe
from splitfrozen.records import Floats, Sample

SAMPLE = Sample(0, np.zeros(10, np.int32), None, None, np.zeros(1, np.int32), 10)


class Clock:
    """Time that only fakes let pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowFront:
    """Takes the given times, one a pass."""

    depth = 1

    def __init__(self, clock: Clock, seconds: Sequence[float]) -> None:
        self.clock = clock
        self.seconds = list(seconds)
        self.passes = 0

    def __call__(self, batch: Sequence[Sample]) -> list[Floats]:
        self.clock.now += self.seconds[min(self.passes, len(self.seconds) - 1)]
        self.passes += 1
        return [np.zeros((sample.length, 4), np.float32) for sample in batch]


def test_flops_are_the_median_without_the_warm_up() -> None:
    clock = Clock()
    front = SlowFront(clock, [50.0, 0.1, 0.1, 0.1, 0.1, 3.0])
    # 20 tokens x 1000 FLOP in 0.1 s.
    assert probe.measure_flops(front, [SAMPLE, SAMPLE], 1000, clock) == pytest.approx(200_000)
    assert front.passes == 6


def test_a_slow_machine_is_measured_once_and_a_fast_one_not_for_ever() -> None:
    clock = Clock()
    slow, fast = SlowFront(clock, [20.0]), SlowFront(clock, [1e-6])
    assert probe.measure_flops(slow, [SAMPLE], 1000, clock) == pytest.approx(500)
    assert slow.passes == 2
    probe.measure_flops(fast, [SAMPLE], 1000, clock)
    assert fast.passes == 10


@pytest.mark.parametrize(("bps", "largest"), [(1e9, 1 << 20), (4e6, 1 << 18), (2e5, 1 << 14)])
def test_the_uplink_is_measured_within_its_time(bps: float, largest: int) -> None:
    clock, sizes = Clock(), []

    def send(body: bytes) -> None:
        sizes.append(len(body))
        clock.now += 0.02 + 8 * len(body) / bps

    rate = probe.measure_uplink(send, clock)
    assert 0.5 * bps / (1 + bps * 0.02 / (8 * largest)) < rate <= bps
    assert max(sizes) == largest
    assert clock.now < 3


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_memory_is_the_least_of_system_and_control_groups(tmp_path: Path) -> None:
    files = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:  800 kB\n"}
    assert probe.available_memory(tree(tmp_path, files)) == 800 * 1024
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "10\n",
        "sys/fs/cgroup/a/memory.max": "5000\n",
        "sys/fs/cgroup/a/memory.current": "1000\n",
    }
    assert probe.available_memory(tree(tmp_path, files)) == 4000
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "700\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "100\n",
    }
    assert probe.available_memory(tree(tmp_path, files)) == 600


def test_memory_of_a_system_without_proc_is_a_positive_guess(tmp_path: Path) -> None:
    assert probe.available_memory(tmp_path) > 2**20


def test_cores_keep_to_the_quota(tmp_path: Path) -> None:
    everything = probe.cores(tmp_path)
    files = {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}
    assert everything >= 1
    assert probe.cores(tree(tmp_path, files)) == 1


def test_this_machine_answers() -> None:
    assert probe.available_memory() > 2**20
    assert probe.cores() >= 1
    assert "onnxruntime" in probe.platform_text()
