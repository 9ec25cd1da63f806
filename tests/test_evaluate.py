"""Metrics against numbers worked out by hand, and generation against one prompt at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from splitfrozen.errors import DataError
from splitfrozen.records import SampleKey, SampleTable
from splitfrozen.training.evaluate import Evaluator, exact_match, f1, generate

CPU = torch.device("cpu")


class Known:
    """Predictor and source at once: an item is its id; the logits and targets are given."""

    def __init__(
        self, logits: Sequence[Sequence[Sequence[float]]], targets: list[list[int]]
    ) -> None:
        self.answers = list(zip(map(torch.tensor, logits), map(torch.tensor, targets), strict=True))

    def samples(self) -> SampleTable:
        zeros = np.zeros(len(self.answers), np.int32)
        lengths = np.array([len(targets) for _, targets in self.answers], np.int32)
        ids = np.arange(len(zeros), dtype=np.int32)
        return SampleTable(("a",), zeros, ids, lengths, zeros, zeros)

    def read(self, keys: Sequence[SampleKey]) -> list[int]:
        return [key.sample for key in keys]

    def logits(self, items: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        logits, targets = zip(*(self.answers[item] for item in items), strict=True)
        return torch.cat(logits), torch.cat(targets)


def test_classification_gives_accuracy_f1_and_loss() -> None:
    even = [[0.0, 0.0]]
    sure = [[0.0, 100.0]]
    known = Known([sure, sure, [[100.0, 0.0]], sure, even], [[1], [1], [0], [0], [0]])
    for bound in (1, 2, 100):
        evaluation = Evaluator(known, known, "classification", micro_tokens=bound, device=CPU)()
        assert evaluation.metrics == pytest.approx(
            {"accuracy": 4 / 5, "f1": 4 / 5, "loss": (100 + math.log(2)) / 5}
        )
        # A millionth of the loss decides between equal accuracies.
        assert evaluation.score == 4 / 5 - 1e-6 * evaluation.metrics["loss"]


def test_f1_is_of_class_1_or_the_mean_over_classes_that_occur() -> None:
    truth, guess = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    # Class 0: 1 of 2 named right, 1 of 2 found; class 1: 2 of 3, 2 of 2; class 2: never named.
    assert f1(truth, guess, 3) == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    assert f1(truth, guess, 7) == f1(truth, guess, 3)
    assert f1(np.array([1, 1, 0]), np.array([1, 0, 1]), 2) == pytest.approx(1 / 2)
    assert f1(np.array([0, 0]), np.array([0, 0]), 2) == 0


def test_perplexity_weighs_tokens_not_samples() -> None:
    likely, unlikely = math.log(9), 0.0
    known = Known([[[likely, 0.0]] * 3, [[unlikely, 0.0]]], [[0, 0, 0], [0]])
    loss = (3 * -math.log(0.9) - math.log(0.5)) / 4
    for bound in (1, 3, 100):
        evaluation = Evaluator(known, known, "causal_lm", micro_tokens=bound, device=CPU)()
        assert evaluation.metrics == pytest.approx({"loss": loss, "perplexity": math.exp(loss)})
        assert evaluation.score == pytest.approx(-loss)


def test_perplexity_does_not_look_for_the_likeliest_token() -> None:
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            del types
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    known = Known([[[0.0, 1.0]], [[2.0, 0.0]]], [[0], [1]])
    found = []
    for kind in ("causal_lm", "classification"):
        called: list[str] = []
        with Counting():
            Evaluator(known, known, kind, micro_tokens=1, device=CPU)()
        found.append(called.count("aten.argmax.default"))
    # Over a vocabulary it takes as long as the loss.
    assert found == [0, 2]


def test_a_perplexity_too_large_for_a_float_is_infinite() -> None:
    known = Known([[[0.0, 1000.0]]], [[0]])
    evaluation = Evaluator(known, known, "causal_lm", micro_tokens=9, device=CPU)()
    assert evaluation.metrics == {"loss": 1000.0, "perplexity": math.inf}


def test_nothing_to_evaluate_on_is_an_error() -> None:
    known = Known([], [])
    with pytest.raises(DataError, match="nothing to evaluate on"):
        Evaluator(known, known, "causal_lm", micro_tokens=9, device=CPU)


@pytest.fixture(params=["gpt2-causal_lm", "llama-causal_lm"])
def model(request: pytest.FixtureRequest, tiny: Callable[..., Any]) -> Any:
    return tiny(request.param)


PROMPTS = [np.array(ids, np.int32) for ids in ([5], [9, 8, 7, 6, 5, 4], [11, 12], [30, 31, 32])]


def greedy(model: Any, prompt: np.ndarray, new: int, end: int | None) -> list[int]:
    """One prompt, one token at a time, without padding or cache."""
    ids = prompt.tolist()
    for _ in range(new):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == end:
            break
        ids.append(best)
    return ids[len(prompt) :]


@pytest.mark.parametrize("micro_tokens", [1, 30, 1000])
def test_generation_in_batches_is_that_of_each_prompt(model: Any, micro_tokens: int) -> None:
    alone = [greedy(model, prompt, 8, None) for prompt in PROMPTS]
    together = generate(
        model, PROMPTS, max_new_tokens=8, end=None, longest=64, micro_tokens=micro_tokens
    )
    assert together == alone
    assert [len(reply) for reply in together] == [8] * 4


def test_generation_ends_at_the_end_token(model: Any) -> None:
    end = greedy(model, PROMPTS[1], 8, None)[3]
    expected = [greedy(model, prompt, 8, end) for prompt in PROMPTS]
    replies = generate(model, PROMPTS, max_new_tokens=8, end=end, longest=64, micro_tokens=1000)
    assert replies == expected
    assert len(replies[1]) < 8
    assert not any(end in reply for reply in replies)


def test_generation_ends_where_the_positions_do(model: Any) -> None:
    lengths = [min(8, max(0, 9 - len(prompt))) for prompt in PROMPTS]
    expected = [greedy(model, prompt, n, None) for prompt, n in zip(PROMPTS, lengths, strict=True)]
    replies = generate(model, PROMPTS, max_new_tokens=8, end=None, longest=9, micro_tokens=1000)
    assert replies == expected
    too_long = [np.arange(9, dtype=np.int32)]
    assert generate(model, too_long, max_new_tokens=8, end=None, longest=9, micro_tokens=1000) == [
        []
    ]


def test_no_prompts_give_no_replies(model: Any) -> None:
    assert generate(model, [], max_new_tokens=8, end=None, longest=9, micro_tokens=9) == []


def test_exact_match_compares_the_first_answer_with_the_references() -> None:
    texts = ["so #### 12 ", "it is #### 7\n#### 8", "no idea", "#### 3", "#### 5"]
    references = ["sum #### 12", "#### 8", "#### 1", "3", " 6 "]
    assert exact_match(texts, references, r"#### *(-?\d+)") == 2 / 5
    assert math.isnan(exact_match([], [], "(x)"))
    assert exact_match(["b"], ["b"], "a|(b)") == 1
    assert exact_match(["a"], ["a"], "a|(b)") == 0
