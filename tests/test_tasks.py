import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from splitfrozen.data.readers import BadRow, Row
from splitfrozen.data.tasks import announce, build_samples, encode_prompt, truncation
from splitfrozen.errors import ConfigError, DataError
from splitfrozen.records import IGNORED, Sample, TaskSpec

GPT2 = Path(__file__).parents[2] / "shared" / "data" / "gpt2_tokenizer" / "tokenizer.json"

PAIRS = [
    ("The cat sat on the mat.", "A cat was sitting on a mat, they say, for a long time."),
    ("Short", "one"),
    ("A much longer first text, with many words in it, so that it is cut.", "Brief."),
    ("Ünïcödé naïve café ☕ 漢字 🙂", "tabs\tand\nlines  and   blanks"),
    ("both of these are long enough to be cut by far", "and this one is as long as the other one"),
]
CORPUS = [text for pair in PAIRS for text in pair]


def bert() -> Tokenizer:
    """WordPiece with [CLS] and [SEP], and the padding and truncation that BERT's file asks for."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(9)
    return tokenizer


def gpt2() -> Tokenizer:
    """Byte-level BPE without special tokens around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama() -> Tokenizer:
    """The same with a BOS before every text."""
    tokenizer = gpt2()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A",
        pair="<|endoftext|> $A <|endoftext|> $B",
        special_tokens=[("<|endoftext|>", 0)],
    )
    return tokenizer


def real_gpt2() -> Tokenizer:
    if not GPT2.is_file():
        pytest.skip("GPT-2's own tokenizer.json is not here")
    return Tokenizer.from_file(str(GPT2))


def classification(**changes: object) -> TaskSpec:
    fields = {
        "kind": "classification",
        "columns": {"text": "text", "label": "label"},
        "labels": ("no", "yes"),
        "max_tokens": 16,
    }
    return TaskSpec(**(fields | changes))


def causal(**changes: object) -> TaskSpec:
    columns = {"prompt": "prompt", "completion": "completion"}
    fields = {"kind": "causal_lm", "columns": columns, "labels": (), "max_tokens": 64}
    return TaskSpec(**(fields | changes))


def rows(*values: dict[str, object]) -> list[Row]:
    return [Row("a.csv", line, item) for line, item in enumerate(values, start=2)]


def build(
    given: Iterable[Row], task: TaskSpec, tokenizer: Tokenizer | None
) -> tuple[list[Sample], list[BadRow]]:
    bad: list[BadRow] = []
    return list(build_samples(given, task, tokenizer, bad.append)), bad


# --- classification ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [4, 5, 9, 16, 200])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("make", [bert, gpt2, llama, real_gpt2])
def test_tokens_are_those_of_transformers(make, paired: bool, max_tokens: int):
    tokenizer = make()
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    columns = {"text": "text", "label": "label"} | ({"pair": "pair"} if paired else {})
    task = classification(columns=columns, max_tokens=max_tokens, token_types=True)
    given = rows(*({"text": a, "pair": b, "label": "yes"} for a, b in PAIRS))
    samples, bad = build(given, task, tokenizer)
    assert not bad
    assert len(samples) == len(PAIRS)
    lengths = set()
    for sample, (text, pair) in zip(samples, PAIRS, strict=True):
        theirs = reference(
            text,
            pair if paired else None,
            truncation=True,
            max_length=max_tokens,
            return_token_type_ids=True,
        )
        assert sample.tokens.tolist() == theirs["input_ids"]
        assert sample.token_types.tolist() == theirs["token_type_ids"]
        assert sample.length == len(sample.tokens) <= max_tokens
        lengths.add(sample.length)
    assert (max_tokens in lengths) == (max_tokens < 200)


def test_the_callers_tokenizer_is_left_as_it_was():
    tokenizer = bert()
    before = tokenizer.to_str()
    samples, _ = build(rows({"text": "the cat", "label": 1}), classification(), tokenizer)
    assert samples[0].length < 9
    assert tokenizer.to_str() == before
    assert len(encode_prompt("the cat sat on the mat " * 9, causal(), tokenizer)) == 56
    assert tokenizer.to_str() == before


