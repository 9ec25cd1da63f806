"""The replay against cases worked out by hand and against slow references, and what it writes."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfrozen.errors import RequestError, StoreError
from splitfrozen.records import Compute, Event, Send
from splitfrozen.simulation.network import Link, Machine, Network, Trace
from splitfrozen.simulation.timeline import COLUMNS, SHOWN, Timeline, measured, replay

BYTE = 8.0
"""bit/s of a link that carries a byte a second."""
MACHINE, LINK = Machine(1.0), Link(BYTE)


def network(machine: Machine = MACHINE, up: Link = LINK, **machines: Machine) -> Network:
    """Every party computes 1 FLOP/s and every link carries 1 byte/s, unless said otherwise."""
    roles = {"device": machine, "server": machine, "federated": machine}
    pairs = [("device", "server"), ("device", "device"), ("device", "federated")]
    return Network({**roles, **machines}, dict.fromkeys(pairs, up) | {("server", "device"): up})


def compute(number: int, who: str, flops: float, *after: int) -> Compute:
    return Compute(number, who, "work", 0, flops, after)


def send(number: int, source: str, size: float, *after: int, target: str = "server") -> Send:
    return Send(number, source, target, "data", 0, size, after)


def times(timeline: Timeline) -> list[tuple[float, float]]:
    return list(zip(timeline.begin.tolist(), timeline.end.tolist(), strict=True))


# --- by hand ---------------------------------------------------------------------------------


def test_parties_work_side_by_side_and_each_does_one_thing_at_a_time():
    events = [compute(0, "a", 2), compute(1, "a", 3), compute(2, "b", 4), compute(3, "b", 1, 0)]
    assert times(replay(events, network())) == [(0, 2), (2, 5), (0, 4), (4, 5)]


def test_an_event_waits_for_all_that_it_names():
    events = [
        compute(0, "a", 2),
        send(1, "a", 3, 0),
        compute(2, "b", 4),
        compute(3, "server", 1, 1, 2, 1),
    ]
    assert times(replay(events, network())) == [(0, 2), (2, 5), (0, 4), (5, 6)]


def test_who_is_ready_first_goes_first_whatever_the_id():
    events = [
        compute(0, "a", 5),
        compute(1, "b", 2),
        compute(2, "server", 4),
        compute(3, "server", 10, 0),
        compute(4, "server", 1, 1),
    ]
    assert times(replay(events, network()))[2:] == [(0, 4), (5, 15), (4, 5)]


def test_ties_go_by_id_and_ends_go_before_begins():
    events = [
        compute(0, "z", 2),
        compute(1, "a", 2),
        compute(2, "server", 1, 0),
        compute(3, "server", 5, 1),
    ]
    assert times(replay(events, network()))[2:] == [(2, 3), (3, 8)]
    swapped = [*events[:2], compute(2, "server", 5, 1), compute(3, "server", 1, 0)]
    assert times(replay(swapped, network()))[2:] == [(2, 7), (7, 8)]


def test_ready_at_the_same_second_is_a_tie_even_if_found_out_later():
    events = [
        compute(0, "server", 0),
        compute(1, "a", 0),
        compute(2, "server", 1, 1),
        compute(3, "server", 1),
    ]
    assert times(replay(events, network())) == [(0, 0), (0, 0), (0, 1), (1, 2)]


def test_a_dedicated_link_takes_turns_and_a_shared_one_divides_its_rate():
    events = [send(0, "a", 2), send(1, "a", 2), send(2, "b", 2)]
    assert times(replay(events, network())) == [(0, 2), (2, 4), (0, 2)]
    shared = network(up=Link(BYTE, shared="cell"))
    assert times(replay(events, shared)) == [(0, 6), (0, 6), (0, 6)]


def test_two_devices_share_a_link():
    events = [send(0, "a", 4), compute(1, "b", 2), send(2, "b", 4, 1), send(3, "a", 1, 2)]
    timeline = replay(events, network(up=Link(BYTE, shared="cell")))
    # a alone: 2 bytes in 2 s; both: 2 bytes each in 4 s; b alone: 2 bytes in 2 s; then a again.
    assert times(timeline) == [(0, 6), (0, 2), (2, 8), (8, 9)]
    assert timeline.busy("shared cell") == 9
    assert timeline.busy("a>server") == 7
    assert [lane.medium for lane in timeline.lanes] == ["cell", None, "cell"]


def test_both_ways_may_share_one_medium():
    events = [send(0, "a", 3), send(1, "server", 1, target="b")]
    assert times(replay(events, network(up=Link(BYTE, shared="air")))) == [(0, 4), (0, 2)]


@pytest.mark.parametrize("shared", [None, "cell"])
def test_latency_delays_the_arrival_and_leaves_the_link_free(shared: str | None):
    up = Link(BYTE, latency_s=5.0, shared=shared)
    events = [send(0, "a", 2), compute(1, "a", 2), send(2, "a", 2, 1), compute(3, "server", 1, 0)]
    timeline = replay(events, network(up=up))
    assert times(timeline) == [(0, 7), (0, 2), (2, 9), (7, 8)]
    assert timeline.left.tolist() == [2, 2, 4, 8]
    assert timeline.busy("a>server") == 4


def test_a_machine_that_slows_down_half_way():
    slow = Machine(2.0, efficiency=0.5, trace=((5.0, 0.5), (9.0, 4.0)))
    events = [compute(0, "a", 4), compute(1, "a", 2), compute(2, "a", 6)]
    assert times(replay(events, network(slow))) == [(0, 4), (4, 7), (7, 10.25)]


@pytest.mark.parametrize("shared", [None, "cell"])
def test_an_outage_is_waited_for(shared: str | None):
    up = Link(BYTE, shared=shared, trace=((2.0, 0.0), (10.0, 0.5)))
    events = [send(0, "a", 2), compute(1, "b", 3), send(2, "b", 1, 1)]
    assert times(replay(events, network(up=up))) == [(0, 2), (0, 3), (3, 12)]


def test_a_shared_rate_that_changes_is_divided_equally_all_the_time():
    up = Link(BYTE, shared="cell", trace=((2.0, 0.0), (4.0, 2.0)))
    events = [send(0, "a", 3), compute(1, "b", 1), send(2, "b", 2, 1)]
    # a: 1 by second 1; both 0.5 by second 2; both 1.5 more by 5.5, which ends both.
    assert times(replay(events, network(up=up))) == [(0, 5.5), (0, 1), (1, 5.5)]


def test_events_that_cost_nothing_take_no_time():
    events: list[Event] = [
        compute(0, "a", 0),
        send(1, "a", 0, 0),
        compute(2, "server", 0, 1),
        compute(3, "server", 3, 2),
        compute(4, "server", 0, 2),
    ]
    wanted = [(0, 0), (0, 0), (0, 0), (0, 3), (3, 3)]
    for up in (Link(BYTE), Link(BYTE, shared="cell")):
        timeline = replay(events, network(up=up))
        assert times(timeline) == wanted
        assert timeline.makespan == 3
    still = replay(events[:3], network())
    assert still.makespan == 0
    assert [(row["busy"], row["bubble"], row["idle"]) for row in still.rows] == [(0, 0, 0)] * 3


def test_no_events_take_no_time():
    timeline = replay([], network())
    assert timeline.makespan == 0
    assert timeline.rows == []
    assert timeline.table().endswith("makespan 0.000 s")


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([compute(1, "a", 1)], r"not numbered in order: got id 1 at place 0"),
        ([compute(0, "a", 1), compute(0, "a", 1)], r"got id 0 at place 1"),
        ([compute(0, "a", 1, 0)], r"event 0 \(work\) waits .*got after 0 .. 0; allowed: ids below"),
        ([compute(0, "a", 1), send(1, "a", 1, 0, 7)], r"event 1 \(data\) waits .*after 0 \.\. 7"),
        ([compute(0, "a", 1), compute(1, "a", 1, -1)], r"got after -1 \.\. -1"),
        ([compute(0, "a", math.nan)], r"flops of event 0 \(work\) is no amount: got nan"),
        ([compute(0, "a", -1)], r"got -1; allowed: a finite number, 0 or more"),
        ([send(0, "a", math.inf)], r"bytes of event 0 \(data\) is no amount: got inf"),
        ([send(0, "a", 1, target="nobody/else")], None),
        ([send(0, "federated", 1)], r"no link: got 'federated' to 'server'"),
        ([compute(0, "a", 1e308), compute(1, "slow", 1e308)], r"slow never ends event 1 \(work\)"),
    ],
)
def test_a_bad_log_is_refused(events: list[Event], message: str | None):
    known = network(slow=Machine(1e-9))
    if message is None:
        assert replay(events, known).makespan == 1
        return
    with pytest.raises(RequestError, match=message):
        replay(events, known)


def test_an_unknown_party_is_refused():
    with pytest.raises(RequestError, match="a party has no machine: got 'b'; allowed: a"):
        replay([compute(0, "b", 1)], Network({"a": Machine(1.0)}, {}))


@pytest.mark.parametrize(("shared", "where"), [(None, "a>server"), ("cell", "the medium cell")])
def test_a_link_that_stays_dead_is_named_with_its_event(shared: str | None, where: str):
    up = Link(BYTE, shared=shared, trace=((2.0, 0.0),))
    assert replay([send(0, "a", 2)], network(up=up)).makespan == 2
    with pytest.raises(RequestError, match=rf"{where}.* never ends event 1 \(data\): .*with bytes"):
        replay([compute(0, "a", 1), send(1, "a", 2, 0)], network(up=up))


def test_a_machine_that_stays_dead_is_named_with_its_event():
    dead = network(Machine(1.0, trace=((3.0, 0.0),)))
    with pytest.raises(RequestError, match=r"a never ends event 1 \(work\).* second 2 on, with FL"):
        replay([compute(0, "a", 2), compute(1, "a", 2)], dead)


# --- against slow references -----------------------------------------------------------------

WHOS = ("a", "b", "server")
costs = st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 3.0])


@st.composite
def logs(draw: Callable[..., Any], most: int = 14) -> list[Event]:
    """Small random graphs with many ties; every amount is exact in floating point."""
    events: list[Event] = []
    for number in range(draw(st.integers(1, most))):
        before = st.sets(st.integers(0, number - 1), max_size=3) if number else st.just(set())
        after = tuple(sorted(draw(before)))
        cost, who = draw(costs), draw(st.sampled_from(WHOS))
        if draw(st.booleans()):
            events.append(compute(number, who, cost, *after))
        else:
            source, target = draw(st.sampled_from([("a", "server"), ("b", "server"), ("a", "b")]))
            events.append(send(number, source, cost, *after, target=target))
    return events


def lane(event: Event) -> tuple[str, ...]:
    return (event.who,) if isinstance(event, Compute) else (event.source, event.target)


def one_at_a_time(events: Sequence[Event], net: Network) -> list[tuple[float, float]]:
    """Scan everything at every instant: no heap, no counters. Dedicated links, no traces."""
    ready: dict[int, float] = {}
    begin: dict[int, float] = {}
    left: dict[int, float] = {}
    end: dict[int, float] = {}
    now = 0.0
    while len(end) < len(events) or max(end.values()) > now:
        moved = False
        for event in events:
            if event.id not in ready and all(end.get(one, now + 1) <= now for one in event.after):
                ready[event.id] = now
                moved = True
        for key in sorted({lane(event) for event in events}):
            mine = [event for event in events if lane(event) == key and event.id in ready]
            if any(left.get(event.id, now) > now for event in mine):
                continue
            queue = [(ready[event.id], event.id) for event in mine if event.id not in begin]
            if queue:
                event = events[min(queue)[1]]
                begin[event.id] = now
                if isinstance(event, Compute):
                    machine = net.machine(event.who)
                    left[event.id] = end[event.id] = now + event.flops / machine.flops
                else:
                    link = net.link(event.source, event.target)
                    left[event.id] = now + 8 * event.bytes / link.bps
                    end[event.id] = left[event.id] + link.latency_s
                moved = True
        if not moved:
            now = min(t for t in [*left.values(), *end.values()] if t > now)
    return [(begin[event.id], end[event.id]) for event in events]


@settings(max_examples=150, deadline=None)
@given(logs())
def test_dedicated_links_equal_the_slow_reference(events: list[Event]):
    net = Network(
        {"a": Machine(1.0), "b": Machine(0.5), "server": Machine(2.0)},
        {
            ("a", "server"): Link(BYTE, 0.5),
            ("b", "server"): Link(BYTE / 2),
            ("a", "b"): Link(2 * BYTE),
        },
    )
    timeline = replay(events, net)
    assert times(timeline) == one_at_a_time(events, net)
    again = replay(iter(events), net)
    for column in ("begin", "left", "end", "lane"):
        assert getattr(timeline, column).tobytes() == getattr(again, column).tobytes()


def sharing(events: Sequence[Event], trace: Trace, latency: Fraction) -> list[tuple[float, float]]:
    """All sends on one medium of 1 byte/s, all computations side by side; in exact fractions."""
    left: dict[int, Fraction] = {}  # FLOP or bytes of what is under way
    begin: dict[int, Fraction] = {}
    end: dict[int, Fraction] = {}
    now = Fraction(0)
    while len(end) < len(events) or max(end.values()) > now:
        for event in events:
            if event.id not in begin and all(end.get(one, now + 1) <= now for one in event.after):
                begin[event.id] = now
                left[event.id] = Fraction(
                    event.flops if isinstance(event, Compute) else event.bytes
                )
        over = [number for number in left if left[number] == 0]
        for number in over:
            del left[number]
            end[number] = now + (latency if isinstance(events[number], Send) else 0)
        if over:
            continue
        factor = Fraction([1.0, *(f for second, f in trace if second <= now)][-1])
        sends = [number for number in left if isinstance(events[number], Send)]
        rate = {n: factor / len(sends) if n in sends else Fraction(1) for n in left}
        coming = [now + left[number] / rate[number] for number in left if rate[number]]
        coming += [Fraction(second) for second, _ in trace if second > now]
        coming += [time for time in end.values() if time > now]
        if not coming:
            break
        later = min(coming)
        for number in left:
            left[number] -= rate[number] * (later - now)
        now = later
    return [(float(begin[event.id]), float(end[event.id])) for event in events]


@settings(max_examples=150, deadline=None)
@given(
    logs(10),
    st.sampled_from([(), ((1.0, 0.5),), ((0.5, 2.0), (1.75, 0.25), (4.0, 1.0))]),
    st.sampled_from([0.0, 0.75]),
)
def test_a_shared_medium_equals_the_exact_reference(
    events: list[Event], trace: Trace, latency: float
):
    # Each computation has a party of its own: a queue would turn rounding into another order.
    alone: list[Event] = [
        compute(e.id, f"d{e.id}", e.flops, *e.after) if isinstance(e, Compute) else e
        for e in events
    ]
    net = network(up=Link(BYTE, latency, "cell", trace))
    wanted = sharing(alone, trace, Fraction(latency))
    np.testing.assert_allclose(times(replay(alone, net)), wanted, rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(WHOS), st.floats(0, 100)), min_size=1, max_size=12),
    st.sampled_from([(), ((3.0, 0.25),), ((1.0, 0.0), (30.0, 3.0))]),
    st.sampled_from(WHOS),
    st.floats(1.01, 10),
)
def test_a_faster_machine_never_makes_a_chain_slower(
    chain: list[tuple[str, float]], trace: Trace, faster: str, times_as_fast: float
):
    events = [
        compute(i, who, cost, *range(max(0, i - 1), i)) for i, (who, cost) in enumerate(chain)
    ]
    before = network(**{who: Machine(1.0, trace=trace) for who in WHOS})
    after = network(
        **{who: Machine(times_as_fast if who == faster else 1.0, trace=trace) for who in WHOS}
    )
    slow, fast = replay(events, before).makespan, replay(events, after).makespan
    assert fast <= slow * (1 + 1e-12)
    if not trace and sum(cost for who, cost in chain if who == faster) > 1e-3:
        assert fast < slow


# --- what is read off it ---------------------------------------------------------------------


@pytest.fixture
def timeline() -> Timeline:
    """Two devices, two steps; b's second front waits for the server."""
    events = [
        Compute(0, "a", "front", 0, 2.0),
        Send(1, "a", "server", "activations", 0, 1.0, (0,)),
        Compute(2, "b", "front", 0, 1.0),
        Send(3, "b", "server", "activations", 0, 1.0, (2,)),
        Compute(4, "server", "forward", 0, 1.0, (1, 3)),
        Compute(5, "server", "backward", 0, 2.0, (4,)),
        Compute(6, "b", "front", 1, 1.0, (5,)),
        Send(7, "b", "server", "activations", 1, 2.0, (6,)),
        Compute(8, "server", "forward", 1, 1.0, (7,)),
    ]
    return replay(events, network(up=Link(BYTE, shared="cell")))


