"""How deep a front each device runs: heterogeneity-aware layer allocation.

Section III-B (1) of the SplitFrozen paper gives more layers to faster devices, so that devices
deliver their activations at the same pace. Here the pace is that of the fastest device with the
deepest front, and every other device takes the deepest front with which it keeps it:

    seconds per token(device, n) = flops_per_token(n) / flops + 8 * bytes_per_token / uplink_bps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitfrozen.errors import PlanError
from splitfrozen.records import DeviceProfile, FrontManifest

TOLERANCE = 0.1
"""Equal machines differ by so much from one measurement to the next."""


def assign(
    profiles: Mapping[str, DeviceProfile], fronts: Sequence[FrontManifest], bytes_per_token: float
) -> dict[str, int]:
    """Give each device the deepest front that it can hold and that keeps the pace.

    A device that keeps the pace with no front gets the shallowest one.

    Args:
        profiles: device id -> what its probe measured.
        fronts: one for each depth that may be assigned.
        bytes_per_token: of an encoded activation, as it is uploaded.

    Returns:
        Device id -> depth, in the order of ids.

    Raises:
        PlanError: the memory of a device holds no front.
    """
    seconds = {
        device: {
            front.depth: _token_seconds(profile, front, bytes_per_token)
            for front in fronts
            if front.memory_bytes <= profile.memory_bytes
        }
        for device, profile in sorted(profiles.items())
    }
    for device, held in seconds.items():
        if not held:
            raise no_memory(device, profiles[device], fronts)
    deepest = max(depth for held in seconds.values() for depth in held)
    pace_s = min(held[deepest] for held in seconds.values() if deepest in held)
    allowed_s = pace_s * (1 + TOLERANCE)
    return {
        device: max((n for n, one in held.items() if one <= allowed_s), default=min(held))
        for device, held in seconds.items()
    }


def no_memory(device: str, profile: DeviceProfile, fronts: Sequence[FrontManifest]) -> PlanError:
    """The error of a device whose memory holds none of the fronts that it may run."""
    least = min(front.memory_bytes for front in fronts)
    lower = min(front.depth for front in fronts) > 1
    return PlanError(
        f"{device} has not the memory for the shallowest front",
        got=f"{profile.memory_bytes} bytes",
        allowed=f"{least} bytes or more",
        remedy="free memory on the device, or set model.front to a smaller precision"
        + (", or lower devices.least_depth" if lower else ""),
    )


def _token_seconds(profile: DeviceProfile, front: FrontManifest, bytes_per_token: float) -> float:
    """Seconds that a device needs to compute and upload one token."""
    compute_s = front.flops_per_token / profile.flops
    return compute_s + 8 * bytes_per_token / profile.uplink_bps
