import numpy as np
import pytest

from splitfrozen.errors import WireError
from splitfrozen.records import Floats
from splitfrozen.rng import stream
from splitfrozen.wire.codec import codec
from splitfrozen.wire.topk import TopK

PAPER = TopK(rate=0.2, levels=8, per_token=False)


def hidden_(tokens: int = 55, width: int = 384, seed: int = 0) -> Floats:
    return stream(seed, "topk-test").normal(size=(tokens, width)).astype(np.float32)


def decoded(form: TopK, hidden: Floats) -> Floats:
    return form.decode(form.encode(hidden), *hidden.shape)


def entropy(values: np.ndarray) -> float:
    """Bits of all values, if they are independent and their shares are known."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def test_keeps_the_largest_of_all_or_of_each_token():
    hidden = hidden_() * np.linspace(0.1, 3, 55, dtype=np.float32)[:, None]
    count = round(0.2 * hidden.size)
    for per_token in (False, True):
        kept = decoded(TopK(0.2, 8, per_token), hidden) != 0
        if per_token:
            assert (kept.sum(axis=1) == round(0.2 * 384)).all()
            least, rest = np.where(kept, np.abs(hidden), np.inf), np.where(kept, 0, np.abs(hidden))
            assert (least.min(axis=1) > rest.max(axis=1)).all()
        else:
            assert kept.sum() == count
            assert np.abs(hidden[kept]).min() > np.abs(hidden[~kept]).max()


def test_of_equals_the_first_are_kept():
    hidden = np.array([[1, -1, 1, 2], [1, 1, -2, 1]], np.float32)
    assert decoded(TopK(0.5, 2, False), hidden).tolist() == [[1, -1, 0, 2], [0, 0, -2, 0]]
    assert decoded(TopK(0.5, 2, True), hidden).tolist() == [[1, 0, 0, 2], [1, 0, -2, 0]]


def test_levels_are_equal_steps_from_the_least_to_the_greatest_kept():
    hidden = hidden_()
    values = decoded(PAPER, hidden)
    sizes = np.unique(np.abs(values[values != 0]))
    kept = np.abs(hidden[values != 0])
    assert np.allclose(sizes, np.linspace(kept.min(), kept.max(), 8), rtol=1e-6)
    assert (np.sign(values) == np.where(values != 0, np.sign(hidden), 0)).all()


@pytest.mark.parametrize(
    "chosen", [PAPER, TopK(0.2, 8, True), TopK(0.5, 2, False), TopK(0.3, 200, False)], ids=str
)
def test_rounding_is_unbiased(chosen: TopK):
    """The mean over draws tends to what was kept: within 4.5 standard errors for every value.

    Other content is rounded anew, also where it differs in a value that is not kept.
    """
    hidden = hidden_(20, 50)
    draws = 600
    least = np.unravel_index(np.abs(hidden).argmin(), hidden.shape)
    values = np.empty((draws, *hidden.shape))
    for draw in range(draws):
        hidden[least] = draw * 1e-9
        values[draw] = decoded(chosen, hidden)
    kept = values[0] != 0
    assert ((values != 0) == kept).all()
    assert not kept[least]
    step = np.ptp(np.abs(values[:, kept])) / (chosen.levels - 1)
    # Of a value at x between two levels: variance x (1 - x) steps squared, a quarter at most.
    x = (np.abs(hidden[kept]) - np.abs(values[:, kept]).min()) / step % 1
    standard = np.sqrt(np.maximum(x * (1 - x), 1e-3) / draws) * step
    off = (values.mean(axis=0) - hidden)[kept] / standard
    assert np.abs(off).max() < 4.5
    assert 0.8 < off.std() < 1.2
    assert abs(off.mean()) < 4.5 / np.sqrt(kept.sum())


def test_the_same_values_are_rounded_the_same_way():
    hidden = hidden_()
    assert PAPER.encode(hidden) == PAPER.encode(hidden.copy())
    assert codec("topk:0.2:8").encode(hidden) == PAPER.encode(hidden)
    # Another content is rounded independently: of a value in both, in some cases otherwise.
    other = hidden.copy()
    other[0, 0] += np.float32(1e-3)
    same = decoded(PAPER, hidden)[1:] == decoded(PAPER, other)[1:]
    assert 0.02 < 1 - same.mean() < 0.2


@pytest.mark.parametrize("shape", [(55, 384), (26, 384)])
@pytest.mark.parametrize("per_token", [False, True])
def test_within_five_percent_of_the_entropy(shape: tuple[int, int], per_token: bool):
    total, least = 0, 0.0
    for seed in range(5):
        hidden = hidden_(*shape, seed)
        hidden[:, 7] *= 6
        values = decoded(TopK(0.2, 8, per_token), hidden)
        kept = values[values != 0]
        total += 8 * len(TopK(0.2, 8, per_token).encode(hidden))
        least += entropy(values != 0) + entropy(np.abs(kept)) + len(kept)
    assert 1 < total / least < 1.05
    assert 32 * 5 * hidden.size / total > 20


def test_bytes_are_these():
    hidden = np.array([[4, 0.1, -1, 0.2], [0.3, 2.5, 0.1, -0.2]], np.float32)
    form = TopK(0.375, 4, False)
    payload = form.encode(hidden)
    # Sizes from 1 to 4. Mask 0011 010 1101: 3 ones of 8, k = 1, runs 0, 1, 2. Then levels, signs.
    assert payload.hex() == "0000803f0000804035b668"
    assert form.decode(payload, 2, 4).tolist() == [[4, 0, -1, 0], [0, 3, 0, 0]]


@pytest.mark.parametrize(
    ("payload", "what"),
    [
        (b"", "8 or more"),
        (np.array([2, 1], "<f4").tobytes() + bytes(8), "least <= greatest"),
        (np.array([-1, 1], "<f4").tobytes() + bytes(8), "least <= greatest"),
        (np.array([0, np.inf], "<f4").tobytes() + bytes(8), "least <= greatest"),
        (np.array([np.nan, 1], "<f4").tobytes() + bytes(8), "least <= greatest"),
        (np.array([0, 1], "<f4").tobytes() + bytes(8), "0 kept values; allowed: 3"),
    ],
)
def test_refuses_what_no_encoder_writes(payload: bytes, what: str):
    with pytest.raises(WireError, match=what):
        TopK(0.375, 4, False).decode(payload, 2, 4)


@pytest.mark.parametrize("levels", [2, 8, 256])
def test_bytes_are_bounded_where_masks_are_dearest(levels: int):
    """0.38 of all are kept, and of each bit of a level as many are 1: runs cost most there."""
    source = stream(levels, "dearest")
    form = TopK(0.38, levels, False)
    for tokens in (1, 2, 5, 40):
        mask = np.zeros(tokens * 97, np.bool_)
        mask[source.permutation(mask.size)[: round(0.38 * mask.size)]] = True
        bits = source.random((mask.size, (levels - 1).bit_length())) < 0.38
        sizes = (bits @ (1 << np.arange(bits.shape[1])) + 1) * mask
        hidden = sizes.astype(np.float32).reshape(tokens, 97)
        size, most = len(form.encode(hidden)), form.most_bytes(*hidden.shape)
        assert size <= most < 1.3 * size + 40


def test_refuses_a_level_beyond_the_last():
    hidden = np.array([[1, 2, 3, 4, 0, 0]], np.float32)
    with pytest.raises(WireError, match=r"level 3; allowed: 0\.\.2"):
        TopK(0.666, 3, False).decode(TopK(0.666, 4, False).encode(hidden), 1, 6)
