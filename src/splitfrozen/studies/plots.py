"""Pictures of a comparison, drawn from what its result file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from splitfrozen.studies.scores import MEASURES, by_place, measures, shown

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
MARKERS = "osD^v<>PX*"
NAMES_AT = (
    *(("right", -4, 4), ("right", -6, -3), ("left", 4, 5), ("right", -4, 12)),
    *(("left", 4, -17), ("right", -4, -9), ("left", 6, -3), ("left", 4, -9)),
)
"""Where a point's name may stand: the side of it that is nearest, and points right and up."""
FEW = 2
"""More partitions than that are an axis of their own."""

_Point = tuple[float, float, Mapping[str, Any]]
"""MB, score, and the row of the trade-off."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the gain over SplitLoRA where there are many partitions, else the accuracy of all.

    Args:
        result: as `findings.kept` makes it, or as it was read from a result file.
        path: of the PNG.
    """
    partitions = dict.fromkeys(row["partition"] for row in result["rows"])
    gained = [one for one in result["gains"]["each"] if one["over_splitlora_percent"] is not None]
    if len(partitions) > FEW and gained:
        _draw_gains(gained, path)
    else:
        _draw_bars(result, path)


def _figure(width: float, height: float) -> Any:
    # pyplot keeps figures of its own; a Figure alone needs no display and nothing to close.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Wide enough at the sides for half of the last tick's label, which the engine does not see.
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.15))


def _draw_bars(result: Mapping[str, Any], path: Path) -> None:
    """A panel for each dataset and rank: methods down, a bar for each partition, a dot a seed."""
    rows = result["rows"]
    measure, told = next(iter(measures(rows).items()))
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    ranks = sorted({row["rank"] for row in rows})
    partitions = list(dict.fromkeys(row["partition"] for row in rows))
    values = by_place(rows, measure)
    tall = 0.9 + 0.42 * len(result["labels"]) * len(datasets)
    figure = _figure(4.2 * max(len(ranks), 1) + 1.6, tall + 0.8)
    panels = figure.subplots(max(len(datasets), 1), max(len(ranks), 1), squeeze=False, sharex="row")
    for line, dataset in zip(panels, datasets, strict=False):
        for panel, rank in zip(line, ranks, strict=False):
            own = {
                (partition, method): [shown(value, measure) for value in found]
                for (name, partition, at, method), found in values.items()
                if (name, at) == (dataset, rank)
            }
            methods = [m for m in result["labels"] if any(m == method for _, method in own)]
            _draw_panel(panel, own, partitions, methods)
            names = [result["labels"][m] for m in methods]
            panel.set_yticks(range(len(methods)), names, parse_math=False)
            panel.set_title(f"{dataset}, rank {rank}", parse_math=False, fontsize=10)
            majority = (result.get("majority") or {}).get(dataset)
            if majority is not None:
                panel.axvline(100 * majority, color="0.3", linestyle=":", label="majority class")
        _zoom(line)
    for panel in panels[-1]:
        panel.set_xlabel(f"{told} (axes are cut off)")
    handles = {
        label: handle
        for handle, label in zip(*panels[0][0].get_legend_handles_labels(), strict=True)
    }
    legend = figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)


def draw_tradeoff(result: Mapping[str, Any], path: Path) -> None:
    """Bytes against score: a panel for each dataset and rank, with the Pareto front as a line.

    With one partition methods have their names beside their points. With several they are markers,
    as each is there several times, and the legend has the names.

    Args:
        result: as for `draw`; its `tradeoff` is not empty.
        path: of the PNG.
    """
    points = result["tradeoff"]
    measure, told = next((key, told) for key, told in MEASURES.items() if key in points[0])
    datasets = list(dict.fromkeys(one["dataset"] for one in points))
    ranks = sorted({one["rank"] for one in points})
    partitions = dict.fromkeys(row["partition"] for row in result["rows"])
    drawn = {one["partition"] for one in points}
    # As in the bars, where nobody knows what was sent with one of them too.
    each = zip(partitions, cycle(COLOURS), strict=False)
    colours = {name: colour for name, colour in each if name in drawn}
    several = len(colours) > 1
    names = list(dict.fromkeys(one["method"] for one in points))
    markers = dict(zip(names, cycle(MARKERS if several else "o"), strict=False))
    figure = _figure(5.2 * len(ranks) + 0.6, 3.9 * len(datasets) + 0.3 + 0.9 * several)
    panels = figure.subplots(len(datasets), len(ranks), squeeze=False)
    unnamed: list[tuple[Any, list[_Point]]] = []
    for line, dataset in zip(panels, datasets, strict=True):
        for panel, rank in zip(line, ranks, strict=True):
            for partition, colour in colours.items():
                place = dataset, rank, partition
                own = [
                    (one["bytes"] / 1e6, shown(one[measure], measure), one)
                    for one in points
                    if (one["dataset"], one["rank"], one["partition"]) == place
                ]
                if own:
                    _draw_front(panel, own, colour, markers)
                if not several:
                    unnamed.append((panel, own))
            _log_axis(panel)
            panel.margins(x=0.15, y=0.1)
            panel.set_title(f"{dataset}, rank {rank}", parse_math=False, fontsize=10)
            panel.set_xlabel("MB sent by all devices")
            panel.grid(alpha=0.25, which="both")
        line[0].set_ylabel(told)
    if several:
        _explain(figure, colours, {result["labels"][name]: markers[name] for name in names})
    figure.draw_without_rendering()
    for panel, own in unnamed:
        _name_points(panel, own, result["labels"])
    figure.savefig(path, dpi=120)


