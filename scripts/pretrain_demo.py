"""Pretrain the small GPT-2 that the package carries for `splitfrozen demo`.

    python scripts/pretrain_demo.py    # seven minutes on one core that multiplies bfloat16

Trains a byte-level BPE on stories of `splitfrozen.data.village`, then a GPT-2 from random weights
to predict the next token of fresh stories, each seen once. Writes the model folder with float16
weights and a README that holds what was measured: validation loss, the loss of the unigram
distribution, and the entropy of the grammar's own choices, which no model can beat on average.
The same seed on the same kind of processor gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from splitfrozen import rng
from splitfrozen.data import village

ROOT = Path(__file__).resolve().parents[1]
PAD, EOS = "<pad>", "<eos>"
POSITIONS = 128
IGNORED = -100

README = """\
# The demo's model

A GPT-2 of {blocks} blocks, width {width} and {parameters:,} parameters, pretrained from random
weights to predict the next token of stories that `splitfrozen.data.village` generates. It knows
that small artificial language and nothing else. Made by

    python scripts/pretrain_demo.py --seed {seed} --steps {steps}

on one core in {minutes:.0f} minutes, from {seen:,} tokens of stories, each story seen once. The
names of the task's labels occur in no story, and no report of the task is the beginning of one.

| on {tokens:,} tokens of fresh stories | nats a token | perplexity |
|---|---|---|
| this model, with its weights as stored (float16) | {loss:.4f} | {loss_perplexity:.2f} |
| the entropy of the grammar's own choices | {ideal:.4f} | {ideal_perplexity:.2f} |
| the distribution of single tokens (unigrams) | {unigram:.4f} | {unigram_perplexity:.2f} |

`tokenizer.json` is a byte-level BPE of {vocabulary} tokens, `{pad}` and `{eos}` among them; it
reads any text. Weights, tokenizer and stories are this project's own work, under its licence.
"""


class Meter(np.random.Generator):
    """Adds up the entropy of the choices that are drawn from it."""

    nats = 0.0

    def integers(self, low: int) -> int:  # type: ignore[override]
        self.nats += math.log(low)
        return int(super().integers(low))


def train_tokenizer(stories: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


def rows(tokenizer: Tokenizer, stories: Iterator[str]) -> Iterator[list[int]]:
    """Yield rows of at most POSITIONS tokens: whole stories, each ended by EOS."""
    row: list[int] = []
    for text in stories:
        ids = tokenizer.encode(text + EOS).ids
        if len(row) + len(ids) > POSITIONS:
            yield row
            row = []
        row += ids
    yield row


def pairs(tokenizer: Tokenizer, stories: list[str]) -> Iterator[list[int]]:
    """Yield rows of two stories, each story second in one row."""
    spelt = [tokenizer.encode(text + EOS).ids for text in stories]
    for i, ids in enumerate(spelt):
        yield spelt[i - 1] + ids


def batches(source: Iterator[list[int]], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs and targets [size, POSITIONS]; the filling behind a row carries no loss."""
    while batch := list(islice(source, size)):
        inputs = torch.zeros(len(batch), POSITIONS, dtype=torch.long)
        targets = torch.full_like(inputs, IGNORED)
        for i, row in enumerate(batch):
            inputs[i, : len(row)] = torch.tensor(row)
            targets[i, : len(row) - 1] = inputs[i, 1 : len(row)]
        yield inputs, targets


