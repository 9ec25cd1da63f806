"""`plan`: who computes how much, over which band, at what power and rate, for three systems.

The file's key `system` says whose problem it states; docs/planning.md has all three. What a plan
decides of a run (cut, depths, rank, codec) can be written into that run's file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import structs

from splitfrozen.config import complete, read_toml
from splitfrozen.disk import explained, make_folder, write_whole
from splitfrozen.errors import ConfigError
from splitfrozen.records import Outcome
from splitfrozen.studies import plan_fedsllm, plan_sft, plan_splitfrozen
from splitfrozen.studies.grid import to_toml

Study = Callable[[Path, dict[str, Any], Path | None], Outcome]

SYSTEMS: dict[str, Study] = {
    "fedsllm": plan_fedsllm.plan,
    "sft": plan_sft.plan,
    "splitfrozen": plan_splitfrozen.plan,
}


def plan(source: Path, run: Path | None, out: Path | None) -> Outcome:
    """Solve the problem of a file.

    Args:
        source: the problem.
        run: a run's file, of which a copy with the plan in it is written: `out`/run.toml.
        out: folder for that, and for figures and their data.

    Raises:
        ConfigError: a file; or a run without a folder of its own for its copy.
        PlanError: nothing satisfies the constraints; the message names one, and the least change.
        StoreError: the disk refuses.
    """
    table = read_toml(source)
    system = table.get("system")
    if not isinstance(system, str) or system not in SYSTEMS:
        raise ConfigError(
            f"`system` is wrong in {source.name}",
            got=repr(system),
            allowed=", ".join(SYSTEMS),
            remedy='say whose problem it is, as in system = "splitfrozen"',
        )
    target = None if run is None else _target(run, out)
    if out is not None:
        make_folder(out)
    found = SYSTEMS[system](source, table, out)
    if run is None or target is None:
        return found
    changes = found.data["run"]
    assert isinstance(changes, dict)
    _write_run(run, changes, target)
    return Outcome(found.data, f"{found.text}\nwrote {target}")


def _target(run: Path, out: Path | None) -> Path:
    """Where the run's copy goes; what is wrong with either is told before anything is solved.

    Raises ConfigError.
    """
    if out is None:
        raise ConfigError(
            "`--run` needs `--out`",
            got="no folder for the run's file",
            allowed="--run RUN.toml --out FOLDER",
            remedy="name a folder",
        )
    complete(read_toml(run), run)
    target = out / "run.toml"
    if target.resolve() == run.resolve():
        raise ConfigError(
            "`--out` would replace the run's own file",
            got=str(target),
            allowed="another folder than that of --run",
            remedy="name a new folder",
        )
    return target


def _write_run(run: Path, changes: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A run's file with changes. Raises ConfigError where they do not fit the run."""
    table = read_toml(run)
    for section, values in changes.items():
        table.setdefault(section, {}).update(values)
    named = "folder" in table.get("run", {})
    made = complete(table, run)
    if not named:
        # The default is another for another file.
        made = structs.replace(made, run=structs.replace(made.run, folder=None))
    with explained(path):
        write_whole(path, to_toml(made).encode())
