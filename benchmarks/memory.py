"""Peak memory of real device processes, beside what model.costs predicts.

    python benchmarks/memory.py

Each row is one `splitfrozen join` process against a server on this machine over HTTPS, from its
start to its last acknowledgement; its peak is VmHWM of /proc (Linux only). Two models: the one of
the demo, and four blocks of GPT-2 small's shape with random weights, on MRPC's sentences (a folder
with train.jsonl and one with GPT-2's tokenizer are needed). The result goes to
benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import write
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from splitfrozen.config import load
from splitfrozen.data.readers import read_rows
from splitfrozen.data.tasks import build_samples
from splitfrozen.device.plan import plan_chunks, planned_bytes
from splitfrozen.model import costs
from splitfrozen.model.costs import Tokens
from splitfrozen.records import FrontManifest, Precision, Prepared, Sample
from splitfrozen.runs.demo import write_files
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.local import join_arguments, process
from splitfrozen.runs.prepare import load_sliced
from splitfrozen.wire.codec import codec

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent.parent / "shared/data"
POLL_S = 0.01
WINDOW = 64 * 1024
WITHIN = 0.15

CONFIG = """\
[model]
name = {model}
cut = 3

[task]
labels = ["different", "paraphrase"]
max_tokens = {tokens}

[devices]
count = 1
depth = [{depth}]

[run]
folder = "run"

