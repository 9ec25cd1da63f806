"""`splitfrozen train`: whole runs in this process, with tiny random models and the demo's own."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tokenizers

import splitfrozen
from splitfrozen import config
from splitfrozen.cli import main
from splitfrozen.data import village
from splitfrozen.data.readers import read_rows
from splitfrozen.data.tasks import build_samples
from splitfrozen.errors import ConfigError, DataError, RequestError, WireError
from splitfrozen.methods.table import METHODS
from splitfrozen.records import Compute, Event, Outcome, Send
from splitfrozen.runs.devices import TorchFront
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.prepare import load_sliced, task_alone
from splitfrozen.runs.rows import gather
from splitfrozen.runs.serve import serve
from splitfrozen.runs.steer import status
from splitfrozen.runs.train import train
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store

# peft 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

DEMO = Path(splitfrozen.__file__).parent / "assets" / "demo"
CLASSES = ("a", "b", "c")
SIZES = (8, 14, 8)
"""Samples of three devices in the tests' data."""

RUN = """
[model]
name = "{model}"
cut = 2
precision = "float32"
[task]
{task}
eval = "{evaluation}"
max_tokens = 32
[devices]
count = 3
depth = [1, 2, 1]
[train]
epochs = 2
batch_size = 4
lr = 5e-3
checkpoint_steps = 3
[wire]
codec = "float32"
[data]
train = "train.jsonl"
partition = "column"
column = "who"
[run]
folder = "run"
[method]
"""
LABELS = 'labels = ["a", "b", "c"]'
SaveModel = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(draw: np.random.Generator) -> str:
    return " ".join(draw.choice(list("0123456789"), draw.integers(2, 9)))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, save_model: SaveModel) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for id_ in ("bert-classification", "gpt2-classification", "llama-causal_lm", "vit-image"):
        save_model(folder / id_, id_)
    return folder


