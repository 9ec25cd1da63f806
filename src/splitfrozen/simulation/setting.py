"""What a schedule is made of: steps and devices' shares in them, sizes on the wire, the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from splitfrozen.model.costs import ModelShape, Tokens
from splitfrozen.simulation.pipeline import Schedule
from splitfrozen.simulation.work import Counting, Work

Phase = Literal["activations", "gradients", "adapter"]

AHEAD = 3
"""Steps that a device of SplitFrozen may be ahead of the server: one for each stage of the pipeline
(device, link, server). More gains nothing where steps are alike, as a step's way through the three
stages takes at most three times the slowest of them; less lets a stage run dry. The bound is there
because who runs ahead keeps activations in memory that nobody has used."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one device contributes to a step.

    Attributes:
        device: its id.
        load: its batch.
        predicted: what of it reaches the head, where that is less: the tokens with a loss.
    """

    device: str
    load: Tokens
    predicted: Tokens | None = None

    @property
    def head(self) -> Tokens:
        return self.load if self.predicted is None else self.predicted


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step.

    Attributes:
        number: 0, 1, 2 ...
        shares: of the devices that take part, each once.
        ends_round: devices' adapters are averaged after it.
        stored: the server has these samples' activations at the cut from an epoch before
            (`reuse = "once"`), so SplitFrozen's devices do nothing.
    """

    number: int
    shares: tuple[Share, ...]
    ends_round: bool = False
    stored: bool = False


@dataclass(frozen=True, slots=True)
class Wire:
    """Bytes a value takes on the way.

    Attributes:
        activations: of what goes up.
        gradients: of what comes back.
        adapters: of adapters, either way.
        measured: bytes by (phase, device, step), where they were measured; these count instead.
    """

    activations: float = 4.0
    gradients: float = 4.0
    adapters: float = 4.0
    measured: Mapping[tuple[Phase, str, int], float] = field(default_factory=dict)

    def size(self, phase: Phase, device: str, step: int, values: float) -> float:
        """Bytes of so many values from or to a device."""
        if self.measured and (phase, device, step) in self.measured:
            return self.measured[phase, device, step]
        a_value = {
            "activations": self.activations,
            "gradients": self.gradients,
            "adapter": self.adapters,
        }
        return values * a_value[phase]


@dataclass(frozen=True, slots=True)
class Stages:
    """A server of several machines, "server/0" for the lowest blocks and so on.

    Attributes:
        count: p; the blocks that are trained are divided equally, in parts of blocks if need be.
        micro_batches: equal parts of a batch.
        schedule: how their passes are interleaved; see `pipeline`.
    """

    count: int
    micro_batches: int
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Setting:
    """What a schedule depends on besides its steps.

    Attributes:
        shape: of the model.
        rank: of LoRA.
        cut: M of SplitFrozen; blocks that a device trains in the two-way methods.
        depths: n of SplitFrozen's devices; the cut for those not named.
        counting: of FLOP; see `work.Counting`.
        wire: bytes a value.
        server: SplitLoRA's server trains one model, devices in turn ("shared"), or a copy for each.
        ahead: steps that SplitFrozen's devices may be ahead; None where the server stores what
            comes, so that nothing bounds them.
        stages: of the server where it trains by itself (centralized, splitfrozen); None for one
            machine.
    """

    shape: ModelShape
    rank: int
    cut: int
    depths: Mapping[str, int] = field(default_factory=dict)
    counting: Counting = "exact"
    wire: Wire = Wire()
    server: Literal["shared", "per_device"] = "shared"
    ahead: int | None = AHEAD
    stages: Stages | None = None

    def work(self) -> Work:
        """What its stages cost."""
        return Work(self.shape, self.rank, self.counting)
