"""What every method must do, whichever side trains: one suite over the table of methods."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import PeftModel

from splitfrozen import rng
from splitfrozen.config import (
    Config,
    DevicesSpec,
    LoraSpec,
    MethodName,
    MethodSpec,
    ModelSpec,
    RunSpec,
    TaskConfig,
    TrainSpec,
    WireSpec,
)
from splitfrozen.data.inputs import model_inputs
from splitfrozen.data.samples import SampleSource
from splitfrozen.errors import SplitFrozenError, StoreError, WireError
from splitfrozen.methods.bench import Bench, Built, Rounds
from splitfrozen.methods.parts import Lower, Whole
from splitfrozen.methods.table import METHODS, build
from splitfrozen.methods.two_way import Coding, TwoWayDevice
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.model.costs import Tokens, gpt2_small
from splitfrozen.records import Activation, Chunk, Compute, Receipt, Sample, SampleKey
from splitfrozen.simulation.schedules import events
from splitfrozen.simulation.setting import Setting, Share, Step
from splitfrozen.training.batching import pad
from splitfrozen.training.loop import Hooks, Job, Outcome, fit
from splitfrozen.training.optimise import NotFiniteError, Optimiser
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, pack, unpack

CUT, CLASSES = 1, 3
SIZES = {"device-00": 9, "device-01": 2, "device-02": 6}
WIDTH, FLOAT = 32, 4

CASES: dict[str, MethodSpec] = {
    "centralized": MethodSpec("centralized"),
    "fedlora": MethodSpec("fedlora"),
    "fedlora, rounds of 2 steps": MethodSpec("fedlora", local_steps=2),
    "splitlora, shared": MethodSpec("splitlora"),
    "splitlora, per device": MethodSpec("splitlora", server="per_device"),
    "sft": MethodSpec("sft", gradients="int8"),
    "sft, the paper's codec": MethodSpec("sft", gradients="topk:0.2:8"),
    "fedsllm": MethodSpec("fedsllm", local_steps=2),
    "splitfrozen": MethodSpec("splitfrozen"),
    "splitfrozen, not shuffled": MethodSpec("splitfrozen", shuffle="none"),
    "splitfrozen, window": MethodSpec("splitfrozen", shuffle="window"),
}
TWO_WAY = [name for name, method in CASES.items() if method.two_way]
NARROW = MethodSpec("fedlora", local_steps=1)
AVERAGED = [*(name for name in CASES if name.startswith("fedlora")), *TWO_WAY]
FAMILIES = ["bert-classification", "llama-causal_lm", "vit-image"]
EACH = [case for case in CASES if "," not in case or case == "splitlora, shared"]
ROWS = [
    *((case, FAMILIES[0]) for case in CASES),
    *((case, family) for case in EACH for family in FAMILIES[1:]),
]
"""Variants of a method on one family, each method on all."""


@dataclass
class World:
    """A model, its devices' samples, and what happened."""

    built: Built
    source: SampleSource | _AtCut
    config: Config
    sliced: SlicedModel
    events: list[dict[str, Any]] = field(default_factory=list)
    sent: list[tuple[str, str, str, int]] = field(default_factory=list)

    def fit(self, **hooks: Any) -> Outcome:
        train, run = self.config.train, self.config.run
        job = Job(train, run.seed, sum(SIZES.values()), torch.float32, self.config.folder)
        return fit(
            self.built.method,
            self.source,
            self.built.order,
            job,
            Hooks(self.events.append, **hooks),
        )

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.events if event["event"] == "step"]

    def state(self) -> dict[str, bytes]:
        """What is trained, as it is in the model."""
        return {
            name: value.detach().numpy().tobytes()
            for name, value in self.built.adapted.parameters().items()
        }

    def logits(self) -> torch.Tensor:
        samples = self.all_samples()
        with torch.no_grad():
            return Whole(self.built.adapted).logits(samples)[0]

    def all_samples(self) -> list[Sample]:
        source = self.source if isinstance(self.source, SampleSource) else self.source.below
        table = source.samples()
        return source.read([table.key(row) for row in range(len(table))])


