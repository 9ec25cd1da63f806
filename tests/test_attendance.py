"""Who is still expected to send, and the roster that training keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitfrozen.records import Announcement, SampleTable
from splitfrozen.runs.attendance import Silence, attendance, read_roster, write_roster
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
    seen = attendance([device(0, 5), device(1, None)], stored(5))
    assert (seen.unannounced, seen.missing, seen.complete) == (("device-01",), (), False)
    seen = attendance([device(0, 5), device(1, 3)], stored(5, 2))
    assert (seen.unannounced, seen.missing, seen.complete) == ((), ("device-01",), False)
    seen = attendance([device(0, 5), device(1, 3)], stored(5, 3))
    assert (seen.announced, seen.complete) == ({"device-00": 5, "device-01": 3}, True)


def test_nobody_is_never_complete() -> None:
    assert not attendance([], {}).complete
    assert not attendance([device(0, 5, revoked=True)], stored(5)).complete


def test_a_revoked_device_is_not_waited_for() -> None:
    seen = attendance([device(0, 5), device(1, 9, revoked=True)], stored(5, 2))
    assert (seen.announced, seen.complete) == ({"device-00": 5}, True)


def test_a_gone_device_counts_with_what_it_sent() -> None:
    rows, totals = [device(0, 5), device(1, 4), device(2, None)], stored(2, 4)
    seen = attendance(rows, totals)
    assert (seen.missing, seen.unannounced, seen.stored) == (("device-00",), ("device-02",), 6)
    seen = attendance(rows, totals, {"device-00", "device-02"})
    assert seen.announced == {"device-00": 2, "device-01": 4, "device-02": 0}
    assert seen.complete


def test_silence_goes_by_signs_of_life_and_not_by_the_time_of_day() -> None:
    now = [100.0]
    silence = Silence(60, lambda: now[0])
    assert silence.gone([device(0, 5, last_seen=1e9), device(1, None, last_seen=None)]) == set()
    now[0] += 61
    # The server's clock jumped back by a year, but the device was heard.
    rows = [device(0, 5, last_seen=9.7e8), device(1, None, last_seen=None)]
    assert silence.gone(rows) == {"device-01"}
    now[0] += 59
    assert silence.gone(rows) == {"device-01"}
    now[0] += 2
    assert silence.gone(rows) == {"device-00", "device-01"}
    assert silence.gone([device(0, 5, last_seen=9.8e8)]) == set()


def test_patience_0_waits_for_ever() -> None:
    now = [0.0]
    silence = Silence(0, lambda: now[0])
    silence.gone([device(0, 5)])
    now[0] = 1e9
    assert silence.gone([device(0, 5)]) == set()


def table(devices: Sequence[str], keys: Sequence[tuple[int, int]]) -> SampleTable:
    columns = np.array(keys, np.int32).reshape(-1, 2)
    ones = np.ones(len(columns), np.int32)
    return SampleTable(tuple(devices), columns[:, 0], columns[:, 1], ones, ones, ones)


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
