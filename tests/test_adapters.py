"""model.adapters: what LoRA is put on, and folders that plain peft opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from splitfrozen.config import LoraSpec
from splitfrozen.errors import ModelError
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel, load_model

LENGTHS = (14, 12, 5)
# peft asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def trained(model: Any, cut: int = 1, **lora: Any) -> tuple[SlicedModel, Any]:
    """An adapter that is not at its initial value."""
    sliced = SlicedModel(model)
    peft_model = adapters.attach(sliced, LoraSpec(rank=2, **lora), cut, seed=0)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in adapters.trainable(peft_model).values():
            value.add_(torch.randn(value.shape, generator=draw), alpha=0.1)
    return sliced, peft_model


def answers(sliced: SlicedModel, model: Any) -> torch.Tensor:
    named = dict(zip(sliced.inputs, sliced.example(LENGTHS, seed=1), strict=True))
    with torch.no_grad():
        return model.eval()(**named).logits


@pytest.mark.parametrize("cut", [0, 2])
def test_exactly_the_maps_above_the_cut_are_adapted(family: Any, cut: int) -> None:
    sliced = SlicedModel(family.build())
    wanted = sliced.linear_maps(cut, sliced.block_count)
    before = answers(sliced, sliced.model)
    peft_model = adapters.attach(sliced, LoraSpec(rank=2), cut=cut, seed=0)
    names = set(adapters.trainable(peft_model))
    adapted = {name.split(".lora_")[0] for name in names if ".lora_" in name}
    assert adapted == {f"base_model.model.{name}" for name in wanted}
    heads = {name for name in names if ".lora_" not in name}
    assert {name.split(".modules_to_save")[0] for name in heads} == {
        f"base_model.model.{name}" for name in sliced.head
    }
    torch.testing.assert_close(answers(sliced, peft_model), before, rtol=1e-5, atol=1e-5)


def test_a_cut_divides_what_is_trained(family: Any) -> None:
    sliced = SlicedModel(family.build())
    names = list(adapters.trainable(adapters.attach(sliced, LoraSpec(rank=2), cut=0, seed=0)))
    for cut in range(sliced.block_count + 1):
        below = adapters.below(sliced, names, cut)
        # In the order of `names`, and both matrices of each map.
        assert below == [name for name in names if name in below]
        maps = [f"base_model.model.{name}" for name in sliced.linear_maps(0, cut)]
        wanted = [f"{name}.lora_{side}.default.weight" for name in maps for side in "AB"]
        assert sorted(below) == sorted(wanted)
    assert len(names) > len(wanted) or not sliced.head


def test_block_1_is_not_block_10(tiny: Callable[..., Any]) -> None:
    sliced = SlicedModel(tiny("gpt2-causal_lm", num_hidden_layers=12))
    names = adapters.trainable(adapters.attach(sliced, LoraSpec(rank=2), cut=0, seed=0))
    below = adapters.below(sliced, names, 2)
    assert {name.split(".h.")[1].split(".")[0] for name in below} == {"0", "1"}


def test_lora_depends_on_its_seed_alone(tiny: Callable[..., Any]) -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        sliced = SlicedModel(tiny("llama-causal_lm"))
        return adapters.state(adapters.attach(sliced, LoraSpec(), cut=1, seed=seed))

    one, other = fresh(0), fresh(1)
    torch.manual_seed(9)
    again = fresh(0)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_targets_can_be_named(tiny: Callable[..., Any]) -> None:
    _, peft_model = trained(tiny("llama-causal_lm"), targets=("q_proj", "v_proj"))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in adapters.trainable(peft_model)}
    assert names == {"q_proj", "v_proj"}


def test_an_unknown_target_is_refused(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="got query; allowed: c_attn, c_fc, c_proj"):
        trained(tiny("gpt2-causal_lm"), targets=("c_attn", "query"))


@pytest.mark.parametrize(
    "id_", ["gpt2-classification", "bert-classification", "llama-causal_lm", "vit-image"]
)
def test_plain_peft_opens_the_folder(tiny: Callable[..., Any], tmp_path: Path, id_: str) -> None:
    sliced, peft_model = trained(tiny(id_))
    expected = answers(sliced, peft_model)
    adapters.save(peft_model, tmp_path / "adapter", "a/base")
    base = tiny(id_)
    with torch.no_grad():
        for name in sliced.head:  # another random head, as a freshly loaded base has
            for value in base.get_submodule(name).parameters():
                value.normal_()
    unadapted = answers(sliced, base)
    opened = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(answers(sliced, opened), expected, rtol=1e-4, atol=1e-4)
    assert (unadapted - expected).abs().max() > 1e-2


def test_a_new_pooler_is_trained_and_saved(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")

    def load(seed: int) -> Any:
        return load_model(str(tmp_path / "base"), "classification", ("a", "b"), seed)

    sliced, peft_model = trained(load(0))
    assert any("pooler" in name for name in adapters.trainable(peft_model))
    adapters.save(peft_model, tmp_path / "adapter", "a/base")
    opened = adapters.open_adapter(load(1), tmp_path / "adapter")
    torch.testing.assert_close(
        answers(sliced, opened), answers(sliced, peft_model), rtol=1e-5, atol=1e-5
    )


def test_the_folder_is_reproducible_and_says_nothing_of_this_machine(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        _, peft_model = trained(tiny("gpt2-classification"))
        adapters.save(peft_model, tmp_path / name, "a/base")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "a/base"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["layers_to_transform"] == [1, 2]


def test_saving_again_replaces_the_folder(tiny: Callable[..., Any], tmp_path: Path) -> None:
    _, peft_model = trained(tiny("gpt2-classification"))
    adapters.save(peft_model, tmp_path / "adapter", "a/base")
    first = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(iter(adapters.trainable(peft_model).values())).add_(1)
    adapters.save(peft_model, tmp_path / "adapter", "a/base")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_open_and_merge_give_the_trained_answers(tiny: Callable[..., Any], tmp_path: Path) -> None:
    sliced, peft_model = trained(tiny("gpt2-classification"))
    expected = answers(sliced, peft_model)
    adapters.save(peft_model, tmp_path / "adapter", "a/base")
    opened = adapters.open_adapter(tiny("gpt2-classification"), tmp_path / "adapter")
    torch.testing.assert_close(answers(sliced, opened), expected, rtol=1e-5, atol=1e-5)
    assert not adapters.trainable(opened)
    merged = adapters.merge(opened)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(answers(sliced, merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("other", ["gpt2-causal_lm", "llama-causal_lm"])
def test_an_adapter_of_another_model_is_refused(
    tiny: Callable[..., Any], tmp_path: Path, other: str
) -> None:
    _, peft_model = trained(tiny("gpt2-classification"))
    adapters.save(peft_model, tmp_path / "adapter", "a/base")
    with pytest.raises(ModelError, match="adapter"):
        adapters.open_adapter(tiny(other), tmp_path / "adapter")


def test_a_missing_or_pickled_adapter_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json and adapter_model\.safetensors"):
        adapters.open_adapter(tiny("gpt2-classification"), tmp_path)
    _, peft_model = trained(tiny("gpt2-classification"))
    adapters.save(peft_model, tmp_path / "adapter", "a/base")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(ModelError, match="cannot open the adapter"):
        adapters.open_adapter(tiny("gpt2-classification"), tmp_path / "adapter")


def test_state_goes_out_and_back(tiny: Callable[..., Any]) -> None:
    _, trained_model = trained(tiny("gpt2-classification"))
    _, fresh = trained(tiny("gpt2-classification"))
    with torch.no_grad():
        for value in adapters.trainable(fresh).values():
            value.zero_()
    state = adapters.state(trained_model)
    adapters.load_state(fresh, state)
    with torch.no_grad():  # what was given out is a copy
        next(iter(adapters.trainable(trained_model).values())).add_(1)
    for name, value in adapters.state(fresh).items():
        assert torch.equal(value, state[name])
    assert len(state) == len(adapters.trainable(fresh))


def test_loading_state_is_strict(tiny: Callable[..., Any]) -> None:
    _, peft_model = trained(tiny("gpt2-classification"))
    before = adapters.state(peft_model)
    state = adapters.state(peft_model)
    gone = next(iter(state))
    state["extra"] = state.pop(gone)
    with pytest.raises(ModelError) as caught:
        adapters.load_state(peft_model, state)
    assert gone in str(caught.value)
    assert "unexpected ['extra']" in str(caught.value)
    reshaped = {name: value[..., :1] for name, value in before.items()}
    with pytest.raises(ModelError, match="of another shape"):
        adapters.load_state(peft_model, reshaped)
    after = adapters.state(peft_model)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
