"""What a front costs, as formulas over shapes: no model, no measurement.

A linear map with `i` inputs and `o` outputs takes i*o multiply-adds a token, counted as 2*i*o FLOP.
Attention scores, norms and activations are left out: below a few thousand tokens they are small
beside the maps, and leaving them out keeps the cost proportional to the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

MapShape = tuple[int, int]
"""(inputs, outputs) of a linear map."""

RUNTIME_BYTES = 64 * 2**20
"""What the interpreter, NumPy and ONNX Runtime hold before any model is loaded."""

MICRO_TOKENS = 1024
"""Padded tokens of the batch that the working set is counted for."""

ALIVE = 4
"""Inputs and outputs of its largest map that a block holds at once, seen with ONNX Runtime 1.31 on
GPT-2, whose activation function is spelled out in single steps."""


def block_flops_per_token(maps: Iterable[MapShape]) -> int:
    """FLOP of one token in one block: 2 x inputs x outputs over its linear maps."""
    return sum(2 * inputs * outputs for inputs, outputs in maps)


def front_flops_per_token(blocks: Iterable[Iterable[MapShape]]) -> int:
    """FLOP of one token in a front; one item of `blocks` for each of its blocks."""
    return sum(block_flops_per_token(maps) for maps in blocks)


def front_memory_bytes(weight_bytes: int, largest_map: MapShape) -> int:
    """Least memory of a device that runs a front on batches of MICRO_TOKENS tokens.

    Args:
        weight_bytes: of all weights as the runtime holds them.
        largest_map: the linear map with the most inputs + outputs, in float32 while it runs.
    """
    return RUNTIME_BYTES + weight_bytes + ALIVE * MICRO_TOKENS * 4 * sum(largest_map)
