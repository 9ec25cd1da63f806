"""MRPC on ten devices over the network: what the README's table says, measured again.

Needs the MRPC folder (train.jsonl, test.jsonl with text, text_pair, label) and a MiniLM folder:

    python benchmarks/mrpc.py --data ../shared/data/mrpc --model path/to/minilm

Ten device processes and a server run on this machine over HTTPS: cut 2, rank 8, 3 epochs, once
with Dirichlet 0.1 label skew and once IID. The result, with config, seed, environment and curve,
goes to benchmarks/results/mrpc.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from environment import minilm, write

from splitfrozen.data.partition import dirichlet, iid
from splitfrozen.records import Ints
from splitfrozen.runs.local import run_locally

ROOT = Path(__file__).resolve().parent
DEVICES = 10

CONFIG = """\
[model]
name = {model}
cut = 2
precision = "float32"

[task]
labels = ["different", "paraphrase"]
columns = {{ pair = "text_pair" }}
max_tokens = 128
eval = "test.jsonl"

[devices]
count = {devices}
depth = [1, 1, 1, 2, 2, 2, 2, 2, 2, 2]

[lora]
rank = 8

[train]
epochs = 3
batch_size = 32
lr = {lr}

[run]
folder = "run"
seed = {seed}

[server]
host = "127.0.0.1"
port = 0
"""


def main() -> None:
    arguments = _arguments()
    with (arguments.data / "train.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    labels = [row["label"] for row in rows]
    partitions = {
        "dirichlet 0.1": dirichlet(labels, DEVICES, 0.1, arguments.seed),
        "iid": iid(len(rows), DEVICES, arguments.seed),
    }
    results = {}
    for name, parts in partitions.items():
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = run_once(Path(scratch), rows, parts, arguments)
        print(f"{name}: test accuracy {results[name]['accuracy_after']:.4f}")
    difference = abs(results["iid"]["accuracy_after"] - results["dirichlet 0.1"]["accuracy_after"])
    target = write(
        "mrpc",
        {
            "rows": results,
            "difference": difference,
            "config": CONFIG,
            "lr": arguments.lr,
            "seed": arguments.seed,
        },
    )
    print(f"difference {difference:.4f}; written to {target.relative_to(ROOT.parent)}")


def run_once(
    folder: Path,
    rows: list[dict[str, object]],
    parts: list[Ints],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One network run over a partition; returns what the server says of it, and the curve."""
    sources = []
    for number, part in enumerate(parts):
        sources.append(folder / f"device-{number:02}.jsonl")
        sources[-1].write_text("".join(json.dumps(rows[i]) + "\n" for i in part))
    shutil.copy(arguments.data / "test.jsonl", folder)
    run_toml = folder / "run.toml"
    run_toml.write_text(
        CONFIG.format(
            model=json.dumps(str(arguments.model.resolve())),
            devices=DEVICES,
            lr=arguments.lr,
            seed=arguments.seed,
        )
    )
    summary = run_locally(run_toml, sources, folder)
    events = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    return {
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "f1_after": summary["after"]["f1"],
        "devices": summary["devices"],
        "evaluations": [event for event in events if event["event"] in ("baseline", "evaluation")],
        "losses": [round(event["loss"], 4) for event in events if event["event"] == "step"],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared/data/mrpc")
    parser.add_argument("--model", type=Path, default=minilm())
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in (arguments.data / "train.jsonl", arguments.model / "config.json"):
        if not path.is_file():
            parser.error(f"{path} is missing; see the head of this file for what is needed")
    return arguments


if __name__ == "__main__":
    main()
