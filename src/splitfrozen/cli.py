"""The command line: parses, calls one function, prints what it returns.

Each command names its function as "module:function" and the module is loaded when the command
runs, so `join` starts on a machine that has the base install only. With `--json` one JSON object
goes to stdout and nothing else; logs and progress go to stderr. Exit codes: 0 done, 1 the work
failed, 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from splitfrozen import __version__, logs, threads
from splitfrozen.errors import ConfigError, RequestError, SplitFrozenError
from splitfrozen.records import Outcome

log = logging.getLogger("splitfrozen.cli")


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a command, as `argparse.add_argument` takes it."""

    flags: tuple[str, ...]
    options: dict[str, object]


@dataclass(frozen=True, slots=True)
class Command:
    """`target` is called with the arguments by keyword and returns an `Outcome`.

    `reads` is called before that with the argument `source`, where that is a file: what is wrong
    with it is told before `target` is loaded, which takes seconds where torch comes with it.
    """

    name: str
    help: str
    target: str
    arguments: tuple[Argument, ...] = ()
    reads: str = ""


def _arg(*flags: str, **options: object) -> Argument:
    return Argument(flags, options)


RUN = _arg("run", type=Path, help="run folder")
ADAPTER = _arg("--adapter", choices=("best", "last"), default="best", help="default: best")

