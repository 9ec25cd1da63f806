"""The demo's language and its pretrained model: what the demo may rely on."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfrozen.data import village

DEMO = Path(str(files("splitfrozen"))) / "assets" / "demo"
FRESH = 10**9 + 7
"""A seed that nothing was trained on."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[.,;]", text)


def test_the_same_seed_gives_the_same_language() -> None:
    assert list(village.sentences(3, 50)) == list(village.sentences(3, 50))
    assert village.task_rows(3, 50) == village.task_rows(3, 50)
    assert village.task_rows(3, 50) == village.task_rows(3, 80)[:50]
    assert not set(village.sentences(3, 50)) & set(village.sentences(4, 50))
    assert village.task_rows(3, 50) != village.task_rows(4, 50)


def test_it_is_made_without_torch() -> None:
    code = "import sys, splitfrozen.data.village; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rows_are_different_short_and_balanced(tokenizer: Tokenizer) -> None:
    rows = village.task_rows(0, 2000)
    assert len({row["text"] for row in rows}) == len(rows)
    assert max(len(tokenizer.encode(row["text"]).ids) for row in rows) <= 32
    counts = Counter(row["label"] for row in rows)
    assert set(counts) == set(village.LABELS)
    assert min(counts.values()) > 0.2 * len(rows)


def test_stories_and_task_share_no_report_and_no_label() -> None:
    # So many of both that about ten reports would meet by chance.
    texts = [row["text"] for row in village.task_rows(0, 5000)]
    reports = {text[: text.rindex(".", 0, -1) + 1] for text in texts}  # without the closing scene
    assert len(reports) == len(texts)
    stories = list(village.sentences(0, 20_000))
    for text in stories:
        ends = [match.end() for match in re.finditer(r"\.", text)]
        assert not any(text[:end] in reports for end in ends), text
    seen = {word.lower() for text in (*stories, *texts) for word in words(text)}
    assert not seen & set(village.LABELS)


def test_labels_follow_what_is_so_and_not_what_is_named() -> None:
    needs = {"cracked": "repair", "dry": "refill", "dusty": "clean"}
    rows = village.task_rows(1, 8000)
    for pattern, is_so in (
        (r"was not (\w+) but (\w+)\.", 2),
        (r"was (\w+) rather than (\w+)\.", 1),
        (r"had been (\w+), but now it was (\w+)\.", 2),
    ):
        found = [(re.search(pattern, row["text"]), row["label"]) for row in rows]
        checked = [
            (needs[match[is_so]], label)
            for match, label in found
            if match and match[is_so] in needs
        ]
        assert {need for need, _ in checked} == set(needs.values())
        assert all(need == label for need, label in checked)
    neither = [row["label"] for row in rows if " neither " in row["text"]]
    assert set(neither) == {"nothing"}


def test_single_words_do_not_tell_the_label() -> None:
    """Naive Bayes over words stays far from what the demo's adapter reaches."""
    rows = village.task_rows(0, 1600)
    index = {word: i for i, word in enumerate({w for row in rows for w in words(row["text"])})}
    bags = np.zeros((len(rows), len(index)))
    for bag, row in zip(bags, rows, strict=True):
        bag[[index[word] for word in words(row["text"])]] = 1
    labels = np.array([village.LABELS.index(row["label"]) for row in rows])
    shares = np.stack(
        [
            (bags[:1200][labels[:1200] == c].sum(0) + 1) / ((labels[:1200] == c).sum() + 2)
            for c in range(4)
        ]
    )
    scores = bags @ np.log(shares).T + (1 - bags) @ np.log1p(-shares).T
    accuracy = float((scores.argmax(1) == labels)[1200:].mean())
    assert 0.25 < accuracy < 0.65


def test_tokenizer_spells_each_word_as_one_token(tokenizer: Tokenizer) -> None:
    whole = AutoTokenizer.from_pretrained(DEMO)
    assert (whole.pad_token, whole.eos_token) == ("<pad>", "<eos>")
    for text in village.sentences(FRESH, 200):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(words(text)), tokenizer.encode(text).tokens
        assert whole(text)["input_ids"] == ids
    other = "Any text 7 → ü"
    assert tokenizer.decode(tokenizer.encode(other).ids) == other


def test_the_folder_is_small_and_complete() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 6_000_000
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 6_500_000
    with safe_open(DEMO / "model.safetensors", "np") as weights:
        kinds = {str(weights.get_slice(name).get_dtype()) for name in weights.keys()}  # noqa: SIM118
    assert kinds == {"F16"}
    config = json.loads((DEMO / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 1)
    assert config["dtype"] == "float32"
    assert "scripts/pretrain_demo.py" in (DEMO / "README.md").read_text()


def test_the_model_was_pretrained(tokenizer: Tokenizer) -> None:
    """Its perplexity on fresh stories is near the grammar's, and far below the unigrams'."""
    model = AutoModelForCausalLM.from_pretrained(DEMO).eval()
    assert model.dtype == torch.float32
    losses: list[torch.Tensor] = []
    tokens: Counter[int] = Counter()
    for text in village.sentences(FRESH, 100):
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits
        losses.append(
            torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).repeat(ids.shape[1] - 1)
        )
        tokens.update(ids[0, 1:].tolist())
    perplexity = torch.cat(losses).mean().exp().item()
    total = tokens.total()
    unigram = math.exp(-sum(n / total * math.log(n / total) for n in tokens.values()))
    assert perplexity < 3.2
    assert perplexity < unigram / 20
