"""The rows of `[data]`: read, made into samples, chosen, and given to devices.

What a device gets here is what it would read itself, were its rows in a file of its own: the same
samples with the same ids. `partition --out` writes these files.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from splitfrozen import rng
from splitfrozen.config import Config, DataSpec
from splitfrozen.config import load as load_config
from splitfrozen.data.partition import by_value, dirichlet, iid, quantity
from splitfrozen.data.readers import BadRow, Row, read_rows, refuse_missing
from splitfrozen.data.tasks import build_samples
from splitfrozen.errors import ConfigError, DataError
from splitfrozen.records import Ints, Sample, TaskSpec

log = logging.getLogger("splitfrozen.rows")

_COLUMN = "data.column"
"""Our name of the column that says which device a row belongs to."""


@dataclass(frozen=True, slots=True)
class Portion:
    """What one device holds.

    Attributes:
        name: the column's value that its rows share; empty for the other partitions.
        samples: with ids 0, 1, 2 ... in the order of the file.
        rows: of each sample, our name of a column -> the value as it was read.
    """

    name: str
    samples: list[Sample]
    rows: list[Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Gathered:
    """All portions, in the order of the devices, and how many rows were left out as bad."""

    portions: tuple[Portion, ...]
    skipped: int


def load(source: Path) -> Config:
    """A run's file, whose rows are there. It takes no time: no library for models is loaded.

    Raises ConfigError; DataError where the rows are not there.
    """
    wanted = load_config(source)
    refuse_missing(data_of(wanted).train)
    return wanted


def data_of(config: Config) -> DataSpec:
    """The `[data]` section. Raises ConfigError where there is none."""
    if config.data is None:
        raise ConfigError(
            "the run has no data",
            got="no [data] section",
            allowed="[data] with `train`, the rows of all devices together",
            remedy='add: [data] train = "FILE"; or let devices bring their own: splitfrozen serve',
        )
    return config.data


def gather(config: Config, task: TaskSpec, tokenizer: Tokenizer | None) -> Gathered:
    """Read the rows of `[data]` and divide them among `devices.count` devices.

    Args:
        config: of the run; its seed draws the choice of rows and the partition.
        task: as devices get it.
        tokenizer: as devices use it; None for images.

    Raises:
        ConfigError: there is no `[data]`, or its keys do not fit the rows.
        DataError: the file cannot be read, or has no usable row.
        RequestError: fewer samples than devices.
    """
    data = data_of(config)
    skipped = 0

    def report(bad: BadRow) -> None:
        nonlocal skipped
        skipped += 1
        log.warning("row left out: %s", bad)

    columns = dict(task.columns) | ({_COLUMN: data.column} if data.column is not None else {})
    read = _Latest(read_rows(data.train, columns, report=report))
    found = [
        (sample, read.latest.values)
        for sample in _explained(build_samples(read, task, tokenizer, report=report), data)
    ]
    if not found:
        raise DataError(
            f"{data.train} has no usable row",
            got=f"{skipped} bad rows",
            allowed="one good row or more",
            remedy="mend the rows that were reported",
        )
    samples, rows = map(list, zip(*found, strict=True))
    chosen = _choose(len(samples), data.rows, config.run.seed)
    samples, rows = [samples[i] for i in chosen], [rows[i] for i in chosen]
    portions = tuple(
        Portion(
            name,
            [dataclasses.replace(samples[i], id=number) for number, i in enumerate(part)],
            [rows[i] for i in part],
        )
        for name, part in _divide(config, data, samples, rows)
    )
    return Gathered(portions, skipped)


class _Latest:
    """Rows as they are read, and the one that was read last."""

    latest: Row

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.latest = row
            yield row


def _explained(samples: Iterator[Sample], data: DataSpec) -> Iterator[Sample]:
    """Of a missing column the reader says how to name the task's; ours is named elsewhere."""
    try:
        yield from samples
    except DataError as error:
        if f"`{_COLUMN}`" not in error.what:
            raise
        raise ConfigError(
            "`data.column` is wrong",
            got=repr(data.column),
            allowed=error.got,
            remedy="name a column of data.train",
        ) from error


def _choose(count: int, wanted: int | None, seed: int) -> Ints:
    """Which of `count` samples are used, in order."""
    if wanted is None:
        return np.arange(count, dtype=np.int32)
    if wanted > count:
        raise ConfigError(
            "`data.rows` is more than there are",
            got=wanted,
            allowed=f"1..{count}, the good rows of data.train",
            remedy="lower it, or leave it out for all",
        )
    drawn = rng.stream(seed, "rows").choice(count, wanted, replace=False)
    return np.sort(drawn).astype(np.int32)


def _divide(
    config: Config,
    data: DataSpec,
    samples: Sequence[Sample],
    rows: Sequence[Mapping[str, object]],
) -> list[tuple[str, Ints]]:
    """The devices' names, where the data has some, and the indices of their samples."""
    parts, seed = config.devices.count, config.run.seed
    if data.partition == "column":
        held = by_value([str(row[_COLUMN]) for row in rows])
        if len(held) != parts:
            raise ConfigError(
                f"`devices.count` is not the number of values in column {data.column!r}",
                got=parts,
                allowed=f"{len(held)}, as there are: {_few(list(held))}",
                remedy=f"set devices.count to {len(held)}",
            )
        return list(held.items())
    if data.partition == "dirichlet":
        labels = [int(sample.targets[0]) for sample in samples]
        split = dirichlet(labels, parts, data.alpha, seed)
    elif data.partition == "quantity":
        split = quantity(len(samples), parts, data.alpha, seed)
    else:
        split = iid(len(samples), parts, seed)
    return [("", part) for part in split]


def _few(values: Sequence[str]) -> str:
    shown = ", ".join(map(repr, values[:5]))
    return shown + (f" and {len(values) - 5} more" if values[5:] else "")
