"""Split learning with LoRA on both sides: activations up, gradients down, adapters averaged.

    device   forward of blocks[:n] --chunk--> server   forward, backward, its optimiser's step
             backward, its step    <--reply--          gradient at the activations

SplitLoRA, SFT and FedsLLM differ in how the server trains (`Serving`) and in who averages. What a
device sends are the frames of `wire.frame`, through a `records.Exchange`: here the server is in
the same process and answers at once, so nothing is sent over a network, but every byte that would
be is made, checked, decoded and counted.

Each side clips and steps by its own gradient: neither sees the other's norm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from splitfrozen.errors import WireError
from splitfrozen.methods.bench import Bench, Built, Rounds, by_device
from splitfrozen.methods.parts import Adapted, Lower, Upper
from splitfrozen.methods.replicas import Replicas, Sent
from splitfrozen.model import adapters
from splitfrozen.records import (
    SERVER,
    Activation,
    Chunk,
    Codec,
    EncodedSample,
    Exchange,
    Floats,
    Ints,
    Receipt,
    Sample,
    SampleKey,
)
from splitfrozen.training.batching import pad, split
from splitfrozen.training.optimise import Gradients, Optimiser, StepResult
from splitfrozen.training.orders import DeviceOrder
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, activations, pack

Serving = Literal["shared", "per_device", "together"]
"""How the server trains: one model with the devices' batches in turn, a copy for each device, or
one model with all devices' batches together."""

_NO_TARGETS: Ints = np.zeros(0, np.int32)
_NO_FRONT = "0" * 64
"""A front that trains has no hash to be known by."""


def build(bench: Bench, serving: Serving, hub: str) -> Built:
    """Adapt all blocks, those below the cut on the devices. Raises ModelError, WireError.

    Args:
        serving: how the server trains.
        hub: the party that averages the devices' adapters.
    """
    config, devices = bench.config, bench.samples.devices
    adapted = bench.adapt(0)
    order = DeviceOrder(bench.samples, config.run.seed, config.train.batch_size)
    steps = order.steps_per_epoch
    parameters = adapted.parameters()
    below = adapters.below(adapted.sliced, parameters, config.model.cut)

    def optimise(chosen: Mapping[str, torch.nn.Parameter]) -> Optimiser:
        return bench.optimiser(chosen, steps)

    above = {name: value for name, value in parameters.items() if name not in below}
    trained = (
        Replicas(adapted.model, list(above), devices, optimise, SERVER)
        if serving == "per_device"
        else optimise(above)
    )
    coding = Coding(bench.codec(), codec(config.method.gradients))
    server = _Server(
        Upper(adapted, config.model.cut),
        trained,
        bench.gradients(),
        coding,
        together=serving == "together",
    )
    lower = Replicas(adapted.model, below, devices, optimise, hub, bench.sent)
    rounds = Rounds.of(config, steps)
    method = TwoWay(bench, adapted, lower, server, rounds)
    return Built(method, adapted, order, steps, rounds, "samples")


@dataclass(frozen=True, slots=True)
class Coding:
    """Codecs of activations, which go up to the server, and of gradients, which come down."""

    up: Codec
    down: Codec


