"""The process with torch in it: prepares the fronts, lifts what arrives, trains, evaluates.

It shares the run folder with the web process and nothing else, so either may be killed without
taking the other's data along. It ends with the web process: that one holds its standard input.

    python -m splitfrozen.runs.worker RUN_FOLDER
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from splitfrozen import logs, threads
from splitfrozen.data.readers import refuse_missing
from splitfrozen.disk import write_whole
from splitfrozen.errors import DiskFullError, SplitFrozenError
from splitfrozen.methods.bench import Bench
from splitfrozen.methods.parts import Adapted, Upper
from splitfrozen.methods.splitfrozen import pooled
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import Prepared, SampleTable
from splitfrozen.runs import evaluation
from splitfrozen.runs.attendance import Attendance, Silence, attendance, read_roster, write_roster
from splitfrozen.runs.folder import NO_SPACE, STOPPED, RunFolder
from splitfrozen.runs.prepare import load_sliced, prepare, to_fastest
from splitfrozen.runs.recorder import SPEED_TOKENS, Recorder
from splitfrozen.runs.reporter import Reporter, shown
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store
from splitfrozen.training.batching import Arrivals, FixedOrder, Order, ShuffleWindow, StreamingOrder
from splitfrozen.training.evaluate import Evaluation, Evaluator
from splitfrozen.training.lift import Lifter
from splitfrozen.training.loop import Hooks, Job, fit
from splitfrozen.training.precision import resolve

log = logging.getLogger("splitfrozen.worker")

POLL_S = 0.25
REFRESH_S = 1.0
"""A shuffle window looks at the store so often: looking costs time that grows with the store."""
PREDECESSOR_S = 30.0
"""How long a killed server's worker may take to end before ours gives up."""


