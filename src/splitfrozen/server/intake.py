"""What a chunk must be before the store takes it: this device's, of this run, this front, in range.

A device that sends three bad chunks in a row is put in quarantine: it is refused until it starts
anew (its announcement ends it), and the others are not held up by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from splitfrozen.errors import RefusedError, WireError
from splitfrozen.records import (
    IGNORED,
    EncodedSample,
    FrameHeader,
    FrontManifest,
    Prepared,
    Receipt,
)
from splitfrozen.server.registry import DeviceRow, Registry
from splitfrozen.server.store import Store
from splitfrozen.wire.frame import unpack

STRIKES = 3


class Intake:
    """Checks chunks of devices and hands them to the store."""

    def __init__(self, store: Store, registry: Registry, codec: str) -> None:
        self._store = store
        self._registry = registry
        self._codec = codec

    def receive(self, device: str, sha256: str, frame: bytes, prepared: Prepared) -> Receipt:
        """Check and store one chunk.

        Args:
            device: who was authenticated.
            sha256: the address under which it came.
            frame: the body.
            prepared: fronts and task of the run.

        Raises:
            WireError: bytes that are not what they claim, or numbers out of range.
            RefusedError: another run, device, front or codec; no assignment yet; quarantine.
            DiskFullError, StoreError: nothing was stored.
        """
        row = self._registry.device(device)
        if row.strikes >= STRIKES:
            raise RefusedError(
                f"{device} is in quarantine",
                got=f"{row.strikes} bad chunks in a row",
                allowed=f"fewer than {STRIKES}",
                remedy="mend the device and start it again",
            )
        front = next((front for front in prepared.fronts if front.depth == row.depth), None)
        if front is None or row.announcement is None:
            raise RefusedError(
                f"{device} is not ready to send",
                got="a chunk",
                allowed="an announcement and an assignment first",
                remedy="start the device again",
            )
        try:
            header, samples = self._check(row, sha256, frame, front)
            _check_samples(samples, row.announcement.samples, prepared)
            receipt = self._store.add(header, sha256, samples)
        except (WireError, RefusedError):
            self._registry.strike(device)
            raise
        if row.strikes:
            self._registry.forgive(device)
        return receipt

    def _check(
        self, row: DeviceRow, sha256: str, frame: bytes, front: FrontManifest
    ) -> tuple[FrameHeader, list[EncodedSample]]:
        found = hashlib.sha256(frame).hexdigest()
        if found != sha256:
            raise _bad(f"a chunk of {row.id} is not what its address says", found, sha256)
        header, samples = unpack(frame)
        for what, got, expected in (
            ("run", header.run, self._registry.run),
            ("device", header.device, row.id),
            ("front", header.front, front.hash),
            ("depth", header.depth, front.depth),
            ("width", header.width, front.width),
            ("codec", header.codec, self._codec),
        ):
            if got != expected:
                raise RefusedError(
                    f"a chunk of {row.id} is of another {what}",
                    got=got,
                    allowed=str(expected),
                    remedy="start the device again, so that it asks for its assignment",
                )
        return header, samples


def _check_samples(samples: Sequence[EncodedSample], announced: int, prepared: Prepared) -> None:
    task = prepared.task
    limit = task.image_tokens if task.kind == "image" else task.max_tokens
    for sample in samples:
        name = f"sample {sample.sample}"
        if sample.sample >= announced:
            raise _bad(f"{name} was not announced", sample.sample, f"0..{announced - 1}")
        if sample.tokens > limit:
            raise _bad(f"{name} is too long", f"{sample.tokens} tokens", f"at most {limit}")
        if task.kind == "causal_lm":
            _check_next_tokens(name, sample, prepared.vocabulary)
        else:
            _check_label(name, sample, len(task.labels))


def _check_next_tokens(name: str, sample: EncodedSample, vocabulary: int) -> None:
    if len(sample.targets) != sample.tokens:
        raise _bad(f"{name} has wrong targets", len(sample.targets), f"{sample.tokens} of them")
    tokens = sample.targets[sample.targets != IGNORED]
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if len(wrong):
        raise _bad(
            f"{name} has a wrong target", wrong[0], f"0..{vocabulary - 1}, or {IGNORED} for none"
        )


def _check_label(name: str, sample: EncodedSample, classes: int) -> None:
    if len(sample.targets) != 1:
        raise _bad(f"{name} has wrong targets", len(sample.targets), "one label")
    if not 0 <= int(sample.targets[0]) < classes:
        raise _bad(f"{name} has a wrong label", sample.targets[0], f"0..{classes - 1}")


def _bad(what: str, got: object, allowed: str) -> WireError:
    return WireError(what, got=got, allowed=allowed, remedy="check the device's data and version")
