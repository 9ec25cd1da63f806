"""A server and its devices on this machine, as real processes over HTTPS: demo, benchmarks, tests.

Nothing is simulated: each process is the command that a user types, and ends with the block that
started it.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from splitfrozen.errors import SplitFrozenError

log = logging.getLogger("splitfrozen.local")


def run_locally(
    run_toml: Path, data: Sequence[Path], folder: Path, device_python: str = sys.executable
) -> dict[str, Any]:
    """Serve `run_toml`, join with one device for each file of `data`, return `serve`'s summary.

    Args:
        run_toml: a run whose folder is `folder / "run"`.
        data: one file a device, in the order of the device numbers.
        folder: gets `serve.json`, `device-NN.log` and the devices' state folders.
        device_python: interpreter of the devices, which may have the base install only.

    Raises SplitFrozenError where the server or a device fails.
    """
    serve = [sys.executable, "serve", str(run_toml)]
    with ExitStack() as stack:
        output = stack.enter_context((folder / "serve.json").open("w"))
        server = stack.enter_context(process([*serve, "--hide-joins", "--json"], output, None))
        joins = _wait_for_joins(folder / "run" / "join.txt", server)
        log.info("starting %d device processes", len(data))
        devices = [
            stack.enter_context(_device(device_python, folder, number, join, source))
            for number, (join, source) in enumerate(zip(joins, data, strict=True))
        ]
        _wait(server, devices, folder)
    summary: dict[str, Any] = json.loads((folder / "serve.json").read_text())
    return summary


def join_arguments(join: str, data: Path, state: Path) -> list[str]:
    """Arguments of a device that takes one core, as several share this machine."""
    return ["join", join, "--data", str(data), "--state", str(state), "--threads", "1", "--json"]


@contextmanager
def _device(
    python: str, folder: Path, number: int, join: str, data: Path
) -> Iterator[subprocess.Popen[str]]:
    arguments = join_arguments(join, data, folder / "devices" / f"{number:02}")
    with (
        (folder / f"device-{number:02}.log").open("w") as output,
        process([python, *arguments], output, output) as child,
    ):
        yield child


@contextmanager
def process(
    command: Sequence[str], stdout: IO[str], stderr: IO[str] | None
) -> Iterator[subprocess.Popen[str]]:
    """A splitfrozen command, interpreter first; ended with the block, whatever happens."""
    python, *arguments = command
    child = subprocess.Popen(
        [python, "-m", "splitfrozen", *arguments], stdout=stdout, stderr=stderr, text=True
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
        child.wait()


def _wait_for_joins(path: Path, server: subprocess.Popen[str]) -> list[str]:
    """Join strings, once the server wrote them all (it writes the file atomically)."""
    while not path.exists():
        if server.poll() is not None:
            raise SplitFrozenError(
                "the server ended before it listened",
                got=f"exit code {server.returncode}",
                allowed="a running server",
                remedy="see its messages above",
            )
        time.sleep(0.05)
    return path.read_text().split()


def _wait(
    server: subprocess.Popen[str], devices: Sequence[subprocess.Popen[str]], folder: Path
) -> None:
    """Return when the server is done. Raises SplitFrozenError if it or a device fails."""
    while server.poll() is None:
        for number, device in enumerate(devices):
            if device.poll() not in (None, 0):
                output = (folder / f"device-{number:02}.log").read_text().splitlines()
                raise SplitFrozenError(
                    f"device {number:02} of the demo failed",
                    got=output[-1] if output else f"exit code {device.returncode}",
                    allowed="a device that ends with exit code 0",
                    remedy=f"see {folder / f'device-{number:02}.log'}",
                )
        time.sleep(0.1)
    if server.returncode != 0:
        raise SplitFrozenError(
            "the server of the demo failed",
            got=f"exit code {server.returncode}",
            allowed="exit code 0",
            remedy=f"see {folder / 'run' / 'run.log'}",
        )
