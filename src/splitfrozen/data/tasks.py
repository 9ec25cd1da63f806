"""Rows to samples: what the texts, labels and images of a task are to the model.

A device reads data with its tokenizer.json alone, and gets the very tokens that transformers would
give for the same row. A row that cannot be used is reported and left out; ids count the good ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
from tokenizers import Encoding, Tokenizer

from splitfrozen.data.readers import BadRow, Report, Row
from splitfrozen.errors import ConfigError, DataError
from splitfrozen.records import IGNORED, Announcement, Ints, Sample, TaskKind, TaskSpec

Values = Mapping[str, object]

COLUMNS: Mapping[TaskKind, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "causal_lm": ("prompt", "completion"),
    "image": ("pixels", "label"),
}
"""Columns that a task must have; classification may have `pair` too."""


class _UnfitError(Exception):
    """A value that makes no sample; the text is the reason in the row's report."""


def build_samples(
    rows: Iterable[Row], task: TaskSpec, tokenizer: Tokenizer | None, report: Report
) -> Iterator[Sample]:
    """Make samples with ids 0, 1, 2 ... of the good rows, in order.

    Args:
        rows: as read.
        task: what they mean.
        tokenizer: of the model; it is not changed. None for images.
        report: called for every row left out.

    Raises ConfigError at once where `max_tokens` leaves no room for text.
    """
    return _build(rows, _maker(task, tokenizer), report)


def encode_prompt(prompt: str, task: TaskSpec, tokenizer: Tokenizer) -> Ints:
    """Token ids of a prompt in the task's template: what a causal_lm sample begins with.

    It is not truncated, and the tokenizer is not changed.
    """
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        tokenizer = _own(tokenizer)
    return _prompt_ids(prompt, task, tokenizer)


def announce(samples: Iterable[Sample], skipped: int) -> Announcement:
    """What a device tells of its samples before it sends them.

    The digest runs over each sample's length (int64), tokens (int32) or pixels (float32), and
    targets (int32), little-endian, in order. Raises DataError where there is no sample.
    """
    digest, count, tokens = hashlib.sha256(), 0, 0
    for sample in samples:
        digest.update(sample.length.to_bytes(8, "little"))
        if sample.pixels is None:
            digest.update(sample.tokens.astype("<i4").tobytes())
        else:
            digest.update(sample.pixels.astype("<f4").tobytes())
        digest.update(sample.targets.astype("<i4").tobytes())
        count += 1
        tokens += sample.length
    if count == 0:
        raise DataError(
            "the data has no usable row",
            got=f"{skipped} bad rows",
            allowed="one good row or more",
            remedy="mend the rows that were reported",
        )
    return Announcement(samples=count, tokens=tokens, skipped=skipped, digest=digest.hexdigest())


def truncation(truncated: int, rows: int, max_tokens: int) -> str:
    """What people are told of rows that lost their end, which costs accuracy; "" for none."""
    told = f"{truncated} of {rows} rows cut to {max_tokens} tokens; raise task.max_tokens"
    return told if truncated else ""


def _build(
    rows: Iterable[Row], make: Callable[[Values, int], Sample], report: Report
) -> Iterator[Sample]:
    number = 0
    for row in rows:
        try:
            sample = make(row.values, number)
        except _UnfitError as error:
            report(BadRow(row.file, row.line, str(error)))
            continue
        yield sample
        number += 1


def _maker(task: TaskSpec, tokenizer: Tokenizer | None) -> Callable[[Values, int], Sample]:
    if task.kind == "image":
        return partial(_image, task)
    assert tokenizer is not None, "text needs a tokenizer"
    own = _own(tokenizer)
    if task.kind == "causal_lm":
        return partial(_causal, task, own)
    pair = "pair" in task.columns
    added = own.num_special_tokens_to_add(pair) if task.separator is None else 1
    if task.max_tokens <= added:
        raise ConfigError(
            "`task.max_tokens` leaves no room for text",
            got=task.max_tokens,
            allowed=f"more than the {added} special tokens of each input",
            remedy="raise it",
        )
    room = task.max_tokens if task.separator is None else task.max_tokens - 1
    own.enable_truncation(room, strategy="longest_first")
    return partial(_classification, task, own)


def _own(tokenizer: Tokenizer) -> Tokenizer:
    """A copy without the padding and truncation that tokenizer.json may ask for."""
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_padding()
    own.no_truncation()
    return own


# --- classification ------------------------------------------------------------------------------


def _classification(task: TaskSpec, tokenizer: Tokenizer, values: Values, number: int) -> Sample:
    text = _text(values, "text")
    pair = _text(values, "pair") if "pair" in task.columns else None
    label = _label(values, task.labels)
    encoding = tokenizer.encode(text, pair, add_special_tokens=task.separator is None)
    if all(encoding.special_tokens_mask):
        raise _UnfitError("`text` gives no tokens")
    tokens, types = _ids(encoding, task.separator if pair is not None else None)
    return Sample(
        id=number,
        tokens=tokens,
        token_types=types if task.token_types else None,
        pixels=None,
        targets=np.array([label], np.int32),
        length=len(tokens),
        truncated=bool(encoding.overflowing),
    )


