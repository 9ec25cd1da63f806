"""How good the adapters are: loss, accuracy, F1, perplexity, exact match of generated answers.

Every mean is over targets (samples, or predicted tokens), never over batches, so the result does
not depend on how the data was batched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from splitfrozen.errors import DataError
from splitfrozen.records import Ints, SampleKey, SampleTable, TaskKind
from splitfrozen.training.batching import split
from splitfrozen.training.precision import autocast

Classes = npt.NDArray[np.int64]
ItemT = TypeVar("ItemT")
ItemIn = TypeVar("ItemIn", contravariant=True)
ItemOut = TypeVar("ItemOut", covariant=True)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured.

    Attributes:
        metrics: by name. Classification and images: loss, accuracy, f1; causal_lm: loss,
            perplexity.
        score: what the best adapter has most of: the accuracy, or minus the loss. Of equal
            accuracies the lower loss wins: it takes a millionth of itself away.
    """

    metrics: dict[str, float]
    score: float


class Predictor(Protocol[ItemIn]):
    """What is evaluated."""

    def logits(self, items: Sequence[ItemIn]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [K, C or V] and int64 [K] for the K targets of `items`, dropout off."""
        ...


class EvaluationSource(Protocol[ItemOut]):
    """What it is evaluated on; an ActivationSource at the cut is one."""

    def samples(self) -> SampleTable: ...
    def read(self, keys: Sequence[SampleKey]) -> Sequence[ItemOut]: ...


class Evaluator(Generic[ItemT]):
    """Measures a predictor on all samples of a source each time it is called."""

    def __init__(
        self,
        predictor: Predictor[ItemT],
        source: EvaluationSource[ItemT],
        kind: TaskKind,
        *,
        micro_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device,
    ) -> None:
        """Take what to measure, and on what.

        Args:
            predictor: its parameters may change between calls.
            source: the evaluation data; it must not change.
            kind: which metrics.
            micro_tokens: bound on the padded tokens that go through the model together.
            dtype: what to compute in.
            device: where the predictor computes.

        Raises:
            DataError: there is nothing to evaluate on.
        """
        self._predictor = predictor
        self._source = source
        self._kind = kind
        self._micro_tokens = micro_tokens
        self._dtype = dtype
        self._device = device
        self._table = source.samples()
        if len(self._table) == 0:
            raise DataError(
                "there is nothing to evaluate on",
                got="no samples",
                allowed="one or more",
                remedy="mend the file in task.eval, or leave it out",
            )

    def __call__(self) -> Evaluation:
        loss, count, classes = 0.0, 0, 0
        labels: list[Classes] = []
        guesses: list[Classes] = []
        for rows in split(self._table.tokens, self._micro_tokens):
            items = self._source.read([self._table.key(row) for row in rows])
            with torch.no_grad(), autocast(self._device, self._dtype):
                logits, targets = self._predictor.logits(items)
                loss += float(functional.cross_entropy(logits.float(), targets, reduction="sum"))
            count += len(targets)
            if self._kind != "causal_lm":
                classes = logits.shape[1]
                labels.append(targets.cpu().numpy())
                guesses.append(logits.argmax(1).cpu().numpy())
        mean = loss / count if count else math.nan
        if self._kind == "causal_lm":
            return Evaluation({"loss": mean, "perplexity": _exp(mean)}, -mean)
        truth, guess = np.concatenate(labels), np.concatenate(guesses)
        accuracy = float((truth == guess).mean())
        metrics = {"loss": mean, "accuracy": accuracy, "f1": f1(truth, guess, classes)}
        return Evaluation(metrics, accuracy - 1e-6 * mean)


def f1(truth: Classes, guess: Classes, classes: int) -> float:
    """F1 of class 1 where there are two classes, else the mean over the classes that occur.

    Args:
        truth: int64 [K] labels.
        guess: int64 [K] predictions.
        classes: C.
    """
    chosen = np.array([1]) if classes == 2 else np.union1d(truth, guess)
    hits = np.array([((truth == c) & (guess == c)).sum() for c in chosen])
    named = np.array([(truth == c).sum() + (guess == c).sum() for c in chosen])
    return float((2 * hits / np.maximum(named, 1)).mean())


def generate(
    model: Any,
    prompts: Sequence[Ints],
    *,
    max_new_tokens: int,
    end: int | None,
    longest: int,
    micro_tokens: int,
) -> list[list[int]]:
    """Continue prompts greedily with the model's own `generate`.

    Args:
        model: a transformers or PEFT causal language model; it is left in evaluation mode.
        prompts: int32 [T] token ids each, T >= 1.
        max_new_tokens: where a continuation is cut.
        end: token that ends a continuation; None where the model has none.
        longest: positions of the model; prompt and continuation take no more.
        micro_tokens: bound on the padded tokens, old and new, that are generated together.

    Returns:
        The new token ids of each prompt, without `end`.
    """
    model.eval()
    replies: list[list[int]] = [[] for _ in prompts]
    rooms = [min(max_new_tokens, longest - len(prompt)) for prompt in prompts]
    for room, group in _groups(prompts, rooms, micro_tokens):
        wide = max(len(prompts[i]) for i in group)
        # On the left, so that every prompt ends where its continuation begins. What is put there
        # is masked, so any token will do.
        padded = np.full((len(group), wide), end or 0, np.int64)
        mask = np.zeros((len(group), wide), np.int64)
        for row, i in enumerate(group):
            padded[row, wide - len(prompts[i]) :] = prompts[i]
            mask[row, wide - len(prompts[i]) :] = 1
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.from_numpy(padded).to(model.device),
                attention_mask=torch.from_numpy(mask).to(model.device),
                max_new_tokens=room,
                do_sample=False,
                num_beams=1,
                pad_token_id=end or 0,
                eos_token_id=end,
            )
        for i, ids in zip(group, output[:, wide:].tolist(), strict=True):
            replies[i] = ids[: ids.index(end)] if end in ids else ids
    return replies


def _groups(
    prompts: Sequence[Ints], rooms: Sequence[int], micro_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Prompts that are continued together, by as many tokens; none where there is no room."""
    for room in sorted({room for room in rooms if room > 0}):
        members = [i for i, own in enumerate(rooms) if own == room]
        for group in split([len(prompts[i]) + room for i in members], micro_tokens):
            yield room, [members[i] for i in group]


def exact_match(texts: Sequence[str], references: Sequence[str], pattern: str) -> float:
    """Share of texts whose answer is that of their reference.

    The answer of a text is the first group of the first match of `pattern`, without spaces around
    it. A text without a match is wrong; a reference without one is its own answer.
    """
    expression = re.compile(pattern)
    right = 0
    for text, reference in zip(texts, references, strict=True):
        answer = _answer(expression, text)
        wanted = _answer(expression, reference)
        right += answer is not None and answer == (reference.strip() if wanted is None else wanted)
    return right / len(texts) if texts else math.nan


def _answer(expression: re.Pattern[str], text: str) -> str | None:
    found = expression.search(text)
    return None if found is None or found.group(1) is None else found.group(1).strip()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
