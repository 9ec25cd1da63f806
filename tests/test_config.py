"""A run's TOML file: what is accepted, and what the errors say."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitfrozen import config
from splitfrozen.errors import ConfigError

SMALL = '[model]\nname = "gpt2"\ncut = 3\n[task]\nlabels = ["a", "b"]\n[devices]\ncount = 2\n'


def load(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return config.load(path)


def test_defaults_and_folder(tmp_path: Path) -> None:
    run = load(tmp_path, SMALL)
    assert run.folder == Path("runs/run")
    assert (run.lora.rank, run.wire.name, run.run.start) == (8, "float16+zstd", "complete")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "test.csv").touch()
    text = SMALL.replace('"gpt2"', '"models"').replace("[task]", '[task]\neval = "test.csv"')
    run = load(tmp_path, text + '[run]\nfolder = "out"\n')
    assert run.model.name == str(tmp_path / "models")
    assert run.task.eval == str(tmp_path / "test.csv")
    assert run.folder == tmp_path / "out"


def test_dump_and_undump_are_inverse(tmp_path: Path) -> None:
    run = load(tmp_path, SMALL + "depth = [1, 3]\n[lora]\ntargets = ['query']\n")
    assert config.undump(config.dump(run)) == run


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("dept = 1", "`devices.dept`.*did you mean `devices.depth`"),
        ("depth = [1]", "1 depths.*2 depths"),
        ("depth = [1, 4]", r"devices.depth.*4.*1\.\.3"),
        ('[lora]\nrank = "x"', "lora.rank.*'x'.*int"),
        ("[lora]\nrank = 0", "lora.rank.*0.*>= 1"),
        ("[train]\nlr = -1.0", "train.lr"),
        ("[train]\nwarmup = 1.0", "train.warmup"),
        ("[wire]\ncodec = 'gzip'", "wire.codec.*gzip"),
        ("[wire]\nchunk_bytes = 1", "wire.chunk_bytes"),
        ("[server]\nport = 70000", "server.port"),
        ("[servers]\nport = 1", "did you mean `server`"),
        ("[run]\nstart = 'now'", "run.start"),
    ],
)
def test_errors_name_key_and_cure(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load(tmp_path, SMALL + extra + "\n")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ('labels = ["a"]', "task.labels"),
        ('kind = "causal_lm"\ntemplate = "Q:"', "task.template"),
        ('kind = "causal_lm"\nanswer = "####"', "task.answer.*one group"),
        ('kind = "causal_lm"\nanswer = "("', "task.answer.*regular expression"),
    ],
)
def test_tasks_check_themselves(tmp_path: Path, task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, SMALL.replace('labels = ["a", "b"]', task))


@pytest.mark.parametrize("text", ["[model", "\udcff"])
def test_what_is_not_toml_is_said_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match="not TOML"):
        config.load(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(tmp_path / "none.toml")
