"""Samples of several devices in memory."""

from __future__ import annotations

import numpy as np

from splitfrozen.data.samples import SampleSource
from splitfrozen.records import Sample, SampleKey, SampleTable


def sample(id_: int, length: int) -> Sample:
    tokens = np.arange(length, dtype=np.int32)
    return Sample(id_, tokens, None, None, np.array([id_ % 3], np.int32), length)


HELD = {
    "b": [sample(0, 7), sample(1, 3)],
    "none": [],
    "a": [sample(0, 2), sample(1, 9), sample(2, 5)],
}


def rows(table: SampleTable) -> list[SampleKey]:
    return [table.key(row) for row in range(len(table))]


def test_the_table_is_sorted_by_key_and_knows_each_sample() -> None:
    table = SampleSource(HELD).samples()
    assert table.devices == ("a", "b", "none")
    keys = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert rows(table) == sorted(rows(table)) == [SampleKey(*key) for key in keys]
    assert table.tokens.tolist() == [2, 9, 5, 7, 3]
    columns = (table.device, table.sample, table.tokens, table.depth, table.chunk)
    assert all(column.dtype == np.int32 and column.shape == (5,) for column in columns)
    assert not table.chunk.any()


def test_samples_have_had_no_block_but_where_they_are_said_to_be_at_a_depth() -> None:
    assert SampleSource(HELD).samples().depth.tolist() == [0] * 5
    assert SampleSource(HELD, depth=2).samples().depth.tolist() == [2] * 5


def test_samples_come_as_asked_for_however_devices_were_given() -> None:
    source = SampleSource(HELD)
    other = SampleSource(dict(reversed(HELD.items())))
    table = source.samples()
    for row, key in enumerate(rows(table)):
        [one] = source.read([key])
        assert one is HELD[key.device][key.sample]
        assert (one.id, one.length) == (key.sample, table.tokens[row])
    keys = [SampleKey("b", 1), SampleKey("a", 2), SampleKey("b", 1), SampleKey("a", 0)]
    wanted = [HELD[key.device][key.sample] for key in keys]
    assert all(got is one for got, one in zip(source.read(keys), wanted, strict=True))
    assert all(got is one for got, one in zip(other.read(keys), wanted, strict=True))
    assert rows(other.samples()) == rows(table)
    assert source.read([]) == []


def test_no_samples_are_an_empty_table() -> None:
    for devices in ((), ("a",)):
        table = SampleSource({device: [] for device in devices}).samples()
        assert len(table) == 0
        assert table.devices == devices
        assert table.device.dtype == np.int32
