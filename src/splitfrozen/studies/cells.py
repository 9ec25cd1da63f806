"""Cells side by side, each a process of its own; what is finished is never trained again.

A finished cell is one small JSON file, named by its key. The run folder of a cell that is under way
lies in `running/` and is removed with it: activations take space, and a cell that was cut short
starts anew. A cell that fails leaves the log of its process and loses nothing but itself.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn, Protocol

import msgspec
from msgspec import Meta
from tqdm import tqdm

from splitfrozen.config import Config
from splitfrozen.disk import explained, write_whole
from splitfrozen.errors import SplitFrozenError, StoreError
from splitfrozen.runs.folder import RunFolder
from splitfrozen.studies.environment import code
from splitfrozen.studies.grid import Cell, to_toml

log = logging.getLogger("splitfrozen.compare")

LOSSES = 60
"""Points of a training loss's curve that are kept."""
DIVERGED = "NotFiniteError"
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
"""Cells share the cores: each has one, and those that wait sleep."""


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a training came to.

    Attributes:
        before: metrics of the untrained model.
        after: metrics after the last epoch. Not of the best one: to choose an epoch by the rows
            that are reported would be to tune on them.
        seconds: as `train` says.
        bytes: all that crossed the network; None in cells of an earlier version.
        evaluations: by epoch: `epoch`, `step` and metrics.
        losses: (step, mean loss of the steps up to it), LOSSES points at most.
        answers: to the experiment's prompts.
        diverged: the loss was not finite; nothing else is there then.
    """

    before: dict[str, float] = {}
    after: dict[str, float] = {}
    seconds: float = 0.0
    bytes: Annotated[int, Meta(ge=0)] | None = None
    evaluations: tuple[dict[str, float], ...] = ()
    losses: tuple[tuple[int, float], ...] = ()
    answers: tuple[str, ...] = ()
    diverged: bool = False

    @property
    def score(self) -> float | None:
        """What is tuned for: accuracy, the loss among equals; minus the loss where there is none.

        It is the score by which `training.evaluate` compares; None where training diverged.
        """
        loss, accuracy = self.after.get("loss"), self.after.get("accuracy")
        if self.diverged or loss is None:
            # A loss that is no number is in no metrics.
            return None
        return -loss if accuracy is None else accuracy - 1e-6 * loss


class Runner(Protocol):
    """Trains cells; called from several threads."""

    def __call__(self, cell: Cell, folder: Path) -> Result:
        """Train a cell in `folder`, which is empty. Raises SplitFrozenError."""
        ...

    def stop(self) -> None:
        """End what is under way: the calls raise."""
        ...


class Progress:
    """How many cells are done and how long the rest takes: a bar on a terminal, else lines."""

    def __init__(self, jobs: int, stream: IO[str] | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._jobs = jobs
        self._spent = self._trained = 0.0
        self._bar = tqdm(
            total=0,
            file=self._stream,
            disable=not self._stream.isatty(),
            bar_format="{n_fmt} of {total_fmt} cells |{bar}| {elapsed}{postfix}",
            dynamic_ncols=True,
        )

    def expect(self, cells: int, done: int) -> None:
        """More cells are known of, `done` of them finished before."""
        self._bar.total += cells
        self._bar.n += done
        self._bar.refresh()

    def add(self, told: str, seconds: float, size: float, left: float) -> None:
        """A cell ended; `size` is of it, `left` of all to come, in rows trained on."""
        self._spent += seconds
        self._trained += size
        self._bar.n += 1
        ahead = _duration(self._spent / max(self._trained, 1.0) * left / self._jobs)
        if self._bar.disable:
            log.info("%d of %d cells, %s left; %s", self._bar.n, self._bar.total, ahead, told)
        else:
            self._bar.set_postfix_str(f"{ahead} left; {told}")

    def close(self) -> None:
        self._bar.close()


class Cells:
    """The finished cells of a folder, and the way to finish more."""

    def __init__(self, folder: Path, runner: Runner, jobs: int, progress: Progress) -> None:
        """Take the folder, which exists and is held by `locked`."""
        self._folder = folder
        self._runner = runner
        self._jobs = jobs
        self._progress = progress
        self.failures: dict[str, str] = {}
        """What failed, and why: name of the cell -> message."""
        self.codes: set[str] = set()
        """Versions of the code that the cells were trained with."""

    def finish(self, cells: Sequence[Cell], later: float = 0.0) -> dict[str, Result]:
        """Train those that are not finished, `jobs` at a time.

        Args:
            cells: in the order in which they begin; of those with one key the first is trained.
            later: size of what comes after them, for the time left.

        Returns:
            Results by key; cells that failed are in `failures`.
        """
        wanted = {cell.key: cell for cell in reversed(cells)}
        found = {key: result for key in wanted if (result := self._read(key)) is not None}
        todo = [wanted[key] for key in dict.fromkeys(c.key for c in cells) if key not in found]
        self._progress.expect(len(wanted), len(found))
        left = later + sum(size(cell) for cell in todo)
        pool = ThreadPoolExecutor(self._jobs, "cell")
        running = {pool.submit(self._train, cell): cell for cell in todo}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    left -= size(cell)
                    self._take(cell, future, found, left)
        finally:
            # On an interrupt, what is under way ends at once; what is finished is on disk.
            if running:
                pool.shutdown(wait=False, cancel_futures=True)
                self._runner.stop()
            pool.shutdown()
        return found

    def _take(
        self,
        cell: Cell,
        future: Future[tuple[Result, float]],
        found: dict[str, Result],
        left: float,
    ) -> None:
        try:
            found[cell.key], seconds = future.result()
            told = f"{cell}: {_told(found[cell.key])}"
        except SplitFrozenError as error:
            self.failures[str(cell)] = str(error)
            log.error("%s failed: %s", cell, error)
            seconds, told = 0.0, f"{cell}: failed"
        self._progress.add(told, seconds, size(cell) if seconds else 0.0, left)

    def _train(self, cell: Cell) -> tuple[Result, float]:
        began = time.monotonic()
        # A name of its own: a process that a killed command left behind is not in the way.
        folder = Path(tempfile.mkdtemp(prefix=f"{cell.key}-", dir=self._folder / "running"))
        try:
            result = self._runner(cell, folder)
            kept = {"cell": str(cell), "code": code(), "result": msgspec.to_builtins(result)}
            self.codes.add(code())
            write_whole(self._path(cell.key), json.dumps(kept).encode() + b"\n")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return result, time.monotonic() - began

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def _read(self, key: str) -> Result | None:
        """The finished cell, or None; a damaged file is as good as none."""
        try:
            kept = json.loads(self._path(key).read_bytes(), parse_constant=_refuse_no_number)
            result = msgspec.convert(kept["result"], Result)
            self.codes.add(str(kept.get("code", "unknown")))
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return result


def _refuse_no_number(text: str) -> NoReturn:
    """NaN and infinity are in no cell, and no mean or picture can be made of them."""
    raise ValueError(text)


def size(cell: Cell) -> float:
    """About how many rows a cell trains on, all epochs together: for the time left."""
    data = cell.config.data
    assert data is not None
    rows = _lines(data.train)
    return float(cell.config.train.epochs * min(data.rows or rows, rows))


@cache
def _lines(name: str) -> int:
    """Lines of a file; where it is none, as a data set of a hub, a guess that is the same for all
    cells of it."""
    path = Path(name)
    if not path.is_file():
        return 1000
    with path.open("rb") as file:
        return max(1, sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of cells for one command; what a killed one left under way is removed.

    Raises StoreError where another holds it.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "compare.lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{folder} is in use",
                got="another `compare` at work there",
                allowed="one at a time",
                remedy="wait for it, or set experiment.folder",
            ) from error
        with explained(folder / "running"):
            (folder / "running").mkdir(exist_ok=True)
            for left in filter(_is_cell, (folder / "running").iterdir()):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _is_cell(path: Path) -> bool:
    """Whether `Cells` made a folder: what is anybody else's there stays."""
    return re.fullmatch(r"[0-9a-f]{20}-.*", path.name) is not None