COMMANDS = (
    Command(
        "demo",
        "a server and ten devices on this machine: real processes, real HTTPS",
        "splitfrozen.runs.demo:demo",
        (
            _arg("--folder", type=Path, default=Path("runs/demo"), help="default: runs/demo"),
            _arg("--seed", type=int, default=0, help="of data, partition and training"),
        ),
    ),
    Command(
        "serve",
        "start (or continue) a run; prints one join string for each device",
        "splitfrozen.runs.serve:serve",
        (
            _arg("source", type=Path, metavar="RUN.toml", help="the run's file, or its folder"),
            _arg("--hide-joins", action="store_true", help="print no join strings"),
        ),
    ),
    Command(
        "join",
        "be a device of a run",
        "splitfrozen.device.agent:join_command",
        (
            _arg("join", metavar="JOIN", help="the join string that `serve` printed"),
            _arg("--data", required=True, help="CSV, JSON lines, .npz or `datasets` folder"),
            _arg("--name", help="what people call this device (default: the host name)"),
            _arg("--column", action="append", default=[], metavar="OURS=THEIRS", dest="columns"),
            _arg("--state", type=Path, help="folder for identity and downloads"),
            _arg("--threads", type=int, help="default: all cores"),
            _arg("--strict", action="store_true", help="stop at the first bad row"),
            _arg(
                "--patience",
                type=float,
                default=3600.0,
                metavar="SECONDS",
                help="how long to try to reach the server in vain (default: 3600)",
            ),
        ),
    ),
    Command(
        "train",
        "a whole run in one process, with any method",
        "splitfrozen.runs.train:train",
        (_arg("source", type=Path, metavar="RUN.toml", help="the run's file, or its folder"),),
        reads="splitfrozen.runs.rows:load",
    ),
    Command(
        "partition",
        "who holds which of a run's rows: a table, a plot, a file for each device",
        "splitfrozen.runs.partition:partition",
        (
            _arg("source", type=Path, metavar="RUN.toml", help="the run's file"),
            _arg("--plot", type=Path, metavar="FILE.png", help="draw the classes of each device"),
            _arg("--out", type=Path, metavar="FOLDER", help="write each device's rows, for `join`"),
        ),
        reads="splitfrozen.runs.rows:load",
    ),
    Command(
        "compare",
        "several methods side by side from real training: table, CSV, plot",
        "splitfrozen.studies.compare:compare",
        (
            _arg("source", type=Path, metavar="EXPERIMENT.toml", help="the experiment's file"),
            _arg(
                "--set",
                action="append",
                default=[],
                metavar="TABLE.KEY=VALUE",
                dest="settings",
                help="in place of what the file says, as in --set model.name=PATH",
            ),
            _arg("--jobs", type=int, metavar="N", help="trainings at a time (default: all cores)"),
            _arg("--out", type=Path, metavar="FOLDER", help="write NAME.json, NAME.csv, NAME.png"),
        ),
    ),
    Command(
        "simulate",
        "what each method would take, in virtual time: FLOP, bytes, delay, Gantt plots",
        "splitfrozen.studies.simulate:simulate",
        (
            _arg("experiment", type=Path, metavar="EXPERIMENT.toml", help="devices, links, data"),
            _arg("--out", type=Path, help="folder for the table, plots and traces"),
        ),
    ),
    Command(
        "plan",
        "depths, codec, bandwidth, subchannels, power, split, rank: what is best on a network",
        "splitfrozen.studies.plan:plan",
        (
            _arg("source", type=Path, metavar="FILE.toml", help="the problem's file"),
            _arg("--run", type=Path, metavar="RUN.toml", help="write this run with the plan in it"),
            _arg("--out", type=Path, metavar="FOLDER", help="write figures and their data"),
        ),
    ),
    Command("status", "what a run is doing", "splitfrozen.runs.steer:status", (RUN,)),
    Command(
        "logs",
        "the log of a run",
        "splitfrozen.runs.steer:logs",
        (RUN, _arg("--lines", type=int, default=50, help="default: 50")),
    ),
    Command("stop", "stop a run; `serve` continues it", "splitfrozen.runs.steer:stop", (RUN,)),
    Command(
        "invite",
        "add devices to a run; prints their join strings",
        "splitfrozen.runs.steer:invite",
        (RUN, _arg("--count", type=int, default=1, help="default: 1")),
    ),
    Command(
        "purge",
        "delete what a device sent and all that was trained on it, and refuse it from now on",
        "splitfrozen.runs.steer:purge",
        (RUN, _arg("--device", required=True, help="id, as in `status`")),
    ),
    Command(
        "replay",
        "lay a network run beside its simulation with the measured speeds, and its forecast",
        "splitfrozen.studies.replay:replay",
        (
            RUN,
            _arg("--network", type=Path, metavar="NETWORK.toml", help="on this network instead"),
            _arg("--out", type=Path, help="folder for pictures and traces (Perfetto)"),
        ),
    ),
    Command(
        "eval",
        "measure a run's adapter on data",
        "splitfrozen.runs.use:evaluate",
        (RUN, _arg("--data", help="default: the run's task.eval"), ADAPTER),
    ),
    Command(
        "generate",
        "continue a prompt with a run's adapter",
        "splitfrozen.runs.use:generate",
        (
            RUN,
            _arg("--prompt", required=True, help="text; the run's template is put around it"),
            _arg("--max-new-tokens", type=int, default=256, help="default: 256"),
            ADAPTER,
        ),
    ),
    Command(
        "export",
        "write a run's adapter, or the model with it merged in",
        "splitfrozen.runs.use:export",
        (
            RUN,
            _arg("out", type=Path, help="folder to write"),
            _arg("--merge", action="store_true", help="write the whole model, adapter merged in"),
            ADAPTER,
        ),
    ),
    Command(
        "doctor", "what is missing here, and the command that mends it", "splitfrozen.doctor:doctor"
    ),
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="splitfrozen",
        description="Fine-tune language models on data that stays on many unequal devices.",
    )
    top.add_argument("--version", action="version", version=f"splitfrozen {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in COMMANDS:
        one = commands.add_parser(command.name, help=command.help, description=command.help)
        for argument in command.arguments:
            one.add_argument(*argument.flags, **argument.options)  # type: ignore[arg-type]
        one.add_argument("--json", action="store_true", help="one JSON object on stdout")
        one.add_argument("--verbose", action="store_true", help="log more")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    as_json = "--json" in (sys.argv if argv is None else argv)
    try:
        arguments = vars(parser().parse_args(argv))
        as_json, verbose = arguments.pop("json"), arguments.pop("verbose")
        name = arguments.pop("command")
        command = next(command for command in COMMANDS if command.name == name)
        logs.start(logging.DEBUG if verbose else logging.INFO)
        threads.one_for_numpy()
        read_first(command, arguments)
        outcome = resolve(command)(**arguments)
        text = dump(outcome.data) if as_json else outcome.text
        print(text, flush=True)
        return outcome.exit_code
    except SplitFrozenError as error:
        return _report(error, as_json)
    except KeyboardInterrupt:
        message = "interrupted; the same command continues"
        if as_json:
            print(dump({"error": "KeyboardInterrupt", "message": message}), flush=True)
        print(message, file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong, and nothing can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        log.debug("the system refused", exc_info=True)
        return _report(_from_system(error), as_json)


class _Parser(argparse.ArgumentParser):
    """Wrong usage is an error like any other, with `--json` too."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left over here: a command's parser knows the command's usage."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            "the command line is wrong",
            got=message,
            allowed=" ".join(self.format_usage().removeprefix("usage: ").split()),
            remedy=f"see: {self.prog} --help",
        )


def read_first(command: Command, arguments: Mapping[str, Any]) -> None:
    """Raise what a command's file is refused for; folders and pipes are left to the command."""
    if command.reads and (arguments["source"].is_file() or not arguments["source"].exists()):
        _load(command.reads)(arguments["source"])


def resolve(command: Command) -> Callable[..., Outcome]:
    """Load the function behind a command. Raises RequestError where its packages are missing."""
    try:
        return _load(command.target)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("splitfrozen"):
            raise
        raise RequestError(
            f"`{command.name}` runs on the server side",
            got=f"an install without {error.name}",
            allowed="the server install",
            remedy="run: pip install 'splitfrozen[server]'",
        ) from error


def _load(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def dump(data: object) -> str:
    """JSON in one line; NaN and infinity become null, which every parser reads."""
    return json.dumps(_finite(data), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def _from_system(error: OSError) -> SplitFrozenError:
    where = f"{error.filename}: " if error.filename else ""
    return SplitFrozenError(
        "the system refused",
        got=f"{where}{error.strerror or error}",
        allowed="files, folders and addresses that this user may use",
        remedy="check them; --verbose shows where it happened",
    )


def _report(error: SplitFrozenError, as_json: bool) -> int:
    if as_json:
        kind = next(k.__name__ for k in type(error).__mro__ if not k.__name__.startswith("_"))
        print(dump({"error": kind, "message": str(error)}), flush=True)
    print(f"splitfrozen: {error}", file=sys.stderr)
    return error.exit_code
