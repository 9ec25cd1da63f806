"""How fast a device computes its front, against the same blocks in torch eager.

    python benchmarks/front.py

front(3) of a model with GPT-2 small's shape and random weights, 8 samples of 128 tokens, one
thread. The sides take turns, round by round; the figure is the median of the rounds. The result
goes to benchmarks/results/front.json.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from environment import write
from transformers import GPT2Config, GPT2LMHeadModel

from splitfrozen.device.front import OnnxFront
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.model.export import export_front
from splitfrozen.records import Precision, Sample

DEPTH, BATCH, TOKENS, ROUNDS = 3, 8, 128, 15
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sliced = SlicedModel(GPT2LMHeadModel(GPT2Config()))
    ids = np.random.default_rng(0).integers(1, 50_000, (BATCH, TOKENS))
    samples = [
        Sample(i, row.astype(np.int32), None, None, np.zeros(1, np.int32), TOKENS)
        for i, row in enumerate(ids)
    ]
    front = sliced.front(DEPTH)
    inputs = (torch.from_numpy(ids), torch.ones(BATCH, TOKENS, dtype=torch.int64))

    def eager() -> object:
        with torch.no_grad():
            return front(*inputs)

    sides: dict[str, Callable[[], object]] = {"torch eager float32": eager}
    megabytes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for precision in PRECISIONS:
            manifest = export_front(sliced, DEPTH, precision, Path(scratch))
            onnx = OnnxFront(manifest, Path(scratch), threads=1)
            sides[f"onnx {precision}"] = partial(onnx, samples)
            megabytes[precision] = round(sum(file.bytes for file in manifest.files) / 1e6, 1)
        seconds = measure(sides)
    base = seconds["torch eager float32"]
    rows = {
        name: {"ms": round(s * 1e3, 1), "times_as_fast": round(base / s, 2)}
        for name, s in seconds.items()
    }
    setting = {"depth": DEPTH, "batch": BATCH, "tokens": TOKENS, "rounds": ROUNDS, "threads": 1}
    write("front", {"rows": rows, "download_mb": megabytes, "setting": setting})
    for name, row in rows.items():
        print(f"{name:<20} {row['ms']:>7.1f} ms  {row['times_as_fast']:.2f} x")
    print(f"download: {megabytes} MB")


def measure(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each side; every round runs each side once."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 2):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if turn >= 2:
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
