"""Who holds which sample: the partitions, and the command that shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from splitfrozen.cli import main
from splitfrozen.data.partition import by_value, dirichlet, iid, quantity
from splitfrozen.errors import ConfigError, RequestError, StoreError
from splitfrozen.records import Ints
from splitfrozen.runs.partition import Share, draw, partition


def assert_cover(split: list[Ints], count: int) -> None:
    """Every index once, no part empty, each part sorted."""
    assert all(part.dtype == np.int32 for part in split)
    assert all(len(part) > 0 for part in split)
    assert all((np.diff(part) > 0).all() for part in split)
    assert sorted(np.concatenate(split).tolist()) == list(range(count))


def skew(split: list[Ints], labels: Ints) -> float:
    """Mean distance of the parts' class shares from the whole's: 0 without skew."""
    classes = np.unique(labels)
    whole = np.array([(labels == c).mean() for c in classes])
    shares = [np.array([(labels[part] == c).mean() for c in classes]) for part in split]
    return float(np.mean([np.abs(share - whole).sum() / 2 for share in shares]))


LABELS = np.tile(np.arange(4, dtype=np.int32), 500)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 200), parts=st.integers(1, 200), seed=st.integers(0, 99))
def test_iid_covers_evenly(count: int, parts: int, seed: int) -> None:
    parts = min(parts, count)
    split = iid(count, parts, seed)
    assert len(split) == parts
    assert_cover(split, count)
    sizes = [len(part) for part in split]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=100),
    parts=st.integers(1, 100),
    alpha=st.floats(1e-300, 1e6),
    seed=st.integers(0, 99),
)
def test_dirichlet_covers_at_any_alpha(
    labels: list[int], parts: int, alpha: float, seed: int
) -> None:
    parts = min(parts, len(labels))
    split = dirichlet(labels, parts, alpha, seed)
    assert len(split) == parts
    assert_cover(split, len(labels))


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 100),
    parts=st.integers(1, 100),
    alpha=st.floats(1e-300, 1e6),
    seed=st.integers(0, 99),
)
def test_quantity_covers_at_any_alpha(count: int, parts: int, alpha: float, seed: int) -> None:
    parts = min(parts, count)
    split = quantity(count, parts, alpha, seed)
    assert len(split) == parts
    assert_cover(split, count)


def test_sizes_grow_apart_as_alpha_falls_and_classes_do_not() -> None:
    def largest(alpha: float) -> float:
        sizes = [max(map(len, quantity(len(LABELS), 10, alpha, seed))) for seed in range(10)]
        return float(np.mean(sizes)) / len(LABELS)

    shares = [largest(alpha) for alpha in (100.0, 10.0, 1.0, 0.1)]
    assert shares == sorted(shares)
    assert shares[0] < 0.15
    assert shares[-1] > 0.4
    large = [part for part in quantity(len(LABELS), 10, 0.5, 0) if len(part) > 200]
    assert large
    assert skew(large, LABELS) < 0.1


@given(st.lists(st.text(max_size=2), min_size=1, max_size=50))
def test_by_value_gives_each_value_a_part(values: list[str]) -> None:
    split = by_value(values)
    assert list(split) == sorted(set(values))
    assert_cover(list(split.values()), len(values))
    assert all({values[i] for i in part} == {value} for value, part in split.items())


def test_no_part_is_empty_under_strong_skew() -> None:
    labels = np.tile(np.array([0, 1], np.int32), 50)
    for seed in range(200):
        assert_cover(dirichlet(labels, 10, 0.1, seed), 100)


def test_same_seed_same_split_other_seed_another() -> None:
    def text(split: list[Ints]) -> list[list[int]]:
        return [part.tolist() for part in split]

    assert text(iid(100, 7, 1)) == text(iid(100, 7, 1)) != text(iid(100, 7, 2))
    first = text(dirichlet(LABELS, 10, 0.5, 1))
    assert first == text(dirichlet(LABELS, 10, 0.5, 1)) == text(dirichlet(list(LABELS), 10, 0.5, 1))
    assert first != text(dirichlet(LABELS, 10, 0.5, 2))
    drawn = text(quantity(100, 7, 0.5, 1))
    assert drawn == text(quantity(100, 7, 0.5, 1)) != text(quantity(100, 7, 0.5, 2))


def test_shares_do_not_depend_on_how_many_rows_there_are() -> None:
    labels = np.arange(4000) % 2
    some = np.arange(0, 4000, 5)
    for split in (partial(dirichlet, alpha=0.3), partial(_by_count, alpha=0.3)):
        whole = shares(split(labels, parts=5, seed=3), labels)
        part = shares(split(labels[some], parts=5, seed=3), labels[some])
        assert np.abs(whole - part).max() < 0.03
        assert whole.max() > 0.4


def _by_count(labels: Ints, *, parts: int, alpha: float, seed: int) -> list[Ints]:
    return quantity(len(labels), parts, alpha, seed)


def shares(split: list[Ints], labels: Ints) -> npt.NDArray[np.float64]:
    """[parts, classes]: which share of a class a part holds."""
    held = np.array([np.bincount(labels[part], minlength=2) for part in split])
    return held / np.bincount(labels)


def test_skew_grows_as_alpha_falls() -> None:
    def mean(alpha: float) -> float:
        return float(np.mean([skew(dirichlet(LABELS, 10, alpha, s), LABELS) for s in range(10)]))

    skews = [mean(alpha) for alpha in (100.0, 10.0, 1.0, 0.1)]
    assert skews == sorted(skews)
    assert skews[0] < 0.1
    assert skews[-1] > 0.5
    assert skew(iid(len(LABELS), 10, 0), LABELS) < 0.1


@pytest.mark.parametrize(("count", "parts"), [(3, 4), (0, 1), (3, 0), (3, -1)])
def test_refuses_more_parts_than_samples(count: int, parts: int) -> None:
    with pytest.raises(RequestError, match=f"{count} samples for {parts} parts"):
        iid(count, parts, 0)
    with pytest.raises(RequestError, match=f"{count} samples for {parts} parts"):
        dirichlet([0] * count, parts, 1.0, 0)
    with pytest.raises(RequestError, match=f"{count} samples for {parts} parts"):
        quantity(count, parts, 1.0, 0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_bad_alpha(alpha: float) -> None:
    with pytest.raises(RequestError, match="above 0"):
        dirichlet([0, 1], 2, alpha, 0)
    with pytest.raises(RequestError, match="above 0"):
        quantity(2, 2, alpha, 0)


# --- the command ---------------------------------------------------------------------------------

RUN = """
[model]
name = "model"
cut = 1
[task]
{task}
max_tokens = 16
[devices]
count = {count}
[data]
train = "rows.jsonl"
{data}
"""
LABELLED = 'labels = ["a", "$b^", "c"]\ncolumns = { text = "said" }'


@pytest.fixture
def write(save_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`write('partition = "iid"')` writes a run's file over 30 rows, and returns its path."""

    def run(data: str, count: int = 3, task: str = LABELLED) -> Path:
        causal = "causal_lm" in task
        save_model(tmp_path / "model", "llama-causal_lm" if causal else "gpt2-classification")
        labels = ["a", "$b^", "c"]
        rows: list[dict[str, Any]] = [
            {"prompt": "1 2", "completion": f"{i % 10}", "who": i % 3}
            if causal
            else {"said": f"{i % 10} 1", "label": labels[i % 3], "who": f"w{i % 2}"}
            for i in range(30)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "run.toml"
        path.write_text(RUN.format(task=task, count=count, data=data))
        return path

    return run


def test_the_table_counts_classes(write: Callable[..., Path], capsys: Any) -> None:
    path = write('partition = "column"\ncolumn = "who"', count=2)
    out, plot = path.parent / "out", path.parent / "plot.png"
    arguments = ["partition", str(path), "--out", str(out), "--plot", str(plot)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["id"], one["name"]) for one in found["devices"]] == [
        ("device-00", "w0"),
        ("device-01", "w1"),
    ]
    assert found["devices"][0]["classes"] == {"a": 5, "$b^": 5, "c": 5}
    assert (found["samples"], found["skipped"], found["truncated"]) == (30, 0, 0)
    assert found["files"] == [str(out / "device-00.jsonl"), str(out / "device-01.jsonl")]
    rows = [json.loads(line) for line in (out / "device-01.jsonl").read_text().splitlines()]
    assert rows == [
        {"said": f"{i % 10} 1", "label": ["a", "$b^", "c"][i % 3]} for i in range(1, 30, 2)
    ]
    assert imread(plot).std() > 0.1
    assert main(["partition", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "device-01  w1         15      30  5    5  5" in shown
    assert "30 samples, by column 'who', 0 rows left out" in shown
    assert "task.max_tokens" not in shown


def test_rows_that_are_cut_are_counted(write: Callable[..., Path]) -> None:
    path = write("rows = 7")
    path.write_text(path.read_text().replace("max_tokens = 16", "max_tokens = 1"))
    found = partition(path, None, None)
    assert found.data["truncated"] == 7
    assert found.text.endswith("\n7 of 7 rows cut to 1 tokens; raise task.max_tokens")


@pytest.mark.parametrize("data", ['partition = "dirichlet"\nalpha = 0.1', 'partition = "quantity"'])
def test_drawn_partitions_are_seeded(write: Callable[..., Path], data: str) -> None:
    path = write(data)
    first = partition(path, None, None)
    assert partition(path, None, None) == first
    path.write_text(path.read_text() + "[run]\nseed = 1\n")
    assert partition(path, None, None).text != first.text
    assert "skew, Dirichlet" in first.text


def test_language_models_have_no_classes(write: Callable[..., Path]) -> None:
    task = 'kind = "causal_lm"'
    path = write('partition = "column"\ncolumn = "who"', task=task)
    found = partition(path, path.parent / "plot.svg", None)
    assert isinstance(found.data["devices"], list)
    assert found.data["devices"][2] == {
        "id": "device-02",
        "name": "2",
        "samples": 10,
        "tokens": 40,
        "classes": {},
    }
    assert (path.parent / "plot.svg").read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match=r"data.partition.*causal_lm rows have no labels"):
        partition(write('partition = "dirichlet"', task=task), None, None)


def test_rows_are_drawn(write: Callable[..., Path]) -> None:
    found = partition(write("rows = 7"), None, None).data
    assert found["samples"] == 7
    assert isinstance(found["devices"], list)
    assert sorted(device["samples"] for device in found["devices"]) == [2, 2, 3]


def test_what_cannot_be_written_is_told_first(write: Callable[..., Path]) -> None:
    path = write('partition = "iid"')
    with pytest.raises(ConfigError, match=r"--plot.*plot.gif.*.png, .svg, .pdf"):
        partition(path, path.parent / "plot.gif", None)
    with pytest.raises(ConfigError, match="in a folder that is there"):
        partition(path, path.parent / "no" / "plot.png", None)
    for place in (path, path.parent):
        with pytest.raises(RequestError, match="is in the way"):
            partition(path, None, place)
    (path.parent / "plot.png").mkdir()
    with pytest.raises(StoreError, match=r"plot.png cannot be used"):
        draw([Share("device-00", "", 1, 1, {})], [], "run", path.parent / "plot.png")


def test_many_devices_and_classes_are_drawn(tmp_path: Path) -> None:
    labels = [f"class {i}" for i in range(40)]
    shares = [Share(f"device-{i:02}", "", 40, 400, dict.fromkeys(labels, i % 3)) for i in range(60)]
    draw(shares, labels, "run", tmp_path / "many.png")
    assert imread(tmp_path / "many.png").std() > 0.1


def test_an_alpha_beyond_all_numbers_gives_equal_parts() -> None:
    for alpha in (1e6, 1e308, 1.7976931348623157e308):
        assert [len(part) for part in quantity(24, 3, alpha, 0)] == [8, 8, 8]
        assert [len(part) for part in dirichlet([0, 1] * 12, 3, alpha, 0)] == [8, 8, 8]
