import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfrozen.errors import WireError
from splitfrozen.records import Floats
from splitfrozen.rng import stream
from splitfrozen.wire.ecsq import LARGEST, LAYERS, Ecsq
from splitfrozen.wire.side import Side

WIDTH = 48


def text(seed: int, tokens: int = 60) -> Floats:
    """Tokens of 30 kinds, each kind with a centre, and in a basis of falling spread."""
    fixed = stream(0, "kinds")
    kinds = fixed.normal(size=(30, WIDTH)) * 2
    basis = np.linalg.qr(fixed.normal(size=(WIDTH, WIDTH)))[0]
    source = stream(seed, "text")
    own = source.normal(size=(tokens, WIDTH)) * np.geomspace(2, 0.02, WIDTH)
    return (kinds[source.integers(0, 30, tokens)] + own @ basis + 1).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> Side:
    return Side.fit(text(seed) for seed in range(40))


def bits(form: Ecsq, hidden: Floats) -> float:
    return 8 * len(form.encode(hidden)) / hidden.size


def relative_error(form: Ecsq, hidden: Floats) -> float:
    off = form.decode(form.encode(hidden), *hidden.shape) - hidden
    return float(np.linalg.norm(off) / np.linalg.norm(hidden - hidden.mean(axis=0)))


# --- side data -----------------------------------------------------------------------------------


def test_the_basis_takes_correlation_out(fitted: Side):
    assert fitted.basis.shape == (WIDTH, WIDTH)
    assert np.allclose(fitted.basis.T @ fitted.basis, np.eye(WIDTH), atol=5e-3)
    hidden = np.concatenate([text(seed) for seed in range(100, 140)])
    coefficients = fitted.forward(hidden)
    assert np.allclose(fitted.backward(coefficients), hidden, atol=2e-2)
    assert 0.9 < (coefficients - coefficients.mean(axis=0)).var(axis=0).mean() < 1.1
    left = coefficients - fitted.centres[_nearest(coefficients, fitted.centres)]
    covariance = left.T @ left / len(left)
    spreads = np.exp2(fitted.spreads.astype(np.float64))
    # Half octaves: within a quarter octave of the spread, so a factor of 1.42 of the variance.
    assert (np.abs(np.log2(np.diag(covariance) / spreads)) < 0.9).all()
    correlation = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert np.abs(correlation - np.eye(WIDTH)).max() < 0.25
    assert (np.diff(fitted.spreads) <= 0).all()


def _nearest(rows: Floats, centres: Floats) -> np.ndarray:
    return np.square(rows[:, None] - centres[None]).sum(axis=2).argmin(axis=1)


def test_centres_are_of_the_kinds(fitted: Side):
    """2400 tokens allow 150 centres, which explain what 30 kinds do."""
    assert len(fitted.centres) == 150
    hidden = text(500)
    coefficients = fitted.forward(hidden)
    left = coefficients - fitted.centres[_nearest(coefficients, fitted.centres)]
    mean = coefficients - coefficients.mean(axis=0)
    assert np.square(left).sum() < 0.4 * np.square(mean).sum()
    one = Side.fit((text(seed) for seed in range(40)), centres=1)
    assert one.centres.shape == (1, WIDTH)
    every = np.concatenate([text(seed) for seed in range(40)]).mean(axis=0)
    assert np.allclose(one.backward(one.centres)[0], every, atol=1e-2)


def test_side_data_come_back(fitted: Side):
    data = fitted.to_bytes()
    again = Side.from_bytes(data)
    assert again.to_bytes() == data
    assert again.sha256 == fitted.sha256
    hidden = text(7)
    assert Ecsq(0.5, again).encode(hidden) == Ecsq(0.5, fitted).encode(hidden)
    assert Side.fit(text(seed) for seed in range(40)).to_bytes() == data
    assert Side.fit(text(seed) for seed in range(39)).sha256 != fitted.sha256


@pytest.mark.parametrize("width", [1, 3])
def test_fits_few_tokens_and_equal_ones(width: int):
    for hidden in (np.ones((1, width), np.float32), np.zeros((5, width), np.float32)):
        form = Ecsq(1, Side.fit([hidden]))
        assert np.allclose(form.decode(form.encode(hidden), *hidden.shape), hidden, atol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_to_fit_what_is_not_finite(value: float):
    hidden = text(0)
    hidden[5, 7] = value
    with pytest.raises(WireError, match=r"not finite.*public rows"):
        Side.fit([text(1), hidden])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_side_data_are_read_or_refused(fitted: Side, data: st.DataObject):
    damaged = bytearray(fitted.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, 40))] = data.draw(st.integers(0, 255))
    try:
        side = Side.from_bytes(bytes(damaged))
    except WireError:
        return
    assert np.isfinite(side.basis).all()
    assert 0 < side.unit < np.inf


def test_side_data_of_another_length_are_refused(fitted: Side):
    data = fitted.to_bytes()
    huge = data[:4] + np.array([65536, 65536], "<u4").tobytes() + data[12:]
    for wrong in (b"", data[:15], data[:-1], data + b"\0", huge, b"PK\3\4" + data[4:]):
        with pytest.raises(WireError, match="side data are not what they should be"):
            Side.from_bytes(wrong)


# --- the codec -----------------------------------------------------------------------------------


def test_a_larger_step_is_fewer_bits_and_more_error(fitted: Side):
    hidden = text(1000, 200)
    forms = [Ecsq(step, fitted) for step in (0.05, 0.2, 0.5, 1, 1.5)]
    sizes = [bits(form, hidden) for form in forms]
    errors = [relative_error(form, hidden) for form in forms]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert sizes[0] > 3 > 0.6 > sizes[-1]
    assert errors[0] < 0.03
    assert 0.2 < errors[-1] < 0.5