def test_sample_fields():
    samples, _ = build(rows({"text": "the cat", "label": "yes"}), classification(), bert())
    (sample,) = samples
    assert sample.tokens.dtype == sample.targets.dtype == np.int32
    assert sample.targets.tolist() == [1]
    assert sample.token_types is None
    assert sample.pixels is None


def test_a_pair_is_joined_by_the_separator_where_one_is_given():
    tokenizer, end = gpt2(), 0
    columns = {"text": "t", "pair": "p", "label": "l"}
    task = classification(columns=columns, max_tokens=12, separator=end, token_types=True)
    given = rows(*({"text": a, "pair": b, "label": 0} for a, b in PAIRS))
    samples, bad = build(given, task, tokenizer)
    assert not bad
    for sample, (text, pair) in zip(samples, PAIRS, strict=True):
        a, b = tokenizer.encode(text).ids, tokenizer.encode(pair).ids
        place = sample.tokens.tolist().index(end)
        first, second = sample.tokens[:place].tolist(), sample.tokens[place + 1 :].tolist()
        assert (first, second) == (a[: len(first)], b[: len(second)])
        assert sample.length == min(12, len(a) + 1 + len(b))
        # Longest first: only a text longer than its share is cut, and both to a like length.
        if len(first) < len(a) and len(second) < len(b):
            assert abs(len(first) - len(second)) <= 1
        assert sample.token_types.tolist() == [0] * (place + 1) + [1] * len(second)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("no", 0),
        (" yes ", 1),
        ("1", 1),
        (1, 1),
        (1.0, 1),
        ("1.0", 1),
        (np.int64(0), 0),
        (np.float32(1), 1),
    ],
)
def test_labels(label: object, expected: int):
    samples, bad = build(rows({"text": "a cat", "label": label}), classification(), bert())
    assert not bad
    assert samples[0].targets.tolist() == [expected]


def test_names_of_digits_come_before_indices():
    task = classification(labels=("1", "0"))
    labels = ["1", 1, 1.0, "0", 0]
    samples, _ = build(rows(*({"text": "a cat", "label": x} for x in labels)), task, bert())
    assert [sample.targets.item() for sample in samples] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "label", ["maybe", "", "2", 2, -1, 0.5, None, True, [1], float("nan"), float("inf"), "YES"]
)
def test_unknown_labels_name_the_allowed(label: object):
    samples, bad = build(rows({"text": "a cat", "label": label}), classification(), bert())
    assert not samples
    assert bad == [BadRow("a.csv", 2, f"`label` is {label!r}; allowed: 'no' or 0, 'yes' or 1")]


def test_bad_rows_are_reported_and_ids_count_the_good():
    given = rows(
        {"text": "a cat", "label": 0},
        {"text": "", "label": 0},
        {"text": " \n\t", "label": 0},
        {"text": None, "label": 0},
        {"text": 5, "label": 0},
        {"text": "\u0000", "label": 0},
        {"text": "a mat", "label": 1},
    )
    samples, bad = build(given, classification(), bert())
    assert [sample.id for sample in samples] == [0, 1]
    assert [sample.targets.item() for sample in samples] == [0, 1]
    assert [row.line for row in bad] == [3, 4, 5, 6, 7]
    assert [row.reason for row in bad] == [
        "`text` is empty",
        "`text` is empty",
        "`text` is None; allowed: text",
        "`text` is 5; allowed: text",
        "`text` gives no tokens",
    ]


def test_an_empty_second_text_is_a_bad_row():
    task = classification(columns={"text": "t", "pair": "p", "label": "l"})
    samples, bad = build(rows({"text": "a", "pair": "", "label": 0}), task, bert())
    assert not samples
    assert bad[0].reason == "`pair` is empty"


@pytest.mark.parametrize(("paired", "separator"), [(False, None), (True, None), (True, 5)])
@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_rows_that_lose_their_end_say_so(make, paired: bool, separator: int | None):
    columns = {"text": "text", "label": "label"} | ({"pair": "pair"} if paired else {})
    given = rows(*({"text": a, "pair": b, "label": "yes"} for a, b in PAIRS))

    def built(most: int) -> list[Sample]:
        task = classification(columns=columns, max_tokens=most, separator=separator)
        return build(given, task, make())[0]

    whole = [sample.length for sample in built(500)]
    seen = set()
    for most in {8, 16, *whole, *(max(length - 1, 5) for length in whole)}:
        truncated = [sample.truncated for sample in built(most)]
        assert truncated == [length > most for length in whole]
        seen |= set(truncated)
    assert seen == {False, True}


