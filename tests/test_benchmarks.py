"""What benchmarks compute from what they measure."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from splitfrozen.records import Floats
from splitfrozen.rng import stream
from splitfrozen.wire.codec import codec
from splitfrozen.wire.side import Side

WIDTH = 24


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return import_module


@pytest.fixture(scope="module")
def text() -> list[Floats]:
    """Of two kinds of tokens, whose channels go together; some tokens are louder."""
    draw = stream(0, "text")
    mixed = draw.standard_normal((WIDTH, WIDTH)) * np.geomspace(3, 0.05, WIDTH)
    kinds = 2 * draw.standard_normal((2, WIDTH))
    made = []
    for _ in range(200):
        loud = np.exp2(draw.standard_normal((12, 1)) / 2)
        tokens = kinds[draw.integers(2, size=12)] + loud * draw.laplace(size=(12, WIDTH)) @ mixed.T
        made.append(tokens.astype(np.float32))
    return made


def compared(*scores: tuple[str, float, list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "dataset": "mrpc",
            "method": method,
            "times_less": less,
            "accuracy": sum(each) / len(each),
            "each": each,
        }
        for method, less, each in scores
    ]


def test_losses_are_of_the_same_seed(load: Any) -> None:
    benchmark = load("codec")
    rows = compared(("float32", 1.0, [0.8, 0.7]), ("int8", 4.0, [0.79, 0.72]))
    found = benchmark.losses([{**rows[0], "dataset": "other"}, *rows], "mrpc")
    assert found["int8"] == {
        "codec": "int8",
        "ratio": 4.0,
        "accuracy_loss": -0.005,
        "by_seed": [0.01, -0.02],
    }


def test_losses_are_told_against_nothing_but_float32(load: Any) -> None:
    benchmark = load("codec")
    with pytest.raises(AssertionError):
        benchmark.losses(compared(("float16", 2.0, [0.8]), ("int8", 4.0, [0.8])), "mrpc")
    with pytest.raises(ValueError, match="zip"):
        benchmark.losses(compared(("float32", 1.0, [0.8, 0.8]), ("int8", 4.0, [0.8])), "mrpc")


def test_the_best_is_the_smallest_that_is_good_enough(load: Any) -> None:
    benchmark = load("codec")
    rows = compared(
        ("float32", 1.0, [0.8]), ("a", 20.0, [0.79]), ("b", 30.0, [0.781]), ("c", 40.0, [0.77])
    )
    assert benchmark.best(benchmark.losses(rows, "mrpc"))["codec"] == "b"


def test_the_entropy_of_what_top_k_keeps(load: Any) -> None:
    # A fifth of the values, all of one size, half of them below 0.
    hidden = np.zeros((10, 20), np.float32)
    hidden.ravel()[::5] = np.tile([2.0, -2.0], 20)
    found = load("codec").limits([hidden])
    mask = -(0.2 * np.log2(0.2) + 0.8 * np.log2(0.8))
    assert found["entropy_bits_per_element"] == pytest.approx(mask + 0.2, abs=1e-4)


def test_rounding_is_drawn_anew_only_where_it_is_to_be(load: Any, text: list[Floats]) -> None:
    benchmark = load("dither")
    anew, once = (benchmark.draws("topk:0.2:8", anew=how) for how in (True, False))
    key, hidden = ("device-00", 0), text[0]
    assert not np.array_equal(anew(key, hidden, 1), anew(key, hidden, 2))
    assert np.array_equal(once(key, hidden, 1), once(key, hidden, 2))


def test_dither_is_not_added_to_what_is_never_sent(load: Any, text: list[Floats]) -> None:
    benchmark = load("dither")
    side = Side.fit(text[:150])
    for row in benchmark.dithered(side, text[150:]):
        chosen = codec(f"ecsq:{row['step']:g}", side)
        sent = sum(8 * len(chosen.encode(hidden)) for hidden in text[150:])
        assert row["plain_bits"] == pytest.approx(sent / sum(h.size for h in text[150:]), abs=1e-4)
        # Noise in all channels would add a variance of a twelfth of a step squared to each.
        assert row["plain_error"] < row["dithered_error"] < 1.25 * row["plain_error"]


def bits(benchmark: ModuleType, way: Any, text: list[Floats], error: float) -> float:
    """At an error, between steps."""
    known = benchmark.fitted(way, text[:150])
    points = [benchmark.quantised(way, known, text[150:], step) for step in (0.3, 0.5, 0.8, 1.2)]
    found = sorted((off, size) for size, off in points)
    return float(np.interp(error, *np.array(found).T))


def test_parts_of_a_codec_are_told_by_what_they_buy(load: Any, text: list[Floats]) -> None:
    benchmark = load("transforms")
    # Numbers of centres and gains pay with wider models only.
    for less, more in ((benchmark.PLAIN, benchmark.KLT), (benchmark.GAINS, benchmark.BUILT)):
        assert bits(benchmark, more, text, 0.2) < 0.98 * bits(benchmark, less, text, 0.2)


def test_prediction_pays_where_tokens_are_like_the_one_before(load: Any) -> None:
    benchmark = load("transforms")
    draw = stream(0, "slow")
    steps = draw.standard_normal((200, 12, WIDTH)).cumsum(axis=1)
    text = list(steps.astype(np.float32))
    ahead = benchmark.replace(benchmark.KLT, ahead=True)
    assert bits(benchmark, ahead, text, 0.2) < bits(benchmark, benchmark.KLT, text, 0.2) - 0.3


def test_the_yardstick_is_close_to_what_is_sent(load: Any, text: list[Floats]) -> None:
    benchmark = load("transforms")
    known = benchmark.fitted(benchmark.BUILT, text[:150])
    held = text[150:]
    for step in (0.5, 1.0):
        size, error = benchmark.quantised(benchmark.BUILT, known, held, step)
        sent = load("codec").measure(codec(f"ecsq:{step:g}", known.side), held)
        assert error == pytest.approx(sent["relative_error"], rel=0.01)
        assert size < sent["bits_per_element"]
