"""The picture of a timeline: which lanes, how far, and that it is drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitfrozen.errors import StoreError
from splitfrozen.records import Compute, Event, Send
from splitfrozen.simulation.gantt import COLOURS, MOST_BARS, MOST_LANES, draw
from splitfrozen.simulation.network import Link, Machine, Network
from splitfrozen.simulation.timeline import Timeline, replay

NETWORK = Network(
    {"device": Machine(1.0), "server": Machine(10.0)},
    {("device", "server"): Link(8.0), ("server", "device"): Link(80.0)},
)


def run(devices: int, steps: int, server: tuple[str, ...] = ("server",)) -> Timeline:
    events: list[Event] = []
    for step in range(steps):
        sends = []
        for device in range(devices):
            number = len(events)
            events.append(Compute(number, f"d{device}", "front", step, 1.0))
            events.append(
                Send(number + 1, f"d{device}", "server", "activations", step, 0.5, (number,))
            )
            sends.append(number + 1)
        for who in server:
            events.append(Compute(len(events), who, "forward", step, 5.0, tuple(sends)))
        events.append(
            Send(len(events), "server", "d0", "$odd_phase$", step, 1.0, (len(events) - 1,))
        )
    return replay(events, NETWORK)


def words(timeline: Timeline, folder: Path) -> str:
    """What is written in the picture: matplotlib says it in comments of an SVG."""
    path = folder / "picture.svg"
    draw(timeline, path, "run")
    return "\n".join(re.findall(r"<!-- (.*) -->", path.read_text()))


def test_lanes_are_ordered_as_in_the_figure(tmp_path: Path):
    found = words(run(11, 2, ("server/1", "server/0")), tmp_path).splitlines()
    lanes = [word for word in found if word.startswith(("d", "server"))]
    assert lanes[:4] == ["d0", "d0 → server", "server → d0", "d1"]
    assert lanes[-4:] == ["d10", "d10 → server", "server/0", "server/1"]
    assert len(lanes) == 11 * 2 + 1 + 2


def test_title_legend_and_steps(tmp_path: Path):
    found = words(run(4, 6), tmp_path).splitlines()
    assert "run: 7.1 s" in found
    assert {"front", "activations", "forward", "$odd_phase$", "seconds"} <= set(found)
    assert {"backward", "gradients"} <= COLOURS.keys()
    assert not {"backward", "gradients"} & set(found)
    assert found.count("5") >= 8  # the last step is written in the lanes of all devices


def test_what_is_left_out_is_said(tmp_path: Path):
    many = run(100, 2)
    found = words(many, tmp_path)
    shown = found.count("→ server")
    assert f"run: {shown} of 100 devices" in found
    assert MOST_LANES // 2 - 2 <= shown <= MOST_LANES // 2
    assert "\nserver\n" in found
    long = run(1, 3 * MOST_BARS)
    assert f"run: the first {MOST_BARS} of {long.makespan:.3g} s" in words(long, tmp_path)
    wide = run(2, 1, tuple(f"server/{stage}" for stage in range(40)))
    assert f"{MOST_LANES // 2} of the server's 40 lanes" in words(wide, tmp_path)


@pytest.mark.parametrize("timeline", [run(4, 6), run(0, 0), replay([], NETWORK)])
def test_a_png_is_drawn(timeline: Timeline, tmp_path: Path):
    path = tmp_path / "gantt.png"
    draw(timeline, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path):
    with pytest.raises(StoreError):
        draw(run(1, 1), tmp_path / "no" / "gantt.png")


def test_a_phase_is_no_formula(tmp_path: Path):
    odd = replay([Compute(0, "server", "$\\frac{", 0, 1.0)], NETWORK)
    draw(odd, tmp_path / "gantt.png", "$")
    assert (tmp_path / "gantt.png").read_bytes().startswith(b"\x89PNG")
