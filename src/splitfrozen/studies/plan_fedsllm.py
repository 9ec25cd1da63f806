"""`plan` for FedsLLM: the descent checked against other ways, and the paper's figures 5 to 8.

All schemes of a cell start from the same plan, whose subchannels, split and rank are drawn; they
differ in what they may choose anew. docs/planning.md says what differs from the paper.
"""

from __future__ import annotations

import csv
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitfrozen import rng
from splitfrozen.disk import explained
from splitfrozen.planning import fedsllm
from splitfrozen.planning.channel import Allocation, Doubles, Link, shared_out
from splitfrozen.planning.fedsllm import BLOCKS, Block, Plan, Problem, time_s
from splitfrozen.planning.power import Upload, by_bisection, by_convex, end_s
from splitfrozen.records import Outcome
from splitfrozen.studies import plan_fedsllm_figures as drawings
from splitfrozen.studies.plan_fedsllm_file import (
    Experiment,
    alpha_over_rank,
    drawn,
    easier_rounds,
    rounds,
    sized,
    small_instances,
    varied,
)
from splitfrozen.studies.plan_fedsllm_text import told
from splitfrozen.studies.plan_file import load, write_result

OURS = "proposed"
SCHEMES: dict[str, tuple[Block, ...]] = {
    OURS: BLOCKS,
    "a": (),
    "b": ("split", "rank"),
    "c": ("links", "rank"),
    "d": ("links", "split"),
}
"""What each may choose; section VII-C."""
FIGURES = {
    "5": "bandwidth_hz",
    "6": "client_flop_per_cycle",
    "7": "server_hz",
    "8": "client_dbm",
}
"""The paper's figures and the keys that they vary."""
SPREAD = (10, 90)
"""Percentiles over cells that the figures show."""
CONVEX_CELLS = 20
"""Cells in which the convex programme is solved too, beside all small instances."""
EQUAL = 1e-9
"""Delays that differ by less are equal."""
CODECS = {32: "float32", 16: "float16"}
"""By the bits of a value."""

log = logging.getLogger("splitfrozen.plan")


def plan(source: Path, content: dict[str, Any], out: Path | None) -> Outcome:
    """Solve the problem of a file; with `out`, write figures and data there.

    Raises ConfigError, PlanError, StoreError.
    """
    spec = load(content, Experiment)
    given, scale = rounds(spec, source.parent), alpha_over_rank(spec, source.parent)
    delays, chosen = _delays(spec, given)
    [((split, rank), _)] = Counter((one.split, one.rank) for one in chosen).most_common(1)
    data: dict[str, Any] = {
        "system": spec.system,
        "file": str(source),
        "rounds": {str(rank): value for rank, value in given.items()},
        "cells": spec.cells,
        "plan": _planned(drawn(spec, given, 0), chosen[0]),
        **_saved(delays),
        **({"paper_delay_saved": spec.paper.delay_saved} if spec.paper else {}),
        "run": _run(spec, split, rank, scale),
        "planned_for": {
            "shape": spec.model.shape,
            "tokens": spec.model.tokens,
            "besides": _besides(spec),
        },
        "delay_saved_by_target": _saved_by_target(spec, source.parent),
        **_checked(spec, given),
        "large": _large(spec, given),
    }
    data["figures"] = [_figure(spec, given, number) for number in FIGURES]
    claims = {figure["figure"]: _claims(figure) for figure in data["figures"]}
    data["claims"] = {number: {**lie, "all fall": fall} for number, (lie, fall) in claims.items()}
    data["trends"] = {
        figure["figure"]: _trend(figure) for figure in data["figures"] if figure["figure"] in TRENDS
    }
    data["order"] = {number: all(lie.values()) for number, (lie, _) in claims.items()}
    text = told(data, given)
    if out is not None:
        text += "\n\n" + "\n".join(f"wrote {path}" for path in _write(source, data, out))
    return Outcome(data, text)


# --- one cell --------------------------------------------------------------------------------


def plans(spec: Experiment, problem: Problem, number: int) -> dict[str, Plan]:
    """What every scheme chooses in cell `number`."""
    random = rng.stream(spec.seed, "start", number)
    owners = shared_out(problem.main, random), shared_out(problem.federated, random)
    split = int(random.choice(sorted(problem.workloads)))
    rank = int(random.choice(sorted(problem.rounds)))
    start = fedsllm.evenly(problem, owners, split, rank)
    return {name: fedsllm.descend(problem, start, free) for name, free in SCHEMES.items()}