def test_people_are_told_of_rows_that_lost_their_end():
    told = truncation(60, 61, 64)
    assert told == "60 of 61 rows cut to 64 tokens; raise task.max_tokens"
    assert truncation(0, 61, 64) == ""


def test_max_tokens_must_leave_room():
    with pytest.raises(ConfigError, match=r"got 2; allowed: more than the 2 special tokens"):
        build_samples([], classification(max_tokens=2), bert(), print)


# --- causal language models ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, llama, real_gpt2])
def test_causal_targets_are_the_next_tokens_of_the_completion(make):
    tokenizer = make()
    task = causal(template='{"q": {prompt}} ', end=7)
    given = rows({"prompt": "The cat", "completion": "sat on the mat."})
    (sample,), bad = build(given, task, tokenizer)
    prompt = tokenizer.encode('{"q": The cat} ').ids
    completion = tokenizer.encode("sat on the mat.", add_special_tokens=False).ids
    assert not bad
    assert sample.tokens.tolist() == [*prompt, *completion, 7]
    expected = [IGNORED] * (len(prompt) - 1) + completion + [7] + [IGNORED]
    assert sample.targets.tolist() == expected
    assert sample.length == len(expected)
    assert encode_prompt("The cat", task, tokenizer).tolist() == prompt
    assert encode_prompt("The cat", task, tokenizer).dtype == np.int32


def test_causal_without_an_end_token():
    tokenizer = gpt2()
    (sample,), _ = build(rows({"prompt": "The", "completion": " cat"}), causal(), tokenizer)
    assert sample.tokens.tolist() == tokenizer.encode("The").ids + tokenizer.encode(" cat").ids


def test_a_long_completion_is_cut_and_a_long_prompt_is_a_bad_row():
    tokenizer = gpt2()
    given = rows(
        {"prompt": "The cat", "completion": "sat on the mat for a long time " * 9},
        {"prompt": "The cat sat on the mat for a long time " * 9, "completion": "yes"},
    )
    (sample,), bad = build(given, causal(max_tokens=12, end=0), tokenizer)
    assert sample.length == 12
    assert sample.truncated
    assert sample.targets[-1] == IGNORED
    assert sample.targets[-2] == sample.tokens[-1] != 0
    assert bad[0].line == 3
    assert "`prompt` has" in bad[0].reason
    assert "the 12 of task.max_tokens" in bad[0].reason
    whole = build(given[:1], causal(max_tokens=500, end=0), tokenizer)[0][0].length
    for most, truncated in ((whole, False), (whole - 1, True)):
        (sample,), _ = build(given[:1], causal(max_tokens=most, end=0), tokenizer)
        assert sample.truncated == truncated
    edge = len(tokenizer.encode("The cat").ids) + 1
    (sample,), _ = build(given[:1], causal(max_tokens=edge), tokenizer)
    assert (sample.targets != IGNORED).sum() == 1
    assert not build(given[:1], causal(max_tokens=edge - 1), tokenizer)[0]


def test_an_empty_prompt_or_completion_is_a_bad_row():
    given = rows({"prompt": "", "completion": "a"}, {"prompt": "a", "completion": " "})
    samples, bad = build(given, causal(), gpt2())
    assert not samples
    assert [row.reason for row in bad] == ["`prompt` is empty", "`completion` is empty"]


# --- images --------------------------------------------------------------------------------------


def image(**changes: object) -> TaskSpec:
    fields = {
        "kind": "image",
        "columns": {"pixels": "pixels", "label": "label"},
        "labels": ("a", "b"),
        "max_tokens": 1,
        "image": (3, 2, 4),
        "image_mean": (0.5, 0.25, 0.0),
        "image_std": (0.5, 0.25, 1.0),
        "image_tokens": 5,
    }
    return TaskSpec(**(fields | changes))


