"""Who is still expected to send, and the roster that training keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitfrozen.records import Announcement, SampleTable
from splitfrozen.runs.attendance import attendance, read_roster, write_roster
from splitfrozen.server.registry import DeviceRow
from splitfrozen.server.store import Totals

NOW = 10_000.0


def device(number: int, announced: int | None, **changes: Any) -> DeviceRow:
    said = None if announced is None else Announcement(announced, announced, 0, "0" * 64)
    fields: dict[str, Any] = dict.fromkeys(DeviceRow.__slots__)
    fields |= {"id": f"device-{number:02}", "slot": number, "strikes": 0, "revoked": False}
    fields |= {"name": "", "version": "", "announcement": said, "last_seen": NOW}
    return DeviceRow(**fields | changes)


def stored(*counts: int) -> dict[str, Totals]:
    """Nothing is known of a device of which nothing is stored."""
    return {f"device-{i:02}": Totals(n, n, n) for i, n in enumerate(counts) if n}


def test_nothing_is_complete_before_all_have_announced_and_sent() -> None:
    seen = attendance([device(0, 5), device(1, None)], stored(5), NOW, 0.0, 0)
    assert (seen.unannounced, seen.missing, seen.complete) == (("device-01",), (), False)
    seen = attendance([device(0, 5), device(1, 3)], stored(5, 2), NOW, 0.0, 0)
    assert (seen.unannounced, seen.missing, seen.complete) == ((), ("device-01",), False)
    seen = attendance([device(0, 5), device(1, 3)], stored(5, 3), NOW, 0.0, 0)
    assert (seen.announced, seen.complete) == ({"device-00": 5, "device-01": 3}, True)


def test_nobody_is_never_complete() -> None:
    assert not attendance([], {}, NOW, 0.0, 0).complete
    assert not attendance([device(0, 5, revoked=True)], stored(5), NOW, 0.0, 0).complete


def test_a_revoked_device_is_not_waited_for() -> None:
    seen = attendance([device(0, 5), device(1, 9, revoked=True)], stored(5, 2), NOW, 0.0, 0)
    assert (seen.announced, seen.complete) == ({"device-00": 5}, True)


def test_patience_0_waits_for_ever() -> None:
    row = device(0, 5, last_seen=0.0)
    assert attendance([row], stored(2), NOW, 0.0, 0).missing == ("device-00",)


@pytest.mark.parametrize(
    ("announced", "last_seen", "since", "gone"),
    [
        (5, NOW - 61, 0.0, True),
        (5, NOW - 59, 0.0, False),
        (None, NOW - 61, 0.0, True),
        (None, None, NOW - 61, True),  # it never came
        (5, NOW - 1000, NOW - 59, False),  # nobody could have been heard for longer
    ],
)
def test_a_silent_device_counts_with_what_it_sent(
    announced: int | None, last_seen: float | None, since: float, gone: bool
) -> None:
    others = [device(1, 4, last_seen=NOW)]
    rows = [device(0, announced, last_seen=last_seen), *others]
    seen = attendance(rows, stored(2, 4), NOW, since, 60)
    assert seen.complete is gone
    if gone:
        assert seen.announced == {"device-00": 2, "device-01": 4}


def table(devices: Sequence[str], keys: Sequence[tuple[int, int]]) -> SampleTable:
    columns = np.array(keys, np.int32).reshape(-1, 2)
    ones = np.ones(len(columns), np.int32)
    return SampleTable(tuple(devices), columns[:, 0], columns[:, 1], ones, ones)


def keys(found: SampleTable | None) -> list[tuple[str, int]]:
    assert found is not None
    return [(key.device, key.sample) for key in map(found.key, range(len(found)))]


def test_a_roster_with_gaps_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    rows = [(0, 0), (0, 1), (0, 2), (0, 7), (1, 3), (3, 0), (3, 2), (3, 4), (3, 5)]
    # Nothing of device "c" is at the cut.
    whole = table(["a", "b", "c", "d"], rows)
    write_roster(path, whole)
    assert keys(read_roster(path, whole)) == keys(whole)
    assert path.read_text() == '{"a":[[0,3],[7,8]],"b":[[3,4]],"d":[[0,1],[2,3],[4,6]]}'


def test_what_comes_later_is_not_on_the_roster(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    before = table(["b", "c"], [(0, 0), (0, 2), (1, 0)])
    write_roster(path, before)
    later = table(["a", "b", "c"], [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)])
    assert keys(read_roster(path, later)) == keys(before)
