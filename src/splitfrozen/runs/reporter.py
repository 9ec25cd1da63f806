"""What a training says while it runs: events in metrics.jsonl, and a bar where somebody looks."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from splitfrozen.runs.folder import RunFolder

log = logging.getLogger("splitfrozen.training")


class Reporter:
    """Takes the events of `training.loop.Hooks.report`."""

    def __init__(self, run: RunFolder, steps: int) -> None:
        """`steps`: of the whole training."""
        self._run = run
        self._epochs = run.config.train.epochs
        self._bar = tqdm(
            total=steps, desc="training", unit="step", disable=not sys.stderr.isatty(), leave=False
        )

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._run.report({**event, "time": time.time()})
        if event["event"] == "step":
            self._bar.set_postfix(loss=f"{event['loss']:.3f}", refresh=False)
            self._bar.update(int(event["step"]) - self._bar.n)
        else:
            if event["event"] == "resumed":
                # Steps of before count for how far it is, not for the rate.
                self._bar.initial = self._bar.n = self._bar.last_print_n = int(event["step"])
            epoch = f"epoch {event['epoch'] + 1} of {self._epochs}, " if "epoch" in event else ""
            with self._bar.external_write_mode(file=sys.stderr):
                text = f"{epoch}step {event['step']}: {event['event']} {shown(event)}"
                log.info("%s", text.rstrip())


def shown(values: Mapping[str, Any]) -> str:
    """Measurements for people."""
    return ", ".join(
        f"{name} {value:.4g}"
        for name, value in values.items()
        if isinstance(value, int | float) and name not in ("step", "epoch", "score", "best")
    )
