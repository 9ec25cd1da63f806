import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfrozen.data.partition import dirichlet, iid
from splitfrozen.errors import RequestError
from splitfrozen.records import Ints


def assert_cover(split: list[Ints], count: int) -> None:
    """Every index once, no part empty, each part sorted."""
    assert all(part.dtype == np.int32 for part in split)
    assert all(len(part) > 0 for part in split)
    assert all((np.diff(part) > 0).all() for part in split)
    assert sorted(np.concatenate(split).tolist()) == list(range(count))


def skew(split: list[Ints], labels: Ints) -> float:
    """Mean distance of the parts' class shares from the whole's: 0 without skew."""
    classes = np.unique(labels)
    whole = np.array([(labels == c).mean() for c in classes])
    shares = [np.array([(labels[part] == c).mean() for c in classes]) for part in split]
    return float(np.mean([np.abs(share - whole).sum() / 2 for share in shares]))


LABELS = np.tile(np.arange(4, dtype=np.int32), 500)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 200), parts=st.integers(1, 200), seed=st.integers(0, 99))
def test_iid_covers_evenly(count: int, parts: int, seed: int):
    parts = min(parts, count)
    split = iid(count, parts, seed)
    assert len(split) == parts
    assert_cover(split, count)
    sizes = [len(part) for part in split]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=100),
    parts=st.integers(1, 100),
    alpha=st.floats(1e-300, 1e6),
    seed=st.integers(0, 99),
)
def test_dirichlet_covers_at_any_alpha(labels: list[int], parts: int, alpha: float, seed: int):
    parts = min(parts, len(labels))
    split = dirichlet(labels, parts, alpha, seed)
    assert len(split) == parts
    assert_cover(split, len(labels))


def test_no_part_is_empty_under_strong_skew():
    labels = np.tile(np.array([0, 1], np.int32), 50)
    for seed in range(200):
        assert_cover(dirichlet(labels, 10, 0.1, seed), 100)


def test_same_seed_same_split_other_seed_another():
    def text(split: list[Ints]) -> list[list[int]]:
        return [part.tolist() for part in split]

    assert text(iid(100, 7, 1)) == text(iid(100, 7, 1)) != text(iid(100, 7, 2))
    first = text(dirichlet(LABELS, 10, 0.5, 1))
    assert first == text(dirichlet(LABELS, 10, 0.5, 1)) == text(dirichlet(list(LABELS), 10, 0.5, 1))
    assert first != text(dirichlet(LABELS, 10, 0.5, 2))


def test_skew_grows_as_alpha_falls():
    def mean(alpha: float) -> float:
        return float(np.mean([skew(dirichlet(LABELS, 10, alpha, s), LABELS) for s in range(10)]))

    skews = [mean(alpha) for alpha in (100.0, 10.0, 1.0, 0.1)]
    assert skews == sorted(skews)
    assert skews[0] < 0.1
    assert skews[-1] > 0.5
    assert skew(iid(len(LABELS), 10, 0), LABELS) < 0.1


@pytest.mark.parametrize(("count", "parts"), [(3, 4), (0, 1), (3, 0), (3, -1)])
def test_refuses_more_parts_than_samples(count: int, parts: int):
    with pytest.raises(RequestError, match=f"{count} samples for {parts} parts"):
        iid(count, parts, 0)
    with pytest.raises(RequestError, match=f"{count} samples for {parts} parts"):
        dirichlet([0] * count, parts, 1.0, 0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_bad_alpha(alpha: float):
    with pytest.raises(RequestError, match="above 0"):
        dirichlet([0, 1], 2, alpha, 0)