@pytest.fixture
def write_run(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """`write_run('name = "sft"')` writes rows of three devices and run.toml; returns its path."""

    def write(method: str = "", id_: str = "gpt2-classification", repeat: int = 1) -> Path:
        draw = np.random.default_rng(0)
        causal = id_.endswith("causal_lm")
        rows = []
        for who, size in zip(("cy", "ann", "bob"), SIZES, strict=True):
            for _ in range(size * repeat):
                label = str(draw.choice(CLASSES))
                row = {"prompt": words(draw), "completion": words(draw)}
                rows.append({**(row if causal else {"text": words(draw), "label": label})})
                rows[-1]["who"] = who
        write_rows(tmp_path / "train.jsonl", rows)
        write_rows(tmp_path / "test.jsonl", rows[::4])
        task = 'kind = "causal_lm"' if causal else LABELS
        text = RUN.format(model=models / id_, task=task, evaluation="test.jsonl")
        (tmp_path / "run.toml").write_text(text + method)
        return tmp_path / "run.toml"

    return write


def tokens_of(path: Path) -> bytes:
    return (path / "training" / "last" / "adapter_model.safetensors").read_bytes()


def changed(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return path


def devices_of(outcome: Outcome) -> list[dict[str, Any]]:
    devices = outcome.data["devices"]
    assert isinstance(devices, list)
    return devices


# --- what a run comes to -------------------------------------------------------------------------


def test_it_learns_the_demos_language(tmp_path: Path) -> None:
    rows = village.task_rows(0, 560)
    for name, part in (("train.csv", rows[:480]), ("test.csv", rows[480:])):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(part)
    labels = f"labels = {json.dumps(list(village.LABELS))}"
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(model=DEMO, task=labels, evaluation="test.csv"))
    changed(path, '"train.jsonl"\npartition = "column"\ncolumn = "who"', '"train.csv"')
    changed(path, "[train]", "[lora]\nrank = 8\n[train]")
    changed(path, '"float32"\n[data]', '"float16"\n[data]\npartition = "dirichlet"\nalpha = 0.1')
    changed(path, "batch_size = 4\nlr = 5e-3", "batch_size = 16\nlr = 3e-3")
    outcome = train(path)
    assert (outcome.exit_code, outcome.data["state"]) == (0, "done")
    before, after = outcome.data["accuracy_before"], outcome.data["accuracy_after"]
    assert isinstance(before, float)
    assert isinstance(after, float)
    assert before < 0.4
    assert after > 0.8, outcome.text
    assert [device["depth"] for device in devices_of(outcome)] == [1, 2, 1]
    assert sum(device["samples"] for device in devices_of(outcome)) == 480
    assert (tmp_path / "run" / "curves.png").is_file()


METHOD_LINES = [
    *(f'name = "{name}"' for name in METHODS),
    'reuse = "never"',
    'shuffle = "window"',
    'shuffle = "none"',
    'name = "splitlora"\nserver = "per_device"\nlocal_steps = 2',
]


@pytest.mark.parametrize("method", METHOD_LINES)
def test_every_method_trains_and_leaves_a_run(
    write_run: Callable[..., Path], method: str, capsys: Capture
) -> None:
    path = write_run(method)
    outcome = train(path)
    folder = path.parent / "run"
    assert outcome.data["state"] == "done"
    assert [device["announced"] for device in devices_of(outcome)] == [14, 8, 8]
    assert [device["name"] for device in devices_of(outcome)] == ["ann", "bob", "cy"]
    assert outcome.data["samples"] == sum(SIZES)
    assert outcome.data["epochs"] == 2
    assert (folder / "training" / "best" / "adapter_config.json").is_file()
    # Once more changes nothing, and other commands find what they need.
    again = train(path)
    assert again.data["steps"] == outcome.data["steps"]
    assert again.data["after"] == outcome.data["after"]
    assert status(folder).data["state"] == "done"
    assert main(["eval", str(folder), "--adapter", "last", "--json"]) == 0
    last = RunFolder(folder).events("evaluation")[-1]
    measured = json.loads(capsys.readouterr().out)
    assert measured["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert main(["export", str(folder), str(path.parent / "out")]) == 0
    assert (path.parent / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("method", ['name = "splitfrozen"', 'name = "fedlora"'])
def test_language_models_generate_afterwards(
    write_run: Callable[..., Path], method: str, capsys: Capture
) -> None:
    path = write_run(method, "llama-causal_lm")
    after = train(path).data["after"]
    assert isinstance(after, dict)
    assert after["perplexity"] > 1
    folder = str(path.parent / "run")
    assert main(["generate", folder, "--prompt", "1 2", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out


def test_images_are_trained_on(write_run: Callable[..., Path]) -> None:
    path = write_run()
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (9, 3, 24, 24), dtype=np.uint8)
    labels = np.arange(9) % 3
    np.savez(path.parent / "train.npz", pixels=pixels, label=labels)
    text = path.read_text().replace("gpt2-classification", "vit-image")
    text = text.replace(LABELS, f'kind = "image"\n{LABELS}').replace(".jsonl", ".npz")
    text = text.replace('"test.npz"', '"train.npz"')
    text = text.replace('partition = "column"\ncolumn = "who"', 'partition = "quantity"')
    path.write_text(text)
    outcome = train(path)
    assert outcome.data["state"] == "done"
    assert sum(device["samples"] for device in devices_of(outcome)) == 9
    assert main(["partition", str(path), "--out", str(path.parent / "parts")]) == 0
    columns = {"pixels": "pixels", "label": "label"}
    back = [
        row.values
        for part in sorted((path.parent / "parts").iterdir())
        for row in read_rows(str(part), columns, report=lambda bad: pytest.fail(str(bad)))
    ]
    assert len(back) == 9
    assert all(any((np.asarray(row["pixels"]) == one).all() for one in pixels) for row in back)


# --- what devices hold and send ------------------------------------------------------------------


def test_devices_hold_what_their_own_files_would_give(write_run: Callable[..., Path]) -> None:
    """`partition --out`, read as `join` reads it, is what `train` gives each device."""
    path = write_run()
    changed(path, 'partition = "column"\ncolumn = "who"', 'partition = "dirichlet"\nrows = 20')
    assert main(["partition", str(path), "--out", str(path.parent / "parts")]) == 0
    wanted = config.load(path)
    task, tokenizer = task_alone(wanted, load_sliced(wanted))
    portions = gather(wanted, task, tokenizer).portions
    files = sorted((path.parent / "parts").iterdir())
    assert [file.name for file in files] == [f"device-0{i}.jsonl" for i in range(3)]
    assert sum(len(portion.samples) for portion in portions) == 20
    for file, portion in zip(files, portions, strict=True):
        rows = read_rows(str(file), task.columns, report=lambda bad: pytest.fail(str(bad)))
        own = list(build_samples(rows, task, tokenizer, report=lambda bad: pytest.fail(str(bad))))
        assert [sample.id for sample in portion.samples] == list(range(len(own)))
        for sample, other in zip(portion.samples, own, strict=True):
            np.testing.assert_array_equal(sample.tokens, other.tokens)
            np.testing.assert_array_equal(sample.targets, other.targets)


def test_the_store_holds_every_sample_at_the_cut(write_run: Callable[..., Path]) -> None:
    path = write_run()
    outcome = train(path)
    with closing(Store(path.parent / "run" / "store")) as store:
        table = store.samples()
        assert len(table) == sum(SIZES)
        assert (table.depth == 2).all()
        sliced = load_sliced(config.load(path))
        task, tokenizer = task_alone(config.load(path), sliced)
        whole = gather(config.load(path), task, tokenizer).portions[0].samples[:3]
        keys = [table.key(row) for row in range(3)]
        for activation, hidden in zip(store.read(keys), TorchFront(sliced, 2)(whole), strict=True):
            np.testing.assert_allclose(activation.hidden, hidden, rtol=1e-4, atol=1e-5)
    sent = outcome.data["bytes"]
    assert isinstance(sent, dict)
    assert sent["activations"] > sum(SIZES) * 2 * 32 * 4


def test_never_reusing_learns_the_same_and_keeps_nothing(write_run: Callable[..., Path]) -> None:
    """The same losses but for rounding: what shares a batch differs."""
    path = write_run()
    once = train(path)
    kept = tokens_of(path.parent / "run")
    losses = [event["loss"] for event in RunFolder(path.parent / "run").events("step")]
    path.write_text(
        path.read_text().replace('folder = "run"', 'folder = "anew"') + 'reuse = "never"'
    )
    never = train(path)
    run = RunFolder(path.parent / "anew")
    assert [event["loss"] for event in run.events("step")] == pytest.approx(losses, rel=1e-3)
    assert tokens_of(run.root) != kept
    with closing(Store(run.store)) as store:
        assert len(store.samples()) == 0
    steps = run.events("step")
    assert all(event["sent"] for event in steps)
    first, second = (
        sum(row[3] for event in steps if event["epoch"] == epoch for row in event["sent"])
        for epoch in (0, 1)
    )
    assert first == pytest.approx(second, rel=0.02)
    sent_once, sent_never = once.data["bytes"], never.data["bytes"]
    assert isinstance(sent_once, dict)
    assert isinstance(sent_never, dict)
    assert sent_never["activations"] == first + second > 1.5 * sent_once["activations"]


@pytest.mark.parametrize(
    "method",
    [
        'name = "splitfrozen"',
        'reuse = "never"',
        'name = "splitlora"',
        'name = "fedlora"',
        'name = "fedlora"\nlocal_steps = 2',
        'name = "fedsllm"\nlocal_steps = 1',
    ],
)
def test_the_event_log_has_the_bytes_that_were_sent(
    write_run: Callable[..., Path], method: str
) -> None:
    path = write_run(method)
    outcome = train(path)
    lines = (path.parent / "run" / "events.jsonl").read_bytes().splitlines()
    events = [msgspec.json.decode(line, type=Event) for line in lines]
    assert [event.id for event in events] == list(range(len(events)))
    assert all(event.flops > 0 for event in events if isinstance(event, Compute))
    found: dict[str, float] = {}
    for event in events:
        if isinstance(event, Send):
            found[event.phase] = found.get(event.phase, 0.0) + event.bytes
    assert found == pytest.approx(outcome.data["bytes"], rel=1e-6)


# --- interruptions -------------------------------------------------------------------------------


@contextmanager
def _once_trained(folder: Path, steps: int, act: Callable[[], object]) -> Iterator[None]:
    """Call `act` from another thread when so many steps were reported."""

    def watch() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            path = folder / "metrics.jsonl"
            if path.exists() and path.read_text().count('"event": "step"') >= steps:
                act()
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize(
    "method", ['name = "splitfrozen"', 'reuse = "never"', 'name = "fedlora"', 'name = "fedsllm"']
)
def test_stopped_and_continued_gives_the_same_bytes(
    write_run: Callable[..., Path], method: str, capsys: Capture
) -> None:
    path = write_run(method, repeat=2)
    folder = path.parent / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with _once_trained(folder, 5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main(["train", str(path)]) == 1
    assert "the same command continues" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    told = status(folder)
    assert told.data["state"] == "stopped"
    assert f"splitfrozen train {folder}" in told.text
    done = len(RunFolder(folder).events("step"))
    assert train(folder).data["state"] == "done"
    assert RunFolder(folder).events("resumed")[0]["step"] >= 5
    undisturbed = changed(path, 'folder = "run"', 'folder = "undisturbed"')
    train(undisturbed)
    total = len(RunFolder(path.parent / "undisturbed").events("step"))
    assert done < total
    assert tokens_of(folder) == tokens_of(path.parent / "undisturbed")


def test_killed_and_continued_gives_the_same_bytes(write_run: Callable[..., Path]) -> None:
    path = write_run(repeat=6)
    folder = path.parent / "run"
    command = [sys.executable, "-m", "splitfrozen", "train", str(path)]
    with (
        subprocess.Popen(command, stderr=subprocess.DEVNULL) as child,
        _once_trained(folder, 10, child.kill),
    ):
        assert child.wait() == -signal.SIGKILL
    assert status(folder).data["state"] == "stopped"
    assert train(path).data["state"] == "done"
    train(changed(path, 'folder = "run"', 'folder = "undisturbed"'))
    assert tokens_of(folder) == tokens_of(path.parent / "undisturbed")


def test_a_failed_run_says_why_and_goes_on(write_run: Callable[..., Path]) -> None:
    """float16 cannot carry the activations of this model's scale; nothing was learned of them."""
    path = write_run()
    changed(path, 'codec = "float32"', 'codec = "float16"')
    model = path.parent / "model"
    wanted = config.load(path)
    loaded = load_sliced(wanted).model
    for name, parameter in loaded.named_parameters():
        if "wte" in name:
            parameter.data.mul_(1e7)
    loaded.save_pretrained(model)
    for file in Path(wanted.model.name).iterdir():
        if "token" in file.name:
            (model / file.name).write_bytes(file.read_bytes())
    changed(path, wanted.model.name, str(model))
    with pytest.raises(WireError):
        train(path)
    told = status(path.parent / "run").data
    assert told["state"] == "failed"
    assert "float16" in str(told["error"])


# --- wrong inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        ('"train.jsonl"', '"none.jsonl"', DataError, "no such data"),
        ('"test.jsonl"', '"none.jsonl"', DataError, "no such data"),
        ("[wire]", '[wire]\npublic = "none.jsonl"', DataError, "no such data"),
        ('column = "who"', 'column = "whom"', ConfigError, "data.column.*'whom'.*'who'"),
        ("count = 3\ndepth = [1, 2, 1]", "count = 4", ConfigError, "devices.count.*got 4.*3, as"),
        ('column = "who"', 'column = "who"\nrows = 31', ConfigError, r"data.rows.*31.*1\.\.30"),
        ('column = "who"', 'column = "who"\nrows = 2', ConfigError, "devices.count.*got 3"),
        (
            'partition = "column"\ncolumn = "who"',
            'partition = "iid"\nrows = 2',
            RequestError,
            "2 samples for 3 parts",
        ),
    ],
)
def test_wrong_files_are_told(
    write_run: Callable[..., Path], old: str, new: str, kind: type[RequestError], message: str
) -> None:
    path = changed(write_run(), old, new)
    with pytest.raises(kind, match=message):
        train(path)


def test_data_is_needed(write_run: Callable[..., Path]) -> None:
    path = write_run()
    text = path.read_text()
    start, end = text.index("[data]"), text.index("[run]")
    path.write_text(text[:start] + text[end:])
    for command in ("train", "partition"):
        assert main([command, str(path)]) == 2
    with pytest.raises(ConfigError, match=r"no \[data\] section.*splitfrozen serve"):
        train(path)
    assert not (path.parent / "run").exists()


def test_bad_rows_are_left_out_and_counted(write_run: Callable[..., Path]) -> None:
    path = write_run()
    data = path.parent / "train.jsonl"
    bad = ['{"text": "1", "label": "z", "who": "ann"}', "no json", '{"text": "1", "label": "a"}']
    data.write_text("\n".join(bad) + "\n" + data.read_text())
    outcome = train(path)
    assert outcome.data["skipped"] == 3
    assert outcome.data["samples"] == sum(SIZES)
    assert "3 rows left out" in outcome.text


def test_rows_that_are_cut_are_counted(
    write_run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_run()
    told = train(path)
    assert told.data["truncated"] == 0
    assert "task.max_tokens" not in told.text
    caplog.clear()
    path = changed(write_run(), 'folder = "run"', 'folder = "short"')
    outcome = train(changed(path, "max_tokens = 32", "max_tokens = 6"))
    lengths = [
        len(json.loads(line)["text"].split())
        for line in (path.parent / "train.jsonl").read_text().splitlines()
    ]
    cut = sum(length > 6 for length in lengths)  # The tests' tokenizer knows whole words.
    assert 0 < cut < sum(SIZES)
    assert outcome.data["truncated"] == cut
    message = f"{cut} of {sum(SIZES)} rows cut to 6 tokens; raise task.max_tokens"
    assert outcome.text.endswith(f"\n        {message}")
    assert caplog.messages.count(message) == 1
    assert message in train(path).text, "it is told of a run that was done already"


def test_columns_that_say_nothing_are_left_out(write_run: Callable[..., Path]) -> None:
    header = train(write_run()).text.splitlines()[0].split("  ")
    names = [name.strip() for name in header if name]
    assert names == ["device", "name", "depth", "samples", "stored", "MB sent", "seconds"]


def test_rows_that_are_all_bad_are_an_error(write_run: Callable[..., Path]) -> None:
    path = write_run()
    (path.parent / "train.jsonl").write_text('{"text": "", "label": "a", "who": "b"}\n')
    with pytest.raises(DataError, match=r"no usable row.*1 bad rows"):
        train(path)


def test_other_rows_are_another_run(write_run: Callable[..., Path]) -> None:
    path = write_run()
    train(path)
    with closing(Registry(path.parent / "run")) as registry:
        registry.set_state("stopped")
    data = path.parent / "train.jsonl"
    data.write_text(data.read_text().replace('"label": "a"', '"label": "b"'))
    with pytest.raises(DataError, match="changed since the run was begun"):
        train(path)


def test_a_purged_device_is_left_out(write_run: Callable[..., Path]) -> None:
    path = write_run()
    train(path)
    folder = path.parent / "run"
    assert main(["purge", str(folder), "--device", "device-00"]) == 0
    outcome = train(folder)
    assert outcome.data["samples"] == sum(SIZES) - 14
    assert [device["samples"] for device in devices_of(outcome)] == [0, 8, 8]


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ('name = "fedlora"', "name"),
        ('reuse = "never"', "reuse"),
        ('shuffle = "window"', "shuffle"),
    ],
)
def test_what_only_train_does_is_not_served(
    write_run: Callable[..., Path], method: str, key: str
) -> None:
    path = write_run(method)
    with pytest.raises(ConfigError, match=f"method.{key}.*splitfrozen train"):
        serve(path, hide_joins=True)
    assert not (path.parent / "run").exists()


def test_served_and_trained_runs_are_not_mixed(write_run: Callable[..., Path]) -> None:
    path = write_run()
    train(path)
    with closing(Registry(path.parent / "run")) as registry:
        registry.set_state("stopped")
    with pytest.raises(ConfigError, match=r"begun in one process.*splitfrozen train"):
        serve(path, hide_joins=True)
    (path.parent / "run" / "address.json").touch()
    with pytest.raises(ConfigError, match=r"is served.*splitfrozen serve"):
        train(path)


def test_only_one_process_trains_a_run(write_run: Callable[..., Path]) -> None:
    path = write_run()
    run = RunFolder.create(config.load(path))
    with run.lock("serve"):
        assert main(["train", str(path)]) == 1


def test_the_tokenizer_alone_is_that_of_a_run(write_run: Callable[..., Path]) -> None:
    path = write_run()
    train(path)
    wanted = config.load(path)
    task, tokenizer = task_alone(wanted, load_sliced(wanted))
    prepared = RunFolder(path.parent / "run").prepared()
    assert prepared is not None
    assert prepared.tokenizer is not None
    assert prepared.task == task
    assert tokenizer is not None
    served = tokenizers.Tokenizer.from_file(
        str(path.parent / "run/files" / prepared.tokenizer.name)
    )
    assert served.to_str() == tokenizer.to_str()


def test_another_number_of_devices_is_a_mend_until_devices_joined(
    write_run: Callable[..., Path],
) -> None:
    path = changed(write_run(), "count = 3\ndepth = [1, 2, 1]", "count = 4")
    with pytest.raises(ConfigError, match=r"set devices\.count to 3"):
        train(path)
    assert train(changed(path, "count = 4", "count = 3")).data["state"] == "done"
    with pytest.raises(ConfigError, match=r"started otherwise: got another devices\.count"):
        train(changed(path, "count = 3", "count = 4"))


@pytest.mark.parametrize(
    "damage", [{"sent": 5}, {"step": "x", "sent": [[1]]}, {"step": 1, "sent": [["a", "b"]]}]
)
def test_a_damaged_event_of_a_step_loses_nothing_else(
    write_run: Callable[..., Path], damage: dict[str, Any]
) -> None:
    path = write_run('name = "fedlora"')
    told = train(path)
    run = RunFolder(path.parent / "run")
    run.report({"event": "step", **damage})
    assert train(path).data["bytes"] == told.data["bytes"] != {}
    with closing(Registry(run.root)) as registry:
        registry.set_state("stopped")
    assert train(path).data["state"] == "done", "the event log is written again"
