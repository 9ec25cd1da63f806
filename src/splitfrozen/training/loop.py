"""THE training loop: every method trains with it, and says only what differs.

    for each epoch
        for each batch          stop and checkpoint if asked; step; checkpoint now and then;
                                meanwhile the next batch is read, if it is known already
        save the adapter, checkpoint, evaluate, keep the adapter if it is the best so far

A run may be killed anywhere. It continues from its last checkpoint and, on the CPU, ends with the
bytes it would have had: what a step draws depends on (seed, step) alone, and the checkpoint holds
all that it builds on. Steps after the checkpoint are done and reported again, and so is an
evaluation that was cut short; it meets the same adapter and the same best score, so it changes
nothing twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import torch

from splitfrozen.config import TrainSpec
from splitfrozen.disk import explained
from splitfrozen.errors import StoreError
from splitfrozen.records import SampleKey
from splitfrozen.training.batching import Order
from splitfrozen.training.checkpoint import (
    Progress,
    read_checkpoint,
    write_checkpoint,
)
from splitfrozen.training.evaluate import Evaluation
from splitfrozen.training.optimise import Gradients, Item, ItemIn, NotFiniteError, StepResult

ItemOut = TypeVar("ItemOut", covariant=True)


class Method(Protocol[ItemIn]):
    """What differs between methods: what a step trains on which side, and what its result is.

    Attributes:
        gradients: how all its gradients are computed.
    """

    @property
    def gradients(self) -> Gradients: ...

    def step(self, keys: Sequence[SampleKey], items: Sequence[ItemIn], step: int) -> StepResult:
        """Do step number `step`, counted from 0, over a batch.

        Raises:
            NotFiniteError: the loss or its gradient is not a number.
            SplitFrozenError: memory ran out.
        """
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """All that the steps changed, by name: to be copied or written, not kept."""
        ...

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave. Raises StoreError on any other names or shapes."""
        ...

    def save(self, folder: Path) -> None:
        """Write the adapter as `folder`, durably, in place of an older one."""
        ...


class Source(Protocol[ItemOut]):
    """Gives the items of a batch; an ActivationSource is one."""

    def read(self, keys: Sequence[SampleKey]) -> Sequence[ItemOut]: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What fixes the result, and where it goes.

    Attributes:
        spec: the optimisation.
        seed: of the run.
        samples: of one epoch, as announced.
        dtype: what to compute in.
        folder: receives `checkpoint.safetensors`, `last/` and `best/`.
    """

    spec: TrainSpec
    seed: int
    samples: int
    dtype: torch.dtype
    folder: Path

    @property
    def identity(self) -> str:
        """Hash over everything here that changes what is learned."""
        # They are about memory and the disk, and may be lowered while a run continues. With dropout
        # other values are dropped then: one draw is as good as another.
        spec = msgspec.structs.replace(self.spec, micro_tokens=1, checkpoint_steps=1)
        return _hash([msgspec.to_builtins(spec), self.seed, self.samples, str(self.dtype)])


def _never() -> bool:
    return False


def _refuse_to_wait() -> None:
    raise AssertionError("an order that may have to wait needs a way to wait")


@dataclass(frozen=True, slots=True)
class Hooks:
    """How the loop talks to its surroundings.

    Attributes:
        report: takes an event: a dict of its name as "event", the steps done as "step", the epoch
            counted from 0, and plain values, some of which may be NaN.
        evaluate: measures the method as it is; None where there is nothing to evaluate on.
        should_stop: asked between steps.
        wait: called when the next batch is not yet known, until it is.
    """

    report: Callable[[dict[str, Any]], None]
    evaluate: Callable[[], Evaluation] | None = None
    should_stop: Callable[[], bool] = _never
    wait: Callable[[], None] = _refuse_to_wait


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the training ended.

    Attributes:
        stopped: it was asked to stop; calling `fit` again continues it.
        steps: done so far, over all calls.
        best: best score of an evaluation, if there was one.
    """

    stopped: bool
    steps: int
    best: float | None


def fit(
    method: Method[Item], source: Source[Item], order: Order, job: Job, hooks: Hooks
) -> Outcome:
    """Train, or continue from the checkpoint in `job.folder`.

    Args:
        method: what is trained; it holds the parameters, which change in place.
        source: where items are read from.
        order: which samples each batch holds.
        job: the optimisation and the folder.
        hooks: events, evaluation, stopping, waiting.

    Raises:
        NotFiniteError: the loss is not finite; names the step and the samples.
        StoreError: the checkpoint or the samples are not those of this training, or the disk
            refuses.
        SplitFrozenError: memory is too small.
    """
    return _Fit(method, source, order, job, hooks).run()


