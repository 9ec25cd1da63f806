"""The run folder: everything that a run is made of, so that it can be killed and continued.

config.json      the run as it was started       registry.sqlite  devices and the run's state
prepared.json    fronts, task, hashes            store/           activations of the devices
address.json     host and port devices use       evaluation/      activations of the eval data
join.txt         join strings not yet used       training/        checkpoint, best/ and last/
tls/             certificate and key             metrics.jsonl    one event a line
files/           fronts, tokenizer, side data    curves.png       the same, drawn
tokenizer/       the tokenizer, as exported      events.jsonl     who did what, and when
forecast.json    seconds and bytes expected      run.log          of all processes
*.lock           who is at work
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import msgspec

from splitfrozen import config
from splitfrozen.config import Config
from splitfrozen.disk import write_whole
from splitfrozen.errors import ConfigError, RequestError, StoreError, WireError
from splitfrozen.records import Codecs, Prepared
from splitfrozen.server.registry import Registry
from splitfrozen.wire.codec import TensorCodec, codec
from splitfrozen.wire.join import JoinString
from splitfrozen.wire.side import Side

STOPPED = 3
"""Exit code of a worker that was asked to stop; calling it again continues."""
NO_SPACE = 4
"""Exit code of a worker that found the disk full; calling it again, later, continues."""
LONGEST_NAME = 100
"""Every frame carries the run's name, and its header bounds it."""
MOVABLE = {("model", "name"), ("task", "eval"), ("data", "train"), ("wire", "public")}
"""Paths that may change with the project's folder: the content of what is there is compared."""

MEASURED = ("metrics.jsonl", "curves.png", "events.jsonl")
"""What a training writes beside its results; one that begins anew begins these anew."""

_StructT = TypeVar("_StructT", bound=msgspec.Struct)


class Address(msgspec.Struct, frozen=True):
    """Where devices find the run, and the certificate's fingerprint."""

    host: str
    port: int
    fingerprint: str

    def join(self, token: str) -> str:
        """The join string of a token. Raises ConfigError where devices cannot be told the host."""
        try:
            return str(JoinString(token, self.host, self.port, self.fingerprint))
        except RequestError as error:
            raise ConfigError(
                "no join string can be made of this machine's address",
                got=error.got,
                allowed=error.allowed,
                remedy="set server.name to a name or address that devices reach",
            ) from error


def side_name(digest: str) -> str:
    """Name of the file with side data, by the sha256 of its content or the beginning of that."""
    return f"side-{digest[:16]}.bin"


