"""Whatever is killed, the run ends as if nothing had happened.

Real processes over HTTPS: the server is killed with SIGKILL while devices upload and again while it
trains, and so are two devices. With `start = "complete"` (float32, CPU) the adapter has the bytes
of a run that nobody disturbed; with "streaming" every sample is trained on once an epoch.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from splitfrozen.runs.demo import write_files
from splitfrozen.runs.local import join_arguments, run_locally
from splitfrozen.server.store import Store

DEVICES = 3
ROWS = 900
WAIT_S = 120.0

pytestmark = pytest.mark.slow


def write_run(folder: Path, start: str) -> tuple[Path, list[Path]]:
    """A small run of the demo's task: three devices, two epochs, small chunks."""
    run_toml = write_files(folder, seed=3, depths=(1, 2, 3), train_rows=ROWS, eval_rows=50)
    text = run_toml.read_text().replace("epochs = 3", "epochs = 2\ncheckpoint_steps = 7")
    text = text.replace("[run]", f'[run]\nstart = "{start}"\nwindow = 64')
    run_toml.write_text(text + '\n[wire]\ncodec = "float32"\nchunk_bytes = 65536\n')
    return run_toml, sorted((folder / "data").glob("device-*.csv"))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


class Killable:
    """A command that is killed and started again."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._arguments = arguments
        self._log = log
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "splitfrozen", *self._arguments]
            self.child = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        assert self.child is not None
        self.child.send_signal(signal.SIGKILL)
        assert self.child.wait() == -signal.SIGKILL, "it had ended before it could be killed"

    def end(self) -> int:
        assert self.child is not None
        return self.child.wait(WAIT_S)

    def __enter__(self) -> Killable:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child is not None and self.child.poll() is None:
            self.child.kill()
            self.child.wait()


def stored(run: Path) -> Counter[str]:
    if not (run / "store" / "index.sqlite").exists():
        return Counter()
    store = Store(run / "store")
    totals = Counter({device: total.samples for device, total in store.totals().items()})
    store.close()
    return totals


def events(run: Path, kind: str) -> list[dict[str, object]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def disturb(folder: Path, run_toml: Path, data: list[Path]) -> None:
    """Run with four kills: two devices, then the server while it receives and while it trains."""
    run = folder / "run"
    with ExitStack() as stack:
        server = Killable(["serve", str(run_toml)], folder / "serve.log")
        stack.enter_context(server).start()
        until(lambda: (run / "join.txt").exists())
        joins = (run / "join.txt").read_text().split()
        devices = [
            stack.enter_context(
                Killable(
                    join_arguments(join, source, folder / "devices" / str(number)),
                    folder / f"device-{number}.log",
                )
            )
            for number, (join, source) in enumerate(zip(joins, data, strict=True))
        ]
        for number in (0, 1):
            devices[number].start()
            until(lambda number=number: stored(run)[f"device-{number:02}"] > 0)
            devices[number].kill()
        # Device 0 and 1 are at work again, device 2 has not begun: the server is receiving.
        devices[0].start()
        devices[1].start()
        before = stored(run).total()
        until(lambda: stored(run).total() > before)
        server.kill()
        assert stored(run).total() < ROWS, "the kill came after the last upload"
        server.start()
        devices[2].start()
        until(lambda: len(events(run, "step")) >= 10)
        server.kill()
        steps = len(events(run, "step"))
        server.start()
        assert server.end() == 0, (folder / "serve.log").read_text()[-3000:]
        assert [device.end() for device in devices] == [0, 0, 0]
        assert len(events(run, "step")) > steps
        assert len(events(run, "resumed")) == 1


def adapter(folder: Path, which: str) -> bytes:
    return (folder / "run" / "training" / which / "adapter_model.safetensors").read_bytes()


def test_a_killed_run_gives_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    run_toml, data = write_run(calm, "complete")
    summary = run_locally(run_toml, data, calm)
    assert summary["state"] == "done"
    run_toml, data = write_run(rough, "complete")
    disturb(rough, run_toml, data)
    assert stored(rough / "run") == stored(calm / "run")
    assert adapter(rough, "last") == adapter(calm, "last")
    assert adapter(rough, "best") == adapter(calm, "best")


def test_a_killed_streaming_run_trains_on_every_sample_once_an_epoch(tmp_path: Path) -> None:
    run_toml, data = write_run(tmp_path, "streaming")
    disturb(tmp_path, run_toml, data)
    run = tmp_path / "run"
    ledger = (run / "training" / "ledger.jsonl").read_text().splitlines()
    drawn = [tuple(key) for line in ledger for key in json.loads(line)["keys"]]
    expected = {(device, i) for device, count in stored(run).items() for i in range(count)}
    assert len(expected) == ROWS
    assert sorted(drawn) == sorted(expected)
    steps = {int(str(event["step"])): event for event in events(run, "step")}
    for epoch in (0, 1):
        assert sum(int(str(e["samples"])) for e in steps.values() if e["epoch"] == epoch) == ROWS
