"""Fixtures shared by all tests: tiny random models of every supported family.

No download: each model is built from its configuration class, with 3 or 4 blocks of width 32 and
weights large enough that attention, windows and norms matter. Sliding windows are shorter than the
samples of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TEXT = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GROUPED = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4}


@dataclass(frozen=True)
class Family:
    """A row of the table: how to build a tiny model of one family for one task.

    Attributes:
        name: as in the ids of the tests.
        config: name of the configuration class in transformers.
        model: name of the model class with its head.
        kind: the task of the head.
        options: of the configuration.
    """

    name: str
    config: str
    model: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.kind}"

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """A model with random weights, float32, in evaluation mode; `changes` to the options."""
        import torch
        import transformers

        config = getattr(transformers, self.config)(**{**self.options, **changes})
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = getattr(transformers, self.model)(config).eval()
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model


def _text(name: str, stem: str, options: dict[str, Any], *kinds: str) -> list[Family]:
    """Rows of a text family; classes are named after `stem` but for the exceptions."""
    names = {
        "classification": f"{stem}ForSequenceClassification",
        "causal_lm": "GPT2LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM",
    }
    if stem == "Gemma3":
        names["classification"] = "Gemma3TextForSequenceClassification"
    config = "Gemma3TextConfig" if stem == "Gemma3" else f"{stem}Config"
    labels: dict[str, dict[str, Any]] = {"classification": {"num_labels": 3}}
    return [
        Family(name, config, names[kind], kind, {**options, **labels.get(kind, {})})
        for kind in kinds
    ]


BOTH = ("causal_lm", "classification")
QWEN2 = {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
GEMMA3 = {**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2}
OPT = {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 16, "layerdrop": 0.5}
DISTILBERT = {**TEXT, "hidden_dim": 48}
del DISTILBERT["intermediate_size"]

FAMILIES = {
    family.id: family
    for family in [
        *_text("gpt2", "GPT2", {**TEXT, "n_inner": 48}, *BOTH),
        *_text("llama", "Llama", GROUPED, *BOTH),
        *_text("qwen2", "Qwen2", QWEN2, *BOTH),
        *_text("mistral", "Mistral", {**GROUPED, "sliding_window": 4}, *BOTH),
        *_text("gemma2", "Gemma2", GEMMA, *BOTH),
        *_text("gemma3", "Gemma3", GEMMA3, *BOTH),
        *_text("opt", "OPT", OPT, *BOTH),
        *_text("gpt_neox", "GPTNeoX", TEXT, *BOTH),
        *_text("bert", "Bert", TEXT, "classification"),
        *_text("distilbert", "DistilBert", DISTILBERT, "classification"),
        *_text("roberta", "Roberta", {**TEXT, "type_vocab_size": 1}, "classification"),
        Family(
            "vit",
            "ViTConfig",
            "ViTForImageClassification",
            "image",
            {
                **{key: TEXT[key] for key in ("num_hidden_layers", "hidden_size")},
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "image_size": 24,
                "patch_size": 6,
                "num_labels": 3,
            },
        ),
    ]
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Each row of the table in turn; `indirect` parameters pick some by id."""
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny("gpt2-classification")` builds that model; see `Family.build`."""

    def build(id_: str, seed: int = 0, **changes: Any) -> Any:
        return FAMILIES[id_].build(seed, **changes)

    return build


WORDS = tuple("0123456789abcdefgh")
"""Words that the tokenizer of `save_model` knows."""


@pytest.fixture(scope="session")
def save_model(tiny: Callable[..., Any]) -> Callable[..., Path]:
    """`save_model(folder, "bert-classification")` writes that model with a tokenizer beside it.

    The tokenizer knows WORDS; as with the family's own, BERT's puts special tokens around and
    between texts and the others' put none.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def save(folder: Path, id_: str, seed: int = 0, **changes: Any) -> Path:
        tiny(id_, seed, **changes).save_pretrained(folder)
        if id_.startswith("vit"):
            return folder
        special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>"}
        special["eos_token"] = "</s>"
        vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
        own = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        own.pre_tokenizer = pre_tokenizers.Whitespace()
        if id_.startswith("bert"):
            own.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>",
                pair="<s> $A </s> $B:1 </s>:1",
                special_tokens=[("<s>", 2), ("</s>", 3)],
            )
        PreTrainedTokenizerFast(tokenizer_object=own, **special).save_pretrained(folder)
        return folder

    return save
