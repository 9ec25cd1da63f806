"""One optimiser step over one batch, for every method.

The batch goes through the model in micro-batches. Each micro-batch's summed loss is divided by the
number of targets in the whole batch, which is known beforehand, so the gradient is that of the mean
over the batch however it was split. Dropout draws once a micro-batch, so its masks depend on that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from splitfrozen import rng
from splitfrozen.config import TrainSpec
from splitfrozen.errors import SplitFrozenError, StoreError
from splitfrozen.records import IGNORED, Ints
from splitfrozen.training.batching import split
from splitfrozen.training.precision import autocast

HALVINGS = 3
"""How often one step may halve its micro-batches before memory counts as too small."""

_NAMED = 8
"""Samples that a message names."""

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class HasTargets(Protocol):
    """What a batch is made of: an Activation, or a Sample for methods that train the whole model.

    `targets` is as in `records.Sample`.
    """

    @property
    def targets(self) -> Ints: ...


Item = TypeVar("Item", bound=HasTargets)
ItemIn = TypeVar("ItemIn", bound=HasTargets, contravariant=True)


class Trainable(Protocol[ItemIn]):
    """What an optimiser step needs of a method."""

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name; the same on every call."""
        ...

    def length(self, item: ItemIn) -> int:
        """Tokens that the item takes in a batch."""
        ...

    def loss(self, items: Sequence[ItemIn]) -> torch.Tensor:
        """Scalar with a gradient: the loss summed over all targets of `items`, dropout on."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean over the targets, before the update.
        grad_norm: of all gradients together, before clipping.
        lr: learning rate of the step.
        targets: number of targets in the batch.
    """

    loss: float
    grad_norm: float
    lr: float
    targets: int


class NotFiniteError(SplitFrozenError):
    """The loss or its gradient is not a number; the parameters were left as they were."""

    def naming(self, samples: Sequence[str]) -> NotFiniteError:
        """Return the same error, with the samples of the batch in it."""
        named = ", ".join(samples[:_NAMED]) + (", ..." if len(samples) > _NAMED else "")
        return NotFiniteError(
            f"{self.what} on {len(samples)} samples ({named})",
            got=self.got,
            allowed=self.allowed,
            remedy=self.remedy,
        )


def learning_rate(step: int, steps: int, spec: TrainSpec) -> float:
    """Linear warm-up from 0, then linear decay to 0 at `steps`; `step` counts from 0.

    The values are those of `transformers.get_linear_schedule_with_warmup`.
    """
    warmup = math.ceil(spec.warmup * steps)
    if step < warmup:
        return spec.lr * step / warmup
    return spec.lr * max(0, steps - step) / max(1, steps - warmup)


