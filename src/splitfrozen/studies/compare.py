"""`splitfrozen compare`: several methods side by side, each with a learning rate tuned alike.

Three stages: tune, train, report. A learning rate is chosen for every dataset, partition and method
by training on a part of the training rows and measuring on another; the rows that are reported
choose nothing. Then every rank and seed is trained with it. Cells that failed are named and the
rest is reported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from splitfrozen import rng
from splitfrozen.config import Config
from splitfrozen.data.readers import read_rows, refuse_missing
from splitfrozen.data.tasks import COLUMNS
from splitfrozen.disk import explained, make_folder, write_whole
from splitfrozen.errors import ConfigError
from splitfrozen.records import Outcome
from splitfrozen.studies import findings, grid, plots
from splitfrozen.studies.cells import Cells, Progress, Result, Runner, Subprocesses, locked, size
from splitfrozen.studies.environment import environment
from splitfrozen.studies.findings import Findings, Trained, Tuned
from splitfrozen.studies.grid import DatasetChoice, Experiment, Group, Split

log = logging.getLogger("splitfrozen.compare")

EQUALS = 1e-5
"""Scores that differ by less do so by the loss among equal accuracies."""


def compare(source: Path, settings: Sequence[str], jobs: int | None, out: Path | None) -> Outcome:
    """Run an experiment, or continue it.

    Args:
        source: the experiment's TOML file.
        settings: `table.key=value` each, in place of what the file says.
        jobs: cells at a time; all cores where it is None.
        out: folder for what `write` writes; nothing is written where it is None.

    Raises:
        ConfigError: the file, or a setting.
        DataError: rows that cannot be read.
        StoreError: another `compare` is at work in the folder, `out` cannot be written, or the disk
            refuses.
    """
    experiment = grid.load(source, settings)
    if jobs is not None and jobs < 1:
        raise ConfigError("`--jobs` is wrong", got=jobs, allowed="1 or more", remedy="leave it out")
    _refuse_no_file(experiment)
    if out is not None:
        make_folder(out)  # A place where nothing can be written is told before hours of training.
    with locked(experiment.folder), _ended_by_sigterm():
        runner = Subprocesses(experiment.folder)
        found = run(experiment, runner, jobs or _cores())
    data = findings.report(found)
    text = findings.text(found, data)
    if out is not None and data["rows"]:
        text += "\n\n" + "\n".join(map(str, write(found, data, out)))
    elif out is not None:
        text += "\n\nnothing was trained to its end, so nothing was written"
    return Outcome(data, text, 1 if data["failures"] else 0)


def run(experiment: Experiment, runner: Runner, jobs: int) -> Findings:
    """Tune and train all cells that are not finished; `locked` holds the experiment's folder."""
    held_out = {one.name: _hold_out(experiment, one) for one in experiment.datasets}
    progress = Progress(jobs)
    cells = Cells(experiment.folder, runner, jobs, progress)
    try:
        rates = _tune(experiment, cells, held_out)
        planned = [
            cell
            for group in experiment.groups()
            if (rate := rates[_names(group)].lr) is not None
            for cell in experiment.cells(group, rate)
        ]
        results = cells.finish(planned)
    finally:
        progress.close()
    if len(cells.codes) > 1:
        log.warning(
            "cells come from %d versions of the code; for one, delete %s",
            len(cells.codes),
            experiment.folder,
        )
    lost = {
        ", ".join(name): "no learning rate that was tried gave a finite loss"
        if tuned.tried
        else "all trials of learning rates failed, see above"
        for name, tuned in rates.items()
        if tuned.lr is None
    }
    return Findings(
        experiment=experiment,
        trained=[Trained(c, results[c.key]) for c in planned if c.key in results],
        tuned=rates,
        majority={one.name: _majority(experiment, one) for one in experiment.datasets},
        failures=cells.failures | lost,
        codes=sorted(cells.codes),
    )


