"""What each part of `ecsq` buys: bits a value at equal error, part by part, and what was left out.

    python scripts/public_rows.py
    python benchmarks/transforms.py --model path/to/minilm --json

Activations of held-out rows at the cut are quantised with one part more in each row of the table;
rows that are left out stand beside what they were added to. Bits are the entropy of the whole
numbers within each class of like spread, of the tokens' gains and of the centres' numbers: what a
perfect coder would send. The last row is what `ecsq` does send. Steps are interpolated to equal
relative errors, that of the activations about their mean. Takes three minutes of a core; the result
goes to benchmarks/results/transforms.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from codec import EXPERIMENT, HELD_ROWS, Front, measure
from environment import minilm, write
from trained import tell

from splitfrozen.records import Floats
from splitfrozen.rng import stream
from splitfrozen.studies import grid
from splitfrozen.wire.codec import codec
from splitfrozen.wire.side import Side, nearest

ERRORS = (0.25, 0.35, 0.45)
STEPS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 1.9, 2.4)
LEAST = -4
"""Half octaves of the spread in steps of the least class that is sent, as in `wire.ecsq`."""
CLASSES = 16
PRICE = 2 * math.log(2) / 12
"""Squared error, in steps, that a bit is worth at high rates."""
LARGEST = 200
"""Steps that a table of counts tells apart."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Way:
    """How activations are quantised.

    Attributes:
        basis: the one that they are written in: that of the model's `channels`, a random
            `rotation` of it, or the Karhunen-Loeve basis of public text (`klt`).
        about: what is subtracted: `nothing`, the `mean` or the nearest of 1,024 `centres`.
        gains: whether classes go by token as well as by channel.
        priced: whether sizes are chosen by what they cost in bits.
        ahead: whether a token is predicted from the one before, a factor for each channel.
        feedback: whether the error of a token is added to the next.
        step_by_gain: a token's step grows with its gain to this power.
    """

    basis: Literal["channels", "rotation", "klt"]
    about: Literal["nothing", "mean", "centres"]
    gains: bool = False
    priced: bool = False
    ahead: bool = False
    feedback: bool = False
    step_by_gain: float = 0.0


PLAIN = Way("channels", "nothing")
KLT = Way("klt", "mean")
CENTRES = Way("klt", "centres")
GAINS = replace(CENTRES, gains=True)
BUILT = replace(GAINS, priced=True)
WAYS = {
    "uniform steps, a class for channels of like spread": PLAIN,
    "+ about the mean of each channel": Way("channels", "mean"),
    "left out: in a random rotation": Way("rotation", "mean"),
    "+ in the Karhunen-Loeve basis": KLT,
    "+ about the nearest of 1,024 centres": CENTRES,
    "+ classes by token": GAINS,
    "+ sizes by their price": BUILT,
    "left out: predicted from the token before": replace(BUILT, ahead=True),
    "left out: errors added to the next token": replace(BUILT, feedback=True),
    "left out: larger steps for louder tokens": replace(BUILT, step_by_gain=0.5),
    "left out: smaller steps for louder tokens": replace(BUILT, step_by_gain=-0.5),
}


# --- what is fitted on public text ---------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    side: Side
    ahead: Floats
    """float32 [D]: what of a token's coefficients about their centre the next token has."""


def fitted(way: Way, public: Sequence[Floats]) -> Fitted:
    """Side data for a way, of activations [T, D] each."""
    if way.basis == "klt":
        side = Side.fit(public) if way.about == "centres" else Side.fit(public, centres=1)
    else:
        side = _about_one(way, np.concatenate(public))
    left = [_about(side, hidden)[1] for hidden in public]
    before = np.concatenate([one[:-1] for one in left])
    after = np.concatenate([one[1:] for one in left])
    ahead = (before * after).sum(axis=0) / np.square(before).sum(axis=0)
    return Fitted(side, ahead.astype(np.float32))


def _about_one(way: Way, public: Floats) -> Side:
    """In the model's own basis or a rotation of it, with one centre."""
    width = public.shape[1]
    basis = np.eye(width, dtype=np.float32)
    if way.basis == "rotation":
        drawn = stream(0, "rotation").standard_normal((width, width))
        basis = np.linalg.qr(drawn)[0].astype(np.float32)
    mean = public.mean(axis=0)
    unit = np.float32(np.sqrt(np.square(public - mean).mean()))
    centre: Floats = (mean if way.about == "mean" else np.zeros_like(mean)) @ basis / unit
    spread = np.sqrt(np.square(public @ basis / unit - centre).mean(axis=0))
    return Side(basis, unit, centre[None], np.rint(2 * np.log2(spread)).astype(np.int8))


def _about(side: Side, hidden: Floats) -> tuple[Ints, Floats]:
    """The centre of each token, and its coefficients about that."""
    coefficients = side.forward(hidden)
    chosen = nearest(coefficients, side.centres)
    return chosen, coefficients - side.centres[chosen]


# --- bits and error ------------------------------------------------------------------------------


