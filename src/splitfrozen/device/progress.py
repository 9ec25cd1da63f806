"""How far the upload is: a bar on a terminal, a line in the log now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import IO

from tqdm import tqdm

_log = logging.getLogger(__name__)

LINE_S = 30.0


class Progress:
    """Counts what is stored and shows it: samples, rate, bytes, time left."""

    def __init__(
        self,
        total: int,
        *,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: `total` samples in all; `stream` is stderr by default."""
        self._total = total
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._bar: tqdm | None = None

    def begin(self, done: int) -> None:
        """Start counting, once; `done` samples were stored before."""
        self._before = self._done = done
        self._bytes = 0
        self._began = self._shown = self._clock()
        if self._stream.isatty():
            self._bar = tqdm(
                total=self._total,
                initial=done,
                unit="samples",
                file=self._stream,
                dynamic_ncols=True,
            )

    def add(self, samples: int, size: int) -> None:
        """Count a chunk that is stored: its samples and its bytes."""
        self._done += samples
        self._bytes += size
        now = self._clock()
        rate = self._bytes / max(now - self._began, 1e-9) / 1e6
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:.2f} MB/s", refresh=False)
            self._bar.update(samples)
        elif now - self._shown >= LINE_S or self._done == self._total:
            self._shown = now
            speed = (self._done - self._before) / max(now - self._began, 1e-9)
            left = (self._total - self._done) / max(speed, 1e-9)
            _log.info(
                "%d of %d samples stored, %.1f samples/s, %.2f MB/s, %.0f s left",
                self._done,
                self._total,
                speed,
                rate,
                left,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
