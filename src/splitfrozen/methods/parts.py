"""The parts of an adapted model that methods run: below a cut, above it, or whole.

Of all dropout only LoRA's own is active, as `lora.dropout` says: frozen parts run without.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn import functional

from splitfrozen.data.inputs import model_inputs
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import IGNORED, Activation, Sample
from splitfrozen.training.batching import MicroBatch, collate, pad_targets


class Adapted:
    """A sliced model with LoRA in it.

    Attributes:
        sliced: where it is, training runs.
        model: what `adapters.attach` or `adapters.open_adapter` returned.
    """

    def __init__(self, sliced: SlicedModel, model: PeftModel, base: str) -> None:
        """`base`: name of the base model, for the saved adapter."""
        self.sliced = sliced
        self.model = model
        self._base = base
        model.eval()
        self._dropouts = [
            module
            for name, module in model.named_modules()
            if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
        ]

    @property
    def device(self) -> torch.device:
        return torch.device(self.sliced.model.device)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What training changes, by name: LoRA and the head."""
        return adapters.trainable(self.model)

    def drop(self, active: bool) -> None:
        """Switch LoRA's dropout."""
        for module in self._dropouts:
            module.train(active)

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter."""
        adapters.save(self.model, folder, self._base)

    def answers(
        self, hidden: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, depth: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [K, C or V] and int64 [K] for the K targets, of activations of `depth`.

        Args:
            hidden: [B, T, D]; lengths: int64 [B]; targets: int64 [B, 1] or [B, T].
        """
        if self.sliced.kind != "causal_lm":
            return self.sliced.logits(hidden, lengths, depth), targets[:, 0]
        # The vocabulary is the widest map of the model, so only positions with a loss reach it.
        wanted = targets != IGNORED
        positions = wanted.any(0).nonzero()[:, 0]
        logits = self.sliced.logits(hidden, lengths, depth, positions)
        return logits[wanted[:, positions]], targets[wanted]


def _summed(answers: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    logits, targets = answers
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


class Upper:
    """blocks[M:L] and the head, over activations at the cut."""

    def __init__(self, adapted: Adapted, cut: int) -> None:
        self._adapted = adapted
        self._cut = cut

    def length(self, item: Activation) -> int:
        return len(item.hidden)

    def loss(self, items: Sequence[Activation]) -> torch.Tensor:
        """Cross-entropy summed over the targets, with dropout."""
        return _summed(self._answers(collate(items), dropout=True))

    def loss_and_input(self, items: Sequence[Activation]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the input [B, T, D], which gets a gradient as well."""
        batch = collate(items)
        batch.hidden.requires_grad_(True)
        return _summed(self._answers(batch, dropout=True)), batch.hidden

    def logits(self, items: Sequence[Activation]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [K, C or V] and int64 [K] for the K targets of `items`."""
        return self._answers(collate(items), dropout=False)

    def _answers(self, batch: MicroBatch, *, dropout: bool) -> tuple[torch.Tensor, torch.Tensor]:
        self._adapted.drop(dropout)
        batch = batch.to(self._adapted.device)
        return self._adapted.answers(batch.hidden, batch.lengths, batch.targets, self._cut)


class Lower:
    """Embedding and blocks[:depth], over samples."""

    def __init__(self, adapted: Adapted, depth: int) -> None:
        self._adapted = adapted
        self._front = adapted.sliced.front(depth)

    def length(self, item: Sample) -> int:
        return item.length

    def hidden(self, items: Sequence[Sample], *, dropout: bool) -> torch.Tensor:
        """[B, T, D], padded on the right with arbitrary values."""
        self._adapted.drop(dropout)
        arrays = model_inputs(items, self._adapted.sliced.inputs)
        inputs = [torch.from_numpy(array).to(self._adapted.device) for array in arrays]
        hidden: torch.Tensor = self._front(*inputs)
        return hidden


class Whole:
    """The whole model, over samples."""

    def __init__(self, adapted: Adapted) -> None:
        self._adapted = adapted
        self._lower = Lower(adapted, 1)

    def length(self, item: Sample) -> int:
        return item.length

    def loss(self, items: Sequence[Sample]) -> torch.Tensor:
        """Cross-entropy summed over the targets, with dropout."""
        return _summed(self._answers(items, dropout=True))

    def logits(self, items: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [K, C or V] and int64 [K] for the K targets of `items`."""
        return self._answers(items, dropout=False)

    def _answers(
        self, items: Sequence[Sample], *, dropout: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self._lower.hidden(items, dropout=dropout)
        lengths = torch.tensor([item.length for item in items], device=self._adapted.device)
        targets = pad_targets([item.targets for item in items]).to(self._adapted.device)
        return self._adapted.answers(hidden, lengths, targets, 1)
