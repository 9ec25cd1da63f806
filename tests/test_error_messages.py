"""Every message that docs/errors.md shows is the one that the code gives.

A class of errors is a heading there; the first ```text block below it is its typical message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splitfrozen import config
from splitfrozen.config import LoraSpec, TrainSpec
from splitfrozen.data.readers import read_rows
from splitfrozen.device.patience import Again, Patience
from splitfrozen.disk import disk_full
from splitfrozen.errors import SplitFrozenError
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.planning.depth import assign
from splitfrozen.records import (
    PROTOCOL,
    DeviceProfile,
    EncodedSample,
    Enrolment,
    FrontManifest,
    Ints,
)
from splitfrozen.runs.folder import RunFolder
from splitfrozen.server.answers import internal_error
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store
from splitfrozen.training.optimise import Gradients, Optimiser
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, header_of
from splitfrozen.wire.join import JoinString

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "errors.md"

Tiny = Callable[..., Any]


def our_own(_: Tiny) -> None:
    raise internal_error()


def a_torn_join_string(_: Tiny) -> None:
    JoinString.parse("splitfrozen://dGhpcyBpcyBhIHRva2Vu@192.0.2.7:8443/9f86d081884c")


def a_misspelt_option(_: Tiny) -> None:
    Path("run.toml").write_text(
        '[model]\nname = "gpt2"\ncut = 3\n[task]\nlabels = ["a", "b"]\n[devices]\ndept = 1\n'
    )
    config.load(Path("run.toml"))


def another_column(_: Tiny) -> None:
    Path("my.csv").write_text("text,Label_\na,b\n")
    list(read_rows("my.csv", {"text": "text", "label": "label"}, report=lambda _: None))


def a_target_that_is_none(tiny: Tiny) -> None:
    sliced = SlicedModel(tiny("gpt2-causal_lm"))
    adapters.attach(sliced, LoraSpec(targets=("q_proj",)), cut=1, seed=0)


def a_small_machine(_: Tiny) -> None:
    front = FrontManifest(1, 768, "float32", "0" * 64, "g", (), 1, 600 << 20)
    profile = DeviceProfile(1e9, 256 << 20, 1e7, 4, "")
    assign({"device-03": profile}, [front], bytes_per_token=1536)


def a_large_value(_: Tiny) -> None:
    codec("float16+zstd").encode(np.full((2, 4), 70000, np.float32))


def no_run(_: Tiny) -> None:
    RunFolder(Path("runs/other"))


def no_space(_: Tiny) -> None:
    Path("runs/run/store").mkdir(parents=True)
    raise disk_full(Path("runs/run/store/index.sqlite"))


@dataclass
class Item:
    targets: Ints


class Spoilt:
    """A part whose loss is not a number."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(1))

    def length(self, item: Item) -> int:
        return len(item.targets)

    def loss(self, items: Sequence[Item]) -> torch.Tensor:
        return self.weight.sum() * float("nan") * len(items)


def a_loss_of_nan(_: Tiny) -> None:
    spec, part = TrainSpec(), Spoilt()
    items = [Item(np.zeros(1, np.int32))]
    gradients = Gradients(spec, seed=0, device=torch.device("cpu"))
    loss, targets = gradients.of(part, [part.weight], items, 0)
    Optimiser({"weight": part.weight}, spec, steps=1).step(loss, targets, 0)


def a_used_join_string(_: Tiny) -> None:
    registry = Registry(Path("run"))
    registry.ensure_slots(1)
    token = registry.tokens()["device-00"]
    for secret in ("a" * 32, "b" * 32):
        registry.enrol(Enrolment(PROTOCOL, token, secret, "name", "version"))


def a_strange_secret(_: Tiny) -> None:
    Registry(Path("run")).authenticate("a" * 32)


def a_purged_device(_: Tiny) -> None:
    store = Store(Path("store"))
    store.purge("device-03")
    encoded = [EncodedSample(0, 1, np.zeros(1, np.int32), b"\0" * 4)]
    origin = Origin("run", "device-03", "0" * 64, depth=1, width=1, codec="float32")
    store.add(header_of(origin, 0, encoded), "0" * 64, encoded)


def nobody_there(_: Tiny) -> None:
    def attempt() -> None:
        raise Again("[Errno 111] Connection refused")

    hours = iter([0.0, 7200.0])
    patience = Patience(clock=lambda: next(hours), sleep=lambda _: None)
    patience.persist("connecting to 192.0.2.7 port 8443", attempt)


TYPICAL: dict[str, Callable[[Tiny], None]] = {
    "SplitFrozenError": our_own,
    "RequestError": a_torn_join_string,
    "ConfigError": a_misspelt_option,
    "DataError": another_column,
    "ModelError": a_target_that_is_none,
    "PlanError": a_small_machine,
    "WireError": a_large_value,
    "StoreError": no_run,
    "DiskFullError": no_space,
    "NotFiniteError": a_loss_of_nan,
    "RefusedError": a_used_join_string,
    "UnknownCredentialError": a_strange_secret,
    "PurgedError": a_purged_device,
    "UnreachableError": nobody_there,
}


def shown(name: str) -> str:
    content = DOCUMENT.read_text()
    found = re.search(rf"^### {name}\n(.*?)```text\n(.*?)```", content, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/errors.md shows no message of {name}"
    assert "\n### " not in found[1], f"docs/errors.md shows no message of {name}"
    return " ".join(found[2].split())


def test_every_heading_has_its_message() -> None:
    assert sorted(TYPICAL) == sorted(re.findall(r"^### (\w+)$", DOCUMENT.read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", TYPICAL)
def test_the_message_is_the_one_that_is_shown(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SplitFrozenError) as caught:
        TYPICAL[name](tiny)
    assert type(caught.value).__name__ == name
    message = f"splitfrozen: {caught.value}"
    assert message == shown(name)
