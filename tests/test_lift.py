"""Lifting: what it computes, that it can be interrupted anywhere, and in what groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from splitfrozen import rng
from splitfrozen.device.plan import plan_chunks
from splitfrozen.errors import StoreError
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import Activation, Sample, SampleKey, SampleTable
from splitfrozen.training.lift import GROUP, Lifter

CUT = 3
CPU = torch.device("cpu")


def length(device: str, id_: int) -> int:
    return int(rng.stream(0, device, id_, "length").integers(1, 12))


class MemoryStore:
    """An ActivationStore in a dict."""

    def __init__(self) -> None:
        self.stored: dict[SampleKey, Activation] = {}
        self.chunks: dict[SampleKey, int] = {}
        self.replaced: list[list[int]] = []

    def add(self, device: str, ids: Iterable[int], depth: int, chunk: int = 0) -> None:
        """The first stored wins."""
        for id_ in ids:
            hidden = rng.stream(0, device, id_).standard_normal((length(device, id_), 32), "f4")
            key = SampleKey(device, id_)
            if key not in self.stored:
                self.stored[key] = Activation(id_, depth, hidden, np.array([id_], np.int32))
                self.chunks[key] = chunk

    def samples(self) -> SampleTable:
        keys = sorted(self.stored)
        devices = tuple(sorted({key.device for key in keys}))
        columns = [
            np.array(values, np.int32)
            for values in (
                [devices.index(key.device) for key in keys],
                [key.sample for key in keys],
                [len(self.stored[key].hidden) for key in keys],
                [self.stored[key].depth for key in keys],
                [self.chunks[key] for key in keys],
            )
        ]
        return SampleTable(devices, *columns)

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        return [self.stored[key] for key in keys]

    def replace(self, device: str, activations: Iterable[Activation]) -> None:
        taken = list(activations)
        self.replaced.append([activation.sample for activation in taken])
        for activation in taken:
            self.stored[SampleKey(device, activation.sample)] = activation

    def bytes(self) -> dict[SampleKey, bytes]:
        return {key: value.hidden.tobytes() for key, value in self.stored.items()}


@pytest.fixture
def sliced(tiny: Callable[..., Any]) -> SlicedModel:
    return SlicedModel(tiny("gpt2-causal_lm"))


@pytest.fixture
def lifter(sliced: SlicedModel) -> Lifter:
    return Lifter(sliced, CUT, micro_tokens=40, device=CPU)


def test_every_shallow_sample_comes_to_the_cut(lifter: Lifter, sliced: SlicedModel) -> None:
    store = MemoryStore()
    store.add("a", range(10), 1)
    store.add("b", range(5), 2)
    store.add("c", range(3), CUT)
    before = dict(store.stored)
    seen: list[tuple[int, int]] = []
    assert lifter.advance(store, lambda *at: seen.append(at)) == 15
    assert seen == [(10, 15), (15, 15)]
    assert {value.depth for value in store.stored.values()} == {CUT}
    for key, shallow in before.items():
        after = store.stored[key]
        length = torch.tensor([len(shallow.hidden)])
        with torch.no_grad():
            alone = sliced.lift(torch.from_numpy(shallow.hidden)[None], length, shallow.depth, CUT)
        np.testing.assert_allclose(after.hidden, alone[0].numpy(), rtol=1e-5, atol=1e-5)
        assert after.targets.tolist() == shallow.targets.tolist()
        assert after.sample == shallow.sample
    assert lifter.advance(store) == 0


class KilledError(Exception):
    """Stands for a kill between groups."""


@pytest.mark.parametrize("groups", [1, 2])
def test_an_interrupted_lift_ends_with_the_same_bytes(lifter: Lifter, groups: int) -> None:
    whole, cut_short = MemoryStore(), MemoryStore()
    for store in (whole, cut_short):
        store.add("a", range(2 * GROUP + 9), 1)
        store.add("b", range(7), 2)
    lifter.advance(whole)
    left = groups

    def kill(*_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError

    with pytest.raises(KilledError):
        lifter.advance(cut_short, kill)
    assert cut_short.bytes() != whole.bytes()
    lifter.advance(cut_short)
    assert cut_short.bytes() == whole.bytes()


def plan() -> list[tuple[int, ...]]:
    """Samples of each chunk as a device plans them: its batches, of like length, are shuffled."""
    samples = [
        Sample(i, np.zeros(0, np.int32), None, None, np.zeros(1, np.int32), length("a", i))
        for i in range(1200)
    ]
    chunks = plan_chunks(samples, lambda tokens: tokens * 32 * 4, 1 << 16, 0, "a")
    return [chunk.samples for chunk in chunks]


def test_what_is_lifted_keeps_up_with_what_is_stored(lifter: Lifter) -> None:
    chunks, store = plan(), MemoryStore()
    assert len(chunks) > 8
    for number, ids in enumerate(chunks):
        store.add("a", ids, 1, number)
        assert lifter.advance(store) == len(ids)
    assert max(map(len, store.replaced)) == GROUP


@pytest.mark.parametrize("seed", range(3))
def test_arrival_and_interruptions_change_no_byte(lifter: Lifter, seed: int) -> None:
    chunks, whole, torn = plan(), MemoryStore(), MemoryStore()
    for number, ids in enumerate(chunks):
        whole.add("a", ids, 1, number)
    lifter.advance(whole)
    draw = rng.stream(seed, "arrival")

    def kill(*_: int) -> None:
        if draw.random() < 0.3:
            raise KilledError

    for number in draw.permutation(len(chunks)):
        torn.add("a", draw.permutation(chunks[number]).tolist(), 1, int(number))
        with suppress(KilledError):
            lifter.advance(torn, kill)
    lifter.advance(torn)
    assert torn.bytes() == whole.bytes()
    assert sorted(torn.replaced) == sorted(whole.replaced)


def test_groups_are_of_one_chunk_and_of_like_lengths(lifter: Lifter) -> None:
    chunks, store = plan(), MemoryStore()
    for number, ids in enumerate(chunks):
        store.add("a", ids, 1, number)
    lifter.advance(store)
    padded = real = 0
    for ids in store.replaced:
        assert len({store.chunks[SampleKey("a", i)] for i in ids}) == 1
        lengths = [length("a", i) for i in ids]
        padded, real = padded + len(ids) * max(lengths), real + sum(lengths)
    assert len(store.replaced) == sum(-(-len(ids) // GROUP) for ids in chunks)
    assert padded < 1.3 * real


def test_samples_that_came_in_another_chunk_before_are_lifted_once(lifter: Lifter) -> None:
    store = MemoryStore()
    store.add("a", range(100), 1, chunk=0)
    assert lifter.advance(store) == 100
    store.add("a", range(90, 200), 1, chunk=1)
    store.add("a", range(200, 210), 2, chunk=1)
    assert lifter.advance(store) == 110
    assert lifter.advance(store) == 0
    assert sorted(i for ids in store.replaced for i in ids) == list(range(210))
    assert {value.depth for value in store.stored.values()} == {CUT}


def test_an_activation_above_the_cut_is_refused(lifter: Lifter) -> None:
    store = MemoryStore()
    store.add("a", [0], CUT + 1)
    with pytest.raises(StoreError, match=r"a/0 is too deep: got depth 4; allowed: 1\.\.3"):
        lifter.advance(store)


def test_lifting_an_empty_store_does_nothing(lifter: Lifter) -> None:
    assert lifter.advance(MemoryStore()) == 0


def test_lifted_activations_are_float32_in_bfloat16_too(sliced: SlicedModel) -> None:
    store, exact = MemoryStore(), MemoryStore()
    for filled in (store, exact):
        filled.add("a", range(4), 1)
    Lifter(sliced, CUT, micro_tokens=40, device=CPU, dtype=torch.bfloat16).advance(store)
    Lifter(sliced, CUT, micro_tokens=40, device=CPU).advance(exact)
    key = SampleKey("a", 0)
    assert store.stored[key].hidden.dtype == np.float32
    assert store.bytes() != exact.bytes()
    np.testing.assert_allclose(store.stored[key].hidden, exact.stored[key].hidden, atol=0.2)
