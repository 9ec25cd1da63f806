"""Experiments: from the file to cells, what is trained and what is not, and what is reported."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from msgspec import structs

from splitfrozen import cli, config
from splitfrozen.config import MethodName
from splitfrozen.errors import ConfigError, DataError, SplitFrozenError, StoreError
from splitfrozen.runs.folder import RunFolder
from splitfrozen.studies import compare, findings, grid, plots
from splitfrozen.studies.cells import (
    Cells,
    Progress,
    Result,
    Subprocesses,
    in_folder,
    locked,
    outcome,
)
from splitfrozen.studies.findings import Findings
from splitfrozen.studies.grid import Cell, Experiment
from splitfrozen.studies.scores import tradeoff

ROOT = Path(__file__).resolve().parents[1]

FILE = """\
[experiment]
ranks = [4, 8]
seeds = [0, 1]
folder = "cells"

[tune]
rates = [1e-3, 2e-3, 4e-3]
rows = 20
held_out = 10

[model]
name = "model"
cut = 1

[task]
labels = ["no", "yes"]
eval = "test.jsonl"

[devices]
count = 2
depth = [1, 1]

[[dataset]]
name = "tiny"
data.train = "train.jsonl"

[[partition]]
name = "iid"
data.partition = "iid"

[[partition]]
name = "skewed"
data.partition = "dirichlet"
data.alpha = 0.1

[[method]]
name = "centralized"
method.name = "centralized"

[[method]]
name = "fedlora"
label = "FedLoRA"
method.name = "fedlora"
train.batch_size = 8

[[method]]
name = "splitlora"
method.name = "splitlora"

[[method]]
name = "splitfrozen"
method.name = "splitfrozen"

[[method]]
name = "unshuffled"
method.name = "splitfrozen"
method.shuffle = "none"
ranks = [8]
"""

ACCURACY: dict[tuple[MethodName, str], float] = {
    ("centralized", "iid"): 0.80,
    ("fedlora", "iid"): 0.70,
    ("fedlora", "dirichlet"): 0.50,
    ("splitlora", "iid"): 0.66,
    ("splitlora", "dirichlet"): 0.30,
    ("splitfrozen", "iid"): 0.79,
    ("splitfrozen", "dirichlet"): 0.78,
    ("fedlora", "column"): 0.45,
    ("splitlora", "column"): 0.46,
    ("splitfrozen", "column"): 0.77,
}
SENT: dict[MethodName, int] = {
    "centralized": 10_000,
    "fedlora": 3_000_000,
    "splitlora": 9_000_000,
    "splitfrozen": 1_000_000,
}
BEST_RATE: dict[MethodName, float] = {
    "centralized": 1e-3,
    "fedlora": 8e-3,
    "splitlora": 4e-3,
    "splitfrozen": 2e-3,
}


@dataclass
class Fake:
    """Trains nothing: a cell's accuracy follows from its config. Fails where `fails` says so."""

    fails: Callable[[Cell], bool] = lambda _: False
    trained: list[Cell] = field(default_factory=list)

    def __call__(self, cell: Cell, folder: Path) -> Result:
        assert folder.is_dir()
        assert not list(folder.iterdir())
        assert cell.config.data is not None
        self.trained.append(cell)
        if self.fails(cell):
            raise SplitFrozenError("it broke", got="a fault", allowed="none", remedy="try again")
        method = cell.config.method.name
        accuracy = ACCURACY[method, cell.config.data.partition] + 0.01 * cell.seed
        if cell.tuning:
            accuracy -= abs(cell.lr - BEST_RATE[method])
        return Result(
            before={"accuracy": 0.5},
            after={"accuracy": accuracy, "loss": 1 - accuracy},
            seconds=2.5,
            # As of a cell of an earlier version.
            bytes=None if cell.config.method.shuffle == "none" else SENT[method],
            evaluations=({"epoch": 0, "step": 3, "accuracy": accuracy},),
            losses=((1, 0.7), (3, 0.5)),
        )

    def stop(self) -> None: ...


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"text": "x", "label": label} for label in ("yes", "yes", "yes", "no")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "small.toml").write_text(FILE)
    return tmp_path


def changed(folder: Path, old: str, new: str) -> Path:
    assert old in FILE
    path = folder / "changed.toml"
    path.write_text(FILE.replace(old, new))
    return path


def ran(experiment: Experiment, runner: Fake, jobs: int = 1) -> Findings:
    with locked(experiment.folder):
        return compare.run(experiment, runner, jobs)


def rows_of(found: Findings) -> list[dict[str, Any]]:
    data: Any = findings.report(found)
    return list(data["rows"])


# --- the file ------------------------------------------------------------------------------------


