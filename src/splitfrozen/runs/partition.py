"""`splitfrozen partition`: who holds which rows, as a table, as a plot, and as files for devices.

The rows are those that `train` uses with the same file: bad ones left out, chosen, divided.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitfrozen.data.tasks import truncation
from splitfrozen.disk import explained, write_whole
from splitfrozen.errors import ConfigError, RequestError
from splitfrozen.records import Outcome
from splitfrozen.runs import summary
from splitfrozen.runs.prepare import load_sliced, task_alone
from splitfrozen.runs.rows import Portion, data_of, gather, load

SHOWN_CLASSES = 12
"""With more of them the table says only how many classes a device has, and the plot no names."""
NAMED_WIDTH = 60
"""Characters that fit side by side below a plot."""
ENDINGS = (".png", ".svg", ".pdf")

_UNLABELLED = "samples"
_SAID = {
    "iid": "IID",
    "dirichlet": "label skew, Dirichlet {alpha:g}",
    "quantity": "quantity skew, Dirichlet {alpha:g}",
    "column": "by column {column!r}",
}


@dataclass(frozen=True, slots=True)
class Share:
    """One device's part, in numbers.

    Attributes:
        id: as in a run.
        name: the column's value that its rows share; empty for other partitions.
        tokens: sum of T.
        classes: class -> samples; none for causal_lm.
    """

    id: str
    name: str
    samples: int
    tokens: int
    classes: dict[str, int]


def partition(source: Path, plot: Path | None, out: Path | None) -> Outcome:
    """Show how a run's `[data]` is divided among its devices.

    Args:
        source: the run's TOML file.
        plot: picture to draw; None for none.
        out: folder that gets `device-NN.jsonl`, which `join --data` reads; None for none.

    Raises:
        ConfigError: the file, `[data]` in it, or an option.
        DataError: the rows cannot be used. ModelError: the model, whose tokenizer decides which
            rows are good, cannot be loaded.
        RequestError: fewer samples than devices; or `out` is in the way.
    """
    wanted = load(source)
    data = data_of(wanted)
    _check_targets(plot, out)
    task, tokenizer = task_alone(wanted, load_sliced(wanted))
    gathered = gather(wanted, task, tokenizer)
    width = max(2, len(str(wanted.devices.count - 1)))
    shares = [
        _share(f"device-{number:0{width}}", portion, task.labels)
        for number, portion in enumerate(gathered.portions)
    ]
    how = _SAID[data.partition].format(alpha=data.alpha, column=data.column)
    total = sum(share.samples for share in shares)
    cut = sum(sample.truncated for portion in gathered.portions for sample in portion.samples)
    found: dict[str, Any] = {
        "partition": data.partition,
        "samples": total,
        "skipped": gathered.skipped,
        "truncated": cut,
        "devices": [dataclasses.asdict(share) for share in shares],
    }
    lines = [_table(shares, task.labels), ""]
    lines.append(f"{total} samples, {how}, {gathered.skipped} rows left out")
    lines += [truncation(cut, total, task.max_tokens)] if cut else []
    if out is not None:
        files = _write(out, shares, gathered.portions, task.columns)
        found["files"] = [str(path) for path in files]
        lines.append(f"rows    {out}/device-*.jsonl")
    if plot is not None:
        draw(shares, task.labels, f"{source.stem}: {how}", plot)
        found["plot"] = str(plot)
        lines.append(f"plot    {plot}")
    return Outcome(found, "\n".join(lines))


def _share(device: str, portion: Portion, labels: Sequence[str]) -> Share:
    classes: dict[str, int] = {}
    if labels:
        held = np.array([sample.targets[0] for sample in portion.samples])
        counts = np.bincount(held, minlength=len(labels)).tolist()
        classes = dict(zip(labels, counts, strict=True))
    tokens = sum(sample.length for sample in portion.samples)
    return Share(device, portion.name, len(portion.samples), tokens, classes)


def _table(shares: Sequence[Share], labels: Sequence[str]) -> str:
    named = any(share.name for share in shares)
    few = len(labels) <= SHOWN_CLASSES
    header = ["device", *(["name"] if named else []), "samples", "tokens"]
    header += map(summary.printable, labels) if few else ["classes"]
    rows = []
    for share in shares:
        counts = list(share.classes.values())
        shown = counts if few else [sum(count > 0 for count in counts)]
        name = [summary.printable(share.name)] if named else []
        rows.append([share.id, *name, *map(str, (share.samples, share.tokens, *shown))])
    return summary.table(header, rows)


def draw(shares: Sequence[Share], labels: Sequence[str], title: str, path: Path) -> None:
    """Draw one bar a device, its classes one on another. Raises StoreError."""
    # As in `summary.plot`: a Figure alone needs no display.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    classes = list(labels) or [_UNLABELLED]
    figure = Figure(
        figsize=(min(16.0, max(6.4, 2.5 + 0.42 * len(shares))), 4.4), layout="constrained"
    )
    axes = figure.add_subplot(ylabel="samples")
    # A name is no formula, whatever dollars are in it.
    axes.set_title(title, parse_math=False)
    few = len(classes) <= SHOWN_CLASSES
    colours = colormaps["tab20" if few else "viridis"]
    at, below = np.arange(len(shares)), np.zeros(len(shares))
    for number, label in enumerate(classes):
        heights = np.array(
            [share.classes.get(label, 0) if labels else share.samples for share in shares]
        )
        # tab20 has pairs of a strong and a pale colour: the strong ones first.
        place = (2 * number) % 20 + number // 10 if few else number / max(1, len(classes) - 1)
        axes.bar(at, heights, 0.85, below, color=colours(place), label=label)
        below += heights
    _name_bars(axes, shares)
    axes.set_ylim(0, 1.05 * below.max())
    if labels and few:
        handles, names = axes.get_legend_handles_labels()
        legend = figure.legend(
            handles[::-1], names[::-1], loc="outside right upper", frameon=False, title="class"
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    with explained(path):
        figure.savefig(path, dpi=120)


def _name_bars(axes: Any, shares: Sequence[Share]) -> None:
    """Names below the bars where they fit, else numbers."""
    if len(shares) > 40:
        axes.set_xlabel("device")
        return
    names = [share.name or share.id.rpartition("-")[2] for share in shares]
    long = max(map(len, names)) * len(names) > NAMED_WIDTH
    axes.set_xticks(
        range(len(shares)),
        [name if len(name) <= 24 else f"{name[:23]}…" for name in names],
        rotation=60 if long else 0,
        ha="right" if long else "center",
        rotation_mode="anchor" if long else "default",
        parse_math=False,
    )
    if not any(share.name for share in shares):
        axes.set_xlabel("device")


# --- files ---------------------------------------------------------------------------------------


def _check_targets(plot: Path | None, out: Path | None) -> None:
    """Before the work is done, say what could not be kept of it."""
    if plot is not None and (plot.suffix.lower() not in ENDINGS or not plot.parent.is_dir()):
        raise ConfigError(
            "`--plot` is wrong",
            got=plot,
            allowed=f"a file that ends in {', '.join(ENDINGS)}, in a folder that is there",
            remedy="choose another name",
        )
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(
            f"{out} is in the way",
            got="a file, or a folder with something in it",
            allowed="a new or empty folder",
            remedy="choose another",
        )


def _write(
    out: Path, shares: Sequence[Share], portions: Sequence[Portion], columns: Mapping[str, str]
) -> list[Path]:
    """Write each device's rows as JSON lines, under the file's own names of the columns."""
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    files = []
    for share, portion in zip(shares, portions, strict=True):
        lines = [
            json.dumps({theirs: _plain(row[ours]) for ours, theirs in columns.items()}) + "\n"
            for row in portion.rows
        ]
        files.append(out / f"{share.id}.jsonl")
        write_whole(files[-1], "".join(lines).encode())
    return files


def _plain(value: object) -> object:
    """A good row's value as JSON has it: texts, labels, and images as nested lists of numbers."""
    if isinstance(value, str | int | float):
        return value
    return np.asarray(value).tolist()
