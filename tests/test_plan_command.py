"""`splitfrozen plan`: whose problem a file states, and the run that a plan is written into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splitfrozen import config
from splitfrozen.errors import ConfigError, StoreError
from splitfrozen.planning.sft import Choice
from splitfrozen.studies.plan import SYSTEMS, plan
from splitfrozen.studies.plan_sft import _run

NETWORK = """
system = "splitfrozen"
[model]
shape = "gpt2-small"
rank = 4
cut = 3
[data]
tokens = 32
batch_size = 8
[server]
flops = 4e12
[[devices]]
name = "one"
count = 2
flops = 1e12
samples = 20
bps = 2e8
paper_depth = 1
[[codecs]]
name = "int8"
bits = 8.0
"""
RUN = """
[model]
name = "gpt2"
cut = 1
[task]
labels = ["no", "yes"]
[devices]
count = 7
patience_s = 30.0
[train]
lr = 1e-4
"""


def files(folder: Path, network: str = NETWORK, run: str = RUN) -> tuple[Path, Path]:
    paths = folder / "network.toml", folder / "run.toml"
    for path, text in zip(paths, (network, run), strict=True):
        path.write_text(text)
    return paths


def test_a_plan_is_written_into_a_copy_of_a_run(tmp_path: Path) -> None:
    network, run = files(tmp_path)
    found = plan(network, run, tmp_path / "out")
    made, base = config.load(tmp_path / "out" / "run.toml"), config.load(run)
    data: dict[str, Any] = found.data
    depths = tuple(data["plan"]["depth"].values())
    assert made.devices.depth == depths
    assert (made.devices.count, made.model.cut, made.wire.codec) == (2, 3, "int8")
    assert (made.method.name, made.lora.rank) == ("splitfrozen", 4)
    assert made.devices.patience_s == 30.0
    assert made.train == base.train
    assert run.read_text() == RUN
    assert f"wrote {tmp_path / 'out' / 'run.toml'}" in found.text


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ('system = "splitfed"', "'splitfed'"),
        ("system = 3", "3"),
        ("[model]\n", "None"),
    ],
)
def test_a_file_says_whose_problem_it_states(tmp_path: Path, text: str, got: str) -> None:
    network, _ = files(tmp_path, text)
    with pytest.raises(ConfigError, match="`system` is wrong") as caught:
        plan(network, None, None)
    assert caught.value.got == got
    assert caught.value.allowed == ", ".join(SYSTEMS)


def test_a_run_needs_a_folder_for_its_copy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`--run` needs `--out`"):
        plan(*files(tmp_path), None)


def test_a_run_that_is_none_is_refused_before_it_is_planned(tmp_path: Path) -> None:
    network, _ = files(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        plan(network, tmp_path / "missing.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[devices]\ncount = 7\npatience_s = 30.0", "devices = 7"), "`devices` is wrong"),
        (("lr = 1e-4", "lr = 0.0"), "`train.lr` is wrong"),
    ],
)
def test_a_run_that_is_wrong_is_told_before_it_is_planned(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    """`devices` has to stand before the tables that TOML would put it in."""
    text = RUN.replace(*change)
    if change[1].startswith("devices"):
        text = f"{change[1]}\n{RUN.replace(change[0], '')}"
    network, run = files(tmp_path, run=text)
    with pytest.raises(ConfigError, match=said):
        plan(network, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_runs_own_file_is_not_replaced(tmp_path: Path) -> None:
    network, run = files(tmp_path)
    with pytest.raises(ConfigError, match="would replace the run's own file"):
        plan(network, run, tmp_path)
    assert run.read_text() == RUN


def test_the_copys_folder_is_what_its_own_file_says(tmp_path: Path) -> None:
    network, run = files(tmp_path)
    plan(network, run, tmp_path / "out")
    assert config.load(tmp_path / "out" / "run.toml").folder == config.load(run).folder
    network, run = files(tmp_path, run=RUN + '[run]\nfolder = "mine"\n')
    plan(network, run, tmp_path / "out")
    assert config.load(tmp_path / "out" / "run.toml").folder == tmp_path / "mine"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    network, _ = files(tmp_path)
    (tmp_path / "out").write_text("")
    with pytest.raises(StoreError, match="out"):
        plan(network, None, tmp_path / "out")


def test_what_sft_decides_is_a_run(tmp_path: Path) -> None:
    """The codec's name is spelt as the codec spells it, for every rate and every level."""
    for rho, levels in ((1.0, 256), (0.05, 2), (0.123456, 8)):
        made: dict[str, Any] = _run(Choice(rho, levels, 2, 0.1, 0.8, 1.0))
        table = config.read_toml(files(tmp_path)[1])
        for section, values in made.items():
            table[section] = {**table.get(section, {}), **values}
        spec = config.complete(table, tmp_path / "run.toml")
        assert (spec.method.name, spec.model.cut) == ("sft", 2)
        assert spec.wire.codec == spec.method.gradients == f"topk:{rho:.4g}:{levels}"
