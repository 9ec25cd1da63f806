"""`simulate`: what each method would take, in virtual time; nothing is trained.

Every cell of the table is one replay of a method's schedule on the experiment's machines and links.
docs/simulation.md defines the columns and compares them with the paper's.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from splitfrozen.config import MethodName
from splitfrozen.disk import explained, write_whole
from splitfrozen.records import SERVER, Compute, Event, Outcome, Send
from splitfrozen.runs.summary import table
from splitfrozen.simulation import experiment as experiments
from splitfrozen.simulation import gantt
from splitfrozen.simulation.experiment import DatasetPart, Experiment
from splitfrozen.simulation.network import Network, role
from splitfrozen.simulation.pipeline import Schedule
from splitfrozen.simulation.schedules import events
from splitfrozen.simulation.setting import Setting, Stages
from splitfrozen.simulation.timeline import Timeline, covered, replay
from splitfrozen.studies.environment import environment

Reuse = Literal["never", "once"]

TERA, GIGA = 1e12, 1e9
FIGURES = {"device_flop": "device_tflop", "device_time": "device_s", "total_time": "total_s"}
"""Names of the reductions, and the columns they are of."""
BASELINES: tuple[MethodName, ...] = ("fedlora", "splitlora")
"""SplitFrozen is compared with the mean of these two, as in the paper's abstract."""
AGAINST = "SplitFrozen against the mean of FedLoRA and SplitLoRA"
SHOWN_STEPS = 6
"""Steps that `--out` draws and traces."""

