"""Lifting: the frozen blocks between a device's depth and the cut, once for each sample.

Which samples go through the model together changes the last bits of what comes out. A run that was
interrupted, or whose chunks came in another order, has to lift to the same bytes, so a lifting
batch is chosen by what neither changes:

- A chunk's samples are stored in one transaction and the first stored wins, so what the store says
  is of chunk k does not change once it says anything. What a device puts into chunk k follows from
  its plan. So a stored chunk is whole, and can be lifted while the others are on their way.
- All samples of a chunk, lifted or not, are ordered by (T, id) and cut into groups of GROUP. Like
  lengths go together, which pads least, as they do in the device's own batches.
- A group is written back by one `replace`, all or nothing, so after an interruption what is still
  shallow are whole groups.

A device whose plan changed (it was upgraded in the middle of a run) may send a chunk k that differs
from the one that is stored, or samples that came before in another chunk. Each sample still belongs
to one chunk and is lifted once; only the last bits then depend on what came first.

64 samples of usual length fill a GPU, and keep what an interruption costs small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch

from splitfrozen.errors import StoreError
from splitfrozen.records import Activation, ActivationStore, SampleKey, SampleTable
from splitfrozen.training.batching import collate, split
from splitfrozen.training.precision import autocast

GROUP = 64
"""Samples that are lifted together, at most."""


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
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> int:
        """Lift everything that is shallower than the cut.

        Args:
            store: holds activations of any depth up to the cut.
            progress: called after each group with the samples lifted and those to lift in this
                call. It may raise, to stop between groups.

        Returns:
            Samples lifted.

        Raises:
            StoreError: an activation is deeper than the cut.
        """
        groups = list(_groups(store.samples(), self._cut))
        total = sum(len(group.samples) for group in groups)
        done = 0
        for group in groups:
            activations = store.read([SampleKey(group.device, id_) for id_ in group.samples])
            store.replace(group.device, self.lift(activations))
            done += len(activations)
            progress(done, total)
        return done

    def lift(self, activations: Sequence[Activation]) -> list[Activation]:
        """Bring activations of one depth, at most the cut, to the cut; in their order."""
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


class _Group(NamedTuple):
    """Samples of one device, chunk and depth that are lifted together."""

    device: str
    samples: list[int]


def _groups(table: SampleTable, cut: int) -> Iterator[_Group]:
    """Yield the groups to lift, by device and chunk."""
    if len(table) and int(table.depth.max()) > cut:
        row = int(table.depth.argmax())
        raise StoreError(
            f"activation {table.key(row).device}/{table.key(row).sample} is too deep",
            got=f"depth {table.depth[row]}",
            allowed=f"1..{cut}, the cut",
            remedy="keep model.cut as it was when the run began",
        )
    order = np.lexsort((table.sample, table.tokens, table.chunk, table.device))
    chunks = np.stack([table.device, table.chunk], 1)[order]
    first = np.ones(len(order), bool)
    first[1:] = (chunks[1:] != chunks[:-1]).any(1)
    places = np.arange(len(order))
    numbers = (places - np.maximum.accumulate(np.where(first, places, 0))) // GROUP
    # Samples of a chunk have one depth, unless two versions of a device sent it.
    shallow = np.flatnonzero(table.depth[order] < cut)
    by_group = groupby(
        shallow, lambda at: (*chunks[at].tolist(), int(numbers[at]), int(table.depth[order[at]]))
    )
    for (device, *_), members in by_group:
        yield _Group(table.devices[device], [int(table.sample[order[at]]) for at in members])
