"""Files that are there whole or not at all, also after a power cut, and errors that say what to do.

A file is written beside its place under a name of its own, synced, renamed, and the folder synced:
a reader finds the old one or the new one.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from splitfrozen.errors import DiskFullError, StoreError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_whole(
    path: Path,
    data: bytes,
    *,
    mode: int = 0o644,
    check: Callable[[Path], object] = lambda _: None,
) -> None:
    """Put `data` in place of the file at `path`.

    Args:
        path: its folder exists.
        data: the whole content.
        mode: permissions of the new file.
        check: called with the synced draft, which has the ending of `path` and lies beside it; it
            raises to keep the file from getting its name.

    Raises:
        DiskFullError, StoreError: what was there before is there still.
    """
    with explained(path):
        # Made readable for its owner only; `mode` is given before it gets its name.
        descriptor, name = tempfile.mkstemp(suffix=path.suffix, prefix=".", dir=path.parent)
        draft = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            check(draft)
            draft.chmod(mode)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` durable (POSIX; elsewhere the system sees to it)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn OSError into StoreError, or DiskFullError where space is what is missing."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(path) from error
        raise StoreError(
            f"{path} cannot be used",
            got=error.strerror or repr(error),
            allowed="a place on a local disk that this process may read and write",
            remedy="check the disk and the permissions there",
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder where files will be written, and try it. Raises StoreError."""
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def disk_full(path: Path) -> DiskFullError:
    """The error for a disk on which `path` finds no space."""
    return DiskFullError(
        f"no space is left for {path}",
        got="a full disk",
        allowed="free space for what is written",
        remedy="free space; it continues by itself or with the same command",
    )
