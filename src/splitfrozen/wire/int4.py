"""Four bits a value with a scale for each group: `int4:GROUP`, for devices without time to spare.

GROUP consecutive values of a token have one scale; the last group of a token may be shorter.

    float16 [T, ceil(D / GROUP)]   scales: the group's largest size / 7, rounded up
    uint8   [ceil(T D / 2)]        values in steps of their scale, plus 8: two a byte, the first in
                                   the upper half
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitfrozen.errors import WireError
from splitfrozen.records import Floats

STEPS = 7
"""Of a group's largest size."""
LEAST_GROUP = 8
LARGEST_GROUP = 65536

_ZERO = 8


@dataclass(frozen=True, slots=True)
class Int4:
    """The format; implements `formats.Sized`.

    Attributes:
        group: values with one scale.
    """

    group: int

    @property
    def lifted(self) -> str:
        return "float16"

    @property
    def itemsize(self) -> int:
        return 1

    def size(self, tokens: int, width: int) -> int:
        """Length of the bytes."""
        return 2 * tokens * -(-width // self.group) + (tokens * width + 1) // 2

    def pack(self, hidden: Floats) -> bytes:
        """Finite float32 [T, D] -> bytes. Raises WireError on too large a value."""
        scales = self._scales(hidden)
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = self._each(scales, hidden.shape[1])
            np.divide(hidden, steps, out=steps)
        # Where the scale is 0 the group is, or is too small for any scale.
        steps[~np.isfinite(steps)] = 0
        values = np.clip(np.rint(steps), -STEPS, STEPS).astype(np.int8).ravel()
        pairs = np.append(values, np.zeros(len(values) % 2, np.int8)).view(np.uint8) + _ZERO
        return scales.astype("<f2").tobytes() + (pairs[0::2] << 4 | pairs[1::2]).tobytes()

    def unpack(self, raw: bytes | memoryview, tokens: int, width: int) -> Floats:
        """Bytes of the right length -> float32 [tokens, width], perhaps not finite."""
        groups = -(-width // self.group)
        scales = np.frombuffer(raw, "<f2", tokens * groups).astype(np.float32)
        pairs = np.frombuffer(raw, np.uint8, offset=2 * len(scales))
        values = np.empty(2 * len(pairs), np.float32)
        values[0::2], values[1::2] = pairs >> 4, pairs & 15
        hidden = values[: tokens * width].reshape(tokens, width) - np.float32(_ZERO)
        hidden *= self._each(scales.reshape(tokens, groups), width)
        return hidden

    def bound(self, hidden: Floats) -> Floats:
        """Half a step, or all of a value whose group is too small for any step."""
        # 1e-4 of a step is what division and product round off at most.
        steps = self._each(self._scales(hidden), hidden.shape[1])
        bound: Floats = np.where(steps > 0, steps * np.float32(0.5001), np.abs(hidden))
        return bound

    def _scales(self, hidden: Floats) -> Floats:
        """float32 [T, groups], each a float16."""
        starts = np.arange(0, hidden.shape[1], self.group)
        largest = np.maximum.reduceat(np.abs(hidden), starts, axis=1)
        exact = largest / np.float32(STEPS)
        with np.errstate(over="ignore", under="ignore"):
            scales = exact.astype(np.float16)
            scales = np.where(scales < exact, np.nextafter(scales, np.float16(np.inf)), scales)
        if not np.isfinite(scales).all():
            raise WireError(
                "an activation is too large for int4",
                got=f"a value of {np.abs(hidden).max():.6g}",
                allowed=f"at most {STEPS * 65504}",
                remedy='set wire.codec = "bfloat16"',
            )
        return scales.astype(np.float32)

    def _each(self, scales: Floats, width: int) -> Floats:
        """float32 [T, width]: the scale of each value."""
        return np.repeat(scales, self.group, axis=1)[:, :width]
