"""LoRA on the blocks above the cut, by peft, and the adapter folder that any peft opens.

The folder is byte for byte reproducible: names are sorted, and nothing in it tells when or where it
was written. Its files are replaced whole, so a reader never finds a part of an adapter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitfrozen import rng
from splitfrozen.config import LoraSpec
from splitfrozen.disk import write_whole
from splitfrozen.errors import ModelError
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import TaskKind

_ADAPTER = "default"
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
# peft has no task type for images; its own examples leave it open.
_TASKS: dict[TaskKind, TaskType | None] = {
    "classification": TaskType.SEQ_CLS,
    "causal_lm": TaskType.CAUSAL_LM,
    "image": None,
}


def attach(sliced: SlicedModel, lora: LoraSpec, cut: int, seed: int) -> PeftModel:
    """Put LoRA on blocks[cut:L] of `sliced.model`, in place, and let its head be trained.

    Hu et al., LoRA, arXiv:2106.09685: B starts at zero, so the model's output does not change.

    Args:
        cut: M; 0 adapts all blocks.
        seed: draws A.

    Raises:
        ModelError: `cut` is not in 0..L-1, or `lora.targets` names no linear map there.
    """
    if not 0 <= cut < sliced.block_count:
        raise ModelError(
            "no block is left to adapt above the cut" if cut >= 0 else "the cut is too low",
            got=cut,
            allowed=f"{int(cut > 0)}..{sliced.block_count - 1}, as the model has "
            f"{sliced.block_count} blocks",
            remedy="set model.cut",
        )
    targets = _targets(sliced, lora, cut)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=list(range(cut, sliced.block_count)),
        layers_pattern=sliced.blocks_path.rpartition(".")[2],
        modules_to_save=list(sliced.head) or None,
        task_type=_TASKS[sliced.kind],
        fan_in_fan_out=sliced.fan_in_first,
    )
    with torch.random.fork_rng(devices=[]), _quiet_peft():
        torch.manual_seed(rng.derive(seed, "lora"))
        peft_model = peft.get_peft_model(sliced.model, config)
    adapted = {
        name for name, module in sliced.model.named_modules() if isinstance(module, LoraLayer)
    }
    wanted = {name for name in sliced.linear_maps(cut, sliced.block_count) if _hit(name, targets)}
    if adapted != wanted:
        raise ModelError(
            "peft adapted other modules than those above the cut",
            got=", ".join(sorted(adapted ^ wanted)),
            allowed=f"{', '.join(targets)} of blocks {cut}..{sliced.block_count - 1}",
            remedy="name the maps in lora.targets more precisely",
        )
    return peft_model


def trainable(peft_model: PeftModel) -> dict[str, nn.Parameter]:
    """What training changes, by name, in the model's order: LoRA and the head."""
    return {name: value for name, value in peft_model.named_parameters() if value.requires_grad}


def below(sliced: SlicedModel, names: Iterable[str], cut: int) -> list[str]:
    """Those of the `names` of parameters that are in blocks[:cut]."""
    blocks = tuple(f".{sliced.blocks_path}.{index}." for index in range(cut))
    return [name for name in names if any(block in name for block in blocks)]


def state(peft_model: PeftModel) -> dict[str, Tensor]:
    """Copies of the adapter's tensors on the CPU, under the names of the adapter folder."""
    return {name: value.to("cpu", copy=True) for name, value in _live(peft_model).items()}


def load_state(peft_model: PeftModel, values: dict[str, Tensor]) -> None:
    """Put back what `state` gave.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape; nothing was changed.
    """
    live = _live(peft_model)
    missing = sorted(live.keys() - values.keys())
    unexpected = sorted(values.keys() - live.keys())
    reshaped = sorted(
        f"{name} {tuple(values[name].shape)} for {tuple(value.shape)}"
        for name, value in live.items()
        if name in values and values[name].shape != value.shape
    )
    if missing or unexpected or reshaped:
        raise ModelError(
            "these weights are of another adapter",
            got=f"missing {missing}, unexpected {unexpected}, of another shape {reshaped}",
            allowed="exactly the tensors of this adapter",
            remedy="use the model, cut and LoRA settings that the adapter was trained with",
        )
    with torch.no_grad():
        for name, value in live.items():
            value.copy_(values[name])


def save(peft_model: PeftModel, folder: Path, base_name: str) -> None:
    """Write an adapter folder that `PeftModel.from_pretrained(base, folder)` opens.

    Args:
        base_name: hub name or folder of the base model, as the adapter's config tells it.
    """
    tensors = {name: value.contiguous() for name, value in sorted(state(peft_model).items())}
    config = json.dumps(_config_table(peft_model, base_name), indent=2, sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    # Of one run's adapters only the weights differ, so replacing them is replacing the adapter.
    write_whole(folder / _CONFIG, config.encode())
    write_whole(folder / _WEIGHTS, serialise(tensors, metadata={"format": "pt"}))


def open_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter of `folder` on `model`, in place, for inference.

    Raises:
        ModelError: no adapter there, or one for another model.
    """
    try:
        # Else peft would look for a missing config on the hub, and for pickled weights.
        for name in (_CONFIG, _WEIGHTS):
            (folder / name).stat()
        values = load_file(folder / _WEIGHTS)
        with _quiet_peft():
            peft_model = PeftModel.from_pretrained(model, str(folder))
    except (OSError, KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ModelError(
            f"cannot open the adapter in {folder}",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            allowed=f"a folder with {_CONFIG} and {_WEIGHTS}, made for this model",
            remedy="check the folder and the base model",
        ) from error
    load_state(peft_model, values)
    return peft_model


def merge(peft_model: PeftModel) -> PreTrainedModel:
    """Return the base model with the adapter added to its weights; `peft_model` is used up."""
    return peft_model.merge_and_unload(safe_merge=True)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a property by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # Incomplete adapters are refused by `load_state`, by name.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        yield


def _targets(sliced: SlicedModel, lora: LoraSpec, cut: int) -> list[str]:
    maps = sliced.linear_maps(cut, sliced.block_count)
    known = sorted({name.rpartition(".")[2] for name in maps})
    if lora.targets == "all-linear":
        return known
    for target in lora.targets:
        if not any(_hit(name, [target]) for name in maps):
            raise ModelError(
                "lora.targets names a linear map that the blocks do not have",
                got=target,
                allowed=", ".join(known),
                remedy='use one of these or "all-linear"',
            )
    return sorted(set(lora.targets))


def _hit(name: str, targets: list[str]) -> bool:
    return any(name.endswith(f".{target}") for target in targets)


def _live(peft_model: PeftModel) -> dict[str, Tensor]:
    """The adapter's own tensors, without copying, under the names of the adapter folder."""
    values: dict[str, Tensor] = peft.get_peft_model_state_dict(
        peft_model, adapter_name=_ADAPTER, save_embedding_layers=False
    )
    return values


def _config_table(peft_model: PeftModel, base_name: str) -> dict[str, Any]:
    """The config as JSON takes it: sets, whose order changes from process to process, sorted."""
    config = peft_model.peft_config[_ADAPTER]
    table: dict[str, Any] = config.to_dict()
    if table["modules_to_save"]:
        # peft adds the usual names of heads to those given.
        table["modules_to_save"] = set(table["modules_to_save"])
    if table["task_type"] is None:
        base = type(peft_model.get_base_model())
        table["auto_mapping"] = {
            "base_model_class": base.__name__,
            "parent_library": base.__module__,
        }
    table |= {"base_model_name_or_path": base_name, "inference_mode": True}
    return {key: sorted(v) if isinstance(v, set) else v for key, v in table.items()}
