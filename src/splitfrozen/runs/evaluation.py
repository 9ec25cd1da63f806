"""Evaluation data: lifted to the cut once, then read like any other activations."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from tokenizers import Tokenizer

from splitfrozen.data.inputs import model_inputs
from splitfrozen.data.readers import BadRow, read_rows
from splitfrozen.data.tasks import build_samples, encode_prompt
from splitfrozen.errors import DataError
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import PROTOCOL, EncodedSample, FrameHeader, Ints, Prepared, Sample
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.prepare import open_tokenizer
from splitfrozen.server.store import Store
from splitfrozen.training.batching import split
from splitfrozen.training.evaluate import Evaluation, exact_match, generate
from splitfrozen.wire.codec import codec

log = logging.getLogger("splitfrozen.evaluation")

PART = 256
"""Samples that are computed and stored together."""

NEW_TOKENS = 256


def fill(
    store: Store, source: str, run: RunFolder, prepared: Prepared, sliced: SlicedModel
) -> None:
    """Store the activations of `source` at the cut; parts that are there already are not computed.

    Raises DataError where the file cannot be read or has no good row.
    """
    task = prepared.task
    rows = read_rows(source, task.columns, report=_log_bad_row)
    samples = build_samples(rows, task, open_tokenizer(run, prepared), report=_log_bad_row)
    known = store.chunks("evaluation")
    cut, micro_tokens = run.config.model.cut, run.config.train.micro_tokens
    index = -1
    for index, part in enumerate(_parts(samples)):
        if index not in known:
            encoded = embed(sliced, part, cut, micro_tokens)
            store.add(_header(prepared, cut, index, encoded), "0" * 64, encoded)
    if index < 0:
        raise DataError(
            f"{source} has no usable row",
            got="no good row",
            allowed="one or more",
            remedy="see the rows reported in the log",
        )


def embed(
    sliced: SlicedModel, samples: list[Sample], cut: int, micro_tokens: int
) -> list[EncodedSample]:
    """Run front(cut) in float32, without padding in what comes out."""
    front = sliced.front(cut)
    exact = codec("float32")
    encoded: dict[int, EncodedSample] = {}
    for group in split([sample.length for sample in samples], micro_tokens):
        members = [samples[i] for i in group]
        arrays = model_inputs(members, sliced.inputs)
        tensors = [torch.from_numpy(array).to(sliced.model.device) for array in arrays]
        with torch.no_grad():
            hidden = front(*tensors).cpu().numpy()
        for sample, row in zip(members, hidden, strict=True):
            payload = exact.encode(np.ascontiguousarray(row[: sample.length]))
            encoded[sample.id] = EncodedSample(sample.id, sample.length, sample.targets, payload)
    return [encoded[sample.id] for sample in samples]


def with_answers(
    evaluate: Callable[[], Evaluation],
    source: str,
    run: RunFolder,
    prepared: Prepared,
    model: object,
    longest: int,
) -> Callable[[], Evaluation]:
    """Add the exact match of generated answers, where the task asks for it."""
    task = run.config.task
    if task.answer is None:
        return evaluate
    tokenizer = open_tokenizer(run, prepared)
    assert tokenizer is not None
    prompts, references = prompts_of(source, task.answer_samples, prepared, tokenizer)
    pattern = task.answer

    def both() -> Evaluation:
        found = evaluate()
        replies = generate(
            model,
            prompts,
            max_new_tokens=NEW_TOKENS,
            end=prepared.task.end,
            longest=longest,
            micro_tokens=run.config.train.micro_tokens,
        )
        texts = [tokenizer.decode(reply) for reply in replies]
        match = exact_match(texts, references, pattern)
        return dataclasses.replace(found, metrics={**found.metrics, "exact_match": match})

    return both


def prompts_of(
    source: str, count: int, prepared: Prepared, tokenizer: Tokenizer
) -> tuple[list[Ints], list[str]]:
    """The first `count` prompts of a file, as the model sees them, and their completions."""
    rows = islice(read_rows(source, prepared.task.columns, report=_log_bad_row), count)
    pairs = [(str(row.values["prompt"]), str(row.values["completion"])) for row in rows]
    prompts = [encode_prompt(prompt, prepared.task, tokenizer) for prompt, _ in pairs]
    return prompts, [completion for _, completion in pairs]


def _parts(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    while part := list(islice(samples, PART)):
        yield part


def _header(prepared: Prepared, cut: int, index: int, encoded: list[EncodedSample]) -> FrameHeader:
    return FrameHeader(
        protocol=PROTOCOL,
        run="",
        device="evaluation",
        index=index,
        front=prepared.weights_hash,
        depth=cut,
        width=prepared.width,
        codec="float32",
        samples=tuple(sample.sample for sample in encoded),
        tokens=tuple(sample.tokens for sample in encoded),
        targets=tuple(len(sample.targets) for sample in encoded),
        payloads=tuple(len(sample.payload) for sample in encoded),
    )


def _log_bad_row(bad: BadRow) -> None:
    log.warning("evaluation row left out: %s", bad)
