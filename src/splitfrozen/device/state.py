"""What a device remembers between starts, in a folder of its own.

    lock                 held by the process that is this device
    identity.json        the secret that makes it this device: readable by its owner only
    announcement.json    what it said that it would send
    profile.json         what the probe measured, so that the answer is the same after a restart
    files/               downloads, each named by its sha256
    fronts/HASH/         the files of a front under their names (hard links into files/)

What the server has stored is not in here: the server is asked.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from splitfrozen.disk import write_whole
from splitfrozen.errors import RefusedError, RequestError, StoreError
from splitfrozen.records import FrontManifest, Message

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_MessageT = TypeVar("_MessageT", bound=Message)


class Identity(Message, frozen=True):
    """Who the device is; `device` is None until the server has answered the first enrolment."""

    secret: str
    device: str | None = None


def state_folder(parent: Path | None, fingerprint: str, token: str) -> Path:
    """Return the folder of the device that a join string makes, under `parent` or the user's data.

    It follows from the join string, so the same command finds it again and two join strings never
    share one.
    """
    if parent is None:
        data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
        parent = Path(data).expanduser() / "splitfrozen"
    return parent / f"{fingerprint[:12]}-{hashlib.sha256(token.encode()).hexdigest()[:12]}"


class DeviceState:
    """The folder, held by one process. Made by `hold`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"

    def identity(self) -> Identity:
        """Return who the device is; a new one is on disk before it is returned."""
        known = self.read("identity", Identity)
        if known is None:
            known = Identity(secret=secrets.token_urlsafe(32))
            self.write("identity", known)
        return known

    def read(self, name: str, kind: type[_MessageT]) -> _MessageT | None:
        """Return what `write` kept under `name`, or None. Raises StoreError."""
        path = self.folder / f"{name}.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise StoreError(
                f"{path} cannot be read",
                got=str(error),
                allowed=f"the {name} that an earlier start wrote",
                remedy="restore the file, or ask for a new join string",
            ) from error

    def write(self, name: str, message: Message) -> None:
        """Keep a message, durably and whole or not at all. Raises StoreError."""
        path = self.folder / f"{name}.json"
        write_whole(path, msgspec.json.encode(message), mode=0o600)

    def front_folder(self, manifest: FrontManifest) -> Path:
        """Return a folder that holds the downloaded files of a front under their names.

        Raises RefusedError for a name that is no plain file name, StoreError.
        """
        for name in (ref.name for ref in manifest.files):
            if name in (".", "..") or Path(name).name != name:
                raise RefusedError(
                    "the server names a file that is none",
                    got=repr(name),
                    allowed="a plain file name",
                    remedy="tell who runs the server",
                )
        folder = self.folder / "fronts" / manifest.hash
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for ref in manifest.files:
                _place(self.files / ref.sha256, folder / ref.name)
        except OSError as error:
            raise _unusable(folder, error) from error
        return folder


@contextmanager
def hold(folder: Path) -> Iterator[DeviceState]:
    """Hold a state folder, making it where it is missing; it is readable by its owner only.

    Raises RequestError where another process holds it, StoreError where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / "files").mkdir(exist_ok=True)
        lock = (folder / "lock").open("a+b")
    except OSError as error:
        raise _unusable(folder, error) from error
    with lock:
        try:
            _lock(lock)
        except OSError as error:
            raise RequestError(
                "this device is running already",
                got=f"{folder} is held by another process",
                allowed="one process a join string",
                remedy="stop the other one, or use another join string",
            ) from error
        yield DeviceState(folder)


def _lock(file: IO[bytes]) -> None:
    """Take a lock that ends with the process, however that ends."""
    if sys.platform == "win32":
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _place(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # A file system without hard links.
        shutil.copyfile(source, target)


def _unusable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"the state folder {folder} cannot be written",
        got=error.strerror or str(error),
        allowed="a folder on a local disk with free space",
        remedy="free space or choose another --state folder",
    )
