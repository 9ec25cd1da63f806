"""Pretrain a small Llama on the training text of GSM8K, as the model of experiments/table3.toml.

    python scripts/pretrain_gsm8k.py --data ../shared/data/gsm8k/train.jsonl

takes a quarter of an hour on one core that multiplies bfloat16.

Trains a byte-level BPE of 4,096 tokens on the questions and solutions, then a Llama of 8 blocks
from random weights to predict the next token of both. It sees the text in the run's template, a few
times over; the test questions are in none of it. It learns how such texts go and hardly any
arithmetic: it stands in for a Llama that can be had from a hub only. Writes a model folder with a
README that holds what was measured on the last rows, which it is not trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from splitfrozen import rng

ROOT = Path(__file__).resolve().parents[1]
PAD, EOS = "<pad>", "<eos>"
POSITIONS = 512
ROW = 256
"""Tokens of a training row: most questions with their solutions are shorter."""
HELD_OUT = 200
IGNORED = -100
TEMPLATE = "Question: {prompt}\nAnswer: {completion}"
"""With experiments/table3.toml's template before the completion."""

README = """\
# A small Llama for GSM8K

{blocks} blocks, width {width}, {parameters:,} parameters, a byte-level BPE of {vocabulary} tokens;
pretrained from random weights on the questions and solutions of GSM8K's training split by

    python scripts/pretrain_gsm8k.py --seed {seed} --steps {steps}

in {minutes:.0f} minutes on one core, over {seen:,} tokens. On the {held} last rows of that file,
which it was not trained on: {loss:.3f} nats a token, perplexity {perplexity:.1f}.
"""


def texts(path: Path) -> list[str]:
    """Questions with their solutions, in the order of the file."""
    with path.open() as file:
        return [TEMPLATE.format(**json.loads(line)) for line in file]


def train_tokenizer(source: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one: a number is read as it is calculated with.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(source, trainer)
    return tokenizer


def build(tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=224,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=7,
        num_key_value_heads=7,
        max_position_embeddings=POSITIONS,
        initializer_range=0.06,  # about 1 / sqrt(width); the usual 0.02 learns far later
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(EOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    with torch.random.fork_rng():
        torch.manual_seed(rng.derive(seed, "weights"))
        return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def batches(
    spelt: Sequence[Sequence[int]], size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs and targets [size, ROW] without end: one text after the other, in an order that
    is new each time round, cut into rows."""

    def tokens() -> Iterator[int]:
        epoch = 0
        while True:
            for i in rng.stream(seed, "order", epoch).permutation(len(spelt)):
                yield from spelt[i]
            epoch += 1

    source = tokens()
    while True:
        rows = np.array(list(islice(source, size * ROW))).reshape(size, ROW)
        inputs = torch.from_numpy(rows)
        targets = torch.full_like(inputs, IGNORED)
        targets[:, :-1] = inputs[:, 1:]
        yield inputs, targets


def loss_of(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(inputs)
    logits = model(inputs, attention_mask=mask, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def pretrain(
    model: LlamaForCausalLM, source: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int
) -> int:
    """Train for `steps` steps; return the tokens seen."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
    )
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1.05 - step / steps, 1.0)
    )
    model.train()
    began, seen = time.monotonic(), 0
    for step, (inputs, targets) in enumerate(islice(source, steps), 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, inputs, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += inputs.numel()
        if step % 20 == 0 or step == steps:
            rate = seen / (time.monotonic() - began)
            print(f"step {step:5d}  loss {loss.item():.4f}  {rate:.0f} tokens/s", flush=True)
    return seen


@torch.no_grad()
def validate(model: LlamaForCausalLM, spelt: Sequence[Sequence[int]]) -> float:
    """Loss in nats a token, over all tokens of the texts but their first."""
    model.eval()
    total, count = 0.0, 0
    for ids in spelt:
        inputs = torch.tensor([ids[:POSITIONS]])
        targets = torch.full_like(inputs, IGNORED)
        targets[:, :-1] = inputs[:, 1:]
        total += loss_of(model, inputs, targets).item() * (inputs.shape[1] - 1)
        count += inputs.shape[1] - 1
    return total / count


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that `from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": POSITIONS,
        "pad_token": PAD,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="GSM8K's train.jsonl, with `prompt` and `completion`",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gsm8k-llama")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = texts(options.data)
    tokenizer = train_tokenizer(source[:-HELD_OUT])
    spelt = [one.ids for one in tokenizer.encode_batch([text + EOS for text in source])]
    model = build(tokenizer, options.seed)
    print(f"{model.num_parameters():,} parameters, {sum(map(len, spelt)):,} tokens of text")
    rows = batches(spelt[:-HELD_OUT], 16, options.seed)
    began = time.monotonic()
    seen = pretrain(model, rows, options.steps)
    minutes = (time.monotonic() - began) / 60
    loss = validate(model, spelt[-HELD_OUT:])
    save(model, tokenizer, options.out)
    readme = README.format(
        blocks=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        parameters=model.num_parameters(),
        vocabulary=model.config.vocab_size,
        seed=options.seed,
        minutes=minutes,
        steps=options.steps,
        seen=seen,
        held=HELD_OUT,
        loss=loss,
        perplexity=math.exp(loss),
    )
    (options.out / "README.md").write_text(readme)
    print(f"{readme}\nwrote {options.out}")


if __name__ == "__main__":
    main()
