"""FedsLLM beside centralised LoRA on a small GPT-2, in the same order (its Table IV).

    python benchmarks/perplexity.py --json

As in the paper a pretrained GPT-2 is adapted to putting data into words, until it has converged.
Here it is the packaged one, which first learns to do so in four forms of its own little language,
all weights trained; then LoRA teaches it two new ones. Which of the two comes nobody can foresee,
so no perplexity can be below `floor`: about the paper's, of which 0.001 is a part in fifty of the
loss. On text that is hard to foresee the same part of the loss is more: docs/log.md.

Every batch holds eight samples of each of four clients; centralised training takes the very same
batches. What differs is that a client's adapters see its own gradient alone, have moments of their
own, and are averaged after LOCAL_STEPS steps. All codecs are exact and nothing is dropped. The
result goes to benchmarks/results/perplexity.json; takes twenty minutes of a core.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import resources
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from environment import write
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from trained import tell, trained
from transformers import GPT2LMHeadModel

from splitfrozen import config
from splitfrozen.rng import stream
from splitfrozen.training.orders import DeviceOrder

CLIENTS, BATCH = 4, 8
RANKS = (1, 2, 4, 6, 8)
LOCAL_STEPS = 12
"""I, as in experiments/fedsllm.toml."""
PAPER = 0.001
"""The largest difference in the paper's Table IV."""

ROWS, HELD = 24_576, 500
PRETRAINING_STEPS, PRETRAINING_LR = 1200, 2e-3

PEOPLE = ("Ada", "Bea", "Clara", "Dora", "Abel", "Boris", "Carl", "David")
PARTS = ("tank", "pipe", "kettle", "barrel", "bucket", "jug", "hose", "bottle", "tray", "drum")
TOOLS = ("mill", "pump", "oven", "press", "loom", "forge", "saw", "crane")
STATES = ("cracked", "bent", "torn", "broken", "dry", "empty", "bare", "dusty", "muddy", "sooty")
KNOWN = (
    " {p} found the {n} of the {m} {s}, and {q} did not.",
    " The {m} stood still, and {p} said to {q} that the {n} was {s}.",
    " {q} doubted that the {n} of the {m} was {s}, but {p} was right.",
    " The {n} was {s}, and {p} and {q} looked at the {m}.",
)
NEW = (
    " {q} and {p} came from the {m}; the {n} had become {s}.",
    " {p} called the {n} of the {m} {s}, and {q} was not wrong to doubt it.",
)
EOS = 1
IGNORED = -100

CONFIG = """\
[model]
name = {model}
cut = 2
precision = "float32"

[task]
kind = "causal_lm"
template = "{{prompt}}"
max_tokens = 64
eval = {held}

[data]
train = {train}

[devices]
count = {clients}

[lora]
rank = {rank}

[train]
epochs = 1
batch_size = {batch}
lr = 3e-3
micro_tokens = 4096

[method]
name = "{method}"
{local_steps}
"""


# --- data, and a model that knows how to put such into words -------------------------------------


def rows(purpose: str, forms: Sequence[str]) -> Iterator[dict[str, str]]:
    """Without an end: five facts, and a sentence that tells them in one of the forms."""
    draw = stream(0, "facts", purpose)
    while True:
        p, q = (PEOPLE[i] for i in draw.permutation(len(PEOPLE))[:2])
        n, m, s = (of[int(draw.integers(len(of)))] for of in (PARTS, TOOLS, STATES))
        form = forms[int(draw.integers(len(forms)))]
        told = form.format(p=p, q=q, n=n, m=m, s=s)
        yield {"prompt": f"{p}, {q}; {m}, {n}; {s}.", "completion": told}


def pretrained(folder: Path) -> None:
    """Write the packaged model, once it can tell facts in the forms of KNOWN."""
    packaged = Path(str(resources.files("splitfrozen") / "assets" / "demo"))
    tokenizer = Tokenizer.from_file(str(packaged / "tokenizer.json"))
    model = GPT2LMHeadModel.from_pretrained(packaged, dtype=torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), PRETRAINING_LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, PRETRAINING_STEPS)
    source = rows("pretraining", KNOWN)
    for step in range(PRETRAINING_STEPS):
        batch = [next(source) for _ in range(CLIENTS * BATCH)]
        facts = [tokenizer.encode(row["prompt"]).ids for row in batch]
        told = [[*tokenizer.encode(row["completion"]).ids, EOS] for row in batch]
        longest = max(len(a) + len(b) for a, b in zip(facts, told, strict=True))
        ids = torch.full((len(batch), longest), EOS)
        targets = torch.full((len(batch), longest), IGNORED)
        for i, (a, b) in enumerate(zip(facts, told, strict=True)):
            ids[i, : len(a) + len(b)] = torch.tensor(a + b)
            targets[i, len(a) - 1 : len(a) + len(b) - 1] = torch.tensor(b)
        # What is padded comes last, and nothing looks ahead.
        loss = cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            tell(f"pretraining, step {step}: loss {loss.item():.4f}")
    tell(f"pretrained: loss {loss.item():.4f}")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(packaged / name, folder / name)


# --- the comparison ------------------------------------------------------------------------------


def perplexity(folder: Path, method: str, rank: int) -> float:
    """Of the held-out rows, after training."""
    central = method == "centralized"
    text = CONFIG.format(
        model=json.dumps(str(folder / "model")),
        held=json.dumps(str(folder / "held.jsonl")),
        train=json.dumps(str(folder / "train.jsonl")),
        clients=CLIENTS,
        rank=rank,
        # As many steps, which the schedule of the learning rate counts.
        batch=CLIENTS * BATCH if central else BATCH,
        method=method,
        local_steps="" if central else f"local_steps = {LOCAL_STEPS}",
    )
    wanted = config.complete(tomllib.loads(text), Path("run.toml"))
    order = partial(DeviceOrder, seed=wanted.run.seed, batch_size=BATCH)
    return trained(wanted, order=order)["perplexity"]


def floor(folder: Path) -> float:
    """Perplexity of whoever knows all but which form comes."""
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    held = (json.loads(line) for line in (folder / "held.jsonl").open())
    lengths = [len(tokenizer.encode(row["completion"]).ids) + 1 for row in held]
    return math.exp(math.log(len(NEW)) / fmean(lengths))


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pretrained(folder / "model")
        for name, count in (("train", ROWS), ("held", HELD)):
            drawn = islice(rows(name, NEW), count)
            lines = (json.dumps(row) + "\n" for row in drawn)
            (folder / f"{name}.jsonl").write_text("".join(lines))
        found = []
        for rank in RANKS:
            central, own = (perplexity(folder, name, rank) for name in ("centralized", "fedsllm"))
            found.append(
                {"rank": rank, "centralized": central, "fedsllm": own, "difference": own - central}
            )
            tell(found[-1])
        result = {
            "rows": found,
            "worst": max(abs(row["difference"]) for row in found),
            "floor": floor(folder),
            "paper": PAPER,
            "local_steps": LOCAL_STEPS,
            "config": CONFIG,
            "rows_trained": ROWS,
        }
    write("perplexity", result)
    if arguments.json:
        print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