class Optimiser(Generic[Item]):
    """AdamW with a schedule, clipping, accumulation, mixed precision and care for memory.

    Attributes:
        micro_tokens: bound on the padded tokens of a micro-batch; halved when memory runs out.
    """

    def __init__(
        self,
        method: Trainable[Item],
        spec: TrainSpec,
        *,
        steps: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        report: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        """Start with fresh moments.

        Args:
            method: what is trained.
            spec: the optimisation.
            steps: of the whole training; the learning rate reaches 0 there.
            seed: of the run; dropout draws from (seed, step).
            dtype: what to compute in; parameters and moments stay as they are.
            report: takes an event when memory runs out.
        """
        self.micro_tokens = spec.micro_tokens
        self._method = method
        self._spec = spec
        self._steps = steps
        self._seed = seed
        self._dtype = dtype
        self._report = report
        self._parameters = method.parameters()
        self._device = next(iter(self._parameters.values())).device
        self._adam = torch.optim.AdamW(
            self._parameters.values(), lr=spec.lr, weight_decay=spec.weight_decay
        )

    def step(self, items: Sequence[Item], step: int) -> StepResult:
        """Do step number `step`, counted from 0, over a batch.

        Raises:
            NotFiniteError: the loss or a gradient is; the parameters were not touched.
            SplitFrozenError: memory ran out with the smallest micro-batches too.
        """
        targets = sum(int((item.targets != IGNORED).sum()) for item in items)
        loss = self._gradients(items, step, targets)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._spec.clip))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise NotFiniteError(
                f"training has diverged at step {step + 1}",
                got=f"loss {loss}, gradient norm {norm}",
                allowed="finite numbers",
                remedy="lower train.lr; if the first steps fail, look for broken samples",
            )
        lr = learning_rate(step, self._steps, self._spec)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        return StepResult(loss, norm, lr, targets)

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and moments by name; they belong to the optimiser, so copy or write them."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"parameter.{name}"] = parameter
            # A parameter that no gradient has reached yet has no moments.
            for moment, value in self._adam.state.get(parameter, {}).items():
                tensors[f"{moment}.{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave. Raises StoreError on any other names or shapes."""
        self._check(tensors)
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter.{name}"])
            if f"step.{name}" in tensors:
                # AdamW keeps its step counters on the CPU, its moments beside the parameter.
                self._adam.state[parameter] = {
                    "step": tensors[f"step.{name}"].clone(),
                    "exp_avg": tensors[f"exp_avg.{name}"].to(self._device, copy=True),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(self._device, copy=True),
                }

    def _check(self, tensors: dict[str, torch.Tensor]) -> None:
        shapes = {f"parameter.{name}": value.shape for name, value in self._parameters.items()}
        for name, value in self._parameters.items():
            present = [moment for moment in _MOMENTS if f"{moment}.{name}" in tensors]
            for moment in _MOMENTS if present else ():
                shapes[f"{moment}.{name}"] = torch.Size() if moment == "step" else value.shape
        wrong = sorted(
            name
            for name in shapes.keys() | tensors.keys()
            if name not in tensors or tensors[name].shape != shapes.get(name)
        )
        if wrong:
            raise StoreError(
                "the checkpoint does not fit the adapters",
                got=", ".join(wrong),
                allowed="the names and shapes of this run's adapters and of AdamW's moments",
                remedy="continue with the model and [lora] that the run began with",
            )

    def _gradients(self, items: Sequence[Item], step: int, targets: int) -> float:
        """Leave the batch's gradient in the parameters and return its loss."""
        lengths = [self._method.length(item) for item in items]
        for _ in range(HALVINGS + 1):
            groups = split(lengths, self.micro_tokens)
            loss = self._accumulate([[items[i] for i in group] for group in groups], step, targets)
            if loss is not None:
                return loss
            # Out here the exception is gone, and with it the tensors that its frames held.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            largest = max(len(group) * lengths[group[0]] for group in groups)
            self.micro_tokens = max(1, min(largest, self.micro_tokens) // 2)
            self._report(
                {"event": "out_of_memory", "step": step, "micro_tokens": self.micro_tokens}
            )
        raise SplitFrozenError(
            f"memory ran out at step {step + 1}",
            got=f"{HALVINGS + 1} failures, the last with {largest} padded tokens at once",
            allowed="micro-batches that fit into memory",
            remedy="lower train.micro_tokens or task.max_tokens, or free memory; the run continues",
        )

    def _accumulate(
        self, micro_batches: Sequence[Sequence[Item]], step: int, targets: int
    ) -> float | None:
        """Return the batch's loss, or None where memory ran out."""
        self._adam.zero_grad()
        losses: list[torch.Tensor] = []
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(rng.derive(self._seed, "dropout", step))
                for items in micro_batches:
                    with autocast(self._device, self._dtype):
                        loss = self._method.loss(items) / max(1, targets)
                    loss.backward()  # type: ignore[no-untyped-call]
                    losses.append(loss.detach())
            # Reading a number waits for the GPU, so all are read at once.
            return float(sum(torch.stack(losses).tolist()))
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            return None


def _out_of_memory(error: Exception) -> bool:
    # torch raises its own class for CUDA, and a bare RuntimeError where the CPU's allocator fails.
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in str(error).lower() for sign in signs
    )