def test_rows_say_who_worked_when_and_on_what(timeline: Timeline):
    assert timeline.makespan == 10
    rows = {row["who"]: row for row in timeline.rows}
    assert list(rows) == ["a", "a>server", "b", "b>server", "server", "shared cell"]
    assert rows["server"] == {
        "who": "server",
        "events": 3,
        "flops": 4.0,
        "bytes": 0.0,
        "first_s": 3.0,
        "last_s": 10.0,
        "busy_s": 4.0,
        "busy": 0.4,
        "bubble_s": 3.0,
        "bubble": pytest.approx(3 / 7),
        "idle": 0.6,
        "phases": {"forward": 2.0, "backward": 2.0},
    }
    assert rows["b"]["busy_s"] == timeline.busy("b") == 2
    assert rows["b"]["bubble_s"] == 5
    assert rows["shared cell"]["bytes"] == 4
    assert rows["shared cell"]["busy_s"] == 4
    assert timeline.busy("nobody") == 0


def test_a_medium_is_busy_once_however_many_send():
    events = [send(0, "a", 4), send(1, "b", 2), compute(2, "b", 9), send(3, "b", 1, 2)]
    timeline = replay(events, network(up=Link(BYTE, shared="cell")))
    assert timeline.busy("shared cell") == 7
    assert [row["bubble_s"] for row in timeline.rows if row["who"] == "shared cell"] == [3]


