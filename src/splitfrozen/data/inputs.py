"""Samples to the arrays that a model's first block takes, padded on the right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from splitfrozen.errors import ModelError
from splitfrozen.records import Sample

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
"""The inputs that a front may have, by the names that transformers gives them."""


def model_inputs(batch: Sequence[Sample], names: Iterable[str]) -> list[npt.NDArray[Any]]:
    """Return one array for each of `names`, which are of `INPUTS`.

    Returns:
        int64 [B, T] for text, float32 [B, channels, height, width] for `pixel_values`.

    Raises:
        ModelError: an image model and samples of text.
    """
    return [_pixels(batch) if name == "pixel_values" else _row(batch, name) for name in names]


def _row(batch: Sequence[Sample], name: str) -> npt.NDArray[Any]:
    padded = np.zeros((len(batch), max(sample.length for sample in batch)), np.int64)
    for row, sample in zip(padded, batch, strict=True):
        if name == "attention_mask":
            row[: sample.length] = 1
        elif name == "input_ids":
            row[: sample.length] = sample.tokens
        elif sample.token_types is not None:
            row[: sample.length] = sample.token_types
    return padded


def _pixels(batch: Sequence[Sample]) -> npt.NDArray[Any]:
    pixels = [sample.pixels for sample in batch if sample.pixels is not None]
    if len(pixels) != len(batch):
        raise ModelError(
            "the front takes `pixel_values`",
            got="samples of text",
            allowed="samples of images",
            remedy="check that task and model fit",
        )
    return np.stack(pixels)
