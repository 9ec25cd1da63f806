"""What is logged, and where: our own messages, and warnings of libraries."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def start(level: int = logging.INFO) -> None:
    """Log to stderr: splitfrozen from `level` on, everything else from WARNING on."""
    logging.basicConfig(stream=sys.stderr, format=FORMAT, level=logging.WARNING)
    logging.getLogger("splitfrozen").setLevel(level)


def also_to(path: Path) -> None:
    """Append to a file too."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger().addHandler(handler)
