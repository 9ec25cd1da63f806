"""How fast a timeline is replayed, and in how much memory.

    python benchmarks/simulator.py

A step is, for each device, one Compute and the Send that waits for it, then the server's forward
and backward, which wait for all devices; the next step's Computes wait for nothing but their own
device, as in SplitFrozen's pipeline. Devices differ in speed, so that they send at different times.
Each case runs in a fresh process; seconds and memory include making the events. CPU seconds are
beside them because they depend less on who else uses the machine. The results go to
benchmarks/results/simulator.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

from environment import write

from splitfrozen.records import Compute, Event, Send
from splitfrozen.simulation.network import Link, Machine, Network
from splitfrozen.simulation.timeline import replay

CASES = [
    (devices, steps, kind)
    for devices, steps in ((10, 1_000), (1_000, 100), (10_000, 50), (10_000, 100))
    for kind in ("dedicated", "shared")
]


def main() -> None:
    if len(sys.argv) > 1:
        devices, steps, kind = sys.argv[1:]
        print(json.dumps(case(int(devices), int(steps), kind)))
        return
    rows = []
    for one in CASES:
        command = [sys.executable, __file__, *map(str, one)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    write("simulator", {"rows": rows})


def case(devices: int, steps: int, kind: str) -> dict[str, object]:
    """Replay one case and say what it took."""
    network = Network(
        machines={"server": Machine(1e15)}
        | {f"d{d}": Machine(1e12 * (1 + d % 97 / 100)) for d in range(devices)},
        links={
            ("device", "server"): Link(1e9)
            if kind == "dedicated"
            else Link(1e9 * devices, shared="cell")
        },
    )
    begin, cpu = time.perf_counter(), time.process_time()
    timeline = replay(events(devices, steps), network)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "devices": devices,
        "steps": steps,
        "links": kind,
        "events": len(timeline.events),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "cpu_us_per_event": round(1e6 * cpu / len(timeline.events), 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "makespan_s": timeline.makespan,
    }


def events(devices: int, steps: int) -> Iterator[Event]:
    number = 0
    for step in range(steps):
        sends = []
        for device in range(devices):
            who = f"d{device}"
            yield Compute(number, who, "front", step, 1e10)
            yield Send(number + 1, who, "server", "activations", step, 1e6, (number,))
            sends.append(number + 1)
            number += 2
        yield Compute(number, "server", "forward", step, 1e12, tuple(sends))
        yield Compute(number + 1, "server", "backward", step, 2e12, (number,))
        number += 2


if __name__ == "__main__":
    main()