log = logging.getLogger("splitfrozen.simulate")


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table.

    Attributes:
        reuse: of SplitFrozen: "once" or "never"; None for the other methods.
        device_tflop: 10^12 FLOP of all devices together, were all as deep as the deepest (the
            paper's column "MFLOP"); of the server for "centralized", which has no devices.
        device_tflop_unequal: the same with every device at its own depth.
        device_s: the most seconds that any device computes, sends or receives; `total_s` for
            "centralized".
        device_compute_s: the most seconds that any device computes.
        server_s: seconds that the server computes.
        total_s: from the first begin to the last end.
        sequential_s: `total_s` of SplitFrozen if a step began when the one before had ended; None
            for the other methods.
        up_gb, down_gb: 10^9 bytes from and to all devices.
    """

    dataset: str
    rank: int
    method: MethodName
    reuse: Reuse | None
    epochs: int
    device_tflop: float
    device_tflop_unequal: float
    device_s: float
    device_compute_s: float
    server_s: float
    total_s: float
    sequential_s: float | None
    up_gb: float
    down_gb: float


class Figures(Protocol):
    """What reductions are made of: a `Cell`, or what a paper published of one."""

    @property
    def dataset(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def method(self) -> MethodName: ...
    @property
    def device_tflop(self) -> float: ...
    @property
    def device_s(self) -> float: ...
    @property
    def total_s(self) -> float: ...


def simulate(experiment: Path, out: Path | None) -> Outcome:
    """Simulate all cells; with `out`, write the table, Gantt plots and traces there.

    Raises ConfigError, RequestError, StoreError.
    """
    spec = experiments.load(experiment)
    bench = _Bench(spec, experiments.network(spec))
    cells = bench.cells(spec.train.epochs, ("never",))
    ours, theirs = reductions(cells, cells), reductions(spec.paper.rows, spec.paper.rows)
    data: dict[str, object] = {
        "experiment": str(experiment),
        "epochs": spec.train.epochs,
        "rows": [{**asdict(cell), "paper": _published(spec, cell) or None} for cell in cells],
        "reductions": ours,
        "paper_reductions": theirs,
    }
    text = [_table(spec, cells), "", f"{AGAINST}: {_percent(ours)}"]
    text += [f"the paper's figures in the same way: {_percent(theirs)}"] if theirs else []
    if spec.train.reuse_epochs > 1:
        data["reuse"], more = _reuse(bench)
        text += ["", *more]
    if spec.server.stages > 1:
        data["stages"], more = _stages(bench)
        text += ["", *more]
    if out is not None:
        paths = [*_write(bench, cells, out), out / f"{experiment.stem}.json"]
        with explained(out):
            result = {**data, "environment": environment()}
            write_whole(paths[-1], json.dumps(result, indent=2).encode() + b"\n")
        text += ["", *(f"wrote {path}" for path in paths)]
    return Outcome(data, "\n".join(text))


def _reuse(bench: _Bench) -> tuple[dict[str, object], list[str]]:
    """SplitFrozen with and without reuse over several epochs, as data and as text."""
    epochs = bench.spec.train.reuse_epochs
    cells = bench.cells(epochs, ("never", "once"))
    found = {
        reuse: reductions(cells, [cell for cell in cells if cell.reuse == reuse])
        for reuse in ("never", "once")
    }
    text = [f"Over {epochs} epochs:", _table(bench.spec, cells), ""]
    text += [f'{AGAINST}, reuse = "{reuse}": {_percent(one)}' for reuse, one in found.items()]
    rows = [asdict(cell) for cell in cells]
    return {"epochs": epochs, "rows": rows, "reductions": found}, text


def _stages(bench: _Bench) -> tuple[dict[str, object], list[str]]:
    """SplitFrozen's server as one machine and as a pipeline, at the first rank."""
    server = bench.spec.server
    header = ("dataset", "schedule", "total_s", "server_busy")
    rows: list[tuple[str, str, float, float]] = []
    schedules: tuple[Schedule | None, ...] = (None, "1f1b", "zb-h1")
    for dataset, schedule in itertools.product(bench.spec.datasets, schedules):
        stages = Stages(server.stages, server.micro_batches, schedule) if schedule else None
        line = bench.replay(dataset, replace(bench.setting, stages=stages))
        names = [f"{SERVER}/{stage}" for stage in range(server.stages)] if schedule else [SERVER]
        busy = statistics.fmean(line.busy(name) for name in names) / line.makespan
        rows.append((dataset.name, schedule or "one machine", line.makespan, busy))
    text = [
        f"SplitFrozen's server as {server.stages} stages ({server.micro_batches} micro-batches):"
    ]
    text.append(table(header, [(*row[:2], f"{row[2]:.2f}", f"{row[3]:.3f}") for row in rows]))
    return {
        "stages": server.stages,
        "micro_batches": server.micro_batches,
        "rows": [dict(zip(header, row, strict=True)) for row in rows],
    }, text


# --- one cell --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Bench:
    """An experiment and what it runs on."""

    spec: Experiment
    network: Network

    @property
    def setting(self) -> Setting:
        """Of the first rank."""
        return experiments.setting(self.spec, self.spec.model.ranks[0])

    def cells(self, epochs: int, reuses: tuple[Reuse, ...]) -> list[Cell]:
        """Every dataset, rank and method; SplitFrozen once for each of `reuses`."""
        return [
            self._cell(dataset, rank, method, epochs, reuse)
            for dataset in self.spec.datasets
            for rank in self.spec.model.ranks
            for method in self.spec.methods
            for reuse in (reuses if method == "splitfrozen" else (None,))
        ]

    def replay(self, dataset: DatasetPart, setting: Setting) -> Timeline:
        """SplitFrozen, every step anew."""
        steps = experiments.steps(self.spec, dataset, self.spec.train.epochs)
        return replay(events("splitfrozen", setting, steps), self.network)

    def first(self, dataset: DatasetPart, method: MethodName, setting: Setting) -> Timeline:
        """The first steps of a method."""
        steps = itertools.islice(experiments.steps(self.spec, dataset, 1), SHOWN_STEPS)
        return replay(events(method, setting, steps), self.network)

    def _cell(
        self, dataset: DatasetPart, rank: int, method: MethodName, epochs: int, reuse: Reuse | None
    ) -> Cell:
        once = reuse == "once"
        setting = experiments.setting(self.spec, rank, once=once)

        def forecast(setting: Setting) -> Iterator[Event]:
            return events(method, setting, experiments.steps(self.spec, dataset, epochs, once=once))

        line = replay(forecast(setting), self.network)
        log.debug("%s, rank %d, %s: %d events", dataset.name, rank, method, len(line.events))
        alone = method == "centralized"
        up, down = _bytes(line)
        return Cell(
            dataset=dataset.name,
            rank=rank,
            method=method,
            reuse=reuse,
            epochs=epochs,
            device_tflop=_flops(forecast(replace(setting, depths={})), server=alone) / TERA,
            device_tflop_unequal=_flops(line.events, server=alone) / TERA,
            device_s=line.makespan if alone else _longest(line, links=True),
            device_compute_s=line.makespan if alone else _longest(line, links=False),
            server_s=line.busy(SERVER),
            total_s=line.makespan,
            sequential_s=replay(forecast(replace(setting, ahead=1)), self.network).makespan
            if method == "splitfrozen"
            else None,
            up_gb=up / GIGA,
            down_gb=down / GIGA,
        )


def _flops(log: Iterable[Event], *, server: bool) -> float:
    """FLOP of the server, or of all devices."""
    return sum(
        event.flops
        for event in log
        if isinstance(event, Compute)
        and (event.who == SERVER if server else role(event.who) == "device")
    )


def _bytes(timeline: Timeline) -> tuple[float, float]:
    """From devices, and to devices."""
    up = down = 0.0
    for event in timeline.events:
        if isinstance(event, Send):
            if role(event.source) == "device":
                up += event.bytes
            else:
                down += event.bytes
    return up, down


def _longest(timeline: Timeline, *, links: bool) -> float:
    """The most seconds that any device computes; with `links`, computes, sends or receives."""
    devices: dict[str, int] = {}
    owner = np.full(len(timeline.lanes), -1)
    for number, lane in enumerate(timeline.lanes):
        ends = [lane.who] if lane.target is None else [lane.who, lane.target] if links else []
        for device in ends:
            if role(device) == "device":
                owner[number] = devices.setdefault(device, len(devices))
    owners = owner[timeline.lane]
    order = np.lexsort((timeline.begin, owners))
    places = np.searchsorted(owners[order], np.arange(len(devices) + 1))
    spans = [order[first:last] for first, last in itertools.pairwise(places)]
    return max((covered(timeline.begin[ids], timeline.left[ids]) for ids in spans), default=0.0)


# --- the table -------------------------------------------------------------------------------


def reductions(theirs: Iterable[Figures], ours: Iterable[Figures]) -> dict[str, float]:
    """By how much less SplitFrozen takes than the mean of FedLoRA and SplitLoRA, as fractions.

    Averaged over datasets and ranks, as the paper's headline percentages; empty where a method is
    missing.
    """
    baselines: dict[tuple[str, int], list[Figures]] = {}
    for row in theirs:
        if row.method in BASELINES:
            baselines.setdefault((row.dataset, row.rank), []).append(row)
    found: dict[str, list[float]] = {}
    for row in ours:
        others = baselines.get((row.dataset, row.rank), [])
        if row.method == "splitfrozen" and len(others) == len(BASELINES):
            for name, column in FIGURES.items():
                mean = statistics.fmean(getattr(other, column) for other in others)
                found.setdefault(name, []).append(1 - getattr(row, column) / mean)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _published(spec: Experiment, cell: Cell) -> dict[str, float]:
    """What the paper says of a cell; empty where it says nothing."""
    key = (cell.dataset, cell.rank, cell.method)
    for row in spec.paper.rows:
        if key == (row.dataset, row.rank, row.method) and cell.epochs == spec.train.epochs:
            return {column: getattr(row, column) for column in FIGURES.values()}
    return {}


def _table(spec: Experiment, cells: Sequence[Cell]) -> str:
    """The cells, beside the paper's figures where it has any for them."""
    said = [_published(spec, cell) for cell in cells]
    columns: list[tuple[str, list[str]]] = [
        ("dataset", [cell.dataset for cell in cells]),
        ("rank", [f"{cell.rank}" for cell in cells]),
        ("method", [cell.method for cell in cells]),
        ("reuse", [cell.reuse or "-" for cell in cells]),
    ]
    for name, form in (("device_tflop", ".1f"), ("device_s", ".2f"), ("total_s", ".2f")):
        columns.append((name, [format(getattr(cell, name), form) for cell in cells]))
        if any(said):
            columns.append(("paper", [f"{one[name]:g}" if one else "-" for one in said]))
    for name in ("sequential_s", "device_tflop_unequal"):
        values = [getattr(cell, name) for cell in cells]
        columns.append((name, ["-" if value is None else f"{value:.1f}" for value in values]))
    header, texts = zip(*columns, strict=True)
    return table(header, list(zip(*texts, strict=True)))


def _percent(found: dict[str, float]) -> str:
    parts = [f"{name.replace('_', ' ')} {value:.1%} less" for name, value in found.items()]
    return ", ".join(parts) or "not all of the three were simulated"


# --- files -----------------------------------------------------------------------------------


def _write(bench: _Bench, cells: Sequence[Cell], out: Path) -> Iterator[Path]:
    """The table as CSV; of the first steps, traces of all methods and SplitFrozen's Gantt plots."""
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        path = out / "table.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Cell)])
            writer.writeheader()
            writer.writerows(asdict(cell) for cell in cells)
    yield path
    spec, setting = bench.spec, bench.setting
    dataset = spec.datasets[0]
    lines: dict[str, Timeline] = {}
    for method in spec.methods:
        lines[method] = bench.first(dataset, method, setting)
        path = out / f"trace-{method}.json"
        lines[method].write_trace(path)
        yield path
    if "splitfrozen" in spec.methods:
        equal = bench.first(dataset, "splitfrozen", replace(setting, depths={}))
        for line, what in ((equal, "equal"), (lines["splitfrozen"], "unequal")):
            path = out / f"gantt-{what}.png"
            title = f"SplitFrozen, {dataset.name}, {what} depths, the first {SHOWN_STEPS} steps"
            gantt.draw(line, path, title)
            yield path
