"""events.jsonl: what a training made devices, links and server do, for `splitfrozen replay`.

Who computes what and waits for whom follows from the method (simulation/schedules.py) and from the
samples of each step; bytes are those that were really made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import cast, get_args

import msgspec
from msgspec import Struct

from splitfrozen.disk import explained
from splitfrozen.methods.bench import Built
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.model.costs import Tokens
from splitfrozen.records import FEDERATED, SERVER, Sample
from splitfrozen.runs.devices import LocalDevice
from splitfrozen.runs.folder import RunFolder
from splitfrozen.simulation.schedules import events
from splitfrozen.simulation.setting import AHEAD, Phase, Setting, Share, Step, Wire
from splitfrozen.training.optimise import targets_of

Measured = Mapping[tuple[Phase, str, int], float]
"""Bytes by phase, device and step; an adapter is as large on its way up as down."""


def write_events(
    run: RunFolder,
    sliced: SlicedModel,
    built: Built,
    devices: Sequence[LocalDevice],
    sent: Mapping[str, int],
) -> None:
    """Write the events of a finished training into its folder, one a line.

    Args:
        run: its metrics hold what methods sent in each step.
        sliced: the model.
        built: the method that was trained.
        devices: those that took part.
        sent: bytes of all activations that a device sent once; empty where none did.

    Raises DiskFullError, StoreError.
    """
    wanted = run.config
    steps = list(_steps(run, built, devices))
    setting = Setting(
        shape=sliced.shape,
        rank=wanted.lora.rank,
        cut=wanted.model.cut,
        depths={device.id: device.origin.depth for device in devices},
        wire=Wire(measured={**_in_steps(run), **_shared_out(sent, steps)}),
        server=wanted.method.server,
        ahead=None if wanted.method.reuse == "once" else AHEAD,
    )
    path = run.root / "events.jsonl"
    draft = path.with_name(".events.jsonl")
    with explained(path):
        with draft.open("wb") as file:
            for event in events(wanted.method.name, setting, steps):
                file.write(msgspec.json.encode(event) + b"\n")
        draft.replace(path)


def _steps(run: RunFolder, built: Built, devices: Sequence[LocalDevice]) -> Iterator[Step]:
    """What each device contributed to each step, in the order that was trained in."""
    samples = {device.id: device.samples for device in devices}
    once = built.trains_on == "activations" and run.config.method.reuse == "once"
    number = 0
    for epoch in range(run.config.train.epochs):
        for index in count():
            keys = built.order.batch(epoch, index)
            if not keys:
                break
            batches: dict[str, list[Sample]] = defaultdict(list)
            for key in sorted(keys):
                batches[key.device].append(samples[key.device][key.sample])
            shares = tuple(_share(device, batch) for device, batch in batches.items())
            ends_round = built.rounds is not None and built.rounds.ends(number)
            yield Step(number, shares, ends_round, stored=once and epoch > 0)
            number += 1


Sent = tuple[str, str, str, int]
"""Source, target, phase and bytes."""


class _Counted(Struct):
    """What is read of a step's event."""

    step: int
    sent: list[Sent] = []


def sent_in_steps(run: RunFolder) -> dict[int, list[Sent]]:
    """What was sent in each step, by its number as reported, from 1.

    Of a step that was done twice the last counts; a damaged event is left out.
    """
    found = {}
    for event in run.events("step"):
        try:
            counted = msgspec.convert(event, _Counted)
        except msgspec.ValidationError:
            continue
        found[counted.step] = counted.sent
    return found


def _share(device: str, batch: Sequence[Sample]) -> Share:
    load = Tokens.of([sample.length for sample in batch])
    if all(len(sample.targets) == 1 for sample in batch):
        return Share(device, load)
    return Share(device, load, Tokens(load.samples, targets_of(batch), 0.0))


def _in_steps(run: RunFolder) -> Measured:
    """What was counted while training."""
    measured: dict[tuple[Phase, str, int], float] = {}
    for step, sent in sent_in_steps(run).items():
        for source, target, phase, size in sent:
            if phase in get_args(Phase):
                device = target if source in (SERVER, FEDERATED) else source
                # A step's event comes when it is done, so it is counted from 1.
                measured[cast("Phase", phase), device, step - 1] = size
    return measured


def _shared_out(sent: Mapping[str, int], steps: Sequence[Step]) -> Measured:
    """Chunks and steps hold other samples, so a device's bytes go to its steps by their tokens."""
    first = [(step.number, share) for step in steps if not step.stored for share in step.shares]
    tokens: dict[str, float] = defaultdict(float)
    for _, share in first:
        tokens[share.device] += share.load.tokens
    return {
        ("activations", share.device, number): sent[share.device]
        * share.load.tokens
        / tokens[share.device]
        for number, share in first
        if share.device in sent
    }
