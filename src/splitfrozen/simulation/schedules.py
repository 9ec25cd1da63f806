"""Schedules: what each method makes devices, links and servers do, as events without times.

`events` turns the steps of a training into `Compute` and `Send` events with what they wait for;
`timeline.replay` gives them times. It is lazy and deterministic: the same steps give the same
events, whatever network they are replayed on, and nothing is kept but the last event of each
device and the last few steps.

    centralized   server trains all blocks on the whole batch
    fedlora       device trains all blocks; round: adapters up, average, down
    splitlora     device runs blocks[:n] with LoRA, server trains blocks[n:] on one device's batch
                  at a time ("shared": devices in turn; "per_device": in the order of arrival),
                  gradients down, device's backward; round: adapters up, average, down
    sft           as splitlora "per_device" (Algorithm 1); what travels has the codecs' sizes
    fedsllm       as splitlora, but the server waits for all and trains on their batches together
                  (equations 3 to 6); adapters go to a party "federated" and back (equation 7)
    splitfrozen   device runs blocks[:n], frozen; server lifts n..M, then trains blocks[M:] in
                  phases B ("backward") and W ("weights"); nothing comes back (section III-B)

A device waits for nobody but whom its data needs: it begins its next step when its own gradients
have come back, though others still wait for theirs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from splitfrozen.config import MethodName
from splitfrozen.model.costs import NOTHING, Tokens
from splitfrozen.records import FEDERATED, SERVER, Compute, Event, Send
from splitfrozen.simulation.pipeline import MicroBatch, stage_events
from splitfrozen.simulation.setting import Phase, Setting, Share, Stages, Step
from splitfrozen.simulation.work import Passes, Work


def events(method: MethodName, setting: Setting, steps: Iterable[Step]) -> Iterator[Event]:
    """The events of a training, numbered 0, 1, 2 ..., each after those it waits for."""
    return _SCHEDULES[method](setting, steps)


class _Log:
    """Numbers events."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, count: int) -> int:
        """Number `count` events elsewhere; returns the number of the first."""
        self._next += count
        return self._next - count

    def compute(
        self, who: str, phase: str, step: int, flops: float, after: tuple[int, ...]
    ) -> Compute:
        self._next += 1
        return Compute(self._next - 1, who, phase, step, flops, after)

    def send(self, way: tuple[str, str], what: tuple[str, int], size: float, after: int) -> Send:
        """`way`: from and to. `what`: phase and step."""
        self._next += 1
        return Send(self._next - 1, *way, *what, size, (after,))


class _Training:
    """A schedule under way: the log, the costs, each device's last event, who is in the round."""

    def __init__(self, setting: Setting) -> None:
        self.at = setting
        self.log = _Log()
        self.work = setting.work()
        self._latest: dict[str, int] = {}
        self._round: dict[str, None] = {}
        self._current: set[str] = set()
        """Devices that have the last average."""
        self._averaged: tuple[str, int, int] | None = None
        """Of the last average: who has it, its event, its parameters."""

    def compute(self, device: str, phase: str, step: int, flops: float) -> Iterator[Event]:
        """The device's next work, after what it did or got last.

        One that was not there when the round ended gets the average before it goes on.
        """
        after: tuple[int, ...] = (self._latest[device],) if device in self._latest else ()
        if self._averaged is not None and device not in self._current:
            hub, average, parameters = self._averaged
            size = self.at.wire.size("adapter", device, step, parameters)
            down = self.log.send((hub, device), ("adapter", step), size, average)
            self._current.add(device)
            after = (*after, down.id)
            yield down
        event = self.log.compute(device, phase, step, flops, after)
        self._latest[device] = event.id
        self._round[device] = None
        yield event

    def up(self, share: Share, step: int) -> Send:
        """A device's activations, after what it did last."""
        size = self._size("activations", share, step)
        way, last = (share.device, SERVER), self._latest[share.device]
        return self.log.send(way, ("activations", step), size, last)

    def down(self, share: Share, step: int, after: int) -> Send:
        """Gradients for a device; its next work comes after them."""
        size = self._size("gradients", share, step)
        event = self.log.send((SERVER, share.device), ("gradients", step), size, after)
        self._latest[share.device] = event.id
        return event

    def _size(self, phase: Phase, share: Share, step: int) -> float:
        return self.at.wire.size(phase, share.device, step, self.work.values(share.load))

    def first(self, load: Tokens) -> Passes:
        """Of the blocks that a device trains."""
        return self.work.passes(self.at.cut, load, first=True, head=None)

    def average(self, step: int, parameters: int, hub: str, copies: int = 0) -> Iterator[Event]:
        """End of a round: the devices' `parameters` go to `hub`, are averaged and come back.

        `copies`: parameters that the server holds for each device and averages, too.
        """
        log, wire = self.log, self.at.wire
        arrived = []
        for device in self._round:
            size = wire.size("adapter", device, step, parameters)
            up = log.send((device, hub), ("adapter", step), size, self._latest[device])
            arrived.append(up.id)
            yield up
        flops = 2.0 * len(arrived) * (parameters + copies)
        average = log.compute(hub, "average", step, flops, tuple(arrived))
        yield average
        for device in self._round:
            size = wire.size("adapter", device, step, parameters)
            down = log.send((hub, device), ("adapter", step), size, average.id)
            self._latest[device] = down.id
            yield down
        self._averaged = hub, average.id, parameters
        self._current = set(self._round)
        self._round.clear()


