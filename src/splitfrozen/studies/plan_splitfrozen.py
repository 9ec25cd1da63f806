"""`plan` for SplitFrozen itself: depths, codec setting and links for the least makespan.

The plan stands beside what simpler rules take on the same network, each rule with the file's
first codec and with the plan's: the paper's depths, those of `planning.depth`, all devices at
depth 1, all at the cut. How good the planner is, is measured on drawn networks small enough for
brute force ([check]), and how fast, on a cell with many devices and subchannels ([crowd]).
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from splitfrozen.disk import explained
from splitfrozen.planning.depth import assign
from splitfrozen.planning.makespan import Medium, Plan, Subchannels
from splitfrozen.planning.splitfrozen import Found
from splitfrozen.planning.splitfrozen import plan as search
from splitfrozen.records import DeviceProfile, FrontManifest, Outcome
from splitfrozen.runs.summary import table as aligned
from splitfrozen.simulation.experiment import named
from splitfrozen.studies import plan_splitfrozen_figures as figures
from splitfrozen.studies.plan_file import load, write_result
from splitfrozen.studies.plan_splitfrozen_cases import Case, brute_force, crowd, draw
from splitfrozen.studies.plan_splitfrozen_figures import Row
from splitfrozen.studies.plan_splitfrozen_file import (
    MEGA,
    AirPart,
    CheckPart,
    CrowdPart,
    FigurePart,
    PlanFile,
    case_of,
)

WITHIN = 0.01
"""Of brute force: what counts as good."""

log = logging.getLogger("splitfrozen.plan")


# --- rules to compare with -------------------------------------------------------------------


RULES = ("paper's rule", "depth rule", "all at depth 1", "all at the cut")


def ruled(spec: PlanFile, made: Case, codec: str) -> dict[str, Plan]:
    """The plans of simple rules, by rule; a band is divided equally, whatever memory allows."""
    problem = made.problem
    names = [device.id for device in problem.devices]
    bps, channels = _equally(made)
    paper = {name: group.paper_depth for name, group in named(spec.devices)}
    depths = {
        "paper's rule": paper,
        "depth rule": _depth_rule(made, codec, bps),
        "all at depth 1": dict.fromkeys(names, 1),
        "all at the cut": dict.fromkeys(names, problem.cut),
    }
    samples = sum(device.samples for device in problem.devices)
    share = {device.id: device.samples / samples for device in problem.devices}
    return {
        rule: Plan({name: depths[rule][name] for name in names}, codec, bps, share, channels)
        for rule in RULES
    }


def _equally(made: Case) -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
    """Everybody's own link, an equal part of the medium, or subchannels dealt out in turn."""
    devices, air = made.problem.devices, made.problem.air
    if isinstance(air, Medium):
        return {device.id: air.bps / len(devices) for device in devices}, {}
    if isinstance(air, Subchannels):
        dealt = {
            device.id: tuple(range(k, len(air.bps[0]), len(devices)))
            for k, device in enumerate(devices)
        }
        rows = zip(devices, air.bps, strict=True)
        return {d.id: sum(row[i] for i in dealt[d.id]) for d, row in rows}, dealt
    return {device.id: device.bps for device in devices}, {}


def _depth_rule(made: Case, codec: str, bps: Mapping[str, float]) -> dict[str, int]:
    """What `planning.depth` assigns."""
    problem = made.problem
    first = problem.devices[0]
    fronts = [
        FrontManifest(
            depth=depth,
            width=made.setting.shape.width,
            precision="float32",
            hash="0" * 64,
            graph="graph",
            files=(),
            flops_per_token=round(first.front[depth - 1] / first.tokens),
            memory_bytes=round(problem.memory_bytes[depth - 1]),
        )
        for depth in range(1, problem.cut + 1)
    ]
    profiles = {
        device.id: DeviceProfile(
            flops=device.flops,
            memory_bytes=round(min(device.memory_bytes, 2**62)),
            uplink_bps=bps[device.id],
            cores=1,
            platform="",
        )
        for device in problem.devices
    }
    knob = next(knob for knob in problem.knobs if knob.name == codec)
    return assign(profiles, fronts, knob.bytes_per_token)


