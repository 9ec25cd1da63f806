"""Devices' codecs as a stage of their own in a schedule, beside the front and before the link.

A device computes, encodes and uploads at the same time (`device.pipeline`). Schedules leave the
codec out; `encoded` puts it in where it takes time worth counting. The party "NAME/encode" needs a
machine whose speed is in values a second.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import msgspec

from splitfrozen.records import SERVER, Compute, Event, Send

ENCODER = "/encode"
"""Stands behind a device's name."""


def encoded(events: Iterable[Event], bytes_per_value: float) -> Iterator[Event]:
    """The events with one more before each upload of activations: their values, encoded.

    Args:
        events: of a schedule, numbered 0, 1, 2 ...
        bytes_per_value: that the schedule's activations have on the wire.
    """
    numbers = array("q")
    """New number of each event."""
    added = 0
    for event in events:
        after = tuple(numbers[one] for one in event.after)
        number = event.id + added
        if isinstance(event, Send) and event.target == SERVER and event.phase == "activations":
            who, values = event.source + ENCODER, event.bytes / bytes_per_value
            yield Compute(number, who, "encode", event.step, values, after)
            after, number, added = (number,), number + 1, added + 1
        numbers.append(number)
        yield msgspec.structs.replace(event, id=number, after=after)
