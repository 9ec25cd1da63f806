"""Training in one place: one optimiser, batches over the samples of all devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Generic

import torch

from splitfrozen.methods.parts import Adapted
from splitfrozen.records import SampleKey
from splitfrozen.training.optimise import Gradients, Item, Optimiser, StepResult, Trainable


class Pooled(Generic[Item]):
    """Centralised LoRA, and SplitFrozen's server, as `training.loop.Method`."""

    def __init__(
        self,
        part: Trainable[Item],
        adapted: Adapted,
        optimiser: Optimiser,
        gradients: Gradients,
    ) -> None:
        """Take what is trained: `part` of the `adapted` model."""
        self.gradients = gradients
        self._part = part
        self._adapted = adapted
        self._optimiser = optimiser

    def step(self, keys: Sequence[SampleKey], items: Sequence[Item], step: int) -> StepResult:
        assert len(keys) == len(items)
        parameters = self._optimiser.parameters.values()
        loss, targets = self.gradients.of(self._part, parameters, items, step)
        return StepResult(loss, *self._optimiser.step(step), targets)

    def state(self) -> dict[str, torch.Tensor]:
        return self._optimiser.state()

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self._optimiser.load_state(tensors)

    def save(self, folder: Path) -> None:
        self._adapted.save(folder)