class _Fit(Generic[Item]):
    """One call of `fit`."""

    def __init__(
        self, method: Method[Item], source: Source[Item], order: Order, job: Job, hooks: Hooks
    ) -> None:
        self._method = method
        self._reader = _Reader(source)
        self._order = order
        self._job = job
        self._hooks = hooks
        self._at = Progress(job.identity, job.spec.micro_tokens)

    def run(self) -> Outcome:
        self._resume()
        with self._reader:
            return self._epochs()

    def _epochs(self) -> Outcome:
        while self._at.epoch < self._job.spec.epochs:
            if self._hooks.should_stop():
                self._checkpoint()
                return Outcome(True, self._at.step, self._at.best)
            keys = self._order.batch(self._at.epoch, self._at.index)
            if keys is None:
                self._hooks.wait()
            elif keys:
                self._train(keys)
            else:
                self._end_epoch()
        return Outcome(False, self._at.step, self._at.best)

    def _train(self, keys: list[SampleKey]) -> None:
        at = self._at
        try:
            items = self._reader.read(keys, self._order.known(at.epoch, at.index + 1))
            result = self._method.step(keys, items, at.step)
        except NotFiniteError as error:
            samples = [f"{key.device}/{key.sample}" for key in keys]
            self._report("diverged", samples=samples)
            raise error.naming(samples) from None
        at.step, at.index, at.last_batch = at.step + 1, at.index + 1, _hash(keys)
        self._report("step", samples=len(keys), **dataclasses.asdict(result))
        if at.step % self._job.spec.checkpoint_steps == 0:
            self._checkpoint()

    def _end_epoch(self) -> None:
        """Save before evaluating, so that an evaluation which fails loses nothing."""
        at = self._at
        if at.step == 0:
            raise StoreError(
                "there is nothing to train on",
                got="no samples",
                allowed="one or more",
                remedy="let devices with data join the run",
            )
        self._save("last")
        self._checkpoint()
        if self._hooks.evaluate is not None:
            evaluation = self._hooks.evaluate()
            best = at.best is None or evaluation.score > at.best
            if best and not math.isnan(evaluation.score):
                self._save("best")
                at.best = evaluation.score
            self._report("evaluation", score=evaluation.score, best=at.best, **evaluation.metrics)
        at.epoch, at.index, at.last_batch = at.epoch + 1, 0, ""
        self._checkpoint()

    def _save(self, name: str) -> None:
        folder = self._job.folder / name
        with explained(folder):
            self._method.save(folder)

    def _checkpoint(self) -> None:
        self._at.micro_tokens = self._method.gradients.micro_tokens
        write_checkpoint(self._path, self._at, self._method.state())

    def _resume(self) -> None:
        found = read_checkpoint(self._path)
        if found is None:
            return
        progress, tensors = found
        if progress.identity != self._job.identity:
            raise StoreError(
                f"the checkpoint {self._path} belongs to another training",
                got=f"identity {progress.identity[:12]}",
                allowed=f"{self._job.identity[:12]}, from [train], seed, precision and samples",
                remedy="restore the run's configuration, or delete the checkpoint to begin anew",
            )
        self._method.load_state(tensors)
        micro_tokens = min(progress.micro_tokens, self._job.spec.micro_tokens)
        self._method.gradients.micro_tokens = micro_tokens
        self._at = progress
        self._check_order()
        self._report("resumed")

    def _check_order(self) -> None:
        """Compare the batch before the checkpoint with what `order` now says it was."""
        if self._at.index == 0:
            return
        keys = self._order.batch(self._at.epoch, self._at.index - 1)
        if _hash(keys) != self._at.last_batch:
            raise StoreError(
                "the samples are not those that the checkpoint was trained on",
                got=f"another batch {self._at.index - 1} in epoch {self._at.epoch}",
                allowed="the same samples until the epoch ends",
                remedy="restore the store, or delete the checkpoint to begin anew",
            )

    def _report(self, event: str, **values: Any) -> None:
        at = self._at
        self._hooks.report({"event": event, "step": at.step, "epoch": at.epoch, **values})

    @property
    def _path(self) -> Path:
        return self._job.folder / "checkpoint.safetensors"


class _Reader(Generic[Item]):
    """Reads a batch while the one before it is trained on; one more batch is in memory."""

    def __init__(self, source: Source[Item]) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(1, "read ahead")
        self._begun: tuple[list[SampleKey], Future[Sequence[Item]]] | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def read(self, keys: list[SampleKey], following: list[SampleKey]) -> Sequence[Item]:
        """Return the items of `keys` and begin to read those of `following`."""
        begun = self._begun
        items = begun[1].result() if begun and begun[0] == keys else self._source.read(keys)
        self._begun = None
        if following:
            self._begun = following, self._thread.submit(self._source.read, following)
        return items


def _hash(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()
