"""Evaluation data: lifted to the cut once, then read like any other activations."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from splitfrozen.data.readers import BadRow, read_rows
from splitfrozen.data.samples import SampleSource
from splitfrozen.data.tasks import announce, build_samples, encode_prompt
from splitfrozen.disk import write_whole
from splitfrozen.errors import DiskFullError, StoreError
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import Activation, EncodedSample, Ints, Prepared, Sample, SampleKey
from splitfrozen.runs.devices import TorchFront
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.prepare import open_tokenizer
from splitfrozen.server.store import Store
from splitfrozen.training.batching import split
from splitfrozen.training.evaluate import Evaluation, exact_match, generate
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, header_of

log = logging.getLogger("splitfrozen.evaluation")

NO_FRAME = "0" * 64
"""There was no frame whose hash could be kept."""
DEVICE = "evaluation"
"""Whose samples these are, as the store sees it."""

PART_SAMPLES = 256
PART_TOKENS = 32768
"""Samples are computed and stored in parts that hold at most so much."""

NEW_TOKENS = 256


def _log_bad_row(bad: BadRow) -> None:
    log.warning("evaluation row left out: %s", bad)


class _Kept(Store):
    """No device can send these again, nor be purged: what is damaged is computed again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with _replaceable(folder):
            super().__init__(folder / "store")

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        with _replaceable(self._folder):
            return super().read(keys)


@contextmanager
def _replaceable(folder: Path) -> Iterator[None]:
    try:
        yield
    except DiskFullError:
        raise
    except StoreError as error:
        raise StoreError(
            error.what,
            got=error.got,
            allowed=error.allowed,
            remedy=f"delete the folder {folder}; the same command computes it again",
        ) from error


def open_store(
    folder: Path, source: str, run: RunFolder, prepared: Prepared, sliced: SlicedModel
) -> Store:
    """The activations of `source` at the cut, kept in `folder`.

    What is there already of the same data is not computed again; of other data it is deleted.
    Raises DataError where the file cannot be read or has no good row, StoreError where what is
    there is damaged.
    """
    digest = announce(read_samples(source, run, prepared), 0).digest
    known = folder / "digest"
    if folder.exists() and not (known.exists() and known.read_bytes() == digest.encode()):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(known, digest.encode())
    store = _Kept(folder)
    stored = store.chunks(DEVICE)
    cut, micro_tokens = run.config.model.cut, run.config.train.micro_tokens
    origin = Origin(run.name, DEVICE, prepared.weights_hash, cut, prepared.width, "float32")
    for index, part in enumerate(_parts(read_samples(source, run, prepared, lambda _: None))):
        if index not in stored:
            encoded = embed(sliced, part, cut, micro_tokens)
            store.add(header_of(origin, index, encoded), NO_FRAME, encoded)
    return store


def open_samples(source: str, run: RunFolder, prepared: Prepared) -> SampleSource:
    """The samples of `source`, for methods that train more than the blocks above the cut.

    Raises DataError where the file cannot be read.
    """
    return SampleSource({DEVICE: list(read_samples(source, run, prepared))})


def embed(
    sliced: SlicedModel, samples: list[Sample], cut: int, micro_tokens: int
) -> list[EncodedSample]:
    """Run front(cut) in float32, without padding in what comes out."""
    front = TorchFront(sliced, cut)
    exact = codec("float32")
    encoded: dict[int, EncodedSample] = {}
    for group in split([sample.length for sample in samples], micro_tokens):
        members = [samples[i] for i in group]
        for sample, hidden in zip(members, front(members), strict=True):
            payload = exact.encode(hidden)
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


def read_samples(
    source: str,
    run: RunFolder,
    prepared: Prepared,
    report: Callable[[BadRow], None] = _log_bad_row,
) -> Iterator[Sample]:
    """The good rows of a file. Raises DataError."""
    rows = read_rows(source, prepared.task.columns, report=report)
    return build_samples(rows, prepared.task, open_tokenizer(run, prepared), report=report)


def _parts(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    part: list[Sample] = []
    tokens = 0
    for sample in samples:
        if part and (len(part) == PART_SAMPLES or tokens + sample.length > PART_TOKENS):
            yield part
            part, tokens = [], 0
        part.append(sample)
        tokens += sample.length
    if part:
        yield part
