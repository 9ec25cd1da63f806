"""Devices in this process: they walk the code that a device walks, with torch as their front.

What they compute is encoded, packed and planned as if it travelled, and unpacked and decoded on
arrival, so sizes and errors are those of a run over the network.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from splitfrozen.data.inputs import model_inputs
from splitfrozen.device.pipeline import Fixed, Making, Work, upload_all
from splitfrozen.device.plan import plan_chunks, planned_bytes
from splitfrozen.device.progress import Progress
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import (
    Activation,
    Chunk,
    Codec,
    Codecs,
    DeviceReport,
    EncodedSample,
    Floats,
    Receipt,
    Sample,
    SampleKey,
)
from splitfrozen.server.store import Store
from splitfrozen.training.batching import split
from splitfrozen.training.lift import Lifter
from splitfrozen.wire.frame import Origin, activations, pack, unpack


class TorchFront:
    """front(n) in torch and float32, where the model is; a `records.Front`."""

    def __init__(self, sliced: SlicedModel, depth: int) -> None:
        self._sliced = sliced
        self._front = sliced.front(depth)
        self._depth = depth

    @property
    def depth(self) -> int:
        return self._depth

    def __call__(self, batch: Sequence[Sample]) -> list[Floats]:
        arrays = model_inputs(batch, self._sliced.inputs)
        tensors = [torch.from_numpy(array).to(self._sliced.model.device) for array in arrays]
        with torch.no_grad():
            hidden = self._front(*tensors).cpu().numpy()
        return [
            np.ascontiguousarray(row[: sample.length])
            for sample, row in zip(batch, hidden, strict=True)
        ]


class StoreUploader:
    """Chunks of one device straight into a store; a `records.Uploader`."""

    def __init__(self, store: Store, device: str) -> None:
        self._store = store
        self._device = device

    def stored(self) -> set[int]:
        return self._store.chunks(self._device)

    def put(self, chunk: Chunk) -> Receipt:
        header, samples = unpack(chunk.frame)
        return self._store.add(header, chunk.sha256, samples)


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """A device of this process: what it holds, and what its frames say of it.

    Attributes:
        samples: `samples[i].id == i`.
        origin: device, depth and codec among others.
        codecs: of the run.
    """

    samples: list[Sample]
    origin: Origin
    codecs: Codecs

    @property
    def codec(self) -> Codec:
        return self.codecs(self.origin.codec)

    @property
    def id(self) -> str:
        return self.origin.device


def send_all(
    device: LocalDevice,
    front: TorchFront,
    store: Store,
    chunk_bytes: int,
    seed: int,
    stop: threading.Event,
) -> DeviceReport:
    """Compute and store what the store does not have of a device, as `splitfrozen join` does.

    `stop` ends it with KeyboardInterrupt; it is set, too, where a stage fails. Raises what
    `device.pipeline.upload_all` does, and StoreError.
    """
    origin, coded = device.origin, device.codec
    size = planned_bytes(coded, origin.width)
    chunks = plan_chunks(device.samples, size, chunk_bytes, seed, device.id)
    work = Work(device.samples, chunks, Fixed(Making(front, coded, origin)))
    with closing(Progress(len(device.samples))) as progress:
        return upload_all(work, StoreUploader(store, device.id), progress, stop)


class Recomputed:
    """Activations that devices compute and send anew whenever they are read: nothing is kept.

    This is `reuse = "never"`, a training as the SplitFrozen paper has it.

    Attributes:
        sent: of each call of `read` that nobody took yet, the bytes that each device sent.
    """

    def __init__(
        self, devices: Sequence[LocalDevice], sliced: SlicedModel, lifter: Lifter, micro_tokens: int
    ) -> None:
        self._devices = {device.id: device for device in devices}
        self._fronts = {
            depth: TorchFront(sliced, depth)
            for depth in {device.origin.depth for device in devices}
        }
        self._lifter = lifter
        self._micro_tokens = micro_tokens
        self.sent: deque[dict[str, int]] = deque()

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        wanted: dict[str, list[int]] = {}
        for key in keys:
            wanted.setdefault(key.device, []).append(key.sample)
        found: dict[SampleKey, Activation] = {}
        sent: dict[str, int] = {}
        for name, ids in sorted(wanted.items()):
            device = self._devices[name]
            frame = self._frame(device, ids)
            sent[name] = len(frame)
            for activation in self._lifter.lift(activations(frame, device.codec)[1]):
                found[SampleKey(name, activation.sample)] = activation
        self.sent.append(sent)
        return [found[key] for key in keys]

    def _frame(self, device: LocalDevice, ids: Sequence[int]) -> bytes:
        """What the device sends of these samples."""
        origin, samples = device.origin, [device.samples[i] for i in sorted(ids)]
        front = self._fronts[origin.depth]
        coded = device.codec
        encoded: dict[int, EncodedSample] = {}
        for group in split([sample.length for sample in samples], self._micro_tokens):
            members = [samples[i] for i in group]
            for sample, hidden in zip(members, front(members), strict=True):
                payload = coded.encode(hidden)
                encoded[sample.id] = EncodedSample(sample.id, len(hidden), sample.targets, payload)
        return pack(origin, 0, [encoded[sample.id] for sample in samples]).frame
