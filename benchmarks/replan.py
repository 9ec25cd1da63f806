"""A network run in which a device becomes five times slower half-way: is the new plan kept?

    python benchmarks/replan.py

A server and two devices run on this machine as real processes over HTTPS, with a GPT-2 of random
weights and `depth = "auto"`. A device gets its share of a core by being stopped and continued, ten
times a second; when half of its samples are stored, the first one gets a fifth of that. What is
judged is the time from the new plan until everything is at the cut: at most 1.1 times what the plan
said. A timing: nothing else may run on the machine. The result goes to
benchmarks/results/replan.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from environment import write
from transformers import AutoConfig, AutoModelForSequenceClassification

from splitfrozen.data import village
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.local import join_arguments, process
from splitfrozen.server.store import Store

SHARE = 0.5
"""Of a core, for each device."""
SLOWER = 5
ALLOWED = 1.1
PERIOD_S = 0.1
CONFIG = """\
[model]
name = {model}
cut = 4
precision = "float32"

[task]
labels = {labels}
max_tokens = 64

[devices]
count = 2
depth = "auto"

[wire]
chunk_bytes = 131072

[train]
epochs = 1
batch_size = 64

[run]
folder = "run"

[server]
host = "127.0.0.1"
port = 0
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="their median counts (default: 3)")
    parser.add_argument("--samples", type=int, default=4000, help="of a device (default: 4000)")
    arguments = parser.parse_args()
    rows = []
    for number in range(arguments.runs):
        folder = Path(tempfile.mkdtemp(prefix="replan-"))
        print(f"run {number} in {folder}, which is kept if it fails")
        row = run_once(folder, arguments.samples)
        shutil.rmtree(folder)
        rows.append(row)
        print(
            f"run {number}: depths {row['before']} -> {row['after']}, {row['seconds']:.1f} s after "
            f"the new plan, which said {row['said']:.1f} s ({row['ratio']:.2f})"
        )
    ratio = statistics.median(row["ratio"] for row in rows)
    worst = max(row["ratio"] for row in rows)
    result = {"runs": rows, "ratio": ratio, "worst": worst, "allowed": ALLOWED}
    result["samples"] = arguments.samples
    target = write("replan", result)
    good = ratio <= ALLOWED
    print(
        f"the median {ratio:.2f} is {'within' if good else 'BEYOND'} {ALLOWED}, the largest is "
        f"{worst:.2f}; written to {target}"
    )
    return 0 if good else 1


def run_once(folder: Path, samples: int) -> dict[str, Any]:
    """One run, from the first device to the first step of the training."""
    load = os.getloadavg()[0]
    source = make_files(folder, samples)
    with ExitStack() as stack:
        output = stack.enter_context((folder / "serve.json").open("w"))
        log = stack.enter_context((folder / "serve.log").open("w"))
        command = [sys.executable, "serve", str(source), "--json"]
        server = stack.enter_context(process(command, output, log))
        joins = _poll(lambda: _lines(folder / "run" / "join.txt"))
        shares = []
        for number, join in enumerate(joins):
            state, data = folder / f"state-{number}", folder / f"device-{number}.jsonl"
            device_log = stack.enter_context((folder / f"device-{number}.log").open("w"))
            command = [sys.executable, *join_arguments(join, data, state)]
            device = stack.enter_context(process(command, device_log, device_log))
            shares.append(stack.enter_context(_throttled(device.pid)))
        run = RunFolder(folder / "run")
        half = samples // 2
        with closing(Store(run.store)) as store:
            _poll(lambda: getattr(store.totals().get("device-00"), "samples", 0) >= half)
        slowed = time.time()
        shares[0][0] = SHARE / SLOWER
        began = _poll(lambda: run.events("training"))[-1]["time"]
        plans = run.events("plan")
        server.terminate()
        server.wait(30)
    return {**judged(plans, slowed, began), "load_before": load}


def judged(plans: list[dict[str, Any]], slowed: float, began: float) -> dict[str, Any]:
    """The first plan with other depths, beside what it took until `began`, when training began."""
    before = [one for one in plans if one["time"] <= slowed][-1]
    told = [one for one in plans if one["time"] > slowed and one["depths"] != before["depths"]]
    if not told:
        raise RuntimeError("depths stayed as they were, though a device became slower")
    after = told[0]
    seconds = began - after["time"]
    return {
        "before": before["depths"],
        "after": after["depths"],
        "noticed": after["time"] - slowed,
        "said": after["seconds"],
        "seconds": seconds,
        "ratio": seconds / after["seconds"],
        "plans": plans,
    }


def make_files(folder: Path, samples: int) -> Path:
    """A model, the devices' rows and the run's file."""
    packaged = Path(str(resources.files("splitfrozen") / "assets" / "demo"))
    model = folder / "model"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        packaged, n_embd=512, n_layer=6, n_head=8, n_inner=None, num_labels=len(village.LABELS)
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(packaged / name, model / name)
    rows = [json.dumps(row) + "\n" for row in village.task_rows(0, 2 * samples)]
    for number in range(2):
        (folder / f"device-{number}.jsonl").write_text("".join(rows[number::2]))
    source = folder / "run.toml"
    labels = json.dumps(list(village.LABELS))
    source.write_text(CONFIG.format(model=json.dumps(str(model)), labels=labels))
    return source


@contextmanager
def _throttled(pid: int) -> Iterator[list[float]]:
    """Give a process a share of a core; the list holds the share, which may change."""
    share, done = [SHARE], threading.Event()

    def turn() -> None:
        while not done.is_set():
            os.kill(pid, signal.SIGSTOP)
            done.wait(PERIOD_S * (1 - share[0]))
            os.kill(pid, signal.SIGCONT)
            done.wait(PERIOD_S * share[0])

    def guarded() -> None:
        with suppress(ProcessLookupError):
            turn()

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        yield share
    finally:
        done.set()
        thread.join()


def _poll(look: Any) -> Any:
    """What `look` gives, once it gives something."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.1)
    raise TimeoutError("nothing came in ten minutes; the folder's logs say why")


def _lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