def quantised(way: Way, known: Fitted, held: Sequence[Floats], step: float) -> tuple[float, float]:
    """Bits a value, and relative error."""
    side = known.side
    held = sorted(held, key=len, reverse=True)
    pairs = [_about(side, hidden) for hidden in held]
    longest, width = len(held[0]), side.width
    # A token at a time, of all samples that are so long: the one before is decoded by then.
    before, error = np.zeros((2, len(held), width), np.float32)
    counts = np.zeros((CLASSES + 1, 2 * LARGEST + 1), np.int64)
    gains: list[Ints] = []
    off = 0.0
    for place in range(longest):
        now = sum(len(hidden) > place for hidden in held)
        wanted = np.stack([left[place] for _, left in pairs[:now]])
        expected = known.ahead * before[:now] if way.ahead else np.zeros_like(wanted)
        given = wanted - expected + (error[:now] if way.feedback else 0)
        gain = _gains(side, given)
        steps = step * np.exp2(way.step_by_gain * gain / 2).astype(np.float32)[:, None]
        classes = _classes(side, steps, gain if way.gains else np.zeros_like(gain))
        sizes = _sizes(given / steps, classes, priced=way.priced)
        np.add.at(counts, (classes, sizes + LARGEST), 1)
        gains.append(gain)
        shift = 0.07 if way.priced else 0.0
        before[:now] = expected + (sizes - shift * np.sign(sizes)) * steps
        error[:now] = given + expected - before[:now]
        off += float(np.square(wanted - before[:now]).sum())
    values = sum(hidden.size for hidden in held)
    mean = np.concatenate(held).mean(axis=0)
    spread = sum(float(np.square(hidden - mean).sum()) for hidden in held)
    bits = sum(_entropy(row) for row in counts[1:])
    bits += math.log2(len(side.centres)) * values / width
    if way.gains or way.step_by_gain:
        bits += _entropy(np.unique(np.concatenate(gains), return_counts=True)[1])
    return bits / values, math.sqrt(off * float(side.unit) ** 2 / spread)


def _gains(side: Side, given: Floats) -> Ints:
    """Half octaves by which a token is louder than usual."""
    usual = math.sqrt(0.5) * np.exp2(side.spreads / 2).sum()
    ratio = np.abs(given).sum(axis=1) / usual
    gains: Ints = np.clip(np.rint(2 * np.log2(np.maximum(ratio, 2.0**-20))), -4, 34).astype(int)
    return gains


def _classes(side: Side, steps: Floats, gains: Ints) -> Ints:
    """int64 [T, D]: half octaves of the spread in steps; 0 is not sent."""
    octaves = np.rint(2 * np.log2(steps)).astype(int)
    spreads = side.spreads.astype(int) - octaves - LEAST + 1
    found: Ints = np.clip(spreads + gains[:, None], 0, CLASSES)
    return found


def _sizes(scaled: Floats, classes: Ints, *, priced: bool) -> Ints:
    """Whole steps; nothing in class 0."""
    zones = np.full(CLASSES + 1, 0.5)
    if priced:
        # Of Laplace's distribution with the spread of a class: how many are not 0.
        spread = np.exp2((np.arange(CLASSES + 1) - 1 + LEAST) / 2)
        some = np.exp(-0.6 * math.sqrt(2) / spread)
        zones += PRICE / 2 * np.maximum(np.log2((1 - some) / (some / 2)), 0)
    sizes = np.minimum(np.floor(np.abs(scaled) + (1 - zones[classes])), LARGEST)
    found: Ints = np.where(classes > 0, np.copysign(sizes, scaled), 0).astype(int)
    return found


def _entropy(counts: Ints) -> float:
    """Bits of all, were they independent."""
    some = counts[counts > 0]
    return float(-(some * np.log2(some / some.sum())).sum())


# --- all of it -----------------------------------------------------------------------------------


def at_equal_error(points: Sequence[tuple[float, float]]) -> list[float]:
    """Bits at ERRORS, between points of bits and error."""
    bits, errors = np.array(sorted(points, key=lambda point: point[1])).T
    found = np.exp(np.interp(np.log(ERRORS), np.log(errors), np.log(bits)))
    inside = (errors[0] <= np.array(ERRORS)) & (errors[-1] >= np.array(ERRORS))
    if not inside.all():
        raise ValueError(f"errors from {errors[0]} to {errors[-1]} do not reach over {ERRORS}")
    return [round(float(one), 4) for one in found]


def table(front: Front, held_at: str, public_at: str) -> list[dict[str, Any]]:
    """Bits of each way on a data set, told line by line."""
    held = front.activations(held_at, HELD_ROWS)
    public = front.activations(public_at)
    rows = []
    for name, way in WAYS.items():
        known = fitted(way, public)
        points = [quantised(way, known, held, step) for step in STEPS]
        rows.append({"way": name, "bits": at_equal_error(points)})
        tell(rows[-1])
    side = Side.fit(public)
    sent = [measure(codec(f"ecsq:{step:g}", side), held) for step in STEPS]
    points = [(one["bits_per_element"], one["relative_error"]) for one in sent]
    rows.append({"way": "`ecsq` as it is sent", "bits": at_equal_error(points)})
    tell(rows[-1])
    return rows


def main() -> None:
    arguments = _arguments()
    experiment = grid.load(EXPERIMENT, [f"model.name={arguments.model}"])
    result: dict[str, Any] = {"errors": ERRORS, "tables": {}}
    for dataset in experiment.datasets:
        group = grid.Group(dataset, experiment.partitions[0], experiment.methods[0])
        wanted = experiment.config(group)
        assert wanted.task.eval is not None
        assert wanted.wire.public is not None
        found = table(Front(wanted), wanted.task.eval, wanted.wire.public)
        result["tables"][dataset.name] = found
    write("transforms", result)
    if arguments.json:
        print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=minilm(), help="a MiniLM folder")
    parser.add_argument("--json", action="store_true", help="print the result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
