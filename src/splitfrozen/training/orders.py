"""Orders of methods that do not mix all devices' samples, over samples that are all known.

All start from one shuffle, that of `batching.epoch_order`: each device sends in the order of that
shuffle without the other devices' samples. So with one device each of them is the order of
FixedOrder, but for a window of more than one sample, which shuffles once more.

    DeviceOrder   a batch holds a batch of each device that takes part: devices in parallel
    TurnOrder     a batch is of one device, the devices take turns: nothing is mixed
    WindowOrder   what TurnOrder sends goes through a shuffle window of limited size
"""

from __future__ import annotations

import numpy as np

from splitfrozen import rng
from splitfrozen.records import Ints, SampleKey, SampleTable
from splitfrozen.training.batching import epoch_order


class _Listed:
    """An order whose epochs are listed whole; `known` then is `batch`."""

    def __init__(self, table: SampleTable, seed: int, batch_size: int) -> None:
        self._table = table
        self._seed = seed
        self._batch_size = batch_size
        self._epoch = -1
        self._batches: list[Ints] = []

    @property
    def steps_per_epoch(self) -> int:
        """Batches of every epoch."""
        return len(self._of(max(self._epoch, 0)))

    def batch(self, epoch: int, index: int) -> list[SampleKey]:
        batches = self._of(epoch)
        return [self._table.key(row) for row in batches[index]] if index < len(batches) else []

    def known(self, epoch: int, index: int) -> list[SampleKey]:
        return self.batch(epoch, index)

    def _of(self, epoch: int) -> list[Ints]:
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._list(epoch)
        return self._batches

    def _list(self, epoch: int) -> list[Ints]:
        raise NotImplementedError

    def _rounds(self, epoch: int) -> list[list[Ints]]:
        """The devices' batches, in the order of the devices within a round.

        The device with most batches is in every round, the others in rounds spread evenly, so that
        an epoch does not end on the samples of the largest alone.
        """
        rows = epoch_order(self._table, self._seed, epoch)
        size = self._batch_size
        held = [
            [own[start : start + size] for start in range(0, len(own), size)]
            for device in range(len(self._table.devices))
            if len(own := rows[self._table.device[rows] == device])
        ]
        rounds: list[list[Ints]] = [[] for _ in range(max(map(len, held), default=0))]
        for batches in held:
            for number, batch in enumerate(batches):
                rounds[(2 * number + 1) * len(rounds) // (2 * len(batches))].append(batch)
        return rounds


class DeviceOrder(_Listed):
    """Each batch holds at most `batch_size` samples of each device, device after device."""

    def _list(self, epoch: int) -> list[Ints]:
        return [np.concatenate(batches) for batches in self._rounds(epoch)]


class TurnOrder(_Listed):
    """Each batch is of one device; the devices take turns, those with more samples more often."""

    def _list(self, epoch: int) -> list[Ints]:
        return [batch for batches in self._rounds(epoch) for batch in batches]


class WindowOrder(_Listed):
    """Samples come as `TurnOrder` has them; batches are drawn from the oldest `size` of them.

    Each sample is drawn from a window in which its place is taken by the next that comes, as in
    tf.data's shuffle. A window that holds an epoch mixes it whole.
    """

    def __init__(self, table: SampleTable, seed: int, batch_size: int, size: int) -> None:
        super().__init__(table, seed, batch_size)
        self._size = size

    def _list(self, epoch: int) -> list[Ints]:
        turns = [batch for batches in self._rounds(epoch) for batch in batches]
        if not turns:
            return []
        sent = np.concatenate(turns)
        draw = rng.stream(self._seed, "window", "epoch", epoch)
        window, rest = sent[: self._size].copy(), sent[self._size :]
        mixed = np.empty_like(sent)
        places = draw.integers(0, len(window), len(rest))
        for at, (place, following) in enumerate(zip(places, rest, strict=True)):
            mixed[at], window[place] = window[place], following
        mixed[len(rest) :] = draw.permutation(window)
        return [
            mixed[start : start + self._batch_size]
            for start in range(0, len(mixed), self._batch_size)
        ]
