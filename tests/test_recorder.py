"""What the worker computes is written down by what stands between it and its parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from splitfrozen.config import Config, DevicesSpec, LoraSpec, ModelSpec, RunSpec, TaskConfig
from splitfrozen.model.costs import (
    HeadMap,
    ModelShape,
    Tokens,
    backward_flops,
    forward_flops,
    head_backward_flops,
    head_flops,
)
from splitfrozen.records import IGNORED, Activation, SampleKey, SampleTable
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.networklog import Work, model_shape
from splitfrozen.runs.recorder import Recorder, steady
from splitfrozen.training.evaluate import Evaluation
from splitfrozen.training.lift import GROUP, Lifter
from splitfrozen.training.optimise import Gradients, StepResult

SHAPE = ModelShape(
    blocks=4,
    width=8,
    maps=((8, 8), (8, 8)),
    entry=((8, 8),),
    heads=2,
    attention=8,
    inner=16,
    head=(HeadMap(8, 30, pooled=False, trained=False),),
)
CUT, RANK = 2, 4


class Ticks:
    """A clock that every look at moves on by a second."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(
        Config(
            model=ModelSpec(name="gpt2", cut=CUT),
            task=TaskConfig(labels=("a", "b")),
            devices=DevicesSpec(count=2),
            lora=LoraSpec(rank=RANK),
            run=RunSpec(folder=str(tmp_path / "run")),
        )
    )


@pytest.fixture
def recorder(run: RunFolder) -> Recorder:
    return Recorder(run, SHAPE, Ticks())


def works(run: RunFolder) -> list[Work]:
    return [msgspec.convert(event, Work) for event in run.events("work")]


def activation(sample: int, tokens: int, depth: int, targets: Sequence[int] = (1,)) -> Activation:
    return Activation(sample, depth, np.zeros((tokens, 8), np.float32), np.array(targets, np.int32))


class Kept:
    """A store in memory."""

    def __init__(self, rows: Sequence[tuple[str, int, int, Activation]]) -> None:
        """Rows of device, sample, chunk and activation, sorted."""
        self.chunks = {(device, sample): chunk for device, sample, chunk, _ in rows}
        self.held = {(device, sample): one for device, sample, _, one in rows}

    def samples(self) -> SampleTable:
        keys = sorted(self.held)
        devices = tuple(sorted({device for device, _ in keys}))
        columns = (
            [devices.index(device) for device, _ in keys],
            [sample for _, sample in keys],
            [len(self.held[key].hidden) for key in keys],
            [self.held[key].depth for key in keys],
            [self.chunks[key] for key in keys],
        )
        return SampleTable(devices, *(np.array(column, np.int32) for column in columns))

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        return [self.held[key.device, key.sample] for key in keys]

    def replace(self, device: str, activations: Iterable[Activation]) -> None:
        for one in activations:
            self.held[device, one.sample] = one


class Same:
    """Blocks that change nothing."""

    def lift(
        self, hidden: torch.Tensor, lengths: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        del lengths, start, stop
        return hidden


def test_each_lifted_group_is_written_down(run: RunFolder, recorder: Recorder) -> None:
    rows = [("a", i, 7, activation(i, 3, 1)) for i in range(GROUP + 1)]
    rows += [("b", 0, 1, activation(0, 5, 2)), ("b", 1, 4, activation(1, 6, 1))]
    store = Kept(rows)
    lifter = Lifter(Same(), CUT, micro_tokens=100, device=torch.device("cpu"))
    assert lifter.advance(recorder.store(store)) == GROUP + 2
    assert {one.depth for one in store.held.values()} == {CUT}
    found = works(run)
    assert [(one.phase, one.device, one.step) for one in found] == [
        ("lift", "a", 7),
        ("lift", "a", 7),
        ("lift", "b", 4),
    ]
    assert [one.flops for one in found] == [
        forward_flops(SHAPE, 1, Tokens.of(lengths)) for lengths in ([3] * GROUP, [3], [6])
    ]
    assert [(one.begin, one.end) for one in found] == [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]
    assert lifter.advance(recorder.store(store)) == 0
    assert len(works(run)) == 3


class Counting:
    """A method that does nothing but count."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    @property
    def gradients(self) -> Gradients:
        raise NotImplementedError

    def step(self, keys: Sequence[SampleKey], items: Sequence[Activation], step: int) -> StepResult:
        self.calls.append((len(keys), len(items), step))
        return StepResult(loss=0.5, grad_norm=1.0, lr=0.1, targets=len(items))

    def state(self) -> dict[str, torch.Tensor]:
        return {"one": torch.ones(1)}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self.calls.append(tensors)

    def save(self, folder: Path) -> None:
        self.calls.append(folder)


def test_steps_and_evaluations_are_written_down(run: RunFolder, recorder: Recorder) -> None:
    inner = Counting()
    method = recorder.method(inner)
    items = [activation(0, 3, CUT), activation(1, 5, CUT)]
    keys = [SampleKey("a", 0), SampleKey("a", 1)]
    assert method.step(keys, items, 6).loss == 0.5
    table = Kept([("e", i, 0, one) for i, one in enumerate(items)]).samples()
    evaluate = recorder.evaluation(lambda: Evaluation({"loss": 1.0}, -1.0), table)
    assert evaluate().score == -1.0
    step, evaluation = works(run)
    load = Tokens.of([3, 5])
    forward = forward_flops(SHAPE, 2, load, RANK) + head_flops(SHAPE, load)
    b, w = backward_flops(SHAPE, 2, load, RANK, input_gradient=False)
    expected = forward + b + w + sum(head_backward_flops(SHAPE, load))
    assert step == Work("train", 6, expected, 1.0, 2.0)
    assert evaluation == Work("evaluate", 7, forward, 3.0, 4.0)
    method.load_state(method.state())
    method.save(Path("there"))
    assert inner.calls == [(2, 2, 6), {"one": torch.ones(1)}, Path("there")]


def test_only_predicted_tokens_reach_a_language_models_head(
    run: RunFolder, recorder: Recorder
) -> None:
    method = recorder.method(Counting())
    method.step([SampleKey("a", 0)], [activation(0, 3, CUT, (IGNORED, 2, 4))], 0)
    method.step([SampleKey("a", 0)], [activation(0, 3, CUT, (1, 2, 4))], 1)
    fewer, more = (one.flops for one in works(run))
    # Of a frozen head there is no gradient of weights: one pass forward, one back.
    assert more - fewer == 2 * 2 * 8 * 30


def test_the_shape_is_kept_and_the_clock_is_even(run: RunFolder, recorder: Recorder) -> None:
    assert model_shape(run) == SHAPE
    run.report({"event": "shape", "shape": {"blocks": "many"}})
    assert model_shape(run) == SHAPE, "a damaged line is passed over"
    clock = steady()
    assert clock() <= clock()
    assert clock() > 1.7e9, "seconds since 1970"
    assert recorder.clock() == 1.0