def write(found: Findings, data: Mapping[str, object], out: Path) -> list[Path]:
    """Write NAME.json, NAME.csv, NAME.png and, where bytes are known, NAME-bytes.png.

    Returns their paths. Raises StoreError.
    """
    name = found.experiment.name
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    result = {**findings.kept(found, data), "environment": environment()}
    paths = [out / f"{name}.{ending}" for ending in ("json", "csv", "png")]
    write_whole(paths[0], findings.to_json(result).encode())
    write_whole(paths[1], findings.to_csv(found).encode())
    with explained(paths[2]):
        plots.draw(result, paths[2])
    if result["tradeoff"]:
        paths.append(out / f"{name}-bytes.png")
        with explained(paths[3]):
            plots.draw_tradeoff(result, paths[3])
    return paths


# --- learning rates ------------------------------------------------------------------------------


@dataclass
class _Search:
    """The rates that a group tried and is to try; `rows` is what a trial was measured on."""

    group: Group
    rows: int
    todo: list[float]
    results: dict[float, Result] = field(default_factory=dict)

    @property
    def tried(self) -> dict[float, float | None]:
        """Score by rate, in order; None where training diverged."""
        return {lr: result.score for lr, result in sorted(self.results.items())}

    def best(self) -> float | None:
        """The rate to take; None where none worked.

        Accuracy on a few hundred rows is coarse, and the rate that is best by one row may be at the
        edge of what training bears. So of all whose accuracy is within one standard error of the
        best, the one with the least loss is taken; without an accuracy, the least loss of all.
        """
        good = {lr: score for lr, score in self.tried.items() if score is not None}
        if not good:
            return None
        top = max(good.values())
        share = min(max(top, 0.0), 1.0)
        error = math.sqrt(share * (1 - share) / self.rows)
        near = [lr for lr, score in good.items() if score >= top - error]
        return min(near, key=lambda lr: (self.results[lr].after["loss"], lr))

    def beyond(self, rates: Sequence[float]) -> list[float]:
        """The next rate where the best one is the first or last; the step is that of `rates`.

        None where another is as good but for what decides between equals: it would go on for
        nothing where no rate gets anywhere.
        """
        best = self.best()
        if best is None or min(self.tried) < best < max(self.tried):
            return []
        good = sorted((score for score in self.tried.values() if score is not None), reverse=True)
        if len(good) > 1 and good[0] - good[1] < EQUALS:
            return []
        high = best == max(self.tried)
        return [_rounded(best * (rates[-1] / rates[-2] if high else rates[0] / rates[1]))]


def _tune(
    experiment: Experiment, cells: Cells, held_out: Mapping[str, Split]
) -> dict[tuple[str, str, str], Tuned]:
    """Choose a learning rate for every group."""
    tune = experiment.tune
    if not tune.needed:
        return {_names(group): Tuned(tune.rates[0], {}) for group in experiment.groups()}
    groups = experiment.groups()
    searches = [
        _Search(one, experiment.trials(one.dataset).held_out, list(tune.rates))
        for one in groups
        if one.method.rate_of is None
    ]
    final = {c.key: c for one in groups for c in experiment.cells(one, tune.rates[0])}
    later = sum(size(cell) for cell in final.values())
    for _ in range(1 + tune.extend):
        planned = [
            (search, lr, experiment.tuning_cell(search.group, lr, held_out[search.group[0].name]))
            for search in searches
            for lr in search.todo
        ]
        results = cells.finish([cell for _, _, cell in planned], later)
        for search, lr, cell in planned:
            if cell.key in results:
                search.results[lr] = results[cell.key]
        for search in searches:
            search.todo = [lr for lr in search.beyond(tune.rates) if lr not in search.tried]
    rates = {_names(s.group): Tuned(s.best(), s.tried) for s in searches}
    for one in groups:
        if one.method.rate_of is not None:
            dataset, partition, _ = _names(one)
            rates[_names(one)] = Tuned(rates[dataset, partition, one.method.rate_of].lr, {})
    return rates


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _names(group: Group) -> tuple[str, str, str]:
    return group.dataset.name, group.partition.name, group.method.name


