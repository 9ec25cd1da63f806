"""What methods are built from, and what building gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from splitfrozen.config import Config
from splitfrozen.methods.parts import Adapted
from splitfrozen.methods.replicas import Sent, to_nobody
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import Codec, SampleKey, SampleTable
from splitfrozen.training.batching import Order
from splitfrozen.training.loop import Method
from splitfrozen.training.optimise import Gradients, Optimiser

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, its samples, and where to report.

    Attributes:
        sliced: the model, where training runs; building puts LoRA into it.
        config: of the run.
        samples: all of them, of all devices, sorted by key.
        dtype: what to compute in.
        codec: opens the codec of activations at the cut, where these travel in every step.
        report: takes events of the training, as in `training.loop.Hooks`.
        sent: is told of all that crosses the network.
    """

    sliced: SlicedModel
    config: Config
    samples: SampleTable
    dtype: torch.dtype
    codec: Callable[[], Codec]
    report: Callable[[dict[str, Any]], None] = lambda _: None
    sent: Sent = to_nobody

    def adapt(self, cut: int) -> Adapted:
        """Put LoRA on blocks[cut:L]. Raises ModelError."""
        config = self.config
        model = adapters.attach(self.sliced, config.lora, cut, config.run.seed)
        return Adapted(self.sliced, model, config.model.name)

    def gradients(self) -> Gradients:
        return Gradients(
            self.config.train,
            seed=self.config.run.seed,
            device=torch.device(self.sliced.model.device),
            dtype=self.dtype,
            report=self.report,
        )

    def optimiser(
        self, parameters: Mapping[str, torch.nn.Parameter], steps_per_epoch: int
    ) -> Optimiser:
        """One for these parameters, with fresh moments."""
        steps = steps_per_epoch * self.config.train.epochs
        return Optimiser(parameters, self.config.train, steps)


@dataclass(frozen=True, slots=True)
class Rounds:
    """When a round ends, and devices' adapters are averaged.

    A round is `local_epochs` epochs, or `local_steps` steps; the end of an epoch ends a round of
    steps, and the end of the training ends any.
    """

    steps_per_epoch: int
    epochs: int
    local_epochs: int
    local_steps: int | None

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int) -> Rounds:
        """As the config has it."""
        method = config.method
        return cls(steps_per_epoch, config.train.epochs, method.local_epochs, method.local_steps)

    def ends(self, step: int) -> bool:
        """Whether step number `step`, counted from 0 over all epochs, is the last of a round."""
        epoch, index = divmod(step, self.steps_per_epoch)
        last = index + 1 == self.steps_per_epoch
        if self.local_steps is not None:
            return last or (index + 1) % self.local_steps == 0
        return last and ((epoch + 1) % self.local_epochs == 0 or epoch + 1 == self.epochs)


@dataclass(frozen=True, slots=True)
class Built:
    """A method that is ready to train.

    Attributes:
        method: for `training.loop.fit`.
        adapted: the model that it trains, for evaluation.
        order: which samples each step takes.
        steps_per_epoch: the same in every epoch.
        rounds: when devices' adapters are averaged; None for methods that have none.
        trains_on: "activations" at the cut of frozen blocks, or "samples".
    """

    method: Method[Any]
    adapted: Adapted
    order: Order
    steps_per_epoch: int
    rounds: Rounds | None
    trains_on: Literal["samples", "activations"]


def by_device(keys: Sequence[SampleKey], items: Sequence[_T]) -> dict[str, list[_T]]:
    """The items of each device, devices sorted, items in their order."""
    found: dict[str, list[_T]] = {key.device: [] for key in sorted(keys)}
    for key, item in zip(keys, items, strict=True):
        found[key.device].append(item)
    return found
