"""What a device's report must be before it is kept: numbers that can have been measured.

Nobody can tell whether they were. What a report says is drawn and averaged, and nothing is decided
by it; but a log with times that run backwards, or chunks that do not exist, would be of no use.
"""

from __future__ import annotations

import math

from splitfrozen.errors import WireError
from splitfrozen.records import ChunkSpan, DeviceReport

SLACK_S = 1e-3
"""Stages may end so much after the whole, by rounding."""

LONGEST_S = 1e9
"""Thirty years."""


def check_report(report: DeviceReport, samples: int) -> None:
    """Raise WireError where the report of a device cannot be true.

    Args:
        report: as decoded: lengths and signs of integers are right already.
        samples: as the device announced; every chunk has at least one of its own.
    """
    if not 0 <= report.seconds <= LONGEST_S:
        raise _wrong("lasts too long", report.seconds, f"0..{LONGEST_S:.0f} s")
    if not 0 <= report.padding <= LONGEST_S:
        raise _wrong("has a wrong padding", report.padding, "0 or more")
    before: ChunkSpan | None = None
    for span in report.spans:
        _check_chunks(span, -1 if before is None else before.last, samples)
        _check_times(span, before, report.seconds + SLACK_S)
        before = span


def _check_chunks(span: ChunkSpan, before: int, samples: int) -> None:
    if not before < span.first <= span.last < samples:
        allowed = f"ascending, {before + 1}..{samples - 1}"
        raise _wrong("names chunks that cannot be", f"{span.first}..{span.last}", allowed)
    if span.chunks > span.last - span.first + 1:
        allowed = f"at most {span.last - span.first + 1}"
        raise _wrong(f"counts chunks {span.first}..{span.last} wrong", span.chunks, allowed)
    if span.bytes > 2**53:
        raise _wrong("has too many bytes", span.bytes, "as many as can be sent")


def _check_times(span: ChunkSpan, before: ChunkSpan | None, seconds: float) -> None:
    begins = [0.0]
    for name in ("front", "encode", "send"):
        begin, lasts = getattr(span, name)
        earliest = max(begins[-1], 0.0 if before is None else getattr(before, name)[0])
        # Comparisons with NaN are false, so one of the first two refuses it.
        if not (begin >= earliest and lasts >= 0 and begin + lasts <= seconds):
            raise _wrong(
                f"has a wrong `{name}` of chunk {span.first}",
                f"{begin} s, for {lasts} s",
                f"from {earliest:.6f} s to {seconds:.6f} s",
            )
        begins.append(begin)


def _wrong(what: str, got: object, allowed: str) -> WireError:
    if isinstance(got, float) and not math.isfinite(got):
        got = "a number that is not finite"
    return WireError(
        f"the report {what}", got=got, allowed=allowed, remedy="check the device's clock"
    )