PIXELS = np.arange(24, dtype=np.uint8).reshape(3, 2, 4) * 10


@pytest.mark.parametrize(
    "pixels", [PIXELS, PIXELS.transpose(1, 2, 0), PIXELS.tolist(), PIXELS.astype(np.int64)]
)
def test_images_are_normalised_channels_first(pixels: object):
    (sample,), bad = build(rows({"pixels": pixels, "label": "b"}), image(), None)
    assert not bad
    assert sample.pixels.shape == (3, 2, 4)
    assert sample.pixels.dtype == np.float32
    assert sample.pixels.flags.c_contiguous
    mean, std = np.array([0.5, 0.25, 0.0]), np.array([0.5, 0.25, 1.0])
    expected = (PIXELS / 255 - mean[:, None, None]) / std[:, None, None]
    assert np.allclose(sample.pixels, expected, atol=1e-6)
    assert (sample.length, len(sample.tokens), sample.targets.tolist()) == (5, 0, [1])


@pytest.mark.parametrize(
    ("pixels", "match"),
    [
        (np.zeros((3, 4, 2), np.uint8), "shape (3, 4, 2); allowed: (2, 4, 3) or (3, 2, 4)"),
        (np.zeros((2, 4), np.uint8), "shape (2, 4); allowed: (2, 4, 3) or (3, 2, 4)"),
        (np.zeros((3, 2, 4), np.float32), "float32; allowed: uint8"),
        (np.full((3, 2, 4), 256), "256 .. 256; allowed: 0 .. 255"),
        ([[1, 2], [3]], "no array"),
        ("cat.png", "allowed: uint8"),
        (None, "allowed: uint8"),
    ],
)
def test_bad_images_are_reported(pixels: object, match: str):
    samples, bad = build(rows({"pixels": pixels, "label": "b"}), image(), None)
    assert not samples
    assert match in bad[0].reason


# --- announcement --------------------------------------------------------------------------------


def test_announcement_counts_and_hashes():
    given = rows({"text": "the cat", "label": 0}, {"text": "a mat", "label": 1})
    samples, _ = build(given, classification(), bert())
    said = announce(samples, skipped=3)
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(struct.pack("<q", sample.length))
        digest.update(struct.pack(f"<{sample.length}i", *sample.tokens))
        digest.update(struct.pack("<i", *sample.targets))
    assert said.digest == digest.hexdigest()
    assert (said.samples, said.skipped) == (2, 3)
    assert said.tokens == sum(sample.length for sample in samples)
    assert announce(iter(samples), 3) == said


def test_any_change_of_the_data_changes_the_digest():
    base = [{"text": "the cat", "label": 0}, {"text": "a mat", "label": 1}]
    others = [
        base[::-1],
        base[:1],
        [base[0], {"text": "a mat", "label": 0}],
        [base[0], {"text": "a cat", "label": 1}],
    ]
    digests = [
        announce(build(rows(*some), classification(), bert())[0], 0).digest
        for some in [base, *others]
    ]
    assert len(set(digests)) == len(digests)
    images = [
        announce(build(rows({"pixels": PIXELS + i, "label": 0}), image(), None)[0], 0).digest
        for i in range(2)
    ]
    assert images[0] != images[1]


def test_no_good_row_cannot_be_announced():
    with pytest.raises(DataError, match="got 4 bad rows"):
        announce([], 4)


# --- benchmark data ------------------------------------------------------------------------------


def test_gsm8k_fits_into_its_own_prompts():
    data = GPT2.parents[1] / "gsm8k" / "test.jsonl"
    if not data.is_file():
        pytest.skip("GSM8K is not here")
    tokenizer = real_gpt2()
    given = [json.loads(line) for line in data.read_text().splitlines()[:50]]
    task = causal(max_tokens=512, template="Question: {prompt}\nAnswer: ", end=50256)
    samples, bad = build(rows(*given), task, tokenizer)
    assert not bad
    assert len(samples) == 50
    for sample, item in zip(samples, given, strict=True):
        answer = sample.targets[sample.targets != IGNORED].tolist()
        assert answer[-1] == 50256
        assert tokenizer.decode(answer[:-1]) == item["completion"]
