"""Who takes part and how far the run is: the single source of truth that `status` reads.

    <folder>/registry.sqlite

Every device has a slot with an id and a one-time token. A token is kept in the clear until it is
used, so that `serve` prints the same join strings again; then, like the device's secret, only as a
hash. All requests of a device may be repeated.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from splitfrozen.disk import explained
from splitfrozen.errors import RefusedError, StoreError
from splitfrozen.records import (
    PROTOCOL,
    Announcement,
    DeviceProfile,
    DeviceReport,
    Enrolled,
    Enrolment,
)
from splitfrozen.server.auth import UnknownCredentialError, digest, matches, new_token
from splitfrozen.server.database import Database

State = Literal["preparing", "receiving", "training", "done", "failed", "stopped"]

VERSION = 3
SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS devices (
    slot INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    token TEXT, token_hash TEXT NOT NULL UNIQUE, secret_hash TEXT UNIQUE,
    name TEXT NOT NULL DEFAULT '', version TEXT NOT NULL DEFAULT '',
    enrolled_at REAL, last_seen REAL, announcement BLOB, profile BLOB, profiled_at REAL,
    depth INTEGER, depths TEXT NOT NULL DEFAULT '[]', report BLOB, reported_at REAL,
    failure TEXT, strikes INTEGER NOT NULL DEFAULT 0, revoked INTEGER NOT NULL DEFAULT 0)
"""
SEEN_S = 5.0
"""What is written as a device's `last_seen` is at most so much older than its last request."""

_COLUMNS = (
    "id, slot, name, version, enrolled_at, last_seen, announcement, profile, depth, depths, "
    "report, reported_at, failure, strikes, revoked"
)


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """One device as the registry knows it.

    Attributes:
        id: "device-00"; slot: its number.
        name, version: as it enrolled.
        enrolled_at, last_seen: seconds since 1970; None before.
        announcement, profile, report: as it sent them; None before.
        depth: n of its front; None before it was assigned.
        depths: all that it was assigned so far: what it computed before may still come.
        reported_at: when `report` came, seconds since 1970.
        failure: what it reported last, or why it got no front; None when well.
        strikes: bad chunks in a row.
        revoked: refused for good.
    """

    id: str
    slot: int
    name: str
    version: str
    enrolled_at: float | None
    last_seen: float | None
    announcement: Announcement | None
    profile: DeviceProfile | None
    depth: int | None
    depths: tuple[int, ...]
    report: DeviceReport | None
    reported_at: float | None
    failure: str | None
    strikes: int
    revoked: bool


@dataclass(frozen=True, slots=True)
class RunState:
    """What the run does, why it failed, and since when (seconds since 1970)."""

    state: State
    error: str | None
    since: float


