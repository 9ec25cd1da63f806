"""What this machine can do: speed of the front, memory, uplink, cores.

The planner decides each device's depth from these numbers, so they are measured on what will run
(the probe front, the real connection) and not read from a data sheet.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from splitfrozen import rng
from splitfrozen.records import Front, Sample

Clock = Callable[[], float]

UPLINK_SIZES = (16 * 1024, 64 * 1024, 256 * 1024, 1024 * 1024)
"""Bodies of the uplink measurement; the server takes 1 MiB at most."""

ASSUMED_MEMORY = 1 << 30
"""Memory of a system that does not tell (Windows without a limit): a careful guess."""


def measure_flops(
    front: Front,
    batch: Sequence[Sample],
    flops_per_token: int,
    clock: Clock = time.perf_counter,
    budget_s: float = 1.0,
) -> float:
    """Return FLOP/s of a front on real samples: the median of at most nine timed passes.

    One pass warms up; after that passes follow until `budget_s` is over, at least one.
    """
    front(batch)
    flops = flops_per_token * sum(sample.length for sample in batch)
    seconds: list[float] = []
    while len(seconds) < 9 and (not seconds or sum(seconds) < budget_s):
        start = clock()
        front(batch)
        seconds.append(max(clock() - start, 1e-9))
    return flops / statistics.median(seconds)


def measure_uplink(
    send: Callable[[bytes], None], clock: Clock = time.perf_counter, budget_s: float = 2.0
) -> float:
    """Return bit/s to the server, round trip included as in a real upload.

    Args:
        send: uploads a body and returns when the server has it.
        clock: in seconds.
        budget_s: no larger body is sent once this is over; a slow link costs one small body.
    """
    send(b"\0")  # The handshake is no part of the rate.
    begin = clock()
    rate = 0.0
    for size in UPLINK_SIZES:
        # Random bytes, because a link may compress.
        body = rng.stream(0, "uplink", size).bytes(size)
        start = clock()
        send(body)
        now = clock()
        rate = 8 * size / max(now - start, 1e-9)
        if now - begin + 4 * (now - start) > budget_s:
            break
    return rate


def available_memory(root: Path = Path("/")) -> int:
    """Return bytes that this process may still take: the least of the system's and the cgroups'.

    `root` is where `proc` and `sys` are.
    """
    limits = [limit for limit in (_meminfo(root), *_cgroup_memory(root)) if limit is not None]
    return max(1, min(limits)) if limits else _system_memory()


def cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use, at least 1."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for folder in _cgroups(root):
        quota = _read(folder / "cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit():
            count = min(count, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, count)


def platform_text() -> str:
    """Return system, machine and runtime, for people."""
    return (
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"onnxruntime {ort.__version__}, numpy {np.__version__}"
    )[:200]


def _meminfo(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _cgroup_memory(root: Path) -> Iterator[int]:
    """What is left in each control group around this process (version 2, then version 1)."""
    for folder in _cgroups(root):
        limit, used = _read(folder / "memory.max").strip(), _read(folder / "memory.current")
        if limit.isdigit() and used.strip().isdigit():
            yield int(limit) - int(used)
    old = root / "sys/fs/cgroup/memory"
    limit = _read(old / "memory.limit_in_bytes").strip()
    used = _read(old / "memory.usage_in_bytes").strip()
    if limit.isdigit() and used.isdigit():
        yield int(limit) - int(used)


def _cgroups(root: Path) -> Iterator[Path]:
    """Yield the version 2 control groups of this process, innermost first."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            base = root / "sys/fs/cgroup"
            inside = Path(line[3:].strip().lstrip("/"))
            yield from (base / part for part in (inside, *inside.parents))


def _system_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return ASSUMED_MEMORY


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
