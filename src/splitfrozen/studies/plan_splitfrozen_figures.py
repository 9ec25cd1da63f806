"""The curves of SplitFrozen's plan: makespan over the uplinks' rate, for the plan and for rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from splitfrozen.disk import explained

COLOURS = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red")
MARKS = ("o", "s", "^", "v", "D")
MEGA = 1e6


class Curve(Protocol):
    """A rule at one rate."""

    @property
    def rule(self) -> str: ...
    @property
    def plain_s(self) -> float: ...
    @property
    def codec_s(self) -> float: ...


def draw_curve(
    points: Sequence[tuple[float, Sequence[Curve], float]], plain: str, path: Path
) -> None:
    """Seconds above, and below them by how much more than the plan that is; on the left with the
    first codec only, on the right with the codec that the plan chooses at each rate.

    Args:
        points: bit/s of an uplink, the rules' makespans (the plan's first), the bound with codecs.
        plain: name of the first codec.
        path: of the PNG.

    Raises:
        StoreError: it cannot be written.
    """
    # pyplot keeps figures of its own; a Figure alone needs no display and nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    rates = [bps / MEGA for bps, _, _ in points]
    for place, row in enumerate(points[0][1]):
        style = {"color": COLOURS[place], "marker": MARKS[place], "label": row.rule}
        for side in (0, 1):
            taken = [_seconds(rows[place], side) for _, rows, _ in points]
            least = [_seconds(rows[0], side) for _, rows, _ in points]
            more = [100 * (one / best - 1) for one, best in zip(taken, least, strict=True)]
            panels[0][side].plot(rates, taken, markersize=3.5, linewidth=1.2, **style)
            panels[1][side].plot(rates, more, markersize=3.5, linewidth=1.2, **style)
    bound = [least for _, _, least in points]
    panels[0][1].plot(rates, bound, "--", color="0.5", label="bound")
    _frame(panels, (f"{plain} only", "the codec that the plan chooses"))
    with explained(path):
        figure.savefig(path, dpi=120)


def _frame(panels: Any, titles: tuple[str, str]) -> None:
    for side, title in enumerate(titles):
        panels[0][side].set_title(title, fontsize=11, parse_math=False)
        panels[0][side].set_yscale("log")
        panels[1][side].set_xscale("log")
        panels[1][side].set_xlabel("uplink of a device, Mbit/s")
        for line in panels:
            line[side].grid(which="both", alpha=0.25)
    panels[0][0].set_ylabel("makespan, s")
    panels[1][0].set_ylabel("more than the plan, percent")
    panels[0][1].legend(frameon=False)


def _seconds(row: Curve, side: int) -> float:
    return row.codec_s if side else row.plain_s
