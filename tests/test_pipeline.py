"""The schedules of a server with several stages."""

from __future__ import annotations

from typing import get_args

import pytest

from splitfrozen.records import Compute
from splitfrozen.simulation.network import Machine, Network
from splitfrozen.simulation.pipeline import MicroBatch, Schedule, Staged, stage_events
from splitfrozen.simulation.timeline import Timeline, replay

SERVER = Network({"server": Machine(1.0)}, {})
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
SIZES = [(2, 4), (2, 9), (3, 6), (4, 8), (4, 13), (6, 12), (8, 16)]


def equal(stages: int, batches: int, costs: tuple[float, float, float] = (1.0, 1.0, 1.0)):
    forward, backward, weights = ((cost,) * stages for cost in costs)
    return [MicroBatch(forward, backward, weights)] * batches


def run(schedule: Schedule, batches: list[MicroBatch]) -> Timeline:
    return replay(stage_events(schedule, batches, step=0, first_id=0).events, SERVER)


def when(timeline: Timeline) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(begin, end) of each micro-batch, by stage and phase: each phase keeps their order."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for i, event in enumerate(timeline.events):
        assert isinstance(event, Compute)
        found.setdefault((event.who, event.phase), []).append((timeline.begin[i], timeline.end[i]))
    return found


@pytest.mark.parametrize(("stages", "batches"), SIZES)
def test_the_bubble_of_zb_h1_is_a_third_of_that_of_1f1b(stages: int, batches: int):
    plain, zero = (run(schedule, equal(stages, batches)).makespan for schedule in SCHEDULES)
    assert SCHEDULES == ("1f1b", "zb-h1")
    assert plain == 3 * (batches + stages - 1)
    assert 3 * (zero - 3 * batches) == plain - 3 * batches > 0


@pytest.mark.parametrize(("stages", "batches"), SIZES)
@pytest.mark.parametrize("costs", [(2.0, 2.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1.5, 1.0)])
def test_the_bubbles_are_those_of_the_paper(
    stages: int, batches: int, costs: tuple[float, float, float]
):
    forward, backward, weights = costs
    plain, zero = (run(s, equal(stages, batches, costs)).makespan for s in SCHEDULES)
    assert plain - batches * sum(costs) == (stages - 1) * sum(costs)
    assert zero - batches * sum(costs) == (stages - 1) * (forward + backward - weights)


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_with_one_stage_all_schedules_are_equal(batches: int):
    plain, zero = (stage_events(s, equal(1, batches), step=4, first_id=7) for s in SCHEDULES)
    assert plain == zero
    assert run("1f1b", equal(1, batches)).makespan == 3 * batches
    assert [event.phase for event in plain.events[:3]] == ["forward", "backward", "weights"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "batches"), [(1, 3), (2, 1), (3, 2), (4, 4), (4, 9)])
def test_every_micro_batch_goes_up_and_comes_down(schedule: Schedule, stages: int, batches: int):
    costs = [
        MicroBatch(
            tuple(1.0 + (s + k) % 3 for s in range(stages)),
            tuple(1.0 + (s * k) % 2 for s in range(stages)),
            tuple(0.5 + (s + 2 * k) % 2 for s in range(stages)),
        )
        for k in range(batches)
    ]
    times = when(run(schedule, costs))
    assert len(times) == 3 * stages
    for stage in range(stages):
        here = {phase: times[f"server/{stage}", phase] for phase in MicroBatch.__slots__[:3]}
        for k in range(batches):
            assert here["forward"][k][1] <= here["backward"][k][0]
            assert here["backward"][k][1] <= here["weights"][k][0]
            assert here["forward"][k][1] - here["forward"][k][0] == costs[k].forward[stage]
            if stage:
                below = {phase: times[f"server/{stage - 1}", phase] for phase in here}
                assert below["forward"][k][1] <= here["forward"][k][0]
                free = here["weights" if schedule == "1f1b" else "backward"][k][1]
                assert free <= below["backward"][k][0]


@pytest.mark.parametrize(("stages", "batches"), [*SIZES, (4, 3)])
def test_zb_h1_needs_no_more_memory_than_1f1b(stages: int, batches: int):
    def most(schedule: Schedule) -> int:
        peak, alive = 0, dict.fromkeys(range(stages), 0)
        for event in stage_events(schedule, equal(stages, batches), step=0, first_id=0).events:
            stage = int(event.who.removeprefix("server/"))
            alive[stage] += {"forward": 1, "backward": 0, "weights": -1}[event.phase]
            peak = max(peak, alive[stage])
        assert set(alive.values()) == {0}
        return peak

    assert most("zb-h1") == most("1f1b") == min(stages, batches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_follow_each_other_and_their_activations(schedule: Schedule):
    head = [Compute(k, "device", "front", 0, 10.0 * (k + 1)) for k in range(3)]
    batches = [MicroBatch((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), after=(k,)) for k in range(3)]
    first = stage_events(schedule, batches, step=0, first_id=3)
    second = stage_events(
        schedule, equal(2, 2), step=1, first_id=3 + len(first.events), before=first.last
    )
    network = Network({"server": Machine(1.0), "device": Machine(1.0)}, {})
    timeline = replay([*head, *first.events, *second.events], network)
    arrived = [time for time, _ in when(timeline)["server/0", "forward"][:3]]
    assert second.events[0].id == 3 + 18
    assert arrived == [10, 30, 60]
    assert [len(staged.last) for staged in (first, second)] == [2, 2]
    ended = max(timeline.end[i] for i in first.last)
    assert ended == max(timeline.end[: 3 + len(first.events)])
    assert min(timeline.begin[event.id] for event in second.events) == ended


def test_events_know_their_step_and_cost():
    staged = stage_events(
        "zb-h1", [MicroBatch((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))], step=9, first_id=2
    )
    assert isinstance(staged, Staged)
    assert {(e.who, e.phase, e.flops, e.step) for e in staged.events} == {
        ("server/0", "forward", 1.0, 9),
        ("server/1", "forward", 2.0, 9),
        ("server/0", "backward", 3.0, 9),
        ("server/1", "backward", 4.0, 9),
        ("server/0", "weights", 5.0, 9),
        ("server/1", "weights", 6.0, 9),
    }
