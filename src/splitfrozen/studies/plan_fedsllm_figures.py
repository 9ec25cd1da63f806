"""Figures 5 to 8 of the FedsLLM paper, drawn from what the result file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LABELS = {
    "proposed": "proposed",
    "a": "a: all random",
    "b": "b: random subchannels, even power",
    "c": "c: random split",
    "d": "d: random rank",
}
MARKS = {"proposed": "o", "a": "s", "b": "^", "c": "v", "d": "D"}
COLOURS = {
    "proposed": "tab:blue",
    "a": "tab:red",
    "b": "tab:orange",
    "c": "tab:green",
    "d": "tab:purple",
}
AXES = {
    "bandwidth_hz": ("bandwidth of a link, kHz", 1e3, "log"),
    "client_flop_per_cycle": ("FLOP of a client in a cycle", 1.0, "log"),
    "server_hz": ("speed of the main server, GHz", 1e9, "linear"),
    "client_dbm": ("most power of a client, dBm", 1.0, "linear"),
}
"""Label, unit and scale by the key that is varied."""
HOUR_S = 3600
STEEP = 8.0
"""From this ratio of the highest to the lowest mean on, delays are drawn on a logarithmic axis."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each figure: means as lines, the spread over cells as bands."""
    # pyplot keeps figures of its own; a Figure alone needs no display and nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 8.4), layout="constrained")
    panels = figure.subplots(2, 2, squeeze=False).flat
    for panel, own in zip(panels, result["figures"], strict=True):
        _draw_panel(panel, own)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    cells = result["cells"]
    several = f"Mean over {cells} drawn cells; bands from the 10th to the 90th percentile"
    figure.suptitle(several if cells > 1 else "One drawn cell")
    figure.savefig(path, dpi=120)


def heading(own: Mapping[str, Any]) -> str:
    """Which figure of the paper it is, and what varies in it."""
    return f"Figure {own['figure']} of the paper: {AXES[own['vary']][0].partition(',')[0]}"


def _draw_panel(panel: Any, own: Mapping[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    label, unit, scale = AXES[own["vary"]]
    xs = [value / unit for value in own["values"]]
    curves = own["delay_s"]
    for name, curve in curves.items():
        hours = {part: [value / HOUR_S for value in values] for part, values in curve.items()}
        panel.fill_between(xs, hours["low"], hours["high"], color=COLOURS[name], alpha=0.10)
        panel.plot(
            xs,
            hours["mean"],
            marker=MARKS[name],
            markersize=5,
            color=COLOURS[name],
            label=LABELS[name],
        )
    means = [value for curve in curves.values() for value in curve["mean"]]
    panel.set_xscale(scale)
    panel.set_xticks(xs, [f"{x:g}" for x in xs])
    panel.set_xticks([], minor=True)
    if max(means) > STEEP * min(means):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(label)
    panel.set_ylabel("total delay, hours")
    panel.set_title(heading(own), fontsize=10)
    panel.grid(alpha=0.25)