def test_a_cell_takes_its_config_from_all_axes(folder: Path) -> None:
    experiment = grid.load(folder / "small.toml")
    group = next(g for g in experiment.groups() if (g[1].name, g[2].name) == ("skewed", "fedlora"))
    cells = experiment.cells(group, 3e-3)
    assert [(cell.rank, cell.seed) for cell in cells] == [(4, 0), (4, 1), (8, 0), (8, 1)]
    made = cells[1].config
    assert made.data is not None
    assert (made.method.name, made.train.batch_size, made.train.lr) == ("fedlora", 8, 3e-3)
    assert (made.data.partition, made.data.alpha, made.lora.rank) == ("dirichlet", 0.1, 4)
    assert (made.data.train, made.run.seed) == (str(folder / "train.jsonl"), 1)


def test_a_method_may_have_fewer_ranks(folder: Path) -> None:
    experiment = grid.load(folder / "small.toml")
    ranks = {
        g.method.name: {c.rank for c in experiment.cells(g, 1e-3)} for g in experiment.groups()
    }
    assert ranks["unshuffled"] == {8}
    assert ranks["splitfrozen"] == {4, 8}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("held_out = 10", "heldout = 10", r"\[tune\].*`heldout`.*did you mean `held_out`"),
        ("[model]", "[modell]", r"`modell`.*did you mean `model`"),
        ('label = "FedLoRA"', 'lable = "x"', r"\[\[method\]\] 2.*`lable`.*did you mean `label`"),
        ("train.batch_size = 8", "train.batch = 8", r"fedlora.*`train.batch`.*`train.batch_size`"),
        ('name = "skewed"', 'name = "iid"', r"\[\[partition\]\].*'iid'.*names that differ"),
        ("[1e-3, 2e-3, 4e-3]", "[2e-3, 1e-3]", "rates that rise"),
        ("ranks = [4, 8]", "ranks = []", r"\[experiment\]"),
        ('eval = "test.jsonl"', "", "`task.eval` is wrong"),
        ('data.train = "train.jsonl"', "", "train"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(folder: Path, old: str, new: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        grid.load(changed(folder, old, new))


def test_settings_replace_what_the_file_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere" / "mine").mkdir(parents=True)
    monkeypatch.chdir(folder / "elsewhere")
    settings = ["model.name=mine", "train.batch_size=5", "experiment.seeds=[7]"]
    experiment = grid.load(folder / "small.toml", settings)
    cells = [cell for group in experiment.groups() for cell in experiment.cells(group, 1e-3)]
    assert {cell.config.model.name for cell in cells} == {str(folder / "elsewhere" / "mine")}
    assert {cell.config.train.batch_size for cell in cells} == {5}
    assert {cell.seed for cell in cells} == {7}


@pytest.mark.parametrize("text", ["model.name", "name=x", "modle.name=x", "=x"])
def test_a_setting_that_is_none_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        grid.load(folder / "small.toml", [text])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model.name=", "`model.name` is wrong: got ''"),
        (f"train.lr={'9' * 5000}", "`train.lr` is wrong"),
        (f"task.labels={'[' * 3000}", "`task.labels` is wrong"),
        ("tune.rates=[inf]", r"`rates\[0\]` is wrong: got inf"),
        ('experiment.folder="\\u0000"', "NUL"),
        ('experiment.prompts=["\\u0000"]', "NUL"),
    ],
)
def test_a_setting_that_cannot_be_is_named(folder: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        grid.load(folder / "small.toml", [text])


def test_a_setting_of_what_is_no_table_is_refused(folder: Path) -> None:
    path = changed(folder, '[experiment]\nranks = [4, 8]\nseeds = [0, 1]\nfolder = "cells"', "")
    path.write_text(f"experiment = 3\n{path.read_text()}")
    with pytest.raises(ConfigError, match=r"`\[experiment\]` is wrong: got 3"):
        grid.load(path, ["experiment.ranks=[4]"])


def test_a_misspelt_path_is_told_before_anything_is_trained(folder: Path) -> None:
    for key in ("data.train", "task.eval", "wire.public"):
        with pytest.raises(DataError, match=r"no such data: got none\.jsonl"):
            compare.compare(folder / "small.toml", [f"{key}=none.jsonl"], 1, None)
    # Of any method, too.
    changes = 'name = "unshuffled"\nwire = { codec = "ecsq:1", public = "none.jsonl" }'
    with pytest.raises(DataError, match=r"no such data: got none\.jsonl"):
        compare.compare(changed(folder, 'name = "unshuffled"', changes), [], 1, None)
    assert not (folder / "cells").exists()


def test_a_place_that_cannot_be_written_is_told_before_anything_is_trained(folder: Path) -> None:
    (folder / "file").touch()
    for out in (folder / "file", folder / "file" / "out"):
        with pytest.raises(StoreError, match="cannot be used"):
            compare.compare(folder / "small.toml", [], 1, out)
    assert not (folder / "cells").exists()


# --- keys ----------------------------------------------------------------------------------------


def keys(experiment: Experiment, method: str) -> dict[tuple[str, int, int], str]:
    groups = [group for group in experiment.groups() if group.method.name == method]
    cells = [cell for group in groups for cell in experiment.cells(group, 1e-3)]
    return {(cell.partition, cell.rank, cell.seed): cell.key for cell in cells}


def test_centralised_training_does_not_depend_on_the_partition(folder: Path) -> None:
    experiment = grid.load(folder / "small.toml")
    found = keys(experiment, "centralized")
    assert found["iid", 8, 0] == found["skewed", 8, 0]
    assert len(set(found.values())) == 4
    other = keys(experiment, "splitfrozen")
    assert len(set(other.values())) == 8
    assert not set(other.values()) & set(found.values())


def test_public_rows_count_for_the_codecs_that_are_fitted_to_them(folder: Path) -> None:
    def key(codec: str) -> str:
        settings = [f"wire.codec={codec}", f"wire.public={folder / 'public.jsonl'}"]
        grid.fingerprint.cache_clear()
        return keys(grid.load(folder / "small.toml", settings), "splitfrozen")["iid", 8, 0]

    plain = keys(grid.load(folder / "small.toml", ["wire.codec=int8"]), "splitfrozen")
    (folder / "public.jsonl").write_text('{"text": "one"}\n')
    assert key("int8") == plain["iid", 8, 0]
    before = key("ecsq:1")
    (folder / "public.jsonl").write_text('{"text": "other"}\n')
    assert key("ecsq:1") != before
    assert key("int8") == plain["iid", 8, 0]


def test_a_key_follows_content_and_not_places(folder: Path, tmp_path: Path) -> None:
    before = keys(grid.load(folder / "small.toml"), "splitfrozen")
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in ("train.jsonl", "test.jsonl", "model", "small.toml"):
        (folder / path).rename(moved / path)
    assert keys(grid.load(moved / "small.toml"), "splitfrozen") == before
    grid.fingerprint.cache_clear()
    (moved / "test.jsonl").write_text('{"text": "other", "label": 1}\n')
    after = keys(grid.load(moved / "small.toml"), "splitfrozen")
    assert not set(after.values()) & set(before.values())


def test_the_file_of_a_run_reads_back(folder: Path) -> None:
    experiment = grid.load(
        folder / "small.toml", ['task.template="a \\"b\\"\\n{prompt} ü \\u007f😀"']
    )
    for group in experiment.groups():
        made = in_folder(experiment.config(group), folder / "run")
        (folder / "run.toml").write_text(grid.to_toml(made))
        assert config.load(folder / "run.toml") == made


# --- training ------------------------------------------------------------------------------------


def test_every_method_tries_the_same_rates(folder: Path) -> None:
    runner = Fake()
    found = ran(grid.load(folder / "small.toml"), runner)
    for tuned in found.tuned.values():
        assert list(tuned.tried) == [1e-3, 2e-3, 4e-3]
    rates = {name[2]: tuned.lr for name, tuned in found.tuned.items()}
    assert rates == {
        "centralized": 1e-3,
        "fedlora": 4e-3,
        "splitlora": 4e-3,
        "splitfrozen": 2e-3,
        "unshuffled": 2e-3,
    }
    assert {(row["method"], row["lr"]) for row in rows_of(found)} == set(rates.items())


def test_trials_of_a_dataset_may_be_of_another_size(folder: Path) -> None:
    (folder / "other.jsonl").write_text((folder / "train.jsonl").read_text())
    path = changed(
        folder,
        '[[partition]]\nname = "iid"',
        '[[dataset]]\nname = "other"\ndata.train = "other.jsonl"\n'
        "tune = { epochs = 2, rows = 12, held_out = 6 }\n\n"
        '[[partition]]\nname = "iid"',
    )

    def trials(settings: Sequence[str]) -> dict[str, set[tuple[int, ...]]]:
        runner = Fake()
        ran(grid.load(path, settings), runner)
        found: dict[str, set[tuple[int, ...]]] = {}
        for cell in (one for one in runner.trained if one.tuning):
            made = cell.config
            assert made.data is not None
            assert made.task.eval is not None
            sizes = [
                len(Path(p).read_text().split("\n")) - 1 for p in (made.data.train, made.task.eval)
            ]
            found.setdefault(cell.dataset, set()).add((made.train.epochs, *sizes))
        return found

    assert trials([]) == {"tiny": {(1, 20, 10)}, "other": {(2, 12, 6)}}
    every = ["tune.epochs=3", "tune.rows=8", "experiment.folder=more"]
    assert trials(every) == {"tiny": {(3, 8, 10)}, "other": {(3, 8, 6)}}
    with pytest.raises(ConfigError, match="rates"):
        grid.load(changed(folder, "[[partition]]", "tune.rates = [1.0]\n\n[[partition]]"))


def test_a_search_that_ends_at_its_border_goes_on(folder: Path) -> None:
    runner = Fake()
    path = changed(folder, "held_out = 10", "held_out = 10\nextend = 2")
    found = ran(grid.load(path), runner)
    tuned = {name[2]: tuned for name, tuned in found.tuned.items()}
    assert tuned["fedlora"].lr == 8e-3
    assert list(tuned["fedlora"].tried) == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    assert list(tuned["centralized"].tried) == [5e-4, 1e-3, 2e-3, 4e-3]
    assert list(tuned["splitfrozen"].tried) == [1e-3, 2e-3, 4e-3]


def test_a_search_ends_where_no_rate_gets_anywhere(folder: Path) -> None:
    @dataclass
    class Stuck(Fake):
        """Every rate ends at the majority class; the loss falls with the rate."""

        def __call__(self, cell: Cell, folder: Path) -> Result:
            found = super().__call__(cell, folder)
            return structs.replace(found, after={"accuracy": 0.75, "loss": 1 - cell.lr})

    runner = Stuck()
    found = ran(grid.load(folder / "small.toml", ["tune.extend=2"]), runner)
    tried = {tuple(tuned.tried) for tuned in found.tuned.values()}
    assert tried == {(1e-3, 2e-3, 4e-3)}
    assert {tuned.lr for tuned in found.tuned.values()} == {4e-3}


def test_of_rates_that_are_as_good_the_one_with_the_least_loss_is_taken(folder: Path) -> None:
    # Of 10 rows, 0.8 has a standard error of 0.13: 0.6 is beyond it, however small its loss.
    found = {1e-3: (0.7, 0.35), 2e-3: (0.7, 0.31), 4e-3: (0.8, 0.34), 8e-3: (0.6, 0.2)}

    @dataclass
    class Measured(Fake):
        def __call__(self, cell: Cell, folder: Path) -> Result:
            made = super().__call__(cell, folder)
            accuracy, loss = found[cell.lr]
            return structs.replace(made, after={"accuracy": accuracy, "loss": loss})

    settings = ["tune.rates=[1e-3, 2e-3, 4e-3, 8e-3]"]
    for tuned in ran(grid.load(folder / "small.toml", settings), Measured()).tuned.values():
        assert tuned.lr == 2e-3


def test_rates_are_chosen_on_training_rows_that_were_not_trained_on(folder: Path) -> None:
    runner = Fake()
    ran(grid.load(folder / "small.toml"), runner)
    tuning = [cell.config for cell in runner.trained if cell.tuning]
    [(train, held)] = {(c.data.train, c.task.eval) for c in tuning if c.data is not None}
    assert held is not None
    given, used, measured = (
        [json.loads(line)["text"] for line in Path(file).read_text().splitlines()]
        for file in (str(folder / "train.jsonl"), train, held)
    )
    assert (len(used), len(measured)) == (20, 10)
    assert not set(used) & set(measured)
    assert set(used) | set(measured) <= set(given)
    reported = {cell.config.task.eval for cell in runner.trained if not cell.tuning}
    assert reported == {str(folder / "test.jsonl")}
    assert {(cell.rank, cell.seed) for cell in runner.trained if cell.tuning} == {(8, 0)}


def test_nothing_is_trained_twice(folder: Path) -> None:
    first, again, other = Fake(), Fake(), Fake()
    rows = rows_of(ran(grid.load(folder / "small.toml"), first, jobs=3))
    names = [cell.key for cell in first.trained]
    assert len(names) == len(set(names))
    # Per partition 3 methods x 2 ranks x 2 seeds, and one rank of the fifth; centralised once.
    assert sum(not cell.tuning for cell in first.trained) == 2 * (3 * 4 + 2) + 4
    assert rows_of(ran(grid.load(folder / "small.toml"), again)) == rows
    assert again.trained == []
    path = changed(folder, "seeds = [0, 1]", "seeds = [0, 2]")
    ran(grid.load(path), other)
    assert {cell.seed for cell in other.trained} == {2}


def test_a_cell_that_fails_loses_only_itself(folder: Path) -> None:
    def breaks(cell: Cell) -> bool:
        return not cell.tuning and (cell.method, cell.rank, cell.seed) == ("splitlora", 4, 1)

    experiment = grid.load(folder / "small.toml")
    found = ran(experiment, Fake(breaks))
    whole = len(rows_of(found)) + 2
    assert sorted(found.failures) == [
        "tiny, iid, splitlora, rank 4, seed 1, lr 0.004",
        "tiny, skewed, splitlora, rank 4, seed 1, lr 0.004",
    ]
    assert "it broke" in findings.text(found, findings.report(found))
    runner = Fake()
    assert len(rows_of(ran(experiment, runner))) == whole
    assert len(runner.trained) == 2


def test_a_rate_that_diverges_is_not_chosen_and_no_failure(folder: Path) -> None:
    class Diverging(Fake):
        def __call__(self, cell: Cell, folder: Path) -> Result:
            result = super().__call__(cell, folder)
            return Result(diverged=True) if cell.lr > 1e-3 else result

    found = ran(grid.load(folder / "small.toml"), Diverging())
    assert found.failures == {}
    assert {tuned.lr for tuned in found.tuned.values()} == {1e-3}
    assert all(list(tuned.tried.values())[1:] == [None, None] for tuned in found.tuned.values())
    assert "0.004: diverged" in findings.text(found, findings.report(found))


def test_a_method_whose_rates_all_fail_is_named(folder: Path) -> None:
    found = ran(grid.load(folder / "small.toml"), Fake(lambda cell: cell.method == "fedlora"))
    assert "tiny, iid, fedlora" in found.failures
    assert {row["method"] for row in rows_of(found)} == {
        "centralized",
        "splitlora",
        "splitfrozen",
        "unshuffled",
    }


def test_an_interrupt_keeps_what_is_finished(folder: Path) -> None:
    experiment = grid.load(folder / "small.toml")
    count = 0

    def interrupts(_: Cell) -> bool:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return False

    first, second = Fake(interrupts), Fake()
    with pytest.raises(KeyboardInterrupt):
        ran(experiment, first)
    ran(experiment, second)
    finished = {cell.key for cell in first.trained[:4]}
    assert not finished & {cell.key for cell in second.trained}
    assert first.trained[4].key in {cell.key for cell in second.trained}


def test_a_damaged_cell_is_trained_again(folder: Path) -> None:
    experiment = grid.load(folder / "small.toml")
    ran(experiment, Fake())
    damaged, *_ = sorted((folder / "cells").glob("*.json"))
    for text in (
        damaged.read_bytes()[:40],
        b"[" * 100_000,
        b'{"result": {"before": 3}}',
        b'{"result": {"after": {"accuracy": NaN, "loss": 1}}}',
        b'{"result": {"after": {"loss": Infinity}}}',
        b'{"result": {"after": {"loss": 1}, "bytes": -1}}',
    ):
        damaged.write_bytes(text)
        again = Fake()
        ran(experiment, again)
        assert [f"{cell.key}.json" for cell in again.trained] == [damaged.name]


def test_cells_run_side_by_side(folder: Path) -> None:
    both = threading.Barrier(2, timeout=20)
    experiment = grid.load(folder / "small.toml")
    group = experiment.groups()[0]

    class Meeting(Fake):
        def __call__(self, cell: Cell, folder: Path) -> Result:
            both.wait()
            return super().__call__(cell, folder)

    with locked(experiment.folder):
        cells = Cells(experiment.folder, Meeting(), 2, Progress(2))
        assert len(cells.finish(experiment.cells(group, 1e-3))) == 4
    assert not list((experiment.folder / "running").iterdir())


def test_a_folder_is_of_one_command(folder: Path) -> None:
    with (
        locked(folder / "cells"),
        pytest.raises(StoreError, match="in use"),
        locked(folder / "cells"),
    ):
        pass


def test_what_is_not_of_cells_stays(folder: Path) -> None:
    running = folder / "cells" / "running"
    for name in ("mine", f"{'0' * 20}-left"):
        (running / name).mkdir(parents=True)
        (running / name / "file").touch()
    with locked(folder / "cells"):
        assert [path.name for path in running.iterdir()] == ["mine"]
    assert (running / "mine" / "file").exists()


# --- what a training leaves ----------------------------------------------------------------------


def test_the_last_epoch_counts_and_not_the_best(folder: Path) -> None:
    experiment = grid.load(folder / "small.toml")
    made = experiment.cells(experiment.groups()[0], 1e-3)[0].config
    run = RunFolder.create(in_folder(made, folder / "run"))
    run.report({"event": "baseline", "accuracy": 0.25, "loss": 1.5})
    for step in range(1, 121):
        run.report({"event": "step", "step": step, "epoch": step // 61, "loss": float(step)})
    for epoch, accuracy in enumerate((0.9, 0.8)):
        run.report(
            {"event": "evaluation", "epoch": epoch, "step": 60 * epoch + 60, "accuracy": accuracy}
        )
    found = outcome(run, {"seconds": 3.0, "bytes": {"activations": 5, "gradients": 2}}, [])
    assert (found.seconds, found.bytes) == (3.0, 7)
    assert (found.before["accuracy"], found.after["accuracy"]) == (0.25, 0.8)
    assert [one["accuracy"] for one in found.evaluations] == [0.9, 0.8]
    assert len(found.losses) == 60
    assert found.losses[0] == (2, 1.5)
    assert found.losses[-1] == (120, 119.5)


def test_the_score_is_the_accuracy_and_of_equal_ones_the_loss() -> None:
    accurate, sure, neither = (
        Result(after={"accuracy": accuracy, "loss": loss}).score or 0.0
        for accuracy, loss in ((0.2, 9.0), (0.1, 1.0), (0.1, 9.0))
    )
    assert accurate > sure > neither
    assert Result(after={"perplexity": 2.0, "loss": 0.7}).score == -0.7
    # A loss that is no number is left out of the metrics: an accuracy beside it means nothing.
    assert Result(after={"accuracy": 0.9}).score is None


# --- what is reported ----------------------------------------------------------------------------


def test_gains_are_counted_as_the_paper_counts(folder: Path) -> None:
    found = ran(grid.load(folder / "small.toml"), Fake())
    data: Any = findings.report(found)
    iid, skewed = data["gains"]["mean"]
    seeds = 0.005  # The mean of what two seeds add.
    assert iid["over_baselines_percent"] == pytest.approx(
        100 * ((0.79 + seeds) / (fmean((0.70, 0.66)) + seeds) - 1)
    )
    assert skewed["over_baselines_percent"] == pytest.approx(
        100 * ((0.78 + seeds) / (fmean((0.50, 0.30)) + seeds) - 1)
    )
    assert skewed["over_splitlora_percent"] == pytest.approx(100 * (0.785 / 0.305 - 1))
    assert (iid["paper_percent"], skewed["paper_percent"]) == (13.6, 69.4)
    assert skewed["to_iid_points"] == pytest.approx(-1.0)
    assert skewed["to_centralized_points"] == pytest.approx(-2.0)
    assert len(data["gains"]["each"]) == 4
    assert data["majority"] == {"tiny": 0.75}


def test_the_text_has_means_spreads_and_the_paper_beside(folder: Path) -> None:
    found = ran(grid.load(folder / "small.toml"), Fake())
    text = findings.text(found, findings.report(found))
    header, lines = findings.scores(
        rows_of(found), "tiny", findings.labels(found.experiment), "accuracy"
    )
    assert header == ["method", "iid, rank 4", "iid, rank 8", "skewed, rank 4", "skewed, rank 8"]
    assert ["FedLoRA", "70.5 ±0.5", "70.5 ±0.5", "50.5 ±0.5", "50.5 ±0.5"] in lines
    assert ["unshuffled", "-", "79.5 ±0.5", "-", "78.5 ±0.5"] in lines
    assert "majority class 75.0" in text
    assert "(the paper, GPT-2 on its data: +69.4 %)" in text
    sent = text.partition("MB sent")[2].partition("\n\n")[0]
    [fed] = [line.split() for line in sent.splitlines() if line.startswith("FedLoRA")]
    assert fed == ["FedLoRA", *["3.00", "(0.00333x)"] * 4]
    [own] = [line.split() for line in sent.splitlines() if line.startswith("centralized")]
    assert own[1:4] == ["0.01", "(1x)", "*"]
    assert "unshuffled" not in sent


def test_rows_to_tune_on_keep_the_column_of_every_partition(folder: Path) -> None:
    rows = [{"text": f"row {i}", "label": i % 2, "site": f"s{i % 2}"} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parted = 'data.partition = "column"\ndata.column = "site"'
    path = changed(folder, 'data.partition = "dirichlet"\ndata.alpha = 0.1', parted)
    ran(grid.load(path), Fake())
    for name, count in (("train", 20), ("held-out", 10)):
        [file] = (folder / "cells" / "tune").glob(f"*-{name}.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [set(line) for line in lines] == [{"text", "label", "site"}] * count


def test_files_hold_config_seeds_environment_and_curves(folder: Path) -> None:
    own = [f"model.name={folder / 'model'}", "tune.rows=12", f"experiment.folder={folder / 'own'}"]
    experiment = grid.load(folder / "small.toml", own)
    found = ran(experiment, Fake())
    data = findings.report(found)
    paths = compare.write(found, data, folder / "out")
    names = ["small.json", "small.csv", "small.png", "small-bytes.png"]
    assert [path.name for path in paths] == names
    kept = json.loads(paths[0].read_text())
    assert kept["rows"] == data["rows"]
    assert kept["seeds"] == [0, 1]
    assert kept["config"]["tune"]["rates"] == [1e-3, 2e-3, 4e-3]
    assert kept["config"]["set"] == {
        "model": {"name": "model"},
        "tune": {"rows": 12},
        "experiment": {"folder": "own"},
    }
    assert str(folder) not in paths[0].read_text()
    assert kept["environment"]["torch"]
    assert len(kept["curves"]) == len(kept["rows"])
    assert kept["curves"][0]["losses"] == [[1, 0.7], [3, 0.5]]
    read = list(csv.DictReader(StringIO(paths[1].read_text())))
    assert len(read) == len(kept["rows"])
    assert float(read[0]["accuracy"]) == kept["rows"][0]["accuracy"]
    assert {row["bytes"] for row in read} == {"", *map(str, SENT.values())}
    for path in paths[2:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_generating_task_shows_answers_side_by_side(folder: Path) -> None:
    class Answering(Fake):
        def __call__(self, cell: Cell, folder: Path) -> Result:
            super().__call__(cell, folder)
            answers = tuple(f"{cell.method}: {prompt}!" for prompt in cell.prompts)
            return Result(
                after={"loss": 0.7, "perplexity": 2.0, "exact_match": 0.25}, answers=answers
            )

    path = changed(folder, 'folder = "cells"', 'folder = "cells"\nprompts = ["one?", "two?"]')
    found = ran(grid.load(path), Answering())
    text = findings.text(found, findings.report(found))
    assert "tiny, exact match in percent" in text
    assert "tiny, perplexity" in text
    assert "fedlora (iid): fedlora: two?!" in text


# --- the real thing ------------------------------------------------------------------------------


def demo_experiment(folder: Path) -> Path:
    """Two methods on a few rows of the demo's task, with the packaged model."""
    from splitfrozen.runs.demo import write_files

    made = config.load(write_files(folder / "demo", 0, (1, 2), 60, 24))
    rows = sorted((folder / "demo" / "data").glob("device-*.csv"))
    text = rows[0].read_text() + "".join(rows[1].read_text().split("\n", 1)[1])
    (folder / "train.csv").write_text(text)
    path = folder / "demo.toml"
    path.write_text(
        "[experiment]\nranks = [4]\nfolder = 'cells'\n[tune]\nrates = [2e-3]\n"
        f"[model]\nname = {json.dumps(made.model.name)}\ncut = 2\nprecision = 'float32'\n"
        f"[task]\nlabels = {json.dumps(made.task.labels)}\nmax_tokens = 64\n"
        f"eval = {json.dumps(made.task.eval)}\n"
        "[data]\ntrain = 'train.csv'\n[devices]\ncount = 2\ndepth = [1, 2]\n[train]\nepochs = 1\n"
        "[[dataset]]\nname = 'village'\n[[partition]]\nname = 'iid'\n"
        "[[method]]\nname = 'splitfrozen'\nmethod.name = 'splitfrozen'\n"
        "[[method]]\nname = 'broken'\nmethod.name = 'splitfrozen'\nlora.targets = ['no_such_map']\n"
    )
    return path


def test_real_trainings_as_processes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = demo_experiment(folder)
    assert cli.main(["compare", str(path), "--jobs", "2", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    [row] = told["rows"]
    assert row["method"] == "splitfrozen"
    assert 0 <= row["accuracy"] <= 1
    assert row["seconds"] > 0
    assert row["bytes"] > 1000
    [(name, why)] = told["failures"].items()
    assert "broken" in name
    assert "no_such_map" in why
    assert len(list((folder / "cells").glob("*.json"))) == 1
    assert len(list((folder / "cells").glob("*.log"))) == 1


def test_a_training_that_diverges_is_a_failure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = demo_experiment(folder)
    path.write_text(path.read_text().partition("[[method]]\nname = 'broken'")[0])
    longer = ["--set", "train.epochs=4"]
    assert cli.main(["compare", str(path), "--json", "--set", "tune.rates=[1e30]", *longer]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == []
    assert list(told["failures"].values()) == ["the loss was not finite"]


def test_a_stopped_runner_ends_its_processes(folder: Path) -> None:
    experiment = grid.load(demo_experiment(folder))
    cell = experiment.cells(experiment.groups()[0], 2e-3)[0]
    runner = Subprocesses(folder)
    runner.stop()
    (folder / "work").mkdir()
    with pytest.raises(SplitFrozenError, match="exit code"):
        runner(cell, folder / "work")


COMPARED = [
    path
    for path in sorted((ROOT / "experiments").glob("*.toml"))
    if "\n[experiment]\n" in path.read_text()
]


@pytest.mark.parametrize("path", COMPARED, ids=lambda p: p.stem)
def test_experiments_in_the_repository_are_read(path: Path) -> None:
    experiment = grid.load(path)
    assert len(experiment.groups()) >= 4
    if path.stem == "accuracy":
        kinds = {experiment.config(group).method.name for group in experiment.groups()}
        assert kinds == set(config.MethodName.__args__)  # type: ignore[attr-defined]


def test_a_variant_takes_the_rate_of_what_it_is_a_variant_of(folder: Path) -> None:
    path = folder / "small.toml"
    path.write_text(
        path.read_text().replace("ranks = [8]\n", 'ranks = [8]\nrate_of = "splitfrozen"\n')
    )
    fake = Fake()
    found = ran(grid.load(path), fake)
    tuned = {cell.method for cell in fake.trained if cell.tuning}
    assert "splitfrozen" in tuned
    assert "unshuffled" not in tuned
    for (dataset, partition, method), rate in found.tuned.items():
        if method == "unshuffled":
            assert rate.lr == found.tuned[dataset, partition, "splitfrozen"].lr
            assert rate.tried == {}
    assert {one.cell.lr for one in found.trained if one.cell.method == "unshuffled"} == {2e-3}


@pytest.mark.parametrize("other", ["unshuffled", "nobody"])
def test_a_rate_can_only_be_taken_of_a_method_that_is_tuned(folder: Path, other: str) -> None:
    path = folder / "small.toml"
    path.write_text(
        path.read_text().replace("ranks = [8]\n", f'ranks = [8]\nrate_of = "{other}"\n')
    )
    with pytest.raises(
        ConfigError, match=rf"rate_of` is wrong: got '{other}'; allowed: centralized"
    ):
        grid.load(path)


def test_a_method_without_a_rank_of_the_experiment_is_refused(folder: Path) -> None:
    path = folder / "small.toml"
    path.write_text(path.read_text().replace("ranks = [8]\n", "ranks = [16]\n"))
    with pytest.raises(ConfigError, match=r"unshuffled: ranks` is wrong: got \[16\]"):
        grid.load(path)


def test_without_a_folder_cells_are_kept_beside_other_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = demo_experiment(folder)
    path.write_text(path.read_text().partition("[[method]]\nname = 'broken'")[0])
    path.write_text(re.sub(r"folder = .*\n", "", path.read_text()))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert cli.main(["compare", f"../{path.name}", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1
    assert len(list((folder / "elsewhere/runs" / path.stem).glob("*.json"))) == 1


def test_nothing_is_written_where_nothing_was_trained(folder: Path) -> None:
    out = folder / "out"
    fake = Fake(fails=lambda _: True)
    found = ran(grid.load(folder / "small.toml"), fake)
    assert set(found.failures.values()) >= {"all trials of learning rates failed, see above"}
    assert findings.report(found)["rows"] == []
    assert not out.exists()


def test_what_sends_nothing_that_is_counted_is_no_measure_of_what_others_send() -> None:
    named = {"dataset": "d", "partition": "iid", "rank": 8, "seed": 0}
    scores = {"accuracy": 0.5, "exact_match": None, "perplexity": None}
    sent = {"centralized": 0, "earlier": None, "float32": 100, "int8": 25}
    rows = [{**named, **scores, "method": name, "bytes": size} for name, size in sent.items()]
    found = tradeoff(rows)
    assert {one["method"]: one["times_less"] for one in found} == {"float32": 1.0, "int8": 4.0}
    assert [one["method"] for one in found if one["on_front"]] == ["int8"]


def test_there_may_be_more_partitions_or_ranks_than_colours(tmp_path: Path) -> None:
    many = 2 * len(plots.COLOURS)
    named = {"dataset": "d", "rank": 8, "method": "m", "seed": 0}
    row = {**named, "accuracy": 0.5, "exact_match": None, "perplexity": None}
    rows = [{**row, "partition": f"{i}"} for i in range(many)]
    gain = {"dataset": "d", "over_splitlora_percent": 1.0}
    each = [{**gain, "partition": f"{i % 3}", "rank": i} for i in range(many)]
    for found in ([], each):
        path = tmp_path / f"{len(found)}.png"
        plots.draw({"rows": rows, "gains": {"each": found}, "labels": {"m": "M"}}, path)
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("key", ["ranks", "seeds"])
def test_a_rank_or_seed_twice_is_refused(folder: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"experiment.{key}. is wrong: got \[4, 4\]"):
        grid.load(folder / "small.toml", [f"experiment.{key}=[4, 4]"])