def plainly(made: Case) -> Case:
    """The same network with the file's first codec only, whatever that loses."""
    first = made.problem.knobs[0]
    problem = replace(made.problem, knobs=(first,), most_loss=first.accuracy_loss)
    return replace(made, problem=problem)


# --- the study -------------------------------------------------------------------------------


def plan(source: Path, table: dict[str, Any], out: Path | None) -> Outcome:
    """Plan the network of a file, and measure the planner as the file asks.

    Raises ConfigError, PlanError, StoreError.
    """
    spec = load(table, PlanFile)
    made = case_of(spec)
    found, _, rows = planned(spec, made)
    paper, depth = rows[1], rows[2]
    data: dict[str, object] = {
        "system": spec.system,
        "file": str(source),
        "plan": as_data(found.plan),
        "makespan_s": found.makespan_s,
        "paper_rule_s": paper.codec_s,
        "depth_rule_s": depth.codec_s,
        "bound_s": found.bound_s,
        "judged": found.judged,
        "plain_codec": plainly(made).problem.knobs[0].name,
        "rules": [asdict(row) for row in rows],
        "run": _run(spec, found.plan),
        "planned_for": {
            "shape": spec.model.shape,
            "tokens": spec.data.tokens,
            "devices": [name for name, _ in named(spec.devices)],
        },
    }
    text = [_plan_text(spec, made, found), "", _rules_text(made, found, rows)]
    if spec.check is not None:
        data["gap"], line = gap(spec.check)
        text += ["", line]
    if spec.crowd is not None:
        data["crowd"], line = _crowded(spec.crowd)
        text += ["", line]
    if out is not None:
        text += ["", *(f"wrote {path}" for path in _write(source, spec, made, found, data, out))]
    return Outcome(data, "\n".join(text))


def _run(spec: PlanFile, chosen: Plan) -> dict[str, object]:
    """What the plan makes of a run's file; its devices are in the order of the plan's file."""
    depths = [chosen.depth[name] for name, _ in named(spec.devices)]
    return {
        "model": {"cut": spec.model.cut},
        "devices": {"count": len(depths), "depth": depths, "least_depth": None},
        "lora": {"rank": spec.model.rank},
        "train": {"epochs": spec.data.epochs, "batch_size": spec.data.batch_size},
        "wire": {"codec": chosen.codec},
        "method": {"name": "splitfrozen", "reuse": spec.data.reuse},
    }


def planned(spec: PlanFile, made: Case) -> tuple[Found, Found, list[Row]]:
    """The plan, that with the first codec only, and rows for them and the rules.

    Raises PlanError.
    """
    found = search(made.problem, made.judge)
    alone = plainly(made)
    without = search(alone.problem, alone.judge)
    rows = [Row("plan", without.makespan_s, found.makespan_s)]
    plain = ruled(spec, made, made.problem.knobs[0].name)
    coded = ruled(spec, made, found.plan.codec)
    rows += [Row(rule, made.judge(plain[rule]), made.judge(coded[rule])) for rule in RULES]
    return found, without, rows


def gap(check: CheckPart) -> tuple[dict[str, object], str]:
    """How far the planner is from brute force on drawn networks, as data and as text."""
    gaps = []
    for number in range(check.instances):
        made = draw(check.seed, number)
        gaps.append(search(made.problem, made.judge).makespan_s / brute_force(made) - 1)
        log.debug("network %d of %d: %+.5f", number + 1, check.instances, gaps[-1])
    data: dict[str, object] = {
        "instances": check.instances,
        "min": min(gaps),
        "max": max(gaps),
        "mean": float(np.mean(gaps)),
        "within_1_percent": float(np.mean(np.abs(gaps) <= WITHIN)),
    }
    line = (
        f"{check.instances} drawn networks: {data['within_1_percent']:.1%} within 1 % of brute"
        f" force, from {min(gaps):+.3%} to {max(gaps):+.3%}, {data['mean']:+.3%} on average"
    )
    return data, line


