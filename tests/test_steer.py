"""`status`, `logs`, `stop`, `invite`, `purge`: from the folder alone, served or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from splitfrozen.config import Config, DevicesSpec, ModelSpec, RunSpec, TaskConfig
from splitfrozen.errors import RequestError, StoreError
from splitfrozen.records import EncodedSample
from splitfrozen.runs import steer
from splitfrozen.runs.folder import Address, RunFolder
from splitfrozen.server.index import PurgedError
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store
from splitfrozen.wire.frame import Origin, header_of
from splitfrozen.wire.join import JoinString


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    config = Config(
        model=ModelSpec(name="gpt2", cut=3),
        task=TaskConfig(labels=("a", "b")),
        devices=DevicesSpec(count=2),
        run=RunSpec(folder=str(tmp_path / "mine")),
    )
    return RunFolder.create(config)


@pytest.fixture
def registry(run: RunFolder) -> Iterator[Registry]:
    """Of a run that was served and stopped while it received."""
    run.write_address(Address("192.0.2.7", 8443, "a" * 64))
    with closing(Registry(run.root)) as opened:
        opened.ensure_slots(2)
        opened.set_state("receiving")
        yield opened


def send(run: RunFolder, device: str, samples: int) -> None:
    payload = np.zeros(2, "<f4").tobytes()
    label = np.zeros(1, np.int32)
    encoded = [EncodedSample(i, 1, label, payload) for i in range(samples)]
    origin = Origin("mine", device, "0" * 64, depth=1, width=2, codec="float32")
    with closing(Store(run.store)) as store:
        store.add(header_of(origin, 0, encoded), "0" * 64, encoded)


def stored(run: RunFolder) -> dict[str, int]:
    with closing(Store(run.store)) as store:
        return {device: total.samples for device, total in store.totals().items()}


def begin_training(run: RunFolder, registry: Registry) -> None:
    run.training.mkdir()
    (run.training / "roster.json").write_text("{}")
    run.report({"event": "evaluation", "step": 1, "epoch": 0, "accuracy": 1.0})
    registry.set_state("training")


# --- status and logs -----------------------------------------------------------------------------


def test_a_run_that_nobody_serves_is_stopped(run: RunFolder, registry: Registry) -> None:
    send(run, "device-01", 5)
    told = steer.status(run.root)
    assert (told.data["state"], told.data["served"]) == ("stopped", False)
    assert [device["samples"] for device in told.data["devices"]] == [0, 5]  # type: ignore[attr-defined]
    assert told.text.endswith(f"run     stopped; `splitfrozen serve {run.root}` continues")
    with run.lock("serve"):
        told = steer.status(run.root)
        assert (told.data["state"], told.data["served"]) == ("receiving", True)
        assert told.text.endswith(
            "receiving: 0 of 2 devices joined, 5 of 0 samples stored; "
            "waiting for device-00 (not joined), device-01 (not joined)"
        )
    registry.set_state("done")
    assert steer.status(run.root).text.endswith("run     done")


def test_a_run_that_was_never_served_has_a_status(run: RunFolder) -> None:
    assert steer.status(run.root).data["devices"] == []


def test_no_run_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a run folder"):
        steer.status(tmp_path)


def test_logs_are_the_last_lines(run: RunFolder) -> None:
    assert steer.logs(run.root, 5).data == {"lines": []}
    (run.root / "run.log").write_bytes(b"one\ntwo\nth\xffree\n")
    assert steer.logs(run.root, 2).text == "two\nth�ree"
    assert steer.logs(run.root, 50).data["lines"] == ["one", "two", "th�ree"]
    assert steer.logs(run.root, 0).data["lines"] == []


def test_stop_where_nobody_serves(run: RunFolder) -> None:
    told = steer.stop(run.root)
    assert (told.data, told.exit_code) == ({"stopped": False}, 0)
    assert str(run.root) in told.text


# --- invite --------------------------------------------------------------------------------------


def test_invited_devices_get_join_strings_of_the_run(run: RunFolder, registry: Registry) -> None:
    told = steer.invite(run.root, 2)
    assert told.data["devices"] == ["device-02", "device-03"]
    tokens = registry.tokens()
    for device, text in zip(told.data["devices"], told.text.splitlines(), strict=True):
        assert JoinString.parse(text) == JoinString(tokens[device], "192.0.2.7", 8443, "a" * 64)


@pytest.mark.usefixtures("registry")
def test_nobody_is_no_invitation(run: RunFolder) -> None:
    with pytest.raises(RequestError, match="got --count 0"):
        steer.invite(run.root, 0)


def test_a_run_without_address_invites_nobody(run: RunFolder) -> None:
    with pytest.raises(RequestError, match=r"never served.*run: splitfrozen serve"):
        steer.invite(run.root, 1)


def test_nobody_is_invited_once_the_samples_are_fixed(run: RunFolder, registry: Registry) -> None:
    begin_training(run, registry)
    with pytest.raises(RequestError, match="training has begun"):
        steer.invite(run.root, 1)
    assert len(registry.devices()) == 2


# --- purge ---------------------------------------------------------------------------------------


def test_a_purged_device_is_gone_and_stays_away(run: RunFolder, registry: Registry) -> None:
    send(run, "device-00", 3)
    send(run, "device-01", 4)
    with run.lock("serve"):
        told = steer.purge(run.root, "device-01")
    assert told.data == {"device": "device-01", "trained_anew": False}
    assert stored(run) == {"device-00": 3}
    assert [row.revoked for row in registry.devices()] == [False, True]
    assert list(registry.tokens()) == ["device-00"]
    with pytest.raises(PurgedError):
        send(run, "device-01", 4)
    assert steer.purge(run.root, "device-01").data["trained_anew"] is False


def test_a_purge_takes_the_training_along(run: RunFolder, registry: Registry) -> None:
    send(run, "device-00", 3)
    begin_training(run, registry)
    (run.root / "curves.png").touch()
    registry.set_state("done")
    told = steer.purge(run.root, "device-00")
    assert told.data["trained_anew"] is True
    assert "trains without it" in told.text
    assert not run.begun
    assert not run.training.exists()
    assert not (run.root / "curves.png").exists()
    # What was measured belonged to the adapter that is gone.
    assert steer.status(run.root).data["accuracy_after"] is None
    assert registry.state().state == "receiving"


def test_nothing_is_purged_under_a_training(run: RunFolder, registry: Registry) -> None:
    send(run, "device-00", 3)
    begin_training(run, registry)
    with run.lock("serve"), pytest.raises(RequestError, match=r"is being trained.*stop"):
        steer.purge(run.root, "device-00")
    assert stored(run) == {"device-00": 3}
    assert run.begun


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("device", ["device-02", "", "../device-00", "device-00 "])
def test_an_unknown_device_is_a_wrong_request(run: RunFolder, device: str) -> None:
    with pytest.raises(RequestError, match=r"no such device: .*allowed: device-00 \.\. device-01;"):
        steer.purge(run.root, device)


def test_a_run_without_devices_says_so(run: RunFolder) -> None:
    with pytest.raises(RequestError, match="none: it was never served"):
        steer.purge(run.root, "device-00")
