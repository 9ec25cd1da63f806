"""The activation store: every sample once, by (device, sample id), on a local disk.

    index.sqlite                        which sample is where; SQLite's log makes it durable
    segments/<device>/d<depth>-<id>.seg the bytes, as they were received

A sample counts as stored when its bytes and then its index row are on disk. The first stored
wins: whatever comes later under the same key changes nothing, even when its bytes differ (a device
whose runtime was upgraded sends other last bits), also after the sample was lifted. Several
processes and threads may add, read and replace at once; to open a store changes nothing in it.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from splitfrozen.disk import explained
from splitfrozen.errors import StoreError, WireError
from splitfrozen.records import (
    Activation,
    Codecs,
    EncodedSample,
    FrameHeader,
    Receipt,
    SampleKey,
    SampleTable,
)
from splitfrozen.server.database import Database
from splitfrozen.server.index import (
    SCHEMA,
    VERSION,
    PurgedError,
    VanishedError,
    all_samples,
    commit_chunk,
    commit_lifted,
    device_number,
    find_device,
    find_sample,
    known_samples,
    new_segment,
    newest_segment,
)
from splitfrozen.server.segments import (
    Kind,
    OpenSegment,
    Place,
    locked,
    read_place,
    segment_path,
)
from splitfrozen.wire.codec import codec

CrashPoint = Literal[
    "segment opened",
    "payload written",
    "payload synced",
    "index written",
    "index committed",
    "lifted written",
    "lifted synced",
    "lifted indexed",
    "lifted committed",
    "segment unlinked",
    "purge committed",
    "purge unlinked",
]
"""Moments between the steps that reach the disk; tests kill the process there."""

CRASH_POINTS: tuple[CrashPoint, ...] = get_args(CrashPoint)
READ_ATTEMPTS = 8
SEGMENT_BYTES = 256 << 20

_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True, slots=True)
class Totals:
    """What was received of one device; lifting changes none of it. `bytes` are payload bytes."""

    samples: int
    tokens: int
    bytes: int


class Store:
    """An `ActivationStore` on disk that also receives chunks."""

    def __init__(
        self,
        folder: Path,
        at: Callable[[CrashPoint], None] = lambda _: None,
        segment_bytes: int = SEGMENT_BYTES,
        codecs: Codecs = codec,
    ) -> None:
        """Open or create the store in `folder`.

        Args:
            folder: on a local disk; made if missing.
            at: called at each crash point.
            segment_bytes: a segment that has reached this length gets no more samples.
            codecs: of the run, by the names that chunks carry.

        Raises:
            StoreError: a network file system, another version, or no permission.
        """
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._segments = folder / "segments"
        self._at = at
        self._segment_bytes = segment_bytes
        self._codecs = codecs
        self._index = Database(folder / "index.sqlite", SCHEMA, VERSION)

    def close(self) -> None:
        """Close the index; what was acknowledged is on disk already."""
        self._index.close()

    def recover(self) -> None:
        """Delete files that the index does not know: a crash came between row and file.

        For who serves the run, at its start; others may use the store meanwhile. Files are
        listed before rows are read, and a row is there before its file, so a file that another
        process has just made is never taken for a dead one. Raises StoreError.
        """
        with explained(self._segments):
            files = list(self._segments.glob("*/*.seg"))
            with self._index.read() as index:
                (known,) = index.execute("SELECT count(*) FROM devices").fetchone()
                if files and not known:
                    raise _no_index(self._segments)
                rows = index.execute(
                    "SELECT name, depth, segments.id FROM segments "
                    "JOIN devices ON devices.id = device"
                )
                alive = {segment_path(self._segments, *row) for row in rows}
            for path in files:
                if path not in alive:
                    path.unlink(missing_ok=True)

    # --- receiving ---------------------------------------------------------------------------

    def add(self, header: FrameHeader, sha256: str, samples: Sequence[EncodedSample]) -> Receipt:
        """Store a chunk; when this returns it survives a power cut.

        Every sample is decoded before anything is written, so what is in the store can be read.

        Args:
            header: of the frame; device, index, depth, width and codec are kept.
            sha256: of the frame, kept for the record.
            samples: as unpacked from the frame.

        Raises:
            WireError: a sample that does not decode to finite values, or is there twice.
            RefusedError: the device was purged.
            DiskFullError, StoreError: nothing was stored.
        """
        _refuse_unreadable(header, samples, self._codecs)
        while True:
            fresh = self._fresh(header, samples)
            if fresh is None:
                return Receipt(index=header.index, stored=0)
            try:
                return self._append(header, sha256, fresh)
            except VanishedError:
                continue

    def chunks(self, device: str) -> set[int]:
        """Indices of the chunks of a device that are stored."""
        with self._index.read() as index:
            rows = index.execute(
                "SELECT number FROM chunks WHERE device = (SELECT id FROM devices WHERE name = ?)",
                (device,),
            )
            return {number for (number,) in rows}

    def totals(self) -> dict[str, Totals]:
        """What was received of each device, kept as sums: cheap however much is stored."""
        with self._index.read() as index:
            rows = index.execute(
                "SELECT name, samples, tokens, bytes FROM devices WHERE NOT purged ORDER BY name"
            )
            return {name: Totals(*sums) for name, *sums in rows}

    def purge(self, device: str) -> None:
        """Delete everything of a device and refuse it from now on. Raises StoreError."""
        _check_name(device)
        with self._index.write() as index:
            number = device_number(index, device)
            index.execute(
                "UPDATE devices SET purged = 1, samples = 0, tokens = 0, bytes = 0 WHERE id = ?",
                (number,),
            )
            index.execute("DELETE FROM samples WHERE device = ?", (number,))
            index.execute("DELETE FROM chunks WHERE device = ?", (number,))
            index.execute("DELETE FROM segments WHERE device = ?", (number,))
        self._at("purge committed")
        self.recover()
        self._at("purge unlinked")

    def _fresh(
        self, header: FrameHeader, samples: Sequence[EncodedSample]
    ) -> list[EncodedSample] | None:
        """Samples that are not stored yet; None where the whole chunk is known."""
        with self._index.read() as index:
            number = find_device(index, header.device)
            if number is None:
                return list(samples)
            known = known_samples(index, number, [sample.sample for sample in samples])
            seen = index.execute(
                "SELECT 1 FROM chunks WHERE device = ? AND number = ?", (number, header.index)
            ).fetchone()
        fresh = [sample for sample in samples if sample.sample not in known]
        return None if seen and not fresh else fresh

    def _append(
        self, header: FrameHeader, sha256: str, samples: Sequence[EncodedSample]
    ) -> Receipt:
        kind = Kind(header.depth, header.width, header.codec)
        with self._open(header.device, kind) as segment:
            self._at("segment opened")
            places = {
                sample.sample: segment.append(sample.payload, sample.tokens, sample.targets)
                for sample in samples
            }
            self._at("payload written")
            segment.sync()
            self._at("payload synced")
            with self._index.write() as index:
                stored = commit_chunk(index, header, sha256, segment, places)
                self._at("index written")
        self._at("index committed")
        return Receipt(index=header.index, stored=stored)

    # --- training ----------------------------------------------------------------------------

    def samples(self) -> SampleTable:
        """Everything stored, sorted by key, as columns."""
        with self._index.read() as index:
            return all_samples(index)

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        """Activations in the order of `keys`; at most these are in memory.

        Raises:
            StoreError: a sample that is not stored, or whose bytes are damaged; it is named.
        """
        found: dict[SampleKey, Activation] = {}
        for _ in range(READ_ATTEMPTS):
            places = self._locate([key for key in keys if key not in found])
            for (device, kind, number), wanted in places.items():
                path = segment_path(self._segments, device, kind.depth, number)
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except FileNotFoundError:
                    # Lifting has just deleted it; the index knows by now where the samples went.
                    continue
                try:
                    for key, place in wanted:
                        found[key] = self._load(descriptor, key, kind, place)
                finally:
                    os.close(descriptor)
            if len(found) == len(set(keys)):
                return [found[key] for key in keys]
        raise _damaged(next(key for key in keys if key not in found), "its file is missing")

    def replace(self, device: str, activations: Iterable[Activation]) -> None:
        """Put lifted activations in the place of the shallow ones, all at once.

        They are written with the lifted form of the codec that the sample came with. One that is
        not shallower in the store, or was purged meanwhile, is left out. One process lifts a
        device at a time; memory holds one activation.

        Raises:
            DiskFullError, StoreError: nothing was replaced. Also where an activation is too large
                for its lifted form.
        """
        with ExitStack() as held:
            try:
                used, written = self._write_lifted(device, activations, held)
                self._at("lifted written")
                for segment in used:
                    segment.sync()
                self._at("lifted synced")
                with self._index.write() as index:
                    dead = commit_lifted(index, device, used, written)
                    self._at("lifted indexed")
            except (VanishedError, PurgedError):
                return
        self._at("lifted committed")
        for number, depth in dead:
            with explained(self._segments):
                segment_path(self._segments, device, depth, number).unlink(missing_ok=True)
            self._at("segment unlinked")

    def _write_lifted(
        self, device: str, activations: Iterable[Activation], held: ExitStack
    ) -> tuple[list[OpenSegment], list[tuple[int, Place]]]:
        """Append to segments that stay locked until `held` ends: none may cut off our tail."""
        segments: dict[Kind, list[OpenSegment]] = defaultdict(list)
        written = []
        for activation in activations:
            kind = self._lifted_kind(device, activation)
            if kind is None:
                continue
            opened = segments[kind]
            if not opened or opened[-1].end >= self._segment_bytes:
                # The full one is ours and not committed: the index would offer it again.
                opened.append(held.enter_context(self._open(device, kind, fresh=bool(opened))))
            payload = self._lifted_bytes(device, kind, activation)
            place = opened[-1].append(payload, len(activation.hidden), activation.targets)
            written.append((activation.sample, place))
        return [segment for opened in segments.values() for segment in opened], written

    def _lifted_bytes(self, device: str, kind: Kind, activation: Activation) -> bytes:
        """What int8 and the like carry may be too large for the form of what is lifted."""
        try:
            return self._codecs(kind.codec).encode(activation.hidden)
        except WireError as error:
            raise StoreError(
                f"sample {activation.sample} of {device} cannot be kept as lifted",
                got=error.got,
                allowed=f"{kind.codec}: {error.allowed}",
                remedy=f"`splitfrozen purge RUN --device {device}` lets the run go on; a model "
                'with such activations of its own needs a run with `wire.codec` "bfloat16"',
            ) from error

    def _lifted_kind(self, device: str, activation: Activation) -> Kind | None:
        """The form of a lifted sample; None where it must not replace what is stored."""
        with self._index.read() as index:
            found = find_sample(index, device, activation.sample)
        if found is None or found[0].depth >= activation.depth:
            return None
        lifted = self._codecs(found[0].codec).lifted
        return Kind(activation.depth, activation.hidden.shape[1], lifted)

    def _locate(
        self, keys: Sequence[SampleKey]
    ) -> dict[tuple[str, Kind, int], list[tuple[SampleKey, Place]]]:
        """Places of samples, by segment and in the order of the file."""
        found = defaultdict(list)
        with self._index.read() as index:
            for key in keys:
                row = find_sample(index, key.device, key.sample)
                if row is None:
                    raise _damaged(key, "it is not stored")
                kind, place = row
                found[key.device, kind, place.segment].append((key, place))
        for wanted in found.values():
            wanted.sort(key=lambda one: one[1].offset)
        return found

    def _load(self, descriptor: int, key: SampleKey, kind: Kind, place: Place) -> Activation:
        found = read_place(descriptor, place)
        if found is None:
            raise _damaged(key, f"other bytes at {place.offset} of its file than were written")
        payload, targets = found
        hidden = self._codecs(kind.codec).decode(payload, place.tokens, kind.width)
        return Activation(sample=key.sample, depth=kind.depth, hidden=hidden, targets=targets)

    # --- segments ----------------------------------------------------------------------------

    @contextmanager
    def _open(self, device: str, kind: Kind, fresh: bool = False) -> Iterator[OpenSegment]:
        """The segment that takes the next activations of this kind, locked and without a tail."""
        _check_name(device)
        while True:
            number = None
            if not fresh:
                with self._index.read() as index:
                    number = newest_segment(index, device, kind, self._segment_bytes)
            if number is None:
                with self._index.write() as index:
                    number = new_segment(index, device, kind)
            path = segment_path(self._segments, device, kind.depth, number)
            with locked(path) as descriptor:
                with self._index.read() as index:
                    row = index.execute("SELECT bytes FROM segments WHERE id = ?", (number,))
                    committed = row.fetchone()
                if committed is None:
                    # Deleted while we waited for the lock; our opening may have made it anew.
                    path.unlink(missing_ok=True)
                    continue
                if committed[0] >= self._segment_bytes:
                    continue
                segment = OpenSegment(number, path, descriptor, committed[0])
                segment.undo()
                try:
                    yield segment
                except Exception:
                    segment.undo()
                    raise
                return


def _refuse_unreadable(
    header: FrameHeader, samples: Sequence[EncodedSample], codecs: Codecs
) -> None:
    _check_name(header.device)
    decoder = codecs(header.codec)
    if len({sample.sample for sample in samples}) != len(samples):
        raise WireError(
            f"chunk {header.index} of {header.device} has a sample twice",
            got=f"{len(samples)} samples",
            allowed="each sample once",
            remedy="upgrade the device",
        )
    for sample in samples:
        decoder.decode(sample.payload, sample.tokens, header.width)


def _no_index(segments: Path) -> StoreError:
    return StoreError(
        f"{segments} holds activations that no index knows",
        got="a new index.sqlite",
        allowed="the index that was written with them",
        remedy="restore index.sqlite; or delete the segments, and devices that join send again",
    )


def _check_name(device: str) -> None:
    """Names become folders, so they are checked here whoever calls."""
    if not _DEVICE.fullmatch(device):
        raise WireError(
            "this is no device id",
            got=repr(device[:120]),
            allowed="letters, digits, - and _",
            remedy="use the id that enrolment gave",
        )


def _damaged(key: SampleKey, got: str) -> StoreError:
    return StoreError(
        f"sample {key.sample} of {key.device} cannot be read",
        got=got,
        allowed="every stored sample whole",
        remedy=f"check the disk; `splitfrozen purge RUN --device {key.device}` lets the run go on",
    )
