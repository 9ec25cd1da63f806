"""What a reader needs to judge a measurement by; every result file holds it."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import splitfrozen

PACKAGES = ("torch", "transformers", "peft", "onnxruntime", "numpy", "splitfrozen")


def environment() -> dict[str, object]:
    """Machine, interpreter, packages, and the commit where this is a checkout of git."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": _commit(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"


@cache
def code() -> str:
    """Hash over what decides a training: its sources, without comments and docstrings."""
    root, digest = Path(splitfrozen.__file__).parent, hashlib.sha256()
    packages = ("data", "device", "methods", "model", "training", "wire")
    for path in sorted(path for name in packages for path in (root / name).rglob("*.py")):
        digest.update(_meaning(path.read_text()).encode())
    return digest.hexdigest()[:12]


def _meaning(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A string that stands alone does nothing: docstrings of modules, names and functions.
            body[:] = [one for one in body if not _is_text(one)]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
