"""What a run did, from its folder: for `status`, for the end of `serve`, and as a plot."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitfrozen.records import Outcome
from splitfrozen.runs.folder import RunFolder
from splitfrozen.server.registry import DeviceRow, Registry
from splitfrozen.server.store import Store, Totals

SHOWN_WAITING = 3
"""Devices that a line of progress names."""

log = logging.getLogger("splitfrozen.summary")

LONGEST_FAILURE = 200
"""Characters of a device's failure that people are shown; all of it is in `--json`."""
LARGEST = 1e12
"""Numbers beyond it are shown in powers of ten: devices may say what they like."""
NOTHING = Totals(samples=0, tokens=0, bytes=0)


def summarize(run: RunFolder, registry: Registry, store: Store) -> dict[str, Any]:
    """Everything that is known of a run, ready for JSON."""
    totals, state = store.totals(), registry.state()
    expected = _forecasts(run.root / "forecast.json")
    before = next(iter(run.events("baseline")), {})
    evaluations = _events(run, "evaluation", "epoch")
    best = max(evaluations, key=_score, default={})
    picture = run.root / "curves.png"
    return {
        "run": run.name,
        "method": run.config.method.name,
        "folder": str(run.root),
        "state": state.state,
        "error": state.error,
        "accuracy_before": _metrics(before).get("accuracy"),
        "accuracy_after": _metrics(best).get("accuracy"),
        "before": _metrics(before),
        "after": _metrics(best),
        "epochs": len({event["epoch"] for event in evaluations}),
        "steps": _steps(run),
        "adapter": _adapter(run),
        "devices": [
            _device(row, totals.get(row.id, NOTHING), expected.get(row.id, {}))
            for row in registry.devices()
        ],
        **({"plot": str(picture)} if picture.is_file() else {}),
    }


def outcome(run: RunFolder, registry: Registry, store: Store) -> Outcome:
    """The end of `serve`: summary, comparison with the forecast, plot."""
    if _events(run, "step", "step"):
        _try_to_plot(run)
    data = summarize(run, registry, store)
    return Outcome(data, text(data))


def text(data: dict[str, Any]) -> str:
    """A summary for people."""
    header = (
        "device",
        "name",
        "depth",
        "samples",
        "stored",
        "MB sent",
        "at most",
        "seconds",
        "expected",
        "",
    )
    rows = [
        (
            device["id"],
            printable(device["name"] or "-"),
            _or_dash(device["depth"]),
            _or_dash(device["announced"]),
            str(device["samples"]),
            _or_dash(_mega(device["bytes_up"]), ".2f"),
            _or_dash(_mega(device["forecast_bytes"]), ".2f"),
            _or_dash(device["seconds"], ".1f"),
            _or_dash(device["forecast_seconds"], ".1f"),
            "purged" if device["revoked"] else "failed" if device["failure"] else "",
        )
        for device in data["devices"]
    ]
    # Other methods' devices keep nothing on the server.
    lines = [table(*_without_empty(header, rows)), ""] if data["method"] == "splitfrozen" else []
    lines += [
        f"{device['id']} failed: {printable(_cut(device['failure']))}"
        for device in data["devices"]
        if device["failure"] and not device["revoked"]
    ]
    for when in ("before", "after"):
        values = ", ".join(f"{name} {value:.4f}" for name, value in data[when].items())
        lines += [f"{when:<7} {values}"] if values else []
    lines += [f"adapter {_near(data['adapter'])}"] if data["adapter"] else []
    lines += [f"plot    {_near(data['plot'])}"] if "plot" in data else []
    lines.append(f"run     {data['state']}" + (f": {data['error']}" if data["error"] else ""))
    return "\n".join(lines)


def line(run: RunFolder, registry: Registry, store: Store) -> str:
    """How far the run is, in one line."""
    state = registry.state().state
    if state == "training" and (began := _events(run, "training", "steps")):
        return f"training: step {_steps(run)} of {began[-1]['steps']}"
    rows = [row for row in registry.devices() if not row.revoked]
    joined = sum(row.enrolled_at is not None for row in rows)
    if state == "preparing":
        return (
            f"{state}: {joined} of {len(rows)} devices joined; the server is preparing the model, "
            "and devices wait for it"
        )
    totals = store.totals()
    announced = sum(row.announcement.samples for row in rows if row.announcement is not None)
    stored = sum(total.samples for total in totals.values())
    text = (
        f"{state}: {joined} of {len(rows)} devices joined, {stored} of {announced} samples stored"
    )
    waiting = [f"{row.id} ({why})" for row in rows if (why := _lacks(row, totals))]
    if waiting:
        more = f" and {len(waiting) - SHOWN_WAITING} more" if waiting[SHOWN_WAITING:] else ""
        text += f"; waiting for {', '.join(waiting[:SHOWN_WAITING])}{more}"
    return text


def _lacks(row: DeviceRow, totals: Mapping[str, Totals]) -> str:
    """What is still expected of a device; empty where nothing is."""
    if row.failure:
        return "failed: mend it and join again, or purge it"
    if row.announcement is None:
        return "not joined" if row.enrolled_at is None else "reading its data"
    stored = totals.get(row.id, NOTHING).samples
    return f"{stored} of {row.announcement.samples}" if stored < row.announcement.samples else ""


