"""What `plan` tells of SFT, for people: its result as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from splitfrozen.runs.summary import table
from splitfrozen.studies.plan_sft_figures import LABELS
from splitfrozen.studies.plan_sft_file import Experiment, PaperPart


def told(spec: Experiment, data: Mapping[str, Any]) -> list[str]:
    """Lines of the study's result."""
    lines = [
        *_p1(spec, data["p1"]),
        *_p2(spec, data),
        "",
        f"{data['rounds']} rounds as planned, the channel of each drawn anew:",
        _table(data),
    ]
    return lines if spec.paper is None else [*lines, *_beside(spec.paper, data)]


def _beside(own: PaperPart, data: Mapping[str, Any]) -> list[str]:
    """What the paper's choice comes to here, beside what the paper reports."""
    there = data["at_paper_setting"]
    known = there["measured_accuracy"]
    measured = "" if known is None else f" (measured: {known:.4f})"
    return [
        "",
        f"{data['rounds']} such rounds with the paper's keep rate {own.rho:g}, {own.levels} levels "
        f"and {own.blocks} blocks:",
        _table(there, own.minutes),
        f"accuracy by the surface {there['accuracy']:.4f}{measured}, without compression "
        f"{data['p1']['surface']['reference']:.4f}",
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
    least, most = drawn["algorithm2_min_gap"], drawn["algorithm2_max_gap"]
    worst = "" if most is None else f", {least:+.3%} to {most:+.3%} from the exact solution"
    return [
        f"P1: keep rate {p1['rho']:.3f}, {p1['levels']} levels, {p1['blocks']} of the blocks on "
        f"devices: {p1['bits_per_element']:.2f} bits an element, accuracy {p1['accuracy']:.4f} "
        f"(at least {p1['least_accuracy']:.4f}), {p1['delay_s'] / 60:.1f} minutes if all rounds "
        f"had the channel that it is planned for, {spec.channel.snr_db:g} dB",
        f"    the surface is {p1['surface']['rmse']:.4f} (root mean square), at most "
        f"{p1['surface']['largest_residual']:.4f} from the measured points",
        f"    against brute force {searched}; Algorithm 2 {multiplied}",
        f"    {drawn['instances']} drawn problems: against brute force {drawn['min_gap']:+.3%} to "
        f"{drawn['max_gap']:+.3%}; Algorithm 2 settles in {drawn['algorithm2_settled']}{worst}",
    ]


def _p2(spec: Experiment, data: Mapping[str, Any]) -> list[str]:
    p2, band, shares = data["p2"], data["band_saved"], data["plan"]["bandwidth_hz"].values()
    lines = [
        f"P2: in the first round {min(shares) / 1e6:.3g} to {max(shares) / 1e6:.3g} MHz for a "
        "device; --json has each",
        f"    Algorithm 3 within {p2['close']:.1%} of the exact solution in {p2['within']:.0%} of "
        f"{p2['instances']} drawn instances, {p2['min_gap']:+.2g} to {p2['max_gap']:+.2g} from it",
    ]
    if band is None:
        return lines
    sent, whole = (
        f"{band[part]['equal']:.1%} against equal and {band[part]['random']:.1%} against random "
        "bandwidth"
        for part in ("communication", "round")
    )
    paper = f"; the paper up to {spec.paper.band_saved:.1%}" if spec.paper else ""
    return [
        *lines,
        f"    at {band['total_hz'] / 1e6:g} MHz its bandwidths save, of the communication delay of "
        f"a round, {sent}{paper}",
        f"    of a whole round, {whole}",
    ]


def _table(found: Mapping[str, Any], paper: Mapping[str, float] | None = None) -> str:
    """By scheme; with a column for the paper's minutes, where they are given."""
    rows = []
    for scheme, name in LABELS.items():
        row = [name, f"{found['delay_s'][scheme] / 60:.1f}"]
        if paper is not None:
            row += [f"{paper[scheme]:.1f}" if scheme in paper else "-"]
        row += [_percent(found["delay_saved"].get(scheme))]
        row += [f"{found['bytes'][scheme] / 1e9:.2f}", _percent(found["bytes_saved"].get(scheme))]
        rows.append(row)
    paper_column = [] if paper is None else ["paper"]
    saved = "SFT saves against it"
    return table(["scheme", "minutes", *paper_column, saved, "GB", saved], rows)


def _percent(part: float | None) -> str:
    if part is None:
        return "-"
    return f"{part:.1%}" if part > -1 else f"SFT has {1 - part:.1f} times as much"