class Registry:
    """The registry of the run whose folder it is in; safe for several processes and threads."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Open or create. Raises StoreError.

        Args:
            folder: of the run; its name is the run's.
            clock: seconds since 1970.
        """
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.run = folder.resolve().name
        self.clock = clock
        self._database = Database(folder / "registry.sqlite", SCHEMA, VERSION)
        self._seen: dict[str, float] = {}
        self._seen_written: dict[str, float] = {}
        self._seen_lock = threading.Lock()

    def close(self) -> None:
        """Write the `last_seen` that is pending, SEEN_S of it at most, and close."""
        self._write_seen()
        self._database.close()

    # --- slots -------------------------------------------------------------------------------

    def ensure_slots(self, count: int) -> None:
        """Make slots up to `count`; those that exist stay as they are."""
        with self._database.write() as database:
            (have,) = database.execute("SELECT count(*) FROM devices").fetchone()
            _insert_slots(database, have, count)

    def add_slots(self, count: int) -> list[str]:
        """Make slots for devices that join later; return their ids."""
        with self._database.write() as database:
            (have,) = database.execute("SELECT count(*) FROM devices").fetchone()
            return _insert_slots(database, have, have + count)

    def tokens(self) -> dict[str, str]:
        """Device id -> token, of the slots that nobody has taken yet, in the order of slots."""
        with self._database.read() as database:
            rows = database.execute(
                "SELECT id, token FROM devices WHERE token IS NOT NULL AND NOT revoked "
                "ORDER BY slot"
            )
            return dict(rows)

    def enrol(self, enrolment: Enrolment) -> Enrolled:
        """Give a slot to whoever holds its token; the same token and secret may come again.

        Raises RefusedError: another protocol, an unknown, used or revoked token.
        """
        if enrolment.protocol != PROTOCOL:
            raise RefusedError(
                "device and server speak different protocols",
                got=f"{enrolment.protocol} (splitfrozen {enrolment.version})",
                allowed=str(PROTOCOL),
                remedy="install the server's version on the device",
            )
        token, secret = digest(enrolment.token), digest(enrolment.secret)
        with self._database.write() as database:
            row = database.execute(
                "SELECT id, secret_hash, revoked FROM devices WHERE token_hash = ?", (token,)
            ).fetchone()
            if row is None:
                raise _unknown("token", "the token of a join string of this run")
            device, known, revoked = row
            if revoked:
                raise _revoked(device)
            if known is not None and not matches(enrolment.secret, known):
                raise RefusedError(
                    f"the join string of {device} was used already",
                    got="another device",
                    allowed="the device that used it first",
                    remedy="use another join string; `splitfrozen invite` makes more",
                )
            if known is None:
                self._take_slot(database, device, enrolment, secret)
        return Enrolled(run=self.run, device=device)

    def _take_slot(
        self, database: sqlite3.Connection, device: str, enrolment: Enrolment, secret: str
    ) -> None:
        if database.execute("SELECT 1 FROM devices WHERE secret_hash = ?", (secret,)).fetchone():
            raise RefusedError(
                "this secret belongs to another device",
                got=f"a second join string, that of {device}",
                allowed="one device for each join string",
                remedy="start each device with its own --state folder",
            )
        database.execute(
            "UPDATE devices SET token = NULL, secret_hash = ?, name = ?, version = ?, "
            "enrolled_at = ?, last_seen = ? WHERE id = ?",
            (secret, enrolment.name, enrolment.version, self.clock(), self.clock(), device),
        )

    def authenticate(self, secret: str) -> str:
        """Return the id of the device whose secret this is.

        Raises UnknownCredentialError, or RefusedError for a device that was revoked.
        """
        with self._database.read() as database:
            row = database.execute(
                "SELECT id, secret_hash, revoked FROM devices WHERE secret_hash = ?",
                (digest(secret),),
            ).fetchone()
        if row is None or not matches(secret, row[1]):
            raise _unknown("secret", "the secret of an enrolled device")
        if row[2]:
            raise _revoked(row[0])
        self.note_seen(row[0])
        return str(row[0])

    def note_seen(self, device: str) -> None:
        """The device is there now. Written, for all, once what is written of it is SEEN_S old."""
        now = self.clock()
        with self._seen_lock:
            self._seen[device] = now
            if now - self._seen_written.get(device, 0.0) < SEEN_S:
                return
        self._write_seen()

    def _write_seen(self) -> None:
        """One transaction for all devices: each costs a write to the disk."""
        with self._seen_lock:
            seen, self._seen = self._seen, {}
            self._seen_written |= seen
        if seen:
            with self._database.write() as database:
                database.executemany(
                    "UPDATE devices SET last_seen = ? WHERE id = ?",
                    [(at, device) for device, at in seen.items()],
                )

    # --- what devices say --------------------------------------------------------------------

    def announce(self, device: str, announcement: Announcement) -> None:
        """Keep what a device will send. It starts anew: strikes and failure are forgotten.

        Raises RefusedError where it announced something else before.
        """
        with self._database.write() as database:
            before = _row(database, device).announcement
            if before is not None and before != announcement:
                differ = [
                    name
                    for name in Announcement.__struct_fields__
                    if getattr(before, name) != getattr(announcement, name)
                ]
                raise RefusedError(
                    f"the data of {device} changed since it joined",
                    got=", ".join(f"{name} {getattr(announcement, name)}" for name in differ),
                    allowed=", ".join(f"{name} {getattr(before, name)}" for name in differ),
                    remedy="restore the data, or join with a new join string",
                )
            database.execute(
                "UPDATE devices SET announcement = ?, strikes = 0, failure = NULL WHERE id = ?",
                (msgspec.msgpack.encode(announcement), device),
            )

    def profile(self, device: str, profile: DeviceProfile) -> None:
        """Keep what was measured last."""
        with self._database.write() as database:
            database.execute(
                "UPDATE devices SET profile = ?, profiled_at = ifnull(profiled_at, ?) WHERE id = ?",
                (msgspec.msgpack.encode(profile), self.clock(), device),
            )

    def report(self, device: str, report: DeviceReport) -> None:
        """Keep what a device reports at its end.

        The last report counts, but one of a start that found everything stored replaces none, and
        one that comes again came when it came first.
        """
        with self._database.write() as database:
            before = _row(database, device).report
            if before is None or (report.chunks and report != before):
                database.execute(
                    "UPDATE devices SET report = ?, reported_at = ? WHERE id = ?",
                    (msgspec.msgpack.encode(report), self.clock(), device),
                )

    def fail(self, device: str, message: str) -> None:
        """Keep why a device cannot go on."""
        self._set(device, "failure", message)

    def strike(self, device: str) -> None:
        """Count a bad chunk."""
        with self._database.write() as database:
            database.execute("UPDATE devices SET strikes = strikes + 1 WHERE id = ?", (device,))

    def forgive(self, device: str) -> None:
        """A good chunk ends a row of bad ones."""
        self._set(device, "strikes", 0)

    def revoke(self, device: str) -> None:
        """Refuse a device from now on. Raises StoreError where there is none of that id."""
        with self._database.write() as database:
            _row(database, device)
            database.execute("UPDATE devices SET revoked = 1, token = NULL WHERE id = ?", (device,))

    # --- assignment --------------------------------------------------------------------------

    def assign(self, depths: Mapping[str, int]) -> None:
        """Set the depths that devices compute from now on."""
        with self._database.write() as database:
            for device, depth in depths.items():
                row = _row(database, device)
                if row.depth != depth:
                    known = msgspec.json.encode(sorted({*row.depths, depth})).decode()
                    database.execute(
                        "UPDATE devices SET depth = ?, depths = ? WHERE id = ?",
                        (depth, known, device),
                    )

    def gathering(self) -> tuple[int, float | None]:
        """How many devices have sent no profile yet, and when the first profile came."""
        with self._database.read() as database:
            missing, first = database.execute(
                "SELECT count(*) FILTER (WHERE profiled_at IS NULL), min(profiled_at) "
                "FROM devices WHERE NOT revoked"
            ).fetchone()
        return int(missing), first

    # --- looking -----------------------------------------------------------------------------

    def device(self, device: str) -> DeviceRow:
        """One device. Raises StoreError where there is none of that id."""
        with self._database.read() as database:
            return _row(database, device)

    def devices(self) -> list[DeviceRow]:
        """All slots in order."""
        with self._database.read() as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM devices ORDER BY slot")  # noqa: S608
            return [_parse(row) for row in rows]

    def state(self) -> RunState:
        """What the run does; "preparing" at first."""
        with self._database.read() as database:
            state, error, since = (_get(database, key) for key in ("state", "error", "since"))
        return RunState(state or "preparing", error, since or 0.0)

    def set_state(self, state: State, error: str | None = None) -> None:
        """Say what the run does from now on, and why it failed."""
        with self._database.write() as database:
            database.executemany(
                "INSERT OR REPLACE INTO run VALUES (?, ?)",
                [("state", state), ("error", error), ("since", self.clock())],
            )

    def _set(self, device: str, column: Literal["failure", "strikes"], to: object) -> None:
        with self._database.write() as database:
            database.execute(f"UPDATE devices SET {column} = ? WHERE id = ?", (to, device))  # noqa: S608


