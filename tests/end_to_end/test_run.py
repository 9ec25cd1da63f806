"""Whole runs: a server and its devices as real processes over HTTPS, then what comes of them.

The models are tiny and random, so nothing is said of how well they learn; what they compute is
compared with plain transformers and peft on the exported folders.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from splitfrozen.cli import main
from splitfrozen.runs import networklog
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.local import join_arguments, process, run_locally
from splitfrozen.server.store import Store
from splitfrozen.studies.replay import replay

pytestmark = [
    pytest.mark.slow,
    # peft 0.21 asks transformers 5.23 for a property by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

WORDS = "0123456789abcdefgh"
EVAL_ROWS = 12
BATCH = 8
EPOCHS = 2

RUN = """
[model]
name = "model"
cut = {cut}
precision = "float32"
[task]
{task}
max_tokens = 32
eval = "{evaluation}"
[devices]
count = {count}
depth = {depth}
[train]
epochs = 2
batch_size = 8
lr = 5e-3
[server]
host = "127.0.0.1"
port = 0
[run]
folder = "run"
"""

SaveModel = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _one_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def words(draw: np.random.Generator) -> str:
    return " ".join(draw.choice(list(WORDS), draw.integers(2, 10)))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(folder: Path, count: int, extra: str = "", **values: Any) -> Path:
    values = {"evaluation": "evaluation.jsonl", "cut": 2, **values}
    path = folder / "run.toml"
    path.write_text(RUN.format(count=count, **values) + extra)
    return path


def command(capsys: Capture, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    found: dict[str, Any] = json.loads(printed.out)
    return found


def check_run(summary: dict[str, Any], counts: Sequence[int], depths: Sequence[set[int]]) -> None:
    """What every run must have come to, whatever its task."""
    run = RunFolder(Path(summary["folder"]))
    assert summary["state"] == "done"
    assert [device["announced"] for device in summary["devices"]] == list(counts)
    assert [device["samples"] for device in summary["devices"]] == list(counts)
    for device, allowed in zip(summary["devices"], depths, strict=True):
        assert device["depth"] in allowed
        assert device["seconds"] > 0
        assert device["failure"] is None
    store = Store(run.store)
    table = store.samples()
    store.close()
    keys = [(table.key(row).device, table.key(row).sample) for row in range(len(table))]
    stored = [(f"device-{i:02}", n) for i, count in enumerate(counts) for n in range(count)]
    assert keys == stored, "each sample is stored once"
    assert set(table.depth.tolist()) == {run.config.model.cut}
    forecast = json.loads((run.root / "forecast.json").read_text())
    assert [(f["device"], f["samples"]) for f in forecast] == [
        (f"device-{i:02}", count) for i, count in enumerate(counts)
    ]
    steps = math.ceil(sum(counts) / BATCH) * EPOCHS
    assert [event["step"] for event in run.events("step")] == list(range(1, steps + 1))
    assert sum(event["samples"] for event in run.events("step")) == EPOCHS * sum(counts)
    assert (len(run.events("baseline")), len(run.events("evaluation"))) == (1, EPOCHS)
    assert Path(summary["plot"]).read_bytes().startswith(b"\x89PNG")
    assert "splitfrozen://" not in (run.root / "run.log").read_text(), "join strings are secrets"
    check_replay(run, summary, steps)


def check_replay(run: RunFolder, summary: dict[str, Any], steps: int) -> None:
    """The run's event log is whole, and the simulator sends what was sent (when is measured by
    benchmarks/replay.py)."""
    found: dict[str, Any] = replay(run.root, None, None).data
    sent = sum(device["bytes_up"] for device in summary["devices"])
    assert found["measured"]["bytes"] == sent > 0
    assert found["replayed"]["bytes"] == pytest.approx(sent, rel=0.01)
    assert found["replayed"]["makespan_s"] > 0
    assert found["forecast"]["makespan_s"] > 0
    parties = {one["who"]: one["events"] for one in found["parties"]}
    for device in summary["devices"]:
        assert parties[f"{device['id']}>server"] >= 1
    events = networklog.read(run.root)
    trained = [event.step for event in events if event.phase == "train"]
    assert trained == list(range(steps))
    assert sum(event.phase == "evaluate" for event in events) == 1 + EPOCHS
    shallow = {d["id"] for d in summary["devices"] if d["depth"] < run.config.model.cut}
    assert any(event.phase == "lift" for event in events) == bool(shallow)


def check_evaluation(capsys: Capture, run: Path) -> dict[str, Any]:
    """`eval` measures what the run measured last; returns that."""
    found = command(capsys, "eval", run, "--adapter", "last")
    assert found["samples"] == EVAL_ROWS
    event = RunFolder(run).events("evaluation")[-1]
    for name in found.keys() & {"loss", "accuracy", "f1", "perplexity", "exact_match"}:
        assert found[name] == pytest.approx(event[name], rel=1e-5), name
    return event


def exported(capsys: Capture, run: Path, auto: Any, **options: Any) -> tuple[Any, Any]:
    """The last adapter as plain peft opens it on the base, and merged as transformers opens it."""
    folders = run.parent / "adapter", run.parent / "merged"
    command(capsys, "export", run, folders[0], "--adapter", "last")
    command(capsys, "export", run, folders[1], "--adapter", "last", "--merge")
    base = auto.from_pretrained(run.parent / "model", **options)
    return (
        PeftModel.from_pretrained(base, folders[0]).eval(),
        auto.from_pretrained(folders[1]).eval(),
    )


def logits(models: tuple[Any, Any], **inputs: torch.Tensor) -> torch.Tensor:
    """What both models say; they must say the same."""
    with torch.no_grad():
        first, second = (model(**inputs).logits for model in models)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    return torch.as_tensor(first)


# --- three tasks ---------------------------------------------------------------------------------


def test_text_pairs_with_int8_and_depths_by_measurement(
    tmp_path: Path, save_model: SaveModel, capsys: Capture
) -> None:
    model = save_model(tmp_path / "model", "bert-classification", num_labels=2)
    draw = np.random.default_rng(0)

    def row() -> dict[str, Any]:
        text = words(draw)
        return {"text": text, "other": words(draw), "label": ["no", "yes"][text[0].isdigit()]}

    counts = (20, 15, 10)
    data = [
        write_rows(tmp_path / f"d{i}.jsonl", [row() for _ in range(count)])
        for i, count in enumerate(counts)
    ]
    held_out = [row() for _ in range(EVAL_ROWS)]
    write_rows(tmp_path / "evaluation.jsonl", held_out)
    task = 'labels = ["no", "yes"]\ncolumns = { pair = "other" }'
    extra = '[wire]\ncodec = "int8"\n'
    run_toml = write_run(tmp_path, len(data), extra, task=task, depth='"auto"')
    summary = run_locally(run_toml, data, tmp_path)
    check_run(summary, counts, [{1, 2}] * 3)
    assert max(device["depth"] for device in summary["devices"]) == 2, "the fastest sets the pace"
    event = check_evaluation(capsys, tmp_path / "run")
    models = exported(capsys, tmp_path / "run", AutoModelForSequenceClassification, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()
    loss = 0.0
    for one in held_out:
        pair = tokenizer(one["text"], one["other"], return_token_type_ids=True)
        inputs = {name: torch.tensor([ids]) for name, ids in pair.items()}
        target = torch.tensor([["no", "yes"].index(one["label"])])
        loss += float(functional.cross_entropy(logits(models, **inputs), target))
    assert loss / EVAL_ROWS == pytest.approx(event["loss"], abs=1e-4)


def test_a_language_model_that_trains_while_devices_send(
    tmp_path: Path, save_model: SaveModel, capsys: Capture
) -> None:
    save_model(tmp_path / "model", "llama-causal_lm")
    draw = np.random.default_rng(1)

    def row() -> dict[str, str]:
        prompt = words(draw)
        return {"prompt": prompt, "completion": f"{prompt[-1]} {words(draw)}"}

    counts = (21, 14)
    data = [
        write_rows(tmp_path / f"d{i}.jsonl", [row() for _ in range(count)])
        for i, count in enumerate(counts)
    ]
    write_rows(tmp_path / "evaluation.jsonl", [row() for _ in range(EVAL_ROWS)])
    run_toml = write_run(
        tmp_path,
        len(data),
        'start = "streaming"\nwindow = 8\n',
        task='kind = "causal_lm"\ntemplate = "h {prompt}"\nanswer = "(\\\\w)"\nanswer_samples = 5',
        depth=[1, 1],
        cut=1,
    )
    summary = run_locally(run_toml, data, tmp_path)
    check_run(summary, counts, [{1}] * 2)
    run = tmp_path / "run"
    ledger = (run / "training" / "ledger.jsonl").read_text().splitlines()
    drawn = [tuple(key) for line in ledger for key in json.loads(line)["keys"]]
    assert sorted(drawn) == [(f"device-0{i}", n) for i in (0, 1) for n in range(counts[i])]
    event = check_evaluation(capsys, run)
    assert event["exact_match"] in {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}
    assert event["perplexity"] == pytest.approx(math.exp(event["loss"]))
    models = exported(capsys, run, AutoModelForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    prompt = tokenizer("h 0 a", return_tensors="pt")["input_ids"]
    logits(models, input_ids=prompt)
    said = command(capsys, "generate", run, "--prompt", "0 a", "--max-new-tokens", 6)
    best = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), run / "training" / "best"
    )
    ids = prompt
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, best(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    expected = ids[0, prompt.shape[1] :].tolist()
    end = tokenizer.eos_token_id
    expected = expected[: expected.index(end)] if end in expected else expected
    assert said["completion"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_images_from_arrays(tmp_path: Path, save_model: SaveModel, capsys: Capture) -> None:
    save_model(tmp_path / "model", "vit-image")
    draw = np.random.default_rng(2)

    def write(name: str, count: int) -> tuple[Path, Any, Any]:
        labels = draw.integers(0, 3, count)
        # A picture is as bright as its class.
        pixels = (draw.integers(0, 86, (count, 24, 24, 3)) + 80 * labels[:, None, None, None]) % 256
        np.savez(tmp_path / name, pixels=pixels.astype(np.uint8), label=labels)
        return tmp_path / name, pixels, labels

    counts = (18, 11)
    data = [write(f"d{i}.npz", count)[0] for i, count in enumerate(counts)]
    _, pixels, labels = write("evaluation.npz", EVAL_ROWS)
    run_toml = write_run(
        tmp_path,
        len(data),
        task='kind = "image"\nlabels = ["dark", "grey", "bright"]',
        depth=[1, 2],
        evaluation="evaluation.npz",
    )
    check_run(run_locally(run_toml, data, tmp_path), counts, [{1}, {2}])
    event = check_evaluation(capsys, tmp_path / "run")
    models = exported(capsys, tmp_path / "run", AutoModelForImageClassification)
    values = torch.from_numpy((pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5).float()
    found = logits(models, pixel_values=values)
    loss = float(functional.cross_entropy(found, torch.from_numpy(labels)))
    assert loss == pytest.approx(event["loss"], abs=1e-4)


# --- trouble -------------------------------------------------------------------------------------


def device(join: str, data: Path, state: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "splitfrozen", *join_arguments(join, data, state)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def serve(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "splitfrozen", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _joins(run: Path) -> list[str]:
    return (run / "join.txt").read_text().split()


def interrupt_early(run_toml: Path) -> None:
    """Ctrl-C while the run is being prepared: it ends, says so, and does not count as done."""
    root, log = run_toml.parent / "run", run_toml.parent / "interrupted.log"
    with (
        log.open("w") as output,
        process([sys.executable, "serve", str(run_toml)], output, output) as server,
    ):
        while not (root / "worker.lock").exists():
            assert server.poll() is None
            time.sleep(0.05)
        run = RunFolder(root)
        assert run.holder("serve") == server.pid
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 1
    assert "stopped; the same command continues" in log.read_text()
    assert all(f"splitfrozen join {j} --data" in log.read_text() for j in _joins(root))
    assert "Traceback" not in log.read_text()
    assert (run.holder("serve"), run.holder("worker")) == (None, None)


def test_a_run_survives_what_people_do_to_it(
    tmp_path: Path, save_model: SaveModel, capsys: Capture
) -> None:
    save_model(tmp_path / "model", "gpt2-classification", num_labels=2)
    draw = np.random.default_rng(3)
    rows = [{"text": words(draw), "label": i % 2} for i in range(30 + EVAL_ROWS)]
    write_rows(tmp_path / "evaluation.jsonl", rows[30:])
    data = [write_rows(tmp_path / f"d{i}.jsonl", rows[i:30:2]) for i in (0, 1)]
    bare = write_rows(tmp_path / "bare.jsonl", [{"text": "a", "Lable": 1}])
    run, task = tmp_path / "run", 'labels = ["no", "yes"]'
    run_toml = write_run(tmp_path, 2, task=task, depth=[1, 1], cut=1)
    interrupt_early(run_toml)
    joins = _joins(run)
    assert len(joins) == 2
    arguments = ["serve", str(run_toml), "--hide-joins", "--json"]
    with (
        (tmp_path / "serve.json").open("w") as output,
        (tmp_path / "serve.log").open("w") as told,
        process([sys.executable, *arguments], stdout=output, stderr=told) as server,
    ):
        while RunFolder(run).holder("serve") is None:
            assert server.poll() is None
            time.sleep(0.05)
        second = serve(run)
        assert second.returncode == 1
        assert f"in use: got a `serve` process with id {server.pid}" in second.stderr

        lost = device(joins[0], bare, tmp_path / "state")
        assert lost.returncode == 2
        said = json.loads(lost.stdout)
        assert said["error"] == "DataError"
        assert "no column 'label'" in said["message"]
        assert "got columns 'text', 'Lable'" in said["message"]
        assert "did you mean 'Lable'?" in said["message"]
        status = command(capsys, "status", run)
        assert status["served"]
        assert "no column 'label'" in status["devices"][0]["failure"]

        head, fingerprint = joins[1].rsplit("/", 1)
        forged = "".join("10"[digit == "1"] for digit in fingerprint)
        refused = device(f"{head}/{forged}", data[1], tmp_path / "forged")
        assert refused.returncode == 1
        assert json.loads(refused.stdout)["error"] == "RefusedError"
        assert "Traceback" not in refused.stderr + lost.stderr

        for join, source in zip(joins, data, strict=True):
            ended = device(join, source, tmp_path / "state")
            assert ended.returncode == 0, ended.stderr
        assert server.wait(60) == 0
    log = (tmp_path / "serve.log").read_text()
    assert "join strings, one for each device, are in" in log
    assert "splitfrozen://" not in log, "--hide-joins was given"
    summary = json.loads((tmp_path / "serve.json").read_text())
    check_run(summary, (15, 15), [{1}] * 2)

    again = serve(run_toml, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["accuracy_after"] == summary["accuracy_after"]
    run_toml.write_text(run_toml.read_text().replace("epochs = 2", "epochs = 3"))
    changed = serve(run_toml)
    assert changed.returncode == 2
    assert "got another train.epochs;" in changed.stderr
