"""The loop with a toy model: its arithmetic, where it goes on, its stops and failures."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import get_linear_schedule_with_warmup

from splitfrozen import rng
from splitfrozen.config import TrainSpec
from splitfrozen.errors import SplitFrozenError, StoreError
from splitfrozen.methods.pooled import Pooled
from splitfrozen.records import Activation, SampleKey, SampleTable
from splitfrozen.training import precision
from splitfrozen.training.batching import Arrivals, FixedOrder, ShuffleWindow, StreamingOrder
from splitfrozen.training.evaluate import Evaluation
from splitfrozen.training.loop import Hooks, Job, Outcome, fit
from splitfrozen.training.optimise import Gradients, NotFiniteError, Optimiser, learning_rate

WIDTH, CLASSES, SAMPLES = 6, 3, 22
SPEC = TrainSpec(
    epochs=3,
    batch_size=4,
    lr=0.05,
    warmup=0.2,
    weight_decay=0.1,
    micro_tokens=12,
    checkpoint_steps=4,
)
STEPS = 18
Event = dict[str, Any]


def table(count: int = SAMPLES) -> SampleTable:
    zeros = np.zeros(count, np.int32)
    ids = np.arange(count, dtype=np.int32)
    return SampleTable(("a",), zeros, ids, zeros + 5, zeros + 2, zeros)


class Data:
    """Samples drawn from their ids; a few can be spoilt."""

    def __init__(self, spoilt: Sequence[int] = ()) -> None:
        self.spoilt = set(spoilt)

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        return [self.one(key.sample) for key in keys]

    def one(self, id_: int) -> Activation:
        draw = rng.stream(0, "data", id_)
        hidden = draw.standard_normal((int(draw.integers(1, 8)), WIDTH), np.float32)
        if id_ in self.spoilt:
            hidden[:] = np.inf
        return Activation(id_, 2, hidden, np.array([id_ % CLASSES], np.int32))


class Linear:
    """Classifies the mean of a sample; with dropout, to see that its draws can be repeated."""

    def __init__(self, dropout: float = 0.3, room: int = 10**9, error: str = "") -> None:
        self.weight = torch.nn.Parameter(torch.full((CLASSES, WIDTH), 0.1))
        self.unused = torch.nn.Parameter(torch.ones(2))
        self.dropout = dropout
        self.room = room
        self.error = error
        self.largest = 0

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"weight": self.weight, "unused": self.unused}

    def length(self, item: Activation) -> int:
        return len(item.hidden)

    def loss(self, items: Sequence[Activation]) -> torch.Tensor:
        padded = len(items) * max(len(item.hidden) for item in items)
        if padded > self.room:
            raise RuntimeError(self.error) if self.error else torch.OutOfMemoryError("no room")
        self.largest = max(self.largest, padded)
        means = torch.stack([torch.from_numpy(item.hidden).mean(0) for item in items])
        labels = torch.tensor([int(item.targets[0]) for item in items])
        logits = functional.dropout(means, self.dropout) @ self.weight.T
        return functional.cross_entropy(logits, labels, reduction="sum")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_bytes(self.bytes())

    def bytes(self) -> bytes:
        return self.weight.detach().numpy().tobytes()


class KilledError(Exception):
    """Stands for a kill, at a place that a hook chooses."""


def job(folder: Path, spec: TrainSpec = SPEC, seed: int = 0, samples: int = SAMPLES) -> Job:
    return Job(spec, seed, samples, torch.float32, folder)


def pooled(
    toy: Any,
    spec: TrainSpec = SPEC,
    *,
    steps: int = STEPS,
    seed: int = 0,
    report: Callable[[Event], None] = lambda _: None,
) -> Pooled[Activation]:
    """The method that trains a toy, which is the part and the adapter in one."""
    gradients = Gradients(spec, seed=seed, device=torch.device("cpu"), report=report)
    return Pooled(toy, toy, Optimiser(toy.parameters(), spec, steps), gradients)


def train(
    toy: Linear,
    folder: Path,
    *,
    report: Callable[[Event], None] = lambda _: None,
    spec: TrainSpec = SPEC,
    seed: int = 0,
    **hooks: Any,
) -> Outcome:
    order = FixedOrder(table(), seed, spec.batch_size)
    steps = math.ceil(SAMPLES / spec.batch_size) * spec.epochs
    method = pooled(toy, spec, steps=steps, seed=seed, report=report)
    return fit(method, Data(), order, job(folder, spec, seed), Hooks(report, **hooks))


def test_the_learning_rate_is_that_of_transformers() -> None:
    for steps in (1, 18, 100):
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=SPEC.lr)
        reference = get_linear_schedule_with_warmup(optimiser, math.ceil(0.2 * steps), steps)
        for step in range(steps + 1):
            assert learning_rate(step, steps, SPEC) == pytest.approx(reference.get_last_lr()[0])
            optimiser.step()
            reference.step()
    assert learning_rate(0, 10, TrainSpec(warmup=0.0)) == TrainSpec().lr


def test_training_is_adamw_on_whole_batches(tmp_path: Path) -> None:
    events: list[Event] = []
    method = Linear(dropout=0.0)
    outcome = train(method, tmp_path, report=events.append)
    steps = [event for event in events if event["event"] == "step"]

    plain = Linear(dropout=0.0)
    adam = torch.optim.AdamW([plain.weight], lr=SPEC.lr, weight_decay=SPEC.weight_decay)
    schedule = get_linear_schedule_with_warmup(adam, math.ceil(0.2 * STEPS), STEPS)
    order = FixedOrder(table(), 0, 4)
    norms = []
    for step in range(STEPS):
        items = Data().read(order.batch(*divmod(step, 6)))
        adam.zero_grad()
        loss = plain.loss(items) / len(items)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([plain.weight], SPEC.clip)))
        adam.step()
        schedule.step()
        assert steps[step]["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert steps[step]["grad_norm"] == pytest.approx(norms[-1], abs=1e-6)
        assert steps[step]["samples"] == steps[step]["targets"] == len(items)
    torch.testing.assert_close(method.weight, plain.weight, rtol=1e-5, atol=1e-6)
    assert outcome == Outcome(stopped=False, steps=STEPS, best=None)
    assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
    assert [event["epoch"] for event in steps] == [0] * 6 + [1] * 6 + [2] * 6
    assert method.largest <= SPEC.micro_tokens < plain.largest


def test_a_step_reads_as_many_numbers_however_many_micro_batches_it_has() -> None:
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            del types
            read.append(func is torch.ops.aten._local_scalar_dense.default)
            return func(*args, **(kwargs or {}))

    keys = [SampleKey("a", i) for i in range(SAMPLES)]
    items = Data().read(keys)
    reads, losses = [], []
    for micro_tokens in (4096, 1):
        read: list[bool] = []
        spec = TrainSpec(micro_tokens=micro_tokens)
        method = pooled(Linear(dropout=0.0), spec, steps=9)
        with Reads():
            losses.append(method.step(keys, items, 3).loss)
        reads.append(sum(read))
    # Each reading would make a GPU wait for its queue to empty.
    assert reads[0] == reads[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


class Watched(Data):
    """Says which samples somebody has begun to read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: queue.SimpleQueue[list[int]] = queue.SimpleQueue()

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        self.reads.put([key.sample for key in keys])
        return super().read(keys)


