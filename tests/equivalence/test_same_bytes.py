"""Same seed, same bytes: interrupted or not, a run on the CPU saves the same adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfrozen.config import LoraSpec, TrainSpec
from splitfrozen.training.batching import FixedOrder
from splitfrozen.training.evaluate import Evaluator
from splitfrozen.training.loop import Hooks, Job, fit

SAMPLES = 10
SPEC = TrainSpec(epochs=2, batch_size=4, lr=0.01, micro_tokens=30, checkpoint_steps=2)
FILES = ["adapter_config.json", "adapter_model.safetensors"]


class KilledError(Exception):
    """Stands for a kill after a step."""


@pytest.fixture
def train(family: Any, tiny_run: Callable[..., Any]) -> Callable[..., None]:
    """`train(folder)` is a process that starts, trains (or continues) and ends."""

    def start(folder: Path, *, seed: int = 0, dropout: float = 0.2, **hooks: Any) -> None:
        lora = LoraSpec(rank=4, dropout=dropout)
        run = tiny_run(family.id, samples=SAMPLES, lora=lora, train=SPEC, seed=seed)
        evaluate = Evaluator(
            run.part, run, run.sliced.kind, micro_tokens=64, device=torch.device("cpu")
        )
        order = FixedOrder(run.samples(), seed, SPEC.batch_size)
        job = Job(SPEC, seed, SAMPLES, torch.float32, folder)
        report = hooks.pop("report", lambda _: None)
        fit(run.method, run, order, job, Hooks(report, evaluate, **hooks))

    return start


def result(folder: Path) -> list[bytes]:
    return [(folder / which / name).read_bytes() for which in ("last", "best") for name in FILES]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    train: Callable[..., None], tmp_path: Path
) -> None:
    for name, options in {"a": {}, "b": {}, "seed": {"seed": 1}, "calm": {"dropout": 0.0}}.items():
        train(tmp_path / name, **options)
    assert result(tmp_path / "a") == result(tmp_path / "b")
    weights = [result(tmp_path / name)[1] for name in ("a", "seed", "calm")]
    assert len(set(weights)) == 3


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_run_that_was_killed_or_stopped_saves_the_same_bytes(
    train: Callable[..., None], tmp_path: Path, step: int
) -> None:
    train(tmp_path / "whole")

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            raise KilledError

    with pytest.raises(KilledError):
        train(tmp_path / "killed", report=kill)
    train(tmp_path / "killed")
    assert result(tmp_path / "killed") == result(tmp_path / "whole")

    done: list[int] = []
    train(
        tmp_path / "stopped",
        report=lambda event: done.append(event["step"]),
        should_stop=lambda: done[-1:] == [step],
    )
    assert done[-1] == step
    train(tmp_path / "stopped")
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")
