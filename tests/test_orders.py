"""Orders that keep devices apart: whose samples a batch holds, each once an epoch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, takewhile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfrozen.records import SampleKey, SampleTable
from splitfrozen.training.batching import FixedOrder, Order
from splitfrozen.training.orders import DeviceOrder, TurnOrder, WindowOrder

Batches = list[list[SampleKey]]
Make = Callable[[SampleTable, int, int], Any]


def window(size: int) -> Make:
    return lambda table, seed, batch_size: WindowOrder(table, seed, batch_size, size)


ORDERS: dict[str, Make] = {
    "devices": DeviceOrder,
    "turns": TurnOrder,
    "window of 1": window(1),
    "window of 7": window(7),
    "window of all": window(10**6),
}
every_order = pytest.mark.parametrize("make", ORDERS.values(), ids=ORDERS)
SIZES = {"a": 13, "b": 4, "c": 9, "none": 0, "z": 1}


def table(sizes: dict[str, int]) -> SampleTable:
    """Samples 0 .. of each device; ids begin elsewhere than rows do."""
    devices = tuple(sorted(sizes))
    column = np.repeat(np.arange(len(devices)), [sizes[name] for name in devices])
    ids = [id_ for name in devices for id_ in range(sizes[name])]
    device, sample = column.astype(np.int32), np.array(ids, np.int32)
    return SampleTable(devices, device, sample, device + 5, device + 2, device)


def epoch(order: Order, number: int) -> Batches:
    return list(takewhile(bool, (order.batch(number, index) or [] for index in count())))


def flat(batches: Batches) -> list[SampleKey]:
    return [key for batch in batches for key in batch]


def devices(batch: list[SampleKey]) -> list[str]:
    return sorted({key.device for key in batch})


def all_of(samples: SampleTable) -> list[SampleKey]:
    return [samples.key(row) for row in range(len(samples))]


@every_order
@given(
    sizes=st.dictionaries(st.sampled_from("abcde"), st.integers(0, 12), min_size=1),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_an_epoch_holds_every_sample_once(
    make: Make, sizes: dict[str, int], batch_size: int, seed: int
) -> None:
    samples = table(sizes)
    order = make(samples, seed, batch_size)
    for number in (0, 1):
        batches = epoch(order, number)
        assert sorted(flat(batches)) == all_of(samples)
        assert order.steps_per_epoch == len(batches)
        assert order.batch(number, len(batches)) == order.batch(number, len(batches) + 5) == []


@every_order
def test_an_order_follows_from_seed_and_epoch(make: Make) -> None:
    samples = table(SIZES)
    order, again = make(samples, 0, 4), make(samples, 0, 4)
    # Asked for in another sequence, and twice, batches are the same; nothing depends on the past.
    later = epoch(again, 3)
    assert order.steps_per_epoch == again.steps_per_epoch == len(later)
    found = [epoch(order, number) for number in range(4)]
    assert found[3] == later
    assert found[0] == epoch(again, 0) == epoch(order, 0)
    assert [order.known(1, index) for index in range(len(found[1]))] == found[1]
    other = epoch(make(samples, 1, 4), 0)
    sequences = {tuple(flat(batches)) for batches in [*found, other]}
    assert len(sequences) == 5
    assert {tuple(sorted(sequence)) for sequence in sequences} == {tuple(all_of(samples))}
    # What other seeds and epochs change is who comes when, not how many come at once.
    assert len({tuple(map(len, batches)) for batches in [*found, other]}) == 1


@pytest.mark.parametrize("name", ["devices", "turns", "window of 1"])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 30])
def test_with_one_device_it_is_the_order_of_training_in_one_place(
    name: str, batch_size: int
) -> None:
    samples = table({"only": 22})
    order, fixed = ORDERS[name](samples, 5, batch_size), FixedOrder(samples, 5, batch_size)
    for number in range(3):
        assert epoch(order, number) == epoch(fixed, number)


@pytest.mark.parametrize("make", [DeviceOrder, TurnOrder])
def test_a_devices_own_order_is_the_shuffle_of_all_without_the_others(make: Make) -> None:
    samples = table(SIZES)
    shuffled = flat(epoch(FixedOrder(samples, 2, 4), 1))
    own = flat(epoch(make(samples, 2, 4), 1))
    for device in SIZES:
        assert [key for key in own if key.device == device] == [
            key for key in shuffled if key.device == device
        ]


def test_devices_in_parallel_are_spread_evenly_over_the_epoch() -> None:
    batches = epoch(DeviceOrder(table(SIZES), 0, 4), 0)
    held = [{name: sum(key.device == name for key in batch) for name in SIZES} for batch in batches]
    assert held == [
        {"a": 4, "b": 0, "c": 4, "none": 0, "z": 0},
        {"a": 4, "b": 0, "c": 0, "none": 0, "z": 0},
        {"a": 4, "b": 4, "c": 4, "none": 0, "z": 1},
        {"a": 1, "b": 0, "c": 1, "none": 0, "z": 0},
    ]
    for batch in batches:
        named = [key.device for key in batch]
        assert named == sorted(named)


def test_a_turn_is_one_devices_and_the_devices_take_turns() -> None:
    batches = epoch(TurnOrder(table(SIZES), 0, 4), 0)
    assert all(len(devices(batch)) == 1 for batch in batches)
    turns = [(batch[0].device, len(batch)) for batch in batches]
    assert turns == [
        ("a", 4), ("c", 4), ("a", 4), ("a", 4), ("b", 4), ("c", 4), ("z", 1), ("a", 1), ("c", 1)
    ]  # fmt: skip


def test_devices_in_turn_and_in_parallel_do_the_same_batches() -> None:
    together, apart = (epoch(make(table(SIZES), 0, 4), 2) for make in (DeviceOrder, TurnOrder))
    assert flat(together) == flat(apart)


@every_order
def test_batches_hold_at_most_their_size(make: Make) -> None:
    sizes = [len(batch) for batch in epoch(make(table(SIZES), 0, 4), 0)]
    if make is DeviceOrder:
        assert sizes == [8, 4, 13, 2]
    elif make is TurnOrder:
        assert max(sizes) == 4
    else:
        assert sizes == [4] * 6 + [3]


def test_a_window_of_one_mixes_nothing() -> None:
    samples = table(SIZES)
    mixed, sent = epoch(WindowOrder(samples, 0, 4, 1), 1), epoch(TurnOrder(samples, 0, 4), 1)
    assert flat(mixed) == flat(sent)


@pytest.mark.parametrize("size", [2, 7, 20])
def test_nothing_is_drawn_before_it_came_into_the_window(size: int) -> None:
    samples = table({"a": 50, "b": 50})
    sent = flat(epoch(TurnOrder(samples, 0, 10), 0))
    mixed = flat(epoch(WindowOrder(samples, 0, 10, size), 0))
    came = [sent.index(key) for key in mixed]
    early = [place - at for at, place in enumerate(came)]
    assert max(early) == size - 1
    assert came != sorted(came)


def test_a_window_draws_anew_in_every_epoch_and_with_every_seed() -> None:
    samples = table(SIZES)
    drawn = set()
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        sent = flat(epoch(TurnOrder(samples, seed, 4), number))
        mixed = flat(epoch(WindowOrder(samples, seed, 4, 7), number))
        drawn.add(tuple(sent.index(key) for key in mixed))
    assert len(drawn) == 3


def test_a_window_that_holds_an_epoch_mixes_all_devices() -> None:
    samples = table(dict.fromkeys("abcde", 40))
    whole = [epoch(WindowOrder(samples, 0, 20, size), 0) for size in (200, 201, 10**6)]
    assert whole[0] == whole[1] == whole[2]
    assert all(len(devices(batch)) >= 4 for batch in whole[0])
    sent = flat(epoch(TurnOrder(samples, 0, 20), 0))
    came = np.array([sent.index(key) for key in flat(whole[0])])
    # A permutation that knows nothing of when samples came: no trend, nothing left in its place.
    assert abs(np.corrcoef(came, np.arange(200))[0, 1]) < 0.2
    assert np.mean(came == np.arange(200)) < 0.05
    small = flat(epoch(WindowOrder(samples, 0, 20, 20), 0))
    assert np.corrcoef([sent.index(key) for key in small], np.arange(200))[0, 1] > 0.8


@every_order
def test_nothing_to_order_is_an_epoch_without_batches(make: Make) -> None:
    for sizes in ({}, {"a": 0, "b": 0}):
        order = make(table(sizes), 0, 4)
        assert order.batch(0, 0) == []
        assert order.steps_per_epoch == 0
