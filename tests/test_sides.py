"""Runs whose codec is fitted to public rows: what is fitted, what it saves, what is refused."""

from __future__ import annotations

import csv
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import splitfrozen
from splitfrozen.data import village
from splitfrozen.errors import DataError, StoreError, WireError
from splitfrozen.records import SampleKey
from splitfrozen.runs.folder import RunFolder, side_name
from splitfrozen.runs.train import train
from splitfrozen.server.store import Store

# peft 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

DEMO = Path(splitfrozen.__file__).parent / "assets" / "demo"
RUN = """
[model]
name = "{model}"
cut = 2
precision = "float32"
[task]
labels = {labels}
max_tokens = 64
[data]
train = "train.csv"
[devices]
count = 2
depth = [1, 2]
[train]
epochs = 1
[wire]
codec = "{codec}"
{public}
[run]
folder = "{folder}"
"""


def write_rows(path: Path, seed: int, count: int, columns: tuple[str, ...]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(village.task_rows(seed, count))


def write_run(folder: Path, codec: str, name: str) -> Path:
    path = folder / f"{name}.toml"
    public = 'public = "public.csv"' if codec.startswith("ecsq") else ""
    path.write_text(
        RUN.format(
            model=DEMO,
            labels=list(village.LABELS),
            codec=codec,
            public=public,
            folder=name,
        ).replace("'", '"')
    )
    return path


def stored(run: RunFolder) -> dict[SampleKey, np.ndarray]:
    with closing(Store(run.store, codecs=run.codecs)) as store:
        table = store.samples()
        keys = [table.key(row) for row in range(len(table))]
        return {key: one.hidden for key, one in zip(keys, store.read(keys), strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sides")
    write_rows(made / "train.csv", 0, 60, ("text", "label"))
    # Public text of the same kind has no labels of the task.
    write_rows(made / "public.csv", 1, 200, ("text",))
    for codec, name in (("float32", "exact"), ("ecsq:0.5", "coded")):
        train(write_run(made, codec, name))
    return made


def test_each_depth_has_its_own_side_data_and_devices_name_them(folder: Path) -> None:
    run = RunFolder(folder / "coded")
    prepared = run.prepared()
    assert prepared is not None
    assert sorted(prepared.sides) == [1, 2]
    assert len({ref.sha256 for ref in prepared.sides.values()}) == 2
    for depth, ref in prepared.sides.items():
        name = prepared.codec_at(depth)
        assert name == f"ecsq:0.5@{ref.sha256[:16]}"
        assert (run.files / ref.name).stat().st_size == ref.bytes
        assert run.codecs(name).name == name
    float32 = 4 * prepared.width
    assert all(0 < size < float32 / 10 for size in prepared.bytes_per_token.values())


def test_what_is_stored_is_close_to_what_was_computed(folder: Path) -> None:
    exact, coded = (stored(RunFolder(folder / name)) for name in ("exact", "coded"))
    assert exact.keys() == coded.keys()
    off = sum(float(np.square(coded[key] - exact[key]).sum()) for key in exact)
    everything = np.concatenate(list(exact.values()))
    spread = float(np.square(everything - everything.mean(axis=0)).sum())
    assert 0.001 < off / spread < 0.3


def test_it_sends_far_less(folder: Path) -> None:
    sizes = []
    for name in ("exact", "coded"):
        run = RunFolder(folder / name)
        with closing(Store(run.store, codecs=run.codecs)) as store:
            sizes.append(sum(one.bytes for one in store.totals().values()))
    assert sizes[1] < sizes[0] / 10


def test_the_same_run_has_the_same_side_data(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "splitfrozen")
    train(write_run(folder, "ecsq:0.5", "again"))
    told = [message for message in caplog.messages if message.startswith("ecsq:0.5 at depth")]
    assert len(told) == 2
    assert all(one.endswith("; targets and the heads of chunks come on top") for one in told)
    one, other = (RunFolder(folder / name).prepared() for name in ("coded", "again"))
    assert one is not None
    assert other is not None
    assert one.sides == other.sides


def test_side_data_that_are_gone_or_damaged_are_told(folder: Path) -> None:
    train(write_run(folder, "ecsq:1", "damaged"))
    run = RunFolder(folder / "damaged")
    prepared = run.prepared()
    assert prepared is not None
    path = run.files / prepared.sides[1].name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="is damaged"):
        run.codecs(prepared.codec_at(1))
    path.unlink()
    with pytest.raises(StoreError, match="is damaged"):
        run.codecs(prepared.codec_at(1))
    with pytest.raises(WireError, match="needs its side data"):
        run.codecs("ecsq:1")
    assert side_name("0123456789abcdef" * 4) == "side-0123456789abcdef.bin"


def test_public_rows_that_cannot_be_used_are_told(folder: Path) -> None:
    path = write_run(folder, "ecsq:0.5", "nothing")
    path.write_text(path.read_text().replace("public.csv", "empty.csv"))
    write_rows(folder / "empty.csv", 1, 0, ("text",))
    with pytest.raises(DataError, match=r"wire\.public"):
        train(path)


@pytest.mark.parametrize("text", ["text\na\n", "text\n" + "the mill\n" * 200])
def test_too_few_public_rows_to_fit_to_are_refused(folder: Path, text: str) -> None:
    path = write_run(folder, "ecsq:0.5", "few")
    path.write_text(path.read_text().replace("public.csv", "few.csv"))
    (folder / "few.csv").write_text(text)
    with pytest.raises(DataError, match=r"too few rows: got \d+ tokens in 1 different rows"):
        train(path)


def test_a_run_that_was_refused_begins_once_its_rows_are_mended(folder: Path) -> None:
    path = write_run(folder, "ecsq:0.5", "mended")
    path.write_text(path.read_text().replace("public.csv", "mended.csv"))
    (folder / "mended.csv").write_text("text\n")
    with pytest.raises(DataError):
        train(path)
    (folder / "mended.csv").write_bytes((folder / "public.csv").read_bytes())
    train(path)
    one, other = (RunFolder(folder / name).prepared() for name in ("coded", "mended"))
    assert one is not None
    assert other is not None
    assert one.sides == other.sides
