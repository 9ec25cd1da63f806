"""A device under way: it watches its own speed, and changes its front when the server says so.

The server plans by what the probe measured. A device whose front or link has since become faster or
slower by more than MOVED tells it, and the server may plan what is still to come anew; a receipt
then names another depth, and the next chunk is computed with that. What lies between two chunks
changes nothing for the server: a chunk carries its depth. So a device that cannot open another
front, for lack of space or memory or because its files do not come, goes on with the one it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from splitfrozen.device.pipeline import Making
from splitfrozen.errors import SplitFrozenError
from splitfrozen.records import Assignment, ChunkSpan, DeviceProfile, Receipt

MOVED = 0.2
"""By what part speed or link must move to be told."""

WINDOW, WINDOW_S = 5, 2.0
"""Chunks, and seconds of computation or sending, that speeds are means over, at least."""

RESTARTS = 2
"""How often the older half of a window is left out, as something moved between the halves: told
would be a speed that the machine has never had. One that never settles is told all the same."""

_log = logging.getLogger(__name__)


class Steered:
    """A `pipeline.Pilot` that follows the server."""

    def __init__(
        self,
        assignment: Assignment,
        open_making: Callable[[Assignment], Making],
        assigned: Callable[[], Assignment],
        tell: Callable[[DeviceProfile], None],
        profile: DeviceProfile,
    ) -> None:
        """Begin with an assignment.

        Args:
            assignment: the first.
            open_making: fetches what an assignment takes and opens it.
            assigned: asks for the assignment as it is now.
            tell: tells the server what this machine can do now.
            profile: what the server was told.
        """
        self._assignment = assignment
        self._open = open_making
        self._assigned = assigned
        self._tell = tell
        self._told = profile
        self._making = open_making(assignment)
        self._wanted = assignment.depth
        self._heard = assignment.depth
        """Of the last assignment, also where it could not be opened: that is tried once."""
        self._spans: list[tuple[ChunkSpan, int]] = []
        self._restarts = 0

    @property
    def depth(self) -> int:
        """Of the chunks that are computed now."""
        return self._assignment.depth

    def making(self) -> Making:
        if self._wanted != self._heard:
            self._follow(self._assigned())
        return self._making

    def _follow(self, found: Assignment) -> None:
        """Compute another depth from here on; or go on as before, where that cannot be opened."""
        # A receipt may be older than the assignment that it made us ask for.
        news, self._heard = found.depth != self._heard, found.depth
        if not news or found.depth == self.depth:
            return
        try:
            self._making = self._open(found)
        except (SplitFrozenError, MemoryError) as error:
            what = f"{type(error).__name__}: {error}"
            _log.warning("staying at depth %d, not %d: %s", self.depth, found.depth, what)
            return
        self._assignment = found
        _log.info("computing depth %d from here on", found.depth)

    def sent(self, span: ChunkSpan, tokens: int, receipt: Receipt) -> None:
        if receipt.depth:
            self._wanted = receipt.depth
        assignment = self._assignment  # The other thread may replace it.
        if span.depth != assignment.depth:
            self._begin([])
            return
        self._spans.append((span, tokens))
        window = _Measured.over(self._spans, assignment.front.flops_per_token)
        if len(self._spans) < WINDOW or window.seconds < WINDOW_S:
            return
        if not window.moved(_Measured(self._told.flops, self._told.uplink_bps)):
            self._begin([])
            return
        half = len(self._spans) // 2
        older, newer = (
            _Measured.over(spans, assignment.front.flops_per_token)
            for spans in (self._spans[:half], self._spans[half:])
        )
        if newer.moved(older) and self._restarts < RESTARTS:
            self._begin(self._spans[half:], self._restarts + 1)
            return
        self._begin([])
        flops, uplink = window.flops, window.uplink_bps
        self._told = msgspec.structs.replace(self._told, flops=flops, uplink_bps=uplink)
        self._tell(self._told)

    def _begin(self, spans: list[tuple[ChunkSpan, int]], restarts: int = 0) -> None:
        """Begin a window with these chunks."""
        self._spans, self._restarts = spans, restarts


@dataclass(frozen=True, slots=True)
class _Measured:
    """Speeds of a front (FLOP/s) and of a link (bit/s), and the seconds that they are means over:
    of computation or of sending, whichever took longer."""

    flops: float
    uplink_bps: float
    seconds: float = 0.0

    @classmethod
    def over(cls, spans: Sequence[tuple[ChunkSpan, int]], flops_per_token: float) -> _Measured:
        computing = sum(span.front[1] for span, _ in spans)
        sending = sum(span.send[1] for span, _ in spans)
        work = flops_per_token * sum(tokens for _, tokens in spans)
        bits = 8 * sum(span.bytes for span, _ in spans)
        return cls(work / max(computing, 1e-9), bits / max(sending, 1e-9), max(computing, sending))

    def moved(self, before: _Measured) -> bool:
        return moved(before.flops, self.flops) or moved(before.uplink_bps, self.uplink_bps)


def moved(before: float, now: float) -> bool:
    """Whether a rate is not what it was."""
    return abs(now - before) > MOVED * before
