"""What a device is told of its front: the run's `[devices]` table, or the planner's word.

A list of depths is followed at once, by slot. With "auto" the planner (`runs.assigning`) writes
depths into the registry, and may change them while devices send.
"""

from __future__ import annotations

from splitfrozen.config import DevicesSpec
from splitfrozen.errors import RefusedError
from splitfrozen.planning.depth import no_memory
from splitfrozen.records import DeviceProfile, FrontManifest, Prepared
from splitfrozen.server.registry import Registry
from splitfrozen.wire.codec import codec


def bytes_per_token(prepared: Prepared) -> float:
    """Bytes of an uploaded token: as measured, or at most, by the codec's own formula."""
    if prepared.bytes_per_token:
        return max(prepared.bytes_per_token.values())
    tokens = prepared.task.max_tokens
    return codec(prepared.codec).most_bytes(tokens, prepared.width) / tokens


def front_of(
    device: str, registry: Registry, prepared: Prepared, spec: DevicesSpec
) -> FrontManifest | None:
    """The front of a device; None while it waits for other devices.

    Raises RefusedError where the device has sent no profile yet, and depths follow from profiles.
    """
    row = registry.device(device)
    depth = row.depth
    if depth is None and spec.depth != "auto":
        # Who was invited beyond the list gets the least that the list asks of any device.
        depth = spec.depth[row.slot] if row.slot < len(spec.depth) else min(spec.depth)
        registry.assign({device: depth})
    elif depth is None and row.profile is None:
        raise RefusedError(
            f"{device} has no profile",
            got="a question for its front",
            allowed="a profile first",
            remedy="POST /v1/profile",
        )
    return next((front for front in prepared.fronts if front.depth == depth), None)


def take_profile(
    device: str, profile: DeviceProfile, registry: Registry, prepared: Prepared, spec: DevicesSpec
) -> None:
    """Keep what a device measured.

    Raises PlanError where depths follow from profiles and its memory holds no front; the registry
    keeps that as its failure.
    """
    registry.profile(device, profile)
    fronts = [front for front in prepared.fronts if front.depth >= spec.least_depth]
    if spec.depth == "auto" and all(one.memory_bytes > profile.memory_bytes for one in fronts):
        error = no_memory(device, profile, fronts)
        registry.fail(device, str(error))
        raise error