class Subprocesses:
    """A runner: each cell is `splitfrozen train`, and `generate` for each prompt."""

    def __init__(self, logs: Path) -> None:
        """Take the folder for the logs of cells that fail."""
        self._logs = logs
        self._children: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def __call__(self, cell: Cell, folder: Path) -> Result:
        made = in_folder(cell.config, folder / "run")
        source = folder / "run.toml"
        source.write_text(to_toml(made))
        told = self._call(cell, folder, ["train", str(source)])
        if told.get("error") == DIVERGED:
            return Result(diverged=True)
        options = ["generate", str(folder / "run"), "--adapter", "last"]
        # In one argument: a prompt that begins with a dash is no option.
        answers = [
            self._call(cell, folder, [*options, f"--prompt={prompt}"]) for prompt in cell.prompts
        ]
        return outcome(RunFolder(folder / "run"), told, [one["completion"] for one in answers])

    def stop(self) -> None:
        # Killed: what a training would save as it stops is thrown away with its folder.
        self._stopped = True
        for child in list(self._children):
            child.kill()

    def _call(self, cell: Cell, folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
        """What a command prints as JSON. Raises SplitFrozenError where it failed, unless it
        diverged."""
        command = [sys.executable, "-m", "splitfrozen", *arguments, "--json"]
        with (folder / "log").open("a") as errors:
            child = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **THREADS},
            )
            self._children.add(child)
            if self._stopped:
                child.kill()
            printed, _ = child.communicate()
            self._children.discard(child)
        try:
            told = json.loads(printed)
        except ValueError:
            told = {}
        if isinstance(told, dict) and (not child.returncode or told.get("error") == DIVERGED):
            return told
        kept = self._logs / f"{cell.key}.log"
        if not self._stopped:
            shutil.copyfile(folder / "log", kept)
        raise SplitFrozenError(
            f"`{arguments[0]}` ended with exit code {child.returncode}",
            got=told.get("message", "nothing said") if isinstance(told, dict) else printed[:200],
            allowed="exit code 0",
            remedy=f"see {kept}, and give the same command again",
        )


