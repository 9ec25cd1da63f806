"""What an experiment found: rows, gains, and both as text, CSV and JSON.

A gain is counted as the SplitFrozen paper counts its own: SplitFrozen's accuracy over the mean of
FedLoRA's and SplitLoRA's, relative and in percent, for each row of its Table II (a dataset and a
rank); then the mean over the rows. Differences are in points, hundredths of accuracy.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from splitfrozen.config import MethodName
from splitfrozen.runs.summary import table
from splitfrozen.studies.cells import Result
from splitfrozen.studies.grid import FILES, Cell, Experiment, Group, Table
from splitfrozen.studies.scores import PLACE, Row, by_place, means, measures, shown, tradeoff

PAPER = {("iid", None): 13.6, ("dirichlet", 0.1): 69.4}
"""The paper's gains over FedLoRA and SplitLoRA in percent, by partition and alpha."""

COLUMNS = (
    *PLACE,
    "accuracy",
    "lr",
    "seconds",
    "bytes",
    "accuracy_before",
    "f1",
    "loss",
    "perplexity",
    "exact_match",
)
"""Of a row: what `train` measured after the last epoch, None where the task has no such measure;
`bytes` that crossed the network."""

SENT = "MB sent (times less than the first of the column; * nothing sends less and scores as well)"

GAINS = (
    "over_baselines_percent",
    "over_splitlora_percent",
    "to_centralized_points",
    "to_iid_points",
)


@dataclass(frozen=True, slots=True)
class Trained:
    """A cell and what it came to."""

    cell: Cell
    result: Result


