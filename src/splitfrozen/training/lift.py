"""Lifting: the frozen blocks between a device's depth and the cut, once for each sample.

Which samples go through the model together changes the last bits of what comes out. So that a run
which was interrupted lifts to the same bytes, a lifting batch is chosen by sample ids alone: ids
[64 k, 64 k + 64) of one device form a block, a block is lifted when all of its samples are there,
and its micro-batches are ordered by length. A block is written back by one `replace`, all or
nothing, so no block is ever half lifted. 64 samples of usual length fill a GPU and keep what an
interruption costs small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch

from splitfrozen.errors import StoreError
from splitfrozen.records import Activation, ActivationStore, SampleKey, SampleTable
from splitfrozen.training.batching import collate, split
from splitfrozen.training.precision import autocast

BLOCK = 64
"""Samples that are lifted together."""


class Sliced(Protocol):
    """The part of `model.blocks.SlicedModel` that lifting needs."""

    def lift(
        self, hidden: torch.Tensor, lengths: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        """blocks[start:stop] of [B, T, D], padded on the right."""
        ...


class Lifter:
    """Brings the activations of a store to the cut; `advance` as often as new ones arrive."""

    def __init__(
        self,
        sliced: Sliced,
        cut: int,
        *,
        micro_tokens: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take the model.

        Args:
            sliced: the frozen blocks.
            cut: M.
            micro_tokens: bound on the padded tokens that go through the model together; part of
                what fixes the result's last bits.
            device: where the model is.
            dtype: what to compute in.
        """
        self._sliced = sliced
        self._cut = cut
        self._micro_tokens = micro_tokens
        self._device = device
        self._dtype = dtype

    def advance(
        self,
        store: ActivationStore,
        announced: Mapping[str, int] | None,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> int:
        """Lift every block that is whole.

        Args:
            store: holds activations of any depth up to the cut.
            announced: samples that each device will send, to know which blocks are whole; None
                when no more will come: what is there is lifted.
            progress: called after each block with the samples lifted and those to lift in this
                call. It may raise, to stop between blocks.

        Returns:
            Samples lifted.

        Raises:
            StoreError: an activation is deeper than the cut.
        """
        blocks = list(_blocks(store.samples(), self._cut, announced))
        total = sum(len(block.samples) for block in blocks)
        done = 0
        for block in blocks:
            activations = store.read([SampleKey(block.device, id_) for id_ in block.samples])
            store.replace(block.device, self._lift(activations))
            done += len(activations)
            progress(done, total)
        return done

    def _lift(self, activations: list[Activation]) -> list[Activation]:
        lifted: dict[int, Activation] = {}
        for group in split([len(a.hidden) for a in activations], self._micro_tokens):
            members = [activations[i] for i in group]
            batch = collate(members).to(self._device)
            with torch.no_grad(), autocast(self._device, self._dtype):
                hidden = self._sliced.lift(batch.hidden, batch.lengths, members[0].depth, self._cut)
            rows = hidden.float().cpu().numpy()
            for a, row in zip(members, rows, strict=True):
                new = Activation(a.sample, self._cut, row[: len(a.hidden)].copy(), a.targets)
                lifted[a.sample] = new
        return [lifted[a.sample] for a in activations]


class _Block(NamedTuple):
    """Samples of one device and depth that are lifted together, ids ascending."""

    device: str
    samples: list[int]


def _blocks(table: SampleTable, cut: int, announced: Mapping[str, int] | None) -> Iterator[_Block]:
    """Yield the blocks to lift, in the order of keys."""
    if len(table) and int(table.depth.max()) > cut:
        row = int(table.depth.argmax())
        raise StoreError(
            f"activation {table.key(row).device}/{table.key(row).sample} is too deep",
            got=f"depth {table.depth[row]}",
            allowed=f"1..{cut}, the cut",
            remedy="keep model.cut as it was when the run began",
        )
    numbers = table.sample // BLOCK
    shallow = np.flatnonzero(table.depth < cut)
    sizes = {
        (int(device), int(number)): int(count)
        for (device, number), count in zip(
            *np.unique(np.stack([table.device, numbers], 1), axis=0, return_counts=True),
            strict=True,
        )
    }
    by_block = groupby(
        shallow, lambda row: (int(table.device[row]), int(numbers[row]), int(table.depth[row]))
    )
    for (device, number, _), rows in by_block:
        name = table.devices[device]
        if announced is not None:
            whole = min(BLOCK, announced.get(name, 0) - number * BLOCK)
            if name not in announced or sizes[device, number] < whole:
                continue
        yield _Block(name, [int(table.sample[row]) for row in rows])
