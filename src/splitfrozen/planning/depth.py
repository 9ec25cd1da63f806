"""How deep a front each device runs: heterogeneity-aware layer allocation.

Section III-B (1) of the SplitFrozen paper gives more layers to faster devices, so that devices
deliver their activations at the same pace. Here the pace is that of the fastest device with the
deepest front, and every other device takes the deepest front with which it keeps it:

    seconds per token(device, n) = flops_per_token(n) / flops + 8 * bytes_per_token / uplink_bps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitfrozen.errors import PlanError
from splitfrozen.records import Announcement, DeviceProfile, FrontManifest

TOLERANCE = 0.1
"""Equal machines differ by so much from one measurement to the next."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one device is expected to do.

    Attributes:
        device: id.
        depth: n of its front.
        samples, tokens: as announced.
        seconds: computation and upload one after the other; overlapped, it takes less.
        bytes: to be uploaded.
    """

    device: str
    depth: int
    samples: int
    tokens: int
    seconds: float
    bytes: int


def token_seconds(profile: DeviceProfile, front: FrontManifest, bytes_per_token: float) -> float:
    """Seconds that a device needs to compute and upload one token."""
    compute_s = front.flops_per_token / profile.flops
    return compute_s + 8 * bytes_per_token / profile.uplink_bps


def target(
    profiles: Mapping[str, DeviceProfile], fronts: Sequence[FrontManifest], bytes_per_token: float
) -> float:
    """Seconds per token of the fastest device with the deepest front that any device can hold.

    Raises PlanError where no device has the memory for any front.
    """
    held = {name: _held(profile, fronts) for name, profile in profiles.items()}
    deepest = max((front.depth for found in held.values() for front in found), default=None)
    if deepest is None:
        device = min(profiles)
        raise _no_memory(device, profiles[device], fronts)
    return min(
        token_seconds(profiles[name], front, bytes_per_token)
        for name, found in held.items()
        for front in found
        if front.depth == deepest
    )


def assign(
    profiles: Mapping[str, DeviceProfile],
    fronts: Sequence[FrontManifest],
    bytes_per_token: float,
    target_s: float | None = None,
) -> dict[str, int]:
    """Give each device the deepest front that it can hold and that keeps the pace.

    A device that keeps the pace with no front gets the shallowest one.

    Args:
        profiles: device id -> what its probe measured.
        fronts: one for each depth that may be assigned.
        bytes_per_token: of an encoded activation, as it is uploaded.
        target_s: the pace in seconds per token; by default that of `target`. A device that joins
            late is placed by the pace that was fixed without it.

    Returns:
        Device id -> depth, in the order of ids.

    Raises:
        PlanError: the memory of a device holds no front.
    """
    if target_s is None:
        target_s = target(profiles, fronts, bytes_per_token)
    depths = {}
    for device, profile in sorted(profiles.items()):
        held = _held(profile, fronts)
        if not held:
            raise _no_memory(device, profile, fronts)
        allowed_s = target_s * (1 + TOLERANCE)
        in_time = [f for f in held if token_seconds(profile, f, bytes_per_token) <= allowed_s]
        depths[device] = max((f.depth for f in in_time), default=min(f.depth for f in held))
    return depths


def forecast(
    announced: Mapping[str, Announcement],
    profiles: Mapping[str, DeviceProfile],
    depths: Mapping[str, int],
    fronts: Sequence[FrontManifest],
    bytes_per_token: float,
) -> list[Forecast]:
    """What each device of `depths` is expected to do, in the order of ids."""
    by_depth = {front.depth: front for front in fronts}
    return [
        Forecast(
            device=device,
            depth=depth,
            samples=announced[device].samples,
            tokens=announced[device].tokens,
            seconds=announced[device].tokens
            * token_seconds(profiles[device], by_depth[depth], bytes_per_token),
            bytes=round(announced[device].tokens * bytes_per_token),
        )
        for device, depth in sorted(depths.items())
    ]


def _held(profile: DeviceProfile, fronts: Sequence[FrontManifest]) -> list[FrontManifest]:
    return [front for front in fronts if front.memory_bytes <= profile.memory_bytes]


def _no_memory(device: str, profile: DeviceProfile, fronts: Sequence[FrontManifest]) -> PlanError:
    least = min(front.memory_bytes for front in fronts)
    return PlanError(
        f"{device} has not the memory for the shallowest front",
        got=f"{profile.memory_bytes} bytes",
        allowed=f"{least} bytes or more",
        remedy="free memory on the device, or set model.front to a smaller precision",
    )
