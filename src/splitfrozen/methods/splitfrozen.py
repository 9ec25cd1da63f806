"""SplitFrozen: LoRA on blocks[M:L], trained from stored activations at the cut.

Of all dropout only LoRA's own is active, as `lora.dropout` says: the blocks below the cut ran
without, on the devices, and those above are frozen too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn import functional

from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import IGNORED, Activation
from splitfrozen.training.batching import collate


class SplitFrozen:
    """The method as `training.loop.Method` and `training.evaluate.Predictor` over activations."""

    def __init__(self, sliced: SlicedModel, peft_model: PeftModel, cut: int, base: str) -> None:
        """Take a model and the adapters that `adapters.attach` put into it.

        Args:
            sliced: the model; where it is, training runs.
            peft_model: what `attach` returned.
            cut: M.
            base: name of the base model, for the saved adapter.
        """
        self._sliced = sliced
        self._peft_model = peft_model
        self._cut = cut
        self._base = base
        peft_model.eval()
        self._dropouts = [
            module
            for name, module in peft_model.named_modules()
            if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
        ]

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return adapters.trainable(self._peft_model)

    def length(self, item: Activation) -> int:
        return len(item.hidden)

    def loss(self, items: Sequence[Activation]) -> torch.Tensor:
        """Cross-entropy summed over the targets, with dropout."""
        logits, targets = self._forward(items, dropout=True)
        return functional.cross_entropy(logits.float(), targets, reduction="sum")

    def logits(self, items: Sequence[Activation]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [K, C or V] and int64 [K] for the K targets of `items`."""
        return self._forward(items, dropout=False)

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter."""
        adapters.save(self._peft_model, folder, self._base)

    def _forward(
        self, items: Sequence[Activation], *, dropout: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for module in self._dropouts:
            module.train(dropout)
        batch = collate(items).to(self._sliced.model.device)
        if self._sliced.kind != "causal_lm":
            logits = self._sliced.logits(batch.hidden, batch.lengths, self._cut)
            return logits, batch.targets[:, 0]
        # The vocabulary is the widest map of the model, so only positions with a loss reach it.
        wanted = batch.targets != IGNORED
        positions = wanted.any(0).nonzero()[:, 0]
        logits = self._sliced.logits(batch.hidden, batch.lengths, self._cut, positions)
        return logits[wanted[:, positions]], batch.targets[wanted]
