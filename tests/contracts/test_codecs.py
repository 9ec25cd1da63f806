"""What every codec promises: those without parameters, and some of each form that has any."""

import gc
import tracemalloc
import weakref
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitfrozen.errors import WireError
from splitfrozen.records import Codec, Floats
from splitfrozen.rng import stream
from splitfrozen.wire.codec import (
    CODECS,
    FORMS,
    MAX_HIDDEN_BYTES,
    TensorCodec,
    codec,
    compressible,
    needs_side,
)
from splitfrozen.wire.side import Side

SIZED = ["float32", "float16", "bfloat16", "int8", "int4:8", "int4:64"]
VARIABLE = [
    *("topk:0.2:8", "topk:0.2:8:token", "topk:1:2", "topk:0.01:200"),
    *("ecsq:0.25", "ecsq:1.5"),
]
PLAIN = SIZED + VARIABLE
NAMES = [*CODECS, *(f"{form}{end}" for form in SIZED[4:] for end in ("", "+zlib", "+zstd"))]
NAMES += VARIABLE
LOSSLESS = {"float32", "float32+zlib", "float32+zstd"}
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
FINITE = {"width": 32, "allow_nan": False, "allow_infinity": False}
LARGE = 65504.0
"""Largest value that every codec can carry."""


@cache
def side(width: int) -> Side:
    return Side.fit([activations(seed, 50, width) for seed in range(8)])


def made(name: str, width: int) -> TensorCodec:
    """The codec of that name for activations of some width."""
    return codec(name, side(width)) if needs_side(name) else codec(name)


def tensors(largest: float) -> st.SearchStrategy[Floats]:
    """Tokens of any size: subnormal, zero and up to `largest`, each token with its own scale."""
    values = st.floats(-largest, largest, **FINITE)
    tiny = st.floats(-(2.0**-120), 2.0**-120, **FINITE)
    return hnp.arrays(np.float32, SHAPES, elements=st.one_of(values, tiny, st.just(0.0)))


def activations(seed: int = 0, tokens: int = 40, width: int = 64) -> Floats:
    """Roughly what blocks put out: normal values, channels of unlike scale, one outlier."""
    source = stream(seed, "activations")
    hidden = source.normal(size=(tokens, width)) * source.uniform(0.1, 2.0, width)
    hidden[:, 3 % width] += 20
    return hidden.astype(np.float32)


def error(hidden: Floats, name: str) -> np.ndarray:
    """|decode(encode(hidden)) - hidden| in float64, which holds it exactly enough."""
    chosen = made(name, hidden.shape[1])
    decoded = chosen.decode(chosen.encode(hidden), *hidden.shape)
    return np.abs(decoded.astype(np.float64) - hidden.astype(np.float64))


def bound(hidden: Floats, name: str) -> Floats:
    return made(name, hidden.shape[1]).error_bound(hidden)


def test_the_table_is_complete():
    formats = ("float32", "float16", "bfloat16", "int8")
    assert set(CODECS) >= {form + end for form in formats for end in ("", "+zlib", "+zstd")}
    assert len(set(CODECS)) == len(CODECS)
    forms = {form.split("[")[0].split(":")[0].split(" ")[0] for form in FORMS}
    assert {name.split(":")[0].split("+")[0] for name in NAMES} == forms
    assert {name for name in NAMES if compressible(name)} == set(SIZED)


@pytest.mark.parametrize("name", NAMES)
def test_names_itself_and_what_stores_the_lifted(name: str):
    chosen: Codec = made(name, 4)
    assert chosen.name == name
    assert chosen.lifted in PLAIN
    assert codec(chosen.lifted).lifted == chosen.lifted


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(hidden=tensors(LARGE))
def test_error_is_within_the_bound(name: str, hidden: Floats):
    most = bound(hidden, name)
    assert np.broadcast_shapes(most.shape, hidden.shape) == hidden.shape
    assert (error(hidden, name) <= most).all()


REFUSED = {"float16": "bfloat16", "int4": "bfloat16", "ecsq": "bfloat16"}


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=100, deadline=None)
@given(hidden=tensors(2.0**127))
def test_error_is_within_the_bound_or_the_value_is_refused(name: str, hidden: Floats):
    refusal = ""
    try:
        seen = error(hidden, name)
    except WireError as problem:
        refusal = str(problem)
    if refusal:
        assert np.abs(hidden).max() >= LARGE
        assert REFUSED[name.split(":")[0]] in refusal
    else:
        assert (seen <= bound(hidden, name)).all()


