"""Which samples form a batch, in what order, and how they are padded.

An epoch holds every sample once. Its batches hold exactly `batch_size` samples, but for the last,
which takes what is left. Orders that mix all samples are here, others in `orders.py`; the loop
cannot tell them apart:

    FixedOrder      all samples are known: a permutation fixed by (seed, epoch, sample ids)
    StreamingOrder  the first epoch is drawn by a ShuffleWindow from what has arrived, the later
                    ones are fixed orders over what the window drew

What arrives when is chance, so the window writes each batch into a ledger before anyone trains on
it; a run that continues replays the ledger and draws on from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from splitfrozen import rng
from splitfrozen.disk import explained, sync_folder
from splitfrozen.errors import StoreError
from splitfrozen.records import IGNORED, Activation, Floats, Ints, SampleKey, SampleTable


def epoch_order(table: SampleTable, seed: int, epoch: int) -> Ints:
    """Return int32 [N], the rows of `table` in the order of `epoch`.

    The table is sorted by key, so the order depends on the seed, the epoch and the sample ids, not
    on who uploaded first.
    """
    return rng.stream(seed, "shuffle", epoch).permutation(len(table)).astype(np.int32)


def split(lengths: Sequence[int] | Ints, micro_tokens: int) -> list[list[int]]:
    """Divide a batch into micro-batches of at most `micro_tokens` padded tokens.

    Samples of like length go together, the longest first, so that a batch which does not fit into
    memory fails at once. A sample longer than `micro_tokens` is a micro-batch of its own.

    Args:
        lengths: T of each sample of the batch.
        micro_tokens: bound on samples x longest sample.

    Returns:
        Positions in `lengths`, each exactly once.
    """
    groups: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        if groups and (len(groups[-1]) + 1) * int(lengths[groups[-1][0]]) <= micro_tokens:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that go through the model together.

    Attributes:
        hidden: float32 [B, T, D], padded on the right with zeros; T of the longest sample.
        lengths: int64 [B], T of each sample.
        targets: int64 [B, 1] labels, or int64 [B, T] tokens to predict, padded with IGNORED.
    """

    hidden: torch.Tensor
    lengths: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(self.hidden.to(device), self.lengths.to(device), self.targets.to(device))


def collate(activations: Sequence[Activation]) -> MicroBatch:
    """Pad activations of one depth to one length."""
    lengths = [len(activation.hidden) for activation in activations]
    return MicroBatch(
        torch.from_numpy(pad([activation.hidden for activation in activations])),
        torch.tensor(lengths, dtype=torch.int64),
        pad_targets([activation.targets for activation in activations]),
    )


def pad(rows: Sequence[Floats]) -> Floats:
    """float32 [T, D] each -> [B, T, D], padded on the right with zeros."""
    padded = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), np.float32)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded


