"""The checkpoint: everything that a continued training needs, in one durable file.

It is a safetensors file: the adapter and AdamW's moments as tensors by name, the scalars as JSON in
its metadata. Nothing in it is executed. A file is written beside its final place, synced and
renamed, so a reader finds the old one or the new one, whole.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from splitfrozen.disk import explained, write_whole
from splitfrozen.errors import StoreError

_Natural = Annotated[int, Meta(ge=0)]


class Progress(msgspec.Struct, forbid_unknown_fields=True):
    """How far a training is.

    Attributes:
        identity: hash over everything that fixes the result; a checkpoint fits no other training.
        micro_tokens: bound in use; less than the spec's after memory ran out.
        step: optimiser steps done.
        epoch: the epoch of the next batch.
        index: number of the next batch in its epoch.
        last_batch: hash over the sample keys of the batch before it.
        best: best score of an evaluation; None before the first.
    """

    identity: str
    micro_tokens: Annotated[int, Meta(ge=1)]
    step: _Natural = 0
    epoch: _Natural = 0
    index: _Natural = 0
    last_batch: str = ""
    best: float | None = None


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    """What is beside the tensors."""

    progress: Progress
    digest: str


def write_checkpoint(path: Path, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the checkpoint at `path`. Raises StoreError; the old one is then still there."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: the file format writes several in any order, and same seed means same bytes.
    data = save(kept, {"head": msgspec.json.encode(_Head(progress, _digest(kept))).decode()})
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)


def read_checkpoint(path: Path) -> tuple[Progress, dict[str, torch.Tensor]] | None:
    """Return what was written, or None where there is no checkpoint. Raises StoreError."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            head = msgspec.json.decode(metadata.get("head", ""), type=_Head)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if head.digest != _digest(tensors):
            raise ValueError("tensors that are not those that were written")
        return head.progress, tensors
    except (SafetensorError, msgspec.DecodeError, OSError, ValueError) as error:
        raise StoreError(
            f"cannot read the checkpoint {path}",
            got=str(error),
            allowed="a checkpoint that this version wrote",
            remedy="restore the file, or delete it to train again from the first step",
        ) from error


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names and bytes: the file format has no checksum of its own."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
