"""SQLite as the store and the registry use it: several processes, several threads, durable.

Write-ahead log, `synchronous=FULL` (a committed transaction survives a power cut), short
transactions. A network file system is refused: SQLite's locks do not hold there.

SQLite locks with fcntl, and the kernel drops all such locks of a process on a file when the process
closes any descriptor of that file. Then another process takes its own last connection for the last
of all and deletes the log with what was committed. So nothing here, and nothing else in this
package, may open an existing database but SQLite itself.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splitfrozen.disk import disk_full, explained
from splitfrozen.errors import StoreError

NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "afs"}
)
BUSY_S = 30.0
RETRY_S = 0.01
IDLE_CONNECTIONS = 4
SPARE_BYTES = 1 << 20

_creating = threading.Lock()


class Database:
    """One SQLite file. Connections are pooled; any thread may use any of them."""

    def __init__(self, path: Path, schema: str, version: int) -> None:
        """Open or create. Raises StoreError.

        Args:
            path: of the file; its folder exists.
            schema: statements that create what is missing (IF NOT EXISTS).
            version: of the schema; a file of another version is refused.
        """
        refuse_network_folder(path.parent)
        _create(path)
        self._path = path
        self._idle: list[sqlite3.Connection] = []
        self._pool = threading.Lock()
        # SQLite's own waiting sleeps and is not fair; within a process a lock does better.
        self._writing = threading.Lock()
        with self._connection() as connection:
            found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, version):
            raise StoreError(
                f"{path} was written by another version of splitfrozen",
                got=f"schema {found}",
                allowed=f"schema {version}",
                remedy="use the version that started the run, or a new run folder",
            )
        if found == 0:
            with self.write() as connection:
                for statement in filter(str.strip, schema.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version}")

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection on which all statements see one state of the file."""
        with self._connection() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                # Some errors end the transaction; a second error would hide them.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: durable when the block has ended, without effect when it raised."""
        with self._writing, self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def close(self) -> None:
        """Close the idle connections."""
        with self._pool:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with self._pool:
            connection = self._idle.pop() if self._idle else None
        try:
            connection = connection or self._connect()
            yield connection
        except sqlite3.Error as error:
            raise self._explain(error) from error
        finally:
            if connection is not None:
                self._give_back(connection)

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._pool:
            if len(self._idle) < IDLE_CONNECTIONS and not connection.in_transaction:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            _write_ahead(connection)
            connection.execute("PRAGMA synchronous = FULL")
            # What was deleted (a used token, a purged device) is overwritten.
            connection.execute("PRAGMA secure_delete = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _explain(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        # Where the log cannot grow, SQLite reports an I/O error instead of a full disk.
        starved = code == sqlite3.SQLITE_IOERR and free_bytes(self._path.parent) < SPARE_BYTES
        if code == sqlite3.SQLITE_FULL or starved:
            return disk_full(self._path)
        return StoreError(
            f"{self._path} cannot be used",
            got=str(error),
            allowed="a database that this process may read and write",
            remedy="check the disk and the permissions of the run folder",
        )


def _create(path: Path) -> None:
    """Make an empty file, as the registry keeps join tokens: only its owner may read it.

    One that exists is not opened. The lock keeps a second thread from opening it with SQLite before
    the first has closed it here.
    """
    with _creating, explained(path), suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log, waiting for others that read or switch.

    The first switch of a new file needs the file alone, and SQLite does not wait for that:
    of two processes that create one database one is told at once that it is locked.
    """
    until = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(RETRY_S)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write."""
    return shutil.disk_usage(folder).free


def refuse_network_folder(folder: Path, mounts: Path = Path("/proc/mounts")) -> None:
    """Raise StoreError where `folder` is on a network file system, as far as `mounts` tells."""
    if not mounts.exists():
        return
    where = folder.resolve()
    best, kind = Path(), ""
    for line in mounts.read_text().split("\n")[:-1]:
        _, point, found, *_ = line.split(" ")
        # Blanks in a mount point are written as octal escapes.
        at = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point))
        # The last of several mounts on one point is the one that is seen.
        if where.is_relative_to(at) and len(at.parts) >= len(best.parts):
            best, kind = at, found
    if kind in NETWORK_FILE_SYSTEMS:
        raise StoreError(
            f"{folder} is on a network file system, where databases break",
            got=f"{kind} at {best}",
            allowed="a local disk",
            remedy="set run.folder to a folder on a local disk",
        )
