"""Measure A(rho, E): how accurate a model stays when its activations are compressed (SFT, IV-C).

Needs the MRPC folder (train.jsonl with text, text_pair, label) and a MiniLM folder:

    python scripts/measure_surface.py --data ../shared/data/mrpc --model path/to/minilm
    python scripts/measure_surface.py --run path/to/finished/run

The first form trains SplitFrozen once on four fifths of the rows and measures on the rest. The
second measures a finished run, on its `task.eval`. Activations at the cut are computed once; for
each keep rate and number of levels they go through the codec `topk` (section IV-B), and then
through the trained blocks. Points and fit go to benchmarks/results/surface.json, which
experiments/sft.toml reads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from splitfrozen import rng
from splitfrozen.methods.parts import Adapted, Upper
from splitfrozen.model import adapters
from splitfrozen.planning import surface
from splitfrozen.planning.surface import Point, Surface
from splitfrozen.records import Activation, SampleKey, SampleTable
from splitfrozen.runs.devices import TorchFront
from splitfrozen.runs.evaluation import open_samples
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.prepare import load_sliced, to_fastest
from splitfrozen.runs.train import train
from splitfrozen.studies.environment import environment
from splitfrozen.training.batching import split
from splitfrozen.training.evaluate import Evaluator
from splitfrozen.training.precision import resolve
from splitfrozen.wire.codec import codec

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "surface.json"
RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)
LEVELS = (2, 4, 8, 16, 32, 64)

CONFIG = """\
[model]
name = {model}
cut = 2
precision = "float32"

[task]
labels = ["different", "paraphrase"]
columns = {{ pair = "text_pair" }}
max_tokens = 128
eval = "held.jsonl"

[data]
train = "train.jsonl"

[devices]
count = 10

[lora]
rank = 8

[train]
epochs = {epochs}
batch_size = 32
lr = 1e-3

[run]
folder = "run"
seed = {seed}
"""


class Compressed:
    """Activations as the server decodes them; an `EvaluationSource`."""

    def __init__(self, table: SampleTable, items: Sequence[Activation]) -> None:
        self._table = table
        self._items = {item.sample: item for item in items}

    def samples(self) -> SampleTable:
        return self._table

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        return [self._items[key.sample] for key in keys]


class Bench:
    """A finished run of SplitFrozen, and what it is measured on, at the cut."""

    def __init__(self, folder: Path) -> None:
        """Load the model and the adapter of the last epoch, which no held-out row chose.

        Raises RequestError, StoreError, ModelError.
        """
        self.run = RunFolder(folder)
        self.config = self.run.config
        prepared, source = self.run.prepared(), self.config.task.eval
        if prepared is None or source is None or self.config.method.name != "splitfrozen":
            raise SystemExit(f"{folder} is no finished run of splitfrozen with task.eval")
        self._sliced = load_sliced(self.config)
        self._device = to_fastest(self._sliced)
        model = adapters.open_adapter(self._sliced.model, self.run.adapter("last"))
        self._adapted = Adapted(self._sliced, model, self.config.model.name)
        samples = open_samples(source, self.run, prepared)
        self.table = samples.samples()
        keys = [self.table.key(row) for row in range(len(self.table))]
        front, cut = TorchFront(self._sliced, self.config.model.cut), self.config.model.cut
        self.items: list[Activation] = []
        for rows in split(self.table.tokens, self.config.train.micro_tokens):
            members = samples.read([keys[row] for row in rows])
            self.items += [
                Activation(one.id, cut, hidden, one.targets)
                for one, hidden in zip(members, front(members), strict=True)
            ]

    def accuracy(self, items: Sequence[Activation]) -> float:
        """Of the blocks above the cut, on these activations of all rows."""
        measure = Evaluator(
            Upper(self._adapted, self.config.model.cut),
            Compressed(self.table, items),
            self.config.task.kind,
            micro_tokens=self.config.train.micro_tokens,
            dtype=resolve(self.config.model.precision, self._device),
            device=self._device,
        )
        return measure().metrics["accuracy"]


def points(
    items: Sequence[Activation],
    accuracy: Callable[[Sequence[Activation]], float],
    settings: Iterable[tuple[float, int]],
) -> Iterator[Point]:
    """The accuracy for each keep rate and number of levels in `settings`."""
    for rho, levels in settings:
        one = codec(f"topk:{rho:g}:{levels}")
        decoded = (one.decode(one.encode(item.hidden), *item.hidden.shape) for item in items)
        made = [replace(item, hidden=hidden) for item, hidden in zip(items, decoded, strict=True)]
        yield rho, levels, accuracy(made)


def measure(folder: Path, settings: Iterable[tuple[float, int]], data: str) -> Surface:
    """The surface of a finished run; `data` is what it is called after. Raises DataError too."""
    bench = Bench(folder)
    reference = bench.accuracy(bench.items)
    print(f"{len(bench.items)} rows, accuracy {reference:.4f}", flush=True)
    found: list[Point] = []
    for point in points(bench.items, bench.accuracy, settings):
        print("keep rate {:g}, {} levels: {:.4f}".format(*point), flush=True)
        found.append(point)
    about: dict[str, Any] = {
        "rows": len(bench.items),
        "cut": bench.config.model.cut,
        "lora_rank": bench.config.lora.rank,
        "epochs": bench.config.train.epochs,
        "seed": bench.config.run.seed,
        "environment": environment(),
    }
    # Of a folder its parent too: many are called "model".
    name = "/".join(Path(bench.config.model.name).parts[-2:])
    return surface.fit(found, reference, name, data, about)


def trained(arguments: argparse.Namespace, folder: Path) -> Path:
    """Train on four fifths of the rows, the others as `task.eval`; returns the run's folder."""
    with (arguments.data / "train.jsonl").open() as file:
        lines = list(file)
    order = rng.stream(arguments.seed, "held").permutation(len(lines))[: arguments.rows]
    held = len(order) // 5
    for name, part in (("held", order[:held]), ("train", order[held:])):
        (folder / f"{name}.jsonl").write_text("".join(lines[row] for row in part))
    toml = folder / "run.toml"
    name = json.dumps(str(arguments.model.resolve()))
    toml.write_text(CONFIG.format(model=name, seed=arguments.seed, epochs=arguments.epochs))
    print(train(toml).text, flush=True)
    return folder / "run"


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.run or trained(arguments, Path(scratch))
        data = (
            arguments.data.name if arguments.run is None else str(RunFolder(run).config.task.eval)
        )
        found = measure(run, product(RATES, LEVELS), Path(data).name)
    arguments.out.write_bytes(found.to_json())
    print(f"mean squared error of the fit {found.mse:.3g}; written to {arguments.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished run of splitfrozen with task.eval")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/mrpc")
    parser.add_argument("--model", type=Path, default=Path("minilm"))
    parser.add_argument("--rows", type=int, help="take so many of the rows at random")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.run is None:
        for path in (arguments.data / "train.jsonl", arguments.model / "config.json"):
            if not path.is_file():
                parser.error(f"{path} is missing; see the head of this file for what is needed")
    return arguments


if __name__ == "__main__":
    main()
