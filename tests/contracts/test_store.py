"""What every activation store must keep: each sample once, whole, under whatever order of events.

The disk store is checked against a model in memory that is too simple to be wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from splitfrozen.errors import RefusedError, StoreError, WireError
from splitfrozen.records import (
    Activation,
    EncodedSample,
    FrameHeader,
    Receipt,
    SampleKey,
    SampleTable,
)
from splitfrozen.rng import stream
from splitfrozen.server.store import Store, Totals
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, pack, unpack

WIDTH = 6
DEVICES = ("device-00", "device-01", "device-02")


class Receiver(Protocol):
    """What this suite asks of a store."""

    def add(
        self, header: FrameHeader, sha256: str, samples: Sequence[EncodedSample]
    ) -> Receipt: ...
    def chunks(self, device: str) -> set[int]: ...
    def samples(self) -> SampleTable: ...
    def read(self, keys: Sequence[SampleKey]) -> list[Activation]: ...
    def replace(self, device: str, activations: Iterable[Activation]) -> None: ...
    def purge(self, device: str) -> None: ...


class MemoryStore:
    """A dictionary: what the disk store must look like from outside."""

    def __init__(self) -> None:
        self.kept: dict[SampleKey, tuple[str, Activation]] = {}
        self.came: dict[SampleKey, int] = {}
        self.indices: dict[str, set[int]] = {}
        self.purged: set[str] = set()

    def add(self, header: FrameHeader, sha256: str, samples: Sequence[EncodedSample]) -> Receipt:
        del sha256
        if header.device in self.purged:
            raise RefusedError("purged", got="", allowed="", remedy="")
        stored = 0
        for sample in samples:
            hidden = codec(header.codec).decode(sample.payload, sample.tokens, header.width)
            activation = Activation(sample.sample, header.depth, hidden, sample.targets)
            key = SampleKey(header.device, sample.sample)
            stored += key not in self.kept
            if key not in self.kept:
                self.kept[key], self.came[key] = (header.codec, activation), header.index
        self.indices.setdefault(header.device, set()).add(header.index)
        return Receipt(index=header.index, stored=stored)

    def chunks(self, device: str) -> set[int]:
        return self.indices.get(device, set())

    def samples(self) -> SampleTable:
        keys = sorted(self.kept)
        devices = tuple(sorted({key.device for key in keys}))
        columns = [
            (devices.index(key.device), key.sample, len(kept.hidden), kept.depth, self.came[key])
            for key in keys
            for kept in [self.kept[key][1]]
        ]
        table = np.array(columns, np.int32).reshape(-1, 5).T
        return SampleTable(devices, *table)

    def read(self, keys: Sequence[SampleKey]) -> list[Activation]:
        if missing := [key for key in keys if key not in self.kept]:
            raise StoreError(f"sample {missing[0].sample}", got="", allowed="", remedy="")
        return [self.kept[key][1] for key in keys]

    def replace(self, device: str, activations: Iterable[Activation]) -> None:
        for new in activations:
            key = SampleKey(device, new.sample)
            if key in self.kept and self.kept[key][1].depth < new.depth:
                kept = codec(codec(self.kept[key][0]).lifted)
                hidden = kept.decode(kept.encode(new.hidden), *new.hidden.shape)
                self.kept[key] = (kept.name, Activation(new.sample, new.depth, hidden, new.targets))

    def purge(self, device: str) -> None:
        self.purged.add(device)
        self.indices.pop(device, None)
        self.kept = {key: kept for key, kept in self.kept.items() if key.device != device}


@pytest.fixture(params=["memory", "disk"])
def receiver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Receiver]:
    if request.param == "memory":
        yield MemoryStore()
        return
    disk = Store(tmp_path / "store")
    yield disk
    disk.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "store")
    yield opened
    opened.close()


def hidden_of(device: str, sample: int, salt: int = 0) -> np.ndarray:
    tokens = 1 + sample % 4
    drawn = stream(salt, device, sample).normal(size=(tokens, WIDTH))
    return drawn.astype(np.float32)


def chunk(
    device: str,
    number: int,
    samples: Sequence[int],
    *,
    codec_name: str = "float32",
    depth: int = 1,
    salt: int = 0,
) -> tuple[FrameHeader, str, list[EncodedSample]]:
    """A chunk as it comes off the wire. Another `salt` gives other activations."""
    encoded = []
    for sample in samples:
        hidden = hidden_of(device, sample, salt)
        targets = np.array([sample % 3], np.int32)
        payload = codec(codec_name).encode(hidden)
        encoded.append(EncodedSample(sample, len(hidden), targets, payload))
    made = pack(Origin("run", device, "0" * 64, depth, WIDTH, codec_name), number, encoded)
    header, unpacked = unpack(made.frame)
    return header, made.sha256, unpacked


def rows(table: SampleTable) -> list[tuple[str, int, int, int]]:
    return [
        (table.key(row).device, int(table.sample[row]), int(table.tokens[row]), int(depth))
        for row, depth in enumerate(table.depth)
    ]


def lift(kept: Activation, depth: int = 3) -> Activation:
    return Activation(kept.sample, depth, kept.hidden + np.float32(0.5), kept.targets)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.seg"))


# --- the contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("codec_name", ["float32", "float16+zstd", "int8"])
def test_what_was_added_is_read_back_as_the_codec_decodes_it(
    receiver: Receiver, codec_name: str
) -> None:
    header, sha256, samples = chunk("device-00", 7, [4, 2, 9], codec_name=codec_name)
    assert receiver.add(header, sha256, samples) == Receipt(index=7, stored=3)
    read = receiver.read([SampleKey("device-00", sample) for sample in (9, 4, 2, 9)])
    assert [one.sample for one in read] == [9, 4, 2, 9]
    for one in read:
        whole = hidden_of("device-00", one.sample)
        kind = codec(codec_name)
        assert (one.hidden == kind.decode(kind.encode(whole), *whole.shape)).all()
        assert one.targets.tolist() == [one.sample % 3]
        assert one.targets.dtype == np.int32
        assert one.depth == 1
    assert receiver.chunks("device-00") == {7}


def test_the_table_is_sorted_by_device_and_sample(receiver: Receiver) -> None:
    assert len(receiver.samples()) == 0
    for device, samples in (("device-02", [3, 1]), ("device-00", [11, 2]), ("device-01", [0])):
        receiver.add(*chunk(device, 0, samples, depth=2 if device == "device-01" else 1))
    table = receiver.samples()
    assert table.devices == DEVICES
    assert rows(table) == [
        ("device-00", 2, 3, 1),
        ("device-00", 11, 4, 1),
        ("device-01", 0, 1, 2),
        ("device-02", 1, 2, 1),
        ("device-02", 3, 4, 1),
    ]
    assert {table.device.dtype, table.sample.dtype, table.tokens.dtype, table.depth.dtype} == {
        np.dtype(np.int32)
    }


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_each_sample_is_stored_once_in_any_order(
    receiver: Receiver, order: tuple[int, ...]
) -> None:
    chunks = [chunk("device-00", 0, [0, 1]), chunk("device-00", 1, [2, 3, 4])]
    chunks.append(chunk("device-01", 0, [0]))
    stored = [receiver.add(*chunks[which]).stored for which in (*order, *order, *reversed(order))]
    assert sum(stored[:3]) == 6
    assert stored[3:] == [0] * 6
    assert [row[:2] for row in rows(receiver.samples())] == [
        *(("device-00", sample) for sample in range(5)),
        ("device-01", 0),
    ]


def test_the_first_stored_wins_also_over_other_bytes_and_after_lifting(receiver: Receiver) -> None:
    key = SampleKey("device-00", 3)
    receiver.add(*chunk("device-00", 0, [3]))
    other = chunk("device-00", 5, [3, 4], salt=1)
    assert receiver.add(*other) == Receipt(index=5, stored=1)
    assert (receiver.read([key])[0].hidden == hidden_of("device-00", 3)).all()
    assert receiver.chunks("device-00") == {0, 5}
    receiver.replace("device-00", [lift(receiver.read([key])[0])])
    assert receiver.add(*chunk("device-00", 6, [3], salt=2)).stored == 0
    assert receiver.chunks("device-00") == {0, 5, 6}
    assert receiver.read([key])[0].depth == 3


def test_lifted_replaces_shallow_and_nothing_else(receiver: Receiver) -> None:
    receiver.add(*chunk("device-00", 0, [0, 1, 2], codec_name="int8"))
    receiver.add(*chunk("device-01", 0, [0], depth=3))
    kept = receiver.read([SampleKey("device-00", 1), SampleKey("device-01", 0)])
    receiver.replace("device-00", [lift(kept[0]), lift(Activation(99, 1, *_nothing()))])
    receiver.replace("device-01", [lift(kept[1])])
    assert [row[::3] for row in rows(receiver.samples())] == [
        ("device-00", 1),
        ("device-00", 3),
        ("device-00", 1),
        ("device-01", 3),
    ]
    lifted, deep = receiver.read([SampleKey("device-00", 1), SampleKey("device-01", 0)])
    # int8 is lifted into float16.
    assert (lifted.hidden == lift(kept[0]).hidden.astype(np.float16)).all()
    assert lifted.targets.tolist() == [1]
    assert (deep.hidden == kept[1].hidden).all()


def test_a_missing_sample_is_named(receiver: Receiver) -> None:
    receiver.add(*chunk("device-00", 0, [0]))
    with pytest.raises(StoreError, match="sample 5"):
        receiver.read([SampleKey("device-00", 0), SampleKey("device-00", 5)])


def test_purge_leaves_nothing_and_refuses_more(receiver: Receiver, tmp_path: Path) -> None:
    for device in DEVICES[:2]:
        receiver.add(*chunk(device, 0, [0, 1]))
    receiver.purge("device-00")
    assert [row[0] for row in rows(receiver.samples())] == ["device-01", "device-01"]
    assert receiver.chunks("device-00") == set()
    assert not list(tmp_path.rglob("device-00/*"))
    receiver.replace("device-00", [Activation(0, 3, *_nothing())])
    with pytest.raises(RefusedError):
        receiver.add(*chunk("device-00", 1, [2]))
    assert len(receiver.samples()) == 2


def _nothing() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((1, WIDTH), np.float32), np.zeros(1, np.int32)


# --- what only a disk can do -----------------------------------------------------------------


def test_a_store_is_the_same_after_reopening(tmp_path: Path) -> None:
    first = Store(tmp_path)
    first.add(*chunk("device-00", 0, [0, 1]))
    first.close()
    second = Store(tmp_path)
    assert second.add(*chunk("device-00", 0, [0, 1])).stored == 0
    assert second.add(*chunk("device-00", 1, [2])).stored == 1
    assert len(second.read([SampleKey("device-00", sample) for sample in range(3)])) == 3
    second.close()
    assert len(files(tmp_path)) == 1


def test_only_recovery_deletes_what_a_crash_left(tmp_path: Path) -> None:
    """Who looks at a store that another process serves changes nothing."""
    with contextlib.closing(Store(tmp_path)) as first:
        first.add(*chunk("device-00", 0, [0]))
    left = tmp_path / "segments" / "device-00" / "d1-77.seg"
    left.write_bytes(b"no row knows this file")
    with contextlib.closing(Store(tmp_path)) as second:
        assert len(second.samples()) == 1
        assert left.exists()
        second.recover()
        assert not left.exists()
        assert len(second.read([SampleKey("device-00", 0)])) == 1


def test_payloads_are_kept_as_received(disk: Store, tmp_path: Path) -> None:
    header, sha256, samples = chunk("device-00", 0, [0, 1], codec_name="float16+zlib")
    disk.add(header, sha256, samples)
    expected = b"".join(
        bytes(sample.payload) + sample.targets.astype("<i4").tobytes() for sample in samples
    )
    assert files(tmp_path)[0].read_bytes() == expected


def test_a_chunk_that_does_not_decode_leaves_nothing(disk: Store, tmp_path: Path) -> None:
    header, sha256, samples = chunk("device-00", 0, [0, 1])
    broken = EncodedSample(1, 2, samples[1].targets, np.full(2 * WIDTH, np.nan, "<f4").tobytes())
    with pytest.raises(WireError, match="not finite"):
        disk.add(header, sha256, [samples[0], broken])
    with pytest.raises(WireError, match="twice"):
        disk.add(header, sha256, [samples[0], samples[0]])
    assert len(disk.samples()) == 0
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["../x", "", "a/b", "a\0b", "device-00\n", "x" * 101, "dévice"])
def test_a_hostile_name_makes_no_file(disk: Store, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.parent.rglob("*"))
    header, sha256, samples = chunk("device-00", 0, [0])
    fields = {key: getattr(header, key) for key in header.__struct_fields__}
    with pytest.raises(WireError, match="device id"):
        disk.add(FrameHeader(**fields | {"device": name}), sha256, samples)
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_damaged_byte_is_found_and_named(disk: Store, tmp_path: Path) -> None:
    disk.add(*chunk("device-00", 0, [0, 1, 2]))
    file = files(tmp_path)[0]
    data = bytearray(file.read_bytes())
    data[4 * WIDTH + 4 + 10] ^= 1
    file.write_bytes(data)
    keys = [SampleKey("device-00", sample) for sample in (0, 2, 1)]
    assert len(disk.read(keys[:2])) == 2
    with pytest.raises(StoreError, match="sample 1 of device-00"):
        disk.read(keys)


def test_what_grew_too_large_for_its_lifted_form_names_device_and_remedy(disk: Store) -> None:
    disk.add(*chunk("device-00", 0, [0, 1], codec_name="int8"))
    kept = disk.read([SampleKey("device-00", sample) for sample in (0, 1)])
    large = Activation(1, 3, np.full_like(kept[1].hidden, 1e5), kept[1].targets)
    with pytest.raises(
        StoreError, match=r"sample 1 of device-00.*100000.*65504.*--device device-00"
    ):
        disk.replace("device-00", [lift(kept[0]), large])
    assert [one.depth for one in disk.read([SampleKey("device-00", n) for n in (0, 1)])] == [1, 1]
    disk.replace("device-00", [lift(kept[0])])
    assert disk.read([SampleKey("device-00", 0)])[0].depth == 3


def test_a_lost_file_is_named(disk: Store, tmp_path: Path) -> None:
    disk.add(*chunk("device-00", 0, [0]))
    files(tmp_path)[0].unlink()
    with pytest.raises(StoreError, match=r"sample 0 of device-00.*missing"):
        disk.read([SampleKey("device-00", 0)])


def test_segments_go_when_all_their_samples_are_lifted(disk: Store, tmp_path: Path) -> None:
    disk.add(*chunk("device-00", 0, [0, 1]))
    disk.add(*chunk("device-01", 0, [0]))
    shallow = files(tmp_path)
    kept = disk.read([SampleKey("device-00", sample) for sample in (0, 1)])
    disk.replace("device-00", [lift(kept[0])])
    assert set(shallow) < set(files(tmp_path))
    disk.replace("device-00", [lift(kept[1])])
    assert shallow[0] not in files(tmp_path)
    assert [path.parent.name for path in files(tmp_path)] == ["device-00", "device-01"]
    assert disk.add(*chunk("device-00", 1, [2])).stored == 1
    assert rows(disk.samples())[2] == ("device-00", 2, 3, 1)


def test_segments_are_rolled(tmp_path: Path) -> None:
    disk = Store(tmp_path, segment_bytes=100)
    for number in range(4):
        disk.add(*chunk("device-00", number, [4 * number + 3]))
    shallow = files(tmp_path)
    assert len(shallow) == 4
    assert [path.stat().st_size for path in shallow] == [100] * 4
    keys = [SampleKey("device-00", 4 * number + 3) for number in range(4)]
    kept = disk.read(keys)
    disk.replace("device-00", (lift(one) for one in kept))
    assert len(files(tmp_path)) == 4
    assert not set(shallow) & set(files(tmp_path))
    assert all(
        (new.hidden == old.hidden + np.float32(0.5)).all()
        for new, old in zip(disk.read(keys), kept, strict=True)
    )
    disk.close()


def test_totals_count_what_was_received(disk: Store) -> None:
    header, sha256, samples = chunk("device-00", 0, [0, 1], codec_name="float16")
    disk.add(header, sha256, samples)
    disk.add(header, sha256, samples)
    disk.add(*chunk("device-01", 0, [0]))
    disk.replace("device-00", [lift(disk.read([SampleKey("device-00", 0)])[0])])
    disk.purge("device-01")
    received = sum(len(sample.payload) for sample in samples)
    assert disk.totals() == {"device-00": Totals(samples=2, tokens=3, bytes=received)}


def test_threads_add_the_same_chunks_at_once(disk: Store) -> None:
    chunks = [
        chunk(device, number, range(3 * number, 3 * number + 3))
        for device in DEVICES
        for number in range(6)
    ]
    stored: list[int] = []

    def work(start: int) -> None:
        turns = chunks[start:] + chunks[:start]
        stored.extend(disk.add(*one).stored for one in turns)

    threads = [threading.Thread(target=work, args=(5 * start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = disk.samples()
    assert sum(stored) == len(table) == 54
    for one in disk.read([table.key(row) for row in range(54)]):
        assert one.hidden.shape == (1 + one.sample % 4, WIDTH)


def test_readers_do_not_notice_lifting(disk: Store) -> None:
    keys = [SampleKey("device-00", sample) for sample in range(8)]
    disk.add(*chunk("device-00", 0, range(8)))
    done = threading.Event()
    failures: list[Exception] = []

    def reading() -> None:
        while not done.is_set():
            try:
                assert len({one.depth for one in disk.read(keys)}) == 1
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=reading)
    reader.start()
    for depth in range(2, 30):
        disk.replace("device-00", [lift(one, depth) for one in disk.read(keys)])
    done.set()
    reader.join()
    assert not failures
    assert {one.depth for one in disk.read(keys)} == {29}


READER = """
import sys
from pathlib import Path
from splitfrozen.server.store import Store, Totals
store, last = Store(Path(sys.argv[1])), 0
while last < 60:
    table = store.samples()
    read = store.read([table.key(row) for row in range(len(table))])
    assert len(table) >= last and len(read) == len(table)
    last = len(table)