@pytest.mark.parametrize("name", NAMES)
def test_bound_is_reached(name: str):
    hidden = activations(tokens=200)
    most = np.broadcast_to(bound(hidden, name), hidden.shape)
    seen = error(hidden, name)
    if name in LOSSLESS:
        assert (most == 0).all()
        return
    assert (seen > 0).any()
    # That of ecsq holds even if the errors of all channels add up.
    assert (seen >= most / (40 if needs_side(name) else 2)).any()


@pytest.mark.parametrize("name", NAMES)
def test_promised_bytes(name: str):
    width = 97 if needs_side(name) else 4099
    noise = stream(0, "noise").integers(0, 2**32, (61, width), dtype=np.uint32)
    noise &= 0xBFFFFFFF  # below 2, so finite
    hidden = noise.view(np.float32)
    chosen = made(name, width)
    assert len(chosen.encode(hidden)) <= chosen.most_bytes(*hidden.shape)
    if name in SIZED:
        assert len(chosen.encode(hidden)) == chosen.most_bytes(*hidden.shape)
    one = np.ones((1, 1), np.float32)
    assert len(made(name, 1).encode(one)) <= made(name, 1).most_bytes(1, 1)


@pytest.mark.parametrize("name", SIZED)
def test_compression_acts(name: str):
    hidden = activations(tokens=100, width=384)
    plain = codec(name).encode(hidden)
    for method in ("zlib", "zstd"):
        packed = codec(f"{name}+{method}").encode(hidden)
        assert len(packed) < 0.96 * len(plain)
        assert packed != plain
        same = codec(f"{name}+{method}").decode(packed, 100, 384)
        assert np.array_equal(same, codec(name).decode(plain, 100, 384))


@pytest.mark.parametrize("name", NAMES)
def test_same_input_same_bytes_whatever_the_memory_layout(name: str):
    hidden = activations()
    strided = np.asfortranarray(hidden)
    chosen = made(name, 64)
    assert chosen.encode(hidden) == chosen.encode(strided)
    assert chosen.encode(hidden) != chosen.encode(hidden * 2)


