"""SplitFrozen: LoRA on blocks[M:L], trained where the activations of all devices come together.

Devices and server need not wait for each other, so what a step trains on is the order's affair:
shuffled over all samples, in a window over what the devices send in turn, or not at all.
"""

from __future__ import annotations

import math

from splitfrozen.config import Config
from splitfrozen.methods.bench import Bench, Built
from splitfrozen.methods.parts import Adapted, Upper
from splitfrozen.methods.pooled import Pooled
from splitfrozen.records import Activation, SampleTable
from splitfrozen.training.batching import FixedOrder, Order
from splitfrozen.training.orders import TurnOrder, WindowOrder


def build(bench: Bench) -> Built:
    """Adapt the blocks above the cut and train them on activations. Raises ModelError."""
    adapted = bench.adapt(bench.config.model.cut)
    order, steps = order_of(bench.config, bench.samples)
    return Built(pooled(bench, adapted, steps), adapted, order, steps, None, "activations")


def pooled(bench: Bench, adapted: Adapted, steps_per_epoch: int) -> Pooled[Activation]:
    """The server's training, whatever the order of the samples."""
    return Pooled(
        Upper(adapted, bench.config.model.cut),
        adapted,
        bench.optimiser(adapted.parameters(), steps_per_epoch),
        bench.gradients(),
    )


def order_of(config: Config, table: SampleTable) -> tuple[Order, int]:
    """The order that `method.shuffle` asks for, and its steps an epoch."""
    seed, size = config.run.seed, config.train.batch_size
    if config.method.shuffle == "none":
        turns = TurnOrder(table, seed, size)
        return turns, turns.steps_per_epoch
    if config.method.shuffle == "window":
        window = WindowOrder(table, seed, size, config.run.window)
        return window, window.steps_per_epoch
    return FixedOrder(table, seed, size), math.ceil(len(table) / size)
