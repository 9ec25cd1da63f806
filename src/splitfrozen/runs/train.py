"""`splitfrozen train`: a whole run in one process, devices included, with any method.

Devices get the rows that `[data]` gives them. SplitFrozen's devices compute, encode and store as
real ones do, but into the run's store instead of over a network; what other methods send is made
and counted. The run folder is that of `serve`, so `status`, `logs`, `stop`, `eval`, `generate` and
`export` work on it.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from splitfrozen import __version__, config, logs
from splitfrozen.config import Config
from splitfrozen.data.readers import refuse_missing
from splitfrozen.data.samples import SampleSource
from splitfrozen.data.tasks import announce, truncation
from splitfrozen.errors import ConfigError, DataError, SplitFrozenError
from splitfrozen.methods.bench import Bench, Built
from splitfrozen.methods.parts import Whole
from splitfrozen.methods.table import build
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import PROTOCOL, SERVER, Announcement, Enrolment, Outcome, Prepared
from splitfrozen.runs import evaluation, summary
from splitfrozen.runs.attendance import write_roster
from splitfrozen.runs.devices import LocalDevice, Recomputed, TorchFront, send_all
from splitfrozen.runs.eventlog import sent_in_steps, write_events
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.prepare import load_sliced, open_tokenizer, prepare, to_fastest
from splitfrozen.runs.reporter import Reporter, shown
from splitfrozen.runs.rows import Gathered, data_of, gather
from splitfrozen.server.registry import DeviceRow, Registry
from splitfrozen.server.store import Store
from splitfrozen.training.evaluate import Evaluation, Evaluator
from splitfrozen.training.lift import Lifter
from splitfrozen.training.loop import Hooks, Job, Source, fit
from splitfrozen.training.precision import resolve
from splitfrozen.wire.frame import Origin

log = logging.getLogger("splitfrozen.train")

INTERRUPTED = 1
"""Exit code of a run that was stopped before it was done."""


def train(source: Path) -> Outcome:
    """Train a run until it is done or stopped; one that was interrupted continues.

    Args:
        source: the run's TOML file, or its folder.

    Raises:
        ConfigError: the file, or it differs from the run that its folder holds.
        DataError: the rows cannot be used, or are not those that the run was begun with.
        ModelError: the model cannot be loaded or adapted.
        StoreError: another process works on the run, or the disk refuses.
        SplitFrozenError: the training failed.
    """
    began = time.monotonic()
    wanted = RunFolder(source).config if source.is_dir() else config.load(source)
    refuse_missing(data_of(wanted).train, wanted.task.eval, wanted.wire.public)
    run = RunFolder(source) if source.is_dir() else RunFolder.create(wanted)
    _refuse_served(run)
    logs.also_to(run.root / "run.log")
    with (
        run.lock("serve"),
        contextlib.closing(Registry(run.root)) as registry,
        contextlib.closing(Store(run.store, codecs=run.codecs)) as store,
    ):
        if registry.state().state == "done":
            log.info("the run was done already")
        elif not _work(run, registry, store):
            registry.set_state("stopped")
        return _outcome(run, registry, store, time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class Workplace:
    """What is trained on what; `devices` are those that were not purged."""

    run: RunFolder
    registry: Registry
    store: Store
    sliced: SlicedModel
    prepared: Prepared
    devices: list[LocalDevice]

    def report(self, event: dict[str, Any]) -> None:
        """Write an event, and when it was."""
        self.run.report({**event, "time": time.time()})


def _work(run: RunFolder, registry: Registry, store: Store) -> bool:
    """Do all that is left to do; False where a signal ended it before."""
    stop = threading.Event()
    try:
        # Until the samples are there a signal ends us at once: nothing is lost.
        with _signals(signal.default_int_handler):
            place = _assemble(run, registry, store)
            with _signals(lambda *_: stop.set()):
                return _train(place, stop)
    except KeyboardInterrupt:
        return False
    except SplitFrozenError as error:
        registry.set_state("failed", str(error))
        raise
    except Exception as error:
        registry.set_state("failed", f"{type(error).__name__}: {error}")
        raise


# --- what is there before training ---------------------------------------------------------------


def _assemble(run: RunFolder, registry: Registry, store: Store) -> Workplace:
    """Load the model, read the rows and let the devices join. Raises RequestError, StoreError."""
    registry.set_state("preparing")
    store.recover()
    sliced = load_sliced(run.config)
    prepared = prepare(run, sliced, export=False)
    gathered = gather(run.config, prepared.task, open_tokenizer(run, prepared))
    devices = _join(run, registry, prepared, gathered)
    samples = [sample for device in devices for sample in device.samples]
    log.info(
        "%d samples on %d devices, %d rows left out",
        len(samples),
        len(devices),
        gathered.skipped,
    )
    read = {"skipped": gathered.skipped, "truncated": sum(one.truncated for one in samples)}
    if told := truncation(read["truncated"], len(samples), prepared.task.max_tokens):
        log.warning("%s", told)
    run.report({"event": "data", "samples": len(samples), **read, "time": time.time()})
    return Workplace(run, registry, store, sliced, prepared, devices)


def _join(
    run: RunFolder, registry: Registry, prepared: Prepared, gathered: Gathered
) -> list[LocalDevice]:
    """Put the devices into the registry, with what they announce."""
    wanted = run.config
    registry.ensure_slots(wanted.devices.count)
    tokens = registry.tokens()
    devices = []
    for row, portion in zip(registry.devices(), gathered.portions, strict=True):
        if row.revoked:
            continue
        said = announce(portion.samples, 0)
        if row.announcement != said:
            _refuse_other_rows(row, said, wanted)
            if row.id in tokens:
                secret = secrets.token_hex(32)
                name = portion.name[:100]
                registry.enrol(Enrolment(PROTOCOL, tokens[row.id], secret, name, __version__))
            registry.announce(row.id, said)
        depth = (
            wanted.model.cut if wanted.devices.depth == "auto" else wanted.devices.depth[row.slot]
        )
        coded = prepared.codec_at(depth)
        origin = Origin(run.name, row.id, prepared.weights_hash, depth, prepared.width, coded)
        devices.append(LocalDevice(portion.samples, origin, run.codecs))
    if wanted.method.name == "splitfrozen":
        registry.assign({device.id: device.origin.depth for device in devices})
    return devices


def _refuse_other_rows(row: DeviceRow, said: Announcement, wanted: Config) -> None:
    before = row.announcement
    if before is not None:
        raise DataError(
            f"{data_of(wanted).train} has changed since the run was begun",
            got=f"{said.samples} samples of {said.tokens} tokens for {row.id}, or other content",
            allowed=f"the {before.samples} samples of {before.tokens} tokens that it had",
            remedy="restore the file, or start a new run folder",
        )


# --- training ------------------------------------------------------------------------------------


def _train(place: Workplace, stop: threading.Event) -> bool:
    """Train until the last epoch is done; False where `stop` ended it before."""
    run, wanted, sliced = place.run, place.run.config, place.sliced
    device = to_fastest(sliced)
    dtype = resolve(wanted.model.precision, device)
    log.info(
        "%s, computing in %s on %s", wanted.method.name, str(dtype).removeprefix("torch."), device
    )
    held = SampleSource({device.id: device.samples for device in place.devices})
    traffic = _Traffic()
    coded = partial(run.codecs, place.prepared.codec_at(wanted.model.cut))
    built = build(Bench(sliced, wanted, held.samples(), dtype, coded, place.report, traffic.add))
    evaluate = _evaluator(place, built, dtype)
    if evaluate is not None and not run.events("baseline"):
        before = evaluate().metrics
        place.report({"event": "baseline", **before})
        log.info("before training: %s", shown(before))
    run.training.mkdir(exist_ok=True)
    source: Source[Any] = held
    if built.trains_on == "activations":
        source = _activations(place, dtype, traffic, stop)
    roster = run.training / "roster.json"
    if not roster.exists():
        write_roster(roster, held.samples())
    samples, steps = len(held.samples()), built.steps_per_epoch * wanted.train.epochs
    job = Job(wanted.train, wanted.run.seed, samples, dtype, run.training)
    place.registry.set_state("training")
    place.report({"event": "training", "steps": steps, "samples": samples})
    with Reporter(run, steps) as reporter:
        hooks = Hooks(traffic.into(reporter), evaluate, stop.is_set)
        if fit(built.method, source, built.order, job, hooks).stopped:
            return False
    reports = {row.id: row.report for row in place.registry.devices()}
    bytes_up = {device: report.bytes_up for device, report in reports.items() if report is not None}
    write_events(run, sliced, built, place.devices, bytes_up)
    place.registry.set_state("done")
    return True


def _evaluator(
    place: Workplace, built: Built, dtype: torch.dtype
) -> Callable[[], Evaluation] | None:
    """Measures the whole model, as any method changes blocks that another leaves alone."""
    wanted = place.run.config
    if wanted.task.eval is None:
        return None
    measure = Evaluator(
        Whole(built.adapted),
        evaluation.open_samples(wanted.task.eval, place.run, place.prepared),
        wanted.task.kind,
        micro_tokens=wanted.train.micro_tokens,
        dtype=dtype,
        device=built.adapted.device,
    )
    return evaluation.with_answers(
        measure,
        wanted.task.eval,
        place.run,
        place.prepared,
        built.adapted.model,
        place.sliced.longest,
    )


def _activations(
    place: Workplace, dtype: torch.dtype, traffic: _Traffic, stop: threading.Event
) -> Source[Any]:
    """Where SplitFrozen's server reads: the store that devices filled, or the devices anew."""
    wanted, sliced = place.run.config, place.sliced
    lifter = Lifter(
        sliced,
        wanted.model.cut,
        micro_tokens=wanted.train.micro_tokens,
        device=torch.device(sliced.model.device),
        dtype=dtype,
    )
    if wanted.method.reuse == "never":
        source = Recomputed(place.devices, sliced, lifter, wanted.train.micro_tokens)
        traffic.read_by(source)
        return source
    place.registry.set_state("receiving")
    for device in place.devices:
        front = TorchFront(sliced, device.origin.depth)
        seed = wanted.run.seed
        sent = send_all(device, front, place.store, wanted.wire.chunk_bytes, seed, stop)
        place.registry.report(device.id, sent)

    def stop_between(_done: int, _total: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    lifter.advance(place.store, stop_between)
    return place.store


class _Traffic:
    """What crosses the network in a step, kept with the step's event."""

    def __init__(self) -> None:
        self._sent: Counter[tuple[str, str, str]] = Counter()
        self._source: Recomputed | None = None

    def add(self, source: str, target: str, phase: str, size: int) -> None:
        """A method sends."""
        self._sent[source, target, phase] += size

    def read_by(self, source: Recomputed) -> None:
        """What devices send is read ahead, so it is told of each batch by itself."""
        self._source = source

    def into(self, report: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        """Events with what was sent: lists of source, target, phase and bytes."""

        def told(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                if self._source is not None:
                    for device, size in self._source.sent.popleft().items():
                        self.add(device, SERVER, "activations", size)
                if self._sent:
                    event = {**event, "sent": [[*way, size] for way, size in self._sent.items()]}
                self._sent.clear()
            report(event)

        return told


# --- the end -------------------------------------------------------------------------------------


def _outcome(run: RunFolder, registry: Registry, store: Store, seconds: float) -> Outcome:
    """The summary of `serve`, and what only this command knows."""
    found = summary.outcome(run, registry, store)
    began = (run.events("training") or [{}])[-1]
    read = (run.events("data") or [{}])[-1]
    data = {
        **found.data,
        "method": run.config.method.name,
        "samples": began.get("samples"),
        "skipped": read.get("skipped"),
        "truncated": read.get("truncated"),
        "bytes": _bytes(run, registry),
        "seconds": round(seconds, 2),
    }
    sent = ", ".join(
        f"{size / 1e6:.2f} MB of {what}" for what, size in _bytes(run, registry).items()
    )
    text = f"{found.text}\nmethod  {run.config.method.name}, {sent or 'nothing'} sent"
    text += f"\n        {seconds:.1f} s, {read.get('skipped', 0)} rows left out"
    if cut := read.get("truncated"):
        text += f"\n        {truncation(cut, read['samples'], run.config.task.max_tokens)}"
    if registry.state().state == "done":
        return Outcome(data, text)
    log.info("stopped; the same command continues")
    return Outcome(data, f"{text}\nstopped; the same command continues", INTERRUPTED)


def _bytes(run: RunFolder, registry: Registry) -> dict[str, int]:
    """Bytes that crossed the network, by what they were."""
    total: Counter[str] = Counter()
    for sent in sent_in_steps(run).values():
        for _, _, phase, size in sent:
            total[phase] += size
    for row in registry.devices():
        if row.report is not None:
            total["activations"] += row.report.bytes_up
    return dict(total)


# --- small things --------------------------------------------------------------------------------


@contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM so, for as long as the block runs."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _refuse_served(run: RunFolder) -> None:
    prepared = run.prepared()
    if (run.root / "address.json").exists() or (prepared is not None and prepared.fronts):
        raise ConfigError(
            f"{run.root} holds a run that is served",
            got="`splitfrozen train`",
            allowed=f"splitfrozen serve {run.root}",
            remedy="continue it so, or give the new run its own run.folder",
        )