def in_folder(made: Config, folder: Path) -> Config:
    return msgspec.structs.replace(made, run=msgspec.structs.replace(made.run, folder=str(folder)))


def outcome(run: RunFolder, told: Mapping[str, Any], answers: Sequence[str]) -> Result:
    """What `train` said and what its run folder holds, in small."""
    evaluations = run.events("evaluation")
    steps = [(e["step"], e["loss"]) for e in run.events("step") if isinstance(e["loss"], float)]
    return Result(
        before=_metrics(next(iter(run.events("baseline")), {})),
        after=_metrics(evaluations[-1] if evaluations else {}),
        seconds=float(told["seconds"]),
        bytes=sum(told["bytes"].values()),
        evaluations=tuple(
            {"epoch": e["epoch"], "step": e["step"], **_metrics(e)} for e in evaluations
        ),
        losses=tuple(_thinned(steps)),
        answers=tuple(answers),
    )


def _metrics(event: Mapping[str, Any]) -> dict[str, float]:
    names = ("accuracy", "f1", "loss", "perplexity", "exact_match")
    found = {name: event.get(name) for name in names}
    return {name: float(v) for name, v in found.items() if isinstance(v, int | float)}


def _thinned(steps: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    every = -(-len(steps) // LOSSES) or 1
    for start in range(0, len(steps), every):
        part = steps[start : start + every]
        yield part[-1][0], round(sum(loss for _, loss in part) / len(part), 4)


def _told(result: Result) -> str:
    if result.diverged:
        return "diverged"
    name = next((one for one in ("accuracy", "perplexity") if one in result.after), "")
    return f"{name} {result.after[name]:.4f}" if name else "done"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
