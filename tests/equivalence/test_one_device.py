"""One device equals none: SplitFrozen is plain PEFT training with blocks[:M] frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from splitfrozen.config import LoraSpec, TrainSpec
from splitfrozen.model import adapters
from splitfrozen.records import IGNORED
from splitfrozen.training.batching import FixedOrder
from splitfrozen.training.loop import Hooks, Job, fit

SAMPLES, CUT = 10, 2
LORA = LoraSpec(rank=4, alpha=8.0)
SPEC = TrainSpec(epochs=2, batch_size=4, lr=0.01, warmup=0.2, micro_tokens=30)


def plain_peft(model: Any, run: Any, start: dict[str, torch.Tensor]) -> tuple[list[float], Any]:
    """Train the whole model on token ids with torch and peft alone: the losses and the model."""
    kind, config = run.sliced.kind, run.peft_model.peft_config["default"]
    model = peft.get_peft_model(model.requires_grad_(False), config).eval()
    peft.set_peft_model_state_dict(model, start)
    trained = [value for value in model.parameters() if value.requires_grad]
    adam = torch.optim.AdamW(trained, lr=SPEC.lr, weight_decay=0.0)
    steps = math.ceil(SAMPLES / SPEC.batch_size)
    total = steps * SPEC.epochs
    schedule = get_linear_schedule_with_warmup(adam, math.ceil(SPEC.warmup * total), total)
    losses = []
    for epoch, index in product(range(SPEC.epochs), range(steps)):
        keys = FixedOrder(run.samples(), 0, SPEC.batch_size).batch(epoch, index)
        inputs = {
            name: torch.nn.utils.rnn.pad_sequence(
                [run.inputs[key.sample][name] for key in keys], True, float(name == "input_ids")
            )
            for name in run.sliced.inputs
        }
        labels = torch.tensor([int(run.targets[key.sample][0]) for key in keys])
        if kind == "causal_lm":
            # transformers shifts by itself: the label of a position is its own token. What the
            # first token predicts carries no loss.
            labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], IGNORED)
            labels[:, 1] = IGNORED
        loss = model(**inputs, labels=labels).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, SPEC.clip)
        adam.step()
        schedule.step()
        losses.append(loss.item())
    return losses, model


# peft asks transformers by a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_training_is_plain_peft_on_the_frozen_bottom_model(
    family: Any, tiny: Callable[..., Any], tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    run = tiny_run(family.id, samples=SAMPLES, lora=LORA, train=SPEC)
    start = adapters.state(run.peft_model)
    events: list[dict[str, Any]] = []
    order = FixedOrder(run.samples(), 0, SPEC.batch_size)
    job = Job(SPEC, 0, SAMPLES, torch.float32, tmp_path)
    fit(run.method, run, order, job, Hooks(events.append))

    expected, reference = plain_peft(tiny(family.id), run, start)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    trained, wanted = adapters.state(run.peft_model), adapters.state(reference)
    assert trained.keys() == wanted.keys() == start.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-5)
        assert (trained[name] - start[name]).abs().max() > 1e-3
        assert not any(f".{block}." in name for block in range(CUT))
