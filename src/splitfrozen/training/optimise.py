"""Gradients of a batch, and what an optimiser makes of them: for every method.

A batch goes through the model in micro-batches. Each micro-batch's summed loss is divided by the
number of targets in the whole batch, which is known beforehand, so the gradient is that of the mean
over the batch however it was split. Dropout draws once a micro-batch, so its masks depend on that.

Methods that train on devices have an optimiser for each of them and share one `Gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

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
    """A part of a model with a loss."""

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
        grad_norm: of all gradients of an optimiser together, before clipping; the largest of
            several optimisers'.
        lr: learning rate of the step.
        targets: number of targets in the batch.
    """

    loss: float
    grad_norm: float
    lr: float
    targets: int

    @classmethod
    def of(cls, results: Sequence[StepResult]) -> StepResult:
        """Several optimisers' results as that of one step."""
        targets = sum(result.targets for result in results)
        return cls(
            sum(result.loss * result.targets for result in results) / max(1, targets),
            max(result.grad_norm for result in results),
            results[0].lr,
            targets,
        )


class NotFiniteError(SplitFrozenError):
    """The loss or its gradient is not a number, and was not used."""

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


def targets_of(items: Sequence[HasTargets]) -> int:
    """Number of targets that carry a loss."""
    return sum(int((item.targets != IGNORED).sum()) for item in items)


class Optimiser:
    """AdamW with a schedule and clipping over some parameters."""

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], spec: TrainSpec, steps: int
    ) -> None:
        """Start with fresh moments.

        Args:
            parameters: what is trained, by name.
            spec: the optimisation.
            steps: of the whole training; the learning rate reaches 0 there.
        """
        self.parameters = dict(parameters)
        self._spec = spec
        self._steps = steps
        self._device = next(iter(self.parameters.values())).device
        self._adam = torch.optim.AdamW(
            self.parameters.values(), lr=spec.lr, weight_decay=spec.weight_decay
        )

    def step(self, step: int) -> tuple[float, float]:
        """Do step number `step`, counted from 0, along the gradients that the parameters have.

        Returns:
            The norm of all gradients together, before clipping, and the learning rate.

        Raises:
            NotFiniteError: a gradient is not; the parameters were not touched.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._spec.clip))
        if not math.isfinite(norm):
            raise _diverged(step, f"gradient norm {norm}")
        lr = learning_rate(step, self._steps, self._spec)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        return norm, lr

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters and moments by name; they belong to the optimiser, so copy or write them."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter
            # A parameter that no gradient has reached yet has no moments.
            for moment, value in self._adam.state.get(parameter, {}).items():
                tensors[f"{moment}.{name}"] = value
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave. Raises StoreError on any other names or shapes."""
        self._check(tensors)
        for name, parameter in self.parameters.items():
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
        shapes = {f"parameter.{name}": value.shape for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
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


class Gradients:
    """Computes gradients in micro-batches, in mixed precision, with care for memory.

    Attributes:
        micro_tokens: bound on the padded tokens of a micro-batch; halved when memory runs out.
    """

    def __init__(
        self,
        spec: TrainSpec,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        report: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        """Take what is common to all batches.

        Args:
            spec: gives `micro_tokens`.
            seed: of the run; dropout draws from it, the step and who computes.
            device: where the model is.
            dtype: what to compute in; parameters and gradients stay as they are.
            report: takes an event when memory runs out.
        """
        self.micro_tokens = spec.micro_tokens
        self.device = device
        self._seed = seed
        self._dtype = dtype
        self._report = report

    def of(
        self,
        part: Trainable[Item],
        parameters: Iterable[torch.nn.Parameter],
        items: Sequence[Item],
        step: int,
        *who: str,
    ) -> tuple[float, int]:
        """Leave the gradient of the batch's mean loss in `parameters`.

        Returns:
            The loss, and the number of targets that it is the mean over.

        Raises:
            NotFiniteError: the loss is not.
            SplitFrozenError: memory ran out with the smallest micro-batches too.
        """
        parameters = list(parameters)
        targets = targets_of(items)
        lengths = [part.length(item) for item in items]
        for _ in range(HALVINGS + 1):
            for parameter in parameters:
                parameter.grad = None
            groups = split(lengths, self.micro_tokens)
            micro_batches = [[items[i] for i in group] for group in groups]
            losses = self._accumulate(part, micro_batches, step, max(1, targets), who)
            if losses is not None:
                # Reading a number waits for the GPU, so all are read at once.
                loss = float(sum(torch.stack(losses).tolist()))
                if not math.isfinite(loss):
                    raise _diverged(step, f"loss {loss}")
                return loss, targets
            # Out here the exception is gone, and with it the tensors that its frames held.
            if self.device.type == "cuda":
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

    @contextmanager
    def drawing(self, step: int, *who: str) -> Iterator[None]:
        """Dropout in here depends on the step and on `who` computes."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(rng.derive(self._seed, "dropout", step, *who))
            yield

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision, for forward passes."""
        return autocast(self.device, self._dtype)

    @contextmanager
    def whole(self, step: int) -> Iterator[None]:
        """For passes whose graphs are all kept, so that smaller micro-batches would not help.

        Raises SplitFrozenError where memory runs out in here.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            raise SplitFrozenError(
                f"memory ran out at step {step + 1}",
                got="the batch of a device",
                allowed="batches that fit into memory with all that their gradient needs",
                remedy="lower train.batch_size or task.max_tokens; the run continues",
            ) from error

    def _accumulate(
        self,
        part: Trainable[Item],
        micro_batches: Sequence[Sequence[Item]],
        step: int,
        targets: int,
        who: tuple[str, ...],
    ) -> list[torch.Tensor] | None:
        """Return the micro-batches' shares of the loss, or None where memory ran out."""
        losses: list[torch.Tensor] = []
        try:
            with self.drawing(step, *who):
                for items in micro_batches:
                    with self.autocast():
                        loss = part.loss(items) / targets
                    loss.backward()  # type: ignore[no-untyped-call]
                    losses.append(loss.detach())
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            return None
        return losses


def _diverged(step: int, got: str) -> NotFiniteError:
    return NotFiniteError(
        f"training has diverged at step {step + 1}",
        got=got,
        allowed="finite numbers",
        remedy="lower train.lr; if the first steps fail, look for broken samples",
    )


def _out_of_memory(error: Exception) -> bool:
    # torch raises its own class for CUDA, and a bare RuntimeError where the CPU's allocator fails.
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in str(error).lower() for sign in signs
    )
