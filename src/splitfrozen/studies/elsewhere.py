"""A run's events on another network: `splitfrozen replay RUN --network NETWORK.toml`.

What a run did does not depend on how fast its machines and links were, so its event log, of a
network run or of `train`, can be given the times that any other network would give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from splitfrozen.config import convert, read_toml
from splitfrozen.disk import explained
from splitfrozen.errors import RequestError
from splitfrozen.records import Compute, Event, Outcome, Send
from splitfrozen.runs.networklog import SETUP
from splitfrozen.simulation import timeline
from splitfrozen.simulation.experiment import NetworkFile, connected, named
from splitfrozen.simulation.gantt import draw
from splitfrozen.simulation.network import Machine, Network, role

FREE = 1e30
"""Speed of a party that the network's file says nothing of: an encoder, whose work is left out."""


def replay_on(run: Path, events: Sequence[Event], file: Path, out: Path | None) -> Outcome:
    """Give a run's events the times of the network that `file` describes.

    Devices take the machines in their order. Raises ConfigError, StoreError, and RequestError
    where the file has not as many devices as the run.
    """
    spec = convert(read_toml(file), NetworkFile, "docs/simulation.md")
    bare = [_bare(event) for event in events]
    found = timeline.replay(bare, _network(bare, spec))
    data: dict[str, object] = {
        "run": str(run),
        "network": str(file),
        "makespan_s": found.makespan,
        "bytes": found.sent,
        "parties": found.rows,
    }
    text = f"{found.table()}, {found.sent / 1e6:.2f} MB sent"
    if out is not None:
        with explained(out):
            out.mkdir(parents=True, exist_ok=True)
        paths = [out / "gantt.png", out / "trace.json", out / "events.csv"]
        draw(found, paths[0], f"{run.name} on {file.stem}")
        found.write_trace(paths[1])
        found.write_csv(paths[2])
        text += "".join(f"\nwrote {path}" for path in paths)
    return Outcome(data, text)


def _bare(event: Event) -> Event:
    """Without its times, and without the work that is none of a machine's."""
    event = msgspec.structs.replace(event, begin_s=None, end_s=None)
    if isinstance(event, Compute) and event.phase in (SETUP, "encode"):
        return msgspec.structs.replace(event, flops=0.0)
    return event


def _network(events: Sequence[Event], spec: NetworkFile) -> Network:
    who = {event.who for event in events if isinstance(event, Compute)}
    who |= {event.source for event in events if isinstance(event, Send)}
    devices = sorted(one for one in who if role(one) == "device" and "/" not in one)
    groups = [group for _, group in named(spec.devices)]
    # Centralised training has no devices, whatever the network has.
    if devices and len(groups) != len(devices):
        raise RequestError(
            "the network does not fit the run",
            got=f"{len(groups)} devices",
            allowed=f"{len(devices)}, as the run has",
            remedy="change `count` in [[devices]]",
        )
    machines = {one: Machine(FREE) for one in who if "/" in one}
    for name, group in zip(devices, groups, strict=False):
        machines[name] = Machine(group.flops, group.efficiency)
    return connected(machines, spec.server, spec.link)
