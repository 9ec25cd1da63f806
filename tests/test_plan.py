"""The plan of batches and chunks: complete, bounded, tight, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfrozen.device.plan import (
    BATCH_SAMPLES,
    BATCH_TOKENS,
    CHUNK_SAMPLES,
    VALUE_BYTES,
    PlannedChunk,
    padding_share,
    plan_chunks,
    planned_bytes,
    typical_batch,
)
from splitfrozen.records import EncodedSample, Sample
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, pack


def text(number: int, length: int, targets: int = 1) -> Sample:
    return Sample(
        id=number,
        tokens=np.zeros(length, np.int32),
        token_types=None,
        pixels=None,
        targets=np.zeros(targets, np.int32),
        length=length,
    )


def mrpc(count: int) -> list[Sample]:
    """Lengths like those of MRPC's pairs under BERT's tokenizer: 53 on average, 20 to 103."""
    lengths = np.random.default_rng(5).normal(53, 15, count).clip(20, 103).astype(int)
    return [text(i, int(length)) for i, length in enumerate(lengths)]


def plan(samples: list[Sample], chunk_bytes: int = 1 << 22) -> tuple[PlannedChunk, ...]:
    return plan_chunks(samples, lambda tokens: tokens * 384 * 4, chunk_bytes, 0, "device-0")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=200),
    chunk_bytes=st.sampled_from([1 << 16, 1 << 20, 1 << 22]),
)
def test_every_sample_once_and_every_bound_kept(lengths: list[int], chunk_bytes: int) -> None:
    samples = [text(i, length, length) for i, length in enumerate(lengths)]
    chunks = plan(samples, chunk_bytes)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert sorted(i for chunk in chunks for i in chunk.samples) == list(range(len(samples)))
    for chunk in chunks:
        size = sum(samples[i].length * 384 * 4 + 4 * samples[i].length for i in chunk.samples)
        assert size < chunk_bytes or len(chunk.samples) == 1
        for batch in chunk.batches:
            longest = max(samples[i].length for i in batch)
            assert len(batch) * longest <= BATCH_TOKENS or len(batch) == 1
            assert len(batch) <= BATCH_SAMPLES


def test_a_frame_of_incompressible_values_fits_the_chunk() -> None:
    samples = [text(i, length, length) for i, length in enumerate([7] * 500 + [30] * 100)]
    noise = np.random.default_rng(0)
    for name in ("float32+zlib", "float16+zstd", "int8", "topk:1:256"):
        one = codec(name)
        chunk_bytes = 1 << 16
        chunks = plan_chunks(samples, planned_bytes(one, 16), chunk_bytes, 0, "d" * 9)
        assert len(chunks) > 1
        for chunk in chunks:
            encoded = [
                EncodedSample(
                    i,
                    samples[i].length,
                    samples[i].targets,
                    one.encode(noise.standard_normal((samples[i].length, 16), np.float32)),
                )
                for i in chunk.samples
            ]
            origin = Origin("r" * 100, "d" * 100, "0" * 64, 2, 16, name)
            frame = pack(origin, chunk.index, encoded).frame
            assert len(frame) <= chunk_bytes


@pytest.mark.parametrize("name", ["float32", "float16", "int8", "int4:64", "topk:0.01:2"])
def test_a_chunk_holds_no_more_activations_however_little_they_take(name: str) -> None:
    """The memory that fronts are said to need goes by two bytes a value."""
    samples, width, chunk_bytes = mrpc(400), 384, 1 << 20
    chunks = plan_chunks(samples, planned_bytes(codec(name), width), chunk_bytes, 0, "d")
    most = max(sum(samples[i].length for i in chunk.samples) for chunk in chunks)
    room = chunk_bytes / (VALUE_BYTES * width)
    assert most <= room
    assert most > (0.4 if name == "float32" else 0.8) * room


@pytest.mark.parametrize("count", [20, 300, 3668])
def test_padding_stays_small_on_lengths_like_mrpc(count: int) -> None:
    samples = mrpc(count)
    chunks = plan(samples)
    share = padding_share(chunks, samples)
    assert 0 < share < 0.1
    if count == 3668:
        assert share < 0.02
        # Tight batches are worth little if they are small.
        batches = [batch for chunk in chunks for batch in chunk.batches]
        assert count / len(batches) > 25


def test_the_plan_follows_from_seed_device_and_lengths_alone() -> None:
    samples = mrpc(400)
    again = [text(s.id, s.length) for s in reversed(samples)][::-1]
    assert plan(samples) == plan(again)
    other = plan_chunks(samples, lambda tokens: tokens * 1536, 1 << 22, 0, "device-1")
    assert other != plan(samples)
    assert sorted(i for c in other for i in c.samples) == list(range(400))


def test_lengths_are_mixed_over_the_chunks() -> None:
    samples = mrpc(3668)
    means = [np.mean([samples[i].length for i in chunk.samples]) for chunk in plan(samples)]
    sorted_share = np.mean(np.diff(means) >= 0)
    assert 0.3 < sorted_share < 0.7


def test_a_chunk_does_not_hold_more_samples_than_a_header_can() -> None:
    samples = [text(i, 1) for i in range(2 * CHUNK_SAMPLES)]
    chunks = plan_chunks(samples, lambda tokens: tokens, 1 << 25, 0, "d")
    assert max(len(chunk.samples) for chunk in chunks) <= CHUNK_SAMPLES


def test_the_typical_batch_has_the_median_length() -> None:
    samples = [text(i, length) for i, length in enumerate([1, 1, 64, 500, 900])]
    batch = typical_batch(samples)
    assert {sample.length for sample in batch} == {64}
    assert len(batch) == 8
    assert len(typical_batch([text(0, 4000)])) == 1