print(last)
"""


def test_another_process_reads_while_this_one_writes(disk: Store, tmp_path: Path) -> None:
    command = [sys.executable, "-c", READER, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        for number in range(30):
            disk.add(*chunk("device-00", number, [2 * number, 2 * number + 1]))
            if number == 15:
                kept = disk.read([SampleKey("device-00", sample) for sample in range(20)])
                disk.replace("device-00", map(lift, kept))
        out, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert out.strip() == "60"


def test_memory_and_disk_agree_on_any_history(make_disk: Callable[[], Store]) -> None:
    for seed in range(12):
        draw = stream(seed, "history")
        memory, disk_store = MemoryStore(), make_disk()
        for number in range(20):
            device = DEVICES[int(draw.integers(3))]
            samples = [int(one) for one in draw.permutation(6)[: 1 + int(draw.integers(3))]]
            what = int(draw.integers(10))
            for one in (memory, disk_store):
                _act(one, what, chunk(device, number, samples, codec_name="float16", salt=number))
        ours, theirs = disk_store.samples(), memory.samples()
        assert rows(ours) == rows(theirs)
        assert ours.chunk.tolist() == theirs.chunk.tolist()
        keys = [ours.key(row) for row in range(len(ours))]
        for left, right in zip(disk_store.read(keys), memory.read(keys), strict=True):
            assert (left.hidden == right.hidden).all()
        assert [disk_store.chunks(one) for one in DEVICES] == [
            memory.chunks(one) for one in DEVICES
        ]


def _act(receiver: Receiver, what: int, made: tuple[FrameHeader, str, list[EncodedSample]]) -> None:
    device = made[0].device
    if what == 0:
        receiver.purge(device)
    elif what < 4:
        table = receiver.samples()
        keys = [table.key(row) for row in range(len(table)) if table.key(row).device == device]
        receiver.replace(device, map(lift, receiver.read(keys[::2])))
    else:
        with contextlib.suppress(RefusedError):
            receiver.add(*made)


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[], Store]]:
    made: list[Store] = []

    def make() -> Store:
        made.append(Store(tmp_path / str(len(made))))
        return made[-1]

    yield make
    for one in made:
        one.close()
