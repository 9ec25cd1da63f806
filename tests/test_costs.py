"""model.costs: the formulas against counts of a real model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from splitfrozen.model import costs
from splitfrozen.model.blocks import SlicedModel


@pytest.mark.parametrize("id_", ["gpt2-causal_lm", "llama-causal_lm", "vit-image"])
def test_flops_are_those_of_the_maps(tiny: Callable[..., Any], id_: str) -> None:
    sliced = SlicedModel(tiny(id_))
    block = sliced.linear_maps(0, 1).values()
    weights = [
        module.weight.numel()
        for name, module in sliced.model.named_modules()
        if name in sliced.linear_maps(0, 1)
    ]
    assert costs.block_flops_per_token(block) == 2 * sum(weights)
    assert costs.front_flops_per_token([block, block]) == 4 * sum(weights)


def test_flops_are_what_torch_counts_for_one_token() -> None:
    maps = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 7))
    with FlopCounterMode(display=False) as counter:
        maps(torch.zeros(1, 32))
    assert costs.block_flops_per_token([(32, 48), (48, 7)]) == counter.get_total_flops()


def test_memory_grows_with_weights_and_width() -> None:
    least = costs.front_memory_bytes(1000, (32, 48))
    assert costs.front_memory_bytes(2000, (32, 48)) == least + 1000
    assert costs.front_memory_bytes(1000, (64, 48)) > least > costs.RUNTIME_BYTES
