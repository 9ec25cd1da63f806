"""Schedules: what each method makes devices, links and servers do."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest

from splitfrozen.config import MethodName
from splitfrozen.model import costs
from splitfrozen.model.costs import Tokens
from splitfrozen.records import Compute, Event, Send
from splitfrozen.simulation.network import Link, Machine, Network
from splitfrozen.simulation.schedules import events
from splitfrozen.simulation.setting import Setting, Share, Stages, Step, Wire
from splitfrozen.simulation.timeline import replay

SHAPE = costs.gpt2_small()
LOAD = Tokens.uniform(2, 64)
DEVICES = ("a", "b", "c")
SETTING = Setting(SHAPE, rank=4, cut=3, depths={"a": 1}, counting="paper")
METHODS: tuple[MethodName, ...] = get_args(MethodName)
TWO_WAY: tuple[MethodName, ...] = ("splitlora", "sft", "fedsllm")


def steps(count: int, every: int = 2, devices: tuple[str, ...] = DEVICES) -> Iterator[Step]:
    """`count` steps of all devices; a round ends after `every` of them."""
    shares = tuple(Share(device, LOAD) for device in devices)
    for number in range(count):
        yield Step(number, shares, ends_round=(number + 1) % every == 0)


def network(device: float = 1e12, server: float = 1e13, bps: float = 1e8, **slow: float) -> Network:
    machines = {name: Machine(flops) for name, flops in slow.items()}
    machines |= {"device": Machine(device), "server": Machine(server), "federated": Machine(server)}
    pairs = [("device", "server"), ("device", "federated")]
    links = {pair: Link(bps) for one, other in pairs for pair in ((one, other), (other, one))}
    return Network(machines, links)


def parties(event: Event) -> tuple[str, ...]:
    return (event.who,) if isinstance(event, Compute) else (event.source, event.target)


def flops(log: list[Event], *phases: str) -> float:
    return sum(one.flops for one in log if isinstance(one, Compute) and one.phase in phases)


def ends(log: list[Event], net: Network) -> dict[tuple[str, str, int], tuple[float, float]]:
    """Begin and end by (who or source, phase, step)."""
    line = replay(log, net)
    return {
        (parties(one)[0], one.phase, one.step): (line.begin[one.id], line.end[one.id])
        for one in log
    }


def paper_forward(blocks: int, load: Tokens, rank: int = 4) -> float:
    return costs.forward_flops(SHAPE, blocks, load, rank) + costs.elementwise_flops(
        SHAPE, blocks, load
    )


# --- every method ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_events_are_numbered_and_wait_only_for_earlier_ones(method: MethodName) -> None:
    log = list(events(method, SETTING, steps(5)))
    assert [one.id for one in log] == list(range(len(log)))
    assert all(0 <= before < one.id for one in log for before in one.after)
    assert {one.step for one in log} == set(range(5))
    assert log == list(events(method, SETTING, steps(5)))
    assert replay(log, network()).makespan > 0


@pytest.mark.parametrize("method", METHODS)
def test_events_come_lazily(method: MethodName) -> None:
    shares = (Share("a", LOAD),)
    endless = (Step(number, shares, ends_round=True) for number in itertools.count())
    few = list(itertools.islice(events(method, SETTING, endless), 100))
    assert len(few) == 100


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"splitfrozen"}))
def test_training_all_blocks_takes_three_forward_passes_wherever_they_are(
    method: MethodName,
) -> None:
    log = list(events(method, SETTING, steps(4)))
    trained = flops(log, "local", "forward", "backward", "weights")
    assert trained == pytest.approx(4 * 3 * 3 * paper_forward(12, LOAD))


def test_exact_counting_leaves_out_the_weights_of_frozen_maps() -> None:
    setting = replace(SETTING, counting="exact")
    log = list(events("centralized", setting, steps(1)))
    whole = LOAD + LOAD + LOAD
    b, w = costs.backward_flops(SHAPE, 12, whole, 4, input_gradient=False)
    assert flops(log, "forward") == costs.forward_flops(SHAPE, 12, whole, 4)
    assert (flops(log, "backward"), flops(log, "weights")) == (b, w)
    assert w < 0.05 * flops(log, "forward")


# --- fedlora ---------------------------------------------------------------------------------


def test_fedlora_averages_at_the_end_of_a_round_and_goes_on_from_the_average() -> None:
    log = list(events("fedlora", SETTING, steps(4)))
    averages = [one for one in log if one.phase == "average"]
    assert [one.step for one in averages] == [1, 3]
    sends = [one for one in log if isinstance(one, Send)]
    assert len(sends) == 2 * 2 * 3
    assert {one.bytes for one in sends} == {4.0 * costs.adapter_parameters(SHAPE, 12, 4)}
    times = ends(log, network(a=1e11))
    slowest = times["a", "adapter", 1]
    assert times["server", "average", 1][0] == slowest[1]
    assert times["b", "local", 2][0] > times["server", "average", 1][1]


def test_only_who_took_part_in_a_round_sends_its_adapter() -> None:
    every = tuple(Share(device, LOAD) for device in DEVICES)
    plan = [Step(0, every, ends_round=True), Step(1, every[:1], ends_round=True)]
    log = list(events("fedlora", SETTING, plan))
    assert Counter(one.source for one in log if isinstance(one, Send) and one.step == 1) == {
        "a": 1,
        "server": 1,
    }


# --- the two-way methods ---------------------------------------------------------------------


@pytest.mark.parametrize("method", TWO_WAY)
def test_gradients_come_back_before_a_device_goes_on(method: MethodName) -> None:
    times = ends(list(events(method, SETTING, steps(3, devices=("a",)))), network())
    chain = [
        ("a", "forward", 0),
        ("a", "activations", 0),
        ("server", "forward", 0),
        ("server", "backward", 0),
        ("server", "gradients", 0),
        ("a", "backward", 0),
        ("a", "forward", 1),
    ]
    for one, other in itertools.pairwise(chain):
        assert times[one][1] == times[other][0]


@pytest.mark.parametrize("method", TWO_WAY)
def test_a_device_trains_the_blocks_below_the_cut(method: MethodName) -> None:
    log = list(events(method, SETTING, steps(1)))
    mine = [one for one in log if isinstance(one, Compute) and one.who == "b"]
    assert [one.phase for one in mine] == ["forward", "backward"]
    assert sum(one.flops for one in mine) == pytest.approx(3 * paper_forward(3, LOAD))


def test_one_server_model_takes_devices_in_turn_and_copies_as_they_arrive() -> None:
    slow = network(a=1e10)
    shared = replay(list(events("splitlora", SETTING, steps(1))), slow)
    own = replay(list(events("splitlora", replace(SETTING, server="per_device"), steps(1))), slow)
    assert order_on_server(shared.events, shared.begin) == ["a", "b", "c"]
    assert order_on_server(own.events, own.begin) == ["b", "c", "a"]


def order_on_server(log: object, begin: object) -> list[str]:
    assert isinstance(log, list)
    forward = [one for one in log if one.phase == "forward" and one.who == "server"]
    forward.sort(key=lambda one: begin[one.id])  # type: ignore[index]
    return [log[one.after[0]].source for one in forward]


def test_sft_is_splitlora_with_a_copy_each_and_its_codecs_sizes() -> None:
    own = replace(SETTING, server="per_device")
    assert list(events("sft", own, steps(3))) == list(events("splitlora", own, steps(3)))
    small = replace(own, wire=Wire(activations=0.2, gradients=0.3))
    sends = [one for one in events("sft", small, steps(1)) if isinstance(one, Send)]
    values = 2 * 64 * 768
    assert {one.phase: one.bytes for one in sends} == {
        "activations": 0.2 * values,
        "gradients": 0.3 * values,
    }


def test_copies_on_the_server_are_averaged_too() -> None:
    one = list(events("splitlora", SETTING, steps(2)))
    each = list(events("sft", SETTING, steps(2)))
    assert flops(one, "average") == 2 * 3 * costs.adapter_parameters(SHAPE, 3, 4)
    assert flops(each, "average") == 2 * 3 * costs.adapter_parameters(SHAPE, 12, 4)


def test_fedsllm_trains_on_all_clients_together() -> None:
    log = list(events("fedsllm", SETTING, steps(2)))
    server = [one for one in log if isinstance(one, Compute) and one.who == "server"]
    assert [one.phase for one in server] == ["forward", "backward"] * 2
    arrived = [one.id for one in log if one.phase == "activations" and one.step == 0]
    assert list(server[0].after) == arrived
    assert server[0].flops == pytest.approx(paper_forward(9, LOAD + LOAD + LOAD))


def test_fedsllms_one_server_model_ends_a_step_before_the_next_whoever_takes_part() -> None:
    plan = [Step(number, (Share(device, LOAD),)) for number, device in enumerate("ab")]
    times = ends(list(events("fedsllm", SETTING, plan)), network(server=1e10))
    assert times["b", "activations", 1][1] < times["server", "forward", 0][1]
    assert times["server", "forward", 1][0] == times["server", "backward", 0][1]


def test_fedsllms_round_takes_what_the_paper_says() -> None:
    """Steps of max(T_F + T_s) + T_server + max(T_B), and adapters; gradients take time, too."""
    log = list(events("fedsllm", SETTING, steps(4, every=4)))
    forward = paper_forward(3, LOAD) / 1e12
    sent = 8 * 4 * costs.activation_values(SHAPE, LOAD) / 1e8
    served = 3 * paper_forward(9, LOAD + LOAD + LOAD) / 1e13
    adapters = costs.adapter_parameters(SHAPE, 3, 4)
    moved = 2 * 8 * 4 * adapters / 1e8 + 2 * 3 * adapters / 1e13
    expected = 4 * (3 * forward + 2 * sent + served) + moved
    assert replay(log, network()).makespan == pytest.approx(expected)


def test_the_federated_server_sees_adapters_only() -> None:
    log = list(events("fedsllm", SETTING, steps(2)))
    seen = [one for one in log if "federated" in parties(one)]
    assert {one.phase for one in seen} == {"adapter", "average"}
    assert not any(one.phase == "adapter" and "server" in parties(one) for one in log)


# --- splitfrozen -----------------------------------------------------------------------------


def test_nothing_comes_back_and_devices_only_run_forward() -> None:
    log = list(events("splitfrozen", SETTING, steps(4)))
    sends = [one for one in log if isinstance(one, Send)]
    assert {(one.target, one.phase) for one in sends} == {("server", "activations")}
    assert {one.phase for one in log if parties(one)[0] in DEVICES} == {"front", "activations"}
    assert Counter(one.phase for one in log) == {
        "front": 12,
        "activations": 12,
        "lift": 4,
        "forward": 4,
        "backward": 4,
        "weights": 4,
    }


def test_the_server_lifts_what_shallow_devices_left_out() -> None:
    log = list(events("splitfrozen", SETTING, steps(1)))
    front = {one.who: one.flops for one in log if isinstance(one, Compute) and one.phase == "front"}
    assert front["a"] + flops(log, "lift") == pytest.approx(front["b"])
    assert front["b"] == front["c"] == paper_forward(3, LOAD, rank=0)
    lift = next(one for one in log if one.phase == "lift")
    forward = next(one for one in log if one.phase == "forward")
    assert log[lift.after[0]].phase == "activations"
    assert lift.id in forward.after
    assert len(forward.after) == 3


def test_weights_come_after_b_and_before_the_next_forward() -> None:
    times = ends(list(events("splitfrozen", SETTING, steps(3))), network(server=1e11))
    for step in range(2):
        assert times["server", "forward", step][1] <= times["server", "backward", step][0]
        assert times["server", "backward", step][1] <= times["server", "weights", step][0]
        assert times["server", "weights", step][1] <= times["server", "forward", step + 1][0]


def test_stored_steps_cost_the_devices_nothing() -> None:
    fresh = list(steps(2))
    again = [replace(step, number=step.number + 2, stored=True) for step in fresh]
    log = list(events("splitfrozen", replace(SETTING, ahead=None), fresh + again))
    assert {one.phase for one in log if one.step >= 2} == {"forward", "backward", "weights"}
    never = list(events("splitfrozen", SETTING, steps(4)))
    assert flops(log, "front") == flops(never, "front") / 2
    assert flops(log, "forward", "backward") == flops(never, "forward", "backward")


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_devices_run_ahead_no_further_than_allowed(ahead: int) -> None:
    log = list(events("splitfrozen", replace(SETTING, ahead=ahead), steps(8)))
    times = ends(log, network(server=1e11))
    for step in range(ahead, 8):
        for device in DEVICES:
            assert times[device, "front", step][0] >= times["server", "weights", step - ahead][1]
    assert times["b", "front", ahead - 1][0] < times["server", "weights", 0][1]


@pytest.mark.parametrize("net", [network(), network(server=2e11), network(device=1e10)])
def test_three_steps_ahead_lose_nothing_against_no_bound(net: Network) -> None:
    spans = {
        ahead: replay(events("splitfrozen", replace(SETTING, ahead=ahead), steps(30)), net).makespan
        for ahead in (1, 3, None)
    }
    assert spans[3] == pytest.approx(spans[None], rel=1e-9)
    assert spans[1] > 1.01 * spans[3]


def test_stages_share_what_one_server_would_compute() -> None:
    staged = replace(SETTING, stages=Stages(4, 8, "zb-h1"))
    one = list(events("splitfrozen", SETTING, steps(3)))
    four = list(events("splitfrozen", staged, steps(3)))
    assert [event.id for event in four] == list(range(len(four)))
    for phase in ("front", "lift", "forward", "backward", "weights"):
        assert flops(four, phase) == pytest.approx(flops(one, phase))
    lifts = {one.who for one in four if isinstance(one, Compute) and one.phase == "lift"}
    assert lifts == {"server/0"}
    parts = Counter(one.who for one in four if isinstance(one, Compute) and one.phase == "forward")
    assert parts == {f"server/{stage}": 3 * 8 for stage in range(4)}
    times = ends(four, network())
    assert times["b", "front", 3 - 1][0] < times["server/0", "weights", 0][1]


# --- bytes -----------------------------------------------------------------------------------


def test_measured_bytes_count_instead_of_formulas() -> None:
    wire = Wire(measured={("activations", "b", 1): 7.0, ("gradients", "c", 0): 9.0})
    log = list(events("splitlora", replace(SETTING, wire=wire), steps(2, every=9)))
    plain = list(events("splitlora", SETTING, steps(2, every=9)))
    changed = [
        (one.phase, one.bytes)
        for one, other in zip(log, plain, strict=True)
        if isinstance(one, Send) and one != other
    ]
    assert changed == [("gradients", 9.0), ("activations", 7.0)]