def _total(shares: Sequence[Share]) -> tuple[Tokens, Tokens]:
    """What all send, and what of it reaches the head."""
    loads = sum((share.load for share in shares), NOTHING)
    return loads, sum((share.head for share in shares), NOTHING)


def _centralized(setting: Setting, steps: Iterable[Step]) -> Iterator[Event]:
    log, work = _Log(), setting.work()
    before: tuple[int, ...] = ()
    for step in steps:
        load, head = _total(step.shares)
        passes = work.passes(setting.shape.blocks, load, first=True, head=head)
        before = yield from _train(log, setting.stages, passes, step.number, (), before)


def _train(
    log: _Log,
    stages: Stages | None,
    passes: Passes,
    step: int,
    ready: tuple[int, ...],
    before: tuple[int, ...],
) -> Generator[Event, None, tuple[int, ...]]:
    """Forward, B and W on the server; returns what the next step waits for.

    `ready`: events that bring the batch; `before`: the end of the step before.
    """
    if stages is None:
        after = ready + before
        phases = {"forward": passes.forward, "backward": passes.b, "weights": passes.w}
        for phase, flops in phases.items():
            event = log.compute(SERVER, phase, step, flops, after)
            after = (event.id,)
            yield event
        return after
    parts = stages.count * stages.micro_batches
    forward, b, w = (
        (flops / parts,) * stages.count for flops in (passes.forward, passes.b, passes.w)
    )
    batches = [MicroBatch(forward, b, w, ready)] * stages.micro_batches
    staged = stage_events(stages.schedule, batches, step=step, first_id=log.take(0), before=before)
    log.take(len(staged.events))
    yield from staged.events
    return staged.last


def _fedlora(setting: Setting, steps: Iterable[Step]) -> Iterator[Event]:
    training, blocks = _Training(setting), setting.shape.blocks
    adapter = training.work.adapter(blocks, last=True)
    for step in steps:
        for share in step.shares:
            passes = training.work.passes(blocks, share.load, first=True, head=share.head)
            flops = passes.forward + passes.b + passes.w
            yield from training.compute(share.device, "local", step.number, flops)
        if step.ends_round:
            yield from training.average(step.number, adapter, SERVER)


def _splitlora(setting: Setting, steps: Iterable[Step]) -> Iterator[Event]:
    if setting.server == "per_device":
        yield from _sft(setting, steps)
        return
    training = _Training(setting)
    adapter = training.work.adapter(setting.cut, last=False)
    before: tuple[int, ...] = ()
    for step in steps:
        arrived = yield from _send_up(training, step)
        for share, up in zip(step.shares, arrived, strict=True):
            done = yield from _train_above(training, [share], step.number, (up, *before))
            before = (done,)
            yield from _send_back(training, share, step.number, done)
        if step.ends_round:
            yield from training.average(step.number, adapter, SERVER)


def _sft(setting: Setting, steps: Iterable[Step]) -> Iterator[Event]:
    training = _Training(setting)
    adapter = training.work.adapter(setting.cut, last=False)
    copies = training.work.adapter(setting.shape.blocks - setting.cut, last=True)
    for step in steps:
        arrived = yield from _send_up(training, step)
        for share, up in zip(step.shares, arrived, strict=True):
            done = yield from _train_above(training, [share], step.number, (up,))
            yield from _send_back(training, share, step.number, done)
        if step.ends_round:
            yield from training.average(step.number, adapter, SERVER, copies)


