"""Depth planning: the paper's allocation, and the rule against its definition by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfrozen.errors import PlanError
from splitfrozen.planning.depth import TOLERANCE, assign
from splitfrozen.records import DeviceProfile, FrontManifest

MIB = 1 << 20


def front(depth: int, flops: int = 14_000_000, memory: int = 30 * MIB) -> FrontManifest:
    return FrontManifest(
        depth=depth,
        width=768,
        precision="float32",
        hash="0" * 64,
        graph="g",
        files=(),
        flops_per_token=flops * depth,
        memory_bytes=150 * MIB + memory * depth,
    )


def device(
    flops: float = 1e9, memory_bytes: int = 8 << 30, uplink_bps: float = 1e12
) -> DeviceProfile:
    return DeviceProfile(
        flops=flops, memory_bytes=memory_bytes, uplink_bps=uplink_bps, cores=1, platform="test"
    )


FRONTS = [front(depth) for depth in range(1, 5)]
PROFILES = st.builds(
    device,
    flops=st.floats(1e6, 1e12),
    memory_bytes=st.integers(180 * MIB, 400 * MIB),
    uplink_bps=st.floats(1e4, 1e10),
)
NETWORKS = st.dictionaries(st.sampled_from("abcdefg"), PROFILES, min_size=1)


def test_the_papers_setting() -> None:
    """3 devices at 10 % and 7 at 20 % of a GPU get depths 1 and 3 (section IV-A)."""
    gpu = 82.6e12
    profiles = {f"device-{i:02}": device(gpu * (0.1 if i < 3 else 0.2)) for i in range(10)}
    depths = assign(profiles, [front(depth) for depth in (1, 2, 3)], 1536)
    assert list(depths.values()) == [1] * 3 + [3] * 7


def test_a_narrow_link_takes_depth() -> None:
    """All blocks cost the link the same: a slow link leaves less time for blocks."""
    profiles = {"fast": device(uplink_bps=1e9), "narrow": device(uplink_bps=1e6)}
    assert assign(profiles, FRONTS, 1536) == {"fast": 4, "narrow": 3}


def test_a_fast_device_without_memory_does_not_set_the_pace() -> None:
    small = device(flops=1e12, memory_bytes=FRONTS[0].memory_bytes)
    assert assign({"big": device(), "small": small}, FRONTS, 100) == {"big": 4, "small": 1}


def test_too_little_memory_names_device_need_and_have() -> None:
    need = FRONTS[0].memory_bytes
    profiles = {"device-00": device(), "device-01": device(memory_bytes=need - 1)}
    with pytest.raises(PlanError, match=f"device-01.*{need - 1} bytes.*{need} bytes or more"):
        assign(profiles, FRONTS, 100)


@given(NETWORKS, st.floats(1, 1e5))
def test_it_is_the_definition(profiles: dict[str, DeviceProfile], bytes_per_token: float) -> None:
    def seconds(name: str, depth: int) -> float:
        profile = profiles[name]
        return (
            FRONTS[depth - 1].flops_per_token / profile.flops
            + 8 * bytes_per_token / profile.uplink_bps
        )

    fits = {
        name: [n for n in range(1, 5) if FRONTS[n - 1].memory_bytes <= profile.memory_bytes]
        for name, profile in profiles.items()
    }
    deepest = max(map(max, fits.values()))
    pace = min(seconds(name, deepest) for name, held in fits.items() if deepest in held)
    expected = {
        name: max([n for n in held if seconds(name, n) <= pace * (1 + TOLERANCE)], default=1)
        for name, held in sorted(fits.items())
    }
    found = assign(profiles, FRONTS, bytes_per_token)
    assert found == expected
    assert list(found) == sorted(profiles)
    assert max(found.values()) == deepest
    for name, depth in found.items():
        assert FRONTS[depth - 1].memory_bytes <= profiles[name].memory_bytes


@given(NETWORKS, st.data(), st.floats(1, 10), st.integers(0, 100 * MIB), st.floats(1, 10))
def test_more_speed_memory_or_link_never_gives_less_depth(
    profiles: dict[str, DeviceProfile],
    data: st.DataObject,
    speed: float,
    memory: int,
    link: float,
) -> None:
    name = data.draw(st.sampled_from(sorted(profiles)))
    old = profiles[name]
    better = device(old.flops * speed, old.memory_bytes + memory, old.uplink_bps * link)
    before = assign(profiles, FRONTS, 1536)
    assert assign({**profiles, name: better}, FRONTS, 1536)[name] >= before[name]
