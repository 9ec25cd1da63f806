"""Rows of results by what they measure, and which of them nothing beats in score and bytes.

A row is a training: the names that tell it from others (`PLACE`) and what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

Row = dict[str, Any]
Place = tuple[str, str, int, str]

PLACE = ("dataset", "partition", "rank", "method", "seed")
MEASURES = {
    "accuracy": "accuracy in percent",
    "exact_match": "exact match in percent",
    "perplexity": "perplexity",
}
"""What methods are compared by, and how it is called; the main one first."""


def measures(rows: Sequence[Row]) -> dict[str, str]:
    """Those of `MEASURES` that some row has."""
    known = {
        key: told for key, told in MEASURES.items() if any(row[key] is not None for row in rows)
    }
    return known or {"accuracy": MEASURES["accuracy"]}


def shown(value: float, measure: str) -> float:
    """A score as it is told: a fraction in percent."""
    return value if measure == "perplexity" else 100 * value


def by_place(rows: Iterable[Row], measure: str) -> dict[Place, list[float]]:
    """What the seeds measured, by dataset, partition, rank and method."""
    found: dict[Place, list[float]] = {}
    for row in rows:
        if row[measure] is not None:
            place = row["dataset"], row["partition"], row["rank"], row["method"]
            found.setdefault(place, []).append(row[measure])
    return found


def means(rows: Iterable[Row], measure: str) -> dict[Place, float]:
    """Means of what `by_place` gives."""
    return {place: fmean(values) for place, values in by_place(rows, measure).items()}


def tradeoff(rows: Sequence[Row]) -> list[Row]:
    """What was sent against how well it was learnt, for all methods whose bytes were counted.

    They are not in cells of an earlier version, nor with centralised training: 0 is of neither.

    A method is on the Pareto front of its dataset, partition and rank where no other sends as few
    bytes and scores as well, one of the two better.

    Returns:
        `dataset`, `partition`, `rank`, `method`, `bytes` and the main measure, means over the
        seeds; `each`, that measure by seed; `times_less`, as many times as the first method of the
        place sends more; `on_front`.
    """
    measure = next(iter(measures(rows)))
    sign = -1 if measure == "perplexity" else 1
    scores, sent = by_place(rows, measure), means(rows, "bytes")
    places: dict[tuple[str, str, int], list[Row]] = {}
    for (dataset, partition, rank, method), each in scores.items():
        size = sent.get((dataset, partition, rank, method))
        if size:
            named = {"dataset": dataset, "partition": partition, "rank": rank, "method": method}
            own = places.setdefault((dataset, partition, rank), [])
            own.append({**named, "bytes": size, measure: fmean(each), "each": each})
    for own in places.values():
        points = {(one["bytes"], -sign * one[measure]) for one in own}
        for one in own:
            at = (one["bytes"], -sign * one[measure])
            one["times_less"] = own[0]["bytes"] / one["bytes"]
            one["on_front"] = not any(_beats(other, at) for other in points)
    return [one for own in places.values() for one in own]


def _beats(other: tuple[float, float], at: tuple[float, float]) -> bool:
    """Whether a point of two costs is nowhere worse than another, and somewhere better."""
    return other != at and other[0] <= at[0] and other[1] <= at[1]
