"""FedsLLM (arXiv 2504.14667), section IV: the main server trains on all clients' activations.

The clients' activations (equation 3) go through the server's part together (4), which is updated by
the loss over all of them (5); each client is updated by the gradient at its own (6). The federated
server is another party: it receives the clients' adapters, nothing else, and averages them (7)
after I = `method.local_steps` steps.
"""

from __future__ import annotations

from splitfrozen.methods import two_way
from splitfrozen.methods.bench import Bench, Built
from splitfrozen.records import FEDERATED


def build(bench: Bench) -> Built:
    """Adapt all blocks, those below the cut on the clients. Raises ModelError, WireError."""
    return two_way.build(bench, "together", FEDERATED)
