"""Randomness by name: every random choice comes from a generator derived here.

A generator depends on the seed and on what it is for, never on what was drawn before it, so a run
that was interrupted draws the same numbers when it continues.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the purpose that `names` spell, e.g. `derive(0, "shuffle", 3)`."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return the generator for the purpose that `names` spell."""
    return np.random.Generator(np.random.Philox(derive(seed, *names)))
