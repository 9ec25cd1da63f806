"""What `plan` tells of FedsLLM, for people: its result as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from splitfrozen.runs.summary import table
from splitfrozen.studies import plan_fedsllm_figures as drawings
from splitfrozen.studies.plan_fedsllm_file import rounds_text


def told(data: Mapping[str, Any], given: Mapping[int, float]) -> str:
    """The study's result; `given`: E(r)."""
    paper = data.get("paper_delay_saved")
    beside = "" if paper is None else f" (paper: about {paper:.0%})"
    lines = [
        *_planned(data["plan"]),
        "",
        f"E(r): {rounds_text(given)}",
        f"Power, {data['power_instances']} instances: convex programme and bisection differ by at "
        f"most {data['power_gap']:.1e} (allowed: 1e-6)",
        f"Descent, {data['descent_instances']} enumerated instances: over the optimum by "
        f"{data['descent_gap_mean']:+.3%} on average (allowed: 1 %), "
        f"{data['descent_gap_min']:+.3%} to {data['descent_gap_max']:+.3%} (allowed: 5 %)",
        f"  with the paper's greedy subchannels: {data['paper_greedy_gap_mean']:+.3%}, "
        f"{data['paper_greedy_gap_min']:+.3%} to {data['paper_greedy_gap_max']:+.3%}",
        "{clients} clients, {subchannels} subchannels: split {split}, rank {rank}, ".format(
            **data["large"]
        )
        + f"{data['large']['delay_s'] / drawings.HOUR_S:.4g} hours, planned in "
        f"{data['large']['cpu_s']:.2f} s of CPU",
        f"Delay saved against baseline a: {data['delay_saved']:.1%}{beside}; from the 10th "
        f"to the 90th percentile of the cells {data['delay_saved_low']:.1%} to "
        f"{data['delay_saved_high']:.1%}; against "
        + ", ".join(f"{name} {part:.1%}" for name, part in data["delay_saved_against"].items()),
        *(
            f"  with E(r) at {float(way):.0%} of the way to the target: {saved:.1%}"
            for way, saved in data["delay_saved_by_target"].items()
        ),
    ]
    for figure in data["figures"]:
        label, unit, _ = drawings.AXES[figure["vary"]]
        header = (label, *figure["delay_s"])
        columns = [one["mean"] for one in figure["delay_s"].values()]
        rows = [
            (f"{value / unit:g}", *(f"{mean / drawings.HOUR_S:.3f}" for mean in means))
            for value, *means in zip(figure["values"], *columns, strict=True)
        ]
        lines += ["", f"{drawings.heading(figure)}; mean delay, hours", table(header, rows)]
        claims = data["claims"][figure["figure"]]
        lines.append("; ".join(f"{name}: {_yes(holds)}" for name, holds in claims.items()))
        trend = data["trends"].get(figure["figure"])
        lines += [_trend_text(trend)] if trend else []
    return "\n".join(lines)


def _planned(plan: Mapping[str, Any]) -> Iterator[str]:
    """The plan of the first cell, by client."""
    yield (
        f"The first cell: split {plan['split']}, rank {plan['rank']}, "
        f"{plan['delay_s'] / drawings.HOUR_S:.4g} hours"
    )
    links = [(plan[name]["owner"], plan[name]["watts"]) for name in ("main", "federated")]
    rows = []
    for client in sorted(set(links[0][0])):
        row = [f"{client}"]
        for owner, watts in links:
            own = [place for place, one in enumerate(owner) if one == client]
            row += [" ".join(map(str, own)), f"{sum(watts[place] for place in own):.3g}"]
        rows.append(row)
    header = ("client", "to the main server", "W", "to the federated server", "W")
    yield table(header, rows)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _trend_text(trend: Mapping[str, Any]) -> str:
    hours = [f"{gap / drawings.HOUR_S:.4g}" for gap in trend["gap_s"]]
    parts = [f"{part:.2%}" for part in trend["gap_part"]]
    return (
        f"{trend['says']}: {_yes(trend['holds'])}, from {' to '.join(hours)} hours; as a part of "
        f"its delay: {_yes(trend['holds_as_part'])}, from {' to '.join(parts)}"
    )
