"""Which samples are computed together and which travel together.

Pure: the plan follows from seed, device and the samples' ids and lengths alone. Floating-point
results depend in the last bits on what shares a batch, so a device that was killed must make the
same batches again in order to make the same bytes again.

Batches hold samples of nearly one length, because every batch is padded to its longest sample;
their order is shuffled, so that whoever trains on what has arrived so far sees mixed lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from splitfrozen import rng
from splitfrozen.records import Codec, Sample

BATCH_TOKENS = 2048
"""Padded tokens of a batch at most (but for a longer single sample): bounds the working set."""

BATCH_SAMPLES = 64
PADDING = 0.08
"""Padding share of a batch at most: a few long samples must not make many short ones dear."""

FRAME_BYTES = 1024
"""Allowance for what a frame holds once: ids of run and device, hashes, lengths."""

SAMPLE_BYTES = 32
"""Allowance for what a frame's header holds once a sample: its id and three lengths."""

VALUE_BYTES = 2
"""Of an encoded value at least, as chunks are planned: fewer would make chunks of more activations,
and a device holds those of several chunks while it computes (`model.costs.held_tokens`)."""

CHUNK_SAMPLES = 16384
"""Samples of a chunk at most: keeps the header of a frame of very short samples small."""


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """What one upload carries.

    Attributes:
        index: position in the plan.
        batches: sample ids of each forward pass.
    """

    index: int
    batches: tuple[tuple[int, ...], ...]

    @property
    def samples(self) -> tuple[int, ...]:
        """Ids of all samples, in the order in which the frame holds them."""
        return tuple(sample for batch in self.batches for sample in batch)


def planned_bytes(codec: Codec, width: int) -> Callable[[int], int]:
    """T -> bytes that `plan_chunks` gives an encoded activation [T, width]: what it takes at most,
    and VALUE_BYTES a value at least."""
    return lambda tokens: max(codec.most_bytes(tokens, width), VALUE_BYTES * tokens * width)


def plan_chunks(
    samples: Sequence[Sample],
    payload_bound: Callable[[int], int],
    chunk_bytes: int,
    seed: int,
    device: str,
) -> tuple[PlannedChunk, ...]:
    """Plan all forward passes and uploads of a device.

    Args:
        samples: all samples of the device; `samples[i].id == i`.
        payload_bound: T -> bytes of one encoded activation at most.
        chunk_bytes: size that a frame must not exceed; only a single sample that is larger by
            itself makes a larger frame.
        seed: the run's.
        device: id of the device in the run.
    """
    sizes = [
        payload_bound(sample.length) + 4 * len(sample.targets) + SAMPLE_BYTES for sample in samples
    ]
    space = chunk_bytes - FRAME_BYTES
    batches = list(_batches(samples, sizes, space))
    order = rng.stream(seed, "batches", device).permutation(len(batches))
    return tuple(
        PlannedChunk(index, tuple(group))
        for index, group in enumerate(_chunks([batches[i] for i in order], sizes, space))
    )


def padding_share(chunks: Sequence[PlannedChunk], samples: Sequence[Sample]) -> float:
    """Padded tokens over real tokens, less one: what padding costs in computation."""
    padded = real = 0
    for chunk in chunks:
        for batch in chunk.batches:
            lengths = [samples[i].length for i in batch]
            padded += len(lengths) * max(lengths)
            real += sum(lengths)
    return padded / real - 1 if real else 0.0


def typical_batch(samples: Sequence[Sample], tokens: int = 512) -> list[Sample]:
    """Samples of median length, about `tokens` in all: what a speed measurement should run."""
    middle = samples[int(np.argsort([s.length for s in samples], kind="stable")[len(samples) // 2])]
    count = max(1, min(BATCH_SAMPLES, tokens // max(1, middle.length)))
    return [middle] * count


def _batches(
    samples: Sequence[Sample], sizes: Sequence[int], space: int
) -> Iterator[tuple[int, ...]]:
    batch: list[int] = []
    real = size = 0
    for sample in sorted(samples, key=lambda s: (s.length, s.id)):
        # Lengths ascend, so the sample at hand is the one that all others are padded to.
        padded = (len(batch) + 1) * sample.length
        full = (
            padded > BATCH_TOKENS
            or len(batch) == BATCH_SAMPLES
            or size + sizes[sample.id] > space
            or padded > (1 + PADDING) * (real + sample.length)
        )
        if batch and full:
            yield tuple(batch)
            batch, real, size = [], 0, 0
        batch.append(sample.id)
        real += sample.length
        size += sizes[sample.id]
    if batch:
        yield tuple(batch)


def _chunks(
    batches: Sequence[tuple[int, ...]], sizes: Sequence[int], space: int
) -> Iterator[list[tuple[int, ...]]]:
    chunk: list[tuple[int, ...]] = []
    count = size = 0
    for batch in batches:
        more = sum(sizes[i] for i in batch)
        if chunk and (size + more > space or count + len(batch) > CHUNK_SAMPLES):
            yield chunk
            chunk, count, size = [], 0, 0
        chunk.append(batch)
        count += len(batch)
        size += more
    if chunk:
        yield chunk
