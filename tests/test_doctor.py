"""`splitfrozen doctor`: what is there, what is missing, and the command that mends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from splitfrozen import __version__
from splitfrozen.doctor import doctor


def test_this_installation_is_well() -> None:
    told = doctor()
    assert told.exit_code == 0
    assert (told.data["version"], told.data["device"]) == (__version__, True)
    findings: Any = told.data["findings"]
    about = {finding["about"] for finding in findings}
    assert {"python", "onnxruntime", "tokenizers", "torch", "peft", "sqlite", "disk"} <= about
    assert not {"mypy", "pytest", "splitfrozen"} & about
    *lines, last = told.text.splitlines()
    assert len(lines) == len(findings)
    assert all(line.startswith(("ok  ", "!!  ")) for line in lines)
    assert last == "device: ready; server: ready"


def examine(folder: Path, requirement: str) -> tuple[int, dict[str, Any], str]:
    """Run `doctor` where splitfrozen says that it requires something else."""
    metadata = folder / "splitfrozen-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    lines = ("Metadata-Version: 2.1", "Name: splitfrozen", "Version: 9.9", "Provides-Extra: server")
    metadata.write_text("\n".join([*lines, f"Requires-Dist: {requirement}", "", ""]))
    command = [sys.executable, "-m", "splitfrozen", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    plain, asked = (
        subprocess.run(
            [*command, *extra], env=environment, capture_output=True, text=True, check=False
        )
        for extra in ([], ["--json"])
    )
    assert plain.returncode == asked.returncode
    return asked.returncode, json.loads(asked.stdout), plain.stdout


def test_what_a_device_lacks_is_fatal(tmp_path: Path) -> None:
    code, data, text = examine(tmp_path, "no-such-package-at-all>=1")
    assert code == 1
    assert (data["device"], data["server"]) == (False, False)
    [finding] = [one for one in data["findings"] if one["about"] == "no-such-package-at-all"]
    remedy = "pip install splitfrozen, or in a clone: pip install ."
    assert (finding["found"], finding["remedy"]) == ("missing", remedy)
    assert f"!!  no-such-package-at-all  missing  -> for a device: {remedy}" in text
    assert text.endswith(f"\ndevice: not ready ({remedy}); server: not ready ({remedy})\n")


def test_what_only_a_server_needs_is_not(tmp_path: Path) -> None:
    code, data, text = examine(tmp_path, "no-such-package-at-all>=1; extra == 'server'")
    assert code == 0
    assert (data["device"], data["server"]) == (True, False)
    remedy = "pip install 'splitfrozen[server]', or in a clone: pip install '.[server]'"
    assert f"-> for a server: {remedy}" in text
    assert text.endswith(f"\ndevice: ready; server: not ready ({remedy})\n")


def test_other_extras_are_nobodys_need(tmp_path: Path) -> None:
    code, data, _ = examine(tmp_path, "no-such-package-at-all; extra == 'dev'")
    assert (code, data["device"]) == (0, True)
    assert not any(one["about"] == "no-such-package-at-all" for one in data["findings"])
