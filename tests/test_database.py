"""SQLite as the server uses it: other processes look, and nothing that was committed is lost."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitfrozen.errors import StoreError
from splitfrozen.server.database import Database

SCHEMA = "CREATE TABLE IF NOT EXISTS kept (number INTEGER PRIMARY KEY)"

OPEN = """
import sys
from pathlib import Path
from splitfrozen.server.database import Database

database = Database(Path(sys.argv[1]), sys.argv[2], 1)

def put(number):
    with database.write() as connection:
        connection.execute("INSERT INTO kept VALUES (?)", (number,))

def kept():
    with database.read() as connection:
        return [number for (number,) in connection.execute("SELECT number FROM kept")]
"""

SERVE = """
put(1)
# As two requests at once: both connections stay open, idle.
with database.read(), database.read():
    pass
for line in sys.stdin:
    put(int(line))
    print("committed", flush=True)
"""

LOOK = "print(kept())\ndatabase.close()"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.sqlite"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    opened = Database(path, SCHEMA, 1)
    yield opened
    opened.close()


def look(path: Path) -> str:
    """What a process sees that opens the database, reads and closes, as `status` does."""
    command = [sys.executable, "-c", OPEN + LOOK, str(path), SCHEMA]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_file_that_another_process_is_writing_for_the_first_time_is_waited_for(
    path: Path,
) -> None:
    # SQLite itself does not wait here: the file is not yet in write-ahead mode, and has a writer.
    creator = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    creator.execute("BEGIN IMMEDIATE")
    other = sqlite3.connect(path, timeout=10)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("PRAGMA journal_mode = WAL")
    other.close()
    done = threading.Timer(0.1, lambda: creator.execute("COMMIT"))
    done.start()
    database = Database(path, SCHEMA, 1)
    done.join()
    with database.read() as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)
    database.close()
    creator.close()


def test_who_looks_and_closes_takes_nothing_from_who_serves(path: Path) -> None:
    """Their last connection must not be taken for the last of all, which deletes the log."""
    command = [sys.executable, "-c", OPEN + SERVE, str(path), SCHEMA]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as serving:  # type: ignore[call-overload]

        def commit(number: int) -> None:
            serving.stdin.write(f"{number}\n")
            serving.stdin.flush()
            assert serving.stdout.readline() == "committed\n"

        commit(2)
        for number in (3, 4):
            assert look(path) == str(list(range(1, number)))
            assert sorted(one.name for one in path.parent.iterdir()) == [
                "some.sqlite",
                "some.sqlite-shm",
                "some.sqlite-wal",
            ]
            commit(number)
        serving.kill()
        serving.wait(60)
    assert look(path) == "[1, 2, 3, 4]"


def test_only_its_owner_may_read_it(database: Database, path: Path) -> None:
    with database.write() as connection:
        connection.execute("INSERT INTO kept VALUES (1)")
    modes = {one.name: one.stat().st_mode & 0o777 for one in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}, modes


def test_what_went_wrong_is_told_also_where_sqlite_ended_the_transaction(
    database: Database,
) -> None:
    with database.write() as connection:
        connection.execute("INSERT INTO kept VALUES (1)")
    with pytest.raises(StoreError, match="UNIQUE constraint failed"), database.read() as connection:
        connection.execute("INSERT OR ROLLBACK INTO kept VALUES (1)")
    with database.read() as connection:
        assert connection.execute("SELECT number FROM kept").fetchall() == [(1,)]


def test_a_folder_that_may_not_be_written_is_explained(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere/some\.sqlite cannot be used"):
        Database(tmp_path / "nowhere" / "some.sqlite", SCHEMA, 1)