class _AtCut:
    """Activations of samples at the cut, computed when they are read."""

    def __init__(self, below: SampleSource, built: Built) -> None:
        self.below = below
        self._sliced = built.adapted.sliced
        self._front = self._sliced.front(CUT)

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        found = []
        for sample in self.below.read(keys):
            arrays = model_inputs([sample], self._sliced.inputs)
            with torch.no_grad():
                hidden = self._front(*map(torch.from_numpy, arrays))[0].numpy()
            found.append(Activation(sample.id, CUT, hidden, sample.targets))
        return found


def make_samples(sliced: SlicedModel, device: str, count: int) -> Iterator[Sample]:
    """Random inputs; targets that can be learned by heart."""
    for number in range(count):
        draw = rng.stream(0, "sample", device, number)
        inputs = sliced.example([int(draw.integers(3, 12))], seed=rng.derive(0, device, number))
        label = np.array([int(draw.integers(CLASSES))], np.int32)
        if sliced.kind == "image":
            tokens = sliced.front(1)(*inputs).shape[1]
            none = np.zeros(0, np.int32)
            yield Sample(number, none, None, inputs[0][0].numpy(), label, tokens)
            continue
        ids = inputs[0][0].numpy().astype(np.int32)
        types = inputs[2][0].numpy().astype(np.int32) if sliced.takes_token_types else None
        targets = np.append(ids[1:], -100).astype(np.int32)
        targets = targets if sliced.kind == "causal_lm" else label
        yield Sample(number, ids, types, None, targets, len(ids))


@pytest.fixture
def world(tiny: Callable[..., Any], tmp_path: Path) -> Callable[..., World]:
    """`world("fedlora")` builds a method on a tiny model; the same call builds the same again."""

    def make(
        case: str | MethodSpec,
        family: str = FAMILIES[0],
        folder: str = "run",
        spoilt: bool = False,
        dropout: float = 0.0,
        **train: Any,
    ) -> World:
        method = CASES[case] if isinstance(case, str) else case
        options = {"epochs": 3, "batch_size": 4, "lr": 5e-3, "checkpoint_steps": 2, **train}
        config = Config(
            ModelSpec("tiny", CUT, precision="float32"),
            TaskConfig(labels=tuple("abc")),
            DevicesSpec(len(SIZES)),
            RunSpec(str(tmp_path / folder), window=5),
            LoraSpec(rank=4, dropout=dropout),
            TrainSpec(**options),
            WireSpec("float32", "none"),
            method=method,
        )
        (tmp_path / folder).mkdir(exist_ok=True)
        sliced = SlicedModel(tiny(family))
        held = {
            device: list(make_samples(sliced, device, count)) for device, count in SIZES.items()
        }
        if spoilt:
            pixels = held["device-02"][3].pixels
            assert pixels is not None
            pixels[:] = np.inf
        below, sent = SampleSource(held), list[tuple[str, str, str, int]]()
        built = build(
            Bench(
                sliced,
                config,
                below.samples(),
                torch.float32,
                lambda: codec(config.wire.name),
                sent=lambda *it: sent.append(it),
            )
        )
        on_samples = built.trains_on == "samples"
        return World(
            built, below if on_samples else _AtCut(below, built), config, sliced, sent=sent
        )

    return make


