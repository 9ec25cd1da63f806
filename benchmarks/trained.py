"""A training without a run folder, for what no setting of a run can change."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from splitfrozen.config import Config
from splitfrozen.data.readers import read_rows
from splitfrozen.data.samples import SampleSource
from splitfrozen.data.tasks import build_samples
from splitfrozen.methods.bench import Bench
from splitfrozen.methods.parts import Whole
from splitfrozen.methods.table import build
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import Activation, Floats, SampleKey, SampleTable
from splitfrozen.runs.devices import TorchFront
from splitfrozen.runs.prepare import load_sliced, task_alone, to_fastest
from splitfrozen.runs.rows import gather
from splitfrozen.training.batching import Order, split
from splitfrozen.training.evaluate import Evaluator
from splitfrozen.training.loop import Hooks, Job, Source, fit
from splitfrozen.training.precision import resolve
from splitfrozen.wire.codec import codec

Change = Callable[[SampleKey, Floats, int], Floats]
"""What training sees of a sample's activation, float32 [T, D], in an epoch."""


def trained(
    wanted: Config,
    *,
    order: Callable[[SampleTable], Order] | None = None,
    change: Change | None = None,
    held: int | None = None,
) -> Mapping[str, float]:
    """Train as `wanted` says, and measure on `task.eval`.

    Args:
        order: in place of the method's own; of as many steps.
        change: of activations, for a method that trains on them.
        held: rows of `task.eval` to measure on; all where it is None.
    """
    sliced = load_sliced(wanted)
    device = to_fastest(sliced)
    dtype = resolve(wanted.model.precision, device)
    task, tokenizer = task_alone(wanted, sliced)
    assert wanted.task.eval is not None, "a benchmark names it"
    rows = islice(read_rows(wanted.task.eval, task.columns, report=tell), held)
    measured = SampleSource({"held": list(build_samples(rows, task, tokenizer, report=tell))})
    portions = gather(wanted, task, tokenizer).portions
    own = {f"device-{number:02}": portion.samples for number, portion in enumerate(portions)}
    frozen = change is not None
    samples = SampleSource(own, wanted.model.cut if frozen else 0)
    table = samples.samples()
    built = build(Bench(sliced, wanted, table, dtype, partial(codec, "float32")))
    assert frozen == (built.trains_on == "activations")
    source: Source[Any] = samples
    if change is not None:
        source = _Frozen(sliced, samples, wanted, change)
    chosen = built.order if order is None else order(table)
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(wanted.train, wanted.run.seed, len(table), dtype, Path(scratch))
        fit(built.method, source, chosen, job, Hooks(lambda _: None))
    evaluator = Evaluator(
        Whole(built.adapted),
        measured,
        task.kind,
        micro_tokens=wanted.train.micro_tokens,
        dtype=dtype,
        device=device,
    )
    return evaluator().metrics


def tell(event: object) -> None:
    """Say something to whoever waits."""
    print(event, file=sys.stderr)


class _Frozen:
    """Activations at the cut, all in memory, changed whenever they are read."""

    def __init__(
        self, sliced: SlicedModel, samples: SampleSource, wanted: Config, change: Change
    ) -> None:
        self._cut = wanted.model.cut
        self._change = change
        self._samples = samples
        self._read: Counter[SampleKey] = Counter()
        table = samples.samples()
        keys = [table.key(row) for row in range(len(table))]
        held = samples.read(keys)
        front = TorchFront(sliced, self._cut)
        self._hidden: dict[SampleKey, Floats] = {}
        for group in split([sample.length for sample in held], wanted.train.micro_tokens):
            computed = front([held[i] for i in group])
            self._hidden |= {keys[i]: hidden for i, hidden in zip(group, computed, strict=True)}

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        found = []
        for key, sample in zip(keys, self._samples.read(keys), strict=True):
            # Each epoch reads a sample once.
            hidden = self._change(key, self._hidden[key], self._read[key])
            self._read[key] += 1
            found.append(Activation(sample.id, self._cut, hidden, sample.targets))
        return found
