"""`plan`: who computes how much, over which band, at what power and rate, for three systems.

The file's key `system` says whose problem it states; docs/planning.md has all three. What a plan
decides of a run (cut, depths, rank, codec) can be written into that run's file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from splitfrozen.config import complete, read_toml
from splitfrozen.disk import explained, write_whole
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
        ConfigError: a file; or a run without a folder for its copy.
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
    if run is not None and out is None:
        raise ConfigError(
            "`--run` needs `--out`",
            got="no folder for the run's file",
            allowed="--run RUN.toml --out FOLDER",
            remedy="name a folder",
        )
    base = None if run is None else read_toml(run)
    found = SYSTEMS[system](source, table, out)
    if run is None or base is None or out is None:
        return found
    changes = found.data["run"]
    assert isinstance(changes, dict)
    path = out / "run.toml"
    _write_run(run, base, changes, path)
    return Outcome(found.data, f"{found.text}\nwrote {path}")


def _write_run(
    run: Path, base: dict[str, Any], changes: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """A run's file with changes. Raises ConfigError where they do not fit the run."""
    for section, values in changes.items():
        if isinstance(own := base.setdefault(section, {}), dict):  # Else it is refused below.
            own.update(values)
    made = complete(base, run)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, to_toml(made).encode())