def test_the_table_has_every_method() -> None:
    assert set(METHODS) == set(get_args(MethodName))
    assert {case.name for case in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_schedule(name: MethodName) -> None:
    step = Step(0, tuple(Share(device, Tokens.uniform(2, 8)) for device in SIZES), ends_round=True)
    found = list(events(name, Setting(gpt2_small(), 4, CUT), [step]))
    assert {event.who for event in found if isinstance(event, Compute)} >= (
        {"server"} if name == "centralized" else set(SIZES)
    )


@pytest.mark.parametrize(("case", "family"), ROWS)
def test_it_learns_and_the_frozen_weights_stay(
    case: str, family: str, world: Callable[..., World]
) -> None:
    here = world(case, family, epochs=8, lr=2e-2)
    frozen, before, first = here.sliced.weights_hash(), here.state(), here.logits()
    here.fit()
    per_epoch = here.built.steps_per_epoch
    assert np.mean(here.losses[-per_epoch:]) < 0.8 * np.mean(here.losses[:per_epoch])
    assert here.sliced.weights_hash() == frozen
    trained = {name for name, value in here.state().items() if value != before[name]}
    below = {name for name in before if f".{here.sliced.blocks_path}.0." in name}
    assert trained - below
    # Of all methods SplitFrozen alone leaves the blocks below the cut as they are.
    assert bool(trained & below) == (CASES[case].name != "splitfrozen")
    assert not torch.equal(here.logits(), first)


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_has_every_sample_once_in_as_many_steps_as_told(
    case: str, world: Callable[..., World]
) -> None:
    order, steps = (built := world(case).built).order, built.steps_per_epoch
    for epoch in range(2):
        batches = [order.batch(epoch, index) for index in range(steps + 1)]
        assert all(batches[:-1])
        assert batches[-1] == []
        keys = [key for batch in batches if batch for key in batch]
        assert Counter(key.device for key in keys) == SIZES
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_bytes_though_it_was_stopped(
    case: str, world: Callable[..., World]
) -> None:
    # With dropout, as what it draws must be found again.
    whole, parts = world(case, dropout=0.2), world(case, folder="stopped", dropout=0.2)
    whole.fit()
    for asked in (3, 4):
        stopping = iter([False] * asked)
        outcome = parts.fit(should_stop=lambda it=stopping: next(it, True))
        assert outcome.stopped
        parts = world(case, folder="stopped", dropout=0.2)
    parts.fit()
    assert parts.state() == whole.state()
    saved = "last/adapter_model.safetensors"
    assert (parts.config.folder / saved).read_bytes() == (whole.config.folder / saved).read_bytes()
    assert parts.losses == whole.losses[-len(parts.losses) :]
    assert 0 < len(parts.losses) < len(whole.losses)


# peft asks transformers by a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize(("case", "family"), ROWS)
def test_the_adapter_opens_with_peft_and_answers_the_same(
    case: str, family: str, world: Callable[..., World], tiny: Callable[..., Any]
) -> None:
    here = world(case, family, epochs=1)
    here.fit()
    ours = here.logits()
    model = PeftModel.from_pretrained(tiny(family), str(here.config.folder / "last")).eval()
    sample = here.all_samples()[0]
    names = here.sliced.inputs
    arrays = model_inputs([sample], names)
    inputs = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
    with torch.no_grad():
        theirs = model(**inputs).logits[0]
    theirs = theirs[: sample.length - 1] if here.sliced.kind == "causal_lm" else theirs[None]
    torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_loss_that_is_not_finite_ends_it_with_names(
    case: str, world: Callable[..., World]
) -> None:
    here = world(case, "vit-image", spoilt=True)
    error = WireError if CASES[case].two_way else NotFiniteError
    with pytest.raises(error, match=r"not finite|diverged"):
        here.fit()


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_other_devices_is_refused(case: str, world: Callable[..., World]) -> None:
    here = world(case)
    here.fit()
    tensors = here.built.method.state()
    other = {
        name.replace("device-01", "device-77").replace("exp_avg.", "exp_avg_other."): value
        for name, value in tensors.items()
    }
    with pytest.raises(StoreError, match="does not fit"):
        world(case, folder="other").built.method.load_state(other)


# --- what crosses the network ------------------------------------------------------------------


@pytest.mark.parametrize("case", ["centralized", "splitfrozen"])
def test_training_in_one_place_sends_nothing_of_its_own(
    case: str, world: Callable[..., World]
) -> None:
    here = world(case)
    here.fit()
    assert here.sent == []


@pytest.mark.parametrize("case", AVERAGED)
def test_adapters_travel_at_the_end_of_a_round_to_who_averages(
    case: str, world: Callable[..., World]
) -> None:
    here = world(case, epochs=2)
    here.fit()
    method, steps = CASES[case], here.built.steps_per_epoch
    assert steps == 3
    server = "federated" if method.name == "fedsllm" else "server"
    up = [it for it in here.sent if it[2] == "adapter" and it[1] == server]
    down = [it for it in here.sent if it[2] == "adapter" and it[0] == server]
    # Who trained gets the average at once, who did not gets it when it trains again.
    late = Counter(b for _, b, _, _ in down) - Counter(a for a, _, _, _ in up)
    assert Counter(a for a, _, _, _ in up) + late == Counter(b for _, b, _, _ in down)
    assert bool(late) == (method.local_steps is not None)
    assert "device-00" not in late
    # The largest device trains in every round; with rounds of two steps there are two an epoch.
    rounds = {None: 1, 2: (steps + 1) // 2}[method.local_steps]
    assert Counter(it[0] for it in up)["device-00"] == 2 * rounds
    sizes = {
        name: len(value)
        for name, value in here.state().items()
        if not method.two_way or f".{here.sliced.blocks_path}.0." in name
    }
    assert {it[3] for it in up} == {sum(sizes.values())}


@pytest.mark.parametrize("case", TWO_WAY)
def test_a_chunk_and_its_reply_hold_the_batch(case: str, world: Callable[..., World]) -> None:
    here = world(case, epochs=1)
    here.fit()
    tokens = Counter[str]()
    for row, device in enumerate((table := here.source.samples()).device):  # type: ignore[union-attr]
        tokens[table.devices[device]] += int(table.tokens[row])
    for device, count in tokens.items():
        up = sum(n for a, _, phase, n in here.sent if a == device and phase == "activations")
        down = sum(n for _, b, phase, n in here.sent if b == device and phase == "gradients")
        values = count * WIDTH * FLOAT
        assert values < up < 1.6 * values
        small = CASES[case].gradients != "float32"
        assert (down < values / 2) if small else (values < down < 1.6 * values)


class _Misled:
    """A line on which the reply is that to another chunk."""

    def __init__(self, origin: Origin, off: int = 0) -> None:
        self.origin = origin
        self.off = off

    def stored(self) -> set[int]:
        return set()

    def put(self, chunk: Chunk) -> Receipt:
        self.chunk = chunk
        return Receipt(index=chunk.index, stored=1)

    def reply(self, index: int) -> bytes:
        _, samples = unpack(self.chunk.frame)
        return pack(self.origin, index + self.off, samples).frame


@pytest.mark.parametrize(("device", "off"), [("device-01", 0), ("device-00", 1)])
def test_a_reply_to_another_chunk_is_refused(
    device: str, off: int, world: Callable[..., World]
) -> None:
    here = world(MethodSpec("splitlora"))
    origin = Origin("run", "device-00", "0" * 64, CUT, WIDTH, "float32")
    line = _Misled(dataclasses.replace(origin, device=device), off)
    gradients = here.built.method.gradients
    part = Lower(here.built.adapted, CUT)
    coding = Coding(codec("float32"), codec("float32"))
    one = TwoWayDevice(part, gradients, coding, origin, line)
    one.forward(here.all_samples()[:2], 0)
    parameters = here.built.adapted.parameters()
    optimiser = Optimiser(parameters, here.config.train, 10)
    with pytest.raises(WireError, match="the reply is to another chunk"):
        one.backward(optimiser, 0)
    right = TwoWayDevice(part, gradients, coding, origin, _Misled(origin))
    right.forward(here.all_samples()[:2], 0)
    assert right.backward(optimiser, 0) > 0


@pytest.mark.parametrize("gradients", ["int8", "int4:16", "topk:0.2:8", "topk:0.2:8:token"])
def test_a_coarse_codec_changes_what_is_learned_a_little(
    gradients: str, world: Callable[..., World]
) -> None:
    exact = world(MethodSpec("sft"))
    coarse = world(MethodSpec("sft", gradients=gradients), folder="coarse")
    exact.fit()
    coarse.fit()
    assert exact.losses != coarse.losses
    np.testing.assert_allclose(exact.losses, coarse.losses, rtol=0.05)


# --- rounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "local_epochs", "local_steps", "ends"),
    [
        (3, 1, None, [3, 7, 11]),
        (3, 2, None, [7, 11]),
        (2, 1, 3, [2, 3, 6, 7]),
        (1, 1, 1, [0, 1, 2, 3]),
    ],
)
def test_rounds_end_where_they_should(
    epochs: int, local_epochs: int, local_steps: int | None, ends: list[int]
) -> None:
    rounds = Rounds(4, epochs, local_epochs, local_steps)
    assert [step for step in range(4 * epochs) if rounds.ends(step)] == ends


def test_between_averages_the_model_has_the_last_average(world: Callable[..., World]) -> None:
    here = world(MethodSpec("fedlora", local_steps=2), epochs=1)
    keys = [here.built.order.batch(0, index) for index in range(3)]
    states = []
    for step, batch in enumerate(keys):
        assert batch is not None
        here.built.method.step(batch, here.source.read(batch), step)
        states.append(here.state())
    start = world(MethodSpec("fedlora", local_steps=2), folder="start").state()
    assert states[0] == start
    assert states[1] != start
    assert states[2] != states[1]


def test_the_average_is_weighted_by_the_samples_trained_on(world: Callable[..., World]) -> None:
    here = world(MethodSpec("fedlora", local_steps=1), epochs=1)
    alone = {}
    for device in ("device-00", "device-01"):
        other = world(MethodSpec("fedlora", local_steps=1), epochs=1, folder=device)
        batch = [key for key in other.built.order.batch(0, 1) or [] if key.device == device]
        other.built.method.step(batch, other.source.read(batch), 0)
        alone[device] = (len(batch), other.built.adapted.parameters())
    batch = here.built.order.batch(0, 1) or []
    here.built.method.step(batch, here.source.read(batch), 0)
    assert {device: count for device, (count, _) in alone.items()} == {
        "device-00": 4,
        "device-01": 2,
    }
    for name, value in here.built.adapted.parameters().items():
        mean = sum(count * own[name].double() for count, own in alone.values()) / 6
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-8)