class RunFolder:
    """Paths and small files of one run; `root` exists and has a config."""

    def __init__(self, root: Path) -> None:
        """Open a run. Raises StoreError where there is none, or a damaged one."""
        self.root = root
        path = root / "config.json"
        if not path.is_file():
            raise _no_run(root, "no config.json in it")
        data = path.read_bytes()
        remedy = "restore it from a copy, or give the run another folder"
        try:
            table = msgspec.json.decode(data, type=dict[str, Any])
            self.config: Config = config.undump(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _damaged(path, str(error), remedy) from error
        except ConfigError as error:
            if "devices" in table:
                raise _damaged(path, f"{error.what}: {error.got}", remedy) from error
            # Models have a file of that name too.
            raise _no_run(root, "another config.json in it") from error

    @classmethod
    def create(cls, wanted: Config) -> RunFolder:
        """Make the folder, or open it where it exists already with the same config.

        [server] may differ, and so may the folders of the files in MOVABLE, as projects
        are moved. For as long as no device has enrolled the rest may too, so that who misspelt a
        model or a path starts the same run again: it is prepared anew. But not the number of join
        strings, once they were given out.

        Raises ConfigError that names the keys which differ.
        """
        root = wanted.folder
        if len(root.name) > LONGEST_NAME:
            raise ConfigError(
                "`run.folder` has too long a name",
                got=f"{len(root.name)} characters",
                allowed=f"at most {LONGEST_NAME} in its last part",
                remedy="choose another run.folder",
            )
        try:
            if not (root / "config.json").exists():
                root.mkdir(parents=True, exist_ok=True)
                root.chmod(0o700)
                write_whole(root / "config.json", config.dump(wanted))
        except OSError as error:
            raise ConfigError(
                "`run.folder` cannot be made",
                got=f"{root}: {error.strerror}",
                allowed="a folder that this user may make and write",
                remedy="choose another run.folder",
            ) from error
        folder = cls(root)
        changed = _differences(folder.config, wanted)
        slots = folder._slots() if changed else []
        if ("devices.count" in changed and slots) or any(slots):
            raise ConfigError(
                f"{root} holds a run that was started otherwise",
                got=f"another {', '.join(changed)}",
                allowed="the same config ([server] may change)",
                remedy="undo the change, or give the new run its own run.folder",
            )
        if folder.config != wanted and folder._idle():
            if changed:
                folder._forget_preparation()
            write_whole(root / "config.json", config.dump(wanted))
            folder.config = wanted
        return folder

    def _idle(self) -> bool:
        return self.holder("serve") is None and self.holder("worker") is None

    def _slots(self) -> list[bool]:
        """For each join string that was given out, whether its device works with what it was
        told."""
        if not (self.root / "registry.sqlite").exists():
            return []
        with closing(Registry(self.root)) as registry:
            return [row.enrolled_at is not None for row in registry.devices()]

    def _forget_preparation(self) -> None:
        """Delete what was made of another config. What is in `files` is named by its content."""
        for name in ("evaluation", "training", "tokenizer"):
            if (self.root / name).exists():
                shutil.rmtree(self.root / name)
        for name in ("prepared.json", "forecast.json", *MEASURED):
            (self.root / name).unlink(missing_ok=True)

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def command(self) -> Literal["serve", "train"]:
        """What continues the run: `train` where it was prepared without fronts for devices."""
        prepared = self.prepared()
        return "serve" if prepared is None or prepared.fronts else "train"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def files(self) -> Path:
        return self.root / "files"

    @cached_property
    def codecs(self) -> Codecs:
        """The run's codecs, with their side data where they have any. Raises as `records.Codecs`,
        and StoreError."""

        @cache
        def named(name: str) -> TensorCodec:
            _, _, digest = name.partition("@")
            return codec(name, self._side(digest) if digest else None)

        return named

    def _side(self, digest: str) -> Side:
        path = self.files / side_name(digest)
        try:
            found = Side.from_bytes(path.read_bytes())
            problem = "" if found.sha256.startswith(digest) else "other content than its name says"
        except (OSError, WireError) as error:
            problem = str(error)
        if problem:
            remedy = "restore it from a copy, or give the run another folder"
            raise _damaged(path, problem, remedy)
        return found

    @property
    def training(self) -> Path:
        """What training wrote; without it the run trains anew."""
        return self.root / "training"

    @property
    def begun(self) -> bool:
        """Whether training has begun, that is, whether its samples are fixed."""
        return any((self.training / name).exists() for name in ("roster.json", "announced.json"))

    def forget_training(self) -> None:
        """Delete what was trained and measured, so that the run trains anew."""
        shutil.rmtree(self.training)
        for name in MEASURED:
            (self.root / name).unlink(missing_ok=True)

    def address(self) -> Address | None:
        """Where it was served last; None before it was. Raises StoreError."""
        return self._made_again("address.json", Address)

    def write_address(self, address: Address) -> None:
        write_whole(self.root / "address.json", msgspec.json.encode(address))

    def adapter(self, which: str) -> Path:
        """Folder of the adapter: "best", or "last" where nothing was evaluated.

        Raises StoreError where there is none yet.
        """
        for name in (which, "last"):
            if (self.training / name / "adapter_config.json").is_file():
                return self.training / name
        raise StoreError(
            f"{self.root} has no adapter yet",
            got="a run that has not finished an epoch",
            allowed="one that has",
            remedy=f"see: splitfrozen status {self.root}",
        )

    def prepared(self) -> Prepared | None:
        """What `prepare` wrote; None before that. Raises StoreError."""
        return self._made_again("prepared.json", Prepared)

    def _made_again(self, name: str, kind: type[_StructT]) -> _StructT | None:
        """Read a file that `serve` and `train` make where it is missing."""
        path = self.root / name
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            remedy = "delete it and give the command that began the run; it is made again"
            raise _damaged(path, str(error), remedy) from error

    def write_prepared(self, prepared: Prepared) -> None:
        write_whole(self.root / "prepared.json", msgspec.json.encode(prepared))

    def report(self, event: dict[str, Any]) -> None:
        """Append one event to metrics.jsonl; NaN and infinity become null."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in event.items()
        }
        with (self.root / "metrics.jsonl").open("ab+") as file:
            # A line that a crash cut short must not swallow this one.
            before = "\n" if _torn(file) else ""
            file.write(f"{before}{json.dumps(clean, allow_nan=False)}\n".encode())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, oldest first; what a crash cut short or damaged is left out."""
        path = self.root / "metrics.jsonl"
        found = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and event.get("event") == kind:
                found.append(event)
        return found

    @contextmanager
    def lock(self, role: str, patience_s: float = 0.5) -> Iterator[None]:
        """Hold the run for one process of this role; the file carries its process id.

        Raises StoreError where another process holds it for longer than `patience_s`; `holder`
        does for a moment. The kernel drops the lock with the process, so a killed one leaves
        nothing behind.
        """
        end = time.monotonic() + patience_s
        with (self.root / f"{role}.lock").open("a+") as file:
            while not _flock(file, fcntl.LOCK_EX):
                if time.monotonic() > end:
                    raise StoreError(
                        f"{self.root} is in use",
                        got=f"a `{role}` process with id {self.holder(role)}",
                        allowed="one at a time",
                        remedy=f"run: splitfrozen stop {self.root}",
                    )
                time.sleep(0.02)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
            file.truncate(0)

    def holder(self, role: str) -> int | None:
        """Process id that holds `role`, or None where nobody does."""
        path = self.root / f"{role}.lock"
        if not path.exists():
            return None
        with path.open() as file:
            # Shared, so that two who ask do not take each other for a holder.
            free = _flock(file, fcntl.LOCK_SH)
            return None if free else int(file.read() or 0) or None


def _flock(file: IO[str], kind: int) -> bool:
    """Lock a file until it is closed; False where another process has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _torn(file: IO[bytes]) -> bool:
    """Whether the last line lacks its end."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _damaged(path: Path, got: str, remedy: str) -> StoreError:
    return StoreError(
        f"{path} is damaged", got=got, allowed="the file as splitfrozen wrote it", remedy=remedy
    )


def _no_run(root: Path, got: str) -> StoreError:
    return StoreError(
        f"{root} is not a run folder",
        got=got,
        allowed="a folder made by `splitfrozen serve`",
        remedy="name the run's folder, or start it with its TOML file",
    )


def _differences(old: Config, new: Config) -> list[str]:
    before, after = msgspec.to_builtins(old), msgspec.to_builtins(new)
    sections = [name for name in before if name != "server" and before[name] and after[name]]
    only_one = [name for name in before if bool(before[name]) != bool(after[name])]
    return only_one + [
        f"{section}.{key}"
        for section in sections
        for key in before[section]
        if (section, key) != ("run", "folder")
        and not ((section, key) in MOVABLE and _moved(before[section][key], after[section][key]))
        and before[section][key] != after[section][key]
    ]


def _moved(old: str | None, new: str | None) -> bool:
    """Whether both are absolute paths that end alike."""
    return (
        old is not None
        and new is not None
        and Path(old).is_absolute()
        and Path(new).is_absolute()
        and Path(old).name == Path(new).name
    )
