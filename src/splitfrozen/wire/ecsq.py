"""Entropy-coded uniform quantisation of decorrelated activations: `ecsq:STEP`.

Side data (`wire.side`) turn an activation into coefficients about the nearest of K centres. STEP,
in units of the coefficients' root mean square, is the one knob: larger is smaller. A coefficient is
sent as a whole number of steps, nearer to 0 where few are not 0: what a one more costs in bits is
weighed against the error that it saves. Coefficients are coded in classes of like spread in steps:
that of the channel times the gain of the token, in half octaves. What is below class 1 is 0.
A payload is one string of bits (`wire.bits`):

    fields   for each token its centre, in the bits that K - 1 needs
    fields   for each token its gain + 4 in 3 bits, but 7 for a gain of 3 or more
    fields   for each of the latter its gain - 3, in 5 bits
    masks    sizes above 0, of all coefficients of class 1 or more: a group for each class
    bits     signs of these: 1 for below 0
    masks    sizes above 1 of those above 0: a group for each class
    masks    sizes above 2 of those above 1, and so on to LAYERS - 1: one group each
    fields   sizes beyond LAYERS: the width in 5 bits, then each in so many

Groups and fields that would be empty are not there; within a class coefficients go by token, then
by channel.

Measured on activations of MiniLM at depth 2 (docs/codecs.md): a payload is 2 % over the entropy of
its classes; classes by token take 9 % off, choosing sizes by their price 2 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitfrozen.errors import WireError
from splitfrozen.records import Floats
from splitfrozen.wire.bits import BitReader, BitWriter, Numbers
from splitfrozen.wire.side import MAX_CENTRES, Side, nearest

Sizes = npt.NDArray[np.int32]
"""int32 [coefficients]: whole numbers of steps, with a sign."""
Classes = npt.NDArray[np.uint8]

LEAST_STEP = 0.01
LARGEST_STEP = 100
"""Of STEP."""
LAYERS = 12
"""Larger sizes are rare enough to be sent as numbers."""
LARGEST = 2**23
"""Steps of a coefficient at most: float32 counts them exactly."""

_WIDTH_BITS = 5
"""Of LARGEST's own width."""
_GAIN_BITS = 3
_LEAST_GAIN = -4
_LOUD = _LEAST_GAIN + 2**_GAIN_BITS - 1
"""Gains from here on are rare: those of tokens unlike any that the side data were fitted to."""
_LOUD_BITS = 5
_CLASSES = 16
_LEAST = -4
"""Half octaves of the spread in steps of class 1: a quarter of a step. Less is worth no bit."""
_PRICE = 2 * math.log(2) / 12
"""Squared error, in steps, that a bit is worth at high rates; lower ones are much the same."""
_MEAN = np.float32(0.07)
"""A coefficient lies so many steps nearer to 0 than its size, in the mean."""


