"""`status`, `logs`, `stop`, `invite`, `purge`: look at a run and steer it, from its folder."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from splitfrozen.errors import RequestError, SplitFrozenError
from splitfrozen.records import Outcome
from splitfrozen.runs import summary
from splitfrozen.runs.folder import RunFolder
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store

STOP_S = 60.0


def status(run: Path) -> Outcome:
    """What a run is doing. It asks nobody: all is in the folder."""
    folder = RunFolder(run)
    with _opened(folder) as (registry, store):
        data = summary.summarize(folder, registry, store)
        progress = summary.line(folder, registry, store)
    served = folder.holder("serve") is not None
    if not served and data["state"] not in ("done", "failed"):
        data["state"] = "stopped"
    text = summary.text(data)
    if served:
        text += f"\n{progress}"
    elif data["state"] == "stopped":
        text += f"; `splitfrozen {folder.command} {run}` continues"
    return Outcome({**data, "served": served}, text)


def logs(run: Path, lines: int) -> Outcome:
    """The last lines of run.log."""
    path = RunFolder(run).root / "run.log"
    if not path.exists():
        return Outcome({"lines": []}, "")
    with path.open(errors="replace") as file:
        last = list(deque((line.rstrip("\n") for line in file), maxlen=max(lines, 0)))
    return Outcome({"lines": last}, "\n".join(last))


def stop(run: Path) -> Outcome:
    """End the processes of a run; nothing is lost. Raises SplitFrozenError where they stay."""
    folder = RunFolder(run)
    serving = folder.holder("serve")
    if serving is None:
        return Outcome({"stopped": False}, f"nobody serves {run}")
    with contextlib.suppress(ProcessLookupError):
        os.kill(serving, signal.SIGTERM)
    end = time.monotonic() + STOP_S
    while folder.holder("serve") is not None:
        if time.monotonic() > end:
            raise SplitFrozenError(
                f"process {serving} does not end",
                got=f"still there after {STOP_S:.0f} s",
                allowed="a process that ends when asked",
                remedy=f"kill -9 {serving}; the run continues with `splitfrozen serve`",
            )
        time.sleep(0.1)
    return Outcome({"stopped": True}, f"stopped; `splitfrozen {folder.command} {run}` continues")


def invite(run: Path, count: int) -> Outcome:
    """Make slots for devices that join later. A served run takes them at once."""
    folder = RunFolder(run)
    address = folder.address()
    if count < 1 or address is None:
        raise RequestError(
            "no device can be invited",
            got="a run that was never served" if address is None else f"--count {count}",
            allowed="--count 1 or more, for a run that was served",
            remedy=f"run: splitfrozen serve {run}",
        )
    if folder.begun:
        # The samples are fixed by now, and a streaming run would wait for it for ever.
        raise RequestError(
            "no device can be invited",
            got="a run whose training has begun",
            allowed="a run that still gathers samples",
            remedy="start a new run with more devices",
        )
    with contextlib.closing(Registry(folder.root)) as registry:
        made = registry.add_slots(count)
        tokens = registry.tokens()
    joins = [address.join(tokens[device]) for device in made]
    return Outcome({"devices": made, "joins": joins}, "\n".join(joins))


def purge(run: Path, device: str) -> Outcome:
    """Delete all that a device sent, and what was trained on it.

    Raises RequestError while the run is being trained, and for an unknown device.
    """
    folder = RunFolder(run)
    with _opened(folder) as (registry, store):
        known = [row.id for row in registry.devices()]
        if device not in known:
            raise RequestError(
                f"{run} has no such device",
                got=repr(device),
                allowed=f"{known[0]} .. {known[-1]}" if known else "none: it was never served",
                remedy=f"run: splitfrozen status {run}",
            )
        if folder.begun and folder.holder("serve") is not None:
            raise RequestError(
                f"{run} is being trained",
                got=f"a purge of {device}",
                allowed="a run that is stopped, or has not begun to train",
                remedy=f"run: splitfrozen stop {run}; purge; then serve it again: it trains anew",
            )
        registry.revoke(device)
        store.purge(device)
        anew = folder.begun
        if anew and folder.holder("serve") is not None:
            raise RequestError(
                f"{device} is purged, but training began meanwhile",
                got="a run that is being trained",
                allowed="a run that is stopped",
                remedy=f"run: splitfrozen stop {run}; purge it again; then serve: it trains anew",
            )
        if anew:
            folder.forget_training()
            registry.set_state("receiving")
    text = f"{device} is purged"
    if anew:
        text += ", and so is what was trained; "
        text += f"`splitfrozen {folder.command} {run}` trains without it"
    return Outcome({"device": device, "trained_anew": anew}, text)


@contextlib.contextmanager
def _opened(folder: RunFolder) -> Iterator[tuple[Registry, Store]]:
    with (
        contextlib.closing(Registry(folder.root)) as registry,
        contextlib.closing(Store(folder.store)) as store,
    ):
        yield registry, store
