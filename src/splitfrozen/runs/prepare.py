"""From a model's name to what devices need: task, tokenizer and fronts, once a run."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoTokenizer
from transformers.image_processing_utils import BaseImageProcessor

from splitfrozen.config import Config, TaskConfig
from splitfrozen.data.tasks import COLUMNS
from splitfrozen.disk import explained
from splitfrozen.errors import ConfigError, ModelError, StoreError
from splitfrozen.model.blocks import SlicedModel, load_model
from splitfrozen.model.export import export_front
from splitfrozen.records import FileRef, Prepared, TaskSpec
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.sides import fit_sides


def load_sliced(config: Config) -> SlicedModel:
    """Load the run's model, on the CPU. Raises ModelError, ConfigError."""
    # What a checkpoint lacks is checked by load_model; bars of libraries tell nobody anything.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = load_model(config.model.name, config.task.kind, config.task.labels, config.run.seed)
    sliced = SlicedModel(model)
    if config.model.cut >= sliced.block_count:
        raise ConfigError(
            "`model.cut` leaves no block for the adapters",
            got=config.model.cut,
            allowed=f"1..{sliced.block_count - 1}, as {config.model.name} has "
            f"{sliced.block_count} blocks",
            remedy="lower model.cut",
        )
    return sliced


def to_fastest(sliced: SlicedModel) -> torch.device:
    """Move the model to the GPU where there is one; returns where it is. Exports come before."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sliced.model.to(device)
    if device.type == "cpu":
        # torch's fused attention goes backward at half the speed of the plain one on a CPU.
        sliced.model.set_attn_implementation("eager")
    return device


def prepare(run: RunFolder, sliced: SlicedModel, *, export: bool = True) -> Prepared:
    """Export fronts and tokenizer into the run folder, or return what is there already.

    Without `export` no fronts: devices of this process need none.

    Raises ModelError where the model cannot be exported, ConfigError where it cannot serve the
    task.
    """
    done = run.prepared()
    if done is not None:
        _refuse_other_weights(done, sliced, run)
        return done
    config = run.config
    run.files.mkdir(exist_ok=True)
    tokenizer = (
        None
        if config.task.kind == "image"
        else _serve_tokenizer(config.model.name, run.root / "tokenizer", run.files)
    )
    task = task_spec(config, sliced, tokenizer)
    fronts = tuple(
        export_front(
            sliced,
            depth,
            config.model.front,
            run.files,
            task.image_tokens or task.max_tokens,
            config.wire.chunk_bytes,
        )
        for depth in (_depths(config) if export else [])
    )
    own = None if tokenizer is None else _open_tokenizer(run, tokenizer)
    sides, rates = fit_sides(config, sliced, task, own, run.files, _sent(config))
    prepared = Prepared(
        task=task,
        tokenizer=tokenizer,
        fronts=fronts,
        blocks=sliced.block_count,
        width=sliced.width,
        vocabulary=0 if tokenizer is None else sliced.model.config.get_text_config().vocab_size,
        weights_hash=sliced.weights_hash(),
        codec=config.wire.name,
        sides=sides,
        bytes_per_token=rates,
    )
    run.write_prepared(prepared)
    return prepared


def task_alone(config: Config, sliced: SlicedModel) -> tuple[TaskSpec, tokenizers.Tokenizer | None]:
    """The task and the tokenizer as `prepare` gives them, for who has no run folder.

    Raises ModelError, ConfigError.
    """
    if config.task.kind == "image":
        return task_spec(config, sliced, None), None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        served = _serve_tokenizer(config.model.name, folder / "tokenizer", folder)
        own = tokenizers.Tokenizer.from_file(str(folder / served.name))
    return task_spec(config, sliced, served), own


def task_spec(config: Config, sliced: SlicedModel, tokenizer: FileRef | None) -> TaskSpec:
    """The task as devices get it: the config, completed by what the model and tokenizer say."""
    task = config.task
    names = dict.fromkeys(COLUMNS[task.kind]) | dict.fromkeys(task.columns)
    allowed = {*COLUMNS[task.kind], *(["pair"] if task.kind == "classification" else [])}
    if set(names) - allowed:
        raise ConfigError(
            "`task.columns` names columns that the task does not have",
            got=", ".join(sorted(set(names) - allowed)),
            allowed=", ".join(sorted(allowed)),
            remedy="map our names on the left to your columns on the right",
        )
    columns = {ours: task.columns.get(ours, ours) for ours in names}
    if tokenizer is None:
        return _image_spec(task, columns, config.model.name, sliced)
    if task.max_tokens > sliced.longest:
        raise ConfigError(
            "`task.max_tokens` is more than the model has positions for",
            got=task.max_tokens,
            allowed=f"1..{sliced.longest}",
            remedy="lower task.max_tokens",
        )
    special = _load_tokenizer(config.model.name)
    # BERT's tokenizer marks the texts of a pair itself; where none does, as GPT-2's, the end token
    # divides them.
    unmarked = len(special("a", "a")["input_ids"]) == 2 * len(
        special("a", add_special_tokens=False)["input_ids"]
    )
    end = special.eos_token_id
    return TaskSpec(
        kind=task.kind,
        columns=columns,
        labels=task.labels,
        max_tokens=task.max_tokens,
        template=task.template,
        separator=end if "pair" in columns and unmarked else None,
        end=end if task.kind == "causal_lm" else None,
        token_types=sliced.takes_token_types,
    )


def open_tokenizer(run: RunFolder, prepared: Prepared) -> tokenizers.Tokenizer | None:
    """The tokenizer that devices use; None for images. Raises StoreError where it is damaged."""
    return None if prepared.tokenizer is None else _open_tokenizer(run, prepared.tokenizer)


def _open_tokenizer(run: RunFolder, ref: FileRef) -> tokenizers.Tokenizer:
    path = run.files / ref.name
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower.
        raise StoreError(
            f"the tokenizer {path} cannot be opened",
            got=str(error)[:300],
            allowed="the file as it was prepared",
            remedy=f"delete {run.root / 'prepared.json'} and give the command that began the run",
        ) from error


def _load_tokenizer(name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # Where the files are missing, transformers may make a tokenizer that knows no words.
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            raise ValueError("a vocabulary without words")
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"no tokenizer in {name}",
            got=str(error).splitlines()[0],
            allowed="a model folder or hub name with a tokenizer",
            remedy="save the tokenizer beside the model",
        ) from error
    return tokenizer


def _serve_tokenizer(name: str, folder: Path, files: Path) -> FileRef:
    """Save a tokenizer in `folder`, and its fast form in `files` under its content's name."""
    _save(_load_tokenizer(name), folder)
    source = folder / "tokenizer.json"
    if not source.is_file():
        raise ModelError(
            f"the tokenizer of {name} has no fast form",
            got=", ".join(sorted(path.name for path in folder.iterdir())),
            allowed="a tokenizer with tokenizer.json, which devices read without transformers",
            remedy="convert it with transformers' convert_slow_tokenizer and save it",
        )
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    target = files / f"tokenizer-{digest[:16]}.json"
    shutil.copyfile(source, target)
    return FileRef(name=target.name, sha256=digest, bytes=target.stat().st_size)


