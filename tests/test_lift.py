"""Lifting: what it computes, that it can be interrupted anywhere, and when a block is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from splitfrozen import rng
from splitfrozen.errors import StoreError
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import Activation, SampleKey, SampleTable
from splitfrozen.training.lift import BLOCK, Lifter

CUT = 3
CPU = torch.device("cpu")


class MemoryStore:
    """An ActivationStore in a dict."""

    def __init__(self) -> None:
        self.stored: dict[SampleKey, Activation] = {}
        self.replaced: list[list[int]] = []

    def add(self, device: str, ids: Iterable[int], depth: int) -> None:
        for id_ in ids:
            draw = rng.stream(0, device, id_)
            hidden = draw.standard_normal((int(draw.integers(1, 12)), 32), np.float32)
            key = SampleKey(device, id_)
            self.stored[key] = Activation(id_, depth, hidden, np.array([id_], np.int32))

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
    assert lifter.advance(store, None, lambda *at: seen.append(at)) == 15
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
    assert lifter.advance(store, None) == 0


class KilledError(Exception):
    """Stands for a kill between blocks."""


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_interrupted_lift_ends_with_the_same_bytes(lifter: Lifter, blocks: int) -> None:
    whole, cut_short = MemoryStore(), MemoryStore()
    for store in (whole, cut_short):
        store.add("a", range(2 * BLOCK + 9), 1)
        store.add("b", range(7), 2)
    lifter.advance(whole, None)
    left = blocks

    def kill(*_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError

    with pytest.raises(KilledError):
        lifter.advance(cut_short, None, kill)
    assert cut_short.bytes() != whole.bytes()
    lifter.advance(cut_short, None)
    assert cut_short.bytes() == whole.bytes()


def test_while_devices_upload_only_whole_blocks_are_lifted(lifter: Lifter) -> None:
    announced = {"a": 2 * BLOCK + 9, "b": 7}
    together, piecewise = MemoryStore(), MemoryStore()
    together.add("a", range(announced["a"]), 1)
    together.add("b", range(announced["b"]), 1)
    lifter.advance(together, announced)

    piecewise.add("a", range(1, BLOCK + 20), 1)
    piecewise.add("b", range(6), 1)
    piecewise.add("unannounced", range(3), 1)
    assert lifter.advance(piecewise, announced) == 0
    piecewise.add("a", [0], 1)
    assert lifter.advance(piecewise, announced) == BLOCK
    piecewise.add("b", [6], 1)
    piecewise.add("a", range(BLOCK + 20, announced["a"]), 1)
    assert lifter.advance(piecewise, announced) == BLOCK + 9 + 7
    assert piecewise.replaced == [
        list(range(BLOCK)),
        list(range(BLOCK, 2 * BLOCK)),
        list(range(2 * BLOCK, 2 * BLOCK + 9)),
        list(range(7)),
    ]
    lifted = piecewise.bytes()
    assert {key: lifted[key] for key in together.stored} == together.bytes()
    assert lifter.advance(piecewise, None) == 3


def test_an_activation_above_the_cut_is_refused(lifter: Lifter) -> None:
    store = MemoryStore()
    store.add("a", [0], CUT + 1)
    with pytest.raises(StoreError, match=r"a/0 is too deep: got depth 4; allowed: 1\.\.3"):
        lifter.advance(store, None)


def test_lifting_an_empty_store_does_nothing(lifter: Lifter) -> None:
    assert lifter.advance(MemoryStore(), {}) == 0


def test_lifted_activations_are_float32_in_bfloat16_too(sliced: SlicedModel) -> None:
    store, exact = MemoryStore(), MemoryStore()
    for filled in (store, exact):
        filled.add("a", range(4), 1)
    Lifter(sliced, CUT, micro_tokens=40, device=CPU, dtype=torch.bfloat16).advance(store, None)
    Lifter(sliced, CUT, micro_tokens=40, device=CPU).advance(exact, None)
    key = SampleKey("a", 0)
    assert store.stored[key].hidden.dtype == np.float32
    assert store.bytes() != exact.bytes()
    np.testing.assert_allclose(store.stored[key].hidden, exact.stored[key].hidden, atol=0.2)
