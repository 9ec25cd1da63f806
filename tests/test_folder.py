"""The run folder: made once, refused when it changes, held by one process, whole after a crash."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
from contextlib import closing
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
from splitfrozen.records import PROTOCOL, Enrolment, Prepared, TaskSpec
from splitfrozen.runs.folder import Address, RunFolder
from splitfrozen.server.registry import Registry
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


def prepare(run: RunFolder) -> None:
    spec = TaskSpec(kind="classification", columns={}, labels=("a", "b"), max_tokens=8)
    run.write_prepared(Prepared(spec, None, (), 4, 8, 9, "0" * 64, "float16"))


def serve(run: RunFolder, enrol: bool) -> None:
    """What a first start leaves: slots, and maybe a device in one of them."""
    with closing(Registry(run.root)) as registry:
        registry.ensure_slots(2)
        if enrol:
            token = registry.tokens()["device-00"]
            registry.enrol(Enrolment(PROTOCOL, token, "s" * 32, "name", "version"))


@pytest.mark.parametrize("prepared", [True, False])
def test_a_changed_config_is_refused_and_named(run: RunFolder, prepared: bool) -> None:
    if prepared:
        prepare(run)
    serve(run, enrol=True)
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
    assert RunFolder.create(more).config.devices.count == 3, "nobody has a join string yet"
    RunFolder.create(wanted(run.root))
    serve(run, enrol=False)
    with pytest.raises(ConfigError, match=r"devices\.count"):
        RunFolder.create(more)


def test_what_was_prepared_for_nobody_is_prepared_anew(run: RunFolder) -> None:
    prepare(run)
    serve(run, enrol=False)
    for name in ("evaluation", "training", "tokenizer", "files", "tls"):
        (run.root / name).mkdir()
        (run.root / name / "it").touch()
    (run.root / "forecast.json").touch()
    run.report({"event": "baseline"})
    with run.lock("worker"):
        RunFolder.create(changed(wanted(run.root)))
        assert run.prepared() is not None, "it went under its worker"
    assert RunFolder.create(wanted(run.root)).prepared() is not None, "nothing was changed"
    mended = RunFolder.create(changed(wanted(run.root)))
    assert mended.config == changed(wanted(run.root)) == RunFolder(run.root).config
    assert mended.prepared() is None
    left = {path.name for path in run.root.iterdir() if path.suffix not in (".lock", ".sqlite")}
    assert left - {"registry.sqlite-wal", "registry.sqlite-shm"} == {"config.json", "files", "tls"}


def at(root: Path, model: str, data: str) -> Config:
    task = TaskConfig(labels=("a", "b"), eval=data)
    return msgspec.structs.replace(wanted(root), model=ModelSpec(name=model, cut=3), task=task)


def test_a_project_may_move_with_its_model_and_data(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run = RunFolder.create(at(root, "/old/model", "/old/test.csv"))
    prepare(run)
    serve(run, enrol=True)
    moved = at(root, "/new/model", "/new/data/test.csv")
    assert RunFolder.create(moved).config == RunFolder(root).config == moved
    assert run.prepared() is not None
    for model, data, key in (
        ("/new/other", "/new/test.csv", r"model\.name"),
        ("model", "/new/test.csv", r"model\.name"),
        ("/new/model", "/new/dev.csv", r"task\.eval"),
    ):
        with pytest.raises(ConfigError, match=f"another {key};"):
            RunFolder.create(at(root, model, data))


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
    for text in ("{", "[]", "null", '{"model_type": "\\ud800'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(StoreError, match=r"config\.json is damaged: got .*restore it"):
            RunFolder(tmp_path)


def test_a_damaged_config_is_not_taken_for_another_kind_of_file(run: RunFolder) -> None:
    path = run.root / "config.json"
    path.write_text(path.read_text().replace('"cut": 3', '"cut": null'))
    with pytest.raises(
        StoreError, match=r"config\.json is damaged: got `model\.cut` is wrong: None"
    ):
        RunFolder(run.root)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"host": 1}'])
def test_damaged_files_are_named_with_what_makes_them_again(run: RunFolder, content: bytes) -> None:
    for name, read in (("prepared.json", run.prepared), ("address.json", run.address)):
        (run.root / name).write_bytes(content)
        match = rf"{name} is damaged: .*delete it and give the command that began .*made again"
        with pytest.raises(StoreError, match=match):
            read()


def test_a_folder_that_cannot_be_made_is_an_error_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"`run\.folder` cannot be made: got .*Not a directory"):
        RunFolder.create(wanted(tmp_path / "file" / "run"))
    with pytest.raises(ConfigError, match=r"`run\.folder` has too long a name: got 300"):
        RunFolder.create(wanted(tmp_path / ("a" * 300)))
    with pytest.raises(ConfigError, match=r"`run\.folder` cannot be made: got .*name too long"):
        RunFolder.create(wanted(tmp_path / ("a" * 300) / "run"))


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
    with (run.root / "metrics.jsonl").open("a") as file:
        file.write('[]\n"step"\nnull\n1\n' + "[" * 100_000 + "\n")
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


def test_a_host_that_nobody_can_be_told_is_an_error_of_the_config() -> None:
    with pytest.raises(ConfigError, match=r"got 'my machine'; .*set server\.name"):
        Address("my machine", 8443, "a" * 64).join("token")


def test_the_config_is_kept_as_it_was_started(run: RunFolder) -> None:
    assert config.undump((run.root / "config.json").read_bytes()) == wanted(run.root)
