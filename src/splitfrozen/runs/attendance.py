"""Who is still expected to send: when may training begin, and on what?

The roster is fixed when training begins and kept in the run folder: a device that comes back later
changes nothing about a training that may have to be resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from splitfrozen.disk import write_whole
from splitfrozen.records import SampleTable
from splitfrozen.server.registry import DeviceRow
from splitfrozen.server.store import Totals


@dataclass(frozen=True, slots=True)
class Attendance:
    """Who has sent what.

    Attributes:
        announced: device -> samples that it will have sent in the end.
        unannounced: devices that have not said what they will send.
        missing: devices that have announced more than is stored.
        stored: samples in the store.
    """

    announced: dict[str, int]
    unannounced: tuple[str, ...]
    missing: tuple[str, ...]
    stored: int

    @property
    def complete(self) -> bool:
        """Nothing more will come, and there is something to train on."""
        return not self.unannounced and not self.missing and sum(self.announced.values()) > 0


def attendance(
    devices: Sequence[DeviceRow], totals: Mapping[str, Totals], gone: Collection[str] = ()
) -> Attendance:
    """Look at everybody.

    Args:
        devices: all slots.
        totals: what is stored, by device.
        gone: devices that are no longer waited for; what they sent is all that they announced.
    """
    announced: dict[str, int] = {}
    unannounced, missing = [], []
    for device in devices:
        if device.revoked:
            continue
        stored = totals[device.id].samples if device.id in totals else 0
        if device.id in gone:
            announced[device.id] = stored
        elif device.announcement is None:
            unannounced.append(device.id)
        else:
            announced[device.id] = device.announcement.samples
            if stored < device.announcement.samples:
                missing.append(device.id)
    total = sum(total.samples for total in totals.values())
    return Attendance(announced, tuple(unannounced), tuple(missing), total)


class Silence:
    """Who has not been heard for long.

    It goes by a clock that nobody sets: `last_seen` is wall time, which may jump by hours, so only
    that it has changed counts as a sign of life.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """A device silent for longer than `patience_s` is gone; 0 waits for ever."""
        self._patience_s = patience_s
        self._clock = clock
        self._heard: dict[str, tuple[float | None, float]] = {}

    def gone(self, devices: Sequence[DeviceRow]) -> frozenset[str]:
        """Devices that are gone now. A slot that nobody took is silent since the first call."""
        now, gone = self._clock(), set()
        for device in devices:
            last_seen, since = self._heard.get(device.id, (None, now))
            if device.last_seen != last_seen:
                since = now
            self._heard[device.id] = device.last_seen, since
            if 0 < self._patience_s < now - since:
                gone.add(device.id)
        return frozenset(gone)


def write_roster(path: Path, table: SampleTable) -> None:
    """Keep which samples are trained on: device -> ranges [first, last + 1) of sample ids."""
    roster = {}
    for number, device in enumerate(table.devices):
        ids = table.sample[table.device == number]
        if len(ids) == 0:
            continue
        breaks = np.flatnonzero(np.diff(ids) != 1)
        firsts = ids[np.concatenate([[0], breaks + 1])]
        lasts = ids[np.concatenate([breaks, [len(ids) - 1]])]
        roster[device] = [[int(a), int(b) + 1] for a, b in zip(firsts, lasts, strict=True)]
    write_whole(path, msgspec.json.encode(roster))


def read_roster(path: Path, table: SampleTable) -> SampleTable:
    """Rows of `table` that are on the roster."""
    roster = msgspec.json.decode(path.read_bytes(), type=dict[str, list[tuple[int, int]]])
    chosen = np.zeros(len(table), bool)
    for number, device in enumerate(table.devices):
        for first, stop in roster.get(device, []):
            chosen |= (table.device == number) & (table.sample >= first) & (table.sample < stop)
    return table.select(chosen)
