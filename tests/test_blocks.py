"""model.blocks: loading, locating, refusing, hashing. Exactness of slices: tests/equivalence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from splitfrozen.config import LoraSpec
from splitfrozen.errors import ModelError
from splitfrozen.model import adapters
from splitfrozen.model.blocks import SlicedModel, load_model

LABELS = ("no", "maybe", "yes", "other")


@pytest.fixture
def checkpoint(tiny: Callable[..., Any], tmp_path: Path) -> str:
    """A folder with a tiny language model: its classifier has to be new."""
    tiny("gpt2-causal_lm").save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def test_every_family_is_located(family: Any) -> None:
    sliced = SlicedModel(family.build())
    assert sliced.kind == family.kind
    assert sliced.block_count == family.options["num_hidden_layers"]
    assert sliced.width == 32
    assert sliced.takes_token_types == (family.name == "bert")
    assert not any(parameter.requires_grad for parameter in sliced.model.parameters())
    assert bool(sliced.head) == (family.kind != "causal_lm")
    assert len(sliced.linear_maps(0, 1)) in range(4, 8)


@pytest.mark.parametrize("family", ["gpt2-causal_lm", "llama-causal_lm"], indirect=True)
def test_a_front_fills_no_cache(family: Any) -> None:
    sliced = SlicedModel(family.build())
    front = sliced.front(2)
    caches: list[Any] = []
    front.backbone.register_forward_hook(lambda *call: caches.append(call[-1].past_key_values))
    with torch.no_grad():
        front(*sliced.example((5, 3), seed=0))
    assert caches == [None]


def test_a_new_head_comes_from_the_seed_alone(checkpoint: str) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = load_model(checkpoint, "classification", LABELS, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again = load_model(checkpoint, "classification", LABELS, seed=5)
    other = load_model(checkpoint, "classification", LABELS, seed=6)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.shape == (4, 32)
    assert first.config.id2label == dict(enumerate(LABELS))
    assert not first.training


def test_a_head_for_other_classes_is_replaced(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny("bert-classification").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "classification", LABELS, seed=0)
    assert model.classifier.out_features == 4
    assert SlicedModel(model).head == ("classifier",)
    kept = load_model(str(tmp_path), "classification", LABELS[:3], seed=0)
    assert torch.equal(kept.classifier.weight, tiny("bert-classification").classifier.weight)


def test_a_pooler_that_the_checkpoint_lacks_is_part_of_the_head(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    sliced = SlicedModel(load_model(str(tmp_path), "classification", LABELS, seed=0))
    assert sliced.head == ("classifier", "bert.pooler")
    other = SlicedModel(load_model(str(tmp_path), "classification", LABELS, seed=1))
    assert sliced.weights_hash() == other.weights_hash()


def test_decoders_get_a_padding_id(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=50, bos_token_id=4, eos_token_id=7
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "classification", LABELS, 0).config.pad_token_id == 7


def test_a_name_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load the model .*nothing.*hub name or a folder"):
        load_model(str(tmp_path / "nothing"), "causal_lm", (), seed=0)


def test_a_family_without_such_a_head_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny("distilbert-classification").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="for causal_lm"):
        load_model(str(tmp_path), "causal_lm", (), seed=0)


def test_a_checkpoint_with_holes_in_its_body_is_refused(checkpoint: str) -> None:
    config = transformers.GPT2Config.from_pretrained(checkpoint)
    config.n_layer = 5
    config.save_pretrained(checkpoint)
    with pytest.raises(ModelError, match=r"24 missing.*transformer\.h\.3"):
        load_model(checkpoint, "classification", LABELS, seed=0)


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(
        num_layers=2, d_model=32, d_kv=8, d_ff=48, num_heads=2, vocab_size=60
    )
    with pytest.raises(ModelError, match="an encoder-decoder, lists of 2 modules: encoder"):
        SlicedModel(transformers.T5ForConditionalGeneration(config))


def test_a_model_without_blocks_is_refused() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    with pytest.raises(ModelError, match="cannot cut ResNetForImageClassification"):
        SlicedModel(transformers.ResNetForImageClassification(config))


def test_an_encoder_cannot_be_a_language_model() -> None:
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48
    )
    with pytest.raises(ModelError, match="cannot learn to continue text: got an encoder"):
        SlicedModel(transformers.BertLMHeadModel(config))


def test_blocks_that_pass_on_more_than_a_hidden_state_are_refused(
    tiny: Callable[..., Any],
) -> None:
    model = tiny("gpt2-causal_lm")
    aside: list[torch.Tensor] = []
    model.transformer.h[0].register_forward_hook(lambda *call: aside.append(call[2]))
    model.transformer.h[2].register_forward_hook(lambda *call: call[2] + aside[-1])
    with pytest.raises(ModelError, match="GPT2LMHeadModel does not run in slices: got logits off"):
        SlicedModel(model)


@pytest.mark.parametrize("depth", [0, 4])
def test_a_depth_outside_the_model_is_refused(tiny: Callable[..., Any], depth: int) -> None:
    with pytest.raises(ModelError, match=rf"got {depth}; allowed: 1\.\.3"):
        SlicedModel(tiny("gpt2-causal_lm")).front(depth)


def test_the_hash_is_that_of_the_base_weights(tiny: Callable[..., Any]) -> None:
    sliced = SlicedModel(tiny("gpt2-classification"))
    before = sliced.weights_hash()
    assert before == SlicedModel(tiny("gpt2-classification")).weights_hash()
    assert before != SlicedModel(tiny("gpt2-classification", seed=1)).weights_hash()
    with torch.no_grad():
        sliced.model.score.weight.add_(1)
    peft_model = adapters.attach(sliced, LoraSpec(), cut=1, seed=0)
    with torch.no_grad():
        for value in adapters.trainable(peft_model).values():
            value.add_(1)
    assert sliced.weights_hash() == before
    with torch.no_grad():
        sliced.model.transformer.h[0].attn.c_attn.weight[0, 0] += 1e-3
    assert sliced.weights_hash() != before


@pytest.mark.parametrize(
    ("id_", "longest"),
    [("gpt2-causal_lm", 64), ("opt-causal_lm", 64), ("roberta-classification", 62)],
)
def test_the_longest_sample_just_runs(tiny: Callable[..., Any], id_: str, longest: int) -> None:
    sliced = SlicedModel(tiny(id_))
    assert sliced.longest == longest
    assert sliced.front(1)(*sliced.example((longest,), 0)).shape == (1, longest, 32)
    with pytest.raises((IndexError, RuntimeError)):  # RoBERTa fails one table earlier
        sliced.front(1)(*sliced.example((longest + 1,), 0))


def test_examples_are_padded_and_reproducible(tiny: Callable[..., Any]) -> None:
    sliced = SlicedModel(tiny("bert-classification"))
    ids, mask, types = sliced.example((5, 2), seed=0)
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert (ids == 1).equal(mask == 0)  # 1 is the padding id
    assert types.max() == 1
    assert torch.equal(ids, sliced.example((5, 2), seed=0)[0])
    assert not torch.equal(ids, sliced.example((5, 2), seed=1)[0])
