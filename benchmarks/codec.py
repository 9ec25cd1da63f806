"""Codecs measured: bytes, error, speed and what they cost in accuracy, on MRPC and SST-2.

Needs the data that experiments/compression.toml names, and a MiniLM folder:

    python scripts/public_rows.py
    python benchmarks/codec.py --model path/to/minilm --skip-accuracy
    python benchmarks/codec.py --model path/to/minilm --json

The second takes a minute: each codec on activations at the cut of the held-out rows. Speeds are
float32 bytes over the processor time of one thread, the best of three passes. The third compares
trainings besides: it is `splitfrozen compare experiments/compression.toml`, takes hours on a small
machine and continues where it was stopped. Results go to benchmarks/results/codec.json and
compression.*; --json prints the first.

Side data are fitted on public rows of other data sets, never on rows of the one measured.
Relative error is the size of the error over that of the activations about their mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from environment import minilm, write
from trained import tell

from splitfrozen.config import Config
from splitfrozen.records import Floats
from splitfrozen.rng import stream
from splitfrozen.runs.devices import TorchFront
from splitfrozen.runs.prepare import load_sliced, task_alone
from splitfrozen.runs.sides import computed, unlabelled
from splitfrozen.studies import grid
from splitfrozen.studies.compare import compare
from splitfrozen.threads import one_for_numpy
from splitfrozen.wire.codec import TensorCodec, codec
from splitfrozen.wire.side import Side

ROOT = Path(__file__).resolve().parent
EXPERIMENT = ROOT.parent / "experiments" / "compression.toml"
PAPER = "topk:0.2:8"
MEASURED = (
    *("float16+zstd", "int8", "int8+zstd", "int4:64", "int4:64+zstd"),
    *(PAPER, "topk:0.2:8:token", "topk:0.1:8", "topk:0.4:8"),
    *("ecsq:0.5", "ecsq:0.8", "ecsq:1", "ecsq:1.2", "ecsq:1.5", "ecsq:1.8", "ecsq:2.2"),
)
TOLERATED = 0.02
"""Accuracy that the best codec may lose."""
HELD_ROWS = 300
PASSES = 3


# --- bytes, error, speed -------------------------------------------------------------------------


class Front:
    """The model up to the cut, and the task of a data set."""

    def __init__(self, wanted: Config) -> None:
        sliced = load_sliced(wanted)
        self._task, self._tokenizer = task_alone(wanted, sliced)
        self._front = TorchFront(sliced, wanted.model.cut)
        self._micro_tokens = wanted.train.micro_tokens

    def activations(self, source: str | None, count: int | None = None) -> list[Floats]:
        """Of `count` rows of a file that the experiment names, drawn at random, or of all."""
        assert source is not None, "experiments/compression.toml names it"
        samples = unlabelled(source, self._task, self._tokenizer)
        if count is not None:
            order = stream(0, "held", Path(source).name).permutation(len(samples))[:count]
            samples = [samples[i] for i in sorted(order)]
        return list(computed(self._front, samples, self._micro_tokens)())


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


def losses(tradeoff: Sequence[Mapping[str, Any]], dataset: str) -> dict[str, dict[str, Any]]:
    """By codec: how many times fewer bytes, frames included, and what accuracy that costs.

    `by_seed`: the same of each seed, beside float32's training with that seed.
    """
    exact, *others = (one for one in tradeoff if one["dataset"] == dataset)
    assert exact["method"] == "float32", "experiments/compression.toml has it first"
    return {
        one["method"]: {
            "codec": one["method"],
            "ratio": round(one["times_less"], 2),
            "accuracy_loss": round(exact["accuracy"] - one["accuracy"], 4),
            "by_seed": [
                round(whole - own, 4) for whole, own in zip(exact["each"], one["each"], strict=True)
            ],
        }
        for one in (exact, *others)
    }


def best(found: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The smallest of those whose loss is tolerated; float32 is one of them."""
    good = [one for one in found.values() if one["accuracy_loss"] <= TOLERATED]
    return max(good, key=lambda one: float(one["ratio"]))


# --- all of it -----------------------------------------------------------------------------------


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    one_for_numpy()
    settings = [f"model.name={arguments.model}"]
    experiment = grid.load(EXPERIMENT, settings)
    result: dict[str, Any] = {}
    for dataset in experiment.datasets:
        group = grid.Group(dataset, experiment.partitions[0], experiment.methods[0])
        result[dataset.name] = _bytes(dataset.name, experiment.config(group))
    paper = next(row for row in result["mrpc"]["codecs"] if row["codec"] == PAPER)
    result = {**paper, **result["mrpc"]["limits"], **result}
    if not arguments.skip_accuracy:
        compared: Any = compare(EXPERIMENT, settings, None, ROOT / "results")
        if compared.exit_code:
            sys.exit(compared.text)
        tradeoff = compared.data["tradeoff"]
        found = {one.name: losses(tradeoff, one.name) for one in experiment.datasets}
        result["accuracy_loss"] = found["mrpc"][PAPER]["accuracy_loss"]
        result["best"] = {name: best(own) for name, own in found.items()}
        result["losses"] = {name: list(own.values()) for name, own in found.items()}
        write("codec", result)
    if arguments.json:
        print(json.dumps(result))


def _bytes(name: str, wanted: Config) -> dict[str, Any]:
    """The table of codecs on one data set, told line by line."""
    front = Front(wanted)
    held = front.activations(wanted.task.eval, HELD_ROWS)
    public = front.activations(wanted.wire.public)
    began = time.process_time()
    side = Side.fit(public)
    fit_s = time.process_time() - began
    rows = []
    for chosen in MEASURED:
        rows.append(measure(codec(chosen, side), held))
        tell("  ".join([name, *(f"{value}" for value in rows[-1].values())]))
    about = {"side_bytes": len(side.to_bytes()), "side_fit_s": round(fit_s, 1)}
    return {"codecs": rows, **about, "limits": limits(held)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=minilm(), help="a MiniLM folder")
    parser.add_argument("--skip-accuracy", action="store_true", help="train nothing")
    parser.add_argument("--json", action="store_true", help="print the result")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} is no model folder; see the head of this file")
    return arguments


if __name__ == "__main__":
    main()