def _ids(encoding: Encoding, separator: int | None) -> tuple[Ints, Ints]:
    """Token and segment ids, with the separator between the texts of a pair where one is given."""
    tokens, types = encoding.ids, encoding.type_ids
    if separator is not None:
        first = encoding.sequence_ids.count(0)
        tokens = [*tokens[:first], separator, *tokens[first:]]
        types = [0] * (first + 1) + [1] * (len(tokens) - first - 1)
    return np.array(tokens, np.int32), np.array(types, np.int32)


def _label(values: Values, labels: tuple[str, ...]) -> int:
    """Index of a class given by name, else by index: "spam", "1", 1 or 1.0.

    Names come first: with labels ("1", "0"), 1 is the first class.
    """
    value = values["label"]
    text = value.strip() if isinstance(value, str) else ""
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        text = str(value)
    if text in labels:
        return labels.index(text)
    try:
        index = float(text)
    except ValueError:
        index = -1.0
    if index.is_integer() and str(int(index)) in labels:
        return labels.index(str(int(index)))
    if index.is_integer() and 0 <= index < len(labels):
        return int(index)
    named = ", ".join(f"{name!r} or {i}" for i, name in enumerate(labels))
    raise _UnfitError(f"`label` is {_shown(value)}; allowed: {named}")


# --- causal language models ----------------------------------------------------------------------


def _causal(task: TaskSpec, tokenizer: Tokenizer, values: Values, number: int) -> Sample:
    prompt = _prompt_ids(_text(values, "prompt"), task, tokenizer)
    completion = tokenizer.encode(_text(values, "completion"), add_special_tokens=False).ids
    if len(prompt) == 0 or not completion:
        raise _UnfitError("`prompt` or `completion` gives no tokens")
    if len(prompt) >= task.max_tokens:
        raise _UnfitError(
            f"`prompt` has {len(prompt)} tokens; allowed: fewer than the {task.max_tokens} of "
            "task.max_tokens, so that some of the completion is left"
        )
    end = [] if task.end is None else [task.end]
    whole = np.concatenate([prompt, np.array(completion + end, np.int32)])
    tokens = whole[: task.max_tokens]
    targets = np.full(len(tokens), IGNORED, np.int32)
    # Position t predicts token t+1, where that belongs to the completion.
    targets[len(prompt) - 1 : -1] = tokens[len(prompt) :]
    return Sample(
        id=number,
        tokens=tokens,
        token_types=np.zeros(len(tokens), np.int32) if task.token_types else None,
        pixels=None,
        targets=targets,
        length=len(tokens),
        truncated=len(tokens) < len(whole),
    )


def _prompt_ids(prompt: str, task: TaskSpec, tokenizer: Tokenizer) -> Ints:
    # Not str.format: a template may hold braces of its own, as JSON does.
    text = task.template.replace("{prompt}", prompt)
    return np.array(tokenizer.encode(text).ids, np.int32)


# --- images --------------------------------------------------------------------------------------


def _image(task: TaskSpec, values: Values, number: int) -> Sample:
    assert task.image is not None, "an image task says the shape of its images"
    channels, height, width = task.image
    pixels = _pixels(values["pixels"])
    if pixels.shape == (height, width, channels) and pixels.shape != task.image:
        pixels = pixels.transpose(2, 0, 1)
    if pixels.shape != task.image:
        raise _UnfitError(
            f"`pixels` has shape {pixels.shape}; allowed: {(height, width, channels)} or "
            f"{task.image}"
        )
    mean = np.array(task.image_mean, np.float32).reshape(channels, 1, 1)
    std = np.array(task.image_std, np.float32).reshape(channels, 1, 1)
    return Sample(
        id=number,
        tokens=np.zeros(0, np.int32),
        token_types=None,
        pixels=np.ascontiguousarray((pixels.astype(np.float32) / np.float32(255) - mean) / std),
        targets=np.array([_label(values, task.labels)], np.int32),
        length=task.image_tokens,
    )


def _pixels(value: object) -> np.ndarray[tuple[int, ...], np.dtype[np.integer]]:
    """An image, array or nested list of whole numbers 0 .. 255."""
    try:
        pixels = np.asarray(value)
    except ValueError as error:
        raise _UnfitError(f"`pixels` is no array: {error}") from error
    if pixels.dtype.kind not in "ui":
        raise _UnfitError(f"`pixels` holds {pixels.dtype}; allowed: uint8, 0 .. 255")
    if pixels.dtype != np.uint8 and pixels.size and not 0 <= pixels.min() <= pixels.max() <= 255:
        raise _UnfitError(f"`pixels` runs {pixels.min()} .. {pixels.max()}; allowed: 0 .. 255")
    return pixels


# --- values --------------------------------------------------------------------------------------


def _text(values: Values, name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise _UnfitError(f"`{name}` is {_shown(value)}; allowed: text")
    if not value.strip():
        raise _UnfitError(f"`{name}` is empty")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
