"""Rounding drawn once, or anew for every epoch: is it worth drawing what travels once again?

    python scripts/public_rows.py
    python benchmarks/dither.py --model path/to/minilm --json

A frozen front makes an activation once, so a codec's error is the same in every epoch. Two ways
out are measured. `topk` rounds at random: a server that drew that rounding anew for each epoch
could at best do as well as devices that send anew with another draw, so that is what its training
sees here; the other training sees the first draw in all epochs. `ecsq` rounds to steps, with a zone
about 0 that is wider: subtractive dither, noise that both sides know, is added to what it sends of
a usual token, never to channels of which it sends nothing. The result goes to
benchmarks/results/dither.json; takes half an hour on a core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from codec import EXPERIMENT, PAPER, Front
from environment import minilm, write
from trained import Change, tell, trained

from splitfrozen.config import Config
from splitfrozen.records import Floats, SampleKey
from splitfrozen.rng import stream
from splitfrozen.studies import grid
from splitfrozen.wire.codec import codec
from splitfrozen.wire.side import Side

SEEDS = (0, 1)
NUDGE = 1e-6
"""Relative change of an activation from epoch to epoch: far below a step, and enough for `topk` to
draw its rounding independently."""
STEPS = (0.5, 0.7, 1.0, 1.4)
ROWS = 300


def draws(name: str, *, anew: bool) -> Change:
    """What is decoded of an activation in an epoch."""
    chosen = codec(name)

    def change(_: SampleKey, hidden: Floats, epoch: int) -> Floats:
        nudged = hidden * np.float32(1 + NUDGE * epoch) if anew else hidden
        return chosen.decode(chosen.encode(nudged), *hidden.shape)

    return change


def accuracies(wanted: Sequence[Config], *, anew: bool) -> list[float]:
    found = []
    for one in wanted:
        found.append(trained(one, change=draws(PAPER, anew=anew))["accuracy"])
        tell(f"{Path(one.task.eval or '').parent.name}, anew {anew}: {found[-1]:.4f}")
    return found


def dithered(side: Side, held: Sequence[Floats]) -> list[dict[str, float]]:
    """Bits a value and relative error of `ecsq` by step, plain and with subtractive dither."""
    mean = np.concatenate(held).mean(axis=0)
    spread = sum(float(np.square(hidden - mean).sum()) for hidden in held)
    rows = []
    for step in STEPS:
        chosen = codec(f"ecsq:{step:g}", side)
        row = {"step": step}
        # Those whose spread is a quarter of a step or more, as in `wire.ecsq`.
        sent = np.exp2(side.spreads.astype(np.float32) / 2) >= np.float32(step / 4)
        for name, size in (("plain", 0.0), ("dithered", step)):
            bits = off = 0.0
            for number, hidden in enumerate(held):
                # Of the coefficients, so that it is as wide as what they are rounded to.
                draw = stream(0, "dither", number).random(hidden.shape, np.float32)
                wide = (draw - np.float32(0.5)) * np.float32(size * side.unit) * sent
                noise: Floats = (wide @ side.basis.T).astype(np.float32)
                payload = chosen.encode(hidden + noise)
                bits += 8 * len(payload)
                decoded = chosen.decode(payload, *hidden.shape) - noise
                off += float(np.square(decoded - hidden).sum())
            row[f"{name}_bits"] = round(bits / sum(hidden.size for hidden in held), 4)
            row[f"{name}_error"] = round((off / spread) ** 0.5, 4)
        tell(row)
        rows.append(row)
    return rows


def main() -> None:
    arguments = _arguments()
    result: dict[str, Any] = {"ecsq": {}, "topk": {PAPER: {}}}
    experiment = grid.load(EXPERIMENT, [f"model.name={arguments.model}"])
    for dataset in experiment.datasets:
        group = grid.Group(dataset, experiment.partitions[0], experiment.methods[0])
        wanted = [
            experiment.config(group, {"run": {"seed": seed}, "train": {"lr": arguments.lr}})
            for seed in SEEDS
        ]
        front = Front(wanted[0])
        held = front.activations(wanted[0].task.eval, ROWS)
        side = Side.fit(front.activations(wanted[0].wire.public))
        result["ecsq"][dataset.name] = dithered(side, held)
        if wanted[0].train.epochs == 1:
            continue  # Nothing is seen twice.
        once, anew = (accuracies(wanted, anew=anew) for anew in (False, True))
        gained = [round(new - old, 4) for old, new in zip(once, anew, strict=True)]
        told = {"once": once, "anew": anew, "gained": gained}
        result["topk"][PAPER][dataset.name] = told
    write("dither", {**result, "lr": arguments.lr, "seeds": SEEDS})
    if arguments.json:
        print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=minilm(), help="a MiniLM folder")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--json", action="store_true", help="print the result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
