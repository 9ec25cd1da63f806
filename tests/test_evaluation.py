"""The evaluation data at the cut: computed once, and computed again where it is damaged."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from splitfrozen.config import Config, convert
from splitfrozen.errors import StoreError
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import Prepared
from splitfrozen.runs.evaluation import open_store
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.prepare import load_sliced, prepare
from splitfrozen.server.store import Store

Ready = tuple[RunFolder, Prepared, SlicedModel]


@pytest.fixture
def ready(save_model: Callable[..., Path], tmp_path: Path) -> Ready:
    (tmp_path / "test.csv").write_text("text,label\n0 1 2,a\na b,b\n3,c\n")
    table = {
        "model": {"name": str(save_model(tmp_path / "model", "gpt2-classification")), "cut": 1},
        "task": {"labels": ["a", "b", "c"], "eval": str(tmp_path / "test.csv"), "max_tokens": 8},
        "devices": {"count": 1},
        "run": {"folder": str(tmp_path / "run")},
    }
    run = RunFolder.create(convert(table, Config))
    sliced = load_sliced(run.config)
    return run, prepare(run, sliced), sliced


def opened(ready: Ready) -> Store:
    run, prepared, sliced = ready
    assert run.config.task.eval is not None
    return open_store(run.evaluation, run.config.task.eval, run, prepared, sliced)


def read(store: Store) -> list[np.ndarray]:
    table = store.samples()
    return [one.hidden for one in store.read([table.key(row) for row in range(len(table))])]


def test_what_is_damaged_is_to_be_deleted_and_comes_back(ready: Ready) -> None:
    run, _, _ = ready
    with closing(opened(ready)) as store:
        first = read(store)
    assert [len(hidden) for hidden in first] == [3, 2, 1]
    [segment] = run.evaluation.rglob("*.seg")
    segment.write_bytes(bytes(segment.stat().st_size))
    with closing(opened(ready)) as store, pytest.raises(StoreError) as caught:
        read(store)
    assert caught.value.remedy.startswith(f"delete the folder {run.evaluation};")
    assert "purge" not in str(caught.value)
    for path in sorted(run.evaluation.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with closing(opened(ready)) as store:
        for again, before in zip(read(store), first, strict=True):
            np.testing.assert_array_equal(again, before)


def test_a_damaged_index_is_no_device_either(ready: Ready) -> None:
    run, _, _ = ready
    opened(ready).close()
    (run.evaluation / "store" / "index.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=f"delete the folder {run.evaluation};"):
        opened(ready)
