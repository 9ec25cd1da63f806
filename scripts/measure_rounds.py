"""Measure E(r) for FedsLLM's planner: how many rounds a LoRA rank trains to a target loss.

    python scripts/pretrain_gsm8k.py --data ../shared/data/gsm8k/train.jsonl
    python scripts/measure_rounds.py --data ../shared/data/sst2/train.jsonl --text "{text}"

takes half an hour on one core that multiplies bfloat16, and the first script a quarter. Each rank
trains LoRA on the query and value maps of all blocks of a small causal language model, from the
same weights, on the same rows in the same order and at the same learning rate; after every round of
`--local-steps` steps the loss on held-out rows is taken. The scale of LoRA, alpha / r, is the same
for all ranks.

The target is the highest of the lowest losses, so every run gets there, and the rank that is
slowest takes about `--rounds` rounds to it: E of that rank is bounded by `--rounds`, and by how
much E falls with the rank depends on `--rounds`. So E is stored for two easier targets too, where
half and three quarters of the way from the first loss to the target are gone.

The model by default is the one that the first script made from school problems. Text of another
kind than it has seen, such as film reviews, is what adapters have to be trained for. A model with
query, key and value in one map has its key adapted too.

The measurement is noisy. What goes to the planner is a smooth form that is fitted to its means, as
`splitfrozen.planning.rounds` says.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from splitfrozen import rng
from splitfrozen.config import LoraSpec
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel, load_model
from splitfrozen.planning.rounds import fit, rounds_to, target_of
from splitfrozen.studies.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RANKS = (1, 2, 4, 6, 8)
SCALE = 2.0
"""alpha / r."""
TARGETS = (("q_proj", "v_proj"), ("query", "value"), ("c_attn",))
"""Names of the query and value maps in one family of models or another."""
BATCH = 8
ROW = 128
"""Tokens of a row: texts one after the other, cut into rows."""
HELD_OUT = 64
"""Rows."""
EASIER = (0.5, 0.75)
"""Of the way from the first loss to the target: where the easier targets are."""
ABOUT_TARGET = (
    "`target` is the lowest loss of the run that comes least far, so E of the slowest rank is"
    " bounded by `most_rounds`, and the ratios of E depend on that number; `easier` has E for"
    " targets at a part of the way from the first loss to this one"
)
"""What the result says of itself."""


def rows_of(path: Path, template: str, tokenizer: Tokenizer, count: int) -> torch.Tensor:
    """The first `count` rows [count, ROW] of the texts of a file of JSON lines."""
    ids: list[int] = []
    with path.open() as file:
        for line in file:
            ids += tokenizer.encode(template.format(**json.loads(line)) + "\n").ids
            if len(ids) >= count * ROW:
                return torch.tensor(ids[: count * ROW]).view(count, ROW)
    raise SystemExit(f"{path} has {len(ids) // ROW} rows of {ROW} tokens; {count} are needed")


def loss_of(model: PeftModel, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: PeftModel, rows: torch.Tensor) -> float:
    parts = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
    return float(np.mean([loss_of(model, part).item() for part in parts]))


def train(options: argparse.Namespace, rank: int, seed: int, rows: torch.Tensor) -> list[float]:
    """Held-out loss before the first round and after each."""
    sliced = SlicedModel(load_model(str(options.model), "causal_lm", (), seed))
    names = {name.rpartition(".")[2] for name in sliced.linear_maps(0, sliced.block_count)}
    [targets, *_] = [known for known in TARGETS if set(known) <= names]
    model = adapters.attach(sliced, LoraSpec(rank, SCALE * rank, 0.0, targets), 0, seed)
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    optimiser = torch.optim.AdamW(
        adapters.trainable(model).values(), lr=options.rate, weight_decay=0.0
    )
    order = rng.stream(seed, "order")
    losses = [held_out_loss(model, held_out)]
    for _ in range(options.rounds):
        for _ in range(options.local_steps):
            batch = rows[order.choice(len(rows), BATCH, replace=False)]
            torch.autograd.backward(loss_of(model, batch))
            optimiser.step()
            optimiser.zero_grad()
        losses.append(held_out_loss(model, held_out))
    return losses


def measure(options: argparse.Namespace) -> dict[int, list[list[float]]]:
    """Losses of every rank, a list for each seed."""
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    rows = rows_of(options.data, options.text, tokenizer, HELD_OUT + options.rows)
    losses: dict[int, list[list[float]]] = {rank: [] for rank in RANKS}
    for seed, rank in product(range(options.seeds), RANKS):
        begin = time.monotonic()
        losses[rank].append(train(options, rank, seed, rows))
        seconds = time.monotonic() - begin
        ends = f"{losses[rank][-1][0]:.4f} -> {losses[rank][-1][-1]:.4f}"
        print(f"seed {seed}  rank {rank}  loss {ends}  {seconds:.0f} s", flush=True)
    return losses


def estimated(losses: Mapping[int, Sequence[Sequence[float]]], way: float = 1.0) -> dict[str, Any]:
    """E(r) at one target, from what `measure` returns."""
    target = target_of([run for runs in losses.values() for run in runs], way)
    each = {rank: [rounds_to(target, run) for run in runs] for rank, runs in losses.items()}
    fitted = fit({rank: float(np.mean(found)) for rank, found in each.items()})
    return {
        "rounds": {rank: fitted(rank) for rank in losses},
        "fit": asdict(fitted),
        "measured": each,
        "target": target,
    }


def result_of(losses: Mapping[int, Sequence[Sequence[float]]], most_rounds: int) -> dict[str, Any]:
    """E(r) at the target and at the easier ones, and what has to be known of them."""
    return {
        **estimated(losses),
        "easier": {f"{way:g}": estimated(losses, way) for way in EASIER},
        "about_target": ABOUT_TARGET,
        "most_rounds": most_rounds,
        "losses": losses,
    }


def told(name: str, found: Mapping[str, Any]) -> str:
    """What was measured at a target, and fitted to that, for people."""
    each = (
        f"{rank}: {np.mean(found['measured'][rank]):.2f} ({fitted:.2f})"
        for rank, fitted in found["rounds"].items()
    )
    return f"{name}, loss {found['target']:.4f}: rounds by rank (fitted) {', '.join(each)}"


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """How it was measured."""
    return {
        "model": options.model.name,
        # Of a file its folder too: many are called "train.jsonl".
        "data": "/".join(options.data.resolve().parts[-2:]),
        "text": options.text,
        "rows": options.rows,
        "seeds": options.seeds,
        "local_steps": options.local_steps,
        "batch": BATCH,
        "row_tokens": ROW,
        "rate": options.rate,
        "alpha_over_rank": SCALE,
    }


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    measured = result_of(measure(options), options.rounds)
    result = {
        **measured,
        **setting(options),
        "environment": environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(told(f"target, of at most {options.rounds} rounds", measured))
    for way, found in measured["easier"].items():
        print(told(f"{way} of the way there", found))
    print(f"wrote {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON lines")
    add("--text", required=True, help='of a line, by its keys, as in "{text}"')
    add("--model", type=Path, default=ROOT / "runs/gsm8k-llama", help="folder of a causal LM")
    add("--rounds", type=int, default=30)
    add("--local-steps", type=int, default=12, help="as in experiments/fedsllm.toml")
    add("--rate", type=float, default=1e-3)
    add("--seeds", type=int, default=3)
    add("--rows", type=int, default=4000)
    add("--out", type=Path, default=ROOT / "benchmarks/results/rounds.json")
    options = parser.parse_args()
    for path in (options.data, options.model / "tokenizer.json"):
        if not path.is_file():
            parser.error(f"{path} is missing; see the head of this file for what is needed")
    return options


if __name__ == "__main__":
    main()