def _fedsllm(setting: Setting, steps: Iterable[Step]) -> Iterator[Event]:
    training = _Training(setting)
    adapter = training.work.adapter(setting.cut, last=False)
    before: tuple[int, ...] = ()
    for step in steps:
        arrived = yield from _send_up(training, step)
        ready = (*arrived, *before)
        done = yield from _train_above(training, step.shares, step.number, ready)
        before = (done,)
        for share in step.shares:
            yield from _send_back(training, share, step.number, done)
        if step.ends_round:
            yield from training.average(step.number, adapter, FEDERATED)


def _send_up(training: _Training, step: Step) -> Generator[Event, None, tuple[int, ...]]:
    """Devices' forward with LoRA and their activations; returns the ids of what arrives."""
    arrived = []
    for share in step.shares:
        flops = training.first(share.load).forward
        yield from training.compute(share.device, "forward", step.number, flops)
        up = training.up(share, step.number)
        arrived.append(up.id)
        yield up
    return tuple(arrived)


def _train_above(
    training: _Training, shares: Sequence[Share], step: int, after: tuple[int, ...]
) -> Generator[Event, None, int]:
    """Server's forward and backward above the cut; returns the id of the last event."""
    above = training.at.shape.blocks - training.at.cut
    load, head = _total(shares)
    passes = training.work.passes(above, load, first=False, head=head, sends_back=True)
    forward = training.log.compute(SERVER, "forward", step, passes.forward, after)
    yield forward
    backward = training.log.compute(SERVER, "backward", step, passes.b + passes.w, (forward.id,))
    yield backward
    return backward.id


def _send_back(training: _Training, share: Share, step: int, after: int) -> Iterator[Event]:
    """Gradients to a device, and its backward."""
    yield training.down(share, step, after)
    passes = training.first(share.load)
    yield from training.compute(share.device, "backward", step, passes.b + passes.w)


def _splitfrozen(setting: Setting, steps: Iterable[Step]) -> Iterator[Event]:
    log, work = _Log(), setting.work()
    above = setting.shape.blocks - setting.cut
    # Last events of the server's latest steps, the oldest first.
    assert setting.ahead is None or setting.ahead > 0
    window = setting.ahead or 1
    updates: deque[tuple[int, ...]] = deque([()] * window, maxlen=window)
    for step in steps:
        before = updates[-1]
        ready: tuple[int, ...] = ()
        if not step.stored:
            room = updates[0] if setting.ahead else ()
            ready = yield from _fronts(setting, log, work, step, room)
        load, head = _total(step.shares)
        passes = work.passes(above, load, first=False, head=head)
        done = yield from _train(log, setting.stages, passes, step.number, ready, before)
        updates.append(done)


def _fronts(
    setting: Setting, log: _Log, work: Work, step: Step, room: tuple[int, ...]
) -> Generator[Event, None, tuple[int, ...]]:
    """Frozen forward, transmission and lift; returns what the batch at the cut waits for."""
    lifter = SERVER if setting.stages is None else f"{SERVER}/0"
    ready = []
    for share in step.shares:
        depth = setting.depths.get(share.device, setting.cut)
        flops = work.frozen(depth, share.load, first=True)
        front = log.compute(share.device, "front", step.number, flops, room)
        yield front
        values = work.values(share.load)
        size = setting.wire.size("activations", share.device, step.number, values)
        up = log.send((share.device, SERVER), ("activations", step.number), size, front.id)
        yield up
        last = up.id
        if depth < setting.cut:
            flops = work.frozen(setting.cut - depth, share.load, first=False)
            lift = log.compute(lifter, "lift", step.number, flops, (last,))
            last = lift.id
            yield lift
        ready.append(last)
    return tuple(ready)


_SCHEDULES: dict[MethodName, Callable[[Setting, Iterable[Step]], Iterator[Event]]] = {
    "centralized": _centralized,
    "fedlora": _fedlora,
    "splitlora": _splitlora,
    "sft": _sft,
    "fedsllm": _fedsllm,
    "splitfrozen": _splitfrozen,
}