def _explain(figure: Any, colours: Mapping[str, str], markers: Mapping[str, str]) -> None:
    """A legend of partitions, which are colours, and of methods, which are markers."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    handles += [
        Line2D([], [], color="0.3", marker=marker, linestyle="", label=name)
        for name, marker in markers.items()
    ]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _log_axis(panel: Any) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten: axes may be shorter than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _draw_front(
    panel: Any,
    own: Sequence[_Point],
    colour: str,
    markers: Mapping[str, str],
) -> None:
    """Points, and a line through those that nothing beats, which are filled."""
    front = sorted((x, y) for x, y, one in own if one["on_front"])
    panel.plot(*zip(*front, strict=True), color=colour, linewidth=1)
    for x, y, one in own:
        filled = colour if one["on_front"] else "white"
        marker = markers[one["method"]]
        panel.plot([x], [y], marker, color=colour, markerfacecolor=filled, markersize=5)


def _name_points(panel: Any, own: Sequence[_Point], labels: Mapping[str, str]) -> None:
    """Each where it covers no other name and no point, if there is such a place beside its own.

    For a panel whose axes are as they will be drawn.
    """
    from matplotlib.transforms import Bbox

    at = (panel.transData.transform((x, y)) for x, y, _ in own)
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in at]
    for x, y, one in own:
        # The front runs up to the right: its names stand above it, those of the others below.
        places = NAMES_AT if one["on_front"] else NAMES_AT[::-1]
        tried: list[tuple[int, int, Any, Any]] = []
        for side, right, up in places:
            text = panel.annotate(
                labels[one["method"]],
                (x, y),
                xytext=(right, up),
                horizontalalignment=side,
                textcoords="offset points",
                fontsize=7,
                parse_math=False,
            )
            box = text.get_window_extent()
            tried.append((sum(box.overlaps(other) for other in taken), len(tried), text, box))
            if tried[-1][0] == 0:
                break
        best = min(tried, key=lambda it: it[:2])
        for _, number, text, _ in tried:
            if number != best[1]:
                text.remove()
        taken.append(best[3])


def _draw_panel(
    panel: Any,
    own: Mapping[tuple[str, str], Sequence[float]],
    partitions: Sequence[str],
    methods: Sequence[str],
) -> None:
    thick = 0.8 / max(len(partitions), 1)
    for i, partition in enumerate(partitions):
        for place, method in enumerate(methods):
            seeds = own.get((partition, method), [])
            if not seeds:
                continue
            at = place + (i - (len(partitions) - 1) / 2) * thick
            panel.barh(
                at, fmean(seeds), thick * 0.92, color=COLOURS[i % len(COLOURS)], label=partition
            )
            panel.plot(seeds, [at] * len(seeds), "o", color="black", markersize=2.5)
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)


def _zoom(line: Sequence[Any]) -> None:
    """Accuracies lie close together: the axis begins below the least of them."""
    ends = [bar.get_width() for panel in line for bar in panel.patches]
    ends += [x for panel in line for shown in panel.lines for x in shown.get_xdata()]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = max(0.08 * (high - low), 0.5)
    for panel in line:
        panel.set_xlim(max(0.0, low - room), high + room)


def _draw_gains(gained: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the gain over SplitLoRA by partition, one for each rank; a panel a dataset."""
    datasets = list(dict.fromkeys(one["dataset"] for one in gained))
    partitions = list(dict.fromkeys(one["partition"] for one in gained))
    ranks = sorted({one["rank"] for one in gained})
    figure = _figure(1.4 + 1.1 * len(partitions) * len(datasets), 3.8)
    [panels] = figure.subplots(1, len(datasets), squeeze=False)
    thick = 0.8 / len(ranks)
    for panel, dataset in zip(panels, datasets, strict=True):
        for i, rank in enumerate(ranks):
            own = {
                one["partition"]: one["over_splitlora_percent"]
                for one in gained
                if (one["dataset"], one["rank"]) == (dataset, rank)
            }
            places = [
                (at + (i - (len(ranks) - 1) / 2) * thick, own[name])
                for at, name in enumerate(partitions)
                if name in own
            ]
            xs, heights = zip(*places, strict=True) if places else ((), ())
            bars = panel.bar(
                xs, heights, thick * 0.92, color=COLOURS[i % len(COLOURS)], label=f"rank {rank}"
            )
            panel.bar_label(bars, fmt="%+.1f", fontsize=8, padding=2)
        panel.axhline(0, color="0.3", linewidth=0.8)
        panel.set_xticks(range(len(partitions)), partitions, parse_math=False)
        panel.set_title(dataset, parse_math=False, fontsize=10)
        panel.margins(y=0.15)
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
    panels[0].set_ylabel("SplitFrozen's gain over SplitLoRA, percent")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
