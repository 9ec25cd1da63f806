import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfrozen.errors import WireError
from splitfrozen.rng import stream
from splitfrozen.wire.bits import WIDEST, BitReader, BitWriter, Bools, Numbers, most_bits


def ints(values: list[int]) -> Numbers:
    return np.array(values, np.int64)


def entropy(mask: Bools) -> float:
    """Bits of independent booleans with this share of ones."""
    share = np.array([mask.mean(), 1 - mask.mean()])
    return float(-(share * np.log2(share)).sum() * len(mask))


GROUPS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 300)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 2**32))
def test_masks_come_back_within_their_bound(groups: list[tuple[float, int]], seed: int):
    source = stream(seed, "masks")
    mask = np.concatenate([source.random(size) < share for share, size in groups])
    sizes = ints([size for _, size in groups])
    writer = BitWriter()
    writer.masks(mask, sizes)
    payload = writer.to_bytes()
    assert len(payload) <= most_bits(len(mask), len(sizes)) // 8 + 1
    reader = BitReader(payload)
    assert np.array_equal(reader.masks(sizes), mask)
    reader.end()


def test_everything_comes_back_in_order():
    widths = ints([3, 0, WIDEST, 1, 12])
    values = ints([5, 0, 2**WIDEST - 1, 1, 3000])
    writer = BitWriter()
    writer.fields(values, widths)
    writer.bits(np.array([True, False, True]))
    writer.runs(ints([0, 7, 1, 0, 300]))
    writer.masks(np.array([True, False] * 5), ints([10]))
    reader = BitReader(writer.to_bytes())
    assert reader.fields(widths).tolist() == values.tolist()
    assert reader.bits(3).tolist() == [True, False, True]
    assert reader.runs(5, 313).tolist() == [0, 7, 1, 0, 300]
    assert reader.masks(ints([10])).tolist() == [True, False] * 5
    reader.end()


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.2, 0.3, 0.38, 0.45, 0.5, 0.7, 0.9, 0.999])
def test_masks_are_near_their_entropy(share: float):
    mask = stream(0, "mask", repr(share)).random(200_000) < share
    writer = BitWriter()
    writer.masks(mask, ints([len(mask)]))
    over = 8 * len(writer.to_bytes()) / entropy(mask)
    assert over < (1.045 if 0.33 < min(share, 1 - share) < 0.43 else 1.03)
    assert over > 0.99


def test_each_group_has_a_code_of_its_own():
    """Groups of unlike density cost less by themselves than mixed."""
    source = stream(0, "groups")
    mask = np.concatenate([source.random(5000) < 0.02, source.random(5000) < 0.6])
    costs = []
    for sizes in ([5000, 5000], [10000]):
        writer = BitWriter()
        writer.masks(mask, ints(sizes))
        costs.append(len(writer.to_bytes()))
    assert costs[0] < 0.75 * costs[1]


def test_a_group_of_equals_costs_its_count():
    for mask in (np.zeros(1000, np.bool_), np.ones(1000, np.bool_)):
        writer = BitWriter()
        writer.masks(mask, ints([1000]))
        assert len(writer.to_bytes()) == 2


def test_bytes_are_these():
    writer = BitWriter()
    writer.fields(ints([5, 1]), ints([3, 2]))
    writer.runs(ints([2, 0]))
    # 16 values, 4 ones: count 4 in 5 bits, k = 1; runs 1, 0, 4, 3: low bits 1 0 0 1, then 0 0 2 1.
    mask = np.zeros(16, np.bool_)
    mask[[1, 2, 7, 11]] = True
    writer.masks(mask, ints([16]))
    assert "".join(f"{byte:08b}" for byte in writer.to_bytes()) == "".join(
        ["101", "01", "001", "1", "00100", "1001", "1", "1", "001", "01", "0000000"]
    )


@settings(max_examples=300, deadline=None)
@given(payload=st.binary(max_size=60), sizes=st.lists(st.integers(1, 200), min_size=1, max_size=5))
def test_any_bytes_are_a_mask_or_refused(payload: bytes, sizes: list[int]):
    try:
        mask = BitReader(payload).masks(ints(sizes))
    except WireError:
        return
    assert mask.dtype == np.bool_
    assert len(mask) == sum(sizes)
    # What was read is what is written again: no two readings of one mask but in its code.
    writer = BitWriter()
    writer.masks(mask, ints(sizes))
    assert payload.startswith(writer.to_bytes()[:-1])


def test_ends_too_early_or_too_late():
    for read in (
        lambda reader: reader.bits(9),
        lambda reader: reader.fields(ints([4, 5])),
        lambda reader: reader.runs(3, 16),
        lambda reader: reader.runs(2, 1),
        lambda reader: reader.masks(ints([2**20])),
    ):
        with pytest.raises(WireError, match="send the chunk again"):
            read(BitReader(b"\xc0"))
    reader = BitReader(b"\xc0\0")
    reader.bits(8)
    with pytest.raises(WireError, match="8 bits behind"):
        reader.end()
    reader = BitReader(b"\xc1")
    reader.bits(4)
    with pytest.raises(WireError, match="4 bits behind"):
        reader.end()
