"""`plan` for SFT: both timescales solved, checked against other ways, and compared with benchmarks.

P1 is solved once, for the channel that the file plans for; then P2 in every round, for the channel
that is drawn for it. docs/planning.md says what is compared and where it differs from the paper.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from splitfrozen import rng
from splitfrozen.disk import explained
from splitfrozen.planning import bandwidth, sft, sft_delay
from splitfrozen.planning.bandwidth import Band, Demand, Reals, least_delay
from splitfrozen.planning.sft import Choice, Grid, Problem
from splitfrozen.planning.sft_delay import System
from splitfrozen.planning.surface import Surface
from splitfrozen.records import Outcome
from splitfrozen.studies import plan_sft_figures as figures
from splitfrozen.studies.plan_file import load, write_result
from splitfrozen.studies.plan_sft_figures import LABELS
from splitfrozen.studies.plan_sft_file import (
    Experiment,
    PaperPart,
    channel,
    problem_of,
    system_of,
    widened,
)
from splitfrozen.studies.plan_sft_text import told

OURS = "sft"
SHARED = (OURS, "equal", "random")
"""Schemes that differ in how bandwidth is shared, and in nothing else."""
P2_INSTANCES = 100
CLOSE = 1e-3
"""Algorithm 3 is to come so close to the exact solution of P2."""
P1_INSTANCES = 20
RATES, FEWER_RATES = 401, 101
"""Keep rates of the grid that P1 is searched over: the file's, and drawn ones."""
LEAST_SHARE, MOST_SHARE = 0.5, 1.5
"""Random bandwidth is in proportion to weights between these: of weights down to 0 the mean delay
would be infinite."""

log = logging.getLogger("splitfrozen.plan")


def plan(source: Path, content: dict[str, Any], out: Path | None) -> Outcome:
    """Solve the problem of a file; with `out`, write figures and data there.

    Raises ConfigError, DataError, PlanError, StoreError.
    """
    spec = load(content, Experiment)
    system = system_of(spec)
    problem = problem_of(spec, system, source.parent)
    choice = _kept(problem, sft.solve(problem))
    log.info("P1 is solved; it is searched for comparison")
    data: dict[str, Any] = {
        "system": spec.system,
        "file": str(source),
        "plan": _planned(spec, system, choice),
        "p1": _p1(spec, problem, choice),
        "p2": _p2(spec, system),
        "rounds": spec.rounds,
        **_compare(spec, system, choice.blocks, choice.ratio),
        **(_beside_paper(spec, problem, spec.paper) if spec.paper else {}),
        "run": _run(spec, choice),
        "planned_for": {"shape": spec.model.shape, "tokens": spec.model.tokens},
    }
    bands = [_over(spec, system, choice, total_hz) for total_hz in spec.figures.total_hz]
    data["band_saved"] = _band_saved(bands)
    shown = {
        "bandwidth": bands,
        "memory": _memory(problem),
        "accuracy": _accuracy(problem, choice),
        "coding": _coding(choice),
    }
    text = told(spec, data)
    if out is not None:
        result = {**data, "figures": shown}
        text += ["", *(f"wrote {path}" for path in _write(source, result, out))]
    return Outcome(data, "\n".join(text))


def _planned(spec: Experiment, system: System, choice: Choice) -> dict[str, Any]:
    """What P1 chooses, and what P2 makes of it in the first round: Hz by device."""
    demand = sft_delay.round_demand(system, choice.blocks, choice.ratio, channel(spec, 0))
    first = bandwidth.exact(demand, system.band)
    names = [device.id for device in system.devices]
    return {
        "rho": choice.rho,
        "levels": choice.levels,
        "blocks": choice.blocks,
        "bandwidth_hz": dict(zip(names, first.band_hz.tolist(), strict=True)),
    }


def _beside_paper(spec: Experiment, problem: Problem, paper: PaperPart) -> dict[str, Any]:
    """What the paper's choice comes to here, its accuracy too, and what the paper reports."""
    ratio, surface = float(problem.ratio(paper.rho, paper.levels)), problem.surface
    return {
        "at_paper_setting": {
            "accuracy": float(surface.accuracy(paper.rho, paper.levels)),
            "measured_accuracy": surface.measured(paper.rho, paper.levels),
            **_compare(spec, problem.system, paper.blocks, ratio),
        },
        "paper": msgspec.to_builtins(paper),
    }


