"""Rows from data files, one at a time, each with the place that it came from.

    .csv .tsv                 a header line; quotes as in RFC 4180
    .jsonl .ndjson .json      one JSON object a line
    .npz                      one array a column, row i at index i of each
    folder, folder#split      written by `datasets`' save_to_disk
    owner/name:config#split   a dataset of the Hugging Face hub, config and split where it has them

A file that cannot be used is a DataError. A row that cannot be used is reported with its file and
line and left out; to stop at the first one, raise in `report`. Text is UTF-8, with or without a
byte order mark. CSV and JSON lines are streamed.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from splitfrozen.errors import DataError

_LOOKED_AT = 20
"""Lines of a JSON lines file that are searched for the columns' names."""

LONGEST_FIELD = 64 << 20
"""Characters of a CSV field; longer texts are cut by `max_tokens`, not here."""
# The reader fails at a longer field and goes on inside its quotes. The limit is of the process and
# 131,072 by default, so it is raised once, here.
csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))

_ARRAY = "a JSON array, not an object"
_ENDLESS = f"fields of up to {LONGEST_FIELD} characters; is there a quote without its end?"
_FORMATS = "a .csv, .tsv, .jsonl, .ndjson, .json or .npz file, a `datasets` folder or owner/name"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read.

    Attributes:
        file: the source it came from.
        line: physical line on which it starts, from 1; for arrays and datasets its number, from 1.
        values: our name of the column -> the value.
    """

    file: str
    line: int
    values: dict[str, object]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


Report = Callable[[BadRow], None]


def refuse_missing(*sources: str | None) -> None:
    """A misspelt path is told before any work is done. Raises DataError; None is no source."""
    for source in sources:
        if source is not None:
            read_rows(source, {}, report=lambda _: None)


def read_rows(source: str, columns: Mapping[str, str], report: Report) -> Iterator[Row]:
    """Read the rows of a file, a `datasets` folder or a dataset of the hub.

    Args:
        source: path or name, as above.
        columns: our name -> the column's name; every one of them must be there.
        report: called for every row left out.

    Raises DataError: at once where there is no such source, else when reading comes to it.
    """
    name, split = source, None
    if "#" in source and not Path(source).exists():
        name, _, split = source.rpartition("#")
    path = Path(name)
    read = _READERS.get(path.suffix.lower())
    if path.is_dir() or (not path.exists() and read is None and _HUB_NAME.fullmatch(name)):
        return _read_dataset(source, _load_dataset(name, split), columns, report)
    if not path.is_file():
        raise DataError(
            "there is no such data",
            got=source,
            allowed=_FORMATS,
            remedy=f"check the path; the working directory is {Path.cwd()}",
        )
    if read is None or split is not None:
        raise DataError(
            "data of an unknown format",
            got=source,
            allowed=_FORMATS,
            remedy="convert it, or give the file its proper ending",
        )
    return read(source, columns, report)


# --- text ----------------------------------------------------------------------------------------


def _read_csv(source: str, columns: Mapping[str, str], report: Report) -> Iterator[Row]:
    with _open_text(source) as file:
        delimiter = "\t" if source.lower().endswith(".tsv") else ","
        # Strict: an open quote at the end of the file is an error, not a row of what follows it.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next((fields for fields in reader if fields), None)
        except csv.Error as error:
            raise _unusable(source, str(error), "a header line with the columns' names") from error
        if header is None:
            raise _unusable(source, "an empty file", "a header line with the columns' names")
        _check_columns(source, columns, header)
        places = {ours: header.index(theirs) for ours, theirs in columns.items()}
        for line, fields in _csv_rows(source, reader):
            if isinstance(fields, str):
                report(BadRow(source, line, fields))
            elif len(fields) != len(header):
                reason = f"{len(fields)} fields, where the header has {len(header)}"
                report(BadRow(source, line, reason))
            else:
                values = {ours: fields[place] for ours, place in places.items()}
                yield from _if_text(Row(source, line, dict(values)), report)


def _csv_rows(source: str, reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the first line of each row with its fields, or with what is wrong with them.

    Raises DataError at a field that does not end.
    """
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "; is a quote of it open to the end?" if "end of data" in str(error) else ""
            yield line, f"not CSV: {error}{hint}"
            if "field larger than" in str(error):
                # What follows is inside of its quotes: text that would be taken for rows.
                raise _unusable(source, f"{error} in the row of line {line}", _ENDLESS) from error
            # Else the reader starts anew on the next line.
            continue
        if fields:
            yield line, fields


def _read_jsonl(source: str, columns: Mapping[str, str], report: Report) -> Iterator[Row]:
    with _open_text(source) as file:
        lines = _json_lines(file)
        head = list(itertools.islice(lines, _LOOKED_AT))
        if not head:
            raise _unusable(source, "an empty file", "one JSON object on each line")
        if head[0][1] == _ARRAY:
            raise _unusable(source, _ARRAY, "one JSON object on each line")
        found = dict.fromkeys(key for _, item in head if isinstance(item, dict) for key in item)
        if found:
            _check_columns(source, columns, list(found))
        for line, item in itertools.chain(head, lines):
            if isinstance(item, str):
                report(BadRow(source, line, item))
                continue
            missing = [theirs for theirs in columns.values() if theirs not in item]
            if missing:
                report(BadRow(source, line, f"no {', '.join(map(repr, missing))}"))
                continue
            values = {ours: item[theirs] for ours, theirs in columns.items()}
            yield from _if_text(Row(source, line, values), report)


