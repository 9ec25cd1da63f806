"""What `plan` tells of SFT, for people: its result as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from splitfrozen.runs.summary import table
from splitfrozen.studies.plan_sft_figures import LABELS
from splitfrozen.studies.plan_sft_file import Experiment


def told(spec: Experiment, data: Mapping[str, Any]) -> list[str]:
    """Lines of the study's result."""
    own, there = spec.paper, data["at_paper_setting"]
    return [
        *_p1(spec, data["p1"]),
        *_p2(spec, data),
        "",
        f"{data['rounds']} rounds as planned, the channel of each drawn anew:",
        _table(data, own.minutes, beside=False),
        "",
        f"{data['rounds']} such rounds with the paper's keep rate {own.rho:g}, {own.levels} levels "
        f"and {own.blocks} blocks:",
        _table(there, own.minutes, beside=True),
        f"saved against SFT without compression: {there['delay_saved']['uncompressed']:.1%} of the "
        f"delay and {there['bytes_saved']['uncompressed']:.1%} of the bytes; "
        f"the paper: {own.delay_saved:.1%} and {own.bytes_saved:.1%}",
    ]


def _p1(spec: Experiment, p1: Mapping[str, Any]) -> list[str]:
    second, gap, drawn = p1["algorithm2"], p1["gap"], p1["drawn"]
    searched = "finds nothing" if gap is None else f"{gap:+.3%}"
    multiplied = "finds nothing"
    if second:
        rests = "" if second["settled"] else ", without settling"
        multiplied = f"{second['gap']:+.3%} in {second['steps']} steps{rests}"
    most = drawn["algorithm2_max_gap"]
    worst = "" if most is None else f", at most {most:+.3%} from the exact solution"
    return [
        f"P1: keep rate {p1['rho']:.3f}, {p1['levels']} levels, {p1['blocks']} of the blocks on "
        f"devices: {p1['bits_per_element']:.2f} bits an element, accuracy {p1['accuracy']:.4f} "
        f"(at least {p1['least_accuracy']:.4f}), {p1['delay_s'] / 60:.1f} minutes if all rounds "
        f"had the channel that it is planned for, {spec.channel.snr_db:g} dB",
        f"    against brute force {searched}; Algorithm 2 {multiplied}",
        f"    {drawn['instances']} drawn problems: against brute force at most "
        f"{drawn['max_gap']:+.3%}; Algorithm 2 settles in {drawn['algorithm2_settled']}{worst}",
    ]


def _p2(spec: Experiment, data: Mapping[str, Any]) -> list[str]:
    p2, band = data["p2"], data["band_saved"]
    lines = [
        f"P2: Algorithm 3 within {p2['close']:.1%} of the exact solution in {p2['within']:.0%} of "
        f"{p2['instances']} drawn instances, at most {p2['max_gap']:.2g} off"
    ]
    if band is None:
        return lines
    sent, whole = (
        f"{band[part]['equal']:.1%} against equal and {band[part]['random']:.1%} against random "
        "bandwidth"
        for part in ("communication", "round")
    )
    return [
        *lines,
        f"    at {band['total_hz'] / 1e6:g} MHz its bandwidths save, of the communication delay of "
        f"a round, {sent}; the paper up to {spec.paper.band_saved:.1%}",
        f"    of a whole round, {whole}",
    ]


def _table(found: Mapping[str, Any], paper: Mapping[str, float], *, beside: bool) -> str:
    rows = []
    for scheme, name in LABELS.items():
        row = [name, f"{found['delay_s'][scheme] / 60:.1f}"]
        row += [f"{paper[scheme]:.1f}" if scheme in paper else "-"] if beside else []
        row += [_percent(found["delay_saved"].get(scheme))]
        row += [f"{found['bytes'][scheme] / 1e9:.2f}", _percent(found["bytes_saved"].get(scheme))]
        rows.append(row)
    paper_column = ["paper"] if beside else []
    saved = "SFT saves against it"
    return table(["scheme", "minutes", *paper_column, saved, "GB", saved], rows)


def _percent(part: float | None) -> str:
    if part is None:
        return "-"
    return f"{part:.1%}" if part > -1 else f"SFT has {1 - part:.1f} times as much"
