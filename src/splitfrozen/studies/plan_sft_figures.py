"""Figures of section VIII of the SFT paper, as far as they follow from its model.

Drawn from what the result file holds: the paper's figures 3 and 7 (accuracy), 6 (memory), 8
(bytes), 9 (bandwidth), and the ends of the curves of 10 (delay by scheme).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LABELS = {
    "sft": "SFT",
    "equal": "SFT, equal bandwidth",
    "random": "SFT, random bandwidth",
    "uncompressed": "SFT, uncompressed",
    "fl": "FL with LoRA",
    "sl": "SL",
}
WHOLE = ("sft", "uncompressed", "fl", "sl")
"""Schemes that differ in more than how bandwidth is shared."""
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:gray")


def draw(result: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Draw all figures; yields their paths. Raises OSError."""
    shown = result["figures"]
    for name, drawing, has in (
        ("accuracy", _accuracy, True),
        ("memory", _memory, True),
        ("bytes", _bytes, True),
        ("bandwidth", _bandwidth, bool(shown["bandwidth"])),
        ("delay", _delay, True),
    ):
        if has:
            path = folder / f"{name}.png"
            figure = drawing(result)
            figure.savefig(path, dpi=120)
            yield path


def _figure(width: float, height: float) -> Any:
    # pyplot keeps figures of its own; a Figure alone needs no display and nothing to close.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _accuracy(result: Mapping[str, Any]) -> Any:
    own = result["figures"]["accuracy"]
    figure = _figure(6.4, 4.2)
    panel = figure.subplots()
    for number, (levels, curve) in enumerate(own["curves"].items()):
        colour = COLOURS[number % len(COLOURS)]
        measured = [(rho, value) for rho, at, value in own["points"] if str(at) == levels]
        panel.plot(own["rho"], curve, color=colour, label=f"{levels} levels")
        panel.plot(*zip(*measured, strict=True), "o", color=colour, markersize=4)
    rho, levels, accuracy = own["chosen"]
    panel.plot([rho], [accuracy], "*", color="black", markersize=13, label=f"chosen, {levels}")
    panel.axhline(own["reference"], color="0.3", linestyle=":", label="uncompressed")
    panel.axhline(own["least"], color="0.3", linestyle="--", label="least wanted")
    panel.set_xlabel("keep rate")
    panel.set_ylabel("accuracy")
    panel.set_title(f"{own['model']}: measured, and the surface", parse_math=False, fontsize=10)
    _finish(panel)
    panel.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def _memory(result: Mapping[str, Any]) -> Any:
    own = result["figures"]["memory"]
    figure = _figure(5.6, 3.6)
    panel = figure.subplots()
    blocks = range(1, len(own["bytes"]) + 1)
    chosen = result["p1"]["blocks"]
    colours = ["tab:blue" if one == chosen else "#b9cfe6" for one in blocks]
    panel.bar(blocks, [one / 1e9 for one in own["bytes"]], color=colours)
    panel.axhline(own["held"] / 1e9, color="tab:red", label="what a device has")
    panel.set_xticks(list(blocks))
    panel.set_xlabel("blocks on the device; with all of them it is FL")
    panel.set_ylabel("memory, GB")
    _finish(panel)
    panel.legend(frameon=False)
    return figure


def _bytes(result: Mapping[str, Any]) -> Any:
    figure = _figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    sent = [result["bytes"][name] / 1e9 for name in WHOLE]
    bars = left.bar([LABELS[name].replace(", ", ",\n") for name in WHOLE], sent, color="tab:blue")
    left.bar_label(bars, [f"{one:,.1f}" for one in sent], fontsize=8)
    left.set_yscale("log")
    left.set_ylabel(f"GB in {result['rounds']} rounds")
    left.tick_params(axis="x", labelsize=8)
    coding = result["figures"]["coding"]
    kept = f"Top-K,\nkeep rate {result['p1']['rho']:.3g}"
    names = [kept if name == "Top-K" else name for name in coding]
    bars = right.bar(names, list(coding.values()), color="tab:orange")
    first = next(iter(coding.values()))
    right.bar_label(bars, [f"{one / first:.1%}" for one in coding.values()], fontsize=8)
    right.set_ylabel("bits an element of an activation")
    right.set_xlabel("from Top-K on, one bit says whether the element is kept", fontsize=8)
    right.tick_params(axis="x", labelsize=8)
    for panel in (left, right):
        panel.margins(y=0.15)
        _finish(panel)
    return figure


def _bandwidth(result: Mapping[str, Any]) -> Any:
    rows = result["figures"]["bandwidth"]
    figure = _figure(5.6, 3.8)
    panel = figure.subplots()
    for colour, name in zip(COLOURS, ("sft", "equal", "random"), strict=False):
        label = LABELS[name] if name != "sft" else "SFT, bandwidth of P2"
        seconds = [row[name] for row in rows]
        panel.plot(
            [row["total_hz"] / 1e6 for row in rows], seconds, "o-", color=colour, label=label
        )
    panel.set_xlabel("bandwidth of all devices, MHz")
    panel.set_ylabel("seconds of a round, mean")
    panel.set_ylim(bottom=0)
    _finish(panel)
    panel.legend(frameon=False)
    return figure


def _delay(result: Mapping[str, Any]) -> Any:
    """The plan, and where the file has it the paper's setting under the same model, and what the
    paper measured."""
    series = {"as planned": _minutes(result)}
    if "paper" in result:
        series["the paper's setting"] = _minutes(result["at_paper_setting"])
        series["the paper's figure 10"] = result["paper"]["minutes"]
    figure = _figure(7.4, 3.8)
    panel = figure.subplots()
    thick = 0.8 / len(series)
    for number, (label, minutes) in enumerate(series.items()):
        places = [
            (at + (number - (len(series) - 1) / 2) * thick, minutes[name])
            for at, name in enumerate(WHOLE)
            if name in minutes
        ]
        if not places:
            continue
        xs, heights = zip(*places, strict=True)
        bars = panel.bar(xs, heights, thick * 0.92, color=COLOURS[number], label=label)
        panel.bar_label(bars, [f"{one:.0f}" for one in heights], fontsize=7)
    panel.set_xticks(range(len(WHOLE)), [LABELS[name] for name in WHOLE])
    panel.set_ylabel(f"minutes of {result['rounds']} rounds")
    panel.margins(y=0.1)
    _finish(panel)
    panel.legend(frameon=False, fontsize=8)
    return figure


def _minutes(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: value / 60 for name, value in found["delay_s"].items()}


def _finish(panel: Any) -> None:
    panel.grid(axis="y", alpha=0.25)
    panel.set_axisbelow(True)
