"""The command line: what it accepts, what it prints where, and how it ends."""

from __future__ import annotations

import inspect
import json
import logging
import math
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from splitfrozen import __version__
from splitfrozen.cli import COMMANDS, Argument, Command, dump, main, parser, resolve
from splitfrozen.config import Config, DevicesSpec, ModelSpec, RunSpec, TaskConfig
from splitfrozen.runs.folder import RunFolder
from splitfrozen.server.registry import Registry

FINGERPRINT = "a" * 64


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path) -> RunFolder:
    config = Config(
        model=ModelSpec(name="gpt2", cut=3),
        task=TaskConfig(labels=("a", "b")),
        devices=DevicesSpec(count=2),
        run=RunSpec(folder=str(here / "mine")),
    )
    return RunFolder.create(config)


def shell(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A process of its own that runs `before` and then the command."""
    code = f"import sys\n{before}\nfrom splitfrozen.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# --- commands ------------------------------------------------------------------------------------


def least(argument: Argument) -> list[str]:
    """The shortest way to give an argument."""
    flag = argument.flags[0]
    if not flag.startswith("-"):
        return ["1"]
    return [flag, "1"] if argument.options.get("required") else []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_calls_a_function_with_just_its_arguments(command: Command) -> None:
    given = [word for argument in command.arguments for word in least(argument)]
    parsed = vars(parser().parse_args([command.name, *given]))
    assert parsed.keys() >= {"command", "json", "verbose"}
    parameters = inspect.signature(resolve(command)).parameters
    assert parsed.keys() - {"command", "json", "verbose"} == parameters.keys()
    assert all(one.default is one.empty for one in parameters.values()), "defaults live in cli.py"


def test_every_command_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(command.name in shown and command.help for command in COMMANDS)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"splitfrozen {__version__}\n"


# --- what goes where -----------------------------------------------------------------------------


def test_text_is_for_people_and_json_for_programs(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(run.root)]) == 0
    assert "run     stopped" in capsys.readouterr().out
    assert main(["status", str(run.root), "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed)["state"] == "stopped"


def test_numbers_that_json_has_not_become_null() -> None:
    data = {"a": math.nan, 1: [math.inf, -math.inf, 0.5], "b": {"c": (math.nan, None, True)}}
    expected = {"a": None, "1": [None, None, 0.5], "b": {"c": [None, None, True]}}
    assert json.loads(dump(data)) == expected
    assert json.loads(dump({"path": Path("a/b")})) == {"path": "a/b"}


def test_logs_are_on_stderr_and_not_among_the_json(run: RunFolder) -> None:
    with closing(Registry(run.root)) as registry:
        registry.set_state("done")
    ended = shell("serve", str(run.root), "--json")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["state"] == "done"
    assert "INFO splitfrozen.serve: the run was done already" in ended.stderr


def test_a_reader_that_leaves_is_no_error(run: RunFolder) -> None:
    (run.root / "run.log").write_text("a line\n" * 50_000)
    command = [sys.executable, "-m", "splitfrozen", "logs", str(run.root), "--lines", "50000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"a line\n"
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 0


# --- errors --------------------------------------------------------------------------------------

SMALL = '[model]\nname = "gpt2"\ncut = 3\n[task]\nlabels = ["a", "b"]\n[devices]\ncount = 2\n'
JOIN = f"splitfrozen://token@192.0.2.7:8443/{FINGERPRINT}"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve", "none.toml"], 2, "cannot read none.toml"),
        (["serve", "broken.toml"], 2, "is not TOML"),
        (["serve", "misspelt.toml"], 2, "did you mean `devices.depth`?"),
        (["serve", "nowhere.toml"], 2, "`run.folder` cannot be made"),
        (["serve", "empty"], 1, "not a run folder"),
        (["join", "splitfrozen://nonsense", "--data", "d.csv"], 2, "join string is wrong in its"),
        (["join", JOIN[:-1], "--data", "d.csv"], 2, "fingerprint: got 63 characters"),
        (["join", JOIN, "--data", "d.csv", "--threads", "0"], 2, "`--threads` is wrong"),
        (["join", JOIN, "--data", "d.csv", "--column", "label"], 2, "`--column` is wrong"),
        (["join", JOIN], 2, "required: --data"),
        (["status", "none"], 1, "none is not a run folder"),
        (["logs", "mine", "--lines", "x"], 2, "invalid int value: 'x'"),
        (["stop", "none"], 1, "not a run folder"),
        (["invite", "mine"], 2, "never served"),
        (["purge", "mine", "--device", "device-00"], 2, "no such device"),
        (["eval", "mine"], 2, "never prepared"),
        (["eval", "mine", "--adapter", "worst"], 2, "invalid choice: 'worst'"),
        (["generate", "mine", "--prompt", "a"], 2, "never prepared"),
        (["export", "mine", "out"], 2, "never prepared"),
        (["demo", "--folder", "empty/file/demo"], 1, "Not a directory"),
        (["demo", "--folder", "mine"], 2, "something other than a demo"),
        (["train", "misspelt.toml", "--set", "a=b"], 2, "unrecognized arguments: --set a=b"),
        (["prune"], 2, "invalid choice: 'prune'"),
        ([], 2, "COMMAND"),
    ],
)
@pytest.mark.usefixtures("run")
def test_wrong_requests_end_with_a_message(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    (here / "broken.toml").write_text("[model")
    (here / "misspelt.toml").write_text(SMALL + "dept = 1\n")
    (here / "empty").mkdir()
    (here / "empty" / "file").touch()
    (here / "nowhere.toml").write_text(SMALL + '[run]\nfolder = "empty/file/run"\n')
    assert main(arguments) == code
    plain = capsys.readouterr()
    assert plain.out == ""
    assert message in plain.err
    assert plain.err.startswith("splitfrozen: ")
    assert "Traceback" not in plain.err
    assert main([*arguments, "--json"]) == code
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    said: dict[str, Any] = json.loads(printed)
    assert said.keys() == {"error", "message"}
    assert message in said["message"]
    assert said["error"].endswith("Error")


def test_a_commands_own_usage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train", "run.toml", "--set", "a=b"], ["train"], ["train", "a", "b"]):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert "allowed: splitfrozen train [-h] [--json] [--verbose] RUN.toml;" in told
        assert told.endswith("; see: splitfrozen train --help\n")
    assert main(["--set", "a=b", "train", "run.toml"]) == 2
    assert capsys.readouterr().err.endswith("; see: splitfrozen --help\n")


@pytest.mark.parametrize("command", ["train", "partition"])
def test_a_wrong_file_is_told_before_torch_is_loaded(here: Path, command: str) -> None:
    path, without_torch = here / "run.toml", "sys.modules['torch'] = None"
    for text, message in (
        (SMALL + '[wire]\ncodec = "int4"\n', "did you mean int4:64?"),
        (SMALL, "no [data] section"),
        (SMALL + '[data]\ntrain = "none.csv"\n', "no such data"),
    ):
        path.write_text(text)
        ended = shell(command, str(path), before=without_torch)
        assert (ended.returncode, message in ended.stderr) == (2, True), ended.stderr
    (here / "rows.csv").write_text("text,label\na,b\n")
    path.write_text(SMALL + '[data]\ntrain = "rows.csv"\n')
    ended = shell(command, str(path), before=without_torch)
    assert "got an install without torch" in ended.stderr
    assert "got an install without torch" in shell(command, str(here), before=without_torch).stderr


def test_without_the_servers_packages_the_remedy_is_one_line() -> None:
    ended = shell("eval", "mine", "--json", before="sys.modules['torch'] = None")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    said = json.loads(ended.stdout)
    assert said["error"] == "RequestError"
    assert "`eval` runs on the server side: got an install without torch" in said["message"]
    assert said["message"].endswith("run: pip install 'splitfrozen[server]'")


def test_a_device_needs_none_of_them() -> None:
    missing = ("torch", "transformers", "peft", "starlette", "uvicorn", "cryptography", "onnx")
    before = "\n".join(f"sys.modules['{name}'] = None" for name in missing)
    ended = shell("join", "splitfrozen://nonsense", "--data", "d.csv", before=before)
    assert ended.returncode == 2
    assert "the join string is wrong" in ended.stderr
    assert shell("doctor", "--json", before=before).returncode == 0


def test_verbose_logs_more(run: RunFolder) -> None:
    logger = logging.getLogger("splitfrozen")
    try:
        assert main(["status", str(run.root), "--verbose"]) == 0
        assert logger.level == logging.DEBUG
        assert main(["status", str(run.root)]) == 0
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(logging.NOTSET)
