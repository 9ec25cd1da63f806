"""A tiny run for the equivalence tests: samples, their activations at the cut, the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from splitfrozen import rng
from splitfrozen.config import LoraSpec, TrainSpec
from splitfrozen.methods.parts import Adapted, Upper
from splitfrozen.methods.pooled import Pooled
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import IGNORED, Activation, Floats, Ints, SampleKey, SampleTable
from splitfrozen.training.optimise import Gradients, Optimiser
from splitfrozen.wire.codec import codec

DEPTH, CUT, CLASSES = 1, 2, 3
USUAL = TrainSpec()


class TinyRun:
    """One device whose samples were computed, coded without loss, sent and lifted.

    It is an ActivationSource too. Prompts of causal_lm samples carry no loss.

    Attributes:
        inputs: of each sample: int64 [T] by name, or the pixels of an image.
        targets: of each sample, as in `records.Sample`.
        part: what is trained and evaluated.
        method: what trains it.
    """

    def __init__(
        self,
        model: Any,
        *,
        samples: int,
        lora: LoraSpec,
        train: TrainSpec = USUAL,
        seed: int = 0,
    ) -> None:
        self.sliced = SlicedModel(model)
        self.inputs: list[dict[str, torch.Tensor]] = []
        self.targets: list[Ints] = []
        self.activations: list[Activation] = []
        for id_ in range(samples):
            draw = rng.stream(0, "sample", id_)
            inputs = self.sliced.example([int(draw.integers(3, 12))], seed=id_)
            hidden = self._depth_cut(inputs)
            self.inputs.append(dict(zip(self.sliced.inputs, (x[0] for x in inputs), strict=True)))
            self.targets.append(self._targets(inputs[0][0], int(draw.integers(CLASSES))))
            self.activations.append(Activation(id_, CUT, hidden, self.targets[-1]))
        self.peft_model = adapters.attach(self.sliced, lora, CUT, seed)
        self.adapted = Adapted(self.sliced, self.peft_model, "tiny")
        self.part = Upper(self.adapted, CUT)
        self.method = self._method(train, seed)

    def _method(self, spec: TrainSpec, seed: int) -> Pooled[Activation]:
        steps = math.ceil(len(self.activations) / spec.batch_size) * spec.epochs
        optimiser = Optimiser(self.adapted.parameters(), spec, steps)
        gradients = Gradients(spec, seed=seed, device=torch.device("cpu"))
        return Pooled(self.part, self.adapted, optimiser, gradients)

    def _depth_cut(self, inputs: Sequence[torch.Tensor]) -> Floats:
        with torch.no_grad():
            hidden = self.sliced.front(DEPTH)(*inputs)[0]
            sent = codec("float32").encode(hidden.numpy())
            received = torch.from_numpy(codec("float32").decode(sent, *hidden.shape).copy())
            lifted = self.sliced.lift(received[None], torch.tensor([len(received)]), DEPTH, CUT)
        return lifted[0].numpy()

    def _targets(self, tokens: torch.Tensor, label: int) -> Ints:
        if self.sliced.kind != "causal_lm":
            return np.array([label], np.int32)
        targets = np.append(tokens[1:].numpy(), IGNORED).astype(np.int32)
        targets[0] = IGNORED
        return targets

    def samples(self) -> SampleTable:
        count = len(self.activations)
        zeros = np.zeros(count, np.int32)
        lengths = np.array([len(a.hidden) for a in self.activations], np.int32)
        ids = np.arange(count, dtype=np.int32)
        return SampleTable(("only",), zeros, ids, lengths, zeros + CUT, zeros)

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        return [self.activations[key.sample] for key in keys]


@pytest.fixture
def tiny_run(tiny: Callable[..., Any]) -> Callable[..., TinyRun]:
    """`tiny_run("gpt2-causal_lm", samples=9, lora=LoraSpec())` makes one."""

    def make(id_: str, **options: Any) -> TinyRun:
        return TinyRun(tiny(id_), **options)

    return make
