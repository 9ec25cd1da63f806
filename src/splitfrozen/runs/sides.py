"""Side data of a run's codec: fitted once on public rows, a file for each depth.

It goes to every device with its front, so the rows that it is made of must be nobody's secret. It
holds means, directions and scales of activations, no sample.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from splitfrozen.config import Config
from splitfrozen.data.readers import BadRow, Row, read_rows
from splitfrozen.data.tasks import build_samples
from splitfrozen.disk import write_whole
from splitfrozen.errors import DataError
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import FileRef, Floats, Sample, TaskSpec
from splitfrozen.runs.devices import TorchFront
from splitfrozen.runs.folder import side_name
from splitfrozen.training.batching import split
from splitfrozen.wire.codec import codec, needs_side
from splitfrozen.wire.side import Side

PUBLIC_ROWS = 2000
"""More rows change the fit by less than what it is good for."""

log = logging.getLogger("splitfrozen.sides")


def fit_sides(
    config: Config,
    sliced: SlicedModel,
    task: TaskSpec,
    tokenizer: Tokenizer | None,
    folder: Path,
    depths: Iterable[int],
) -> tuple[dict[int, FileRef], dict[int, float]]:
    """Fit what the run's codec needs, and write it into `folder`.

    Returns:
        By depth: the file, and the mean bytes of a token encoded with it; both empty for a codec
        that needs nothing.

    Raises DataError where `wire.public` cannot be read or has too few good rows, StoreError.
    """
    name = config.wire.name
    if not needs_side(name):
        return {}, {}
    assert config.wire.public is not None, "the config saw to it"
    samples = unlabelled(config.wire.public, task, tokenizer)
    _refuse_too_few(samples, sliced.width, config.wire.public)
    files: dict[int, FileRef] = {}
    rates: dict[int, float] = {}
    for depth in depths:
        compute = computed(TorchFront(sliced, depth), samples, config.train.micro_tokens)
        side = Side.fit(compute())
        data, digest = side.to_bytes(), side.sha256
        files[depth] = FileRef(name=side_name(digest), sha256=digest, bytes=len(data))
        write_whole(folder / files[depth].name, data)
        chosen = codec(name, side)
        tokens = sum(sample.length for sample in samples)
        rates[depth] = sum(len(chosen.encode(hidden)) for hidden in compute()) / tokens
        log.info(
            "%s at depth %d: %.1f bytes a token, %.1f times less than float32; targets and the "
            "heads of chunks come on top",
            name,
            depth,
            rates[depth],
            4 * sliced.width / rates[depth],
        )
    return files, rates


def unlabelled(source: str, task: TaskSpec, tokenizer: Tokenizer | None) -> list[Sample]:
    """Samples of the first PUBLIC_ROWS rows of a file, at whose labels nobody looks.

    Raises DataError where it cannot be read or has no good row.
    """
    columns = {ours: theirs for ours, theirs in task.columns.items() if ours != "label"}
    rows = islice(read_rows(source, columns, report=_log_bad_row), PUBLIC_ROWS)
    # Public text has no label of this task, and none is looked at.
    labelled = (Row(row.file, row.line, {"label": task.labels[0], **row.values}) for row in rows)
    made = rows if task.kind == "causal_lm" else labelled
    samples = list(build_samples(made, task, tokenizer, report=_log_bad_row))
    if not samples:
        raise DataError(
            "`wire.public` has no usable row",
            got=source,
            allowed="one good row or more",
            remedy="mend the rows that were reported",
        )
    return samples


def _refuse_too_few(samples: Sequence[Sample], width: int, source: str | None) -> None:
    """Fewer tokens than channels leave directions unseen, and what lies there would not be sent."""
    different = {_digest(sample): sample.length for sample in samples}
    tokens = sum(different.values())
    if tokens < width:
        raise DataError(
            "`wire.public` has too few rows",
            got=f"{tokens} tokens in {len(different)} different rows of {source}",
            allowed=f"{width} tokens or more, the model's width; 100 rows or more are usual",
            remedy="add rows",
        )


def _digest(sample: Sample) -> bytes:
    values = sample.tokens if sample.pixels is None else sample.pixels
    return hashlib.sha256(values.tobytes()).digest()


def computed(
    front: TorchFront, samples: Sequence[Sample], micro_tokens: int
) -> Callable[[], Iterator[Floats]]:
    """The activations of the samples, computed anew by each call: they need not fit in memory."""

    def compute() -> Iterator[Floats]:
        for group in split([sample.length for sample in samples], micro_tokens):
            yield from front([samples[i] for i in group])

    return compute


def _log_bad_row(bad: BadRow) -> None:
    log.warning("public row left out: %s", bad)
