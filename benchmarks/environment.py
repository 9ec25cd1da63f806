"""Where measurements are written, with what a reader needs to judge them by."""

from __future__ import annotations

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