def _json_lines(file: TextIO) -> Iterator[tuple[int, dict[str, object] | str]]:
    """Yield each line that is not blank: its number, and its object or what is wrong with it."""
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            item = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield line, _ARRAY if text.lstrip().startswith("[") else f"not JSON: {error}"
            continue
        if isinstance(item, dict):
            yield line, item
        else:
            yield line, _ARRAY if isinstance(item, list) else "not a JSON object"


def _open_text(source: str) -> TextIO:
    """Open UTF-8 text so that bytes which are not UTF-8 spoil their row and not the file."""
    try:
        with Path(source).open("rb") as file:
            mark = file.read(2)
        if mark in (b"\xff\xfe", b"\xfe\xff"):
            raise _unusable(source, "UTF-16", "UTF-8")
        return Path(source).open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise _unusable(source, str(error.strerror), "a readable file") from error


def _if_text(row: Row, report: Report) -> Iterator[Row]:
    """Yield the row unless a text in it has characters that are none."""
    for name, value in row.values.items():
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                report(BadRow(row.file, row.line, f"`{name}` is not UTF-8 text"))
                return
    yield row


# --- arrays and datasets -------------------------------------------------------------------------


def _read_npz(source: str, columns: Mapping[str, str], report: Report) -> Iterator[Row]:
    del report  # Arrays have no rows that cannot be read.
    try:
        with Path(source).open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise _unusable(source, "a single array", "an archive of named arrays")
            _check_columns(source, columns, archive.files)
            arrays = {ours: archive[theirs] for ours, theirs in columns.items()}
            for ours, array in arrays.items():
                # What is no .npy file comes as bytes.
                if not isinstance(array, np.ndarray):
                    raise _unusable(source, f"{columns[ours]!r}, which is no array", "arrays")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unusable(source, str(error), "an archive of arrays without objects") from error
    lengths = {columns[ours]: len(array) if array.ndim else 0 for ours, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        got = ", ".join(f"{name} of {length}" for name, length in lengths.items())
        raise _unusable(source, got, "arrays of one length, the number of samples")
    for i in range(next(iter(lengths.values()))):
        values = {ours: a[i].item() if a.ndim == 1 else a[i] for ours, a in arrays.items()}
        yield Row(source, i + 1, values)


def _load_dataset(name: str, split: str | None) -> Any:
    """Return a `datasets.Dataset`. Raises DataError."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name} needs the package `datasets`",
            got="an install without it",
            allowed="that package, or data as .csv, .jsonl or .npz",
            remedy="pip install 'splitfrozen[datasets]'",
        ) from error
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
        else:
            hub, _, config = name.partition(":")
            loaded = datasets.load_dataset(hub, config or None)
    except Exception as error:  # Reading others' data and reaching the hub fail in many ways.
        got = (str(error).splitlines() or [type(error).__name__])[0]
        raise _unusable(
            name, got, "a folder that save_to_disk wrote, or a dataset of the hub"
        ) from error
    return _choose(loaded if isinstance(loaded, dict) else {"train": loaded}, name, split)


def _choose(splits: Mapping[str, Any], name: str, split: str | None) -> Any:
    """Return the split asked for; by default `train`, or the only one there is."""
    chosen = split or ("train" if "train" in splits else next(iter(splits)))
    if chosen not in splits or (split is None and "train" not in splits and len(splits) > 1):
        raise DataError(
            f"which split of {name} to read is not clear",
            got="none" if split is None else repr(split),
            allowed=", ".join(splits),
            remedy=f"write {name}#{next(iter(splits))}",
        )
    return splits[chosen]


def _read_dataset(
    source: str, dataset: Any, columns: Mapping[str, str], report: Report
) -> Iterator[Row]:
    _check_columns(source, columns, dataset.column_names)
    chosen = dataset.select_columns(sorted(set(columns.values())))
    for i in range(len(chosen)):
        try:
            item = chosen[i]
        except Exception as error:  # A damaged image: whatever its decoder raises.
            report(BadRow(source, i + 1, f"cannot be decoded: {error}"))
            continue
        values = {ours: item[theirs] for ours, theirs in columns.items()}
        yield from _if_text(Row(source, i + 1, values), report)


# --- errors --------------------------------------------------------------------------------------


def _check_columns(source: str, columns: Mapping[str, str], found: Iterable[str]) -> None:
    names = [name for name in found if isinstance(name, str)]
    for ours, theirs in columns.items():
        if names.count(theirs) == 1:
            continue
        lower = {name.lower().strip(): name for name in names}
        near = difflib.get_close_matches(theirs.lower(), lower, n=1)
        hint = f"did you mean {lower[near[0]]!r}? " if near else ""
        times = "no" if theirs not in names else "more than one"
        raise DataError(
            f"{source} has {times} column {theirs!r} for `{ours}`",
            got=f"columns {', '.join(map(repr, names)) or 'none'}",
            allowed=f"one column {theirs!r}",
            remedy=f"{hint}name the right one as `{ours}` in task.columns, or `join --column`",
        )


def _unusable(source: str, got: str, allowed: str) -> DataError:
    return DataError(
        f"cannot read {source}", got=got, allowed=allowed, remedy="check or convert the data"
    )


_READERS: dict[str, Callable[[str, Mapping[str, str], Report], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".npz": _read_npz,
}