def test_the_next_batch_is_read_while_this_one_is_trained_on(tmp_path: Path) -> None:
    class Slow(Linear):
        """Ends a batch when the next one of its epoch is being read."""

        def loss(self, items: Sequence[Activation]) -> torch.Tensor:
            wanted = batches[: min(len(done) + 2, 6 + len(done) // 6 * 6)]
            while len(begun) < len(wanted):
                begun.append(data.reads.get(timeout=10))
            assert begun == wanted
            # What comes first in an epoch is read when an evaluation has let it begin.
            assert data.reads.empty()
            done.append(len(items))
            return super().loss(items)

    data, order = Watched(), FixedOrder(table(), 0, 4)
    spec = TrainSpec(epochs=2, batch_size=4, lr=0.05, micro_tokens=4096)
    batches = [[key.sample for key in order.batch(*divmod(i, 6))] for i in range(12)]
    begun: list[list[int]] = []
    done: list[int] = []
    method = pooled(slow := Slow(dropout=0.0), spec, steps=12)
    fit(method, data, order, job(tmp_path / "run", spec), Hooks(lambda _: None))
    train(plain := Linear(dropout=0.0), tmp_path / "plain", spec=spec)
    assert done == [4, 4, 4, 4, 4, 2] * 2
    assert slow.bytes() == plain.bytes()


def test_gradients_are_clipped() -> None:
    spec = TrainSpec(clip=0.01, batch_size=SAMPLES, warmup=0.0)
    method = pooled(toy := Linear(dropout=0.0), spec, steps=9)
    keys = [SampleKey("a", i) for i in range(SAMPLES)]
    result = method.step(keys, Data().read(keys), 0)
    assert result.grad_norm > 0.01
    assert toy.weight.grad is not None
    assert float(toy.weight.grad.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_training_killed_after_any_step_ends_with_the_same_bytes(
    tmp_path: Path, step: int
) -> None:
    whole = Linear()
    train(whole, tmp_path / "whole")
    seen: list[int] = []

    def kill(event: Event) -> None:
        if event["event"] == "step":
            seen.append(event["step"])
            if event["step"] == step and seen.count(step) == 1:
                raise KilledError

    with pytest.raises(KilledError):
        train(Linear(), tmp_path / "killed", report=kill)
    method = Linear()
    train(method, tmp_path / "killed", report=kill)
    assert method.bytes() == whole.bytes()
    for name in ("checkpoint.safetensors", "last/weights"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # It went on from the last checkpoint: every 4 steps and at the end of each epoch of 6.
    assert seen[step] - 1 == max(x for x in (0, 4, 6, 8, 12, 16) if x < step)


def test_a_training_asked_to_stop_continues_to_the_same_bytes(tmp_path: Path) -> None:
    whole, method = Linear(), Linear()
    train(whole, tmp_path / "whole")
    steps = []
    # Each call is asked once more before it stops: a question for each step and each epoch's end.
    for asked in (1, 2, 3, 4, 5):
        left = iter([False] * asked)
        outcome = train(method, tmp_path / "run", should_stop=lambda left=left: next(left, True))
        assert outcome == Outcome(stopped=True, steps=outcome.steps, best=None)
        steps.append(outcome.steps)
        method = Linear()
    assert steps == [1, 3, 6, 9, 13]
    assert train(method, tmp_path / "run") == Outcome(stopped=False, steps=STEPS, best=None)
    assert method.bytes() == whole.bytes()


def test_a_finished_training_does_nothing_more(tmp_path: Path) -> None:
    train(Linear(), tmp_path)
    events: list[Event] = []
    train(method := Linear(), tmp_path, report=events.append)
    assert [event["event"] for event in events] == ["resumed"]
    assert method.bytes() == (tmp_path / "last" / "weights").read_bytes()


def test_another_seed_gives_other_bytes(tmp_path: Path) -> None:
    runs = [Linear() for _ in range(3)]
    for number, (method, seed) in enumerate(zip(runs, (0, 0, 1), strict=True)):
        train(method, tmp_path / str(number), seed=seed)
    assert runs[0].bytes() == runs[1].bytes() != runs[2].bytes()


def test_torchs_own_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(Linear(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("error", ["", "DefaultCPUAllocator: can't allocate memory: 9 bytes"])
def test_micro_batches_are_halved_when_memory_runs_out(tmp_path: Path, error: str) -> None:
    spec = TrainSpec(epochs=2, batch_size=11, lr=0.05, micro_tokens=4096)
    control, method = Linear(dropout=0.0), Linear(dropout=0.0, room=20, error=error)
    train(control, tmp_path / "control", spec=spec)
    events: list[Event] = []
    train(method, tmp_path / "small", spec=spec, report=events.append)
    halvings = [event for event in events if event["event"] == "out_of_memory"]
    assert 1 <= len(halvings) <= 3
    assert method.largest <= 20 < control.largest
    torch.testing.assert_close(method.weight, control.weight, rtol=1e-5, atol=1e-6)


def test_a_continued_run_keeps_to_the_smaller_micro_batches(tmp_path: Path) -> None:
    events: list[Event] = []
    train(Linear(room=8), tmp_path, report=events.append, should_stop=lambda: len(events) > 4)
    assert "out_of_memory" in {event["event"] for event in events}
    events.clear()
    train(method := Linear(room=8), tmp_path, report=events.append)
    assert {event["event"] for event in events} == {"resumed", "step"}
    assert method.largest <= 8


def test_memory_that_is_too_small_ends_the_training_and_says_so(tmp_path: Path) -> None:
    method = Linear(room=0)
    before = method.bytes()
    with pytest.raises(SplitFrozenError, match=r"memory ran out at step 1: .* lower train.micro"):
        train(method, tmp_path)
    assert method.bytes() == before


def test_other_errors_of_a_method_are_not_taken_for_memory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        train(Linear(room=0, error="shapes do not match"), tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    events: list[Event] = []
    order = FixedOrder(table(), 0, 4)
    number, bad = 3, order.batch(0, 3)[1]
    method, clean = Linear(dropout=0.0), Linear(dropout=0.0)
    hooks = Hooks(events.append)
    with pytest.raises(NotFiniteError, match=rf"step 4 on 4 samples .*a/{bad.sample}\b"):
        fit(pooled(method), Data(spoilt=[bad.sample]), order, job(tmp_path / "bad"), hooks)
    assert events[-1]["event"] == "diverged"
    assert f"a/{bad.sample}" in events[-1]["samples"]
    left = iter([False] * number)
    train(clean, tmp_path / "clean", should_stop=lambda: next(left, True))
    assert method.bytes() == clean.bytes()


def scores(*values: float) -> tuple[Callable[[], Evaluation], list[float]]:
    """An evaluation that gives these in turn, and the list of what it still has to give."""
    left = list(values)
    return lambda: Evaluation({"accuracy": left[0]}, left.pop(0)), left


@pytest.mark.parametrize(
    ("values", "best"), [((0.5, 0.9, 0.7), 1), ((0.5, 0.5, 0.5), 0), ((math.nan, 0.1, math.nan), 1)]
)
def test_the_best_adapter_is_kept_beside_the_last(
    tmp_path: Path, values: tuple[float, ...], best: int
) -> None:
    after: list[bytes] = []
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if event["event"] == "evaluation":
            after.append(method.bytes())

    method = Linear()
    evaluate, _ = scores(*values)
    outcome = train(method, tmp_path, report=report, evaluate=evaluate)
    assert outcome.best == values[best]
    assert (tmp_path / "best" / "weights").read_bytes() == after[best]
    assert (tmp_path / "last" / "weights").read_bytes() == after[2]
    assert len(set(after)) == 3
    evaluations = [event for event in events if event["event"] == "evaluation"]
    assert [event["step"] for event in evaluations] == [6, 12, 18]
    assert str([event["accuracy"] for event in evaluations]) == str(list(values))


def test_an_evaluation_that_fails_loses_nothing_and_is_made_up_for(tmp_path: Path) -> None:
    whole, method = Linear(), Linear()
    train(whole, tmp_path / "whole", evaluate=scores(0.5, 0.9, 0.7)[0])

    def fail() -> Evaluation:
        raise KilledError

    with pytest.raises(KilledError):
        train(method, tmp_path / "run", evaluate=fail)
    assert (tmp_path / "run" / "last" / "weights").read_bytes() == method.bytes()
    events: list[Event] = []
    method = Linear()
    evaluate, left = scores(0.5, 0.9, 0.7)
    train(method, tmp_path / "run", evaluate=evaluate, report=events.append)
    assert next(event["step"] for event in events if event["event"] == "step") == 7
    assert left == []
    for name in ("checkpoint.safetensors", "last/weights", "best/weights"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_kill_between_best_and_checkpoint_does_not_count_the_evaluation_twice(
    tmp_path: Path,
) -> None:
    def kill(event: Event) -> None:
        if event["event"] == "evaluation" and event["step"] == 12:
            raise KilledError

    train(Linear(), tmp_path / "whole", evaluate=scores(0.5, 0.9, 0.7)[0])
    with pytest.raises(KilledError):
        train(Linear(), tmp_path / "run", evaluate=scores(0.5, 0.9)[0], report=kill)
    outcome = train(Linear(), tmp_path / "run", evaluate=scores(0.9, 0.7)[0])
    assert outcome.best == 0.9
    for name in ("checkpoint.safetensors", "last/weights", "best/weights"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Uploads:
    """Samples that arrive while the loop waits."""

    def __init__(self, here: int, step: int) -> None:
        self.here, self.step, self.waits = here, step, 0

    def wait(self) -> None:
        self.waits += 1
        self.here = min(SAMPLES, self.here + self.step)

    def __call__(self) -> Arrivals:
        return Arrivals(table(self.here), complete=self.here == SAMPLES)


def stream(toy: Linear, folder: Path, uploads: Uploads, **hooks: Any) -> Outcome:
    window = ShuffleWindow(folder / "ledger", 0, 6)
    order = StreamingOrder(window, uploads, 0, SPEC.batch_size)
    return fit(
        pooled(toy),
        Data(),
        order,
        job(folder),
        Hooks(hooks.pop("report", lambda _: None), wait=uploads.wait, **hooks),
    )


def test_streaming_waits_for_samples_and_takes_as_many_steps(tmp_path: Path) -> None:
    uploads = Uploads(0, 3)
    events: list[Event] = []
    outcome = stream(Linear(), tmp_path, uploads, report=events.append)
    assert outcome.steps == STEPS
    assert uploads.waits >= SAMPLES / 3
    steps = [event for event in events if event["event"] == "step"]
    assert [event["samples"] for event in steps] == [4, 4, 4, 4, 4, 2] * 3


def test_reading_ahead_draws_nothing_ahead(tmp_path: Path) -> None:
    drawn: list[int] = []

    def report(event: Event) -> None:
        if event["event"] == "step":
            drawn.append(len((tmp_path / "ledger").read_bytes().splitlines()))

    stream(Linear(), tmp_path, Uploads(SAMPLES, 0), report=report)
    assert drawn == [1, 2, 3, 4, 5, *[6] * 13]


@pytest.mark.parametrize("step", [1, 3, 5, 9])
def test_a_killed_streaming_run_replays_its_ledger_to_the_same_bytes(
    tmp_path: Path, step: int
) -> None:
    def kill(event: Event) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise KilledError

    with pytest.raises(KilledError):
        stream(Linear(), tmp_path / "run", Uploads(0, 3), report=kill)
    # What was drawn stays in the store; what else is there by now changes nothing drawn already.
    stream(method := Linear(), tmp_path / "run", Uploads(SAMPLES if step > 6 else 4 * step + 3, 5))
    # The same order from its ledger alone, in a run that nothing interrupted.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "ledger").write_bytes((tmp_path / "run" / "ledger").read_bytes())
    stream(again := Linear(), tmp_path / "again", Uploads(SAMPLES, 0))
    assert method.bytes() == again.bytes()


def test_a_stop_is_heard_while_waiting(tmp_path: Path) -> None:
    uploads = Uploads(0, 0)
    outcome = stream(Linear(), tmp_path, uploads, should_stop=lambda: uploads.waits > 2)
    assert outcome == Outcome(stopped=True, steps=0, best=None)


def stopped(folder: Path) -> Path:
    """A run that was stopped after 9 steps, in the middle of its second epoch."""
    left = iter([False] * 10)
    assert train(Linear(), folder, should_stop=lambda: next(left, True)).steps == 9
    return folder / "checkpoint.safetensors"


@pytest.mark.parametrize("change", [{"lr": 0.1}, {"epochs": 4}, {"batch_size": 5}])
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, change: Any) -> None:
    stopped(tmp_path)
    spec = TrainSpec(**{name: getattr(SPEC, name) for name in SPEC.__struct_fields__} | change)
    with pytest.raises(StoreError, match="belongs to another training"):
        train(Linear(), tmp_path, spec=spec)


def test_settings_that_change_no_result_may_change_between_calls(tmp_path: Path) -> None:
    stopped(tmp_path)
    fields = {name: getattr(SPEC, name) for name in SPEC.__struct_fields__}
    spec = TrainSpec(**fields | {"micro_tokens": 7, "checkpoint_steps": 2})
    train(method := Linear(), tmp_path, spec=spec)
    assert method.largest <= 7


def test_samples_that_changed_within_an_epoch_are_refused(tmp_path: Path) -> None:
    stopped(tmp_path)
    order = FixedOrder(table(SAMPLES - 1), 0, 4)
    with pytest.raises(StoreError, match="samples are not those"):
        fit(pooled(Linear()), Data(), order, job(tmp_path), Hooks(lambda _: None))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_damaged_checkpoint_is_refused_with_its_name(tmp_path: Path, keep: int) -> None:
    path = stopped(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"cannot read the checkpoint .*safetensors"):
        train(Linear(), tmp_path)


def test_a_checkpoint_in_which_bits_are_flipped_is_refused(tmp_path: Path) -> None:
    path = stopped(tmp_path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(StoreError, match="not those that were written"):
        train(Linear(), tmp_path)


class Renamed(Linear):
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"other": self.weight, "unused": self.unused}


def test_a_checkpoint_of_other_adapters_is_refused_by_name(tmp_path: Path) -> None:
    stopped(tmp_path)
    names = r"exp_avg.weight, exp_avg_sq.weight, parameter.other, parameter.weight, step.weight"
    with pytest.raises(StoreError, match=names):
        train(Renamed(), tmp_path)


def test_the_moments_are_those_of_adamw_after_loading() -> None:
    first, second = Linear(), Linear()
    keys = [SampleKey("a", i) for i in range(4)]
    items = Data().read(keys)
    one = pooled(first, steps=9)
    one.step(keys, items, 3)
    state = {name: tensor.detach().clone() for name, tensor in one.state().items()}
    assert sorted(state) == [
        "exp_avg.weight", "exp_avg_sq.weight", "parameter.unused", "parameter.weight", "step.weight"
    ]  # fmt: skip
    two = pooled(second, steps=9)
    two.load_state(state)
    one.step(keys, items, 4)
    two.step(keys, items, 4)
    assert first.bytes() == second.bytes()
    state.pop("exp_avg.weight")
    with pytest.raises(StoreError, match=r"got exp_avg\.weight;"):
        two.load_state(state)


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    order = FixedOrder(table(0), 0, 4)
    with pytest.raises(StoreError, match="nothing to train on"):
        fit(pooled(Linear()), Data(), order, job(tmp_path), Hooks(lambda _: None))


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"checkpoint\.safetensors cannot be used"):
        train(Linear(), tmp_path / "file" / "run", should_stop=lambda: True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last").touch()
    with pytest.raises(StoreError, match="last cannot be used"):
        train(Linear(), tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({}, False),
    ],
)
def test_native_bfloat16_is_read_from_the_cpus_flags(flags: dict[str, Any], native: bool) -> None:
    assert precision.has_native_bfloat16(flags) is native


def test_precision_is_as_asked_and_auto_follows_the_hardware() -> None:
    cpu = torch.device("cpu")
    assert precision.resolve("float32", cpu) is torch.float32
    assert precision.resolve("bfloat16", cpu) is torch.bfloat16
    native = precision.native_bfloat16(cpu)
    assert precision.resolve("auto", cpu) is (torch.bfloat16 if native else torch.float32)
    with precision.autocast(cpu, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    with precision.autocast(cpu, torch.float32):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