def _crowded(part: CrowdPart) -> tuple[dict[str, object], str]:
    """A large cell planned, and how long that took."""
    made = crowd(part.seed, part.clients, part.subchannels)
    begin = time.process_time()
    found = search(made.problem, made.judge)
    seconds = time.process_time() - begin
    data: dict[str, object] = {
        "clients": part.clients,
        "subchannels": part.subchannels,
        "cpu_s": seconds,
        "makespan_s": found.makespan_s,
        "bound_s": found.bound_s,
        "judged": found.judged,
    }
    line = (
        f"{part.clients} devices and {part.subchannels} subchannels: planned in {seconds:.2f} s of"
        f" CPU, {found.makespan_s / found.bound_s - 1:.1%} above the bound"
    )
    return data, line


def as_data(found: Plan) -> dict[str, object]:
    """A plan for JSON: everything by device."""
    return {
        "depth": found.depth,
        "codec": dict.fromkeys(found.depth, found.codec),
        "bandwidth": found.bps,
        "batch_share": found.share,
        "subchannels": {name: list(some) for name, some in found.subchannels.items()},
    }


def _plan_text(spec: PlanFile, made: Case, found: Found) -> str:
    header = ("device", "depth", "codec", "Mbit/s", "samples a step", "subchannels")
    rows = [
        (
            name,
            f"{found.plan.depth[name]}",
            found.plan.codec,
            f"{found.plan.bps[name] / MEGA:.1f}",
            f"{found.plan.share[name] * made.flow.batch:.2f}",
            " ".join(map(str, found.plan.subchannels.get(name, ()))) or "-",
        )
        for name, _ in named(spec.devices)
    ]
    beaten = f"{found.makespan_s / found.bound_s - 1:.2%} above what no plan can beat"
    return (
        f"{aligned(header, rows)}\n\nmakespan {found.makespan_s:.4g} s, {beaten} "
        f"({found.bound_s:.4g} s); {found.judged} plans were simulated"
    )


def _rules_text(made: Case, found: Found, rows: list[Row]) -> str:
    header = ("", f"{made.problem.knobs[0].name}: s", f"{found.plan.codec}: s")
    return aligned(header, [(row.rule, f"{row.plain_s:.4f}", f"{row.codec_s:.4f}") for row in rows])


# --- files -----------------------------------------------------------------------------------


def _write(
    source: Path, spec: PlanFile, made: Case, found: Found, data: dict[str, object], out: Path
) -> Iterator[Path]:
    """The result as JSON, both Gantt pictures in one, and the curves with their data."""
    name = source.stem
    path = out / f"{name}.json"
    write_result(path, data)
    yield path
    paper = ruled(spec, made, found.plan.codec)["paper's rule"]
    path = out / f"{name}-gantt.png"
    lines = {"the plan": made.replay(found.plan), "the paper's rule": made.replay(paper)}
    figures.draw_last_steps(lines, [group.name for group in spec.devices], path)
    yield path
    if spec.figure is not None:
        points = list(curve(spec, spec.figure))
        path = out / f"{name}-uplink.png"
        figures.draw_curve(points, spec.codecs[0].name, path)
        yield path
        path = out / f"{name}-uplink.csv"
        with explained(path), path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ("bps", "rule", "plain_s", "codec_s", "plain_bound_s", "bound_s", "codec")
            )
            for at in points:
                ends = (at.plain_bound_s, at.bound_s, at.codec)
                writer.writerows(
                    (at.bps, row.rule, row.plain_s, row.codec_s, *ends) for row in at.rows
                )
        yield path


def curve(spec: PlanFile, figure: FigurePart) -> Iterator[figures.AtRate]:
    """The rows at each uplink rate, the bounds, and the codec that the plan chooses."""
    for bps in figure.bps:
        devices = tuple(
            group if group.bps is None else msgspec.structs.replace(group, bps=bps)
            for group in spec.devices
        )
        air = None if spec.air is None else AirPart(bps * sum(group.count for group in devices))
        at = msgspec.structs.replace(spec, devices=devices, air=air)
        found, plain, rows = planned(at, case_of(at))
        yield figures.AtRate(bps, rows, found.plan.codec, plain.bound_s, found.bound_s)
