"""Split equals whole: for every family and every cut, slices give the model's own output."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from splitfrozen.model.blocks import SlicedModel

LENGTHS = (14, 12, 5, 1)
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def sliced(family: Any) -> SlicedModel:
    return SlicedModel(family.build())


def whole(sliced: SlicedModel, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.no_grad():
        return sliced.model(**dict(zip(sliced.inputs, inputs, strict=True))).logits


def real(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The values at real tokens: padding holds anything."""
    return torch.cat([row[:length] for row, length in zip(values, lengths.tolist(), strict=True)])


def lengths_of(sliced: SlicedModel, hidden: torch.Tensor) -> torch.Tensor:
    if sliced.kind == "image":
        return torch.full((len(hidden),), hidden.shape[1])
    return torch.tensor(LENGTHS)


def test_every_cut_gives_the_models_own_output(sliced: SlicedModel) -> None:
    inputs = sliced.example(LENGTHS, seed=1)
    expected = whole(sliced, inputs)
    for cut in range(1, sliced.block_count + 1):
        with torch.no_grad():
            hidden = sliced.front(cut)(*inputs)
            lengths = lengths_of(sliced, hidden)
            got = sliced.logits(hidden, lengths, cut)
        if sliced.kind == "causal_lm":
            got, wanted = real(got, lengths), real(expected, lengths)
        else:
            wanted = expected
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, **EXACT)
    assert expected.std() > 0.01


def test_lifting_gives_the_deeper_front(sliced: SlicedModel) -> None:
    inputs = sliced.example(LENGTHS, seed=2)
    with torch.no_grad():
        direct = [sliced.front(depth)(*inputs) for depth in range(1, sliced.block_count + 1)]
        lengths = lengths_of(sliced, direct[0])
        for start in range(1, sliced.block_count + 1):
            for stop in range(start, sliced.block_count + 1):
                lifted = sliced.lift(direct[start - 1], lengths, start, stop)
                torch.testing.assert_close(
                    real(lifted, lengths), real(direct[stop - 1], lengths), **EXACT
                )
    assert all((shallow - deep).abs().max() > 0.01 for shallow, deep in pairwise(direct))


def test_a_sample_alone_is_the_sample_in_a_padded_batch(sliced: SlicedModel) -> None:
    if sliced.kind == "image":
        pytest.skip("images are not padded")
    inputs = sliced.example(LENGTHS, seed=3)
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():
        hidden = sliced.front(1)(*inputs)
        together = sliced.logits(hidden, lengths, 1)
        for row, length in enumerate(LENGTHS):
            alone = sliced.front(1)(*(x[row : row + 1, :length] for x in inputs))
            torch.testing.assert_close(alone[0], hidden[row, :length], **EXACT)
            got = sliced.logits(alone, lengths[row : row + 1], 1)[0]
            wanted = together[row, :length] if sliced.kind == "causal_lm" else together[row]
            torch.testing.assert_close(got, wanted, **EXACT)


def test_what_lies_in_padding_does_not_matter(sliced: SlicedModel) -> None:
    inputs = sliced.example(LENGTHS, seed=4)
    with torch.no_grad():
        hidden = sliced.front(1)(*inputs)
        lengths = lengths_of(sliced, hidden)
        padding = torch.arange(hidden.shape[1]) >= lengths[:, None]
        other = torch.where(padding[:, :, None], 7.0, hidden)
        for stop in range(1, sliced.block_count + 1):
            one = real(sliced.lift(hidden, lengths, 1, stop), lengths)
            two = real(sliced.lift(other, lengths, 1, stop), lengths)
            torch.testing.assert_close(one, two, **EXACT)


def test_only_the_positions_asked_for_are_projected(sliced: SlicedModel) -> None:
    if sliced.kind != "causal_lm":
        pytest.skip("pooled heads answer once a sample")
    inputs = sliced.example(LENGTHS, seed=5)
    lengths = torch.tensor(LENGTHS)
    positions = torch.tensor([0, 3, 4, 11])
    with torch.no_grad():
        hidden = sliced.front(2)(*inputs)
        everywhere = sliced.logits(hidden, lengths, 2)
        some = sliced.logits(hidden, lengths, 2, positions)
    assert some.shape == (len(LENGTHS), len(positions), everywhere.shape[-1])
    torch.testing.assert_close(some, everywhere[:, positions], **EXACT)


def test_slicing_leaves_the_model_as_it_was(sliced: SlicedModel) -> None:
    inputs = sliced.example(LENGTHS, seed=6)
    before = whole(sliced, inputs)
    modules = [(name, id(module)) for name, module in sliced.model.named_modules()]
    with torch.no_grad():
        hidden = sliced.front(1)(*inputs)
        sliced.logits(
            sliced.lift(hidden, lengths_of(sliced, hidden), 1, 2), lengths_of(sliced, hidden), 2
        )
    assert [(name, id(module)) for name, module in sliced.model.named_modules()] == modules
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in sliced.model.modules()
    )
    assert torch.equal(whole(sliced, inputs), before)