def _run(spec: Experiment, choice: Choice) -> dict[str, Any]:
    """What the plan makes of a run's file; a round is an epoch."""
    codec = f"topk:{choice.rho:.4g}:{choice.levels}"
    return {
        "model": {"cut": choice.blocks},
        "devices": {"count": spec.devices.count, "depth": "auto", "least_depth": None},
        "lora": {"rank": spec.model.rank},
        "train": {"epochs": spec.rounds, "batch_size": spec.model.batch},
        "wire": {"codec": codec},
        "method": {"name": "sft", "local_epochs": 1, "local_steps": None, "gradients": codec},
    }


# --- large timescale -----------------------------------------------------------------------------


def _p1(spec: Experiment, problem: Problem, choice: Choice) -> dict[str, Any]:
    grid = Grid.of(problem, RATES)
    return {
        **_told_choice(choice),
        "bits_per_element": choice.ratio * sft_delay.FLOAT_BITS,
        "least_accuracy": problem.least_accuracy,
        "surface": _fit(problem.surface),
        **_beside(choice, sft.search(problem, grid), sft.lagrange(problem, grid)),
        "drawn": _drawn_gaps(spec, problem),
    }


def _fit(surface: Surface) -> dict[str, Any]:
    """Whose accuracy it is, and how far the surface is from what was measured."""
    return {
        "model": surface.model,
        "data": surface.data,
        "reference": surface.reference,
        "mse": surface.mse,
        "rmse": surface.mse**0.5,
        "largest_residual": float(np.abs(surface.residuals()).max()),
    }


def _beside(choice: Choice, searched: Choice | None, multiplied: Choice | None) -> dict[str, Any]:
    """The exact choice against those of a grid, which may have none."""
    return {
        "gap": searched and choice.delay_s / searched.delay_s - 1,
        "brute_force": searched and _told_choice(searched),
        "algorithm2": multiplied
        and {
            **_told_choice(multiplied),
            "gap": multiplied.delay_s / choice.delay_s - 1,
            "steps": multiplied.steps,
            "settled": multiplied.settled,
        },
    }


def _drawn_gaps(spec: Experiment, problem: Problem) -> dict[str, Any]:
    """How much worse the exact solution is than brute force, and Algorithm 2 than the exact one.

    A grid may miss the best, so the exact solution is allowed to be better; as it could be by
    breaking a constraint, these are looked at.
    """
    gaps, others, settled, blocks = [], [], 0, set()
    for number in range(P1_INSTANCES):
        drawn = _drawn_p1(spec, problem, number)
        grid, solved = Grid.of(drawn, FEWER_RATES), _kept(drawn, sft.solve(drawn))
        searched, multiplied = sft.search(drawn, grid), sft.lagrange(drawn, grid)
        assert searched is not None, "no more is wanted than is had in some corner of the grid"
        gaps.append(solved.delay_s / searched.delay_s - 1)
        blocks.add(solved.blocks)
        if multiplied is not None:
            others.append(_kept(drawn, multiplied).delay_s / solved.delay_s - 1)
            settled += multiplied.settled
    return {
        "instances": P1_INSTANCES,
        "blocks": sorted(blocks),
        "min_gap": min(gaps),
        "max_gap": max(gaps),
        "algorithm2_found": len(others),
        "algorithm2_settled": settled,
        "algorithm2_min_gap": min(others, default=None),
        "algorithm2_max_gap": max(others, default=None),
    }


