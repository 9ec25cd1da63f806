"""How much work the stages of a schedule are: FLOP and values by load, counted once each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from splitfrozen.model import costs
from splitfrozen.model.costs import ModelShape, Tokens

Counting = Literal["exact", "paper"]
""" "exact": multiply-adds, as a profiler counts them; frozen maps have no W. "paper": as Table II
counts: training is 3 forward passes with LoRA (B and W one each), and operations on single values
count, too."""

KNOWN = 4096
"""Loads whose costs are remembered: there are few, and they come often."""


@dataclass(frozen=True, slots=True)
class Passes:
    """FLOP of training: forward, gradients of activations (B) and of weights (W)."""

    forward: float
    b: float
    w: float


class Work:
    """What blocks of a model cost with LoRA of a rank.

    Attributes:
        frozen: FLOP of a forward pass through blocks without LoRA.
        passes: FLOP of training blocks with LoRA.
        values: values of the activations at a cut.
    """

    def __init__(self, shape: ModelShape, rank: int, counting: Counting) -> None:
        self._shape, self._rank, self._counting = shape, rank, counting
        self.frozen = lru_cache(KNOWN)(self._frozen)
        self.passes = lru_cache(KNOWN)(self._passes)
        self.values = lru_cache(KNOWN)(self._values)

    def adapter(self, blocks: int, *, last: bool) -> int:
        """Trained parameters of blocks, with the head where they are the last."""
        head = costs.head_parameters(self._shape) if last else 0
        return costs.adapter_parameters(self._shape, blocks, self._rank) + head

    def _frozen(self, blocks: int, load: Tokens, *, first: bool) -> float:
        """`first`: they are the model's first, and what is before them counts, too."""
        before = costs.embedding_flops(self._shape, load) if first else 0.0
        return before + self._forward(blocks, load, 0)

    def _passes(
        self,
        blocks: int,
        load: Tokens,
        *,
        first: bool,
        head: Tokens | None,
        sends_back: bool = False,
    ) -> Passes:
        """`first`: they are the model's first, with what is before them. `head`: they are the last,
        and this reaches the head. `sends_back`: the gradient of what enters them is wanted."""
        shape = self._shape
        forward = self._forward(blocks, load, self._rank)
        forward += costs.embedding_flops(shape, load) if first else 0.0
        forward += costs.head_flops(shape, head) if head else 0.0
        if self._counting == "paper":
            return Passes(forward, forward, (costs.PAPER_TRAINING - 2) * forward)
        b, w = costs.backward_flops(shape, blocks, load, self._rank, input_gradient=sends_back)
        if head:
            head_b, head_w = costs.head_backward_flops(shape, head)
            b, w = b + head_b, w + head_w
        return Passes(forward, b, w)

    def _forward(self, blocks: int, load: Tokens, rank: int) -> float:
        flops = costs.forward_flops(self._shape, blocks, load, rank)
        if self._counting == "paper":
            flops += costs.elementwise_flops(self._shape, blocks, load)
        return flops

    def _values(self, load: Tokens) -> float:
        return costs.activation_values(self._shape, load)
