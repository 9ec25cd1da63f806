"""The method: which parts of the model are in training mode, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from splitfrozen.config import LoraSpec
from splitfrozen.methods.splitfrozen import SplitFrozen
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import Activation

CUT = 2


class Watched(torch.nn.Identity):
    """Counts how often the whole tree of modules is switched."""

    switched = 0

    def train(self, mode: bool = True) -> Watched:
        self.switched += 1
        return super().train(mode)


def test_only_loras_dropout_is_switched_on(tiny: Callable[..., Any]) -> None:
    sliced = SlicedModel(tiny("gpt2-classification", attn_pdrop=0.5, resid_pdrop=0.5))
    peft_model = adapters.attach(sliced, LoraSpec(dropout=0.5), CUT, 0)
    peft_model.train()
    method = SplitFrozen(sliced, peft_model, CUT, "tiny")
    peft_model.add_module("watched", watched := Watched())
    hidden = np.random.default_rng(0).standard_normal((7, sliced.width), "f4")
    items = [Activation(0, CUT, hidden, np.array([1], np.int32))]
    for parameter in method.parameters().values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    losses = {float(method.loss(items).detach()) for _ in range(3)}
    modules = dict(peft_model.named_modules())
    on = {name for name, module in modules.items() if module.training} - {"watched"}
    assert on
    assert all("lora_dropout" in name for name in on)
    assert len(losses) == 3
    answers = {float(method.logits(items)[0].detach()[0, 0]) for _ in range(3)}
    assert len(answers) == 1
    # A walk over all modules takes longer than the step of a small model.
    assert watched.switched == 0