def test_the_table_is_aligned_and_puts_the_server_first(timeline: Timeline):
    lines = timeline.table().splitlines()
    assert lines[0].split()[:3] == ["who", "events", "busy"]
    assert " ".join(lines[1].split()) == "server 3 4.000 40.0 42.9 60.0 - - 2.000 2.000"
    assert lines[2].startswith("shared cell ")
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1] == "makespan 10.000 s"


def test_a_long_table_leaves_out_devices():
    events: list[Event] = [compute(i, f"d{i}", 1) for i in range(SHOWN + 5)]
    events.append(compute(len(events), "server", 1, 0))
    timeline = replay(events, network())
    lines = timeline.table().splitlines()
    assert len(timeline.rows) == SHOWN + 6
    assert len(lines) == SHOWN + 3
    assert lines[1].startswith("server")
    assert lines[-2] == "and 6 more rows"


def test_the_csv_holds_every_event(timeline: Timeline, tmp_path: Path):
    path = tmp_path / "events.csv"
    timeline.write_csv(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["id"]) for row in rows] == list(range(9))
    assert rows[4] == dict(
        zip(
            COLUMNS,
            ["4", "compute", "server", "", "forward", "0", "1.0", "", "3.0", "4.0", "4.0", "1 3"],
            strict=True,
        )
    )
    assert [row["target"] for row in rows if row["event"] == "send"] == ["server"] * 3
    assert [float(row["end_s"]) for row in rows] == timeline.end.tolist()


