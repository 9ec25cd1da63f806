"""Centralised LoRA (CenLoRA): all rows in one place, LoRA on all blocks. The bound to compare with.

Devices send their rows; nothing else crosses the network.
"""

from __future__ import annotations

import math

from splitfrozen.methods.bench import Bench, Built
from splitfrozen.methods.parts import Whole
from splitfrozen.methods.pooled import Pooled
from splitfrozen.training.batching import FixedOrder


def build(bench: Bench) -> Built:
    """Adapt all blocks and train them on all samples. Raises ModelError."""
    config = bench.config
    adapted = bench.adapt(0)
    steps = math.ceil(len(bench.samples) / config.train.batch_size)
    method = Pooled(
        Whole(adapted), adapted, bench.optimiser(adapted.parameters(), steps), bench.gradients()
    )
    order = FixedOrder(bench.samples, config.run.seed, config.train.batch_size)
    return Built(method, adapted, order, steps, None, "samples")
