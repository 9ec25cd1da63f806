"""What every codec promises. A new row of the table in `wire.codec` is picked up by itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitfrozen.errors import WireError
from splitfrozen.records import Codec, Floats
from splitfrozen.rng import stream
from splitfrozen.wire.codec import CODECS, MAX_HIDDEN_BYTES, codec

LOSSLESS = {"float32", "float32+zlib", "float32+zstd"}
PLAIN = [name for name in CODECS if "+" not in name]
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
FINITE = {"width": 32, "allow_nan": False, "allow_infinity": False}
LARGE = 65504.0
"""Largest value that every codec can carry."""


def tensors(largest: float) -> st.SearchStrategy[Floats]:
    """Tokens of any size: subnormal, zero and up to `largest`, each token with its own scale."""
    values = st.floats(-largest, largest, **FINITE)
    tiny = st.floats(-(2.0**-120), 2.0**-120, **FINITE)
    return hnp.arrays(np.float32, SHAPES, elements=st.one_of(values, tiny, st.just(0.0)))


def activations(seed: int = 0, tokens: int = 40, width: int = 64) -> Floats:
    """Roughly what blocks put out: normal values, channels of unlike scale, one outlier."""
    source = stream(seed, "activations")
    hidden = source.normal(size=(tokens, width)) * source.uniform(0.1, 2.0, width)
    hidden[:, 3] += 20
    return hidden.astype(np.float32)


def error(hidden: Floats, name: str) -> np.ndarray:
    """|decode(encode(hidden)) - hidden| in float64, which holds it exactly enough."""
    chosen = codec(name)
    decoded = chosen.decode(chosen.encode(hidden), *hidden.shape)
    return np.abs(decoded.astype(np.float64) - hidden.astype(np.float64))


def test_the_table_is_complete():
    formats = ("float32", "float16", "bfloat16", "int8")
    assert set(CODECS) >= {form + end for form in formats for end in ("", "+zlib", "+zstd")}
    assert len(set(CODECS)) == len(CODECS)


@pytest.mark.parametrize("name", CODECS)
def test_names_itself_and_what_stores_the_lifted(name: str):
    chosen: Codec = codec(name)
    assert chosen.name == name
    assert chosen.lifted in PLAIN
    assert codec(chosen.lifted).lifted == chosen.lifted


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=150, deadline=None)
@given(hidden=tensors(LARGE))
def test_error_is_within_the_bound(name: str, hidden: Floats):
    bound = codec(name).error_bound(hidden)
    assert np.broadcast_shapes(bound.shape, hidden.shape) == hidden.shape
    assert (error(hidden, name) <= bound).all()


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=150, deadline=None)
@given(hidden=tensors(2.0**127))
def test_error_is_within_the_bound_or_the_value_is_refused(name: str, hidden: Floats):
    if name == "float16" and np.abs(hidden).max() >= 65520:
        with pytest.raises(WireError, match="bfloat16"):
            codec(name).encode(hidden)
    else:
        assert (error(hidden, name) <= codec(name).error_bound(hidden)).all()


@pytest.mark.parametrize("name", CODECS)
def test_bound_is_reached(name: str):
    hidden = activations(tokens=200)
    bound = np.broadcast_to(codec(name).error_bound(hidden), hidden.shape)
    seen = error(hidden, name)
    if name in LOSSLESS:
        assert (bound == 0).all()
        return
    assert (seen > 0).any()
    assert (seen >= bound / 2).any()


@pytest.mark.parametrize("name", CODECS)
def test_promised_bytes(name: str):
    noise = stream(0, "noise").integers(0, 2**32, (61, 4099), dtype=np.uint32)
    noise &= 0xBFFFFFFF  # below 2, so finite
    hidden = noise.view(np.float32)
    assert len(codec(name).encode(hidden)) <= codec(name).most_bytes(*hidden.shape)
    if "+" not in name:
        assert len(codec(name).encode(hidden)) == codec(name).most_bytes(*hidden.shape)
    one = np.ones((1, 1), np.float32)
    assert len(codec(name).encode(one)) <= codec(name).most_bytes(1, 1)


@pytest.mark.parametrize("name", PLAIN)
def test_compression_acts(name: str):
    hidden = activations(tokens=100, width=384)
    plain = codec(name).encode(hidden)
    for method in ("zlib", "zstd"):
        packed = codec(f"{name}+{method}").encode(hidden)
        assert len(packed) < 0.96 * len(plain)
        assert packed != plain
        same = codec(f"{name}+{method}").decode(packed, 100, 384)
        assert np.array_equal(same, codec(name).decode(plain, 100, 384))


@pytest.mark.parametrize("name", CODECS)
def test_same_input_same_bytes_whatever_the_memory_layout(name: str):
    hidden = activations()
    strided = np.asfortranarray(hidden)
    assert codec(name).encode(hidden) == codec(name).encode(strided)
    assert codec(name).encode(hidden) != codec(name).encode(hidden + 1)


@pytest.mark.parametrize("name", CODECS)
def test_decodes_a_view_into_memory_of_its_own(name: str):
    hidden = activations()
    payload = bytearray(b"xyz" + codec(name).encode(hidden) + b"xyz")
    decoded = codec(name).decode(memoryview(payload)[3:-3], *hidden.shape)
    assert decoded.dtype == np.float32
    assert decoded.shape == hidden.shape
    assert decoded.flags.writeable
    before = decoded.copy()
    payload[:] = bytes(len(payload))
    assert np.array_equal(decoded, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", CODECS)
def test_refuses_to_encode_what_is_not_finite(name: str, value: float):
    hidden = activations()
    hidden[5, 7] = value
    with pytest.raises(WireError, match="got 1 such values of 2560"):
        codec(name).encode(hidden)


@pytest.mark.parametrize("name", CODECS)
def test_refuses_a_wrong_length(name: str):
    hidden = activations()
    payload = codec(name).encode(hidden)
    tokens, width = hidden.shape
    for wrong in (payload[:-1], payload + b"\0", b"", payload[: len(payload) // 2], payload * 2):
        with pytest.raises(WireError):
            codec(name).decode(wrong, tokens, width)
    for shape in ((tokens + 1, width), (tokens, width - 1)):
        with pytest.raises(WireError):
            codec(name).decode(payload, *shape)


@pytest.mark.parametrize("shape", [(2**40, 1), (1, 2**62), (0, 8), (8, 0), (-1, -1), (4097, 4096)])
@pytest.mark.parametrize("name", CODECS)
def test_refuses_an_impossible_shape(name: str, shape: tuple[int, int]):
    with pytest.raises(WireError, match=str(MAX_HIDDEN_BYTES)):
        codec(name).decode(b"\0" * 64, *shape)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_payloads_decode_to_finite_numbers_or_are_refused(name: str, data: st.DataObject):
    payload = bytearray(codec(name).encode(activations(tokens=3, width=8)))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = codec(name).decode(bytes(payload), 3, 8)
    except WireError:
        return
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("float32", np.array([[1, np.nan]], "<f4").tobytes()),
        ("float16", np.array([[np.inf, 1]], "<f2").tobytes()),
        ("bfloat16", np.array([[0x7F80, 0]], "<u2").tobytes()),
        ("int8", np.array([np.inf], "<f4").tobytes() + b"\1\1"),
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


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(WireError, match=r"'float16\+gzip'.*did you mean float16\+zlib"):
        codec("float16+gzip")
