"""A timeline as a picture, laid out as figure 2 of the SplitFrozen paper.

One lane for each device's computation and one for each of its links, then the server, or its stages
from the first to the last. Colours are phases; the number of the step is written where there is
room. What would be too small to see is left out, and the title says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from splitfrozen.disk import explained
from splitfrozen.simulation.engine import Lane
from splitfrozen.simulation.network import role
from splitfrozen.simulation.timeline import Numbers, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LANES = 36
EDGED = 0.004
"""Share of the time axis from which on a bar has an edge."""

MOST_BARS = 150
"""In one lane; the picture ends where the fullest of its lanes has had so many."""
WIDTH = 12.0
"""Inches."""
DIGIT = 0.009
"""Width of a digit as part of the time axis."""

COLOURS = {
    "front": "#7fa8d6",
    "lift": "#c79fc0",
    "forward": "#8ccbc6",
    "backward": "#f9a857",
    "weights": "#f3d76c",
    "activations": "#c6dbef",
    "gradients": "#fdd0a2",
    "adapter": "#e3c9dd",
    "local": "#93c98a",
    "train": "#f9a857",
    "average": "#ee8e90",
    "evaluate": "#c3a28f",
    "encode": "#d0c8c4",
    "setup": "#e8e8e8",
}
MORE_COLOURS = ("#b5e3ac", "#ffbfc7", "#e6d0c5", "#a3a3a3")
"""For phases without a colour of their own, in turn."""


def draw(timeline: Timeline, path: Path, name: str = "timeline") -> None:
    """Write the picture; the ending of `path` says of which kind (.png, .svg, .pdf).

    `name` stands at the head of the title. Raises StoreError.
    """
    stack({name: timeline}, path)


def stack(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Write pictures one above the other, with seconds to one scale; names as in `draw`.

    Raises StoreError.
    """
    # pyplot keeps figures of its own; a Figure alone needs no display and nothing to close.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    chosen = {name: _chosen(line) for name, line in timelines.items()}
    heights = [max(2, len(lanes)) for lanes, _ in chosen.values()]
    tall = 0.9 * (len(heights) + 1) + 0.28 * sum(heights)
    figure = Figure(figsize=(WIDTH, tall), layout="constrained")
    panels = figure.subplots(
        len(heights), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    phases = dict.fromkeys(phase for line in timelines.values() for phase in line.phases)
    colours, shown = _colours(tuple(phases)), set[str]()
    drawn = {
        name: [np.flatnonzero(line.lane == lane) for lane in chosen[name][0]]
        for name, line in timelines.items()
    }
    until = {name: _until(line, drawn[name]) for name, line in timelines.items()}
    scale = max(until.values())
    for [axes], (name, line) in zip(panels, timelines.items(), strict=True):
        lanes, limits = chosen[name]
        end, whole = until[name], line.makespan
        limits += [f"the first {end:.3g} of {whole:.3g} s"] if end < whole else []
        for place, ids in enumerate(drawn[name]):
            shown |= _bars(axes, line, ids[line.begin[ids] < end], place, colours, scale)
        _frame(axes, [label(line.lanes[lane]) for lane in lanes])
        title = f"{name}: {'; '.join(limits) if limits else f'{whole:.3g} s'}"
        axes.set_title(title, parse_math=False, loc="left", fontsize=11)
    panels[-1][0].set_xlim(0, scale or 1)
    panels[-1][0].set_xlabel("seconds")
    keys = [Patch(color=colours[phase], label=phase) for phase in colours if phase in shown]
    if keys:
        legend = figure.legend(handles=keys, loc="outside lower center", ncols=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    with explained(path):
        figure.savefig(path, dpi=120)


def _frame(axes: Axes, names: Sequence[str]) -> None:
    """What is around the bars: lanes from top to bottom."""
    axes.set_yticks(range(len(names)), names)
    # A name is no formula, whatever dollars are in it.
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _chosen(timeline: Timeline) -> tuple[list[int], list[str]]:
    """The lanes to draw, from top to bottom, and what the title says of those left out."""
    groups: dict[str, list[int]] = {}
    servers: list[int] = []
    for number, lane in enumerate(timeline.lanes):
        owner = next((who for who in (lane.who, lane.target) if who and _is_device(who)), None)
        (servers if owner is None else groups.setdefault(owner, [])).append(number)
    servers.sort(key=lambda number: _place(timeline.lanes[number]))
    kept = servers[: MOST_LANES // 2]
    top: list[int] = []
    count = 0
    for device in sorted(groups, key=_natural):
        if top and len(top) + len(groups[device]) + len(kept) > MOST_LANES:
            break
        top += sorted(groups[device], key=lambda number: _place(timeline.lanes[number]))
        count += 1
    limits = []
    if count < len(groups):
        limits.append(f"{count} of {len(groups)} devices")
    if len(kept) < len(servers):
        limits.append(f"{len(kept)} of the server's {len(servers)} lanes")
    return top + kept, limits


def _until(timeline: Timeline, drawn: Sequence[Numbers]) -> float:
    """Where the picture ends: a lane has had MOST_BARS bars, or everything has ended."""
    begins = [np.sort(timeline.begin[ids]) for ids in drawn if len(ids) > MOST_BARS]
    return min((float(begin[MOST_BARS]) for begin in begins), default=timeline.makespan)


def _bars(
    axes: Axes,
    timeline: Timeline,
    ids: Numbers,
    place: int,
    colours: dict[str, str],
    until: float,
) -> set[str]:
    """Draw the events of a lane; return their phases."""
    height = 0.8
    shown = set()
    for phase in np.unique(timeline.phase[ids]):
        name = timeline.phases[phase]
        shown.add(name)
        some = ids[timeline.phase[ids] == phase]
        spans = list(
            zip(timeline.begin[some], timeline.left[some] - timeline.begin[some], strict=True)
        )
        axes.broken_barh(
            spans,
            (place - height / 2, height),
            facecolors=colours[name],
            # A white edge would hide a bar that is hardly wider than the edge itself.
            edgecolors=["white" if width > EDGED * until else colours[name] for _, width in spans],
            linewidth=0.6,
        )
    for i in ids.tolist():
        begin, step = float(timeline.begin[i]), str(timeline.events[i].step)
        end = min(float(timeline.left[i]), until)
        if end - begin > DIGIT * len(step) * until:
            middle = (begin + end) / 2
            axes.text(middle, place, step, ha="center", va="center", fontsize=7, clip_on=True)
    return shown


def _colours(phases: Sequence[str]) -> dict[str, str]:
    """Every phase's colour, those that have one of their own first."""
    others = [phase for phase in phases if phase not in COLOURS]
    return COLOURS | {phase: MORE_COLOURS[i % len(MORE_COLOURS)] for i, phase in enumerate(others)}


def _is_device(who: str) -> bool:
    return role(who) == "device"


def _place(lane: Lane) -> tuple[object, ...]:
    """Sorts the lanes of one device or of the servers: computation, what is sent, what comes."""
    if lane.target is None:
        return (0, _natural(lane.who), [])
    return (1 if _is_device(lane.who) else 2, _natural(lane.who), _natural(lane.target))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts device-10 after device-9."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def label(lane: Lane) -> str:
    return lane.who if lane.target is None else f"{lane.who} \N{RIGHTWARDS ARROW} {lane.target}"
