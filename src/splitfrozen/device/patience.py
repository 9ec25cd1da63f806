"""Trying again: exponential back-off with full jitter, until patience ends.

Full jitter (M. Brooker, 'Exponential Backoff And Jitter', AWS Architecture Blog, 2015) spreads the
devices of a run over time when a server comes back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from splitfrozen.errors import UnreachableError

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 20.0
"""With a connect timeout of 10 s, a device is at work again half a minute after its server is."""

REMIND_S = 60.0
"""The same trouble is logged so often."""

LONGEST_ASKED_S = 60.0
"""A Retry-After beyond this is cut, so that nobody can put a device to sleep for good."""


class Again(Exception):  # noqa: N818 -- not an error: a reason to wait
    """One attempt failed for a reason that may pass.

    Args:
        reason: for people.
        wait_s: what the other side asked for, in seconds; None where it did not.
        moved: the attempt got further than the one before, so patience starts anew.
    """

    def __init__(self, reason: str, wait_s: float | None = None, moved: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_s = wait_s
        self.moved = moved


class Patience:
    """How long and how often to try."""

    def __init__(
        self,
        limit_s: float = 3600.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        uniform: Callable[[float, float], float] | None = None,
    ) -> None:
        """Args: `limit_s` ends an operation that made no progress for so long; `sleep` may raise
        to end the waiting; `uniform(low, high)` draws the jitter."""
        self._limit_s = limit_s
        self._clock = clock
        self._sleep = sleep
        self._uniform = uniform or np.random.default_rng().uniform

    def persist(self, what: str, attempt: Callable[[], _T]) -> _T:
        """Return what `attempt` returns, calling it again as long as it raises `Again`.

        Raises UnreachableError, naming `what` and the last reason, when patience ends.
        """
        since, tries = self._clock(), 0
        told, told_at = "", since
        while True:
            try:
                return attempt()
            except Again as again:
                if again.moved:
                    since, tries = self._clock(), 0
                wait_s = self._wait(again, tries)
                if self._clock() + wait_s - since > self._limit_s:
                    raise UnreachableError(
                        f"{what} did not work for {self._limit_s:.0f} s",
                        got=again.reason,
                        allowed="an answer",
                        remedy="check server and network, then run the same command: it continues",
                    ) from again
                # A server that prepares for minutes is asked every other second.
                if again.reason != told or self._clock() - told_at > REMIND_S:
                    told, told_at = again.reason, self._clock()
                    _log.warning("%s: %s; trying again", what, again.reason)
                tries += 1
            self._sleep(wait_s)

    def rest(self, wait_s: float) -> None:
        """Wait because the other side asked for it, which no patience is needed for."""
        self._sleep(self._asked(wait_s))

    def _wait(self, again: Again, tries: int) -> float:
        if again.wait_s is not None:
            return self._asked(again.wait_s)
        return self._uniform(0.0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(tries, 10)))

    def _asked(self, wait_s: float) -> float:
        return min(max(wait_s, 0.1), LONGEST_ASKED_S) * self._uniform(1.0, 1.25)
