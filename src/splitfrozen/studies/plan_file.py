"""What the files of `splitfrozen plan` have in common: how they are read, and what is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from splitfrozen.config import Spec, convert
from splitfrozen.disk import explained, write_whole
from splitfrozen.errors import ConfigError
from splitfrozen.model.costs import HeadMap, ModelShape
from splitfrozen.studies.environment import environment

DOCUMENT = "docs/planning.md"
LEAST, MOST = 1e-9, 1e21
"""Of numbers other than 0, by size: planners multiply and divide many, and nothing may overflow."""

_SpecT = TypeVar("_SpecT", bound=Spec)


def load(table: dict[str, Any], kind: type[_SpecT]) -> _SpecT:
    """A file's tables as a spec. Raises ConfigError."""
    spec = convert(table, kind, DOCUMENT)
    _refuse_extremes("", table.items())
    return spec


def bad(key: str, got: object, allowed: str, remedy: str) -> ConfigError:
    """The error for a key of a file."""
    return ConfigError(f"`{key}` is wrong", got=got, allowed=allowed, remedy=remedy)


def refuse_unsorted(key: str, values: Sequence[float]) -> None:
    """What a figure is drawn over goes from its least to its greatest value. Raises ConfigError."""
    if list(values) != sorted(set(values)):
        raise bad(key, list(values), "values that rise", "sort them, each once")


def with_vocabulary(shape: ModelShape, vocabulary: int) -> ModelShape:
    """With a table of tokens below the blocks, and above them, on the server, a head that predicts
    the next one. Both are frozen."""
    head = HeadMap(shape.width, vocabulary, pooled=False, trained=False)
    return replace(shape, head=(head,), vocabulary=vocabulary)


def write_result(path: Path, data: Mapping[str, object]) -> None:
    """Write a result as JSON, with its environment, into a folder that may be new.

    Raises StoreError.
    """
    text = json.dumps({**data, "environment": environment()}, indent=2)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode() + b"\n")


def _refuse_extremes(prefix: str, items: Iterable[tuple[str, Any]]) -> None:
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _refuse_extremes(f"{name}.", value.items())
        elif isinstance(value, list):
            _refuse_extremes(name, ((f"[{place}]", one) for place, one in enumerate(value)))
        elif isinstance(value, int | float) and value and not LEAST <= abs(value) <= MOST:
            raise bad(name, value, f"0, or {LEAST:g} to {MOST:g} by size", "look at its unit")