@dataclass(frozen=True, slots=True)
class Tuned:
    """The learning rate of a group, None where none worked, and the scores of those tried: None
    where the loss was not finite."""

    lr: float | None
    tried: dict[float, float | None]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that is known at the end.

    Attributes:
        experiment: the file.
        trained: in the order of the file's axes.
        tuned: by names of dataset, partition and method.
        majority: by dataset, the accuracy of always naming the most frequent class.
        failures: what failed -> why.
        codes: versions of the code that cells were trained with.
    """

    experiment: Experiment
    trained: list[Trained]
    tuned: dict[tuple[str, str, str], Tuned]
    majority: dict[str, float | None]
    failures: dict[str, str]
    codes: list[str]


def report(found: Findings) -> dict[str, object]:
    """Everything for `--json`."""
    rows = [_row(one) for one in found.trained if not one.result.diverged]
    keys = ("dataset", "partition", "method")
    return {
        "experiment": found.experiment.name,
        "rows": rows,
        "gains": gains(found.experiment, rows),
        "tradeoff": tradeoff(rows),
        "majority": found.majority,
        "tried": [
            {
                **dict(zip(keys, names, strict=True)),
                "lr": tuned.lr,
                "tried": [{"lr": lr, "score": score} for lr, score in tuned.tried.items()],
            }
            for names, tuned in found.tuned.items()
        ],
        "answers": [
            {**{key: getattr(t.cell, key) for key in (*keys, "rank", "seed")}, "answers": answers}
            for t in found.trained
            if (answers := list(t.result.answers))
        ],
        "codes": found.codes,
        "failures": found.failures
        | {str(t.cell): "the loss was not finite" for t in found.trained if t.result.diverged},
    }


def gains(experiment: Experiment, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """SplitFrozen against the others, for `each` dataset, rank and partition, and the `mean`.

    Of several methods of one kind, as SplitLoRA with either server, the file's first one counts.
    What needs a method or partition that the experiment lacks is None.
    """
    accuracy = means(rows, "accuracy")
    kinds = _kinds(experiment)
    partitions = [one.name for one in experiment.partitions]
    iid = next((name for name in partitions if _paper_key(experiment, name)[0] == "iid"), None)

    def of(place: tuple[str, str, int], kind: MethodName) -> float | None:
        return accuracy.get((*place, kinds.get(kind, "")))

    each: list[Row] = []
    for dataset in [one.name for one in experiment.datasets]:
        for partition in partitions:
            for rank in experiment.spec.ranks:
                place = (dataset, partition, rank)
                ours, split = of(place, "splitfrozen"), of(place, "splitlora")
                fed = of(place, "fedlora")
                skewed = iid is not None and partition != iid
                at_iid = of((dataset, iid or "", rank), "splitfrozen") if skewed else None
                both = None if split is None or fed is None else (split + fed) / 2
                values = (
                    _percent(ours, both),
                    _percent(ours, split),
                    _points(ours, of(place, "centralized")),
                    _points(ours, at_iid),
                )
                named = dict(zip(("dataset", "partition", "rank"), place, strict=True))
                each.append(named | dict(zip(GAINS, values, strict=True)))
    mean = [
        {
            "partition": partition,
            "paper_percent": PAPER.get(_paper_key(experiment, partition)),
            **{
                name: _mean(one[name] for one in each if one["partition"] == partition)
                for name in GAINS
            },
        }
        for partition in partitions
    ]
    return {"mean": mean, "each": each}


def kept(found: Findings, data: Mapping[str, object]) -> dict[str, object]:
    """What a result file holds: the report, the experiment as it was written, and the curves."""
    return {
        **data,
        "labels": {one.name: one.title for one in found.experiment.methods},
        "seeds": list(found.experiment.spec.seeds),
        "config": {**found.experiment.source, "set": _without_places(found.experiment.settings)},
        "curves": [
            {
                **{key: getattr(t.cell, key) for key in PLACE},
                "evaluations": t.result.evaluations,
                "losses": t.result.losses,
            }
            for t in found.trained
        ],
    }


def to_json(result: Mapping[str, object]) -> str:
    """JSON with one line for each element of a list, so that versions can be compared."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list) and value:
            lines = ",\n  ".join(json.dumps(one) for one in value)
            parts.append(f"{json.dumps(key)}: [\n  {lines}\n ]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def to_csv(found: Findings) -> str:
    """The rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(one) for one in found.trained if not one.result.diverged)
    return text.getvalue()


# --- text ----------------------------------------------------------------------------------------


def text(found: Findings, data: Mapping[str, Any]) -> str:
    """Tables for people: a mean over the seeds, and half of the distance between its extremes."""
    parts = []
    for dataset in [one.name for one in found.experiment.datasets]:
        majority = found.majority[dataset]
        beside = "" if majority is None else f" (majority class {100 * majority:.1f})"
        for measure, told in measures(data["rows"]).items():
            own = scores(data["rows"], dataset, labels(found.experiment), measure)
            parts += [f"{dataset}, {told}{beside}", table(*own), ""]
        sent = [one for one in data["tradeoff"] if one["dataset"] == dataset]
        if sent:
            parts += [f"{dataset}, {SENT}", table(*told_bytes(sent, labels(found.experiment))), ""]
    gained = told_gains(data["gains"])
    parts += [*gained, ""] if gained else []
    parts += [_told_rates(found), ""] if any(one.tried for one in found.tuned.values()) else []
    parts += told_answers(data["answers"], found.experiment.spec.prompts)
    parts += [f"failed: {name}: {why}" for name, why in data["failures"].items()]
    return "\n".join(parts).rstrip()


def labels(experiment: Experiment) -> dict[str, str]:
    return {one.name: one.title for one in experiment.methods}


def scores(
    rows: Sequence[Row], dataset: str, titles: Mapping[str, str], measure: str
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table: methods down, partitions and ranks across."""
    own = [row for row in rows if row["dataset"] == dataset]
    values = by_place(own, measure)
    columns = list(dict.fromkeys((row["partition"], row["rank"]) for row in own))
    header = ["method", *(f"{partition}, rank {rank}" for partition, rank in columns)]
    lines = [
        [title, *(_spread(values.get((dataset, *column, name)), measure) for column in columns)]
        for name, title in titles.items()
    ]
    return header, [line for line in lines if any(cell != "-" for cell in line[1:])]


def told_bytes(sent: Sequence[Row], titles: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table of a dataset's `tradeoff`: methods down, as in `scores`."""
    columns = list(dict.fromkeys((one["partition"], one["rank"]) for one in sent))
    cells = {
        (one["method"], one["partition"], one["rank"]): f"{one['bytes'] / 1e6:.2f}"
        f" ({one['times_less']:.3g}x){' *' if one['on_front'] else ''}"
        for one in sent
    }
    header = ["method", *(f"{partition}, rank {rank}" for partition, rank in columns)]
    lines = [
        [title, *(cells.get((name, *column), "-") for column in columns)]
        for name, title in titles.items()
    ]
    return header, [line for line in lines if any(cell != "-" for cell in line[1:])]


def told_gains(gained: Mapping[str, Sequence[Row]]) -> list[str]:
    """The gains in sentences."""
    lines = []
    for one in gained["mean"]:
        where, paper = one["partition"], one["paper_percent"]
        beside = "" if paper is None else f" (the paper, GPT-2 on its data: {paper:+.1f} %)"
        over, split = one["over_baselines_percent"], one["over_splitlora_percent"]
        if over is not None:
            baselines = "the mean of FedLoRA and SplitLoRA"
            lines.append(f"{where}: SplitFrozen over {baselines} {over:+z.1f} %{beside}")
        if split is not None:
            lines.append(f"{where}: SplitFrozen over SplitLoRA {split:+z.1f} %")
        for key, other in (
            ("to_centralized_points", "centralised training"),
            ("to_iid_points", "itself with IID data"),
        ):
            if one[key] is not None:
                lines.append(f"{where}: SplitFrozen against {other} {one[key]:+z.1f} points")
    return lines


def told_answers(answers: Sequence[Row], prompts: Sequence[str]) -> list[str]:
    """What the models of the first seed and rank answered, side by side."""
    lines = []
    for number, prompt in enumerate(prompts):
        lines.append(prompt)
        said: dict[tuple[str, str], str] = {}
        for one in answers:
            said.setdefault((one["partition"], one["method"]), one["answers"][number])
        lines += [
            f"  {method} ({partition}): {' '.join(answer.split())}"
            for (partition, method), answer in said.items()
        ]
        lines.append("")
    return lines


def _told_rates(found: Findings) -> str:
    header = ["learning rate of", "chosen", "tried"]
    lines = [
        [", ".join(names), "-" if one.lr is None else f"{one.lr:g}", _rates(one.tried)]
        for names, one in found.tuned.items()
    ]
    return table(header, lines)


def _rates(tried: Mapping[float, float | None]) -> str:
    told = {lr: "diverged" if score is None else f"{score:.3f}" for lr, score in tried.items()}
    return ", ".join(f"{lr:g}: {score}" for lr, score in told.items())


def _spread(values: Sequence[float] | None, measure: str) -> str:
    if not values:
        return "-"
    spread = shown(max(values) - min(values), measure) / 2
    return f"{shown(fmean(values), measure):.1f}" + (f" ±{spread:.1f}" if len(values) > 1 else "")


# --- numbers -------------------------------------------------------------------------------------


def _row(one: Trained) -> Row:
    cell, result = one.cell, one.result
    named = {key: getattr(cell, key) for key in PLACE}
    measures = {key: result.after.get(key) for key in COLUMNS if key not in named}
    return (
        named
        | measures
        | {
            "lr": cell.lr,
            "seconds": result.seconds,
            "bytes": result.bytes,
            "accuracy_before": result.before.get("accuracy"),
        }
    )


def _kinds(experiment: Experiment) -> dict[MethodName, str]:
    """The file's first method of every kind."""
    found: dict[MethodName, str] = {}
    for method in experiment.methods:
        group = Group(experiment.datasets[0], experiment.partitions[0], method)
        found.setdefault(experiment.config(group).method.name, method.name)
    return found


def _paper_key(experiment: Experiment, partition: str) -> tuple[str, float | None]:
    choice = next(one for one in experiment.partitions if one.name == partition)
    data = experiment.config(Group(experiment.datasets[0], choice, experiment.methods[0])).data
    assert data is not None
    return data.partition, None if data.partition == "iid" else data.alpha


def _without_places(settings: Mapping[str, Table]) -> dict[str, Table]:
    """Paths of this machine tell nobody else anything but their last part."""
    return {
        section: {
            key: Path(value).name if f"{section}.{key}" in (*FILES, "experiment.folder") else value
            for key, value in values.items()
        }
        for section, values in settings.items()
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _percent(ours: float | None, other: float | None) -> float | None:
    return None if ours is None or not other else 100 * (ours / other - 1)


def _points(ours: float | None, other: float | None) -> float | None:
    return None if ours is None or other is None else 100 * (ours - other)
