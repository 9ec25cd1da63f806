"""What a chunk must be before the store takes it: this device's, of this run, this front, in range.

A device that sends three bad chunks in a row is put in quarantine: it is refused until it starts
anew (its announcement ends it), and the others are not held up by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import msgspec

from splitfrozen.errors import RefusedError, WireError
from splitfrozen.records import IGNORED, EncodedSample, FrameHeader, Prepared, Receipt, TaskSpec
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store
from splitfrozen.wire.frame import Origin, unpack

STRIKES = 3


@dataclass(frozen=True, slots=True)
class Upload:
    """What came: from whom (authenticated), the address under which it came, the body."""

    device: str
    sha256: str
    frame: bytes


def receive(upload: Upload, store: Store, registry: Registry, prepared: Prepared) -> Receipt:
    """Check and store one chunk.

    Args:
        upload: the chunk.
        store, registry: of the run.
        prepared: fronts, codec and task of the run.

    Raises:
        WireError: bytes that are not what they claim, or numbers out of range.
        RefusedError: another run, device, front or codec; no assignment yet; quarantine.
        DiskFullError, StoreError: nothing was stored.
    """
    row = registry.device(upload.device)
    if row.strikes >= STRIKES:
        raise RefusedError(
            f"{row.id} is in quarantine",
            got=f"{row.strikes} bad chunks in a row",
            allowed=f"fewer than {STRIKES}",
            remedy="mend the device and start it again",
        )
    if row.depth is None or row.announcement is None:
        raise RefusedError(
            f"{row.id} is not ready to send",
            got="a chunk",
            allowed="an announcement and an assignment first",
            remedy="start the device again",
        )
    origins = {
        front.depth: Origin(
            registry.run,
            row.id,
            front.hash,
            front.depth,
            front.width,
            prepared.codec_at(front.depth),
        )
        for front in prepared.fronts
        if front.depth in row.depths
    }
    try:
        header, samples = _open(upload, origins, row.depth)
        _check_samples(samples, row.announcement.samples, prepared)
        receipt = store.add(header, upload.sha256, samples)
    except (WireError, RefusedError):
        registry.strike(row.id)
        raise
    if row.strikes:
        registry.forgive(row.id)
    return msgspec.structs.replace(receipt, depth=row.depth)


def _open(
    upload: Upload, origins: Mapping[int, Origin], depth: int
) -> tuple[FrameHeader, list[EncodedSample]]:
    """Take the frame apart. Raises WireError, and RefusedError where it is of another origin.

    `origins`: by depth, of all depths that the device was assigned; `depth` is the last of them.
    """
    found = hashlib.sha256(upload.frame).hexdigest()
    if found != upload.sha256:
        raise _bad(f"a chunk of {upload.device} is not what its address says", found, upload.sha256)
    header, samples = unpack(upload.frame)
    origin = origins.get(header.depth, origins[depth])
    for what in (field.name for field in fields(Origin)):
        got, expected = getattr(header, what), getattr(origin, what)
        if got != expected:
            raise RefusedError(
                f"a chunk of {upload.device} is of another {what}",
                got=got,
                allowed=str(expected),
                remedy="start the device again, so that it asks for its assignment",
            )
    return header, samples


def _check_samples(samples: Sequence[EncodedSample], announced: int, prepared: Prepared) -> None:
    task = prepared.task
    for sample in samples:
        name = f"sample {sample.sample}"
        if sample.sample >= announced:
            raise _bad(f"{name} was not announced", sample.sample, f"0..{announced - 1}")
        _check_length(name, sample.tokens, task)
        if task.kind == "causal_lm":
            _check_next_tokens(name, sample, prepared.vocabulary)
        else:
            _check_label(name, sample, len(task.labels))


def _check_length(name: str, tokens: int, task: TaskSpec) -> None:
    if task.kind == "image":
        # All images have one size, and so one number of patches.
        if tokens != task.image_tokens:
            raise _bad(f"{name} has a wrong length", f"{tokens} tokens", str(task.image_tokens))
    elif tokens > task.max_tokens:
        raise _bad(f"{name} is too long", f"{tokens} tokens", f"at most {task.max_tokens}")


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