def test_the_trace_is_one_that_perfetto_opens(timeline: Timeline, tmp_path: Path):
    path = tmp_path / "trace.json"
    timeline.write_trace(path)
    entries = json.loads(path.read_text())["traceEvents"]
    slices = [entry for entry in entries if entry["ph"] == "X"]
    assert {entry["ph"] for entry in entries} == {"X", "M"}
    assert len(slices) == 9
    assert [entry["ts"] for entry in slices] == sorted(entry["ts"] for entry in slices)
    names = {
        (entry["pid"], entry["tid"]): entry["args"]["name"]
        for entry in entries
        if entry["name"] == "thread_name"
    }
    assert sorted(names.values()) == ["a", "a>server", "b", "b>server", "server"]
    backward = next(entry for entry in slices if entry["name"] == "backward")
    assert names[backward["pid"], backward["tid"]] == "server"
    assert (backward["ts"], backward["dur"], backward["cat"]) == (4e6, 2e6, "compute")
    assert backward["args"] == {
        "phase": "backward",
        "id": 5,
        "step": 0,
        "end_s": 6.0,
        "flops": 2.0,
    }
    sends = [entry for entry in slices if entry["cat"] == "send"]
    assert {entry["pid"] for entry in sends} == {2}
    assert [entry["args"]["bytes"] for entry in sends] == [1, 1, 2]