def test_a_device_that_missed_a_round_starts_from_its_average(world: Callable[..., World]) -> None:
    here = world(NARROW, epochs=1)
    batches = [here.built.order.batch(0, index) or [] for index in range(2)]
    absent = {"device-01"}
    assert not absent & {key.device for key in batches[0]}
    assert absent & {key.device for key in batches[1]}
    here.built.method.step(batches[0], here.source.read(batches[0]), 0)
    average = here.state()
    here.sent.clear()
    alone = [key for key in batches[1] if key.device in absent]
    before = [it for it in here.sent if it[1] in absent]
    here.built.method.step(alone, here.source.read(alone), 1)
    assert before == []
    fetched = [it[:3] for it in here.sent if it[1] in absent]
    assert fetched == [("server", "device-01", "adapter")] * 2
    # Of one device, the average is what that device made of the average before.
    other = world(NARROW, epochs=1, folder="other")
    for name, value in other.built.adapted.parameters().items():
        value.data = torch.frombuffer(bytearray(average[name]), dtype=torch.float32).view_as(value)
    again = world(NARROW, epochs=1, folder="again")
    again.built.method.load_state(
        {
            name: other.built.adapted.parameters()[name.partition(".")[2]]
            if name.startswith("global.")
            else value
            for name, value in again.built.method.state().items()
        }
    )
    assert again.state() == average


@pytest.mark.parametrize("case", TWO_WAY)
def test_a_device_whose_memory_runs_out_says_so(case: str, world: Callable[..., World]) -> None:
    here = world(case)

    def refuse(_module: object, _inputs: object) -> None:
        raise torch.OutOfMemoryError("no room")

    block = here.sliced.model.get_submodule(f"{here.sliced.blocks_path}.0.attention")
    handle = block.register_forward_pre_hook(refuse)
    with pytest.raises(SplitFrozenError, match=r"memory ran out at step 1: .*batch_size"):
        here.fit()
    handle.remove()
    assert here.fit().steps > 0


def test_padding_rows_of_different_lengths() -> None:
    rows = [np.ones((length, 2), np.float32) for length in (1, 3)]
    padded = pad(rows)
    assert padded.shape == (2, 3, 2)
    assert list(islice(padded[0, :, 0], 3)) == [1, 0, 0]
