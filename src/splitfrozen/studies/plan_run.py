"""The file of a run with what a plan decides of it, as `splitfrozen plan --run` writes it.

What the plan fixes takes the place of what the run's file says, and every key that is changed so is
told. Only what differs from the defaults is written, besides what the plan fixes. The new file lies
elsewhere than the old one, so paths that are relative to it are made anew; its run has a folder of
its own beside it unless the old file names one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from msgspec import NODEFAULT

from splitfrozen.config import Config, complete, read_toml
from splitfrozen.disk import explained, write_whole
from splitfrozen.errors import ConfigError
from splitfrozen.wire.codec import needs_side

Changes = Mapping[str, Mapping[str, Any]]
"""Values by table and key; None for a key that the run's file has to leave out."""

SECTIONS = tuple("model task devices lora train wire method data run server".split())  # noqa: SIM905
"""In the order of docs/configuration.md."""
PATHS = {
    ("model", "name"),
    ("task", "eval"),
    ("wire", "public"),
    ("data", "train"),
    ("run", "folder"),
}
SHOWN = 100
"""Characters of a value that is told: there may be a depth for each of a thousand devices."""
_BARE = re.compile("[A-Za-z0-9_-]+")


def write(source: Path, changes: Changes, devices: Sequence[str], target: Path) -> list[str]:
    """Write the file `target`: the run of `source` with a plan in it.

    Args:
        source: the run's file.
        changes: what the plan fixes.
        devices: the plan's names of the devices, in the order of `devices.depth`; none where they
            do not matter.
        target: of a folder that is there.

    Returns:
        What is told of it, line by line.

    Raises:
        ConfigError: what the plan fixes does not fit the rest of the run.
        StoreError: it cannot be written.
    """
    before, own = complete(read_toml(source), source), read_toml(source)
    _refuse_without_public(before, changes, source, target)
    _refuse_too_shallow(before, changes, source, target)
    table = _merged(own, changes, before.method.name)
    table.setdefault("run", {}).setdefault("folder", str(target.resolve().parent / "run"))
    try:
        made = complete(table, source)
    except ConfigError as error:
        raise ConfigError(
            f"the plan does not fit {source.name}: {error.what}",
            got=error.got,
            allowed=error.allowed,
            remedy=f"{error.remedy}; what was planned is in {target.parent}",
        ) from error
    strings = list(_join_strings(devices))
    text = "".join(f"# {line}\n" for line in strings)
    text += ("\n" if strings else "") + _toml(made, own, changes, target.resolve().parent)
    with explained(target):
        write_whole(target, text.encode())
    changed = list(_differences(before, made))
    return [f"wrote {target}, which has in place of what {source.name} has:", *changed, *strings]


def _refuse_without_public(before: Config, changes: Changes, source: Path, target: Path) -> None:
    chosen = changes.get("wire", {}).get("codec", before.wire.codec)
    if needs_side(chosen) and before.wire.public is None:
        raise ConfigError(
            f"the plan chooses {chosen}, which needs `wire.public`",
            got=f"none in {source.name}",
            allowed="a file of rows like those of the task that every device may know",
            remedy="name one in [wire], or plan without codecs that need it; what was planned is "
            f"in {target.parent}",
        )


def _refuse_too_shallow(before: Config, changes: Changes, source: Path, target: Path) -> None:
    depths, least = changes.get("devices", {}).get("depth", "auto"), before.devices.least_depth
    if depths != "auto" and min(depths) < least:
        raise ConfigError(
            f"the plan has a device at depth {min(depths)}",
            got=f"devices.least_depth = {least} in {source.name}",
            allowed=f"depths of {least} or more",
            remedy=f"plan with limits.least_depth = {least}; what was planned is in "
            f"{target.parent}",
        )


def _merged(own: dict[str, Any], changes: Changes, method: str) -> dict[str, Any]:
    """Tables with changes. What is said of one method has no meaning with another."""
    table = {key: dict(value) for key, value in own.items()}
    if changes.get("method", {}).get("name", method) != method:
        table.pop("method", None)
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values}
        table[section] = {key: one for key, one in table[section].items() if one is not None}
    return table


# --- what is told ----------------------------------------------------------------------------


def _differences(before: Config, made: Config) -> Iterator[str]:
    old, new = msgspec.to_builtins(before), msgspec.to_builtins(made)
    for section in SECTIONS:
        for key, value in (new[section] or {}).items():
            if value != old[section][key]:
                yield f"  {section}.{key} = {_shortly(value)} (was {_shortly(old[section][key])})"


def _shortly(value: object) -> str:
    text = "nothing" if value is None else _value(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _join_strings(devices: Sequence[str]) -> Iterator[str]:
    """Which join string is whose: `serve` prints them in the order of `devices.depth`."""
    width, place = max(2, len(str(len(devices) - 1))), 0
    for _, group in groupby(devices, lambda name: name.rpartition("-")[0]):
        names = list(group)
        ends = [f"device-{number:0{width}}" for number in (place, place + len(names) - 1)]
        place += len(names)
        if len(names) == 1:
            yield f"join string {ends[0]}: {names[0]}"
        else:
            yield f"join strings {ends[0]} to {ends[1]}: {names[0]} to {names[-1]}"


# --- the file --------------------------------------------------------------------------------


def _toml(made: Config, own: Mapping[str, Any], changes: Changes, folder: Path) -> str:
    tables = []
    for section in SECTIONS:
        spec = getattr(made, section)
        lines = [] if spec is None else list(_lines(spec, section, own, changes, folder))
        tables += ["\n".join([f"[{section}]", *lines]) + "\n"] if lines else []
    return "\n".join(tables)


def _lines(
    spec: Any, section: str, own: Mapping[str, Any], changes: Changes, folder: Path
) -> Iterator[str]:
    for field in msgspec.structs.fields(spec):
        value = msgspec.to_builtins(getattr(spec, field.name))
        default = field.default
        if field.default_factory is not NODEFAULT:
            default = field.default_factory()
        fixed = changes.get(section, {}).get(field.name) is not None
        if value is None or (value == default and not fixed):
            continue
        if (section, field.name) in PATHS:
            value = _seen_from(folder, value, own.get(section, {}).get(field.name, ""))
        yield f"{field.name} = {_value(value)}"


def _seen_from(folder: Path, path: str, said: str) -> str:
    """A path relative to a folder, unless it was absolute, or is none but a name."""
    if path == said or Path(said).is_absolute():
        return said
    # What `..` leads to from a link is known to the system alone; the last part may be a link.
    whole = Path(path)
    return os.path.relpath(whole.parent.resolve() / whole.name, folder)


def _value(value: Any) -> str:
    """JSON of texts, numbers and truths is TOML."""
    if isinstance(value, dict):
        pairs = (f"{_key(key)} = {_value(one)}" for key, one in value.items())
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    # DEL is the one character that JSON has as it is and TOML has not.
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)
