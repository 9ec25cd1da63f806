"""The run folder: made once, refused when it changes, held by one process, whole after a crash."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from splitfrozen import config
from splitfrozen.config import (
    Config,
    DevicesSpec,
    LoraSpec,
    ModelSpec,
    RunSpec,
    ServerSpec,
    TaskConfig,
)
from splitfrozen.errors import ConfigError, StoreError
from splitfrozen.records import Prepared, TaskSpec
from splitfrozen.runs.folder import Address, RunFolder
from splitfrozen.wire.join import JoinString


def wanted(root: Path) -> Config:
    return Config(
        model=ModelSpec(name="gpt2", cut=3),
        task=TaskConfig(labels=("a", "b")),
        devices=DevicesSpec(count=2),
        run=RunSpec(folder=str(root)),
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(wanted(tmp_path / "runs" / "mine"))


# --- made and opened -----------------------------------------------------------------------------


def test_it_is_made_private_and_opens_again(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "mine"
    made = RunFolder.create(wanted(root))
    assert made.name == "mine"
    assert root.stat().st_mode & 0o777 == 0o700
    assert RunFolder(root).config == wanted(root) == RunFolder.create(wanted(root)).config


def changed(config: Config) -> Config:
    return msgspec.structs.replace(config, model=ModelSpec(name="gpt2", cut=2), lora=LoraSpec(4))


def test_a_changed_config_is_refused_and_named(run: RunFolder) -> None:
    spec = TaskSpec(kind="classification", columns={}, labels=("a", "b"), max_tokens=8)
    run.write_prepared(Prepared(spec, None, (), 4, 8, 9, "0" * 64))
    with pytest.raises(ConfigError, match=r"another model\.cut, lora\.rank;"):
        RunFolder.create(changed(wanted(run.root)))
    assert RunFolder(run.root).config == wanted(run.root)


def test_a_run_that_was_never_prepared_may_be_mended(run: RunFolder) -> None:
    with run.lock("serve"):
        RunFolder.create(changed(wanted(run.root)))
        assert RunFolder(run.root).config == wanted(run.root), "it changed under its server"
    assert RunFolder.create(changed(wanted(run.root))).config.model.cut == 2
    assert RunFolder(run.root).config == changed(wanted(run.root))
    more = msgspec.structs.replace(wanted(run.root), devices=DevicesSpec(count=3))
    with pytest.raises(ConfigError, match=r"devices\.count"):
        RunFolder.create(more)


def test_the_server_may_change_and_is_kept(run: RunFolder) -> None:
    moved = msgspec.structs.replace(wanted(run.root), server=ServerSpec(host="127.0.0.1", port=1))
    assert RunFolder.create(moved).config.server.port == 1
    assert RunFolder(run.root).config == moved


def test_the_folder_may_move(run: RunFolder, tmp_path: Path) -> None:
    run.root.rename(tmp_path / "elsewhere")
    assert RunFolder.create(wanted(tmp_path / "elsewhere")).name == "elsewhere"


def test_a_folder_that_is_no_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"not a run folder: got no config\.json"):
        RunFolder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(StoreError, match=r"not a run folder: got another config\.json"):
        RunFolder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StoreError, match="not a run folder"):
        RunFolder(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"`run\.folder` cannot be made: got .*Not a directory"):
        RunFolder.create(wanted(tmp_path / "file" / "run"))


# --- one process at a time -----------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from splitfrozen.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock("serve"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_killed(run: RunFolder) -> None:
    assert run.holder("serve") is None
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert run.holder("serve") == other.pid
        assert run.holder("worker") is None
        with (
            pytest.raises(StoreError, match=f"in use: got a `serve` process with id {other.pid};"),
            run.lock("serve", patience_s=0),
        ):
            pass
        other.kill()
        other.wait()
        # Its number is still in the file; nobody may be told to kill it.
        assert (run.root / "serve.lock").read_text() == str(other.pid)
        assert run.holder("serve") is None
        with run.lock("serve"):
            assert run.holder("serve") == os.getpid()
    assert run.holder("serve") is None


def test_who_asks_for_the_holder_is_not_taken_for_it(run: RunFolder) -> None:
    with run.lock("serve"):
        pass
    with (run.root / "serve.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert run.holder("serve") is None


# --- events --------------------------------------------------------------------------------------


def test_events_come_back_by_kind_in_order(run: RunFolder) -> None:
    assert run.events("step") == []
    run.report({"event": "step", "step": 1, "loss": 0.5})
    run.report({"event": "evaluation", "accuracy": 1.0})
    run.report({"event": "step", "step": 2, "loss": math.nan, "norm": math.inf})
    assert run.events("step") == [
        {"event": "step", "step": 1, "loss": 0.5},
        {"event": "step", "step": 2, "loss": None, "norm": None},
    ]
    for line in (run.root / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_torn_line_costs_nothing_but_itself(run: RunFolder) -> None:
    run.report({"event": "step", "step": 1})
    with (run.root / "metrics.jsonl").open("ab") as file:
        file.write('{"event": "step", "name": "ü'.encode()[:-1])
    assert [event["step"] for event in run.events("step")] == [1]
    run.report({"event": "step", "step": 2})
    assert [event["step"] for event in run.events("step")] == [1, 2]


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["roster.json", "announced.json"])
def test_training_has_begun_when_its_samples_are_fixed(run: RunFolder, sign: str) -> None:
    assert not run.begun
    run.training.mkdir()
    assert not run.begun
    (run.training / sign).touch()
    assert run.begun
    run.report({"event": "evaluation", "accuracy": 1.0})
    run.forget_training()
    assert not run.begun
    assert run.events("evaluation") == []


def test_an_adapter_is_best_or_else_last(run: RunFolder) -> None:
    with pytest.raises(StoreError, match=r"no adapter yet.*splitfrozen status"):
        run.adapter("best")
    for name in ("last", "best"):
        (run.training / name).mkdir(parents=True)
        (run.training / name / "adapter_config.json").touch()
        assert run.adapter("best") == run.training / name
        assert run.adapter("last") == run.training / "last"


# --- small files ---------------------------------------------------------------------------------


def test_the_address_makes_join_strings(run: RunFolder) -> None:
    assert run.address() is None
    run.write_address(Address("::1", 8443, "a" * 64))
    found = run.address()
    assert found is not None
    assert JoinString.parse(found.join("token")) == JoinString("token", "::1", 8443, "a" * 64)


def test_the_config_is_kept_as_it_was_started(run: RunFolder) -> None:
    assert config.undump((run.root / "config.json").read_bytes()) == wanted(run.root)