def _delays(spec: Experiment, given: Mapping[int, float]) -> tuple[dict[str, Doubles], list[Plan]]:
    """Delay by scheme, s, and our plan, in all cells."""
    found: dict[str, list[float]] = {name: [] for name in SCHEMES}
    ours: list[Plan] = []
    for number in range(spec.cells):
        problem = drawn(spec, given, number)
        chosen = plans(spec, problem, number)
        ours.append(chosen[OURS])
        for name, one in chosen.items():
            found[name].append(time_s(problem, one))
    return {name: np.array(values) for name, values in found.items()}, ours


# --- the whole study -------------------------------------------------------------------------


def _planned(problem: Problem, chosen: Plan) -> dict[str, object]:
    """The first cell's plan: of each link, whose a subchannel is, and the watts sent on it."""
    return {
        "split": chosen.split,
        "rank": chosen.rank,
        "delay_s": _kept_s(problem, chosen),
        "main": _used(problem.main, chosen.main),
        "federated": _used(problem.federated, chosen.federated),
    }


def _used(link: Link, use: Allocation) -> dict[str, list[Any]]:
    return {"owner": use.owner.tolist(), "watts": (use.psd * link.subchannel_hz).tolist()}


def _kept_s(problem: Problem, chosen: Plan) -> float:
    """How long the training takes by a plan, which keeps the constraints."""
    broken = fedsllm.violated(problem, chosen)
    assert broken is None, broken
    return time_s(problem, chosen)


def _saved(delays: Mapping[str, Doubles]) -> dict[str, object]:
    """By how much less the mean delay is in the setting of the file, and the spread over cells."""
    means = {name: float(values.mean()) for name, values in delays.items()}
    saved = {name: 1 - means[OURS] / mean for name, mean in means.items() if name != OURS}
    low, high = np.percentile(1 - delays[OURS] / delays["a"], SPREAD)
    return {
        "delay_saved": saved["a"],
        "delay_saved_low": float(low),
        "delay_saved_high": float(high),
        "delay_saved_against": saved,
        "delay_s": means,
    }


def _saved_by_target(spec: Experiment, folder: Path) -> dict[str, float]:
    """`delay_saved` with E(r) at easier targets, by the part of the way to the file's own."""
    found = {}
    for way, given in easier_rounds(spec, folder).items():
        delays, _ = _delays(spec, given)
        found[way] = 1 - float(delays[OURS].mean() / delays["a"].mean())
    return found


def _run(spec: Experiment, split: int, rank: int, scale: float) -> dict[str, Any]:
    """What the plan makes of a run's file."""
    steps = {"local_steps": spec.model.local_steps, "local_epochs": None}
    changes: dict[str, Any] = {
        "model": {"cut": split},
        "devices": {"count": spec.cell.clients, "depth": "auto", "least_depth": None},
        "lora": {"rank": rank, "alpha": scale * rank},
        "train": {"batch_size": spec.model.batch},
        "method": {"name": "fedsllm", **steps},
    }
    codec = CODECS.get(spec.model.value_bits)
    if codec:
        # The plan counts so many bits for each value, so nothing may shorten them.
        changes["wire"] = {"codec": codec, "compression": "none"}
        changes["method"]["gradients"] = codec
    return changes


def _besides(spec: Experiment) -> list[str]:
    """What a plan counts on and cannot write into a run's file."""
    # Names of maps differ from model to model, and some models have these and the keys' in one.
    unseen = ["lora.targets; the plan has LoRA on the query and the value maps alone"]
    if spec.model.value_bits not in CODECS:
        unseen.append(
            "wire.codec and method.gradients; the plan has values of"
            f" {spec.model.value_bits} bits each, and a codec is set for"
            f" {' or '.join(map(str, CODECS))} alone"
        )
    return unseen


def _checked(spec: Experiment, given: Mapping[int, float]) -> dict[str, object]:
    """The descent against the optimum, and the two solvers for the power against each other."""
    ours, papers, powers, choices = [], [], [], set[tuple[int, int]]()
    for number, problem in small_instances(spec, given):
        best = fedsllm.optimum(problem)
        choices.add((best.split, best.rank))
        least, greedy = _kept_s(problem, best), fedsllm.solve(problem, search=False)
        ours.append(_kept_s(problem, fedsllm.solve(problem)) / least - 1)
        papers.append(_kept_s(problem, greedy) / least - 1)
        powers.append(_power_gap(spec, fedsllm.activations(problem, best.split, best.rank), number))
    log.info("%d small instances are enumerated", len(ours))
    for number in range(min(spec.cells, CONVEX_CELLS)):
        problem = drawn(spec, given, number)
        uploads = fedsllm.activations(problem, 1, 1), fedsllm.adapters(problem, 1, 1)
        powers += [_power_gap(spec, upload, number) for upload in uploads]
    return {
        "power_gap": max(powers),
        "power_instances": len(powers),
        "descent_gap_mean": float(np.mean(ours)),
        "descent_gap_min": min(ours),
        "descent_gap_max": max(ours),
        "descent_instances": len(ours),
        "descent_choices": len(choices),
        "paper_greedy_gap_mean": float(np.mean(papers)),
        "paper_greedy_gap_min": min(papers),
        "paper_greedy_gap_max": max(papers),
    }