class Stopped(Exception):  # noqa: N818 -- not an error
    """Raised between two pieces of work when the worker shall end."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """What the worker works on."""

    run: RunFolder
    registry: Registry
    store: Store
    sliced: SlicedModel
    prepared: Prepared
    stop: threading.Event
    silence: Silence
    recorder: Recorder

    def pause(self) -> None:
        """Wait a moment for the devices. Raises Stopped."""
        if self.stop.wait(POLL_S):
            raise Stopped

    def report(self, event: dict[str, Any]) -> None:
        """Write an event of the training, and when it was."""
        self.run.report({**event, "time": time.time()})

    def attendance(self) -> Attendance:
        devices = self.registry.devices()
        return attendance(devices, self.store.totals(), self.silence.gone(devices))

    def at_cut(self) -> SampleTable:
        """What can be trained on."""
        table = self.store.samples()
        return table.select(table.depth == self.run.config.model.cut)


def work(run: RunFolder, stop: threading.Event) -> None:
    """Do everything that is left to do. Raises SplitFrozenError, Stopped."""
    registry, store = Registry(run.root), Store(run.store, codecs=run.codecs)
    store.recover()
    refuse_missing(run.config.task.eval, run.config.wire.public)
    sliced = load_sliced(run.config)
    prepared = prepare(run, sliced)
    for depth in prepared.sides:
        run.codecs(prepared.codec_at(depth))  # Damage is told now, not to devices.
    # Until here a signal ends us at once: files are written whole or not at all.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    silence = Silence(run.config.devices.patience_s)
    recorder = Recorder(run, sliced.shape)
    place = Workplace(run, registry, store, sliced, prepared, stop, silence, recorder)
    if registry.state().state == "preparing":
        registry.set_state("receiving")
    train(place)
    registry.set_state("done")


def train(place: Workplace) -> None:
    """Lift and train until the last epoch is done. Raises SplitFrozenError, Stopped."""
    run, config, sliced = place.run, place.run.config, place.sliced
    device = to_fastest(sliced)
    dtype = resolve(config.model.precision, device)
    log.info("computing in %s on %s", str(dtype).removeprefix("torch."), device)
    tokens = min(SPEED_TOKENS, sliced.longest)
    one_block = Lifter(sliced, 2, micro_tokens=tokens, device=device, dtype=dtype)
    place.recorder.speed(one_block, tokens, sliced.width)
    coded = partial(run.codecs, place.prepared.codec_at(config.model.cut))
    bench = Bench(sliced, config, place.at_cut(), dtype, coded, report=place.report)
    adapted = bench.adapt(config.model.cut)
    evaluate = _evaluator(place, adapted, dtype)
    if evaluate is not None and not run.events("baseline"):
        before = evaluate().metrics
        run.report({"event": "baseline", "time": time.time(), **before})
        log.info("before training: %s", shown(before))
    lifter = Lifter(
        sliced, config.model.cut, micro_tokens=config.train.micro_tokens, device=device, dtype=dtype
    )
    run.training.mkdir(exist_ok=True)
    begin = _streaming if config.run.start == "streaming" else _complete
    order, samples = begin(place, lifter)
    steps = math.ceil(samples / config.train.batch_size)
    method = pooled(bench, adapted, steps)
    job = Job(config.train, config.run.seed, samples, dtype, run.training)
    steps *= config.train.epochs
    place.registry.set_state("training")
    run.report({"event": "training", "steps": steps, "samples": samples, "time": time.time()})
    with Reporter(run, steps) as reporter:
        hooks = Hooks(reporter, evaluate, place.stop.is_set, place.pause)
        outcome = fit(place.recorder.method(method), place.store, order, job, hooks)
    if outcome.stopped:
        raise Stopped


def _evaluator(
    place: Workplace, adapted: Adapted, dtype: torch.dtype
) -> Callable[[], Evaluation] | None:
    config = place.run.config
    if config.task.eval is None:
        return None
    held_out = evaluation.open_store(
        place.run.evaluation, config.task.eval, place.run, place.prepared, place.sliced
    )
    evaluator = Evaluator(
        Upper(adapted, config.model.cut),
        held_out,
        config.task.kind,
        micro_tokens=config.train.micro_tokens,
        dtype=dtype,
        device=place.sliced.model.device,
    )
    evaluate = evaluation.with_answers(
        evaluator, config.task.eval, place.run, place.prepared, adapted.model, place.sliced.longest
    )
    return place.recorder.evaluation(evaluate, held_out.samples())


def _complete(place: Workplace, lifter: Lifter) -> tuple[Order, int]:
    """Wait for all announced samples, lifting meanwhile; the order over the roster."""
    config, path = place.run.config, place.run.training / "roster.json"
    lifting = _Lifting(place, lifter)
    while not path.exists():
        if lifting.look().complete:
            write_roster(path, place.at_cut())
        else:
            place.pause()
    table = read_roster(path, place.at_cut())
    return FixedOrder(table, config.run.seed, config.train.batch_size), len(table)


def _streaming(place: Workplace, lifter: Lifter) -> tuple[Order, int]:
    """Wait until everybody has announced; the order draws from what is at the cut.

    Who takes part is fixed then, as the number of samples sets the learning rate of every step.
    """
    config, path = place.run.config, place.run.training / "announced.json"
    while not path.exists():
        seen = place.attendance()
        if seen.unannounced or not seen.announced:
            place.pause()
        else:
            write_whole(path, msgspec.json.encode(seen.announced))
    announced = msgspec.json.decode(path.read_bytes(), type=dict[str, int])
    window = ShuffleWindow(place.run.training / "ledger.jsonl", config.run.seed, config.run.window)
    lifting = _Lifting(place, lifter)
    order = StreamingOrder(
        window, lambda: lifting.arrivals(announced), config.run.seed, config.train.batch_size
    )
    return order, sum(announced.values())


class _Lifting:
    """Lifts what has arrived. Looking costs time that grows with the store, so it is rationed."""

    def __init__(self, place: Workplace, lifter: Lifter) -> None:
        self._place = place
        self._lifter = lifter
        self._seen: Attendance | None = None
        self._arrivals = Arrivals(place.at_cut(), complete=False)
        self._arrivals_at = -math.inf

    def look(self) -> Attendance:
        """Who is there now. What came since the last look is lifted; raises Stopped."""
        seen = self._place.attendance()
        if seen != self._seen:
            store = self._place.recorder.store(self._place.store)
            self._lifter.advance(store, self._stop_between)
            self._seen = seen
        return seen

    def arrivals(self, devices: Collection[str]) -> Arrivals:
        """What can be drawn of these devices, at most REFRESH_S old."""
        due = time.monotonic() - self._arrivals_at > REFRESH_S
        if due and not self._arrivals.complete:
            complete = not set(self.look().missing).intersection(devices)
            table = self._place.at_cut()
            counted = np.array([device in devices for device in table.devices], bool)
            self._arrivals = Arrivals(table.select(counted[table.device]), complete)
            self._arrivals_at = time.monotonic()
        return self._arrivals

    def _stop_between(self, _done: int, _total: int) -> None:
        if self._place.stop.is_set():
            raise Stopped


def main(folder: Path) -> int:
    """Run the worker as a process; returns its exit code."""
    run = RunFolder(folder)
    logs.start()
    threads.one_for_numpy()
    logs.also_to(run.root / "run.log")
    stop = threading.Event()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with run.lock("worker", patience_s=PREDECESSOR_S):
            work(run, stop)
    except Stopped:
        return STOPPED
    except DiskFullError as error:
        log.error("%s", error)
        return NO_SPACE
    except SplitFrozenError as error:
        log.error("%s", error)
        _fail(run, str(error))
        return error.exit_code
    except Exception as error:
        log.exception("the worker failed")
        _fail(run, f"{type(error).__name__}: {error}")
        return 1
    return 0


def _fail(run: RunFolder, message: str) -> None:
    """Say why for `status`, unless that fails too."""
    with contextlib.suppress(SplitFrozenError):
        Registry(run.root).set_state("failed", message)


def _end_with_parent() -> None:
    """The web process holds our standard input; when it dies, so do we, and nobody competes."""
    while sys.stdin.read(1):
        pass
    os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