@pytest.mark.parametrize("name", NAMES)
def test_decodes_a_view_into_memory_of_its_own(name: str):
    hidden = activations()
    chosen = made(name, 64)
    payload = bytearray(b"xyz" + chosen.encode(hidden) + b"xyz")
    decoded = chosen.decode(memoryview(payload)[3:-3], *hidden.shape)
    assert decoded.dtype == np.float32
    assert decoded.shape == hidden.shape
    assert decoded.flags.writeable
    before = decoded.copy()
    payload[:] = bytes(len(payload))
    assert np.array_equal(decoded, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_refuses_to_encode_what_is_not_finite(name: str, value: float):
    hidden = activations()
    hidden[5, 7] = value
    with pytest.raises(WireError, match="got 1 such values of 2560"):
        made(name, 64).encode(hidden)


def read(chosen: TensorCodec, payload: bytes, tokens: int, width: int) -> Floats | None:
    """What a payload decodes to; None where it is refused."""
    try:
        return chosen.decode(payload, tokens, width)
    except WireError:
        return None


@pytest.mark.parametrize("name", NAMES)
def test_refuses_a_wrong_length(name: str):
    hidden = activations()
    chosen = made(name, 64)
    payload = chosen.encode(hidden)
    tokens, width = hidden.shape
    for wrong in (payload[:-1], payload + b"\0", b"", payload[: len(payload) // 2], payload * 2):
        with pytest.raises(WireError):
            chosen.decode(wrong, tokens, width)
    for shape in ((tokens + 1, width), (tokens, width - 1)):
        found = read(chosen, payload, *shape)
        # A few values more, none of them kept, may be told by as many bits.
        assert found is None or (name.startswith("topk") and found.shape == shape)


@pytest.mark.parametrize("shape", [(2**40, 1), (1, 2**62), (0, 8), (8, 0), (-1, -1), (4097, 4096)])
@pytest.mark.parametrize("name", NAMES)
def test_refuses_an_impossible_shape(name: str, shape: tuple[int, int]):
    with pytest.raises(WireError, match=str(MAX_HIDDEN_BYTES)):
        made(name, 8).decode(b"\0" * 64, *shape)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_payloads_decode_to_finite_numbers_or_are_refused(name: str, data: st.DataObject):
    chosen = made(name, 8)
    payload = bytearray(chosen.encode(activations(tokens=3, width=8)))
    assert read(chosen, bytes(payload), 3, 8) is not None
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    kept = data.draw(st.integers(len(payload) - 2, len(payload)))
    found = read(chosen, bytes(payload[:kept]), 3, 8)
    assert found is None or (found.shape == (3, 8) and np.isfinite(found).all())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=80))
def test_any_bytes_decode_to_finite_numbers_or_are_refused(name: str, payload: bytes):
    found = read(made(name, 4), payload, 2, 4)
    assert found is None or (found.shape == (2, 4) and np.isfinite(found).all())


def peak_bytes(chosen: TensorCodec, payload: bytes, tokens: int, width: int) -> int:
    """Memory that refusing a payload takes."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            chosen.decode(payload, tokens, width)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def filled(fill: bytes, size: int) -> bytes:
    return (fill * (size // len(fill) + 1))[:size]


FILLS = (b"\0", b"\xff", b"\x7f\x80\x80", b"\0\0\0\0\0\0\x80\x3f" + b"\x55" * 1000)
"""Zeros, ones, both; and ends of topk that are in order, before many short runs."""


@pytest.mark.parametrize("fill", FILLS, ids=lambda fill: fill[:9].hex())
@pytest.mark.parametrize("name", NAMES)
def test_lies_take_no_memory(name: str, fill: bytes):
    """Few bytes that claim to be the largest activation there is, and many that claim to be a
    small one."""
    chosen = made(name, 64)
    largest = MAX_HIDDEN_BYTES // 256, 64
    assert peak_bytes(chosen, filled(fill, 96), *largest) < MAX_HIDDEN_BYTES // 2
    assert peak_bytes(chosen, filled(fill, 2**21), 2, 64) < 2**16


@pytest.mark.parametrize("fill", FILLS, ids=lambda fill: fill[:9].hex())
@pytest.mark.parametrize("name", VARIABLE)
def test_the_longest_payload_takes_a_multiple_of_its_activation(name: str, fill: bytes):
    chosen = made(name, 64)
    most = chosen.most_bytes(1024, 64)
    assert peak_bytes(chosen, filled(fill, most), 1024, 64) < 25 * 4 * 1024 * 64


def test_side_data_go_with_their_codec():
    """A device that changes its depth does not keep those of the depth before."""
    fitted = Side.fit([activations()])
    chosen = codec("ecsq:1.5", fitted)
    assert chosen.encode(activations())
    gone = weakref.ref(fitted)
    del fitted, chosen
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("float32", np.array([[1, np.nan]], "<f4").tobytes()),
        ("float16", np.array([[np.inf, 1]], "<f2").tobytes()),
        ("bfloat16", np.array([[0x7F80, 0]], "<u2").tobytes()),
        ("int8", np.array([np.inf], "<f4").tobytes() + b"\1\1"),
        ("int4:8", np.array([np.inf], "<f2").tobytes() + b"\x99"),
        ("int8", np.array([np.finfo(np.float32).max], "<f4").tobytes() + b"\1\2"),
    ],
)
def test_refuses_decoded_values_that_are_not_finite(name: str, payload: bytes):
    with pytest.raises(WireError, match="not finite"):
        codec(name).decode(payload, 1, 2)


def test_bytes_are_little_endian():
    hidden = np.array([[1.0, -2.0]], np.float32)
    assert codec("float32").encode(hidden).hex() == "0000803f000000c0"
    assert codec("float16").encode(hidden).hex() == "003c00c0"
    assert codec("bfloat16").encode(hidden).hex() == "803f00c0"
    scale = np.float32(2.0) / np.float32(127)
    assert codec("int8").encode(hidden) == scale.astype("<f4").tobytes() + bytes([64, 129])
    # 2 / 7 rounded up to 16 bits; 1.0 is 3.5 steps of it and less, -2.0 is 7.
    assert codec("int4:8").encode(hidden).hex() == "9334b1"


def test_bfloat16_rounds_to_nearest_even_as_torch_does():
    torch = pytest.importorskip("torch")
    bits = stream(0, "bits").integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    hidden = np.concatenate([bits, ties]).view(np.float32)[None]
    hidden = hidden[:, np.abs(hidden[0]) < 3.38e38]
    theirs = torch.from_numpy(hidden).to(torch.bfloat16).float().numpy()
    ours = codec("bfloat16").decode(codec("bfloat16").encode(hidden), *hidden.shape)
    assert np.array_equal(ours, theirs)


def test_too_large_a_value_names_the_codec_that_holds_it():
    with pytest.raises(WireError, match=r"a value of 70000; .*bfloat16"):
        codec("float16+zstd").encode(np.array([[-7e4, 0]], np.float32))
    with pytest.raises(WireError, match="float32"):
        codec("bfloat16").encode(np.full((1, 1), np.finfo(np.float32).max))


def test_int8_at_its_ends():
    largest = np.finfo(np.float32).max
    hidden = np.array([[0, 0, 0], [largest, -largest, 0], [2**-149, 0, 0]], np.float32)
    assert (error(hidden, "int8") <= codec("int8").error_bound(hidden)).all()
    assert (error(hidden, "int8")[0] == 0).all()
    assert (codec("int8").error_bound(hidden)[0] == 0).all()


def test_int4_rounds_to_half_a_step_of_its_group():
    hidden = np.array([[*[7.0] * 7, 0.4, 700, -149.9, 50.1]], np.float32)
    decoded = codec("int4:8").decode(codec("int4:8").encode(hidden), 1, 11)
    assert decoded.tolist() == [[*[7.0] * 7, 0, 700, -100, 100]]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        *(("float16+gzip", "float16+zlib"), ("int9", "int8"), ("topk:0.2:8+zstd", "topk:0.2:8")),
        # Numbers in another spelling: no other number is meant.
        *(("ecsq:2.50", "ecsq:2.5"), ("topk:.3:08:token", "topk:0.3:8:token")),
        *(("int4:0128", "int4:128"), ("topk:0.1234567:8", "topk:0.123457:8")),
        # None given: an example.
        *(("int4", "int4:64"), ("int4+zlib", "int4:64+zlib"), ("ecsq", "ecsq:1.5")),
        *(("topk", "topk:0.2:8"), ("topk:token", "topk:0.2:8:token"), ("ecsq:2+zstd", "ecsq:2")),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, near: str):
    with pytest.raises(WireError) as caught:
        codec(name)
    assert name in str(caught.value)
    assert f"did you mean {near}?" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("int4:1000000", "int4:GROUP[+zlib|+zstd] (GROUP 8 to 65536)"),
        ("int4:7+zstd", "int4:GROUP[+zlib|+zstd] (GROUP 8 to 65536)"),
        ("topk:2:8", "LEVELS 2 to 256)"),
        ("ecsq:0", "ecsq:STEP (STEP 0.01 to 100)"),
    ],
)
def test_numbers_that_are_wrong_are_told_their_range(name: str, allowed: str):
    with pytest.raises(WireError) as caught:
        codec(name)
    form = name[:4]
    assert caught.value.allowed.startswith(f"{form}:")
    assert caught.value.allowed.endswith(allowed)
    assert caught.value.remedy.startswith(f"mend what follows {form}, as in {form}:")


@pytest.mark.parametrize(
    "name",
    [
        *("", "float16:2", "float16@0123456789abcdef", "float16+", "+zstd", "topk", "topk:0.2"),
        *("topk:0.2:8:", "topk:0.2:8:tokens", "topk:0:8", "topk:1.1:8", "topk:nan:8", "topk:.2:8"),
        *("topk:0.20:8", "topk:0.2:08", "topk:0.2:1", "topk:0.2:257", "topk:0.2:8:token:token"),
        *("int4", "int4:7", "int4:65537", "int4:64:64", "int4:+64", "int4:\u0664"),
        *("ecsq", "ecsq:", "ecsq:0", "ecsq:-1", "ecsq:inf", "ecsq:1.50", "ecsq:1e9", "ecsq:1:1"),
        *("ecsq:1.5@", "ecsq:1.5@0123", "ecsq:1.5+zstd", "int8+zstd+zlib", "int8 ", "x" * 10_000),
    ],
)
def test_a_name_has_one_spelling(name: str):
    for ask in (codec, needs_side):
        with pytest.raises(WireError, match="there is no such codec"):
            ask(name)


def test_side_data_are_asked_for_and_checked():
    fitted, other = side(8), side(9)
    name = f"ecsq:1.5@{fitted.sha256[:16]}"
    assert needs_side(name)
    assert codec(name, fitted).name == name
    for given_ in (None, other):
        with pytest.raises(WireError, match="needs its side data"):
            codec(name, given_)
    with pytest.raises(WireError, match="needs its side data: got none"):
        codec("ecsq:1.5")
    with pytest.raises(WireError, match=r"width 9.*allowed: width 8"):
        codec(name, fitted).encode(activations(width=9))
