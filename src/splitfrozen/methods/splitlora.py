"""SplitLoRA (arXiv 2407.00952): SplitFed with LoRA on both sides of one cut for all devices.

`method.server` chooses between SplitFedV2's single server model, trained with the devices' batches
in turn, and SplitFedV1's copy for each device, averaged with the devices' adapters.
"""

from __future__ import annotations

from splitfrozen.methods import two_way
from splitfrozen.methods.bench import Bench, Built
from splitfrozen.records import SERVER


def build(bench: Bench) -> Built:
    """Adapt all blocks, those below the cut on the devices. Raises ModelError, WireError."""
    return two_way.build(bench, bench.config.method.server, SERVER)