@dataclass(frozen=True, slots=True)
class Ecsq:
    """The format; implements `formats.Format`.

    Attributes:
        step: of the quantiser, above 0.
        side: as fitted for these activations.
    """

    step: float
    side: Side

    @property
    def lifted(self) -> str:
        return "float16"

    def most_bytes(self, tokens: int, width: int) -> int:
        """Upper bound of `len(encode(hidden))` for float32 [tokens, width], whatever the side data.

        What is usual is a fiftieth of it.
        """
        # A layer takes 1.08 bits of a coefficient, a sign 1, a number 24; counts 25 a group.
        centre_bits = (MAX_CENTRES - 1).bit_length()
        bits = tokens * (centre_bits + _GAIN_BITS + _LOUD_BITS) + tokens * width * 40
        return (bits + (2 * _CLASSES + LAYERS) * 27) // 8 + 1

    def encode(self, hidden: Floats) -> bytes:
        """Finite float32 [T, D] -> bytes. Raises WireError: another width, too large a value."""
        self._check_width(hidden.shape[1])
        chosen, scaled = self._scaled(hidden)
        gains = self._gains(scaled)
        classes = self._classes(gains)
        order, groups = _by_class(classes)
        bits = BitWriter()
        bits.fields(chosen, np.full(len(hidden), self._centre_bits))
        bits.fields(np.minimum(gains, _LOUD) - _LEAST_GAIN, np.full(len(hidden), _GAIN_BITS))
        loud = gains[gains >= _LOUD] - _LOUD
        bits.fields(loud, np.full(len(loud), _LOUD_BITS))
        scaled, classes = scaled.ravel()[order], classes.ravel()[order]
        sizes = np.floor(np.abs(scaled) + (1 - self._zones()[classes]))
        _write(bits, np.copysign(sizes, scaled).astype(np.int32), groups)
        return bits.to_bytes()

    def decode(self, payload: bytes | memoryview, tokens: int, width: int) -> Floats:
        """bytes -> float32 [tokens, width]. Raises WireError."""
        self._check_width(width)
        bits = BitReader(payload)
        chosen = bits.fields(np.full(tokens, self._centre_bits))
        if (chosen >= len(self.side.centres)).any():
            raise _wrong(f"centre {chosen.max()}", f"0..{len(self.side.centres) - 1}")
        gains = bits.fields(np.full(tokens, _GAIN_BITS)) + _LEAST_GAIN
        loud = np.flatnonzero(gains == _LOUD)
        gains[loud] += bits.fields(np.full(len(loud), _LOUD_BITS))
        order, groups = _by_class(self._classes(gains))
        sizes = _read(bits, groups)
        bits.end()
        coefficients: Floats = np.zeros(tokens * width, np.float32)
        coefficients[order] = (sizes - _MEAN * np.sign(sizes)) * np.float32(self.step)
        coefficients = coefficients.reshape(tokens, width)
        coefficients += self.side.centres[chosen]
        return self.side.backward(coefficients)

    def bound(self, hidden: Floats) -> Floats:
        """Largest error, float32 [T, D], if the errors of all coefficients of a token added up.

        A coefficient that is sent is one step off at most; of others the whole size is missing.
        """
        chosen, scaled = self._scaled(hidden)
        classes = self._classes(self._gains(scaled))
        sizes = np.abs(scaled)
        sent = (classes > 0) & (sizes >= self._zones()[classes])
        missing = np.where(sent, np.float32(1), sizes) * np.float32(self.step)
        coefficients = scaled * np.float32(self.step) + self.side.centres[chosen]
        # The basis has been rounded to 16 bits.
        inexact = np.abs(hidden - self.side.backward(coefficients))
        off = missing + np.abs(coefficients) * np.float32(2**-18)  # What sums round off.
        bound: Floats = off @ np.abs(self.side.basis.T) * self.side.unit + inexact
        bound *= np.float32(1 + 2**-18)  # The bound's own sums round off, too.
        return bound

    @property
    def _centre_bits(self) -> int:
        return (len(self.side.centres) - 1).bit_length()

    def _scaled(self, hidden: Floats) -> tuple[Numbers, Floats]:
        """Centre of each token, and its coefficients about that, float32 [T, D], in steps."""
        with np.errstate(over="ignore", invalid="ignore"):
            # Memory of one layout, so that the additions have one order.
            coefficients = self.side.forward(np.ascontiguousarray(hidden))
            chosen = nearest(coefficients, self.side.centres)
            scaled = (coefficients - self.side.centres[chosen]) / np.float32(self.step)
        if not (np.abs(scaled) < LARGEST).all():
            raise WireError(
                "an activation is too large for ecsq",
                got=f"a value of {np.abs(hidden).max():.6g}",
                allowed=f"coefficients below {LARGEST} steps of {self.step}",
                remedy='set wire.codec = "bfloat16"',
            )
        return chosen, scaled

    def _gains(self, scaled: Floats) -> Numbers:
        """Half octaves by which a token's coefficients are larger than usual: int64 [T]."""
        spreads = np.exp2(self.side.spreads.astype(np.float32) / 2) / np.float32(self.step)
        heard = spreads > 0.25
        if not heard.any():
            return np.zeros(len(scaled), np.int64)
        # Laplace's distribution has a mean size of 0.71 spreads.
        usual = np.float32(math.sqrt(0.5)) * spreads[heard].sum()
        ratio = np.abs(scaled[:, heard]).sum(axis=1) / usual
        gains = np.rint(2 * np.log2(np.maximum(ratio, np.float32(2**-20))))
        largest = _LOUD + 2**_LOUD_BITS - 1
        chosen: Numbers = np.clip(gains, _LEAST_GAIN, largest).astype(np.int64)
        return chosen

    def _classes(self, gains: Numbers) -> Classes:
        """uint8 [T, D]: the class of each coefficient. Whole numbers: both sides must agree."""
        channels = self.side.spreads.astype(np.int64) - self._octaves - _LEAST + 1
        classes: Classes = np.clip(gains[:, None] + channels, 0, _CLASSES).astype(np.uint8)
        return classes

    @property
    def _octaves(self) -> int:
        """The step in half octaves."""
        return round(2 * math.log2(self.step))

    def _zones(self) -> Floats:
        """By class: the size from which on a coefficient is 1 and not 0, in steps."""
        halves = np.arange(_CLASSES + 1) - 1 + _LEAST + self._octaves
        # Of Laplace's distribution with that spread: how many are not 0.
        some = np.exp(-0.6 * math.sqrt(2) * self.step / np.exp2(halves / 2))
        more_bits = np.log2((1 - some) / (some / 2))
        # 1 is better than 0 where (s - 1)^2 + price x bits < s^2.
        zones: Floats = (0.5 + _PRICE / 2 * np.maximum(more_bits, 0)).astype(np.float32)
        return zones

    def _check_width(self, width: int) -> None:
        if width != self.side.width:
            raise WireError(
                "side data are for another model",
                got=f"activations of width {width}",
                allowed=f"width {self.side.width}",
                remedy="take the side data of this front",
            )


