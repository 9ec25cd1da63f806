"""The server as a pipeline of stages, each with a part of the trained blocks: 1F1B and ZB-H1.

Both are of Qi et al., Zero Bubble Pipeline Parallelism (arXiv 2401.10241), sections 1 and 2.3. The
backward pass of a micro-batch is two events in both: "backward" (B, gradients of activations) and
"weights" (W, gradients of weights, which nobody waits for but the optimiser). Under 1F1B the two
are one piece, and the stage below waits for both. Under ZB-H1 it waits for B only, and stage s
puts off W by s micro-batches, so that W fills what would be bubbles: with equal stages they shrink
from (p - 1)(F + B + W) to (p - 1)(F + B - W). Stage s then has p - s micro-batches under way plus s
of which only W is missing, as many as the first stage under 1F1B, so the peak memory is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splitfrozen.records import Compute

Schedule = Literal["1f1b", "zb-h1"]
Phase = Literal["forward", "backward", "weights"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one micro-batch costs on each of p stages, the lowest blocks first.

    Attributes:
        forward: FLOP [p] of F.
        backward: FLOP [p] of B.
        weights: FLOP [p] of W.
        after: ids of the events that bring its activations to the first stage.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weights: tuple[float, ...]
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Staged:
    """One step of the server.

    Attributes:
        events: in an order in which each comes after all that it waits for.
        last: [p], id of the last event of each stage; the step has ended when all of them have.
    """

    events: tuple[Compute, ...]
    last: tuple[int, ...]


def stage_events(
    schedule: Schedule,
    batches: Sequence[MicroBatch],
    *,
    step: int,
    first_id: int,
    before: tuple[int, ...] = (),
) -> Staged:
    """Emit what the stages "server/0" .. "server/{p-1}" compute in one training step.

    The events of a stage are chained, so a replay keeps the order of the schedule.

    Args:
        schedule: "1f1b" or "zb-h1".
        batches: at least one, all with p stages.
        step: number of the step.
        first_id: of the first event; the others count on.
        before: ids of events that every stage waits for, such as `last` of the step before (the
            gradients of all stages are clipped together, so no stage begins before all are done).
    """
    stages = len(batches[0].forward)
    assert all(
        len(batch.forward) == len(batch.backward) == len(batch.weights) == stages
        for batch in batches
    ), "every micro-batch passes all stages"
    orders = [stage_order(schedule, stage, stages, len(batches)) for stage in range(stages)]
    ids: dict[tuple[Phase, int, int], int] = {}
    events: list[Compute] = []
    last: list[tuple[int, ...]] = [before] * stages
    position = [0] * stages
    while any(position[stage] < len(orders[stage]) for stage in range(stages)):
        for stage in range(stages):
            if position[stage] == len(orders[stage]):
                continue
            phase, number = orders[stage][position[stage]]
            needed = _needs(schedule, phase, number, stage, stages)
            if needed is not None and needed not in ids:
                continue
            batch, event = batches[number], first_id + len(events)
            after = last[stage] + ((ids[needed],) if needed is not None else ())
            if phase == "forward" and stage == 0:
                after += batch.after
            flops = getattr(batch, phase)[stage]
            events.append(Compute(event, f"server/{stage}", phase, step, flops, after))
            ids[phase, number, stage] = event
            last[stage] = (event,)
            position[stage] += 1
    return Staged(tuple(events), tuple(event for (event,) in last))


def stage_order(
    schedule: Schedule, stage: int, stages: int, batches: int
) -> list[tuple[Phase, int]]:
    """Phase and micro-batch of what a stage computes, in order (figures 2 and 3 of the paper)."""
    ahead = min(stages - 1 - stage, batches)
    delay = stage if schedule == "zb-h1" else 0
    order: list[tuple[Phase, int]] = [("forward", number) for number in range(ahead)]
    for number in range(batches):
        if number + ahead < batches:
            order.append(("forward", number + ahead))
        order.append(("backward", number))
        if number >= delay:
            order.append(("weights", number - delay))
    order += [("weights", number) for number in range(max(0, batches - delay), batches)]
    return order


def _needs(
    schedule: Schedule, phase: Phase, number: int, stage: int, stages: int
) -> tuple[Phase, int, int] | None:
    """What another stage must have done before, as (phase, micro-batch, stage)."""
    if phase == "forward" and stage > 0:
        return "forward", number, stage - 1
    if phase == "backward" and stage < stages - 1:
        return ("backward" if schedule == "zb-h1" else "weights"), number, stage + 1
    return None
