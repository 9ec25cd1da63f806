"""`eval`, `generate`, `export`: what a run's adapter is good for."""

from __future__ import annotations

from pathlib import Path

from splitfrozen.data.tasks import encode_prompt
from splitfrozen.errors import DataError, RequestError
from splitfrozen.methods.parts import Adapted, Whole
from splitfrozen.model import adapters
from splitfrozen.records import Outcome, Prepared
from splitfrozen.runs import evaluation
from splitfrozen.runs.folder import RunFolder
from splitfrozen.runs.prepare import load_sliced, open_tokenizer, to_fastest
from splitfrozen.training.evaluate import Evaluator
from splitfrozen.training.evaluate import generate as continue_prompts
from splitfrozen.training.precision import resolve


def evaluate(run: Path, data: str | None, adapter: str) -> Outcome:
    """Measure an adapter on data. Raises RequestError, StoreError, ModelError."""
    folder, prepared = _open(run)
    config = folder.config
    source = data or config.task.eval
    if source is None:
        raise DataError(
            "there is nothing to evaluate on",
            got="no --data, and no task.eval in the run",
            allowed="a file with the task's columns",
            remedy="give --data FILE",
        )
    which = folder.adapter(adapter)
    sliced = load_sliced(config)
    device = to_fastest(sliced)
    samples = evaluation.open_samples(source, folder, prepared)
    adapted = Adapted(sliced, adapters.open_adapter(sliced.model, which), config.model.name)
    measure = Evaluator(
        Whole(adapted),
        samples,
        config.task.kind,
        micro_tokens=config.train.micro_tokens,
        dtype=resolve(config.model.precision, device),
        device=device,
    )
    found = evaluation.with_answers(
        measure, source, folder, prepared, adapted.model, sliced.longest
    )()
    count = len(samples.samples())
    text = "\n".join(f"{name:<12} {value:.4f}" for name, value in found.metrics.items())
    return Outcome(
        {"adapter": str(which), "data": source, "samples": count, **found.metrics},
        f"{text}\non {count} samples of {source}, adapter {which}",
    )


def generate(run: Path, prompt: str, max_new_tokens: int, adapter: str) -> Outcome:
    """Continue a prompt greedily. Raises RequestError, StoreError, ModelError."""
    folder, prepared = _open(run)
    if prepared.task.kind != "causal_lm":
        raise RequestError(
            "nothing can be generated",
            got=f"a run for {prepared.task.kind}",
            allowed="a run for causal_lm",
            remedy="use `splitfrozen eval` for other tasks",
        )
    if max_new_tokens < 1:
        raise RequestError(
            "`--max-new-tokens` is wrong",
            got=max_new_tokens,
            allowed="1 or more",
            remedy="leave it out for 256",
        )
    which = folder.adapter(adapter)
    tokenizer = open_tokenizer(folder, prepared)
    assert tokenizer is not None
    sliced = load_sliced(folder.config)
    to_fastest(sliced)
    peft_model = adapters.open_adapter(sliced.model, which)
    [reply] = continue_prompts(
        peft_model,
        [encode_prompt(prompt, prepared.task, tokenizer)],
        max_new_tokens=max_new_tokens,
        end=prepared.task.end,
        longest=sliced.longest,
        micro_tokens=1,
    )
    completion = tokenizer.decode(reply)
    return Outcome({"prompt": prompt, "completion": completion, "tokens": len(reply)}, completion)


def export(run: Path, out: Path, merge: bool, adapter: str) -> Outcome:
    """Write the adapter folder, or the whole model with it merged in; the tokenizer beside it.

    Raises RequestError where `out` is not empty, StoreError, ModelError.
    """
    folder, _ = _open(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(
            f"{out} is in the way",
            got="a file, or a folder with something in it",
            allowed="a new or empty folder",
            remedy="choose another",
        )
    which = folder.adapter(adapter)
    sliced = load_sliced(folder.config)
    peft_model = adapters.open_adapter(sliced.model, which)
    if merge:
        adapters.merge(peft_model).save_pretrained(out)
    else:
        adapters.save(peft_model, out, folder.config.model.name)
    if (folder.root / "tokenizer").is_dir():
        for file in sorted((folder.root / "tokenizer").iterdir()):
            (out / file.name).write_bytes(file.read_bytes())
    what = "model with the adapter merged in" if merge else "PEFT adapter"
    return Outcome({"folder": str(out), "merged": merge, "adapter": str(which)}, f"{what}: {out}")


def _open(run: Path) -> tuple[RunFolder, Prepared]:
    folder = RunFolder(run)
    prepared = folder.prepared()
    if prepared is None:
        raise RequestError(
            f"{run} was never prepared",
            got="no fronts in it",
            allowed="a run that was served",
            remedy=f"run: splitfrozen serve {run}",
        )
    return folder, prepared
