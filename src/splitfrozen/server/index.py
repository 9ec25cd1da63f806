"""The store's index: which sample is where. Functions on one connection, inside a transaction.

`chunks.sha256` is for audits and nothing reads it: the address under which a chunk was acknowledged
is all that ties stored samples to the bytes that a device can show it sent.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple

import numpy as np

from splitfrozen.errors import RefusedError
from splitfrozen.records import FrameHeader, SampleTable
from splitfrozen.server.segments import Kind, OpenSegment, Place

VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS devices (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, purged INTEGER NOT NULL DEFAULT 0,
    samples INTEGER NOT NULL DEFAULT 0, tokens INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS segments (
    id INTEGER PRIMARY KEY AUTOINCREMENT, device INTEGER NOT NULL, depth INTEGER NOT NULL,
    width INTEGER NOT NULL, codec TEXT NOT NULL, bytes INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS segments_device ON segments (device);
CREATE TABLE IF NOT EXISTS chunks (
    device INTEGER NOT NULL, number INTEGER NOT NULL, sha256 TEXT NOT NULL,
    PRIMARY KEY (device, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samples (
    device INTEGER NOT NULL, sample INTEGER NOT NULL, segment INTEGER NOT NULL,
    offset INTEGER NOT NULL, length INTEGER NOT NULL, crc32 INTEGER NOT NULL,
    tokens INTEGER NOT NULL, targets INTEGER NOT NULL, chunk INTEGER NOT NULL,
    PRIMARY KEY (device, sample)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS samples_segment ON samples (segment)
"""


class PurgedError(RefusedError):
    """The device was purged."""


class VanishedError(Exception):
    """The segment was deleted while we appended to it: another one must be taken."""


def find_device(index: sqlite3.Connection, device: str) -> int | None:
    """Number of a device, None for a new one. Raises RefusedError for a purged one."""
    row = index.execute("SELECT id, purged FROM devices WHERE name = ?", (device,)).fetchone()
    if row is None:
        return None
    if row[1]:
        raise PurgedError(
            f"{device} was purged from this run",
            got="an activation of it",
            allowed="devices that take part",
            remedy="ask the operator for a new join string",
        )
    return int(row[0])


def device_number(index: sqlite3.Connection, device: str) -> int:
    """Number of a device, purged or not; a new device gets one."""
    index.execute("INSERT OR IGNORE INTO devices (name) VALUES (?)", (device,))
    row = index.execute("SELECT id FROM devices WHERE name = ?", (device,)).fetchone()
    return int(row[0])


def newest_segment(index: sqlite3.Connection, device: str, kind: Kind, limit: int) -> int | None:
    """The segment to append to; None where all have `limit` bytes or more."""
    row = index.execute(
        "SELECT id FROM segments WHERE device = ? AND depth = ? AND width = ? AND codec = ? "
        "AND bytes < ? ORDER BY id DESC LIMIT 1",
        (find_device(index, device), kind.depth, kind.width, kind.codec, limit),
    ).fetchone()
    return None if row is None else int(row[0])


def new_segment(index: sqlite3.Connection, device: str, kind: Kind) -> int:
    """Row of an empty segment; its file comes after it. Raises RefusedError."""
    number = find_device(index, device) or device_number(index, device)
    row = index.execute(
        "INSERT INTO segments (device, depth, width, codec) VALUES (?, ?, ?, ?) RETURNING id",
        (number, kind.depth, kind.width, kind.codec),
    ).fetchone()
    return int(row[0])


def known_samples(index: sqlite3.Connection, device: int, samples: Iterable[int]) -> set[int]:
    """Those of `samples` that are stored."""
    query = "SELECT 1 FROM samples WHERE device = ? AND sample = ?"
    return {one for one in samples if index.execute(query, (device, one)).fetchone()}


def _grow(index: sqlite3.Connection, segment: OpenSegment) -> None:
    done = index.execute(
        "UPDATE segments SET bytes = ? WHERE id = ?", (segment.end, segment.number)
    )
    if done.rowcount == 0:
        raise VanishedError


def commit_chunk(
    index: sqlite3.Connection,
    header: FrameHeader,
    sha256: str,
    segment: OpenSegment,
    places: dict[int, Place],
) -> int:
    """Write the rows of a chunk and return how many samples were new."""
    number = find_device(index, header.device) or device_number(index, header.device)
    _grow(index, segment)
    # Another process may have stored some since we looked; theirs were first.
    for known in known_samples(index, number, list(places)):
        del places[known]
    index.executemany(
        "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(number, sample, *astuple(at), header.index) for sample, at in places.items()],
    )
    index.execute("INSERT OR IGNORE INTO chunks VALUES (?, ?, ?)", (number, header.index, sha256))
    index.execute(
        "UPDATE devices SET samples = samples + ?, tokens = tokens + ?, bytes = bytes + ? "
        "WHERE id = ?",
        (
            len(places),
            sum(at.tokens for at in places.values()),
            sum(at.length for at in places.values()),
            number,
        ),
    )
    return len(places)


def commit_lifted(
    index: sqlite3.Connection,
    device: str,
    segments: Sequence[OpenSegment],
    written: Sequence[tuple[int, Place]],
) -> list[tuple[int, int]]:
    """Point rows to the lifted bytes; return (id, depth) of the segments that died of it."""
    number = device_number(index, device)
    for segment in segments:
        _grow(index, segment)
    index.executemany(
        "UPDATE samples SET segment = ?, offset = ?, length = ?, crc32 = ? "
        "WHERE device = ? AND sample = ?",
        [(at.segment, at.offset, at.length, at.crc32, number, sample) for sample, at in written],
    )
    return index.execute(
        "DELETE FROM segments WHERE device = ? AND bytes > 0 AND NOT EXISTS "
        "(SELECT 1 FROM samples WHERE segment = segments.id) RETURNING id, depth",
        (number,),
    ).fetchall()


def find_sample(index: sqlite3.Connection, device: str, sample: int) -> tuple[Kind, Place] | None:
    """Where a sample is and in what form; None where it is not stored."""
    row = index.execute(
        "SELECT depth, width, codec, segment, offset, length, crc32, samples.tokens, targets "
        "FROM samples JOIN segments ON segments.id = segment "
        "JOIN devices ON devices.id = samples.device WHERE name = ? AND sample = ?",
        (device, sample),
    ).fetchone()
    return None if row is None else (Kind(*row[:3]), Place(*row[3:]))


def all_samples(index: sqlite3.Connection) -> SampleTable:
    """Every row, sorted by key; a row is a Python object for a moment only."""
    names = dict(index.execute("SELECT id, name FROM devices WHERE samples > 0"))
    rows = index.execute(
        "SELECT samples.device, sample, tokens, depth, chunk FROM samples "
        "JOIN segments ON segments.id = samples.segment"
    )
    columns = ("device", "sample", "tokens", "depth", "chunk")
    table = np.fromiter(rows, np.dtype([(name, np.int32) for name in columns]))
    numbers = sorted(names, key=names.__getitem__)
    rank = np.zeros(max(numbers, default=0) + 1, np.int32)
    rank[numbers] = np.arange(len(numbers), dtype=np.int32)
    device = rank[table["device"]]
    order = np.lexsort((table["sample"], device))
    return SampleTable(
        devices=tuple(names[number] for number in numbers),
        device=device[order],
        sample=table["sample"][order],
        tokens=table["tokens"][order],
        depth=table["depth"][order],
        chunk=table["chunk"][order],
    )
