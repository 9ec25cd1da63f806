"""The base install alone is a device: its size, and a run with a device that has nothing else.

    python benchmarks/base_install.py

Makes a new virtual environment, installs the package without extras, measures site-packages without
pip and setuptools, and joins the demo's task from there while this interpreter serves it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from splitfrozen.runs.demo import write_files
from splitfrozen.runs.local import run_locally

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 250
FORBIDDEN = ("torch", "transformers", "peft", "starlette", "cryptography", "onnx")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        python = install(folder / "venv")
        megabytes = size_mb(folder / "venv")
        print(f"site-packages: {megabytes:.0f} MB (allowed: {LIMIT_MB})")
        code = (
            f"import splitfrozen.device, sys; print([m for m in {FORBIDDEN} if m in sys.modules])"
        )
        loaded = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
        print(f"of torch and its like, importing a device loads: {loaded.stdout.strip()}")
        run_toml = write_files(folder / "run", 0, depths=(1, 3), train_rows=200, eval_rows=50)
        data = sorted((folder / "run" / "data").glob("device-*.csv"))
        summary = run_locally(run_toml, data, folder / "run", device_python=python)
        stored = [(device["id"], device["samples"]) for device in summary["devices"]]
        print(json.dumps({"megabytes": megabytes, "state": summary["state"], "stored": stored}))
        if megabytes > LIMIT_MB or loaded.stdout.strip() != "[]" or summary["state"] != "done":
            sys.exit(1)


def install(folder: Path) -> str:
    """Install the package without extras into a new environment; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", str(ROOT)]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt")], check=True)
    return python


def size_mb(environment: Path) -> float:
    """Bytes on disk of what was installed, without what every environment begins with."""
    [packages] = environment.glob("lib/python3*/site-packages")
    mine = [
        path
        for path in packages.rglob("*")
        if path.is_file()
        and not path.relative_to(packages)
        .parts[0]
        .startswith(("pip", "setuptools", "pkg_resources"))
    ]
    return sum(path.stat().st_size for path in mine) / 1e6


if __name__ == "__main__":
    main()
