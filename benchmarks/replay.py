"""A network run beside its simulation with the measured speeds: makespan and bytes.

    python benchmarks/replay.py

Runs `splitfrozen demo` (a server and ten devices as real processes over HTTPS on this machine) and
replays its event log, as `splitfrozen replay` does. Exits with 1 where the makespans are more than
15 % apart or the bytes more than 1 %. A timing: other work on the machine makes it uneven, so the
load before it is written down, too. The result goes to benchmarks/results/replay.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import write

from splitfrozen.runs.demo import demo
from splitfrozen.studies.replay import replay

MAKESPAN = 0.15
BYTES = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="each is judged (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    for number in range(arguments.runs):
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(run_once(Path(scratch) / "demo", arguments.seed))
        row = rows[-1]
        print(
            f"run {number}: measured {row['measured']['makespan_s']:.2f} s, replayed "
            f"{row['replayed']['makespan_s']:.2f} s ({row['difference']['makespan']:+.1%}), "
            f"bytes {row['difference']['bytes']:+.2%}"
        )
    good = all(
        abs(row["difference"]["makespan"]) <= MAKESPAN and abs(row["difference"]["bytes"]) <= BYTES
        for row in rows
    )
    allowed = {"makespan": MAKESPAN, "bytes": BYTES}
    target = write(
        "replay", {"runs": rows, "allowed": allowed, "within": good, "seed": arguments.seed}
    )
    print(f"{'within' if good else 'BEYOND'} what is allowed; written to {target}")
    return 0 if good else 1


def run_once(folder: Path, seed: int) -> dict[str, Any]:
    """One demo; `bytes` compares what the simulator sent with what the devices say they did."""
    load = os.getloadavg()[0]
    summary: dict[str, Any] = demo(folder, seed).data
    found: dict[str, Any] = replay(folder / "run", None, None).data
    sent = sum(device["bytes_up"] for device in summary["devices"])
    difference = {
        "makespan": found["difference"]["makespan"],
        "bytes": found["replayed"]["bytes"] / sent - 1,
    }
    figures = ("measured", "replayed", "forecast", "speeds", "links")
    return {
        **{name: found[name] for name in figures},
        "difference": difference,
        "load_before": load,
        "accuracy_after": summary["accuracy_after"],
    }


if __name__ == "__main__":
    sys.exit(main())
