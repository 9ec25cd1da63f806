"""Codecs: one sample's activation, float32 [T, D], to bytes and back within a declared error.

A codec's name says all that decoding needs, so every frame carries its own:

    float32, float16, bfloat16, int8   numbers of so many bits            wire.formats
    int4:GROUP                         four bits, a scale for each group  wire.int4
    topk:RATE:LEVELS[:token]           the largest values, coarse         wire.topk
    ecsq:STEP[@SHA]                    decorrelated, rounded, coded       wire.ecsq

The first five may end in +zlib or +zstd: "float16+zstd". ecsq needs side data, and its name may
end in the first 16 digits of their SHA-256. Numbers have one spelling each, so that equal codecs
have equal names.

A new format is a class behind `formats.Format` and a branch of `_spelt`. A length, a number or a
stream of bits that is not what it should be is a WireError, found before memory is taken for it.
"""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from splitfrozen.errors import WireError
from splitfrozen.records import Floats
from splitfrozen.wire import ecsq, entropy, int4, topk
from splitfrozen.wire.ecsq import Ecsq
from splitfrozen.wire.formats import NUMBERS, Compressed, Fixed, Format, Sized
from splitfrozen.wire.int4 import Int4
from splitfrozen.wire.side import Side
from splitfrozen.wire.topk import TopK

MAX_HIDDEN_BYTES = 64 * 1024 * 1024
"""Largest activation of one sample, as float32."""

MAX_NAME = 40
"""Characters of a name: what a frame's header holds."""

SHA_DIGITS = 16
"""Of side data, in a name."""

_ENDS = tuple(f"+{method}" for method in entropy.METHODS)

CODECS = tuple(f"{form}{end}" for form in NUMBERS for end in ("", *_ENDS))
"""All names without parameters."""

_WITH_NUMBERS = {
    "int4": f"int4:GROUP[+zlib|+zstd] (GROUP {int4.LEAST_GROUP} to {int4.LARGEST_GROUP})",
    "topk": f"topk:RATE:LEVELS[:token] (RATE above 0, at most 1; LEVELS 2 to {topk.LEVELS})",
    "ecsq": f"ecsq:STEP (STEP {ecsq.LEAST_STEP} to {ecsq.LARGEST_STEP})",
}

_EXAMPLES = {"int4": "int4:64", "topk": "topk:0.2:8", "ecsq": "ecsq:1.5"}

FORMS = (*(f"{form}[+zlib|+zstd]" for form in NUMBERS), *_WITH_NUMBERS.values())
"""All names there are, for people."""


@dataclass(frozen=True, slots=True)
class TensorCodec:
    """A format and the checks that all have in common; implements `records.Codec`."""

    name: str
    format: Format

    @property
    def lifted(self) -> str:
        return self.format.lifted

    def most_bytes(self, tokens: int, width: int) -> int:
        """Upper bound of `len(encode(hidden))` for float32 [tokens, width]."""
        return self.format.most_bytes(tokens, width)

    def encode(self, hidden: Floats) -> bytes:
        """float32 [T, D] -> bytes, always the same. Raises WireError on values it cannot carry."""
        assert hidden.dtype == np.float32
        assert hidden.ndim == 2
        _check_shape(*hidden.shape)
        _check_finite(hidden, "an activation", "look at the model's weights and the input")
        return self.format.encode(hidden)

    def decode(self, payload: bytes | memoryview, tokens: int, width: int) -> Floats:
        """bytes -> float32 [tokens, width], writable and its own memory. Raises WireError."""
        _check_shape(tokens, width)
        most = self.format.most_bytes(tokens, width)
        if len(payload) > most:
            # Before it is unpacked: bits of a long payload would take a multiple of its memory.
            raise WireError(
                "a payload has the wrong length",
                got=f"{len(payload)} bytes",
                allowed=f"{most} bytes at most for {tokens} tokens of width {width}",
                remedy="send the chunk again",
            )
        with np.errstate(all="ignore"):
            hidden = self.format.decode(payload, tokens, width)
        _check_finite(hidden, "a decoded activation", "leave that device out")
        return hidden

    def error_bound(self, hidden: Floats) -> Floats:
        """Largest |decode(encode(hidden)) - hidden|: float32, broadcastable to [T, D]."""
        return self.format.bound(hidden)


@dataclass(frozen=True, slots=True)
class _Unfitted:
    """What the name of a codec with side data says: its step, and which side data, or ""."""

    step: float
    sha: str


def needs_side(name: str) -> bool:
    """Whether a codec needs side data. Raises WireError where there is no such codec."""
    return isinstance(_spelt(name), _Unfitted)