def _drawn_p1(spec: Experiment, problem: Problem, number: int) -> Problem:
    """P1 with other machines: servers so slow that deep cuts pay, memories that forbid some."""
    draw = rng.stream(spec.seed, "p1", number)
    own = problem.system
    speeds = own.flops * draw.uniform(0.5, 2, len(own.devices))
    least, most = (problem.memory_bytes(blocks) for blocks in problem.bounds.blocks)
    memories = draw.uniform(1.01 * least, 1.2 * most) * draw.uniform(1, 1.5, len(own.devices))
    devices = tuple(
        replace(one, flops=float(flops), memory_bytes=float(memory))
        for one, flops, memory in zip(own.devices, speeds, memories, strict=True)
    )
    server = float(own.flops.sum() * 10 ** draw.uniform(-1.5, 0.5))
    corners = problem.surface.accuracy(*np.meshgrid(problem.bounds.rho, problem.bounds.levels))
    wanted = draw.uniform(corners.min(), corners.max())
    system = replace(own, devices=devices, server_flops=server)
    return replace(problem, system=system, least_accuracy=float(wanted))


def _kept(problem: Problem, choice: Choice) -> Choice:
    """The choice, which keeps the constraints."""
    broken = sft.violated(problem, choice)
    assert broken is None, broken
    return choice


def _told_choice(choice: Choice) -> dict[str, Any]:
    every = asdict(choice)
    return {key: value for key, value in every.items() if key not in ("steps", "settled")}


# --- small timescale -----------------------------------------------------------------------------


def _p2(spec: Experiment, system: System) -> dict[str, Any]:
    """Algorithm 3 against the exact solution."""
    gaps, steps = [], []
    for number in range(P2_INSTANCES):
        demand, band = _drawn_p2(spec, system, number)
        found = bandwidth.successive(demand, band)
        gaps.append(found.delay_s / bandwidth.exact(demand, band).delay_s - 1)
        steps.append(found.steps)
    return {
        "instances": P2_INSTANCES,
        "close": CLOSE,
        "within": sum(abs(gap) <= CLOSE for gap in gaps) / P2_INSTANCES,
        "min_gap": min(gaps),
        "max_gap": max(gaps),
        "mean_steps": sum(steps) / P2_INSTANCES,
    }


def _drawn_p2(spec: Experiment, system: System, number: int) -> tuple[Demand, Band]:
    """A round of 2 to 16 devices that differ by a factor of 10 in speed and by 30 dB."""
    draw = rng.stream(spec.seed, "p2", number)
    count = int(draw.integers(2, 17))
    total_hz = float(10 ** draw.uniform(6, 8))
    first = system.devices[0]
    devices = tuple(
        replace(first, id=f"{place}", flops=float(flops), most_hz=float(part * total_hz))
        for place, (flops, part) in enumerate(
            zip(10 ** draw.uniform(11, 12, count), draw.uniform(0.05, 1, count), strict=True)
        )
    )
    drawn = replace(system, devices=devices, total_hz=total_hz)
    blocks = int(draw.integers(1, system.shape.blocks))
    ratio, snr = 10 ** draw.uniform(-2, 0), 10 ** draw.uniform(0, 3, count)
    return sft_delay.round_demand(drawn, blocks, ratio, snr), drawn.band


def _compare(spec: Experiment, system: System, blocks: int, ratio: float) -> dict[str, Any]:
    """Seconds and bytes of all rounds by scheme, and what SFT saves against each."""
    snr = _channels(spec)
    plain = sft_delay.round_demand(system, blocks, 1.0, snr)
    federated = sft_delay.federated_demand(system, snr)
    every = {
        **_shared(spec, system, sft_delay.round_demand(system, blocks, ratio, snr)),
        "uncompressed": least_delay(plain, system.band),
        "fl": least_delay(federated, system.band),
        "sl": sft_delay.sequential_s(system, blocks, snr),
    }
    first = dict.fromkeys(LABELS, sft_delay.first_round_s(system, blocks))
    first["fl"] = sft_delay.first_round_s(system, system.shape.blocks)
    delays = {scheme: first[scheme] + float(every[scheme].sum()) for scheme in LABELS}
    sent = dict.fromkeys(LABELS, sft_delay.split_bytes(system, blocks, ratio))
    sent["uncompressed"] = sft_delay.split_bytes(system, blocks, 1.0)
    sent["fl"] = sft_delay.federated_bytes(system)
    sent["sl"] = sft_delay.split_bytes(system, blocks, 1.0, sequential=True)
    return {
        "delay_s": delays,
        "bytes": sent,
        "delay_saved": _saved(delays),
        "bytes_saved": _saved(sent),
    }