def build(tokenizer: Tokenizer, seed: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=POSITIONS,
        n_embd=160,
        n_layer=6,
        n_head=5,
        initializer_range=0.06,  # about 1 / sqrt(width); with 0.02 it learns to copy far later
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.token_to_id(EOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    with torch.random.fork_rng():
        torch.manual_seed(rng.derive(seed, "weights"))
        return GPT2LMHeadModel._from_config(config, attn_implementation="eager")


def loss_of(model: GPT2LMHeadModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def pretrain(model: GPT2LMHeadModel, source: Iterator[list[int]], steps: int) -> int:
    """Train for `steps` steps of 16 rows; return the tokens seen."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=4e-3,
        betas=(0.9, 0.95),
    )
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps)),
    )
    seen, start = 0, time.monotonic()
    model.train()
    for step, (inputs, targets) in enumerate(islice(batches(source, 16), steps), start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += int((targets != IGNORED).sum())
        if step % 50 == 0 or step == steps:
            rate = seen / (time.monotonic() - start)
            print(f"step {step:5d}  loss {loss.item():.4f}  {rate:.0f} tokens/s", flush=True)
    return seen


@torch.no_grad()
def validate(model: GPT2LMHeadModel, source: Iterator[list[int]]) -> tuple[float, float, int]:
    """Return the model's and the unigram distribution's loss in nats a token, and the tokens.

    Only the second story of each row counts: all of its tokens are predicted, the first included,
    so that the loss may be compared with the entropy of a story.
    """
    model.eval()
    total, counts = 0.0, torch.zeros(model.config.vocab_size)
    for inputs, targets in batches(source, 32):
        targets[(inputs == model.config.eos_token_id).cumsum(1) == 0] = IGNORED
        kept = targets[targets != IGNORED]
        counts += torch.bincount(kept, minlength=len(counts))
        total += loss_of(model, inputs, targets).item() * len(kept)
    shares = counts / counts.sum()
    tokens = int(counts.sum())
    return total / tokens, -torch.xlogy(shares, shares).sum().item(), tokens


def entropy(seed: int, count: int) -> float:
    """Return the mean entropy of the choices behind a story, in nats.

    That a story is thrown away where its report is reserved takes log(8/7) off it.
    """
    meter = Meter(np.random.Philox(rng.derive(seed, "entropy")))
    kept: list[float] = []
    while len(kept) < count:
        meter.nats = 0.0
        if village.story(meter) is not None:
            kept.append(meter.nats)
    return sum(kept) / count - math.log(8 / 7)


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that `from_pretrained` reads; leaves the model with the stored weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # float16 is only how the weights are stored: who loads them computes in float32.
    config = GPT2Config.from_dict(model.config.to_dict() | {"dtype": "float32"})
    config.architectures = ["GPT2LMHeadModel"]
    config.activation_function = "gelu_new"  # the same function, by the name that GPT-2 has for it
    config.save_pretrained(folder)
    model.half()
    tensors = dict(model.named_parameters())  # the tied head is not repeated
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": POSITIONS,
        "pad_token": PAD,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def measure(model: GPT2LMHeadModel, tokenizer: Tokenizer, seed: int) -> dict[str, float | int]:
    """Compare the model with the unigram distribution and the grammar on stories never seen."""
    stories = list(village.sentences(rng.derive(seed, "validation"), 2000))
    length = sum(len(tokenizer.encode(text).ids) + 1 for text in stories) / len(stories)
    loss, unigram, tokens = validate(model, pairs(tokenizer, stories))
    ideal = entropy(seed, 20_000) / length
    return {
        "loss": loss,
        "loss_perplexity": math.exp(loss),
        "ideal": ideal,
        "ideal_perplexity": math.exp(ideal),
        "unigram": unigram,
        "unigram_perplexity": math.exp(unigram),
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=ROOT / "src/splitfrozen/assets/demo")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(village.sentences(options.seed, 20_000))
    model = build(tokenizer, options.seed)
    start = time.monotonic()
    source = rows(tokenizer, village.sentences(options.seed, 10**9))
    seen = pretrain(model, source, options.steps)
    minutes = (time.monotonic() - start) / 60
    save(model, tokenizer, options.out)
    measured = measure(model.float(), tokenizer, options.seed)
    readme = README.format(
        **measured,
        blocks=model.config.n_layer,
        width=model.config.n_embd,
        parameters=model.num_parameters(),
        vocabulary=model.config.vocab_size,
        pad=PAD,
        eos=EOS,
        seed=options.seed,
        steps=options.steps,
        minutes=minutes,
        seen=seen,
    )
    (options.out / "README.md").write_text(readme)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
