"""The registry: slots, tokens, what devices say, and the run's state, each request repeatable."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from splitfrozen.config import DevicesSpec
from splitfrozen.errors import PlanError, RefusedError, StoreError
from splitfrozen.records import (
    PROTOCOL,
    Announcement,
    ChunkSpan,
    DeviceProfile,
    DeviceReport,
    Enrolled,
    Enrolment,
    FrontManifest,
    Prepared,
    TaskSpec,
)
from splitfrozen.server.assignment import bytes_per_token, front_of, take_profile
from splitfrozen.server.auth import UnknownCredentialError
from splitfrozen.server.registry import SEEN_S, Registry

MIB = 1 << 20


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    opened = Registry(tmp_path / "my-run", clock)
    opened.ensure_slots(3)
    yield opened
    opened.close()


def enrolment(token: str, secret: str = "s" * 43, **changes: object) -> Enrolment:
    fields = {"protocol": PROTOCOL, "name": "pi", "version": "0.1.0"} | changes
    return Enrolment(token=token, secret=secret, **fields)  # type: ignore[arg-type]


def secret(number: int) -> str:
    return f"secret-{number:036}"


def enrol_all(registry: Registry) -> list[str]:
    tokens = registry.tokens().values()
    return [registry.enrol(enrolment(t, secret(i))).device for i, t in enumerate(tokens)]


def profile(flops: float = 1e9, memory_bytes: int = 1 << 30) -> DeviceProfile:
    return DeviceProfile(
        flops=flops, memory_bytes=memory_bytes, uplink_bps=1e12, cores=1, platform=""
    )


ANNOUNCED = Announcement(samples=10, tokens=300, skipped=1, digest="a" * 64)
SPAN = ChunkSpan(0, 1, 1, 2, 7, (0.0, 5.0), (1.0, 1.0), (2.0, 4.0))
REPORT = DeviceReport(seconds=9.0, padding=0.1, spans=(SPAN,))


# --- slots and tokens ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "first", "last"),
    [
        (1, "device-00", "device-00"),
        (100, "device-00", "device-99"),
        (101, "device-000", "device-100"),
    ],
)
def test_ids_are_padded_to_one_width(tmp_path: Path, count: int, first: str, last: str) -> None:
    registry = Registry(tmp_path)
    registry.ensure_slots(count)
    ids = [row.id for row in registry.devices()]
    assert (len(ids), ids[0], ids[-1]) == (count, first, last)
    assert ids == sorted(ids)
    registry.close()


def test_tokens_stay_until_they_are_used(registry: Registry, tmp_path: Path) -> None:
    tokens = registry.tokens()
    assert list(tokens) == ["device-00", "device-01", "device-02"]
    assert len(set(tokens.values())) == 3
    registry.enrol(enrolment(tokens["device-01"]))
    again = Registry(tmp_path / "my-run")
    again.ensure_slots(3)
    assert again.tokens() == {key: tokens[key] for key in ("device-00", "device-02")}
    assert again.add_slots(2) == ["device-03", "device-04"]
    again.ensure_slots(3)
    assert len(again.tokens()) == 4
    again.close()


def test_a_used_token_and_secrets_are_kept_as_hashes_only(
    registry: Registry, tmp_path: Path
) -> None:
    token = registry.tokens()["device-00"]
    registry.enrol(enrolment(token, secret(7)))
    registry.close()
    file = tmp_path / "my-run" / "registry.sqlite"
    assert file.stat().st_mode & 0o777 == 0o600
    data = b"".join(path.read_bytes() for path in file.parent.iterdir())
    assert b"device-00" in data
    assert token.encode() not in data
    assert secret(7).encode() not in data


def test_enrolment_may_be_repeated_by_the_same_device_only(registry: Registry) -> None:
    token = registry.tokens()["device-00"]
    for _ in range(3):
        assert registry.enrol(enrolment(token, secret(1))) == Enrolled("my-run", "device-00")
    with pytest.raises(RefusedError, match="device-00 was used already"):
        registry.enrol(enrolment(token, secret(2)))
    assert registry.authenticate(secret(1)) == "device-00"
    with pytest.raises(UnknownCredentialError):
        registry.authenticate(secret(2))
    with pytest.raises(RefusedError, match="belongs to another"):
        registry.enrol(enrolment(registry.tokens()["device-01"], secret(1)))
    row = registry.device("device-00")
    assert (row.name, row.version, row.enrolled_at) == ("pi", "0.1.0", 1000.0)


def test_bad_enrolments_change_nothing(registry: Registry) -> None:
    before = registry.devices(), registry.tokens()
    with pytest.raises(UnknownCredentialError, match="token is unknown"):
        registry.enrol(enrolment("guess"))
    with pytest.raises(RefusedError, match=f"got {PROTOCOL + 1}.*allowed: {PROTOCOL}"):
        registry.enrol(enrolment(registry.tokens()["device-00"], protocol=PROTOCOL + 1))
    with pytest.raises(UnknownCredentialError):
        registry.authenticate("")
    assert (registry.devices(), registry.tokens()) == before


def test_one_token_makes_one_device_under_a_race(registry: Registry) -> None:
    token = registry.tokens()["device-00"]
    winners: list[int] = []

    def race(number: int) -> None:
        try:
            registry.enrol(enrolment(token, secret(number)))
            winners.append(number)
        except RefusedError:
            pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert registry.authenticate(secret(winners[0])) == "device-00"


def test_revoked_devices_are_refused_at_once_by_every_process(
    registry: Registry, tmp_path: Path
) -> None:
    tokens = registry.tokens()
    registry.enrol(enrolment(tokens["device-00"], secret(0)))
    operator = Registry(tmp_path / "my-run")
    for device in ("device-00", "device-01"):
        operator.revoke(device)
    with pytest.raises(StoreError, match="no such device"):
        operator.revoke("device-77")
    operator.close()
    with pytest.raises(RefusedError, match="device-00 was removed"):
        registry.authenticate(secret(0))
    with pytest.raises(RefusedError, match="device-01 was removed"):
        registry.enrol(enrolment(tokens["device-01"], secret(1)))
    assert list(registry.tokens()) == ["device-02"]
    assert [row.revoked for row in registry.devices()] == [True, True, False]


def test_last_seen_is_written_now_and_then(
    registry: Registry, clock: Clock, tmp_path: Path
) -> None:
    """At most SEEN_S behind the truth for each device, whatever the others do."""

    def seen(device: int, at: float) -> list[float | None]:
        clock.now = at
        registry.authenticate(secret(device))
        return [row.last_seen for row in registry.devices()]

    enrol_all(registry)
    assert seen(0, 1001) == [1001, 1000, 1000]
    assert seen(0, 1002) == [1001, 1000, 1000]
    # Another's writing takes with it what is pending; it does not make this one wait.
    assert seen(1, 1003) == [1002, 1003, 1000]
    assert seen(2, 1004) == [1002, 1003, 1004]
    assert seen(0, 1002 + SEEN_S) == [1002 + SEEN_S, 1003, 1004]
    seen(0, 1003 + SEEN_S)
    registry.close()
    again = Registry(tmp_path / "my-run")
    assert again.device("device-00").last_seen == 1003 + SEEN_S
    again.close()


# --- what devices say ------------------------------------------------------------------------


def test_an_announcement_may_be_repeated_but_not_changed(registry: Registry) -> None:
    for _ in range(2):
        registry.announce("device-00", ANNOUNCED)
    changed = Announcement(samples=11, tokens=300, skipped=0, digest="a" * 64)
    with pytest.raises(RefusedError, match="got samples 11, skipped 0; allowed: samples 10, skip"):
        registry.announce("device-00", changed)
    assert registry.device("device-00").announcement == ANNOUNCED


def test_strikes_and_failure_end_with_a_new_start(registry: Registry) -> None:
    for _ in range(2):
        registry.strike("device-00")
    registry.fail("device-00", "no space")
    row = registry.device("device-00")
    assert (row.strikes, row.failure) == (2, "no space")
    registry.announce("device-00", ANNOUNCED)
    row = registry.device("device-00")
    assert (row.strikes, row.failure) == (0, None)
    registry.strike("device-00")
    registry.forgive("device-00")
    assert registry.device("device-00").strikes == 0


def test_the_last_profile_counts(registry: Registry, clock: Clock) -> None:
    registry.profile("device-00", profile(1e9))
    clock.now += 5
    registry.profile("device-00", profile(2e9))
    assert registry.device("device-00").profile == profile(2e9)
    assert registry.gathering() == (2, clock.now - 5)


def test_a_depth_may_change_and_those_before_are_known(registry: Registry) -> None:
    assert registry.device("device-00").depths == ()
    for depth in (2, 1, 1, 3):
        registry.assign({"device-00": depth, "device-01": 2})
    row = registry.device("device-00")
    assert (row.depth, row.depths) == (3, (1, 2, 3))
    assert registry.device("device-01").depths == (2,)


def test_reports_are_kept(registry: Registry, clock: Clock) -> None:
    clock.now = 50.0
    registry.report("device-02", REPORT)
    clock.now = 60.0
    registry.report("device-02", REPORT)
    assert [row.report for row in registry.devices()] == [None, None, REPORT]
    assert registry.device("device-02").reported_at == 50.0, "it came when it came first"
    registry.report("device-02", DeviceReport(seconds=0.0, padding=0.1, spans=()))
    assert registry.device("device-02").report == REPORT, "nothing was left to send"
    rest = msgspec.structs.replace(REPORT, seconds=8.0)
    registry.report("device-02", rest)
    row = registry.device("device-02")
    assert (row.report, row.reported_at) == (rest, 60.0)


def test_the_state_is_seen_by_other_processes(
    registry: Registry, clock: Clock, tmp_path: Path
) -> None:
    assert registry.state().state == "preparing"
    clock.now = 2000.0
    registry.set_state("failed", "out of memory")
    other = Registry(tmp_path / "my-run")
    state = other.state()
    assert (state.state, state.error, state.since) == ("failed", "out of memory", 2000.0)
    other.set_state("training")
    other.close()
    assert (registry.state().state, registry.state().error) == ("training", None)


def test_several_processes_create_one_registry(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from splitfrozen.server.registry import Registry\n"
        "r = Registry(Path(sys.argv[1])); r.ensure_slots(5); print(sorted(r.tokens().items()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(said) == 1
    assert said.pop().count("device-") == 5


# --- assignment ------------------------------------------------------------------------------


def prepared(codec: str = "float16") -> Prepared:
    fronts = tuple(
        FrontManifest(
            depth=depth,
            width=8,
            precision="float32",
            hash=str(depth) * 64,
            graph="g",
            files=(),
            flops_per_token=1000 * depth,
            memory_bytes=100 * MIB * depth,
        )
        for depth in (1, 2, 3)
    )
    task = TaskSpec(kind="classification", columns={}, labels=("a", "b"), max_tokens=16)
    return Prepared(
        task=task,
        tokenizer=None,
        fronts=fronts,
        blocks=6,
        width=8,
        vocabulary=9,
        weights_hash="0" * 64,
        codec=codec,
    )


def depth_of(registry: Registry, device: str, spec: DevicesSpec) -> int | None:
    found = front_of(device, registry, prepared(), spec)
    return None if found is None else found.depth


def test_a_list_of_depths_is_followed_at_once_by_slot(registry: Registry) -> None:
    spec = DevicesSpec(count=3, depth=(2, 1, 3))
    registry.add_slots(1)
    assert [depth_of(registry, f"device-0{slot}", spec) for slot in range(4)] == [2, 1, 3, 1]


def test_auto_waits_for_a_profile_and_for_the_planner(registry: Registry) -> None:
    spec = DevicesSpec(count=3)
    with pytest.raises(RefusedError, match="device-00 has no profile"):
        depth_of(registry, "device-00", spec)
    take_profile("device-00", profile(1e9), registry, prepared(), spec)
    assert depth_of(registry, "device-00", spec) is None
    registry.assign({"device-00": 2})
    assert depth_of(registry, "device-00", spec) == 2


def test_a_device_without_memory_is_told(registry: Registry) -> None:
    poor = profile(memory_bytes=MIB)
    with pytest.raises(PlanError, match="device-00 has not the memory"):
        take_profile("device-00", poor, registry, prepared(), DevicesSpec(count=3))
    assert "device-00" in str(registry.device("device-00").failure)
    take_profile("device-01", poor, registry, prepared(), DevicesSpec(count=3, depth=(1, 1, 1)))
    assert registry.device("device-01").failure is None, "a list asks nobody"


def test_memory_has_to_do_for_the_least_depth(registry: Registry) -> None:
    small = profile(memory_bytes=min(front.memory_bytes for front in prepared().fronts))
    take_profile("device-00", small, registry, prepared(), DevicesSpec(count=3))
    with pytest.raises(PlanError, match=r"free memory.*or lower devices\.least_depth"):
        take_profile("device-00", small, registry, prepared(), DevicesSpec(count=3, least_depth=2))


def test_bytes_per_token_are_the_codecs() -> None:
    assert bytes_per_token(prepared("float16")) == 16
    assert bytes_per_token(prepared("int8")) == 12