def _channels(spec: Experiment) -> Reals:
    """Signal-to-noise ratios of all rounds, [T, N]."""
    return np.stack([channel(spec, number) for number in range(spec.rounds)])


def _shared(spec: Experiment, system: System, demand: Demand) -> dict[str, Reals]:
    """Seconds [T] of all rounds, with the bandwidths of P2, and with equal and random ones."""
    count, band = len(system.devices), system.band
    weights = np.stack(
        [
            rng.stream(spec.seed, "shares", number).uniform(LEAST_SHARE, MOST_SHARE, count)
            for number in range(spec.rounds)
        ]
    )
    return {
        OURS: least_delay(demand, band),
        "equal": demand.delays(bandwidth.shares(np.ones(count), band)).max(axis=-1),
        "random": demand.delays(bandwidth.shares(weights, band)).max(axis=-1),
    }


def _saved(values: Mapping[str, float]) -> dict[str, float]:
    return {name: 1 - values[OURS] / value for name, value in values.items() if name != OURS}


# --- what the figures show -----------------------------------------------------------------------


def _over(spec: Experiment, system: System, choice: Choice, total_hz: float) -> dict[str, float]:
    """Figure 9: mean seconds of a round with another bandwidth, shared in three ways; and how long
    it would be if what devices send and are sent by themselves took no time."""
    other = widened(system, total_hz)
    demand = sft_delay.round_demand(other, choice.blocks, choice.ratio, _channels(spec))
    means = {name: float(each.mean()) for name, each in _shared(spec, other, demand).items()}
    return {"total_hz": total_hz, **means, "silent": float(demand.fixed_s.max())}


def _band_saved(rows: list[dict[str, float]]) -> dict[str, Any] | None:
    """What the bandwidths of P2 save against other shares, at the narrowest band of the figure.

    `round`: of a whole round. `communication`: of what the devices' own bandwidth adds to a round;
    computing and the broadcast are not in it.
    """
    if not rows:
        return None
    row = rows[0]
    added = {name: row[name] - row["silent"] for name in SHARED}
    return {
        "total_hz": row["total_hz"],
        "communication": _saved(added),
        "round": _saved({name: row[name] for name in SHARED}),
    }


def _memory(problem: Problem) -> dict[str, Any]:
    """Figure 6: bytes of a device by its blocks; with all of them it is FL's."""
    every = range(1, problem.system.shape.blocks + 1)
    held = min(one.memory_bytes for one in problem.system.devices)
    return {"bytes": [problem.memory_bytes(blocks) for blocks in every], "held": held}


def _accuracy(problem: Problem, choice: Choice) -> dict[str, Any]:
    """Figures 3 and 7: accuracy by keep rate, for the levels that were measured."""
    points = [list(point) for point in problem.surface.points]
    rates = np.linspace(*problem.bounds.rho, 101)
    levels = sorted({point[1] for point in problem.surface.points})
    return {
        "model": problem.surface.model,
        "points": points,
        "rho": rates.tolist(),
        "curves": {str(one): problem.surface.accuracy(rates, one).tolist() for one in levels},
        "reference": problem.surface.reference,
        "least": problem.least_accuracy,
        "chosen": [choice.rho, choice.levels, choice.accuracy],
    }


def _coding(choice: Choice) -> dict[str, float]:
    """Figure 8b: bits an element after each step of the compression.

    One bit of each says whether it is kept, so at keep rate 1 Top-K alone costs more.
    """
    kept, bits = choice.rho, 1 + float(np.log2(choice.levels))
    return {
        "float32": float(sft_delay.FLOAT_BITS),
        "Top-K": 1 + kept * sft_delay.FLOAT_BITS,
        "and quantised": 1 + kept * bits,
        "and coded": choice.ratio * sft_delay.FLOAT_BITS,
    }


# --- files --------------------------------------------------------------------------------------


def _write(source: Path, result: dict[str, Any], out: Path) -> Iterator[Path]:
    """The result with what its figures show, and the figures."""
    path = out / f"{source.stem}.json"
    write_result(path, result)
    yield path
    with explained(out):
        yield from figures.draw(result, out)
