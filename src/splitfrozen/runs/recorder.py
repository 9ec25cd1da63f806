"""Writes down what the worker computes, and when, for the event log (`runs.networklog`).

It stands between the worker and what it works with: a store that sees lifting's reads and writes, a
method and an evaluation that see when they are called. Neither lifting nor the loop knows of it.
FLOP are those of `model.costs` for real tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from splitfrozen import rng
from splitfrozen.model.costs import ModelShape, Tokens, forward_flops
from splitfrozen.records import IGNORED, Activation, ActivationStore, SampleKey, SampleTable
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.networklog import Work, evaluation_flops, step_flops
from splitfrozen.training.evaluate import Evaluation
from splitfrozen.training.lift import Lifter
from splitfrozen.training.loop import Method
from splitfrozen.training.optimise import Gradients, StepResult

Clock = Callable[[], float]

SPEED_TOKENS = 128
"""Of the sample on which the speed of lifting is measured, where the model takes so many."""

SPEED_PASSES = 5
"""Timed after one that warms up; their median counts."""


def steady() -> Clock:
    """Seconds since 1970, which go on evenly when somebody sets the system's clock."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class Recorder:
    """Appends `Work` to a run's `metrics.jsonl`, and first the shape of its model."""

    def __init__(self, run: RunFolder, shape: ModelShape, clock: Clock | None = None) -> None:
        self.clock = clock or steady()
        self._run = run
        self._shape = shape
        self._steps = 0
        run.report({"event": "shape", "shape": msgspec.to_builtins(shape)})

    def speed(self, lifter: Lifter, tokens: int, width: int) -> None:
        """Measure how fast this machine lifts from depth 1 to 2, and write it down.

        It is measured on a sample of so many tokens. The planner weighs it against the devices:
        what they leave is lifted here.
        """
        hidden = rng.stream(0, "speed").normal(size=(tokens, width)).astype(np.float32)
        one = Activation(0, 1, hidden, np.zeros(1, np.int32))
        lifter.lift([one])
        seconds = []
        for _ in range(SPEED_PASSES):
            begin = self.clock()
            lifter.lift([one])
            seconds.append(max(self.clock() - begin, 1e-9))
        flops = forward_flops(self._shape, 1, Tokens.uniform(1, tokens))
        self._run.report({"event": "speed", "flops": flops / statistics.median(seconds)})

    def store(self, store: ActivationStore) -> ActivationStore:
        """`store`, for a Lifter: what is lifted in it is written down."""
        return _Store(store, self)

    def method(self, method: Method[Activation]) -> Method[Activation]:
        """`method`, whose steps are written down."""
        return _Method(method, self)

    def evaluation(
        self, evaluate: Callable[[], Evaluation], table: SampleTable
    ) -> Callable[[], Evaluation]:
        """`evaluate`, which runs on the samples of `table`, is written down.

        The head is counted for every token, though of a language model only those with a loss
        reach it; answers that are generated are not counted.
        """
        load = Tokens.of(table.tokens.tolist())
        flops = evaluation_flops(self._shape, self._run.config, load, load)

        def timed() -> Evaluation:
            begin = self.clock()
            found = evaluate()
            self._write(Work("evaluate", self._steps, flops, begin, self.clock()))
            return found

        return timed

    def lifted(self, key: SampleKey, chunk: int, blocks: int, load: Tokens, begin: float) -> None:
        """A group of a chunk, of which `key` is one, went through so many blocks."""
        flops = forward_flops(self._shape, blocks, load)
        self._write(Work("lift", chunk, flops, begin, self.clock(), key.device))

    def stepped(self, items: Sequence[Activation], step: int, begin: float) -> None:
        """Step `step`, counted from 0, was done."""
        load = Tokens.of(len(item.hidden) for item in items)
        head = load
        if any(len(item.targets) > 1 for item in items):
            # Of a language model only tokens with a loss reach the head.
            predicted = sum(int((item.targets != IGNORED).sum()) for item in items)
            head = Tokens(load.samples, predicted, load.squares)
        flops = step_flops(self._shape, self._run.config, load, head)
        self._write(Work("train", step, flops, begin, self.clock()))
        self._steps = step + 1

    def _write(self, work: Work) -> None:
        self._run.report(msgspec.to_builtins(work))


class _Store:
    """A group is lifted between reading it and writing it back."""

    def __init__(self, store: ActivationStore, recorder: Recorder) -> None:
        self._store = store
        self._recorder = recorder
        self._table: SampleTable | None = None
        self._begin = 0.0
        self._depth = 0

    def samples(self) -> SampleTable:
        self._table = self._store.samples()
        return self._table

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        self._begin = self._recorder.clock()
        found = self._store.read(keys)
        self._depth = found[0].depth
        return found

    def replace(self, device: str, activations: Iterable[Activation]) -> None:
        lifted = list(activations)
        self._store.replace(device, lifted)
        key, load = SampleKey(device, lifted[0].sample), Tokens.of(len(a.hidden) for a in lifted)
        blocks = lifted[0].depth - self._depth
        self._recorder.lifted(key, self._chunk(key), blocks, load, self._begin)

    def _chunk(self, key: SampleKey) -> int:
        table = self._table
        assert table is not None, "a Lifter asks for the samples first"
        number = table.devices.index(key.device)
        first, end = np.searchsorted(table.device, [number, number + 1])
        return int(table.chunk[first + np.searchsorted(table.sample[first:end], key.sample)])


class _Method:
    """A method whose steps are timed."""

    def __init__(self, method: Method[Activation], recorder: Recorder) -> None:
        self._method = method
        self._recorder = recorder

    @property
    def gradients(self) -> Gradients:
        return self._method.gradients

    def step(self, keys: Sequence[SampleKey], items: Sequence[Activation], step: int) -> StepResult:
        begin = self._recorder.clock()
        result = self._method.step(keys, items, step)
        self._recorder.stepped(items, step, begin)
        return result

    def state(self) -> dict[str, torch.Tensor]:
        return self._method.state()

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self._method.load_state(tensors)

    def save(self, folder: Path) -> None:
        self._method.save(folder)
