"""The pictures of SplitFrozen's plan: makespans over the uplinks' rate, and the last steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from splitfrozen.disk import explained
from splitfrozen.records import SERVER, Compute, Send
from splitfrozen.simulation import gantt
from splitfrozen.simulation.timeline import Timeline

COLOURS = ("0.78", "tab:blue", "tab:orange", "tab:green", "tab:red")
MARKS = ("o", "s", "^", "v", "D")
WIDTHS = (8.0, 5.6, 3.8, 2.2, 0.9)
"""Of lines, in points: where they lie on one another, each is seen beside the next."""
MEGA = 1e6
SHOWN_STEPS = 8
"""Steps of the Gantt picture."""
SHOWN_DEVICES = 2
"""Of each kind, in the Gantt picture."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one way to choose depths takes, s, with the file's first codec and with the plan's."""

    rule: str
    plain_s: float
    codec_s: float


@dataclass(frozen=True, slots=True)
class AtRate:
    """What uplinks of one rate come to.

    Attributes:
        bps: bit/s of an uplink.
        rows: makespans of the rules, the plan's first.
        codec: that the plan chooses.
        plain_bound_s, bound_s: what no plan can beat with the first codec, and with all.
    """

    bps: float
    rows: Sequence[Row]
    codec: str
    plain_bound_s: float
    bound_s: float

    def seconds(self, place: int, side: int) -> float:
        """Of a rule, by its place; `side`: 0 with the first codec, 1 with the plan's."""
        row = self.rows[place]
        return row.codec_s if side else row.plain_s


# --- over the uplinks' rate ------------------------------------------------------------------


def draw_curve(points: Sequence[AtRate], plain: str, path: Path) -> None:
    """Seconds above, and below them by how much more than the plan that is; on the left with the
    first codec only, on the right with the codec that the plan chooses at each rate.

    Args:
        points: one for each rate, from the lowest to the highest.
        plain: name of the first codec.
        path: of the PNG.

    Raises:
        StoreError: it cannot be written.
    """
    # pyplot keeps figures of its own; a Figure alone needs no display and nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    rates = [at.bps / MEGA for at in points]
    for side, place in itertools.product((0, 1), range(len(points[0].rows))):
        style = {
            "color": COLOURS[place],
            "linewidth": WIDTHS[place],
            "label": points[0].rows[place].rule,
        }
        taken = [at.seconds(place, side) for at in points]
        more = [
            100 * (one / at.seconds(0, side) - 1) for one, at in zip(taken, points, strict=True)
        ]
        panels[0][side].plot(rates, taken, **style)
        panels[1][side].plot(rates, more, marker=MARKS[place], markersize=5, **style)
    for side, bound in enumerate(
        ([at.plain_bound_s for at in points], [at.bound_s for at in points])
    ):
        panels[0][side].plot(rates, bound, ":", color="black", linewidth=1.2, label="bound")
    _frame(panels, (f"{plain} only", "the codec that the plan chooses"))
    _name_codecs(panels, points)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    with explained(path):
        figure.savefig(path, dpi=120)


def _frame(panels: Any, titles: tuple[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plainly = FuncFormatter(lambda value, _: f"{value:g}")
    for side, title in enumerate(titles):
        panels[0][side].set_title(title, fontsize=11, parse_math=False)
        panels[0][side].set_yscale("log")
        panels[1][side].set_xscale("log")
        panels[1][side].set_xlabel("uplink of a device, Mbit/s")
        for axis in (panels[0][side].yaxis, panels[1][side].xaxis):
            axis.set_major_formatter(plainly)
            axis.set_minor_formatter(NullFormatter())
        for line in panels:
            line[side].grid(which="both", alpha=0.25)
    panels[0][0].set_ylabel("makespan, s")
    panels[1][0].set_ylabel("more than the plan, percent")


def _name_codecs(panels: Any, points: Sequence[AtRate]) -> None:
    """Between which rates the plan chooses which codec: lines, and names above the curves."""
    top = panels[0][1]
    spans = [list(some) for _, some in itertools.groupby(points, key=lambda at: at.codec)]
    edges = [math.sqrt(a[-1].bps * b[0].bps) / MEGA for a, b in itertools.pairwise(spans)]
    for edge, panel in itertools.product(edges, (top, panels[1][1])):
        panel.axvline(edge, color="0.4", linestyle="--", linewidth=1)
    ends = [points[0].bps / MEGA, *edges, points[-1].bps / MEGA]
    for some, (low, high) in zip(spans, itertools.pairwise(ends), strict=True):
        top.text(
            math.sqrt(low * high),
            0.95,
            some[0].codec,
            transform=top.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=9,
            parse_math=False,
        )


# --- the last steps --------------------------------------------------------------------------


def draw_last_steps(lines: Mapping[str, Timeline], kinds: Sequence[str], path: Path) -> None:
    """Gantt charts, one above the other, of the last steps for which anything is sent.

    Args:
        lines: whole schedules by name.
        kinds: of devices, which are called `kind`-0, `kind`-1 ...; the first two of each are shown.
        path: of the PNG.

    Raises:
        StoreError: it cannot be written.
    """
    first_line = next(iter(lines.values()))
    last = max(event.step for event in first_line.events if isinstance(event, Send))
    first = max(0, last - SHOWN_STEPS + 1)
    since = min(min(_served(line, first))[0] for line in lines.values())
    until = max(max(_served(line, last))[1] for line in lines.values())
    since = _rounded_down(since) if first else 0.0
    kept = {f"{kind}-{number}" for kind in kinds for number in range(SHOWN_DEVICES)} | {SERVER}
    told = f"{SHOWN_DEVICES} devices of each kind"
    told += f", seconds since {since:g} s" if since else ""
    titles = {name: f"{name}, {line.makespan:.4g} s in all; {told}" for name, line in lines.items()}
    shown = {titles[name]: _cut(line, kept, since, until) for name, line in lines.items()}
    gantt.stack(shown, path)


def _served(line: Timeline, step: int) -> Iterator[tuple[float, float]]:
    """When the server begins and ends what it does for a step."""
    for i, event in enumerate(line.events):
        if isinstance(event, Compute) and event.who == SERVER and event.step == step:
            yield float(line.begin[i]), float(line.left[i])


def _rounded_down(seconds: float) -> float:
    """To two digits, so that seconds since then are easy to add to it."""
    if seconds <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(seconds)) - 1)
    return unit * math.floor(seconds / unit)


def _cut(line: Timeline, who: set[str], since: float, until: float) -> Timeline:
    """What these parties do between two instants, with seconds since the first."""
    lanes = [
        number
        for number, lane in enumerate(line.lanes)
        if lane.who.partition("/")[0] in who  # Encoders are called after their devices.
    ]
    inside = np.isin(line.lane, lanes) & (line.left > since) & (line.begin < until)
    ids = np.flatnonzero(inside)
    begin, left, end = (
        np.clip(times[ids], since, until) - since for times in (line.begin, line.left, line.end)
    )
    return replace(
        line,
        events=[line.events[i] for i in ids.tolist()],
        begin=begin,
        left=left,
        end=end,
        lane=np.searchsorted(lanes, line.lane[ids]),
        lanes=tuple(line.lanes[number] for number in lanes),
    )
