"""`plan`: who computes how much, over which band, at what power and rate, for three systems.

The file's key `system` says whose problem it states; docs/planning.md has all three. What a plan
fixes of a run (cut, depths, rank, codec, batches ...) can be written into a copy of its file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from splitfrozen.config import Config, complete, read_toml
from splitfrozen.disk import make_folder
from splitfrozen.errors import ConfigError
from splitfrozen.records import Outcome
from splitfrozen.studies import plan_fedsllm, plan_run, plan_sft, plan_splitfrozen

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
        missing = "system" not in table
        raise ConfigError(
            f"`system` is {'missing' if missing else 'wrong'} in {source.name}",
            got="nothing" if missing else repr(system),
            allowed=", ".join(SYSTEMS),
            remedy='say whose problem it is, as in system = "splitfrozen"',
        )
    target = None if run is None else _target(run, out)
    if out is not None:
        make_folder(out)
    found = SYSTEMS[system](source, table, out)
    if run is None or target is None:
        return found
    changes, about = found.data["run"], found.data["planned_for"]
    assert isinstance(changes, dict)
    assert isinstance(about, dict)
    told = plan_run.write(run, changes, about.get("devices", ()), target)
    told += _not_looked_at(complete(read_toml(run), run), about)
    return Outcome(found.data, "\n".join([found.text, "", *told]))


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


def _not_looked_at(run: Config, about: dict[str, Any]) -> list[str]:
    """What a plan is for and a run's file does not say."""
    lines = [
        f"Planned for the shape {about['shape']} and samples of {about['tokens']} tokens; whether"
        f" {run.model.name} and its data are so is not looked at."
    ]
    if run.task.kind != "image" and run.task.max_tokens < about["tokens"]:
        lines.append(f"They are not: task.max_tokens cuts samples to {run.task.max_tokens}.")
    lines += [f"Not looked at either: {one}." for one in about.get("besides", ())]
    return lines
