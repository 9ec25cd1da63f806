"""How long FedsLLM's planner takes for 100 clients on 100 subchannels a link.

    python benchmarks/planner.py --json

Plans the instance of [large] in experiments/fedsllm.toml several times. CPU seconds are beside the
seconds because they depend less on who else uses the machine. With --json it prints the result;
without, it writes benchmarks/results/planner.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from environment import ROOT, write

from splitfrozen.config import read_toml
from splitfrozen.planning import fedsllm
from splitfrozen.studies.plan_fedsllm import large_instance
from splitfrozen.studies.plan_fedsllm_file import Experiment
from splitfrozen.studies.plan_file import load

EXPERIMENT = ROOT.parent / "experiments" / "fedsllm.toml"
TIMES = 5
LIMIT_S = 5.0
ROUNDS = {1: 40.0, 2: 30.0, 4: 25.0, 6: 23.0, 8: 22.0}
"""E(r): any that falls with the rank costs the planner as much as any other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    problem = large_instance(load(read_toml(EXPERIMENT), Experiment), ROUNDS)
    seconds, cpu = [], []
    for _ in range(TIMES):
        begin, began = time.perf_counter(), time.process_time()
        plan = fedsllm.solve(problem)
        seconds.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - began)
    result: dict[str, object] = {
        "clients": problem.main.clients,
        "subchannels": problem.main.subchannels,
        "seconds": round(statistics.median(seconds), 3),
        "cpu_seconds": round(statistics.median(cpu), 3),
        "limit_s": LIMIT_S,
        "violated": fedsllm.violated(problem, plan),
        "split": plan.split,
        "rank": plan.rank,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(" ".join(f"{key} {value}" for key, value in result.items()))
        write("planner", result)


if __name__ == "__main__":
    main()