# --- data ----------------------------------------------------------------------------------------


def _hold_out(experiment: Experiment, dataset: DatasetChoice) -> Split:
    """Write the rows to tune on and to measure that on, both drawn from the training data.

    Raises DataError, ConfigError, StoreError.
    """
    tune, made = experiment.trials(dataset), _config(experiment, dataset)
    folder = experiment.folder / "tune"
    assert made.data is not None
    parted = _parting(experiment, dataset)
    read = [grid.fingerprint(made.data.train), sorted(made.task.columns.items()), *parted]
    origin = hashlib.sha256(msgspec.json.encode(read)).hexdigest()[:12]
    stem = f"{origin}-{tune.seed}-{tune.rows}-{tune.held_out}"
    split = Split(folder / f"{stem}-train.jsonl", folder / f"{stem}-held-out.jsonl")
    if not tune.needed or all(path.exists() for path in split):
        return split
    rows = list(_rows(made, made.data.train, parted))
    needed = tune.held_out + tune.rows
    if needed > len(rows):
        raise ConfigError(
            f"too few rows in {made.data.train} to tune on",
            got=len(rows),
            allowed=f"tune.rows + tune.held_out = {needed} or more",
            remedy="lower them",
        )
    drawn = rng.stream(tune.seed, "tune").permutation(len(rows))[:needed]
    folder.mkdir(exist_ok=True)
    parts = drawn[tune.held_out :], drawn[: tune.held_out]
    for path, part in zip(split, parts, strict=True):
        text = "".join(_line(rows[i], made.data.train) for i in sorted(part))
        write_whole(path, text.encode())
    return split


def _refuse_no_file(experiment: Experiment) -> None:
    """A misspelt path is told before anything is trained. Raises DataError."""
    sources: dict[str | None, None] = {}
    for group in experiment.groups():
        made = experiment.config(group)
        assert made.data is not None
        sources |= dict.fromkeys((made.data.train, made.task.eval, made.wire.public))
    refuse_missing(*sources)


def _config(experiment: Experiment, dataset: DatasetChoice) -> Config:
    return experiment.config(Group(dataset, experiment.partitions[0], experiment.methods[0]))


def _parting(experiment: Experiment, dataset: DatasetChoice) -> list[str]:
    """The columns by which any of the partitions parts the rows."""
    groups = (Group(dataset, one, experiment.methods[0]) for one in experiment.partitions)
    found = (experiment.config(group).data for group in groups)
    return sorted({data.column for data in found if data is not None and data.column is not None})


def _rows(made: Config, source: str, parted: Sequence[str]) -> Iterator[dict[str, object]]:
    """The rows of a file under its own names of the columns."""
    columns = {name: name for name in COLUMNS[made.task.kind]} | dict(made.task.columns)
    columns |= {f"parted by {name}": name for name in parted}
    for row in read_rows(source, columns, lambda _: None):
        yield {columns[ours]: value for ours, value in row.values.items()}


def _line(row: Mapping[str, object], source: str) -> str:
    try:
        return json.dumps(row) + "\n"
    except TypeError as error:
        raise ConfigError(
            f"the rows of {source} cannot be tuned on",
            got="values that are no text and no number",
            allowed="text, or one rate in tune.rates",
            remedy="give one rate",
        ) from error


def _majority(experiment: Experiment, dataset: DatasetChoice) -> float | None:
    """Accuracy of always naming the most frequent class of `task.eval`; None without classes."""
    made = _config(experiment, dataset)
    assert made.task.eval is not None
    if made.task.kind == "causal_lm":
        return None
    column = made.task.columns.get("label", "label")
    rows = read_rows(made.task.eval, {"label": column}, lambda _: None)
    counts = Counter(str(row.values["label"]) for row in rows)
    return max(counts.values(), default=0) / max(counts.total(), 1)


# --- this machine --------------------------------------------------------------------------------


def _cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does: with the trainings that it started."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
