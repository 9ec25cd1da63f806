"""What devices are told of a model: the task in terms of its tokenizer, and the fronts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from splitfrozen.config import Config, convert
from splitfrozen.data.readers import Row
from splitfrozen.data.tasks import build_samples
from splitfrozen.errors import ConfigError, ModelError, StoreError
from splitfrozen.records import FileRef, TaskSpec
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.prepare import load_sliced, open_tokenizer, prepare, task_spec, to_fastest

END = 3
"""`</s>` in the tokenizer of `save_model`."""
TEXTS = {"kind": "classification", "labels": ["no", "yes"], "max_tokens": 16}
PAIRS = {**TEXTS, "columns": {"pair": "other"}}

SaveModel = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_model: SaveModel) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for id_ in ("bert-classification", "gpt2-classification", "llama-causal_lm", "vit-image"):
        save_model(folder / id_, id_)
    return folder


def configured(
    model: Path,
    task: dict[str, Any],
    folder: Path = Path("unused"),
    cut: int = 2,
    depths: tuple[int, ...] = (1,),
) -> Config:
    table = {
        "model": {"name": str(model), "cut": cut},
        "task": task,
        "devices": {"count": len(depths), "depth": depths},
        "run": {"folder": str(folder)},
    }
    return convert(table, Config)


def spec_of(models: Path, id_: str, task: dict[str, Any]) -> TaskSpec:
    config = configured(models / id_, task)
    served = None if task["kind"] == "image" else FileRef("tokenizer.json", "0" * 64, 1)
    return task_spec(config, load_sliced(config), served)


# --- tasks ---------------------------------------------------------------------------------------


def test_a_tokenizer_that_marks_pairs_needs_no_separator(models: Path) -> None:
    spec = spec_of(models, "bert-classification", PAIRS)
    assert spec.columns == {"text": "text", "label": "label", "pair": "other"}
    assert (spec.separator, spec.end, spec.token_types) == (None, None, True)
    assert (spec.labels, spec.max_tokens, spec.image) == (("no", "yes"), 16, None)


def test_a_tokenizer_that_does_not_gets_the_end_token_between(models: Path) -> None:
    spec = spec_of(models, "gpt2-classification", PAIRS)
    assert (spec.separator, spec.end, spec.token_types) == (END, None, False)


def test_single_texts_need_no_separator(models: Path) -> None:
    assert spec_of(models, "gpt2-classification", TEXTS).separator is None


def test_a_language_model_ends_its_completions(models: Path) -> None:
    task = {"kind": "causal_lm", "max_tokens": 16, "template": "a {prompt} b"}
    spec = spec_of(models, "llama-causal_lm", task)
    assert spec.columns == {"prompt": "prompt", "completion": "completion"}
    assert (spec.separator, spec.end, spec.template) == (None, END, "a {prompt} b")


def test_images_have_the_shape_and_tokens_of_the_model(models: Path) -> None:
    spec = spec_of(models, "vit-image", {"kind": "image", "labels": ["a", "b", "c"]})
    assert spec.columns == {"pixels": "pixels", "label": "label"}
    # Patches of 6 x 6 in images of 24 x 24, and the class token.
    assert (spec.image, spec.image_tokens) == ((3, 24, 24), 17)
    assert (spec.image_mean, spec.image_std) == ((0.5,) * 3, (0.5,) * 3)


def test_images_are_normalised_as_the_model_was_trained(
    save_model: SaveModel, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "vit-image")
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    config = configured(folder, {"kind": "image", "labels": ["a", "b", "c"]})
    spec = task_spec(config, load_sliced(config), None)
    assert (spec.image_mean, spec.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({**TEXTS, "max_tokens": 65}, r"`task\.max_tokens`.*got 65; allowed: 1\.\.64"),
        ({**TEXTS, "columns": {"txet": "a"}}, r"got txet; allowed: label, pair, text"),
        ({**TEXTS, "columns": {"prompt": "a", "completion": "b"}}, r"got completion, prompt;"),
    ],
)
def test_a_task_that_the_model_cannot_serve_is_refused(
    models: Path, task: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(models, "gpt2-classification", task)


# --- fronts and tokenizer ------------------------------------------------------------------------


def test_devices_get_the_tokens_that_transformers_gives(models: Path, tmp_path: Path) -> None:
    config = configured(models / "bert-classification", PAIRS, tmp_path / "run")
    run = RunFolder.create(config)
    sliced = load_sliced(run.config)
    prepared = prepare(run, sliced)
    assert prepared == run.prepared()
    assert [front.depth for front in prepared.fronts] == [1]
    assert (prepared.blocks, prepared.width, prepared.vocabulary) == (3, 32, 60)
    assert prepared.weights_hash == sliced.weights_hash()
    for ref in [file for front in prepared.fronts for file in front.files] + [prepared.tokenizer]:
        data = (run.files / ref.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (ref.bytes, ref.sha256)
    tokenizer = open_tokenizer(run, prepared)
    assert isinstance(tokenizer, tokenizers.Tokenizer)
    assert prepared.tokenizer is not None
    served = run.files / prepared.tokenizer.name
    whole_file = served.read_bytes()
    for damage in (b"", whole_file[:100], b"[]"):
        served.write_bytes(damage)
        with pytest.raises(StoreError, match=r"tokenizer .* cannot be opened.*delete .*prepared"):
            open_tokenizer(run, prepared)
    served.unlink()
    with pytest.raises(StoreError, match=r"tokenizer .* cannot be opened.*delete .*prepared"):
        open_tokenizer(run, prepared)
    rows = [Row("f", 1, {"text": "0 a b", "pair": "c 1", "label": "yes"})]
    [sample] = build_samples(rows, prepared.task, tokenizer, pytest.fail)
    whole = AutoTokenizer.from_pretrained(models / "bert-classification")
    assert sample.tokens.tolist() == whole("0 a b", "c 1")["input_ids"]
    assert sample.token_types is not None
    assert sample.token_types.tolist() == [0] * 5 + [1] * 3


def test_what_was_prepared_is_kept_for_the_same_weights_only(
    save_model: SaveModel, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", "vit-image")
    task = {"kind": "image", "labels": ["a", "b", "c"]}
    # Devices are measured with the first block, so it is exported too.
    run = RunFolder.create(configured(model, task, tmp_path / "run", depths=(2, 2)))
    first = prepare(run, load_sliced(run.config))
    assert [front.depth for front in first.fronts] == [1, 2]
    assert (first.tokenizer, first.vocabulary) == (None, 0)
    assert open_tokenizer(run, first) is None
    for path in run.files.iterdir():
        path.unlink()
    assert prepare(run, load_sliced(run.config)) == first
    assert list(run.files.iterdir()) == [], "it was exported again"
    save_model(model, "vit-image", seed=1)
    with pytest.raises(ModelError, match=r"weights of .* changed since the run was started"):
        prepare(run, load_sliced(run.config))


def test_a_cut_that_leaves_no_block_is_refused(models: Path) -> None:
    config = configured(models / "gpt2-classification", TEXTS, cut=3)
    with pytest.raises(ConfigError, match=r"`model\.cut` leaves no block.*got 3; allowed: 1\.\.2"):
        load_sliced(config)


@pytest.mark.parametrize("id_", ["gpt2-classification", "bert-classification"])
def test_a_model_without_tokenizer_is_refused(
    save_model: SaveModel, tmp_path: Path, id_: str
) -> None:
    folder = save_model(tmp_path / "model", id_)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    run = RunFolder.create(configured(folder, TEXTS, tmp_path / "run"))
    with pytest.raises(ModelError, match=r"no tokenizer in .*: got a vocabulary without words"):
        prepare(run, load_sliced(run.config))
    assert run.prepared() is None


def test_the_model_goes_where_it_is_computed(models: Path) -> None:
    sliced = load_sliced(configured(models / "gpt2-classification", TEXTS))
    assert sliced.model.device.type == "cpu", "fronts are exported from there"
    assert to_fastest(sliced) == sliced.model.device


def test_a_tokenizer_that_cannot_be_written_is_told(models: Path, tmp_path: Path) -> None:
    config = configured(models / "bert-classification", PAIRS, tmp_path / "run")
    run = RunFolder.create(config)
    (run.root / "tokenizer" / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(StoreError, match="tokenizer cannot be used: got Is a directory"):
        prepare(run, load_sliced(run.config))
