"""When a device gets its front, and which: the run's `[devices]` table at work.

A list of depths is followed at once, by slot. With "auto" the devices are measured first: the pace
is fixed when all slots have a profile, or `gather_s` after the first one; who comes later is placed
by that pace. What was assigned once never changes, since the device's chunks depend on it.
"""

from __future__ import annotations

import math

from splitfrozen.config import DevicesSpec
from splitfrozen.errors import PlanError, RefusedError
from splitfrozen.planning.depth import assign, target
from splitfrozen.records import DeviceProfile, FrontManifest, Prepared
from splitfrozen.server.registry import Registry
from splitfrozen.wire.codec import codec


def bytes_per_token(codec_name: str, prepared: Prepared) -> float:
    """Bytes that an uploaded token takes at most, by the codec's own formula."""
    tokens = prepared.task.max_tokens
    return codec(codec_name).most_bytes(tokens, prepared.width) / tokens


def front_of(
    device: str, registry: Registry, prepared: Prepared, spec: DevicesSpec, codec_name: str
) -> FrontManifest | None:
    """The front of a device, decided now if it can be; None while it waits for other devices.

    Raises:
        RefusedError: the device has sent no profile yet.
        PlanError: its memory holds no front; the registry keeps that as its failure.
    """
    row = registry.device(device)
    if row.depth is None and spec.depth != "auto":
        # Who was invited beyond the list gets the least that the list asks of any device.
        listed = spec.depth[row.slot] if row.slot < len(spec.depth) else min(spec.depth)
        registry.assign({device: listed})
    elif row.depth is None:
        if row.profile is None:
            raise RefusedError(
                f"{device} has no profile",
                got="a question for its front",
                allowed="a profile first",
                remedy="POST /v1/profile",
            )
        try:
            _plan(device, row.profile, registry, prepared, spec.gather_s, codec_name)
        except PlanError as error:
            registry.fail(device, str(error))
            raise
    depth = registry.device(device).depth
    return next((front for front in prepared.fronts if front.depth == depth), None)


def _plan(
    device: str,
    profile: DeviceProfile,
    registry: Registry,
    prepared: Prepared,
    gather_s: float,
    codec_name: str,
) -> None:
    """Assign a device by the pace, fixing that first where it is time to."""
    cost = bytes_per_token(codec_name, prepared)
    # One that cannot hold any front is told so and does not keep the others waiting.
    assign({device: profile}, prepared.fronts, cost, math.inf)
    pace = registry.target()
    if pace is None:
        missing, first = registry.gathering()
        if missing and (first is None or registry.clock() - first < gather_s):
            return
        profiles = {
            row.id: row.profile
            for row in registry.devices()
            if row.profile is not None and not row.revoked
        }
        pace = registry.fix_target(target(profiles, prepared.fronts, cost))
    registry.assign(assign({device: profile}, prepared.fronts, cost, pace))
