"""FedLoRA: LoRA on all blocks of a whole model on each device, averaged at the end of a round.

Devices train in parallel: a step holds a batch of each device that takes part, and devices with
more samples take part more often, as in FedAvg with local epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from splitfrozen.methods.bench import Bench, Built, Rounds, by_device
from splitfrozen.methods.parts import Adapted, Whole
from splitfrozen.methods.replicas import Replicas
from splitfrozen.records import SERVER, Sample, SampleKey
from splitfrozen.training.optimise import Gradients, StepResult
from splitfrozen.training.orders import DeviceOrder


def build(bench: Bench) -> Built:
    """Give every device adapters on all blocks. Raises ModelError."""
    config = bench.config
    adapted = bench.adapt(0)
    order = DeviceOrder(bench.samples, config.run.seed, config.train.batch_size)
    steps = order.steps_per_epoch
    replicas = Replicas(
        adapted.model,
        list(adapted.parameters()),
        bench.samples.devices,
        lambda parameters: bench.optimiser(parameters, steps),
        SERVER,
        bench.sent,
    )
    rounds = Rounds.of(config, steps)
    method = FedLora(adapted, replicas, rounds, bench.gradients())
    return Built(method, adapted, order, steps, rounds, "samples")


class FedLora:
    """As `training.loop.Method` over samples."""

    def __init__(
        self, adapted: Adapted, replicas: Replicas, rounds: Rounds, gradients: Gradients
    ) -> None:
        self.gradients = gradients
        self._adapted = adapted
        self._whole = Whole(adapted)
        self._replicas = replicas
        self._rounds = rounds

    def step(self, keys: Sequence[SampleKey], items: Sequence[Sample], step: int) -> StepResult:
        results = []
        for device, batch in by_device(keys, items).items():
            optimiser = self._replicas.enter(device, len(batch))
            loss, targets = self.gradients.of(
                self._whole, optimiser.parameters.values(), batch, step, device
            )
            results.append(StepResult(loss, *optimiser.step(step), targets))
        if self._rounds.ends(step):
            self._replicas.average()
        self._replicas.leave()
        return StepResult.of(results)

    def state(self) -> dict[str, torch.Tensor]:
        return self._replicas.state()

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self._replicas.load_state(tensors)

    def save(self, folder: Path) -> None:
        """Write the global adapter."""
        self._adapted.save(folder)
