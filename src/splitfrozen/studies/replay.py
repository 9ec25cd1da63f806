"""`splitfrozen replay`: reality, its simulation with the measured speeds, and the forecast.

Of the log of a network run only who did what and waited for what goes into the simulation, and how
fast each party was on the whole: one speed for each party and phase, one rate and latency for each
link. When the events began and ended comes out of `simulation.timeline.replay`, as for any other
list of events. What the simulator does not know (pauses between steps, speeds that change) is the
difference. When a party was there at all (`setup`) is no question of speed and is taken over.

The forecast knows less: tokens as announced, bytes by the codec's bound, speeds of devices as their
probes measured them. It has everybody begin at once and encode in no time, and nothing evaluated;
the speeds of the server, which nobody probes, are the measured ones.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from splitfrozen.disk import explained
from splitfrozen.errors import RequestError
from splitfrozen.records import SERVER, Compute, Event, Outcome
from splitfrozen.runs import networklog
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.forecast import Expected, Part, Speeds, simulate
from splitfrozen.runs.networklog import SETUP
from splitfrozen.runs.summary import table
from splitfrozen.server.assignment import bytes_per_token
from splitfrozen.server.registry import Registry
from splitfrozen.simulation import timeline
from splitfrozen.simulation.gantt import COLOURS, MORE_COLOURS, label
from splitfrozen.simulation.network import Link
from splitfrozen.simulation.timeline import Timeline
from splitfrozen.studies.elsewhere import replay_on

log = logging.getLogger("splitfrozen.replay")

SHOWN = 40
"""Parties and links that are listed and drawn."""

LEAST_S = 1e-9
"""What took no time that a clock shows took so long."""

UNEQUAL = 0.1
"""Sizes must differ by this part of their mean before they tell latency from rate."""


def replay(run: Path, network: Path | None, out: Path | None) -> Outcome:
    """Lay a run beside its replay and its forecast; with `out`, draw and trace them there.

    With `network`, give its events the times of that network instead. Raises StoreError where the
    run has no log, RequestError where it was not measured, ConfigError for the network's file.
    """
    events = networklog.read(run)
    if not events:
        raise RequestError(
            f"nothing of {run} can be replayed",
            got="an empty event log",
            allowed="the log of a run in which something was computed",
            remedy="serve a run to its end, then replay that",
        )
    if network is not None:
        return replay_on(run, events, network, out)
    real, speeds = timeline.measured(events), measure(events)
    again = simulate(events, speeds)
    expected = _forecast(run, speeds)
    data: dict[str, object] = {
        "run": str(run),
        "measured": _figures(real),
        "replayed": _figures(again),
        "forecast": None if expected is None else _figures(expected),
        "difference": {
            "makespan": _apart(again.makespan, real.makespan),
            "bytes": _apart(again.sent, real.sent),
        },
        "parties": _parties(real, again),
        "speeds": [
            {"who": who, "phase": phase, "flops": speed}
            for (who, phase), speed in sorted(speeds.flops.items())
            if phase != SETUP
        ],
        "links": [
            {"source": source, "target": target, "bps": link.bps, "latency_s": link.latency_s}
            for (source, target), link in sorted(speeds.links.items())
        ],
    }
    text = _text(real, again, expected)
    if out is not None:
        text += "\n\n" + "\n".join(f"wrote {path}" for path in _write(out, real, again))
    return Outcome(data, text)


def measure(events: Sequence[Event]) -> Speeds:
    """Mean speeds over a measured log. Latency is told where a link carried unequal sizes."""
    work: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    sends: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        assert event.begin_s is not None
        assert event.end_s is not None
        seconds = event.end_s - event.begin_s
        if isinstance(event, Compute):
            sums = work[event.who, event.phase]
            sums[0] += event.flops
            sums[1] += seconds
        else:
            sends[event.source, event.target].append((event.bytes, seconds))
    flops = {key: amount / max(seconds, LEAST_S) for key, (amount, seconds) in work.items()}
    return Speeds(flops, {way: _link(carried) for way, carried in sends.items()})


def _link(carried: Sequence[tuple[float, float]]) -> Link:
    """Least squares of seconds over bytes where that tells a latency, else all over all."""
    sizes, seconds = (np.array(column) for column in zip(*carried, strict=True))
    mean = Link(max(8 * float(sizes.sum()), 1.0) / max(float(seconds.sum()), LEAST_S))
    if len(carried) < 3 or np.ptp(sizes) < UNEQUAL * sizes.mean():
        return mean
    slope, latency = (float(value) for value in np.polyfit(sizes, seconds, 1))
    return Link(8 / slope, latency) if slope > 0 and latency > 0 else mean


# --- the forecast ----------------------------------------------------------------------------


def _forecast(folder: Path, speeds: Speeds) -> Timeline | None:
    """What formulas say of the run; None where too little was announced or done for that, or where
    a device announced or measured what cannot be: the replay is not lost to that."""
    try:
        return _foretold(folder, speeds)
    except RequestError as error:
        log.warning("no forecast: %s", error)
        return None


def _foretold(folder: Path, speeds: Speeds) -> Timeline | None:
    run = RunFolder(folder)
    shape, prepared = networklog.model_shape(run), run.prepared()
    with closing(Registry(run.root)) as registry:
        rows = [row for row in registry.devices() if not row.revoked and row.depth is not None]
    if shape is None or prepared is None or (SERVER, "train") not in speeds.flops:
        return None
    if any(row.announcement is None or row.profile is None for row in rows):
        return None
    parts = [
        Part(row.id, row.depth, row.announcement.samples, row.announcement.tokens)
        for row in rows
        if row.announcement is not None and row.depth is not None
    ]
    cost = bytes_per_token(prepared)
    expected = Expected(run.config, shape, cost)
    expected.train(parts, expected.send(parts))
    probed = {row.id: row.profile for row in rows if row.profile is not None}
    flops = dict(speeds.flops) | {(who, "front"): one.flops for who, one in probed.items()}
    flops.setdefault((SERVER, "lift"), flops[SERVER, "train"])
    links = {(who, SERVER): Link(one.uplink_bps) for who, one in probed.items()}
    return simulate(expected.log.events, Speeds(flops, {**speeds.links, **links}))


# --- what is shown ---------------------------------------------------------------------------


def _figures(found: Timeline) -> dict[str, object]:
    return {
        "makespan_s": found.makespan,
        "bytes": found.sent,
        "phases": {phase: _phase_s(found, phase) for phase in found.phases if phase != SETUP},
    }


def _phase_s(found: Timeline, phase: str) -> float:
    """Seconds of all parties or links in one phase; 0 where there is none of it."""
    number = found.phases.index(phase) if phase in found.phases else -1
    return float((found.left - found.begin)[found.phase == number].sum())


def _apart(value: float, reference: float) -> float | None:
    """Relative difference."""
    return value / reference - 1 if reference else None


def _parties(real: Timeline, again: Timeline) -> list[dict[str, object]]:
    """What each party and link did and when it was done, in reality and in the replay."""
    return [
        {
            "who": one["who"],
            "events": one["events"],
            "busy_s": one["busy_s"] - one["phases"].get(SETUP, 0.0),
            "replayed_busy_s": other["busy_s"] - other["phases"].get(SETUP, 0.0),
            "end_s": one["last_s"],
            "replayed_end_s": other["last_s"],
            "end_difference": _apart(other["last_s"], one["last_s"]),
        }
        for one, other in zip(real.rows, again.rows, strict=True)
    ]


def _text(real: Timeline, again: Timeline, expected: Timeline | None) -> str:
    every = (real, again, expected)
    lines: dict[str, list[float | None]] = {
        "makespan s": [one.makespan if one else None for one in every],
        "MB sent": [one.sent / 1e6 if one else None for one in every],
    }
    apart = [_apart(values[1] or 0.0, values[0] or 0.0) for values in lines.values()]
    # The sums of the phases are alike by construction: mean speeds were measured.
    for phase in real.phases:
        if phase != SETUP:
            lines[f"{phase} s"] = [_phase_s(one, phase) if one else None for one in every]
            apart.append(None)
    rows = [
        [name, *map(_shown, values), "" if part is None else f"{part:+.1%}"]
        for (name, values), part in zip(lines.items(), apart, strict=True)
    ]
    parties = [
        [f"{one['who']}", f"{one['events']}"]
        + [f"{one[key]:.2f}" for key in ("busy_s", "end_s", "replayed_end_s")]
        for one in _parties(real, again)
    ]
    more = len(parties) - SHOWN
    return "\n".join(
        [
            table(("", "measured", "replayed", "forecast", "replayed / measured"), rows),
            "",
            table(("who", "events", "busy s", "end s", "replayed"), parties[:SHOWN]),
            *([f"and {more} more"] if more > 0 else []),
        ]
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _write(out: Path, real: Timeline, again: Timeline) -> list[Path]:
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    paths = [out / "gantt.png", out / "measured.trace.json", out / "replayed.trace.json"]
    _draw(real, again, paths[0])
    real.write_trace(paths[1])
    again.write_trace(paths[2])
    return paths


def _draw(real: Timeline, again: Timeline, path: Path) -> None:
    """One lane for each party and link: measured above, replayed below."""
    # pyplot keeps figures of its own; a Figure alone needs no display and nothing to close.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    # Encoders work for moments; the server stands last, as in figure 2 of the paper.
    shown = [i for i, lane in enumerate(real.lanes) if not lane.name.endswith("/encode")][:SHOWN]
    shown.sort(key=lambda i: (real.lanes[i].name == SERVER, i))
    figure = Figure(figsize=(12, 1.6 + 0.34 * len(shown)), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds")
    for place, lane in enumerate(shown):
        for found, top in ((real, place - 0.42), (again, place + 0.02)):
            ids = np.flatnonzero(found.lane == lane).tolist()
            bars = [(found.begin[i], found.left[i] - found.begin[i]) for i in ids]
            colours = [_colour(found.events[i].phase) for i in ids]
            axes.broken_barh(bars, (top, 0.4), facecolors=colours)
    for found, style in ((real, "-"), (again, "--")):
        axes.axvline(found.makespan, color="0.3", linestyle=style, linewidth=0.9)
    # A name is no formula, whatever dollars are in it.
    axes.set_yticks(range(len(shown)), [label(real.lanes[i]) for i in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 1.02 * max(real.makespan, again.makespan))
    axes.set_title(
        f"above: measured, {real.makespan:.2f} s (line); "
        f"below: replayed, {again.makespan:.2f} s (dashes)"
    )
    phases = [phase for phase in real.phases if phase != "encode"]
    patches = [Patch(color=_colour(phase), label=phase) for phase in phases]
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    with explained(path):
        figure.savefig(path, dpi=120)


def _colour(phase: str) -> str:
    return COLOURS.get(phase, MORE_COLOURS[-1])