def _save(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files. Raises DiskFullError, StoreError."""
    with explained(folder):
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:
            # tokenizers raises nothing narrower, with the system's number in its text.
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _depths(config: Config) -> list[int]:
    """Depths to export: the probe's (1) and each that may be assigned."""
    if config.devices.depth == "auto":
        return list(range(1, config.model.cut + 1))
    return sorted({1, *config.devices.depth})


def _sent(config: Config) -> list[int]:
    """Depths of the activations that travel."""
    if config.method.two_way:
        return [config.model.cut]
    return _depths(config) if config.method.name == "splitfrozen" else []


def _image_spec(
    task: TaskConfig, columns: dict[str, str], name: str, sliced: SlicedModel
) -> TaskSpec:
    shape = sliced.model.config
    size = (
        shape.image_size if isinstance(shape.image_size, list | tuple) else [shape.image_size] * 2
    )
    channels = int(shape.num_channels)
    processor = _image_processor(name)
    with torch.no_grad():
        tokens = sliced.front(1)(*sliced.example([1], 0)).shape[1]
    return TaskSpec(
        kind="image",
        columns=columns,
        labels=task.labels,
        max_tokens=task.max_tokens,
        image=(channels, int(size[0]), int(size[1])),
        image_mean=tuple(processor.get("image_mean") or [0.5] * channels),
        image_std=tuple(processor.get("image_std") or [0.5] * channels),
        image_tokens=tokens,
    )


def _image_processor(name: str) -> dict[str, Any]:
    """Mean and deviation that the model was trained with; {} where it does not say."""
    try:
        return dict(BaseImageProcessor.get_image_processor_dict(name)[0])
    except OSError:
        return {}


def _refuse_other_weights(done: Prepared, sliced: SlicedModel, run: RunFolder) -> None:
    found = sliced.weights_hash()
    if found != done.weights_hash:
        raise ModelError(
            f"the weights of {run.config.model.name} changed since the run was started",
            got=found[:16],
            allowed=done.weights_hash[:16],
            remedy="restore the model, or start a new run folder",
        )