def test_slices_of_one_track_never_overlap(tmp_path: Path):
    events: list[Event] = [send(i, "a", 1.0 + i) for i in range(3)]
    events += [compute(3, "b", 5), send(4, "a", 1, 3)]
    path = tmp_path / "trace.json"
    replay(events, network(up=Link(BYTE, shared="cell"))).write_trace(path)
    tracks: dict[int, list[dict[str, float]]] = {}
    entries = json.loads(path.read_text())["traceEvents"]
    for entry in entries:
        if entry["ph"] == "X":
            tracks.setdefault(entry["tid"], []).append(entry)
    assert len(tracks) == 4
    for slices in tracks.values():
        for one, other in itertools.pairwise(slices):
            assert one["ts"] + one["dur"] <= other["ts"]
    names = [entry["args"]["name"] for entry in entries if entry["name"] == "thread_name"]
    assert names == ["a>server", "a>server #2", "a>server #3", "b"]


def test_an_empty_trace_is_valid(tmp_path: Path):
    replay([], network()).write_trace(tmp_path / "trace.json")
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) == 2


def test_a_file_that_cannot_be_written_is_an_error_of_ours(timeline: Timeline, tmp_path: Path):
    for write in (timeline.write_csv, timeline.write_trace):
        with pytest.raises(StoreError):
            write(tmp_path / "no" / "folder")


def test_a_measured_log_is_laid_beside_its_replay():
    log = [
        Compute(0, "a", "front", 0, 2.0, (), 0.0, 2.5),
        Send(1, "a", "server", "activations", 0, 1.0, (0,), 2.5, 3.75),
    ]
    real, forecast = measured(log), replay(log, network())
    assert (real.makespan, forecast.makespan) == (3.75, 3.0)
    assert [row["who"] for row in real.rows] == [row["who"] for row in forecast.rows]
    assert [row["busy_s"] for row in real.rows] == [2.5, 1.25]


@pytest.mark.parametrize(
    ("begin", "end"), [(None, None), (1.0, None), (2.0, 1.0), (math.nan, 1.0), (-1.0, 1.0)]
)
def test_a_log_without_times_was_not_measured(begin: float | None, end: float | None):
    with pytest.raises(RequestError, match=r"event 0 \(front\) was not measured"):
        measured([Compute(0, "a", "front", 0, 2.0, (), begin, end)])