class TwoWay:
    """As `training.loop.Method` over samples."""

    def __init__(
        self, bench: Bench, adapted: Adapted, lower: Replicas, server: _Server, rounds: Rounds
    ) -> None:
        self.gradients = server.gradients
        self._adapted = adapted
        self._lower = lower
        self._server = server
        self._rounds = rounds
        config = bench.config
        part = Lower(adapted, config.model.cut)
        self._devices = {
            device: TwoWayDevice(
                part,
                self.gradients,
                server.coding,
                Origin(
                    config.folder.name,
                    device,
                    _NO_FRONT,
                    config.model.cut,
                    adapted.sliced.width,
                    server.coding.up.name,
                ),
                _Line(server, device, bench.sent),
            )
            for device in bench.samples.devices
        }

    def step(self, keys: Sequence[SampleKey], items: Sequence[Sample], step: int) -> StepResult:
        batches = by_device(keys, items)
        self._server.expect(batches)
        norms = []
        # A device keeps the graph of its batch until its gradient has come back, so that where the
        # server does not wait for all, one graph is alive at a time.
        for group in [list(batches)] if self._server.together else [[one] for one in batches]:
            for device in group:
                self._lower.enter(device, len(batches[device]))
                self._devices[device].forward(batches[device], step)
            for device in group:
                optimiser = self._lower.enter(device, 0)
                norms.append(self._devices[device].backward(optimiser, step))
        if self._rounds.ends(step):
            self._lower.average()
            self._server.average()
        self._lower.leave()
        self._server.leave()
        result = StepResult.of(self._server.results)
        return replace(result, grad_norm=max(result.grad_norm, *norms))

    def state(self) -> dict[str, torch.Tensor]:
        return {
            **{f"lower.{name}": value for name, value in self._lower.state().items()},
            **{f"upper.{name}": value for name, value in self._server.state().items()},
        }

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for prefix, part in (("lower.", self._lower), ("upper.", self._server)):
            part.load_state(
                {
                    name.removeprefix(prefix): value
                    for name, value in tensors.items()
                    if name.startswith(prefix)
                }
            )

    def save(self, folder: Path) -> None:
        """Write the adapter of both sides: the averages of the last round."""
        self._adapted.save(folder)


class _Server:
    """The server's part: blocks[n:L] and the head.

    Attributes:
        gradients: how they are computed.
        coding: of what travels.
        together: it trains when all that are expected have sent.
        results: of the optimiser steps since `expect`.
    """

    def __init__(
        self,
        upper: Upper,
        trained: Optimiser | Replicas,
        gradients: Gradients,
        coding: Coding,
        *,
        together: bool,
    ) -> None:
        self.gradients = gradients
        self.coding = coding
        self.together = together
        self._upper = upper
        self._trained = trained
        self._waiting: dict[str, tuple[Origin, int, list[Activation]]] = {}
        self._expected: set[str] = set()
        self.results: list[StepResult] = []
        self._replies: dict[tuple[str, int], bytes] = {}

    def expect(self, devices: Collection[str]) -> None:
        """Say who sends in this step."""
        self._expected = set(devices)
        self.results = []
        self._replies.clear()

    def receive(self, device: str, chunk: Chunk) -> Receipt:
        """Take a device's activations and train on them. Raises WireError."""
        header, items = activations(chunk.frame, self.coding.up)
        origin = Origin(
            header.run, device, header.front, header.depth, header.width, self.coding.down.name
        )
        self._waiting[device] = origin, header.index, items
        if not self.together:
            self._train([device])
        elif self._waiting.keys() == self._expected:
            self._train(sorted(self._waiting))
        return Receipt(index=header.index, stored=len(items))

    def reply(self, device: str, index: int) -> bytes:
        """The frame of gradients for a chunk that was trained on."""
        return self._replies[device, index]

    def average(self) -> None:
        """The end of a round."""
        if isinstance(self._trained, Replicas):
            self._trained.average()

    def leave(self) -> None:
        """Have the global parameters in the model."""
        if isinstance(self._trained, Replicas):
            self._trained.leave()

    def state(self) -> dict[str, torch.Tensor]:
        return self._trained.state()

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self._trained.load_state(tensors)

    def _train(self, devices: Sequence[str]) -> None:
        """One step on what these devices sent, and a reply for each."""
        arrived = {device: self._waiting.pop(device) for device in devices}
        items = [item for _, _, own in arrived.values() for item in own]
        step = next(index for _, index, _ in arrived.values())
        who = () if self.together else devices
        optimiser = (
            self._trained.enter(devices[0], len(items))
            if isinstance(self._trained, Replicas)
            else self._trained
        )
        caught = _Caught(self._upper)
        loss, targets = self.gradients.of(
            caught, optimiser.parameters.values(), items, step, SERVER, *who
        )
        self.results.append(StepResult(loss, *optimiser.step(step), targets))
        for device, (origin, index, own) in arrived.items():
            encoded = [
                EncodedSample(
                    item.sample,
                    len(item.hidden),
                    _NO_TARGETS,
                    self.coding.down.encode(caught.gradient(item)),
                )
                for item in own
            ]
            self._replies[device, index] = pack(origin, index, encoded).frame


