"""Batches: exact sizes, orders that do not depend on arrival, padding, the shuffle window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitfrozen.errors import StoreError
from splitfrozen.records import IGNORED, Activation, SampleKey, SampleTable
from splitfrozen.training.batching import (
    Arrivals,
    FixedOrder,
    Order,
    ShuffleWindow,
    StreamingOrder,
    collate,
    epoch_order,
    split,
)


def table(keys: list[tuple[str, int]]) -> SampleTable:
    """What a store says of samples that came in the order of `keys`."""
    devices = tuple(sorted({device for device, _ in keys}))
    rows = sorted(keys)
    column = np.array([devices.index(device) for device, _ in rows], np.int32)
    samples = np.array([sample for _, sample in rows], np.int32)
    tokens, depth, chunk = (np.full_like(column, value) for value in (5, 2, 0))
    return SampleTable(devices, column, samples, tokens, depth, chunk)


def two_devices(first: int, second: int) -> list[tuple[str, int]]:
    return [("a", i) for i in range(first)] + [("b", i) for i in range(second)]


def epoch(order: Order, number: int) -> list[list[SampleKey]]:
    return list(takewhile(bool, (order.batch(number, index) or [] for index in count())))


def flat(batches: list[list[SampleKey]]) -> list[SampleKey]:
    return [key for batch in batches for key in batch]


def test_an_epoch_holds_every_sample_once_in_batches_of_exact_size() -> None:
    samples = table(two_devices(13, 9))
    batches = epoch(FixedOrder(samples, seed=0, batch_size=4), 0)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2]
    assert sorted(flat(batches)) == [samples.key(row) for row in range(22)]
    assert flat(batches) != sorted(flat(batches))


def test_the_order_depends_on_seed_and_epoch_but_not_on_arrival() -> None:
    keys = two_devices(20, 20)
    order = FixedOrder(table(keys), seed=0, batch_size=8)
    assert epoch(FixedOrder(table(keys[::-1]), seed=0, batch_size=8), 3) == epoch(order, 3)
    assert epoch(order, 4) != epoch(order, 3)
    assert epoch(FixedOrder(table(keys), seed=1, batch_size=8), 3) != epoch(order, 3)
    assert sorted(epoch_order(table(keys), 0, 3)) == list(range(40))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_split_takes_each_sample_once_and_keeps_the_bound(lengths: list[int], bound: int) -> None:
    groups = split(lengths, bound)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[i] for i in group)
        assert padded <= bound or len(group) == 1


def test_split_puts_like_lengths_together() -> None:
    assert split([3, 9, 3, 9, 3], 18) == [[1, 3], [0, 2, 4]]


def test_collate_pads_on_the_right() -> None:
    first = Activation(0, 2, np.ones((2, 3), np.float32), np.array([7, 8], np.int32))
    second = Activation(1, 2, np.full((1, 3), 2, np.float32), np.array([9], np.int32))
    batch = collate([first, second])
    assert batch.hidden.tolist() == [[[1] * 3, [1] * 3], [[2] * 3, [0] * 3]]
    assert batch.lengths.tolist() == [2, 1]
    assert batch.targets.tolist() == [[7, 8], [9, IGNORED]]
    assert batch.hidden.dtype == torch.float32
    assert batch.targets.dtype == torch.int64


def test_the_window_waits_until_enough_samples_are_there(tmp_path: Path) -> None:
    window = ShuffleWindow(tmp_path / "ledger", seed=0, size=10)
    assert window.draw(Arrivals(table(two_devices(9, 0)), complete=False), 4) is None
    assert len(window.draw(Arrivals(table(two_devices(9, 1)), complete=False), 4) or []) == 4
    assert window.draw(Arrivals(table(two_devices(9, 1)), complete=False), 4) is None
    assert len(window.draw(Arrivals(table(two_devices(9, 1)), complete=True), 4) or []) == 4
    assert len(window.draw(Arrivals(table(two_devices(9, 1)), complete=True), 4) or []) == 2
    assert window.draw(Arrivals(table(two_devices(9, 1)), complete=True), 4) == []


class Devices(tuple[str, ...]):
    """Devices of a table that count how often somebody goes through them all."""

    asked: ClassVar[Counter[int]] = Counter()

    def __iter__(self) -> Iterator[str]:
        self.asked[len(self)] += 1
        return super().__iter__()


def test_a_window_looks_up_the_rows_of_a_table_once(tmp_path: Path) -> None:
    window = ShuffleWindow(tmp_path / "ledger", seed=0, size=2)
    some, all_ = table([("a", i) for i in range(9)]), table(two_devices(9, 9))
    drawn = []
    for known in (some, all_):
        watched = replace(known, devices=Devices(known.devices))
        drawn += [window.draw(Arrivals(watched, complete=False), 3) or [] for _ in range(3)]
    # Once a batch would take 0.4 s of each step where a million samples are stored.
    assert Devices.asked == {1: 1, 2: 1}
    assert len(set(flat(drawn))) == 18
    assert all(len(batch) == 3 for batch in drawn)


class Uploads:
    """Samples that arrive a few more at each question."""

    def __init__(self, first: int, second: int, step: int) -> None:
        self.keys = two_devices(first, second)[::-1]
        self.step = step
        self.here = 0

    def __call__(self) -> Arrivals:
        self.here = min(self.here + self.step, len(self.keys))
        return Arrivals(table(self.keys[: self.here]), self.here == len(self.keys))


def streamed(order: StreamingOrder) -> list[list[SampleKey]]:
    """The first epoch, asking again while nothing can be drawn."""
    batches: list[list[SampleKey]] = []
    while (batch := order.batch(0, len(batches))) != []:
        batches += [] if batch is None else [batch]
    return batches


@pytest.mark.parametrize("step", [1, 7, 100])
def test_streaming_draws_every_sample_once_whatever_arrives_when(tmp_path: Path, step: int) -> None:
    window = ShuffleWindow(tmp_path / "ledger", seed=0, size=8)
    order = StreamingOrder(window, Uploads(30, 21, step), seed=0, batch_size=4)
    batches = streamed(order)
    assert [len(batch) for batch in batches] == [4] * 12 + [3]
    assert Counter(flat(batches)) == Counter(SampleKey(*key) for key in two_devices(30, 21))
    assert {key.device for key in batches[-1] + batches[-2]} == {"a", "b"} or step == 1


def test_a_continued_run_replays_the_ledger_whatever_arrives_now(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    uploads = Uploads(30, 21, 7)
    order = StreamingOrder(ShuffleWindow(ledger, 0, 8), uploads, 0, 4)
    before = [order.batch(0, i) for i in (0, 0, 0, 1, 2)]
    before = [batch for batch in before if batch]
    again = StreamingOrder(ShuffleWindow(ledger, 0, 8), Uploads(30, 21, 100), 0, 4)
    after = streamed(again)
    assert after[: len(set(map(tuple, before)))] == list(
        map(list, dict.fromkeys(map(tuple, before)))
    )
    assert Counter(flat(after)) == Counter(SampleKey(*key) for key in two_devices(30, 21))
    assert streamed(StreamingOrder(ShuffleWindow(ledger, 5, 99), uploads, 5, 4)) == after


def test_later_epochs_are_fixed_and_leave_out_what_came_too_late(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    order = StreamingOrder(ShuffleWindow(ledger, 0, 8), Uploads(10, 10, 20), 0, 4)
    drawn = flat(streamed(order))
    late = StreamingOrder(ShuffleWindow(ledger, 0, 8), Uploads(15, 10, 25), 0, 4)
    assert epoch(late, 1) == epoch(order, 1)
    assert sorted(flat(epoch(late, 1))) == sorted(drawn)
    fixed = FixedOrder(table(two_devices(10, 10)), 0, 4)
    assert epoch(order, 1) == epoch(fixed, 1)


@pytest.mark.parametrize("torn", [b'{"batch":2,"ke', b"\0\0\0", b'{"batch":2,"keys":[["a",1]]}'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    ledger = tmp_path / "ledger"
    arrivals = Arrivals(table(two_devices(20, 0)), complete=True)
    window = ShuffleWindow(ledger, 0, 8)
    drawn = [window.draw(arrivals, 4), window.draw(arrivals, 4)]
    ledger.write_bytes(ledger.read_bytes() + torn)
    window = ShuffleWindow(ledger, 0, 8)
    assert [window.recorded(index) for index in range(3)] == [*drawn, []]
    third = window.draw(arrivals, 4)
    assert ShuffleWindow(ledger, 0, 8).recorded(2) == third


@pytest.mark.parametrize(
    "lines",
    [
        b'{"batch":0,"keys":[["a",1]]}\nnonsense\n',
        b'{"batch":1,"keys":[["a",1]]}\n',
        b'{"batch":0,"keys":[["a",1]]}\n{"batch":1,"keys":[["a",1]]}\n',
        b'{"batch":0,"keys":[]}\n',
    ],
)
def test_a_damaged_ledger_is_refused(tmp_path: Path, lines: bytes) -> None:
    (tmp_path / "ledger").write_bytes(lines)
    with pytest.raises(StoreError, match="ledger"):
        ShuffleWindow(tmp_path / "ledger", 0, 8)
    assert (tmp_path / "ledger").read_bytes() == lines


def test_a_ledger_that_cannot_be_written_draws_nothing(tmp_path: Path) -> None:
    window = ShuffleWindow(tmp_path / "ledger", 0, 8)
    arrivals = Arrivals(table(two_devices(20, 0)), complete=True)
    (tmp_path / "ledger").unlink()
    (tmp_path / "ledger").mkdir()
    with pytest.raises(StoreError, match="ledger cannot be used"):
        window.draw(arrivals, 4)
    (tmp_path / "ledger").rmdir()
    assert window.recorded(0) == []
