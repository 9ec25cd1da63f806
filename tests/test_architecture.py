"""Imports point one way, and a device loads without a training framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import splitfrozen

ROOT = Path(splitfrozen.__file__).parent

# A module may import modules of a lower rank, and of its own package.
RANKS = {
    "errors": 0,
    "rng": 1,
    "logs": 1,
    "disk": 1,
    "threads": 1,
    "records": 1,
    "wire": 2,
    "config": 3,
    "data": 4,
    "model": 4,
    "device": 5,
    "training": 5,
    "planning": 5,
    "simulation": 5,
    "server": 6,
    "methods": 6,
    "runs": 7,
    "doctor": 7,
    "studies": 8,
    "cli": 9,
    "__main__": 10,
}
LIGHT = ["splitfrozen.device", "splitfrozen.cli", "splitfrozen.simulation.timeline"]
HEAVY = [
    "torch",
    "transformers",
    "peft",
    "starlette",
    "uvicorn",
    "cryptography",
    "onnx",
    "datasets",
]


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def package(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(tree: ast.AST) -> set[str]:
    """Names of our own packages that a module imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "splitfrozen":
            names = [f"splitfrozen.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("splitfrozen.")}
    return found & RANKS.keys()


def test_every_module_has_a_rank() -> None:
    assert len(modules()) > 20
    assert {package(path) for path in modules()} - RANKS.keys() == set()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    mine = package(path)
    for other in imports(ast.parse(path.read_text())):
        assert other == mine or RANKS[other] < RANKS[mine], f"{mine} imports {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_and_no_relative_imports(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {"pickle", "dill", "marshal", "shelve"} & {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert ast.unparse(node.func) not in ("torch.load", "torch.save", "numpy.load") or any(
                keyword.arg == "allow_pickle" and ast.unparse(keyword.value) == "False"
                for keyword in node.keywords
            )


@pytest.mark.parametrize("module", LIGHT)
def test_a_device_loads_without_the_server(module: str) -> None:
    code = f"import {module}, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
