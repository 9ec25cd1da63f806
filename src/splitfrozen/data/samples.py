"""Samples of several devices in one process, as training and evaluation read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from splitfrozen.records import Sample, SampleKey, SampleTable


class SampleSource:
    """Samples in memory, by (device, id); a `training.loop.Source`."""

    def __init__(self, held: Mapping[str, Sequence[Sample]], depth: int = 0) -> None:
        """Take the samples of each device; `held[device][i].id == i`.

        `depth` is what `samples()` says of all of them: blocks applied, none to a sample.
        """
        self._held = dict(sorted(held.items()))
        self._depth = depth

    def samples(self) -> SampleTable:
        """All samples, sorted by key."""
        sizes = [len(samples) for samples in self._held.values()]
        count = sum(sizes)
        return SampleTable(
            devices=tuple(self._held),
            device=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            sample=np.array([s.id for held in self._held.values() for s in held], np.int32),
            tokens=np.array([s.length for held in self._held.values() for s in held], np.int32),
            depth=np.full(count, self._depth, np.int32),
            chunk=np.zeros(count, np.int32),
        )

    def read(self, keys: Sequence[SampleKey]) -> list[Sample]:
        return [self._held[key.device][key.sample] for key in keys]