def _insert_slots(database: sqlite3.Connection, start: int, stop: int) -> list[str]:
    """Make slots start..stop-1. The width of ids stays that of the first slots."""
    width = _get(database, "width") or max(2, len(str(max(stop - 1, 0))))
    database.execute("INSERT OR IGNORE INTO run VALUES ('width', ?)", (width,))
    made = [(slot, f"device-{slot:0{width}}", new_token()) for slot in range(start, stop)]
    database.executemany(
        "INSERT INTO devices (slot, id, token, token_hash) VALUES (?, ?, ?, ?)",
        [(slot, device, token, digest(token)) for slot, device, token in made],
    )
    return [device for _, device, _ in made]


def _get(database: sqlite3.Connection, key: str) -> Any:
    row = database.execute("SELECT value FROM run WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]


def _row(database: sqlite3.Connection, device: str) -> DeviceRow:
    row = database.execute(
        f"SELECT {_COLUMNS} FROM devices WHERE id = ?",  # noqa: S608
        (device,),
    ).fetchone()
    if row is None:
        raise StoreError(
            "there is no such device",
            got=repr(device),
            allowed="an id that `splitfrozen status` shows",
            remedy="look there",
        )
    return _parse(row)


def _parse(row: tuple[object, ...]) -> DeviceRow:
    fields = dict(zip(DeviceRow.__slots__, row, strict=True))
    for key, kind in (
        ("announcement", Announcement),
        ("profile", DeviceProfile),
        ("report", DeviceReport),
    ):
        data = fields[key]
        if isinstance(data, bytes):
            fields[key] = msgspec.msgpack.decode(data, type=kind)
    depths = msgspec.json.decode(str(fields["depths"]), type=tuple[int, ...])
    known = {"revoked": bool(fields["revoked"]), "depths": depths}
    return DeviceRow(**fields | known)  # type: ignore[arg-type]


def _unknown(what: str, allowed: str) -> UnknownCredentialError:
    return UnknownCredentialError(
        f"the {what} is unknown",
        got=f"a {what} that this run did not give",
        allowed=allowed,
        remedy="ask the operator for a new join string",
    )


def _revoked(device: str) -> RefusedError:
    return RefusedError(
        f"{device} was removed from this run",
        got="a request of it",
        allowed="devices that take part",
        remedy="ask the operator for a new join string",
    )