[server]
host = "127.0.0.1"
port = 0
"""


@dataclass(frozen=True)
class Measured:
    """Peak memory of one device process, and the formula's."""

    measured_bytes: int
    predicted_bytes: int
    manifest_bytes: int
    samples: int
    tokens: int
    longest: int

    @property
    def off(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def main() -> None:
    arguments = _arguments()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "gpt2"
        save_gpt2(model, arguments.tokenizer)
        settings: list[tuple[str, Precision, int, int]] = [
            ("demo", "float32", 3, 64),
            ("demo", "int8", 1, 64),
            ("gpt2", "float32", 1, 128),
            ("gpt2", "float32", 3, 128),
            ("gpt2", "int8", 3, 128),
            ("gpt2", "int8", 1, 32),
            ("gpt2 long", "float32", 3, 512),
        ]
        for number, (name, precision, depth, tokens) in enumerate(settings):
            folder = Path(scratch) / f"{number}"
            folder.mkdir()
            if name == "demo":
                run_toml, data = write_demo(folder, depth, precision)
            else:
                joined = 8 if name == "gpt2 long" else 1
                data = folder / "rows.jsonl"
                data.write_text(text_rows(arguments.data, arguments.rows, joined))
                run_toml = folder / "run.toml"
                config = CONFIG.format(model=json.dumps(str(model)), tokens=tokens, depth=depth)
                run_toml.write_text(with_precision(config, precision))
            result = measure(run_toml, data, folder)
            row = {"model": name, "front": precision, "depth": depth, **vars(result)}
            rows.append({**row, "off": round(result.off, 3)})
            print(
                f"{name:<10}{precision:<8} depth {depth}: {result.measured_bytes / 1e6:6.1f} MB, "
                f"predicted {result.predicted_bytes / 1e6:6.1f} ({result.off:+.1%}), "
                f"manifest {result.manifest_bytes / 1e6:6.1f}",
                flush=True,
            )
    setting = {"rows": arguments.rows, "threads": 1, "within": WITHIN}
    target = write("memory", {"rows": rows, "setting": setting})
    print(f"written to {target.relative_to(ROOT.parent)}")


def measure(run_toml: Path, data: Path, folder: Path) -> Measured:
    """Run a server and one device; the server is ended when the device is done.

    Args:
        run_toml: a run of one device whose folder is `folder / "run"`.
        data: the device's rows.
        folder: gets the logs and the device's state.
    """
    join = folder / "run" / "join.txt"
    with (
        (folder / "serve.log").open("w") as serve_log,
        process([sys.executable, "serve", str(run_toml), "--json"], serve_log, serve_log) as server,
    ):
        while not join.exists() or not join.read_text():
            if server.poll() is not None:
                raise RuntimeError((folder / "serve.log").read_text())
            time.sleep(0.05)
        arguments = join_arguments(join.read_text().split()[0], data, folder / "device")
        with (
            (folder / "device.log").open("w") as log,
            process([sys.executable, *arguments], log, log) as device,
        ):
            peak = peak_bytes(device)
        if device.returncode != 0:
            raise RuntimeError((folder / "device.log").read_text())
    return predict(run_toml, data, peak)


def peak_bytes(child: subprocess.Popen[str]) -> int:
    """Largest resident set of a process, once it has ended; it only grows, so polling sees it."""
    peak = 0
    while child.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
        peak = max(peak, int(found[1]) * 1024) if found else peak
        time.sleep(POLL_S)
    return peak


def predict(run_toml: Path, data: Path, measured: int) -> Measured:
    """Put the formula beside it, for the batches that the device planned of its rows."""
    config = load(run_toml)
    run = RunFolder(config.folder)
    prepared = run.prepared()
    assert prepared is not None
    assert config.devices.depth != "auto"
    front = next(one for one in prepared.fronts if one.depth == config.devices.depth[0])
    samples = _samples(prepared, run, data)
    used = codec(config.wire.name)
    chunks = plan_chunks(
        samples,
        planned_bytes(used, front.width),
        config.wire.chunk_bytes,
        config.run.seed,
        "device-00",
    )
    batches = [
        Tokens.uniform(len(batch), max(samples[i].length for i in batch))
        for chunk in chunks
        for batch in chunk.batches
    ]
    lengths = Tokens.of(sample.length for sample in samples)
    shape = load_sliced(config).shape
    # On this machine's loopback the link is not the slowest part.
    few = costs.held_tokens(shape, config.wire.chunk_bytes, costs.HELD_CHUNKS // 2)
    held = min(few, lengths, key=lambda load: load.tokens)
    weights = resident_bytes(front, shape.vocabulary, samples)
    return Measured(
        measured_bytes=measured,
        predicted_bytes=round(
            max(
                costs.device_memory_bytes(shape, weights, batch, held, lengths) for batch in batches
            )
        ),
        manifest_bytes=front.memory_bytes,
        samples=len(samples),
        tokens=int(lengths.tokens),
        longest=max(sample.length for sample in samples),
    )


def resident_bytes(front: FrontManifest, vocabulary: int, samples: Sequence[Sample]) -> int:
    """Bytes of a front's weights, of its table of embeddings only what the samples look up.

    The kernel maps a file in pieces of WINDOW bytes around what is read.
    """
    total = sum(file.bytes for file in front.files)
    size = {"float32": 4, "float16": 2, "int8": 1}[front.precision]
    row = front.width * size
    if not any(file.bytes == row * vocabulary for file in front.files):
        return total
    seen = np.unique(np.concatenate([sample.tokens for sample in samples])).astype(np.int64)
    windows = np.unique(np.concatenate([seen * row, (seen + 1) * row - 1]) // WINDOW)
    return total - row * vocabulary + min(row * vocabulary, len(windows) * WINDOW)


def _samples(prepared: Prepared, run: RunFolder, data: Path) -> Sequence[Sample]:
    assert prepared.tokenizer is not None
    tokenizer = Tokenizer.from_file(str(run.files / prepared.tokenizer.name))
    rows = read_rows(str(data), prepared.task.columns, report=print)
    return list(build_samples(rows, prepared.task, tokenizer, report=print))


def write_demo(
    folder: Path, depth: int, precision: Precision, rows: int = 1200
) -> tuple[Path, Path]:
    """The demo's task on one device; returns run.toml and the device's rows."""
    run_toml = write_files(folder, seed=0, depths=(depth,), train_rows=rows, eval_rows=40)
    run_toml.write_text(with_precision(run_toml.read_text(), precision))
    return run_toml, folder / "data" / "device-00.csv"


def with_precision(config: str, precision: Precision) -> str:
    return config.replace("[model]\n", f"[model]\nfront = {json.dumps(precision)}\n")


def save_gpt2(folder: Path, tokenizer: Path) -> None:
    """Four blocks of GPT-2 small's shape with random weights, and its tokenizer."""
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(n_layer=4))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def text_rows(data: Path, count: int, joined: int) -> str:
    """Rows of MRPC's sentences, `joined` pairs in each."""
    with (data / "train.jsonl").open() as file:
        pairs = [json.loads(line) for line in islice(file, count * joined)]
    texts = [f"{pair['text']} {pair['text_pair']}" for pair in pairs]
    rows = (
        {"text": " ".join(texts[i : i + joined]), "label": pairs[i]["label"]}
        for i in range(0, len(texts), joined)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=SHARED / "mrpc")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "gpt2_tokenizer")
    parser.add_argument("--rows", type=int, default=400)
    arguments = parser.parse_args()
    for path in (arguments.data / "train.jsonl", arguments.tokenizer / "tokenizer.json"):
        if not path.is_file():
            parser.error(f"{path} is missing; see the head of this file for what is needed")
    return arguments


if __name__ == "__main__":
    main()