def compressible(name: str) -> bool:
    """Whether +zlib or +zstd may follow a name: those that code by themselves leave nothing."""
    return _sized(name) is not None


def codec(name: str, side: Side | None = None) -> TensorCodec:
    """Return the codec of that name. Raises WireError.

    `side`: what a codec with side data was fitted to; others have no use for it.
    """
    found = _spelt(name)
    if not isinstance(found, _Unfitted):
        return TensorCodec(name, found)
    if side is None or not side.sha256.startswith(found.sha):
        raise WireError(
            f"{name} needs its side data",
            got="none" if side is None else f"others, {side.sha256[:SHA_DIGITS]}",
            allowed="those that it was fitted to",
            remedy="take the side data that came with the front",
        )
    return TensorCodec(name, Ecsq(found.step, side))


@lru_cache(maxsize=256)
def _spelt(name: str) -> Format | _Unfitted:
    """What a name spells. Raises WireError."""
    found = _parsed(name)
    if found is None:
        form = re.split("[:+@]", name, maxsplit=1)[0]
        raise WireError(
            "there is no such codec",
            got=repr(name[:100]),
            allowed=_WITH_NUMBERS.get(form, ", ".join(FORMS)),
            remedy=_remedy(name, form),
        )
    return found


def _remedy(name: str, form: str) -> str:
    """What to write in place of a name that is none. `form`: what it begins with."""
    near = [_respelt(name)]
    if form in _EXAMPLES:
        # Another number than the one that was meant is no help: an example is for who gave none.
        near += [_EXAMPLES[form] + name.removeprefix(form), name.partition("+")[0]]
        otherwise = f"mend what follows {form}, as in {_EXAMPLES[form]}"
    else:
        near += difflib.get_close_matches(name, (*CODECS, *_EXAMPLES.values()), n=1)
        otherwise = "choose one of these"
    meant = next((one for one in near if _parsed(one)), None)
    return f"did you mean {meant}?" if meant else otherwise


def _parsed(name: str) -> Format | _Unfitted | None:
    """What a name spells, or None."""
    if len(name) > MAX_NAME:
        return None
    base, plus, method = name.partition("+")
    sized = _sized(base)
    if sized is not None and not plus:
        return Fixed(sized)
    if sized is not None and method in entropy.METHODS:
        return Compressed(sized, method)
    return None if plus else _coded(name)


def _respelt(name: str) -> str:
    """The name with its numbers in their one spelling."""
    parts = name.split(":")
    for place, part in enumerate(parts):
        with suppress(ValueError):
            parts[place] = f"{float(part):g}"
    return ":".join(parts)


def _sized(name: str) -> Sized | None:
    if name in NUMBERS:
        return NUMBERS[name]
    form, *parameters = name.split(":")
    if form != "int4" or len(parameters) != 1:
        return None
    group = _whole(parameters[0])
    return Int4(group) if int4.LEAST_GROUP <= group <= int4.LARGEST_GROUP else None


def _coded(name: str) -> Format | _Unfitted | None:
    base, at, sha = name.partition("@")
    match base.split(":"):
        case ["topk", rate, levels, *rest] if not at and rest in ([], ["token"]):
            kept, count = _number(rate), _whole(levels)
            fits = 0 < kept <= 1 and 2 <= count <= topk.LEVELS
            return TopK(kept, count, per_token=bool(rest)) if fits else None
        case ["ecsq", step]:
            named = len(sha) == SHA_DIGITS if at else True
            value = _number(step)
            fits = ecsq.LEAST_STEP <= value <= ecsq.LARGEST_STEP
            return _Unfitted(value, sha) if named and fits else None
    return None


def _whole(text: str) -> int:
    """A number in its one spelling, else -1, which none is."""
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    return value if str(value) == text else -1


def _number(text: str) -> float:
    """A number in its one spelling, else -1, which none is."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if f"{value:g}" == text else -1.0


def _check_shape(tokens: int, width: int) -> None:
    if tokens < 1 or width < 1 or tokens * width * 4 > MAX_HIDDEN_BYTES:
        raise WireError(
            "an activation has an impossible size",
            got=f"{tokens} tokens of width {width}",
            allowed=f"1 token or more, {MAX_HIDDEN_BYTES} bytes at most as float32",
            remedy="lower task.max_tokens",
        )


def _check_finite(hidden: Floats, what: str, remedy: str) -> None:
    finite = np.isfinite(hidden)
    if not finite.all():
        raise WireError(
            f"{what} is not finite",
            got=f"{hidden.size - np.count_nonzero(finite)} such values of {hidden.size}",
            allowed="finite numbers",
            remedy=remedy,
        )
