"""docs/results.md is what its command makes of the result files."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from splitfrozen.studies import plots

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_results", ROOT / "scripts" / "make_results.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(partitions: tuple[str, ...], *, generated: bool = False) -> dict[str, Any]:
    """As `compare --out` writes it, without what the document does not show."""
    methods = {"centralized": "centralised", "splitlora": "SplitLoRA", "splitfrozen": "SplitFrozen"}
    places = [
        (partition, rank, method)
        for partition in partitions
        for rank in (4, 8)
        for method in methods
    ]
    rows = [
        {
            "dataset": "mrpc",
            "partition": partition,
            "rank": rank,
            "method": method,
            "seed": seed,
            "accuracy": None if generated else 0.5 + rank / 50 + 0.02 * len(method) / 11,
            "exact_match": 0.125 if generated else None,
            "perplexity": 5.5 if generated else None,
            "lr": 1e-3,
            "seconds": 3.0,
        }
        for partition, rank, method in places
        for seed in (0, 1)
    ]
    gain = {"over_splitlora_percent": 12.5, "to_centralized_points": -0.5, "to_iid_points": None}
    gain |= {"over_baselines_percent": None}
    return {
        "rows": rows,
        "labels": methods,
        "majority": {"mrpc": None if generated else 0.665},
        "gains": {
            "mean": [{"partition": p, "paper_percent": None, **gain} for p in partitions],
            "each": [
                {"dataset": "mrpc", "partition": p, "rank": rank, **gain}
                for p in partitions
                for rank in (4, 8)
            ],
        },
        "tried": [
            {
                "dataset": "mrpc",
                "partition": partitions[0],
                "method": "splitlora",
                "lr": 1e-3,
                "tried": [{"lr": 1e-3, "score": 0.7}, {"lr": 1.0, "score": None}],
            }
        ],
        "answers": [{"method": "splitlora", "answers": ["5 | 6\n#### 11"]}] if generated else [],
        "config": {"experiment": {"prompts": ["What is 5 + 6?"] if generated else []}},
        "environment": {
            "processor": "one",
            "cores": 2,
            "python": "3.11",
            "commit": "abc",
            "torch": "2",
            "transformers": "5",
            "peft": "0",
            "onnxruntime": "1",
        },
    }


def test_the_document_is_what_the_command_makes(script: ModuleType) -> None:
    results = script.read()
    assert {"mrpc", "front"} <= results.keys()
    made = "run: python scripts/make_results.py"
    assert (ROOT / "docs" / "results.md").read_text() == script.document(results), made
    for name in script.PLOTTED.keys() & results.keys():
        assert (ROOT / "docs" / "results" / f"{name}.png").is_file(), made


def test_a_comparison_becomes_tables(script: ModuleType) -> None:
    text = script.document({"accuracy": result(("iid", "skewed"))})
    assert "| method | iid, rank 4 | iid, rank 8 | skewed, rank 4 | skewed, rank 8 |" in text
    assert "| SplitFrozen | 60.0 ±0.0 | 68.0 ±0.0 | 60.0 ±0.0 | 68.0 ±0.0 |" in text
    assert "the majority class has 66.5" in text
    assert "| mrpc | iid | SplitLoRA | 0.001 | 0.001: 0.700, 1: diverged |" in text
    assert "- iid: SplitFrozen over SplitLoRA +12.5 %" in text
    assert "| mrpc | skewed | - | +12.5 | -0.5 | - |" in text


def test_figure_3_is_by_alpha_and_rank(script: ModuleType) -> None:
    text = script.document({"figure3": result(("0.05", "1", "IID"))})
    assert "| 0.05 | +12.5 | +12.5 |" in text


def test_answers_stand_side_by_side(script: ModuleType) -> None:
    text = script.document({"table3": result(("all",), generated=True)})
    assert "| question | What is 5 + 6? |" in text
    assert "| SplitLoRA | 5 \\| 6 \\#\\#\\#\\# 11 |" in text
    assert "| SplitFrozen | 12.5 ±0.0 | 12.5 ±0.0 |" in text
    assert "| SplitFrozen | 5.5 ±0.0 | 5.5 ±0.0 |" in text


@pytest.mark.parametrize("partitions", [("iid",), ("iid", "skewed"), ("0.05", "0.1", "IID")])
def test_plots_are_drawn(tmp_path: Path, partitions: tuple[str, ...]) -> None:
    plots.draw(result(partitions), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_without_a_result_is_drawn_too(tmp_path: Path) -> None:
    nothing = {**result(("iid",)), "rows": [], "gains": {"mean": [], "each": []}}
    plots.draw(nothing, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    odd = "$\\frac{"
    named = {**result((odd,)), "labels": dict.fromkeys(result((odd,))["labels"], odd)}
    plots.draw(named, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_codecs_are_told_with_their_front(script: ModuleType) -> None:
    tradeoff = [
        {
            "dataset": "mrpc",
            "method": name,
            "bytes": size,
            "times_less": 1e8 / size,
            "accuracy": accuracy,
            "each": [accuracy - 0.01, accuracy + 0.01],
            "on_front": front,
        }
        for name, size, accuracy, front in (
            ("float32", 1e8, 0.8, True),
            ("topk", 5e6, 0.7, False),
            ("ecsq", 4e6, 0.79, True),
        )
    ]
    environment = result(("iid",))["environment"]
    text = script.document({"compression": {"tradeoff": tradeoff, "environment": environment}})
    assert "| **float32** | 100.00 | 1.0 | 80.0 ±1.0 | +0.0 |" in text
    assert "| topk | 5.00 | 20.0 | 70.0 ±1.0 | -10.0 |" in text
    assert "| **ecsq** | 4.00 | 25.0 | 79.0 ±1.0 | -1.0 |" in text


def test_what_benchmarks_write_becomes_tables(script: ModuleType) -> None:
    environment = result(("iid",))["environment"]
    row = {"ratio": 27.4, "bits_per_element": 1.17, "relative_error": 0.62}
    measured = {"codec": "topk", **row, "encode_mb_s": 130.0, "decode_mb_s": 120.0}
    limits = {"entropy_bits_per_element": 1.14, "zstd_ratio": 16.8}
    codec = {
        "mrpc": {"codecs": [measured], "limits": limits},
        "best": {
            "mrpc": {
                "codec": "ecsq:1",
                "ratio": 28.0,
                "accuracy_loss": 0.0123,
                "by_seed": [0.0146, 0.01],
            }
        },
    }
    ways = [{"way": "plain", "bits": [2.0, 1.0]}, {"way": "+ a basis", "bits": [1.5, 0.8]}]
    step = {"plain_bits": 1.0, "plain_error": 0.3, "dithered_bits": 1.2, "dithered_error": 0.31}
    dither = {
        "topk": {"topk": {"mrpc": {"once": [0.7, 0.72], "anew": [0.75, 0.73]}}},
        "ecsq": {"mrpc": [{"step": 1.0, **step}]},
    }
    each = {"rank": 4, "centralized": 1.04, "fedsllm": 1.0408, "difference": 0.0008}
    perplexity = {"rows": [each], "paper": 0.001, "local_steps": 12, "floor": 1.03}
    results = {
        "codec": {**codec, "environment": environment},
        "transforms": {
            "errors": [0.25, 0.35],
            "tables": {"mrpc": ways},
            "environment": environment,
        },
        "dither": {**dither, "environment": environment},
        "perplexity": {**perplexity, "environment": environment},
    }
    text = script.document(results)
    assert "| topk | 27.4 | 1.17 | 0.62 | 130.0 | 120.0 |" in text
    assert "`ecsq:1`, 28.0 times less, 1.2 points (1.5 and 1.0 by seed" in text
    assert "| + a basis | 1.50 | 0.80 |" in text
    assert "| mrpc | topk | 70.0, 72.0 | 75.0, 73.0 |" in text
    assert "| mrpc | 1 | 1.000 | 0.300 | 1.200 | 0.310 |" in text
    assert "| 4 | 1.04000 | 1.04080 | +0.00080 | +2.0 |" in text
    assert "at most 0.001" in text


def test_a_plan_made_anew_is_told_beside_what_it_took(script: ModuleType) -> None:
    run = {"before": {"a": 4, "b": 3}, "after": {"a": 1, "b": 3}, "noticed": 2.5}
    run |= {"said": 10.0, "seconds": 10.5, "ratio": 1.05}
    environment = result(("iid",))["environment"]
    replan = {"runs": [run], "ratio": 1.05, "allowed": 1.1, "environment": environment}
    text = script.document({"replan": replan})
    assert "| 4 and 3 | 1 and 3 | 2.5 | 10.0 | 10.5 | 1.05 |" in text
    assert "may be 1.1 and is 1.05" in text


def test_plans_are_told_beside_the_papers(script: ModuleType) -> None:
    results = {name: script.read()[name] for name in ("splitfrozen-plan", "sft")}
    text = script.document(results)
    for rule in results["splitfrozen-plan"]["rules"]:
        told = f"| {rule['rule']} | {rule['plain_s']:.3f} | {rule['codec_s']:.3f} |"
        assert told in text
    assert "the paper, against SFT without compression: 80.2 % of the delay" in text
    fl = next(line for line in text.splitlines() if line.startswith("| fl |"))
    assert "times as much" in fl


def test_a_plan_of_fedsllm_tells_what_holds_by_which_measure(script: ModuleType) -> None:
    trend = {"says": "b comes nearer", "holds": True, "holds_as_part": False}
    fedsllm = {
        "delay_saved": 0.2,
        "delay_saved_low": 0.03,
        "delay_saved_high": 0.42,
        "delay_saved_by_target": {"0.5": 0.25},
        "paper_delay_saved": 0.6,
        "cells": 50,
        "power_gap": 1e-11,
        "descent_gap_mean": 0.0012,
        "descent_gap_max": 0.025,
        "large": {"clients": 100, "subchannels": 90, "cpu_s": 0.72},
        "claims": {"5": {"a is most": True}, "8": {"a is most": False}},
        "trends": {"5": trend},
        "environment": result(("iid",))["environment"],
    }
    text = script.document({"fedsllm": fedsllm})
    assert "20.0 %, from 3.0 % to 42.0 %" in text
    assert "25.0 % at 0.5 of the way" in text
    assert "100 clients and 90 subchannels take 0.72 s of CPU" in text
    assert "| 5 | yes | b comes nearer | yes | no |" in text
    assert "| 8 | no | - | - | - |" in text


def test_results_of_several_versions_of_the_code_say_so(script: ModuleType) -> None:
    once = {**result(("iid",)), "codes": ["a1"]}
    assert "versions of the code" not in script.document({"accuracy": once})
    assert "2 versions of the code" in script.document({"accuracy": {**once, "codes": ["a1", "b"]}})


def test_the_plans_codecs_are_as_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "codec.json").read_text())
    losses = {one["codec"]: one["accuracy_loss"] for one in measured["losses"]["mrpc"]}
    bits = {one["codec"]: one["bits_per_element"] for one in measured["mrpc"]["codecs"]}
    source = ROOT / "experiments" / "splitfrozen-plan.toml"
    planned = tomllib.loads(source.read_text())["codecs"]
    assert {one["name"] for one in planned} - bits.keys() == {"float32"}
    for one in planned:
        name = one["name"]
        assert one["bits"] == pytest.approx(bits.get(name, 32), abs=0.05), name
        assert one.get("accuracy_loss", 0) == pytest.approx(max(0, losses[name]), abs=6e-4), name


def test_what_codecs_cost_is_as_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "codec.json").read_text())
    text = (ROOT / "docs" / "codecs.md").read_text().partition("## What they cost")[2]
    rows = re.findall(r"^\| `([^`]+)`[^|]*\| (.+) \|$", text, re.MULTILINE)
    assert len(rows) >= 5
    for name, cells in rows:
        for dataset, cell in zip(("mrpc", "sst2"), cells.split(" | "), strict=True):
            found = next(one for one in measured["losses"][dataset] if one["codec"] == name)
            told = cell.replace(" times", "")
            assert told == f"{found['ratio']:.0f}, {-100 * found['accuracy_loss']:+.1f}", name
