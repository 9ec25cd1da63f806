"""What people read of a run: summary, progress, table and plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from splitfrozen.config import Config, DevicesSpec, ModelSpec, RunSpec, TaskConfig
from splitfrozen.records import PROTOCOL, Announcement, ChunkSpan, DeviceReport, Enrolment
from splitfrozen.runs import summary
from splitfrozen.runs.folder import RunFolder
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store

SPAN = ChunkSpan(0, 2, 1, 3, 3_000_000, (0.0, 8.0), (1.0, 1.0), (2.0, 9.0))
REPORT = DeviceReport(seconds=12.5, padding=0, spans=(SPAN,))


def configured(folder: Path) -> Config:
    return Config(
        model=ModelSpec(name="gpt2", cut=3),
        task=TaskConfig(labels=("a", "b")),
        devices=DevicesSpec(count=3),
        run=RunSpec(folder=str(folder)),
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(configured(tmp_path / "mine"))


@pytest.fixture
def registry(run: RunFolder) -> Iterator[Registry]:
    with closing(Registry(run.root)) as opened:
        opened.ensure_slots(3)
        yield opened


@pytest.fixture
def store(run: RunFolder) -> Iterator[Store]:
    with closing(Store(run.store)) as opened:
        yield opened


def join(registry: Registry, device: str, name: str) -> None:
    token = registry.tokens()[device]
    registry.enrol(Enrolment(PROTOCOL, token, f"{device:s>43}", name, "0.1.0"))
    registry.announce(device, Announcement(samples=40, tokens=400, skipped=2, digest="0" * 64))


def train(run: RunFolder) -> None:
    """Two epochs of three steps; the second is the better one, and its first step came twice."""
    metrics = {"loss": 0.9, "accuracy": 0.25, "f1": 0.2}
    run.report({"event": "baseline", **metrics})
    run.report({"event": "training", "steps": 6})
    for step in (1, 2, 3, 4, 4, 5, 6):
        run.report({"event": "step", "step": step, "epoch": step // 4, "loss": 1 / step})
    for epoch, accuracy in ((0, 0.5), (1, 0.75)):
        found = {**metrics, "accuracy": accuracy}
        run.report(
            {
                "event": "evaluation",
                "step": 3 * epoch + 3,
                "epoch": epoch,
                "score": found["accuracy"],
                **found,
            }
        )
    (run.training / "best").mkdir(parents=True)
    (run.training / "best" / "adapter_config.json").touch()


def lines(text: str) -> dict[str, str]:
    return {line.split(" ", 1)[0]: line for line in text.splitlines() if line}


# --- the summary ---------------------------------------------------------------------------------


def test_a_new_run_has_nothing_to_show(run: RunFolder, registry: Registry, store: Store) -> None:
    data = summary.summarize(run, registry, store)
    assert (data["state"], data["steps"], data["epochs"]) == ("preparing", 0, 0)
    assert (data["adapter"], data["accuracy_after"], data["before"]) == (None, None, {})
    assert [device["id"] for device in data["devices"]] == ["device-00", "device-01", "device-02"]
    shown = summary.text(data)
    assert lines(shown)["device-00"].split() == [
        "device-00",
        "0",
        "0.00",
    ]
    assert lines(shown)["device"].split() == ["device", "stored", "MB", "sent"]
    assert shown.endswith("\nrun     preparing")


def test_a_trained_run_is_told_with_its_best_epoch(
    run: RunFolder, registry: Registry, store: Store
) -> None:
    train(run)
    join(registry, "device-01", "kitchen")
    registry.assign({"device-01": 2})
    registry.report("device-01", REPORT)
    expected = [{"device": "device-01", "depth": 2, "seconds": 20.25, "bytes": 2_500_000}]
    (run.root / "forecast.json").write_text(json.dumps(expected))
    data = summary.summarize(run, registry, store)
    assert (data["steps"], data["epochs"]) == (6, 2)
    assert (data["accuracy_before"], data["accuracy_after"]) == (0.25, 0.75)
    assert data["after"] == {"accuracy": 0.75, "f1": 0.2, "loss": 0.9}
    device = data["devices"][1]
    assert (device["announced"], device["skipped"], device["samples"]) == (40, 2, 0)
    assert (device["seconds"], device["forecast_seconds"]) == (12.5, 20.25)
    shown = lines(summary.text(data))
    assert "purged" not in shown["device-00"]
    columns = ["device-01", "kitchen", "2", "40", "0", "3.00", "2.50", "12.5", "20.2"]
    assert shown["device-01"].split() == columns
    assert shown["after"].split(" ", 1)[1].strip() == "accuracy 0.7500, f1 0.2000, loss 0.9000"
    assert shown["adapter"] == f"adapter {run.training / 'best'}"
    json.dumps(data, allow_nan=False)


def test_a_language_model_is_told_by_its_loss(
    run: RunFolder, registry: Registry, store: Store
) -> None:
    for epoch, loss in enumerate((2.0, 1.0, math.nan, 1.5)):
        event = {"event": "evaluation", "step": epoch, "epoch": epoch, "loss": loss}
        event["score"] = -loss
        run.report({**event, "perplexity": math.exp(loss), "exact_match": 0.1 * epoch})
    data = summary.summarize(run, registry, store)
    assert data["accuracy_after"] is None
    assert data["after"] == {"loss": 1.0, "perplexity": math.e, "exact_match": 0.1}


def test_failures_have_a_line_and_no_control_over_the_terminal(
    run: RunFolder, registry: Registry, store: Store
) -> None:
    join(registry, "device-00", "\x1b[2Jevil\n")
    registry.fail("device-00", "DataError: no column\n\x1b[31m'label'")
    join(registry, "device-01", "gone")
    registry.fail("device-01", "it is no more")
    registry.revoke("device-01")
    registry.set_state("failed", "too little memory")
    data = summary.summarize(run, registry, store)
    shown = lines(summary.text(data))
    assert "device-00 failed: DataError: no column??[31m'label'" in summary.text(data)
    assert shown["device-01"].endswith("purged")
    assert "it is no more" not in summary.text(data)
    assert "\x1b" not in summary.text(data)
    assert shown["run"] == "run     failed: too little memory"
    assert data["devices"][0]["failure"] == "DataError: no column\n\x1b[31m'label'"


def test_the_end_of_serve_has_a_plot_where_there_is_something_to_draw(
    run: RunFolder, registry: Registry, store: Store
) -> None:
    assert "plot" not in summary.outcome(run, registry, store).data
    train(run)
    told = summary.outcome(run, registry, store)
    assert told.data["plot"] == str(run.root / "curves.png")
    assert f"plot    {run.root / 'curves.png'}" in told.text
    assert told.exit_code == 0


def test_paths_are_told_from_the_working_directory(
    run: RunFolder, registry: Registry, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run)
    told = summary.outcome(run, registry, store)
    monkeypatch.chdir(run.root.parent)
    shown = lines(summary.text(told.data))
    assert shown["adapter"] == "adapter mine/training/best"
    assert shown["plot"] == "plot    mine/curves.png"
    assert told.data["adapter"] == str(run.training / "best"), "programs get whole paths"
    monkeypatch.chdir(run.training)
    assert lines(summary.text(told.data))["plot"] == f"plot    {run.root / 'curves.png'}"
    relative = {**told.data, "plot": "mine/curves.png"}
    assert lines(summary.text(relative))["plot"] == "plot    mine/curves.png"


@pytest.mark.parametrize("name", ["$x_$", "a$\\frac{$", "$$", "a_b^c", "100% {}"])
def test_a_runs_name_is_no_formula(tmp_path: Path, name: str) -> None:
    run = RunFolder.create(configured(tmp_path / name))
    train(run)
    assert pixels(summary.plot(run)).shape[0] > 300


def test_a_plot_that_fails_costs_nothing_but_itself(
    run: RunFolder, registry: Registry, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    train(run)
    (run.root / "curves.png").mkdir()
    told = summary.outcome(run, registry, store)
    assert told.exit_code == 0
    assert "plot" not in told.data
    assert told.data["steps"] == 6
    assert "no plot was made" in caplog.text


def test_status_shows_the_plot_that_is_there(
    run: RunFolder, registry: Registry, store: Store
) -> None:
    train(run)
    assert "plot" not in summary.summarize(run, registry, store)
    summary.plot(run)
    assert summary.summarize(run, registry, store)["plot"] == str(run.root / "curves.png")


DAMAGED = (
    '{"event": "step"}\n{"event": "step", "step": "x"}\n{"event": "step", "step": 1e999}\n'
    '{"event": "step", "step": 7, "loss": "x"}\n{"event": "evaluation"}\n[]\n'
    '{"event": "evaluation", "epoch": 2, "score": "high", "accuracy": []}\n'
    '{"event": "training"}\n{"event": "baseline", "accuracy": "x"}\n'
)


@pytest.mark.parametrize("first", [True, False])
def test_events_that_lack_something_are_left_out(
    run: RunFolder, registry: Registry, store: Store, first: bool
) -> None:
    if first:
        (run.root / "metrics.jsonl").write_text(DAMAGED)
    train(run)
    if not first:
        with (run.root / "metrics.jsonl").open("a") as file:
            file.write(DAMAGED)
    registry.set_state("training")
    assert summary.line(run, registry, store) == "training: step 7 of 6"
    data = summary.outcome(run, registry, store).data
    assert (data["steps"], data["accuracy_after"]) == (7, 0.75)
    assert "plot" in data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"null",
        b"{}",
        b"[1, null, {}]",
        b'[{"device": []}]',
        b'[{"device": "device-00", "seconds": "x", "bytes": null}]',
        b"[" * 100_000,
    ],
)
def test_a_damaged_forecast_is_no_forecast(
    run: RunFolder, registry: Registry, store: Store, content: bytes
) -> None:
    (run.root / "forecast.json").write_bytes(content)
    data = summary.summarize(run, registry, store)
    assert data["devices"][0]["forecast_seconds"] is None
    assert summary.text(data)


def test_absurd_numbers_and_long_failures_take_little_room(
    run: RunFolder, registry: Registry, store: Store
) -> None:
    join(registry, "device-00", "a")
    huge = msgspec.structs.replace(SPAN, bytes=2**62)
    absurd = msgspec.structs.replace(REPORT, seconds=1e308, spans=(huge,))
    registry.report("device-00", absurd)
    registry.fail("device-00", "x" * 2000)
    (run.root / "forecast.json").write_text(
        '[{"device": "device-00", "seconds": -1e308, "bytes": 1e308}]'
    )
    data = summary.summarize(run, registry, store)
    shown = summary.text(data)
    assert "1e+308" in lines(shown)["device-00"] or "1e+308" in shown
    assert max(map(len, shown.splitlines())) < 250
    assert "x" * 200 + "..." in shown
    assert data["devices"][0]["failure"] == "x" * 2000


# --- one line ------------------------------------------------------------------------------------


def test_progress_is_of_samples_then_of_steps(
    run: RunFolder, registry: Registry, store: Store
) -> None:
    join(registry, "device-00", "a")
    assert summary.line(run, registry, store) == (
        "preparing: 1 of 3 devices joined; the server is preparing the model, and devices wait "
        "for it"
    )
    registry.set_state("receiving")
    line = summary.line(run, registry, store)
    assert line == (
        "receiving: 1 of 3 devices joined, 0 of 40 samples stored; waiting for "
        "device-00 (0 of 40), device-01 (not joined), device-02 (not joined)"
    )
    registry.fail("device-01", "no usable row")
    registry.revoke("device-02")
    line = summary.line(run, registry, store)
    assert line == (
        "receiving: 1 of 2 devices joined, 0 of 40 samples stored; waiting for "
        "device-00 (0 of 40), device-01 (failed: mend it and join again, or purge it)"
    )
    registry.set_state("training")
    assert summary.line(run, registry, store).startswith("training: 1 of 2 devices")
    train(run)
    assert summary.line(run, registry, store) == "training: step 6 of 6"


# --- tables --------------------------------------------------------------------------------------


def test_numbers_stand_to_the_right_and_words_to_the_left() -> None:
    rows = [("a", "1.5", "x"), ("long", "-", ""), ("b", "10.0", "yz")]
    assert summary.table(("name", "s", "note"), rows).splitlines() == [
        "name     s  note",
        "a      1.5  x",
        "long     -",
        "b     10.0  yz",
    ]
    assert summary.table(("name", "s"), []) == "name  s"


# --- the plot ------------------------------------------------------------------------------------


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)


def test_the_plot_is_a_picture_of_both_curves(run: RunFolder) -> None:
    train(run)
    image = pixels(summary.plot(run))
    assert image.shape[0] > 300
    assert image.shape[1] > 500
    blue = (image[..., 2] > 0.6) & (image[..., 0] < 0.3)
    orange = (image[..., 0] > 0.9) & (image[..., 1] < 0.6) & (image[..., 2] < 0.3)
    assert blue.sum() > 500
    assert orange.sum() > 500


def test_the_plot_does_without_evaluation_and_with_odd_numbers(run: RunFolder) -> None:
    for step, loss in enumerate((0.0, math.nan, 1.0)):
        run.report({"event": "step", "step": step + 1, "epoch": 0, "loss": loss})
    image = pixels(summary.plot(run))
    assert not ((image[..., 0] > 0.9) & (image[..., 1] < 0.6)).any(), "nothing orange to show"
    run.report({"event": "evaluation", "step": 3, "epoch": 0, "loss": 1, "perplexity": math.inf})
    assert pixels(summary.plot(run)).shape == image.shape