def _by_class(classes: Classes) -> tuple[npt.NDArray[np.intp], Numbers]:
    """The order of coefficients of class 1 and more, class by class, and the classes' lengths."""
    flat = classes.ravel()
    counts = np.bincount(flat, minlength=1)
    # Stable sorting of 8-bit numbers takes time in proportion to their count.
    return np.argsort(flat, kind="stable")[counts[0] :], _there(counts[1:])


def _write(bits: BitWriter, sizes: Sizes, groups: Numbers) -> None:
    """All of the sizes, in groups of so many."""
    left, layer = np.abs(sizes), 0
    while layer < LAYERS and len(left):
        more = left > layer
        bits.masks(more, groups)
        left, groups = left[more], _next(more, groups, layer)
        if layer == 0:
            bits.bits(sizes[more] < 0)
        layer += 1
    if len(left):
        width = int(left.max() - LAYERS).bit_length()
        bits.fields(np.array([width]), np.array([_WIDTH_BITS]))
        bits.fields(left - LAYERS, np.full(len(left), width))


def _read(bits: BitReader, groups: Numbers) -> Sizes:
    """What `_write` wrote. Raises WireError."""
    sizes = np.zeros(int(groups.sum()), np.int32)
    left, layer = np.arange(len(sizes)), 0
    below = left[:0]
    while layer < LAYERS and len(left):
        more = bits.masks(groups)
        left, groups = left[more], _next(more, groups, layer)
        sizes[left] += 1
        if layer == 0:
            below = left[bits.bits(len(left))]
        layer += 1
    if len(left):
        width = bits.fields(np.array([_WIDTH_BITS]))
        if width[0] > LARGEST.bit_length():
            raise _wrong(f"sizes of {width[0]} bits", f"{LARGEST.bit_length()} at most")
        sizes[left] += bits.fields(np.repeat(width, len(left))).astype(np.int32)
    sizes[below] *= -1
    return sizes


def _next(more: npt.NDArray[np.bool_], groups: Numbers, layer: int) -> Numbers:
    """Groups of the next layer: classes still tell the first one's sizes apart, no later ones."""
    if layer > 0:
        return _there(np.array([np.count_nonzero(more)]))
    return _there(np.add.reduceat(more, np.cumsum(groups) - groups, dtype=np.int64))


def _there(groups: Numbers) -> Numbers:
    return groups[groups > 0]


def _wrong(got: str, allowed: str) -> WireError:
    return WireError(
        "a payload of ecsq is not what it should be",
        got=got,
        allowed=allowed,
        remedy="send the chunk again",
    )
