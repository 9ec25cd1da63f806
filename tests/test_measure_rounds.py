"""scripts/measure_rounds.py: what it makes of losses, and a training of it on a tiny model."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from splitfrozen.config import read_toml
from splitfrozen.studies import plan_fedsllm_file, plan_file

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "measure_rounds.py"
    spec = importlib.util.spec_from_file_location("measure_rounds", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(rounds: int) -> dict[int, list[list[float]]]:
    """Of rank r after n rounds: 1 + 3 exp(-n r / 20), so E(r) is in proportion to 1 / r."""
    return {r: [[1 + 3 * 0.95 ** (n * r) for n in range(rounds + 1)]] * 2 for r in (1, 2, 4, 6, 8)}


@pytest.mark.parametrize("most", [10, 30])
def test_the_slowest_rank_takes_all_rounds_to_the_target_and_fewer_to_easier_ones(
    script: ModuleType, most: int
) -> None:
    own = losses(most)
    found = script.result_of(own, most)
    assert found["target"] == own[1][0][-1]
    assert found["measured"][1] == [most, most]
    assert found["most_rounds"] == most
    assert "bounded by `most_rounds`" in found["about_target"]
    assert set(found["easier"]) == {"0.5", "0.75"}
    for way, easier in found["easier"].items():
        gone = (own[1][0][0] - easier["target"]) / (own[1][0][0] - found["target"])
        assert gone == pytest.approx(float(way))
        for rank in own:
            assert easier["rounds"][rank] < found["rounds"][rank]
            assert easier["rounds"][rank] == pytest.approx(easier["measured"][rank][0], rel=0.3)
    said = script.told("target", found)
    assert f"1: {most:.2f} (" in said


def test_the_planner_reads_what_is_written(script: ModuleType, tmp_path: Path) -> None:
    found = script.result_of(losses(20), 20)
    (tmp_path / "rounds.json").write_text(json.dumps(found))
    content = read_toml(ROOT / "experiments" / "fedsllm.toml") | {"rounds": "rounds.json"}
    spec = plan_file.load(content, plan_fedsllm_file.Experiment)
    assert plan_fedsllm_file.rounds(spec, tmp_path) == found["rounds"]
    easier = plan_fedsllm_file.easier_rounds(spec, tmp_path)
    assert easier == {way: one["rounds"] for way, one in found["easier"].items()}


def test_alpha_over_rank_is_that_of_the_training(script: ModuleType, tmp_path: Path) -> None:
    options = argparse.Namespace(
        model=Path("some/llama"),
        data=tmp_path / "sst2" / "train.jsonl",
        text="{text}",
        rows=8,
        seeds=3,
        local_steps=2,
        rate=1e-2,
    )
    told = script.setting(options)
    assert (told["data"], told["text"], told["model"]) == ("sst2/train.jsonl", "{text}", "llama")
    assert (told["rows"], told["seeds"], told["alpha_over_rank"]) == (8, 3, script.SCALE)
    content = read_toml(ROOT / "experiments" / "fedsllm.toml") | {"rounds": "rounds.json"}
    spec = plan_file.load(content, plan_fedsllm_file.Experiment)
    for said, scale in (({**told, "alpha_over_rank": 3.0}, 3.0), ({}, 2.0)):
        (tmp_path / "rounds.json").write_text(json.dumps({"rounds": {}, **said}))
        assert plan_fedsllm_file.alpha_over_rank(spec, tmp_path) == scale
    spec = plan_file.load({**content, "rounds": {"1": 5.0}}, plan_fedsllm_file.Experiment)
    assert plan_fedsllm_file.alpha_over_rank(spec, tmp_path) == 2.0


def test_a_training_is_measured_after_every_round(
    script: ModuleType, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    count = script.HELD_OUT + 8
    data.write_text(json.dumps({"text": "1 2 3 4 5 6 7 8 9 " * 3}) + "\n")
    data.write_text(data.read_text() * (count * script.ROW // 20))
    options = argparse.Namespace(
        model=save_model(tmp_path / "model", "llama-causal_lm"),
        data=data,
        text="{text}",
        rounds=2,
        local_steps=2,
        rate=1e-2,
        rows=8,
        seeds=1,
    )
    found = script.measure(options)
    assert list(found) == list(script.RANKS)
    assert all(len(run) == 3 for runs in found.values() for run in runs)
    first = {runs[0][0] for runs in found.values()}
    assert len(first) == 1, "adapters begin as nothing, whatever their rank"
    assert found[8][0][-1] < found[8][0][0]
