"""Limit cases: with one device and nothing lost on the way, the methods are one method.

Each side of a two-way method clips by its own gradient, so clipping is out of reach here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from splitfrozen import rng
from splitfrozen.config import (
    Config,
    DevicesSpec,
    LoraSpec,
    MethodSpec,
    ModelSpec,
    RunSpec,
    TaskConfig,
    TrainSpec,
    WireSpec,
)
from splitfrozen.data.samples import SampleSource
from splitfrozen.methods.bench import Bench
from splitfrozen.methods.table import build
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import IGNORED, Sample
from splitfrozen.training.batching import FixedOrder
from splitfrozen.training.loop import Hooks, Job, fit
from splitfrozen.wire.codec import codec

TRAIN = TrainSpec(epochs=2, batch_size=4, lr=0.01, warmup=0.2, clip=1e9, micro_tokens=30)
FAMILIES = ["gpt2-classification", "bert-classification", "llama-causal_lm", "gemma2-causal_lm"]
ALONE = [
    MethodSpec("centralized"),
    MethodSpec("fedlora"),
    MethodSpec("fedlora", local_steps=2),
    MethodSpec("splitlora"),
    MethodSpec("splitlora", server="per_device"),
    MethodSpec("sft"),
    MethodSpec("fedsllm", local_steps=2),
]


def samples(count: int, device: int, kind: str) -> list[Sample]:
    found = []
    for number in range(count):
        draw = rng.stream(0, "limit", device, number)
        tokens = draw.integers(4, 60, int(draw.integers(3, 12))).astype(np.int32)
        label = np.array([int(draw.integers(3))], np.int32)
        shifted = np.append(tokens[1:], IGNORED).astype(np.int32)
        targets = shifted if kind == "causal_lm" else label
        found.append(Sample(number, tokens, None, None, targets, len(tokens)))
    return found


def trained(
    model: Any, method: MethodSpec, sizes: list[int], folder: Path, cut: int = 1
) -> tuple[list[float], dict[str, torch.Tensor], SampleSource]:
    """Train; return the losses, the adapter and the data."""
    sliced = SlicedModel(model)
    source = SampleSource(
        {f"device-{i:02}": samples(size, i, sliced.kind) for i, size in enumerate(sizes)}
    )
    config = Config(
        ModelSpec("tiny", cut, precision="float32"),
        TaskConfig(labels=tuple("abc")),
        DevicesSpec(len(sizes)),
        RunSpec(str(folder)),
        LoraSpec(rank=4, alpha=8.0),
        TRAIN,
        WireSpec("float32", "none"),
        method=method,
    )
    built = build(Bench(sliced, config, source.samples(), torch.float32, lambda: codec("float32")))
    events: list[dict[str, Any]] = []
    job = Job(TRAIN, 0, sum(sizes), torch.float32, folder)
    fit(built.method, source, built.order, job, Hooks(events.append))
    losses = [event["loss"] for event in events if event["event"] == "step"]
    return losses, adapters.state(built.adapted.model), source


def plain_lora(model: Any, source: SampleSource) -> tuple[list[float], dict[str, torch.Tensor]]:
    """LoRA on the whole model with torch, transformers and peft alone."""
    sliced = SlicedModel(model)
    start = adapters.attach(sliced, LoraSpec(rank=4, alpha=8.0), 0, 0)
    model = start.eval()
    weights = [value for value in model.parameters() if value.requires_grad]
    adam = torch.optim.AdamW(weights, lr=TRAIN.lr, weight_decay=0.0)
    table = source.samples()
    steps = -(-len(table) // TRAIN.batch_size)
    schedule = get_linear_schedule_with_warmup(
        adam, int(np.ceil(TRAIN.warmup * steps * TRAIN.epochs)), steps * TRAIN.epochs
    )
    losses = []
    for epoch, index in product(range(TRAIN.epochs), range(steps)):
        batch = source.read(FixedOrder(table, 0, TRAIN.batch_size).batch(epoch, index))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([torch.from_numpy(s.tokens.astype(np.int64)) for s in batch], True)
        mask = pad([torch.ones(s.length, dtype=torch.int64) for s in batch], True)
        if sliced.kind == "causal_lm":
            labels = torch.where(mask == 1, ids, IGNORED)
        else:
            ids = torch.where(mask == 1, ids, model.config.pad_token_id)
            labels = torch.tensor([int(s.targets[0]) for s in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        losses.append(loss.item())
    return losses, peft.get_peft_model_state_dict(model, save_embedding_layers=False)


@pytest.mark.parametrize("method", ALONE, ids=lambda m: f"{m.name}-{m.server}-{m.local_steps}")
@pytest.mark.parametrize("family", FAMILIES)
def test_with_one_device_every_method_is_plain_lora(
    family: str, method: MethodSpec, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    losses, adapter, source = trained(tiny(family), method, [10], tmp_path)
    expected, reference = plain_lora(tiny(family), source)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert adapter.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(adapter[name], value, rtol=1e-4, atol=1e-5)
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_an_exact_codec_sft_is_splitlora_with_a_copy_for_each_device(
    family: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = [10, 3, 7]
    sft = trained(tiny(family), MethodSpec("sft"), sizes, tmp_path / "sft")
    per_device = MethodSpec("splitlora", server="per_device")
    split = trained(tiny(family), per_device, sizes, tmp_path / "split")
    shared = trained(tiny(family), MethodSpec("splitlora"), sizes, tmp_path / "shared")
    assert sft[0] == split[0]
    assert all(torch.equal(value, split[1][name]) for name, value in sft[1].items())
    assert shared[0] != split[0]


@pytest.mark.parametrize("cut", [1, 2])
def test_a_copy_for_each_device_on_both_sides_is_fedlora_wherever_it_is_cut(
    cut: int, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = [10, 3, 7]
    model = "llama-causal_lm"
    whole = trained(tiny(model), MethodSpec("fedlora"), sizes, tmp_path / "whole")
    split = trained(tiny(model), MethodSpec("sft"), sizes, tmp_path / "split", cut)
    torch.testing.assert_close(whole[0], split[0], rtol=1e-5, atol=1e-5)
    for name, value in whole[1].items():
        torch.testing.assert_close(split[1][name], value, rtol=1e-4, atol=1e-5)
