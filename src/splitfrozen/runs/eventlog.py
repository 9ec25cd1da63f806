"""events.jsonl: what a training made devices, links and server do, for `splitfrozen simulate`.

Who computes what and waits for whom follows from the method (simulation/schedules.py) and from the
samples of each step; bytes are those that were really made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import get_args

import msgspec

from splitfrozen.disk import explained
from splitfrozen.methods.bench import Built
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.model.costs import Tokens
from splitfrozen.runs.devices import LocalDevice
from splitfrozen.runs.folder import RunFolder
from splitfrozen.simulation.schedules import AHEAD, Phase, Setting, Share, Step, Wire, events

Measured = Mapping[tuple[Phase, str, int], float]
"""Bytes by phase, device and step. Adapters go as they are in memory and need no measuring."""


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
            lengths: dict[str, list[int]] = defaultdict(list)
            for key in sorted(keys):
                lengths[key.device].append(samples[key.device][key.sample].length)
            shares = tuple(Share(device, Tokens.of(each)) for device, each in lengths.items())
            ends_round = built.rounds is not None and built.rounds.ends(number)
            yield Step(number, shares, ends_round, stored=once and epoch > 0)
            number += 1


def _in_steps(run: RunFolder) -> Measured:
    """What was counted while training; of a step that was done twice the last counts."""
    measured: dict[tuple[Phase, str, int], float] = {}
    for event in run.events("step"):
        for source, target, phase, size in event.get("sent", []):
            if phase in get_args(Phase):
                device = target if source == "server" else source
                # A step's event comes when it is done, so it is counted from 1.
                measured[phase, device, event["step"] - 1] = size
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