def _without_empty(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that say nothing of anybody."""
    empty = {i for i in range(len(header)) if rows and all(row[i] in ("", "-") for row in rows)}
    kept = [i for i in range(len(header)) if i not in empty]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    numeric = [
        bool(rows) and all(row[i].replace(".", "").isdigit() or row[i] == "-" for row in rows)
        for i in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def plot(run: RunFolder) -> Path:
    """Draw loss and accuracy (or perplexity) over the steps; returns the PNG's path."""
    # pyplot keeps figures of its own; a Figure alone needs no display and nothing to close.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # A resumed run reports some steps twice; the last one counts.
    steps = {event["step"]: _number(event.get("loss")) for event in _events(run, "step", "step")}
    evaluations = [{**event, "step": 0} for event in run.events("baseline")]
    evaluations += _events(run, "evaluation", "step")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # A name is no formula, whatever dollars are in it.
    axes.set_title(run.name, parse_math=False)
    axes.set_ylabel("training loss", color="tab:blue")
    axes.grid(alpha=0.25)
    xs = sorted(steps)
    axes.plot(xs, [steps[x] for x in xs], color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(xs, _smooth([steps[x] for x in xs]), color="tab:blue", label="training loss")
    name = "accuracy" if evaluations and "accuracy" in evaluations[0] else "perplexity"
    points = {event["step"]: _number(event.get(name)) for event in evaluations}
    points = {step: value for step, value in points.items() if not math.isnan(value)}
    if points:
        right = axes.twinx()
        right.set_ylabel(name, color="tab:orange")
        at, values = zip(*sorted(points.items()), strict=True)
        right.plot(at, values, "o-", markersize=4, color="tab:orange", label=f"evaluation {name}")
        if name == "accuracy":
            right.set_ylim(0, 1.02)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    path = run.root / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def _try_to_plot(run: RunFolder) -> None:
    """A run that was trained is not lost to its picture, which may be made of its file later."""
    try:
        plot(run)
    except Exception as error:  # A drawing library raises what it likes.
        log.warning("no plot was made: %s: %s", type(error).__name__, error)
        with contextlib.suppress(OSError):
            (run.root / "curves.png").unlink()


def _events(run: RunFolder, kind: str, key: str) -> list[dict[str, Any]]:
    """Events of a kind that have a whole number under `key`; damaged lines may lack it."""
    return [event for event in run.events(kind) if type(event.get(key)) is int]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a thirtieth of all values, corrected for its start."""
    keep = 1 - 1 / max(1.0, len(values) / 30)
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(total / weight)
    return smooth


def _device(row: DeviceRow, stored: Totals, expected: dict[str, Any]) -> dict[str, Any]:
    report = row.report
    return {
        "id": row.id,
        "name": row.name,
        "depth": row.depth,
        "samples": stored.samples,
        "announced": None if row.announcement is None else row.announcement.samples,
        "skipped": None if row.announcement is None else row.announcement.skipped,
        "bytes_up": stored.bytes if report is None else report.bytes_up,
        "seconds": None if report is None else report.seconds,
        "compute_s": None if report is None else report.compute_s,
        "upload_s": None if report is None else report.upload_s,
        "padding": None if report is None else report.padding,
        "forecast_seconds": expected.get("seconds"),
        "forecast_bytes": expected.get("bytes"),
        "silent_s": None if row.last_seen is None else round(time.time() - row.last_seen, 1),
        "failure": row.failure,
        "revoked": row.revoked,
    }


def _steps(run: RunFolder) -> int:
    return max((event["step"] for event in _events(run, "step", "step")), default=0)


def _forecasts(path: Path) -> dict[str, dict[str, Any]]:
    """By device, what can be read of it: seconds and bytes."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    rows = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return {
        str(one.get("device")): {key: value for key, value in one.items() if _number(value) >= 0}
        for one in rows
    }


def _score(event: dict[str, Any]) -> float:
    """What the loop chose the best adapter by; None where it was not a number."""
    score = _number(event.get("score"))
    return float("-inf") if math.isnan(score) else score


def _metrics(event: dict[str, Any]) -> dict[str, float]:
    names = ("accuracy", "f1", "loss", "perplexity", "exact_match")
    found = {name: _number(event.get(name)) for name in names}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _adapter(run: RunFolder) -> str | None:
    for name in ("best", "last"):
        if (run.training / name / "adapter_config.json").is_file():
            return str(run.training / name)
    return None


def printable(text: str) -> str:
    """What a device says may hold control characters, which a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _near(path: str) -> str:
    """A path from the working directory, where it lies below it."""
    below = Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd())) if below else path


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_FAILURE else f"{text[:LONGEST_FAILURE]}..."


def _mega(number: float | None) -> float | None:
    return None if number is None else number / 1e6


def _or_dash(value: float | None, form: str = "") -> str:
    if value is None:
        return "-"
    return format(value, form if abs(value) < LARGEST else ".3g")