def _power_gap(spec: Experiment, upload: Upload, number: int) -> float:
    """Relative difference of the ends that the two solvers find, for drawn subchannels."""
    owner = shared_out(upload.link, rng.stream(spec.seed, "power", number))
    exact = end_s(upload, by_bisection(upload, owner))
    return abs(end_s(upload, by_convex(upload, owner)) / exact - 1)


def _large(spec: Experiment, given: Mapping[int, float]) -> dict[str, object]:
    """One plan for many; with fading, or there would be nothing to choose but powers."""
    own = sized(spec, spec.large.clients, spec.large.subchannels, rayleigh=True)
    problem = drawn(own, given, 0)
    begin = time.process_time()
    chosen = fedsllm.solve(problem)
    seconds = time.process_time() - begin
    return {
        "clients": problem.main.clients,
        "subchannels": problem.main.subchannels,
        "split": chosen.split,
        "rank": chosen.rank,
        "delay_s": _kept_s(problem, chosen),
        "cpu_s": seconds,
    }


def _figure(spec: Experiment, given: Mapping[int, float], number: str) -> dict[str, Any]:
    """Mean and spread of the delay over the cells, by scheme, at every value of a key."""
    key = FIGURES[number]
    values: Sequence[float] = getattr(spec.figures, key)
    found = [_delays(varied(spec, key, value), given)[0] for value in values]
    log.info("figure %s is computed", number)
    return {
        "figure": number,
        "vary": key,
        "values": list(values),
        "delay_s": {
            name: {
                "mean": [float(one[name].mean()) for one in found],
                "low": [float(np.percentile(one[name], SPREAD[0])) for one in found],
                "high": [float(np.percentile(one[name], SPREAD[1])) for one in found],
            }
            for name in SCHEMES
        },
    }


TRENDS = {
    "5": ("b", "comes nearer"),
    "6": ("c", "comes nearer"),
    "7": ("b", "falls back"),
}
"""Which scheme does what, from the least to the greatest value of a figure; section VII-C."""


def _claims(figure: Mapping[str, Any]) -> tuple[dict[str, bool], bool]:
    """What section VII-C says of how the curves lie, and whether these do, by their means; and
    whether all fall.

    It says the third of figure 7 alone.
    """
    mean = {name: np.array(one["mean"]) for name, one in figure["delay_s"].items()}
    ours, others = mean[OURS], [mean[name] for name in SCHEMES if name != OURS]
    lie = {
        "proposed is least": all(bool(np.all(ours <= other * (1 + EQUAL))) for other in others),
        "a is most": all(bool(np.all(mean["a"] >= other * (1 - EQUAL))) for other in others),
        "d is above b": bool(np.all(mean["d"] > mean["b"])),
    }
    return lie, all(bool(np.all(np.diff(one) <= EQUAL * one[:-1])) for one in mean.values())


def _trend(figure: Mapping[str, Any]) -> dict[str, Any]:
    """What section VII-C says of a scheme's gap to the proposed one, and whether it is so.

    `holds` is judged by seconds, which the paper's figures show; `holds_as_part` by the gap as a
    part of the scheme's own delay. Both gaps are at the least and at the greatest value.
    """
    name, does = TRENDS[figure["figure"]]
    own, ours = (np.array(figure["delay_s"][one]["mean"])[[0, -1]] for one in (name, OURS))
    gap = own - ours
    part = gap / own
    sign = 1 if does == "falls back" else -1
    return {
        "says": f"{name} {does}",
        "holds": bool(sign * (gap[1] - gap[0]) > EQUAL * own.max()),
        "holds_as_part": bool(sign * (part[1] - part[0]) > EQUAL),
        "gap_s": gap.tolist(),
        "gap_part": part.tolist(),
    }


# --- what is written -------------------------------------------------------------------------


def _write(source: Path, data: Mapping[str, Any], out: Path) -> list[Path]:
    """Data with its environment, the curves as CSV, and the picture."""
    paths = [out / f"{source.stem}{ending}" for ending in (".json", ".csv", ".png")]
    write_result(paths[0], data)
    with explained(out):
        with paths[1].open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("figure", "vary", "value", "scheme", "mean_s", "low_s", "high_s"))
            for figure in data["figures"]:
                for name, curve in figure["delay_s"].items():
                    columns = (curve["mean"], curve["low"], curve["high"])
                    for value, *numbers in zip(figure["values"], *columns, strict=True):
                        writer.writerow((figure["figure"], figure["vary"], value, name, *numbers))
        drawings.draw(data, paths[2])
    return paths