class _Caught:
    """The server's part, keeping the gradient at its input: a `Trainable` over activations."""

    def __init__(self, upper: Upper) -> None:
        self._upper = upper
        self._places: dict[int, tuple[torch.Tensor, int]] = {}

    def length(self, item: Activation) -> int:
        return self._upper.length(item)

    def loss(self, items: Sequence[Activation]) -> torch.Tensor:
        loss, hidden = self._upper.loss_and_input(items)
        # Where memory ran out, the same items come again, and then these are the ones that count.
        self._places |= {id(item): (hidden, row) for row, item in enumerate(items)}
        return loss

    def gradient(self, item: Activation) -> Floats:
        """float32 [T, D] of one sample."""
        hidden, row = self._places[id(item)]
        assert hidden.grad is not None
        values: Floats = hidden.grad[row, : len(item.hidden)].float().cpu().numpy()
        return np.ascontiguousarray(values)


class _Line:
    """A device's way to a server in the same process, as `records.Exchange`."""

    def __init__(self, server: _Server, device: str, sent: Sent) -> None:
        self._server = server
        self._device = device
        self._sent = sent

    def stored(self) -> set[int]:
        return set()

    def put(self, chunk: Chunk) -> Receipt:
        self._sent(self._device, SERVER, "activations", len(chunk.frame))
        return self._server.receive(self._device, chunk)

    def reply(self, index: int) -> bytes:
        frame = self._server.reply(self._device, index)
        self._sent(SERVER, self._device, "gradients", len(frame))
        return frame


class TwoWayDevice:
    """A device's part: embedding and blocks[:n]."""

    def __init__(
        self, part: Lower, gradients: Gradients, coding: Coding, origin: Origin, line: Exchange
    ) -> None:
        self._part = part
        self._gradients = gradients
        self._coding = coding
        self._origin = origin
        self._line = line
        self._passes: list[tuple[list[Sample], torch.Tensor]] = []

    def forward(self, batch: Sequence[Sample], step: int) -> None:
        """Compute the batch's activations and send them as chunk `step`."""
        lengths = [self._part.length(sample) for sample in batch]
        self._passes = []
        encoded: dict[int, EncodedSample] = {}
        with self._gradients.whole(step), self._gradients.drawing(step, self._origin.device):
            for group in split(lengths, self._gradients.micro_tokens):
                members = [batch[i] for i in group]
                with self._gradients.autocast():
                    hidden = self._part.hidden(members, dropout=True).float()
                self._passes.append((members, hidden))
                for sample, row in zip(members, hidden.detach().cpu().numpy(), strict=True):
                    payload = self._coding.up.encode(np.ascontiguousarray(row[: sample.length]))
                    encoded[sample.id] = EncodedSample(
                        sample.id, sample.length, sample.targets, payload
                    )
        chunk = pack(self._origin, step, [encoded[sample.id] for sample in batch])
        self._line.put(chunk)

    def backward(self, optimiser: Optimiser, step: int) -> float:
        """Take the reply to chunk `step` and do the device's own step; returns the gradient's norm.

        The server keeps the loss to itself, and has found it finite.
        """
        header, gradients = activations(self._line.reply(step), self._coding.down)
        got = header.device, header.index, header.width
        wanted = self._origin.device, step, self._origin.width
        if got != wanted:
            raise _unfit("the reply is to another chunk", got, f"device, index, width {wanted}")
        found = {one.sample: one.hidden for one in gradients}
        for parameter in optimiser.parameters.values():
            parameter.grad = None
        with self._gradients.whole(step):
            for members, hidden in self._passes:
                _refuse_others(members, found)
                gradient = torch.from_numpy(pad([found[sample.id] for sample in members]))
                hidden.backward(gradient.to(hidden.device))  # type: ignore[no-untyped-call]
        self._passes = []
        return optimiser.step(step)[0]


def _refuse_others(members: Sequence[Sample], found: dict[int, Floats]) -> None:
    for sample in members:
        got = len(found.get(sample.id, ()))
        if got != sample.length:
            what = f"the reply does not fit sample {sample.id}"
            raise _unfit(what, f"{got} tokens", f"{sample.length}, as were sent")


def _unfit(what: str, got: object, allowed: str) -> WireError:
    return WireError(what, got=got, allowed=allowed, remedy="check the server's version")
