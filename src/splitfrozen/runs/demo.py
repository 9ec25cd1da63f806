"""`splitfrozen demo`: a server and ten devices on this machine, as real processes over HTTPS.

The model is the small GPT-2 that the package carries; the task asks what has to be done after a
report in its language (see data/village.py). Labels are skewed over the devices (Dirichlet 0.2)
and depths are unequal: three devices run one block, seven run three.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from splitfrozen.data import village
from splitfrozen.data.partition import dirichlet
from splitfrozen.errors import RequestError
from splitfrozen.records import Outcome
from splitfrozen.runs import summary
from splitfrozen.runs.local import run_locally

DEPTHS = (1, 1, 1, 3, 3, 3, 3, 3, 3, 3)
ALPHA = 0.2
TRAIN_ROWS = 1200
EVAL_ROWS = 400

CONFIG = """\
[model]
name = {model}
cut = 3
precision = "float32"

[task]
labels = {labels}
max_tokens = 64
eval = {evaluation}

[devices]
count = {count}
depth = {depths}

[lora]
rank = 8

[train]
epochs = 3
batch_size = 32
lr = 2e-3

[run]
folder = {folder}
seed = {seed}

[server]
host = "127.0.0.1"
port = 0
"""


def demo(folder: Path, seed: int) -> Outcome:
    """Run the whole job and return its summary. Raises RequestError, SplitFrozenError."""
    started = time.monotonic()
    _clear(folder)
    run_toml = write_files(folder, seed)
    data = sorted((folder / "data").glob("device-*.csv"))
    result = run_locally(run_toml, data, folder)
    seconds = time.monotonic() - started
    return Outcome(
        {**result, "seconds": round(seconds, 1)},
        f"{summary.text(result)}\n\nwhole demo: {seconds:.0f} s",
    )


def write_files(
    folder: Path,
    seed: int,
    depths: Sequence[int] = DEPTHS,
    train_rows: int = TRAIN_ROWS,
    eval_rows: int = EVAL_ROWS,
) -> Path:
    """Write the devices' data, the evaluation data and run.toml; return the latter's path."""
    data = folder / "data"
    data.mkdir(parents=True)
    rows = village.task_rows(seed, train_rows + eval_rows)
    train, held_out = rows[:train_rows], rows[train_rows:]
    labels = [village.LABELS.index(row["label"]) for row in train]
    for number, part in enumerate(dirichlet(labels, len(depths), ALPHA, seed)):
        _write_csv(data / f"device-{number:02}.csv", [train[i] for i in part])
    _write_csv(data / "evaluation.csv", held_out)
    run_toml = folder / "run.toml"
    run_toml.write_text(
        CONFIG.format(
            model=json.dumps(str(resources.files("splitfrozen") / "assets" / "demo")),
            labels=json.dumps(list(village.LABELS)),
            evaluation=json.dumps("data/evaluation.csv"),
            count=len(depths),
            depths=list(depths),
            folder=json.dumps("run"),
            seed=seed,
        )
    )
    return run_toml


def _clear(folder: Path) -> None:
    """Remove an earlier demo, and nothing that is not one."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "run.toml").exists() or not (folder / "data").is_dir():
            raise RequestError(
                f"{folder} holds something other than a demo",
                got=", ".join(sorted(path.name for path in folder.iterdir())[:5]),
                allowed="an empty or new folder, or one of an earlier demo",
                remedy="choose another --folder",
            )
        shutil.rmtree(folder)


def _write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
