"""SFT (arXiv 2501.09237), Algorithm 1: one server model with an adapter for each device.

Activations and gradients go through codecs ([wire] and `method.gradients`); the edge server
averages the adapters of both sides at the end of a round.
"""

from __future__ import annotations

from splitfrozen.methods import two_way
from splitfrozen.methods.bench import Bench, Built
from splitfrozen.records import SERVER


def build(bench: Bench) -> Built:
    """Adapt all blocks, those below the cut on the devices. Raises ModelError, WireError."""
    return two_way.build(bench, "per_device", SERVER)
