"""`splitfrozen doctor`: what this machine can be, and the command that mends what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path

from splitfrozen import __version__
from splitfrozen.records import Outcome

LEAST_FREE_BYTES = 1 << 30
DEVICE_INSTALL = "pip install splitfrozen, or in a clone: pip install ."
SERVER_INSTALL = "pip install 'splitfrozen[server]', or in a clone: pip install '.[server]'"


@dataclass(frozen=True, slots=True)
class Finding:
    """`remedy` is empty where all is well."""

    about: str
    found: str
    remedy: str = ""
    needed_for: str = "device"


def doctor() -> Outcome:
    """Check the installation; exit code 1 where not even a device can run here."""
    findings = [_python(), *_packages(), _sqlite(), _disk(), _accelerator()]
    fatal = any(f.remedy and f.needed_for == "device" for f in findings)
    data: dict[str, object] = {
        "version": __version__,
        "device": not fatal,
        "server": not any(f.remedy for f in findings),
        "findings": [
            {"about": f.about, "found": f.found, "remedy": f.remedy or None} for f in findings
        ],
    }
    text = f"{_text(findings)}\n{_verdict(findings, 'device')}; {_verdict(findings, 'server')}"
    return Outcome(data, text, exit_code=int(fatal))


def _verdict(findings: list[Finding], side: str) -> str:
    """Whether this machine can be a device or a server; a server needs what a device needs too."""
    remedies = dict.fromkeys(
        f.remedy for f in findings if f.remedy and (f.needed_for == "device" or side == "server")
    )
    return f"{side}: not ready ({'; '.join(remedies)})" if remedies else f"{side}: ready"


def _text(findings: list[Finding]) -> str:
    width = max(len(f.about) for f in findings)
    lines = [
        f"{'!!' if f.remedy else 'ok'}  {f.about:<{width}}  {f.found}"
        + (f"  -> for a {f.needed_for}: {f.remedy}" if f.remedy else "")
        for f in findings
    ]
    return "\n".join(lines)


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding(
        "python", found, "" if sys.version_info >= (3, 11) else "use Python 3.11 or newer"
    )


def _packages() -> list[Finding]:
    """What our own metadata asks for: the base install and the extra `server`."""
    findings = []
    for requirement in importlib.metadata.requires("splitfrozen") or []:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        extra = re.search(r"""extra == ['"](\w+)['"]""", requirement)
        if name is None or (extra and extra[1] != "server"):
            continue
        needed_for = "server" if extra else "device"
        try:
            found, remedy = importlib.metadata.version(name[0]), ""
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
            remedy = SERVER_INSTALL if extra else DEVICE_INSTALL
        findings.append(Finding(name[0], found, remedy, needed_for))
    return findings


def _sqlite() -> Finding:
    good = sqlite3.sqlite_version_info >= (3, 37)
    remedy = "" if good else "use a Python built with SQLite 3.37 or newer"
    return Finding("sqlite", sqlite3.sqlite_version, remedy, "server")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "" if free >= LEAST_FREE_BYTES else "free 1 GiB, or work in another folder"
    return Finding("disk", f"{free / 1e9:.1f} GB free here", remedy, "server")


def _accelerator() -> Finding:
    """Asks the driver, not torch: importing it takes seconds, and it may not be there."""
    tool = shutil.which("nvidia-smi")
    return Finding("accelerator", "NVIDIA GPU" if tool else f"none; {os.cpu_count()} CPU cores")
