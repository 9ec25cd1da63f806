"""Who is still expected to send: when may training begin, and on what?

The roster is fixed when training begins and kept in the run folder: a device that comes back later
changes nothing about a training that may have to be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from splitfrozen.records import SampleTable
from splitfrozen.runs.folder import write_atomically
from splitfrozen.server.registry import DeviceRow
from splitfrozen.server.store import Totals


@dataclass(frozen=True, slots=True)
class Attendance:
    """Attributes:
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
    devices: Sequence[DeviceRow],
    totals: Mapping[str, Totals],
    now: float,
    since: float,
    patience_s: float,
) -> Attendance:
    """Look at everybody.

    Args:
        devices: all slots.
        totals: what is stored, by device.
        now: seconds since 1970.
        since: when this process began to look; before that nobody could have been heard.
        patience_s: a device silent for longer counts as gone, with what it sent; 0 is for ever.
    """
    announced: dict[str, int] = {}
    unannounced, missing = [], []
    for device in devices:
        if device.revoked:
            continue
        stored = totals[device.id].samples if device.id in totals else 0
        gone = 0 < patience_s < now - max(device.last_seen or 0.0, since)
        if gone:
            announced[device.id] = stored
        elif device.announcement is None:
            unannounced.append(device.id)
        else:
            announced[device.id] = device.announcement.samples
            if stored < device.announcement.samples:
                missing.append(device.id)
    stored = sum(total.samples for total in totals.values())
    return Attendance(announced, tuple(unannounced), tuple(missing), stored)


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
    write_atomically(path, msgspec.json.encode(roster))


def read_roster(path: Path, table: SampleTable) -> SampleTable:
    """Rows of `table` that are on the roster."""
    roster = msgspec.json.decode(path.read_bytes(), type=dict[str, list[tuple[int, int]]])
    chosen = np.zeros(len(table), bool)
    for number, device in enumerate(table.devices):
        for first, stop in roster.get(device, []):
            chosen |= (table.device == number) & (table.sample >= first) & (table.sample < stop)
    return table.select(chosen)
