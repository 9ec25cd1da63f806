"""The store under kills, torn tails and full disks: nothing lost, nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from splitfrozen.errors import StoreError
from splitfrozen.server.database import refuse_network_folder
from splitfrozen.server.store import CRASH_POINTS, Store

# A device's whole life in one process: 4 chunks, all lifted, another device purged. Killed at the
# named point on its given visit, it is started again and goes through the same steps.
LIFE = """
import json, os, sys
from pathlib import Path
import numpy as np
from splitfrozen.records import Activation, EncodedSample, SampleKey
from splitfrozen.server.store import Store
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, pack, unpack

folder, point, visit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
visits = 0

def at(here):
    global visits
    visits += here == point
    if here == point and visits == visit:
        os._exit(9)

def hidden(sample):
    return np.full((1 + sample % 3, 4), sample, np.float32)

def add(store, device, number):
    kind = codec("float16")
    samples = [EncodedSample(s, 1 + s % 3, np.array([s], np.int32), kind.encode(hidden(s)))
               for s in range(5 * number, 5 * number + 5)]
    made = pack(Origin("run", device, "0" * 64, 1, 4, kind.name), number, samples)
    header, unpacked = unpack(made.frame)
    receipt = store.add(header, made.sha256, unpacked)
    print("ack", device, number, flush=True)

store = Store(folder, at)
store.recover()
for number in range(2):
    if not (folder / "purged").exists():
        add(store, "device-01", number)
for number in range(4):
    if number not in store.chunks("device-00"):
        add(store, "device-00", number)
keys = [SampleKey("device-00", s) for s in range(20)]
lifted = [Activation(a.sample, 3, a.hidden * 2, a.targets) for a in store.read(keys) if a.depth < 3]
store.replace("device-00", lifted)
(folder / "purged").touch()
store.purge("device-01")
table = store.samples()
read = store.read([table.key(row) for row in range(len(table))])
print(json.dumps([[table.key(row).device, a.sample, a.depth, a.hidden.tolist(), a.targets.tolist()]
                  for row, a in enumerate(read)]))
"""


def live(folder: Path, point: str, visit: int) -> tuple[int, list[str]]:
    command = [sys.executable, "-c", LIFE, str(folder), point, str(visit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 9), done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    code, lines = live(tmp_path_factory.mktemp("whole"), "none", 0)
    assert code == 0
    result: list[object] = json.loads(lines[-1])
    assert len(result) == 20
    return result


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_kill_at_any_point_changes_nothing(
    tmp_path: Path, point: str, uninterrupted: list[object]
) -> None:
    code, before = live(tmp_path, point, 2 if point.startswith(("payload", "index")) else 1)
    assert code == 9, "the point was never reached"
    survivor = Store(tmp_path)
    for line in before:
        _, device, number = line.split()
        assert int(number) in survivor.chunks(device) or point.startswith("purge")
    survivor.close()
    code, lines = live(tmp_path, "none", 0)
    assert code == 0
    assert json.loads(lines[-1]) == uninterrupted
    # 20 lifted samples of 1 to 3 tokens: nothing else is left on the disk.
    left = sum(path.stat().st_size for path in tmp_path.rglob("*.seg"))
    assert left == sum(8 * (1 + sample % 3) + 4 for sample in range(20))


def test_a_torn_tail_is_cut_off(tmp_path: Path, uninterrupted: list[object]) -> None:
    live(tmp_path, "payload synced", 3)
    tail = next(tmp_path.rglob("device-00/*.seg"))
    with tail.open("ab") as file:
        file.write(b"half a sam")
    (tmp_path / "segments" / "device-00" / "d1-77.seg").write_bytes(b"no row knows this file")
    code, lines = live(tmp_path, "none", 0)
    assert code == 0
    assert json.loads(lines[-1]) == uninterrupted
    assert not list(tmp_path.rglob("d1-77.seg"))


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from splitfrozen.errors import DiskFullError
from splitfrozen.records import EncodedSample
from splitfrozen.server.store import Store
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, pack, unpack

store = Store(Path(sys.argv[1]))

def add(number):
    payload = codec("float32").encode(np.ones((100, 100), np.float32))
    targets = np.zeros(1, np.int32)
    samples = [EncodedSample(10 * number + s, 100, targets, payload) for s in range(10)]
    made = pack(Origin("run", "device-00", "0" * 64, 1, 100, "float32"), number, samples)
    header, unpacked = unpack(made.frame)
    return store.add(header, made.sha256, unpacked).stored

resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
stored = [add(0), add(1)]
for _ in range(2):
    try:
        add(2)
    except DiskFullError as error:
        stored.append(type(error).__name__)
sizes = [path.stat().st_size for path in Path(sys.argv[1]).rglob("*.seg")]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
stored.append(add(2))
table = store.samples()
print(stored, sizes, len(store.read([table.key(row) for row in range(len(table))])))
"""


def test_a_full_disk_loses_nothing_and_heals(tmp_path: Path) -> None:
    """A limit on the length of files makes the kernel tear the write, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ("[10, 10, 'DiskFullError', 'DiskFullError', 10] [800080] 30")


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p", "fuse.sshfs"])
def test_network_file_systems_are_refused(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "a b" / "run"
    run.mkdir(parents=True)
    mounts = tmp_path / "mounts"
    point = str(tmp_path / "a b").replace(" ", "\\040")
    mounts.write_text(f"/dev/root / ext4 rw 0 0\nserver:/x {point} {kind} rw 0 0\n")
    with pytest.raises(StoreError, match=f"{kind} at .*local disk"):
        refuse_network_folder(run, mounts)
    refuse_network_folder(tmp_path, mounts)


def test_a_file_that_is_no_database_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"this is not a database, it is a text" * 100)
    with pytest.raises(StoreError, match="check the disk"):
        Store(tmp_path)


def test_a_lost_index_is_told_and_nothing_is_deleted(tmp_path: Path) -> None:
    segment = tmp_path / "segments" / "device-00" / "d1-1.seg"
    segment.parent.mkdir(parents=True)
    segment.write_bytes(b"activations of an index that was lost")
    store = Store(tmp_path)
    with pytest.raises(StoreError, match=r"no index knows.*restore index"):
        store.recover()
    store.close()
    assert segment.is_file()
