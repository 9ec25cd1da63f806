"""FedsLLM beside centralised LoRA on a small causal model, in the same order (its Table IV).

    python scripts/pretrain_gsm8k.py --data ../shared/data/gsm8k/train.jsonl
    python benchmarks/perplexity.py --json

Every batch holds eight samples of each of four clients; centralised training takes the very same
batches. What differs is that a client's adapters see its own gradient alone, have moments of their
own, and are averaged after a step, or after ten. All codecs are exact and nothing is dropped.
The result goes to benchmarks/results/perplexity.json; takes half an hour on a core.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from functools import partial
from pathlib import Path

from environment import write
from trained import tell, trained

from splitfrozen import config
from splitfrozen.training.orders import DeviceOrder

ROOT = Path(__file__).resolve().parents[1]
CLIENTS, BATCH = 4, 8
RANKS = (1, 2, 4, 8)
LOCAL_STEPS = (1, 10)
PAPER = 0.001
"""The largest difference in the paper's Table IV."""

CONFIG = """\
[model]
name = {model}
cut = 3
precision = "float32"

[task]
kind = "causal_lm"
template = "Question: {{prompt}}\\nAnswer: "
max_tokens = 256
eval = {held}

[data]
train = {train}
rows = {rows}

[devices]
count = {clients}

[lora]
rank = {rank}

[train]
epochs = 1
batch_size = {batch}
lr = {lr}
micro_tokens = 2048

[method]
name = "{method}"
{local_steps}
"""


def perplexity(
    arguments: argparse.Namespace, method: str, rank: int, local_steps: int | None
) -> float:
    """Of the held-out rows, after training."""
    central = method == "centralized"
    text = CONFIG.format(
        model=json.dumps(str(arguments.model.resolve())),
        held=json.dumps(str((arguments.data / "test.jsonl").resolve())),
        train=json.dumps(str((arguments.data / "train.jsonl").resolve())),
        rows=arguments.rows,
        clients=CLIENTS,
        rank=rank,
        # As many steps, which the schedule of the learning rate counts.
        batch=CLIENTS * BATCH if central else BATCH,
        lr=arguments.lr,
        method=method,
        local_steps="" if local_steps is None else f"local_steps = {local_steps}",
    )
    wanted = config.complete(tomllib.loads(text), Path("run.toml"))
    order = partial(DeviceOrder, seed=wanted.run.seed, batch_size=BATCH)
    return trained(wanted, order=order, held=arguments.held)["perplexity"]


def main() -> None:
    arguments = _arguments()
    rows = []
    for rank in RANKS:
        central = perplexity(arguments, "centralized", rank, None)
        row: dict[str, float] = {"rank": rank, "centralized": central}
        for steps in LOCAL_STEPS:
            own = perplexity(arguments, "fedsllm", rank, steps)
            row[f"fedsllm_{steps}"] = own
            row[f"difference_{steps}"] = own - central
        rows.append(row)
        tell(row)
    worst = {
        f"worst_{steps}": max(abs(row[f"difference_{steps}"]) for row in rows)
        for steps in LOCAL_STEPS
    }
    result = {
        "rows": rows,
        **worst,
        "paper": PAPER,
        "lr": arguments.lr,
        "config": CONFIG,
        "rows_trained": arguments.rows,
    }
    write("perplexity", result)
    if arguments.json:
        print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "gsm8k-llama")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "gsm8k")
    parser.add_argument("--rows", type=int, default=2048, help="to train on")
    parser.add_argument("--held", type=int, default=400, help="rows to measure on")
    parser.add_argument("--lr", type=float, default=4e-4, help="the paper's")
    parser.add_argument("--json", action="store_true", help="print the result")
    arguments = parser.parse_args()
    for path in (arguments.model / "config.json", arguments.data / "train.jsonl"):
        if not path.is_file():
            parser.error(f"{path} is missing; see the head of this file for what is needed")
    return arguments


if __name__ == "__main__":
    main()