def pad_targets(rows: Sequence[Ints]) -> torch.Tensor:
    """int32 [1] or [T] each -> int64 [B, 1] or [B, T], padded on the right with IGNORED."""
    padded = np.full((len(rows), max(map(len, rows))), IGNORED, np.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(padded)


class Order(Protocol):
    """Says which samples each batch holds; asking twice gives the same answer."""

    def batch(self, epoch: int, index: int) -> list[SampleKey] | None:
        """Return batch `index` of `epoch`: empty where the epoch is over, None if not yet known."""
        ...

    def known(self, epoch: int, index: int) -> list[SampleKey]:
        """Return batch `index` of `epoch`, which has begun; empty where it is over or not known.

        Unlike `batch` it decides nothing.
        """
        ...


class FixedOrder:
    """The order of an epoch over samples that are all known."""

    def __init__(self, table: SampleTable, seed: int, batch_size: int) -> None:
        self._table = table
        self._seed = seed
        self._batch_size = batch_size
        self._epoch = -1
        self._rows: Ints = np.zeros(0, np.int32)

    def batch(self, epoch: int, index: int) -> list[SampleKey]:
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, epoch_order(self._table, self._seed, epoch)
        start = index * self._batch_size
        return [self._table.key(row) for row in self._rows[start : start + self._batch_size]]

    def known(self, epoch: int, index: int) -> list[SampleKey]:
        return self.batch(epoch, index)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What can be trained on by now.

    Attributes:
        table: samples at the cut.
        complete: whether no more will come.
    """

    table: SampleTable
    complete: bool


class StreamingOrder:
    """The first epoch as a shuffle window draws it, later ones fixed over what it drew."""

    def __init__(
        self, window: ShuffleWindow, arrived: Callable[[], Arrivals], seed: int, batch_size: int
    ) -> None:
        """Take the window and a function to ask for arrivals, called before each draw."""
        self._window = window
        self._arrived = arrived
        self._seed = seed
        self._batch_size = batch_size
        self._later: FixedOrder | None = None

    def batch(self, epoch: int, index: int) -> list[SampleKey] | None:
        if epoch == 0:
            recorded = self._window.recorded(index)
            return recorded or self._window.draw(self._arrived(), self._batch_size)
        if self._later is None:
            # A sample that came after the first epoch would change an order that a continued run
            # has to find again, so it stays out.
            table = self._window.drawn(self._arrived().table)
            self._later = FixedOrder(table, self._seed, self._batch_size)
        return self._later.batch(epoch, index)

    def known(self, epoch: int, index: int) -> list[SampleKey]:
        if epoch == 0:
            return self._window.recorded(index)
        return [] if self._later is None else self._later.known(epoch, index)


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """One line of the ledger."""

    batch: int
    keys: list[tuple[str, int]]


class ShuffleWindow:
    """Draws each sample once, at random among those that have arrived and were not yet drawn.

    A batch is drawn when at least `size` samples wait, or when no more will come; a larger window
    mixes devices better and begins later. Waiting samples stay in the store, so the window costs
    no memory beyond their ids.

    The ledger is a file of JSON lines, one a batch, synced to disk before `draw` returns. A last
    line that was cut by a crash was never trained on and is dropped.
    """

    def __init__(self, ledger: Path, seed: int, size: int) -> None:
        """Open or create the ledger. Raises StoreError where it is damaged."""
        self._ledger = ledger
        self._seed = seed
        self._size = size
        self._codes: dict[str, int] = {}
        self._batches = _read_ledger(ledger)
        self._drawn = [self._encode(chain.from_iterable(self._batches))]
        self._latest: tuple[SampleTable, npt.NDArray[np.bool_]] | None = None
        if len(np.unique(self._drawn[0])) != len(self._drawn[0]):
            raise _damaged(ledger, "a sample that was drawn twice")

    def recorded(self, index: int) -> list[SampleKey]:
        """Return batch `index` if it was drawn already, else an empty list."""
        return self._batches[index] if index < len(self._batches) else []

    def drawn(self, table: SampleTable) -> SampleTable:
        """Return the rows of `table` that have been drawn."""
        return table.select(self._taken(table))

    def draw(self, arrivals: Arrivals, batch_size: int) -> list[SampleKey] | None:
        """Draw and record the next batch.

        Returns:
            `batch_size` keys, fewer at the end of the epoch; empty where all are drawn and no more
            will come; None where too few wait.

        Raises:
            StoreError: the ledger cannot be written; nothing was drawn.
        """
        table = arrivals.table
        taken = self._taken(table)
        waiting = np.flatnonzero(~taken)
        if not arrivals.complete and len(waiting) < max(self._size, batch_size):
            return None
        number = len(self._batches)
        draw = rng.stream(self._seed, "window", number)
        chosen = draw.choice(waiting, min(batch_size, len(waiting)), replace=False)
        keys = [table.key(row) for row in chosen]
        if keys:
            self._append(_Record(number, [(key.device, key.sample) for key in keys]))
            self._batches.append(keys)
            self._drawn.append(self._encode(keys))
            taken[chosen] = True
        return keys

    def _taken(self, table: SampleTable) -> npt.NDArray[np.bool_]:
        """bool [N], which rows were drawn; `draw` keeps it up to date for as long as it is asked
        about the same table, as looking up every row takes far longer than a draw."""
        if self._latest is None or self._latest[0] is not table:
            taken = np.isin(self._row_codes(table), np.concatenate(self._drawn))
            self._latest = (table, taken)
        return self._latest[1]

    def _append(self, record: _Record) -> None:
        with explained(self._ledger):
            before = self._ledger.stat().st_size
            try:
                with self._ledger.open("ab") as file:
                    file.write(msgspec.json.encode(record) + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(self._ledger, before)
                raise

    def _encode(self, keys: Iterable[SampleKey]) -> npt.NDArray[np.int64]:
        return np.array([self._code(key.device) << 32 | key.sample for key in keys], np.int64)

    def _row_codes(self, table: SampleTable) -> npt.NDArray[np.int64]:
        codes = np.array([self._code(device) for device in table.devices], np.int64)
        joined: npt.NDArray[np.int64] = codes[table.device] << 32 | table.sample.astype(np.int64)
        return joined

    def _code(self, device: str) -> int:
        return self._codes.setdefault(device, len(self._codes))


def _read_ledger(path: Path) -> list[list[SampleKey]]:
    """Read the whole lines and cut off a torn one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        file.truncate(whole)
        os.fsync(file.fileno())
    sync_folder(path.parent)
    batches = []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1]):
        try:
            record = msgspec.json.decode(line, type=_Record)
        except msgspec.DecodeError as error:
            raise _damaged(path, f"line {number + 1}: {error}") from error
        if record.batch != number or not record.keys:
            raise _damaged(path, f"line {number + 1} for batch {record.batch}")
        batches.append([SampleKey(device, sample) for device, sample in record.keys])
    return batches


def _damaged(path: Path, got: str) -> StoreError:
    return StoreError(
        f"the ledger {path} is damaged",
        got=got,
        allowed="one JSON record a line, each sample once",
        remedy="restore the file, or purge the run and start it anew",
    )