def test_beats_independent_channels_by_what_the_basis_and_the_centres_give(fitted: Side):
    """Against the entropy of a plain quantiser of centred channels, at no larger an error."""
    hidden = text(1001, 300)
    centred = hidden - hidden.mean(axis=0)
    form = Ecsq(0.4, fitted)
    step = np.float32(0.7)
    plain = np.rint(centred / step)
    error = np.linalg.norm(plain * step - centred) / np.linalg.norm(centred)
    entropy = 0.0
    for channel in plain.T:
        share = np.unique(channel, return_counts=True)[1] / len(channel)
        entropy -= float((share * np.log2(share)).sum()) / WIDTH
    assert relative_error(form, hidden) < error
    assert bits(form, hidden) < 0.6 * entropy


def test_coefficients_are_at_most_a_step_off(fitted: Side):
    hidden = text(3, 100)
    form = Ecsq(0.25, fitted)
    off = fitted.forward(form.decode(form.encode(hidden), *hidden.shape)) - fitted.forward(hidden)
    assert np.abs(off).max() < 0.25
    assert np.abs(off).max() > 0.125


def test_loud_tokens_and_quiet_ones_have_codes_of_their_own(fitted: Side):
    """Fewer bits than the entropy of each channel over all tokens."""
    source = stream(0, "loud")
    loudness = np.where(np.arange(400) % 2, 4, 0.25)[:, None]
    left = source.normal(size=(400, WIDTH)) * np.exp2(fitted.spreads / 2) * loudness
    hidden = fitted.backward(left.astype(np.float32))
    form = Ecsq(0.4, dataclasses.replace(fitted, centres=np.zeros((1, WIDTH), np.float32)))
    decoded = fitted.forward(form.decode(form.encode(hidden), *hidden.shape))
    entropy = 0.0
    for channel in np.rint(decoded / 0.4).T:
        share = np.unique(channel, return_counts=True)[1] / len(channel)
        entropy -= float((share * np.log2(share)).sum()) / WIDTH
    assert bits(form, hidden) < 0.92 * entropy


def test_outliers_are_carried_beyond_the_layers(fitted: Side):
    hidden = text(5)
    hidden[3, 4] = 3e4
    form = Ecsq(0.5, fitted)
    values = form.decode(form.encode(hidden), *hidden.shape)
    assert np.abs(fitted.forward(hidden)).max() > 100 * LAYERS * form.step
    assert (np.abs(values - hidden) <= form.bound(hidden)).all()
    assert abs(values[3, 4] - 3e4) < 30
    with pytest.raises(WireError, match=f"too large for ecsq.*below {LARGEST} steps"):
        form.encode(hidden * np.float32(1e6))


@pytest.mark.parametrize("largest", [1e-3, 1, 1e3, 1e5])
def test_bytes_are_bounded_whatever_comes(fitted: Side, largest: float):
    hidden = stream(0, "any").uniform(-largest, largest, (30, WIDTH)).astype(np.float32)
    form = Ecsq(0.1, fitted)
    assert len(form.encode(hidden)) <= form.most_bytes(*hidden.shape)


def test_the_bound_is_one_for_all_side_data(fitted: Side):
    """Chunks are planned by it, and are the same after a device has changed its depth."""
    one = dataclasses.replace(fitted, centres=fitted.centres[:1])
    assert Ecsq(0.1, one).most_bytes(30, WIDTH) == Ecsq(0.1, fitted).most_bytes(30, WIDTH)


def golden_side() -> Side:
    """The identity, two centres, spreads of 1, 1, 1/2 and 1/8."""
    centres = np.array([[0, 0, 0, 0], [8, 0, -8, 0]], np.float32)
    spreads = np.array([0, 0, -2, -6], np.int8)
    return Side(np.eye(4, dtype=np.float32), np.float32(2), centres, spreads)


def test_bytes_are_these():
    side = golden_side()
    assert side.sha256[:16] == "50864d05bb118ccb"
    hidden = np.array([[0.2, -2.2, 1.1, 0.1], [18.1, 0.3, -16.2, 0], [0, 60, 0, 0]], np.float32)
    payload = Ecsq(0.5, side).encode(hidden)
    # Centres 0 1 0; gains 0, -1 and 7, which is 8: 3 and 5 more; then masks, signs and sizes.
    assert payload.hex() == "51f2951a93a7fe6c00"
    assert Ecsq(0.5, side).decode(payload, 3, 4).tolist() == [
        pytest.approx([0, -1.93, 0.93, 0]),
        pytest.approx([17.93, 0, -16, 0]),
        pytest.approx([0, 59.93, 0, 0]),
    ]


@pytest.mark.parametrize(
    ("payload", "what"),
    [(b"", "0 bits"), (b"\0", "5 bits"), (b"\0" * 40, "behind the last number")],
)
def test_refuses_what_no_encoder_writes(payload: bytes, what: str):
    with pytest.raises(WireError, match=what):
        Ecsq(0.5, golden_side()).decode(payload, 3, 4)


def test_refuses_a_centre_that_is_not_there():
    side = golden_side()
    three = dataclasses.replace(side, centres=np.concatenate([side.centres, side.centres[:1]]))
    with pytest.raises(WireError, match=r"centre 3; allowed: 0\.\.2"):
        Ecsq(0.5, three).decode(b"\xff" * 20, 3, 4)
