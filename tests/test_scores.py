"""Rows of results: means over the seeds, and the front that nothing beats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.image import imread

from splitfrozen.studies import plots
from splitfrozen.studies.scores import means, measures, tradeoff


def row(method: str, size: int | None, **changed: Any) -> dict[str, Any]:
    named = {"dataset": "a", "partition": "iid", "rank": 8, "method": method, "seed": 0}
    scores = {"accuracy": None, "exact_match": None, "perplexity": None}
    return {**named, **scores, "bytes": size, **changed}


def test_means_are_over_seeds_alone() -> None:
    rows = [
        row("m", 10, accuracy=0.5),
        row("m", 30, accuracy=0.7, seed=1),
        row("m", 10, accuracy=0.9, rank=4),
    ]
    assert means(rows, "bytes") == {("a", "iid", 8, "m"): 20.0, ("a", "iid", 4, "m"): 10.0}
    assert measures(rows) == {"accuracy": "accuracy in percent"}


def test_the_front_is_what_nothing_beats() -> None:
    rows = [
        row("whole", 100, accuracy=0.8),
        row("smaller", 50, accuracy=0.8),
        row("twin", 50, accuracy=0.8),
        row("worse", 60, accuracy=0.7),
        row("smallest", 10, accuracy=0.6),
        row("unknown", None, accuracy=0.99),
        # Of another data set: beats nothing here.
        row("smallest", 1, accuracy=1.0, dataset="b"),
    ]
    found = tradeoff(rows)
    own = {one["method"]: one for one in found if one["dataset"] == "a"}
    assert [name for name, one in own.items() if one["on_front"]] == ["smaller", "twin", "smallest"]
    assert {name: one["times_less"] for name, one in own.items()} == {
        "whole": 1.0,
        "smaller": 2.0,
        "twin": 2.0,
        "worse": 100 / 60,
        "smallest": 10.0,
    }
    assert [one["accuracy"] for one in found if one["dataset"] == "b"] == [1.0]


def test_what_each_seed_scored_stands_beside_their_mean() -> None:
    found = tradeoff([row("a", 10, accuracy=0.5), row("a", 10, accuracy=0.7)])
    assert [(one["accuracy"], one["each"]) for one in found] == [(0.6, [0.5, 0.7])]


def test_of_perplexities_the_lower_is_better() -> None:
    found = tradeoff([row("a", 10, perplexity=3.0), row("b", 10, perplexity=2.0)])
    assert [(one["method"], one["on_front"]) for one in found] == [("a", False), ("b", True)]


def test_the_picture_has_a_panel_for_each_data_set_and_rank(tmp_path: Path) -> None:
    rows = [
        row(method, size, accuracy=0.1 * size, dataset=dataset, rank=rank)
        for method, size in (("a_$1$", 1), ("b", 5))
        for dataset in ("x", "y")
        for rank in (4, 8)
    ]
    labels = {"a_$1$": "a $ 1", "b": "b"}
    result = {"rows": rows, "tradeoff": tradeoff(rows), "labels": labels}
    shapes = []
    for ranks in (1, 2):
        kept = [one for one in result["tradeoff"] if one["rank"] <= 4 * ranks]
        plots.draw_tradeoff({**result, "tradeoff": kept}, tmp_path / "bytes.png")
        shapes.append(imread(tmp_path / "bytes.png").shape)
    assert shapes[0][0] == shapes[1][0] > shapes[0][1] / 2
    assert shapes[1][1] > 1.5 * shapes[0][1]


def test_where_each_method_has_several_points_the_legend_names_it(tmp_path: Path) -> None:
    rows = [
        row(method, size, accuracy=0.1 * size) | {"partition": partition}
        for method, size in (("a_$1$", 1), ("b", 5))
        for partition in ("iid", "skewed $2$")
    ]
    # Nothing is known of the bytes of one method with one partition.
    rows[0]["bytes"] = None
    labels = {"a_$1$": "a $ 1", "b": "b"}
    result = {"rows": rows, "tradeoff": tradeoff(rows), "labels": labels}
    shapes = []
    for partitions in (["iid"], ["iid", "skewed $2$"]):
        shown = [one for one in rows if one["partition"] in partitions]
        plots.draw_tradeoff({**result, "rows": shown}, tmp_path / "bytes.png")
        shapes.append(imread(tmp_path / "bytes.png").shape)
    assert shapes[1][0] > shapes[0][0], "room for the legend"
