"""Write the rows that codecs with side data are fitted to in experiments/compression.toml.

    python scripts/public_rows.py --data ../shared/data

Public means: nobody's secret, and no rows of the data set that is trained on. For each of MRPC and
SST-2 they are drawn from the other one and from GSM8K, in its own form: pairs for MRPC, single
texts for SST-2. They go to benchmarks/results/public/, which git ignores: others' texts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from splitfrozen.disk import write_whole
from splitfrozen.rng import stream

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "benchmarks" / "results" / "public"
EACH = 1000
"""Rows of either source."""

_T = TypeVar("_T")


def main() -> None:
    arguments = _arguments()
    read = {
        name: _rows(arguments.data / name / "train.jsonl") for name in ("mrpc", "sst2", "gsm8k")
    }
    questions = [(row["prompt"], row["completion"]) for row in read["gsm8k"]]
    reviews = [row["text"] for row in read["sst2"]]
    neighbours = list(zip(reviews[::2], reviews[1::2], strict=False))
    pairs = [*_some(questions, 0), *_some(neighbours, 1)]
    texts = [
        *_some([row["text"] for row in read["mrpc"]], 0),
        *(question for question, _ in _some(questions, 1)),
    ]
    TARGET.mkdir(parents=True, exist_ok=True)
    _write("mrpc", [{"text": one, "text_pair": other} for one, other in pairs])
    _write("sst2", [{"text": text} for text in texts])


def _write(name: str, rows: Sequence[dict[str, str]]) -> None:
    order = stream(0, "public").permutation(len(rows))
    path = TARGET / f"{name}.jsonl"
    write_whole(path, "".join(json.dumps(rows[i]) + "\n" for i in order).encode())
    print(f"{len(rows)} rows in {path}")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _some(items: Sequence[_T], number: int) -> list[_T]:
    order = stream(0, "public", number).permutation(len(items))[:EACH]
    return [items[i] for i in order]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="folder of mrpc, sst2 and gsm8k, each with train.jsonl; of gsm8k `prompt` "
        "and `completion` are read (default: %(default)s)",
    )
    arguments = parser.parse_args()
    for name in ("mrpc", "sst2", "gsm8k"):
        path = arguments.data / name / "train.jsonl"
        if not path.is_file():
            parser.error(
                f"{path} is missing; --data names a folder with mrpc, sst2 and gsm8k in it"
            )
    return arguments


if __name__ == "__main__":
    main()
