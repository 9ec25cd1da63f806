"""Machines, links and speeds that change over time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfrozen.errors import RequestError
from splitfrozen.simulation.network import Link, Machine, Network, Speed, Trace, role

OUTAGE: Trace = ((10.0, 0.5), (20.0, 0.0), (30.0, 2.0))
"""Of 100 a second: 1000 by second 10, 1500 by 20, 1500 by 30, then 200 a second."""


@pytest.mark.parametrize(
    ("begin", "work", "end"),
    [
        (0, 0, 0),
        (0, 500, 5),
        (0, 1000, 10),
        (0, 1250, 15),
        (0, 1500, 20),  # done as the outage begins: it is not delayed
        (0, 1501, 30.005),
        (15, 250, 20),
        (15, 450, 31),
        (20, 0, 20),
        (25, 0, 25),
        (25, 200, 31),
        (40, 200, 41),
    ],
)
def test_work_ends_when_the_pieces_sum_up_to_it(begin: float, work: float, end: float):
    speed = Speed(100.0, OUTAGE)
    assert speed.end(begin, work) == pytest.approx(end, abs=1e-12)
    if work:
        assert speed.work(begin, end) == pytest.approx(work)


def test_a_speed_that_stays_at_0_never_ends_its_work():
    speed = Speed(100.0, ((5.0, 0.0),))
    assert speed.end(0, 500) == 5
    assert speed.end(0, 501) == math.inf
    assert speed.end(7, 1) == math.inf
    assert speed.end(7, 0) == 7
    assert speed.work(3, 100) == 200


def test_a_trace_may_begin_at_second_0_and_have_no_other():
    assert Speed(100.0, ((0.0, 0.5),)).end(0, 100) == 2
    assert Speed(100.0, ()).end(1, 100) == 2


factors = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.7])
traces = st.lists(st.tuples(st.floats(0.1, 5), factors), max_size=6).map(
    lambda gaps: tuple((sum(g for g, _ in gaps[: i + 1]), f) for i, (_, f) in enumerate(gaps))
)


def stepped(rate: float, trace: Trace, begin: float, work: float) -> float:
    """When work ends, piece after piece."""
    pieces = [(0.0, 1.0), *trace]
    for (second, factor), (after, _) in zip(pieces, [*pieces[1:], (math.inf, 0)], strict=True):
        start = max(begin, second)
        if start >= after:
            continue
        if factor and work <= rate * factor * (after - start):
            return start + work / (rate * factor)
        work -= rate * factor * (after - start) if factor else 0.0
    return math.inf


@given(traces, st.floats(0, 20), st.floats(0.01, 1000))
def test_any_trace_is_integrated_exactly(trace: Trace, begin: float, work: float):
    speed = Speed(7.0, trace)
    end = speed.end(begin, work)
    # At the foot of an outage a rounding error decides on which side of it the work ends.
    wanted = [stepped(7.0, trace, begin, work * (1 + tiny)) for tiny in (-1e-12, 0, 1e-12)]
    assert any(end == pytest.approx(one, rel=1e-9) for one in wanted)
    if math.isfinite(end):
        assert end >= begin
        assert speed.work(begin, end) == pytest.approx(work, rel=1e-9, abs=1e-9)


def test_names_go_before_roles():
    network = Network(
        machines={
            "device": Machine(1.0),
            "weak": Machine(0.5),
            "server": Machine(9.0),
            "server/1": Machine(8.0),
        },
        links={
            ("device", "server"): Link(1.0),
            ("weak", "server"): Link(0.5),
            ("server", "device"): Link(2.0),
            ("server", "weak"): Link(0.25),
        },
    )
    assert [network.machine(who).flops for who in ("d7", "weak")] == [1.0, 0.5]
    assert [network.machine(who).flops for who in ("server", "server/0", "server/1")] == [9, 9, 8]
    pairs = [("d7", "server"), ("weak", "server"), ("server/0", "d7"), ("server", "weak")]
    assert [network.link(*pair).bps for pair in pairs] == [1.0, 0.5, 2.0, 0.25]


def test_roles():
    whos = ["server", "server/3", "federated", "device-1", "servers"]
    assert [role(who) for who in whos] == ["server", "server", "federated", "device", "device"]


def test_what_the_network_lacks_is_named():
    network = Network({"server": Machine(1.0)}, {("server", "device"): Link(1.0)})
    with pytest.raises(RequestError, match=r"no machine: got 'd7'; allowed: server; .*'device'"):
        network.machine("d7")
    with pytest.raises(RequestError, match="got 'd7' to 'server'; allowed: server to device"):
        network.link("d7", "server")
    with pytest.raises(RequestError, match="allowed: none is given"):
        Network({}, {}).machine("x")


def test_links_of_one_medium_agree_on_it():
    same = {("device", "server"): Link(5.0, 0.1, "cell"), ("a", "server"): Link(5.0, 0.2, "cell")}
    assert Network({}, same).link("a", "server").latency_s == 0.2
    with pytest.raises(RequestError, match="different things of the medium cell: got 6 bit/s"):
        Network({}, same | {("b", "server"): Link(6.0, 0.0, "cell")})
    with pytest.raises(RequestError, match="medium cell"):
        Network({}, same | {("b", "server"): Link(5.0, 0.0, "cell", ((1.0, 2.0),))})


@pytest.mark.parametrize("speed", [0.0, -1.0, math.inf, math.nan])
def test_a_speed_is_finite_and_above_0(speed: float):
    with pytest.raises(RequestError, match="allowed: finite FLOP/s above 0"):
        Machine(speed)
    with pytest.raises(RequestError, match="allowed: finite bit/s above 0"):
        Link(speed)


@pytest.mark.parametrize("efficiency", [0.0, 1.01, math.nan])
def test_an_efficiency_is_a_part(efficiency: float):
    with pytest.raises(RequestError, match="allowed: above 0 and at most 1"):
        Machine(1.0, efficiency)


@pytest.mark.parametrize("latency", [-0.1, math.inf, math.nan])
def test_a_latency_is_a_time(latency: float):
    with pytest.raises(RequestError, match="the latency of a link"):
        Link(1.0, latency)


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (((2.0, 1.0), (1.0, 1.0)), "got 1.0; .*seconds that grow"),
        (((2.0, 1.0), (2.0, 0.5)), "got 2.0; .*seconds that grow"),
        (((-1.0, 1.0),), "got -1.0; .*seconds that grow"),
        (((math.nan, 1.0),), "got nan; .*seconds that grow"),
        (((1.0, -0.5),), "got -0.5; .*finite factors"),
        (((1.0, math.inf),), "got inf; .*finite factors"),
    ],
)
def test_a_bad_trace_is_refused(trace: Trace, message: str):
    with pytest.raises(RequestError, match=message):
        Machine(1.0, trace=trace)
    with pytest.raises(RequestError, match=message):
        Link(1.0, trace=trace)
