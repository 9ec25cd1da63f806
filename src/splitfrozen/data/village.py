"""A small artificial English: what people of a village report about their tools, and what follows.

Notable:
- A **report** makes two claims about parts of a tool, of which at most one is true. What has to be
  done depends on who was right, on negation, doubt and what is over, never on a single word: the
  claim that is true and the claim that is false are drawn from the same words.
- A **story** is a report and what somebody then did about it. A model that predicts stories well
  has to find out what is the matter. Stories are the pretraining text of the packaged model.
- A **task row** is a report and a closing scene, labelled with what has to be done. In stories a
  scene only ever comes first: after a closing one, the last token no longer holds what the model
  found out, and a new head on the frozen model gets less far than adapters that fetch it.
- No story contains the name of a label. A report belongs to the task or to the stories by its
  hash, so the two never meet.

For example, "Ada doubted that the kettle was cracked, but she was wrong, while the hose was never
muddy." asks for `repair`. A story goes on with "Hugo mended the kettle.", a task row closes with
"The saw was silent."
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from splitfrozen.rng import stream

_T = TypeVar("_T")

LABELS = ("repair", "refill", "clean", "nothing")

_NOTHING = LABELS.index("nothing")

# Ada ... Zoe are women, Abel ... Udo are men.
_WOMEN = (
    *("Ada", "Bea", "Clara", "Dora", "Edith", "Flora", "Greta", "Hanna"),
    *("Ida", "Judith", "Lena", "Mira", "Nora", "Olga", "Petra", "Zoe"),
)
_MEN = (
    *("Abel", "Boris", "Carl", "David", "Emil", "Felix", "Georg", "Hugo"),
    *("Ivan", "Jonas", "Karl", "Leo", "Martin", "Niels", "Oscar", "Udo"),
)
_PEOPLE = _WOMEN + _MEN

# Every part can be in every state, so that neither tells the other.
_PARTS = (
    *("tank", "pipe", "kettle", "barrel", "bucket", "jug", "basin", "trough"),
    *("hose", "bottle", "tray", "bin", "box", "drum", "funnel", "nozzle"),
    *("can", "boiler", "crate", "bowl", "pot", "sack", "tub", "gutter"),
)
_TOOLS = (
    *("mill", "pump", "oven", "press", "loom", "forge", "still", "saw"),
    *("mangle", "crane", "dryer", "ferry"),
)
_PLACES = ("inn", "school", "market", "church", "farm", "harbour", "garden", "bridge")
_TIMES = (
    *("On Monday", "On Tuesday", "On Friday", "On Sunday", "At dawn", "At noon"),
    *("After lunch", "In spring", "In autumn", "Last night"),
)

# By label. Half of the deeds begin with a word that only they have, so that whoever predicts the
# first word after a report has to know what is the matter by then.
_STATES = (
    ("cracked", "bent", "torn", "broken", "split", "loose", "twisted", "dented"),
    ("dry", "empty", "bare", "drained", "spent", "hollow", "low", "exhausted"),
    ("dusty", "muddy", "greasy", "sooty", "clogged", "sticky", "grimy", "stained"),
)
_DEEDS = (
    (
        "{p} mended the {n}",
        "{p} patched the {n}",
        "{p} ordered a new {n}",
        "mending the {n} took an hour",
        "hammer and nails went to the {n}",
        "glue was put on the {n}",
    ),
    (
        "{p} filled the {n}",
        "{p} topped up the {n}",
        "{p} brought a new load for the {n}",
        "filling the {n} took an hour",
        "water was carried to the {n}",
        "oil was poured into the {n}",
    ),
    (
        "{p} washed the {n}",
        "{p} scrubbed the {n}",
        "{p} held a brush to the {n}",
        "washing the {n} took an hour",
        "soap and rags went to the {n}",
        "hot steam was blown on the {n}",
    ),
    (
        "{p} left the {n} alone",
        "{p} had no work with the {n}",
        "{p} put the {n} back",
        "no hand was laid on the {n}",
        "everybody left the {n} alone",
        "home they went from the {n}",
    ),
)

_TRUE = (
    "the {n} was {s}",
    "the {n} really was {s}",
    "the {n} had become {s}",
    "{p} found the {n} {s}",
    "{p} said that the {n} was {s}, and it was",
    "{p} thought that the {n} was {s}, and {he} was right",
    "{p} doubted that the {n} was {s}, but {he} was wrong",
    "nobody believed that the {n} was {s}, but it was",
    "the {n} did not look {s}, but it was",
    "{p} was not wrong to call the {n} {s}",
)
_FALSE = (
    "the {n} was not {s}",
    "the {n} was never {s}",
    "the {n} was no longer {s}",
    "{p} did not find the {n} {s}",
    "{p} said that the {n} was {s}, but it was not",
    "{p} thought that the {n} was {s}, but {he} was wrong",
    "{p} doubted that the {n} was {s}, and {he} was right",
    "everybody believed that the {n} was {s}, but it was not",
    "the {n} did look {s}, but it was not",
    "{p} was not right to call the {n} {s}",
)
# Both claims about one part: {s} is so, {f} is not.
_RATHER = (
    "the {n} was not {f} but {s}",
    "the {n} was {s} and not {f}",
    "the {n} was {s} rather than {f}",
    "the {n} had been {f}, but now it was {s}",
    "{p} thought that the {n} was {f}, but it was {s}",
    "{p} called the {n} {f}, but it was {s}",
    "the {n} was {f} or {s}, and it was not {f}",
    "the {n} was {s} or {f}, and it was not {f}",
)
# Neither {s} nor {f} is so.
_NEITHER = (
    "the {n} was not {f} and not {s}",
    "the {n} was neither {s} nor {f}",
    "the {n} had been {f} and {s}, but it was so no longer",
    "{p} thought that the {n} was {f} or {s}, but it was not",
    "{p} doubted that the {n} was {s} or {f}, and {he} was right",
    "the {n} did look {f} or {s}, but {p} was not wrong to doubt it",
)
_DRAWN = {"p": _PEOPLE, "m": _TOOLS, "l": _PLACES, "t": _TIMES}
_JOINTS = (". ", "; ", ", while ", ", and ")
_SCENES = (
    "{t} the {m} stood still.",
    "{t} {p} looked at the {m}.",
    "The {m} was silent.",
    "{p} came from the {m}.",
    "{t} there was trouble with the {m}.",
)
_ENDINGS = (
    "Soon the {n} was in use again.",
    "After that the {n} was as good as new.",
    "{p} looked at the {n} and was glad.",
    "The bells of the {l} rang.",
)
_LONGEST = 32
"""Words and marks of the longest report."""
_LONGEST_SCENE = 9
_LONGEST_ROW = 30


@dataclass(frozen=True, slots=True)
class Report:
    """What somebody reported.

    Attributes:
        text: at most 32 words and marks.
        label: index in LABELS of what has to be done.
        part: what it is about.
    """

    text: str
    label: int
    part: str

    @property
    def reserved(self) -> bool:
        """Whether the report belongs to the task; one in eight does."""
        return hashlib.sha256(self.text.encode()).digest()[0] < 32


def sentences(seed: int, count: int) -> Iterator[str]:
    """Yield `count` stories of three to five sentences, about 37 words and marks each."""
    draw = stream(seed, "village", "stories")
    while count > 0:
        text = story(draw)
        if text is not None:
            yield text
            count -= 1


def task_rows(seed: int, count: int) -> list[dict[str, str]]:
    """Return `count` different reports as rows {"text", "label"}, the labels equally likely.

    A row is a report and a closing scene: at most 30 words and marks, or 32 tokens of the packaged
    tokenizer. Draw once and slice for training and evaluation: no report occurs twice in one call.
    """
    draw = stream(seed, "village", "task")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        report = _report(draw)
        if report.reserved and _length(report.text) + _LONGEST_SCENE <= _LONGEST_ROW:
            text = f"{report.text} {_fill(draw, _one(draw, _SCENES))}"
            rows.setdefault(report.text, {"text": text, "label": LABELS[report.label]})
    return list(rows.values())


def story(draw: np.random.Generator) -> str | None:
    """Return a report and what somebody did about it, or None where the report is reserved.

    Nearly every choice that is drawn shows in the text, so the entropy of the choices is that of
    the text.
    """
    report = _report(draw)
    if report.reserved:
        return None
    deed = _capital(_fill(draw, _one(draw, _DEEDS[report.label]), n=report.part))
    ending = _fill(draw, _one(draw, _ENDINGS), n=report.part)
    return f"{report.text} {deed}. {ending}"


def _report(draw: np.random.Generator) -> Report:
    label = int(draw.integers(len(LABELS)))
    part = _one(draw, _PARTS)
    body = f"{_capital(_claims(draw, label, part))}."
    if _length(body) + _LONGEST_SCENE > _LONGEST or draw.integers(2):
        return Report(body, label, part)
    scene = _fill(draw, _one(draw, _SCENES))
    return Report(f"{scene} {body}", label, part)


def _claims(draw: np.random.Generator, label: int, part: str) -> str:
    """Return two claims, one of them about the part, that together ask for the label."""
    if label == _NOTHING:
        kind, other = _two(draw, range(_NOTHING))
    else:
        kind = label
        other = _one(draw, [kind for kind in range(_NOTHING) if kind != label])
    state, denied = _one(draw, _STATES[kind]), _one(draw, _STATES[other])
    templates: Sequence[str]
    if draw.integers(3) == 0:
        templates = _NEITHER if label == _NOTHING else _RATHER
        return _fill(draw, _one(draw, templates), n=part, s=state, f=denied)
    templates = _FALSE if label == _NOTHING else _TRUE
    claim = _fill(draw, _one(draw, templates), n=part, s=state)
    second = _one(draw, [name for name in _PARTS if name != part])
    return _join(draw, claim, _fill(draw, _one(draw, _FALSE), n=second, s=denied))


def _join(draw: np.random.Generator, claim: str, other: str) -> str:
    """Join two claims in either order."""
    first, last = (claim, other) if draw.integers(2) else (other, claim)
    joint = _one(draw, _JOINTS)
    return first + joint + (_capital(last) if joint == ". " else last)


def _fill(draw: np.random.Generator, template: str, **named: str) -> str:
    """Put the named words into the template and draw what else it asks for."""
    for key, options in _DRAWN.items():
        if f"{{{key}}}" in template:
            named[key] = _one(draw, options)
    named["he"] = "she" if named.get("p") in _WOMEN else "he"
    return template.format(**named)


def _one(draw: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(draw.integers(len(options)))]


def _two(draw: np.random.Generator, options: Sequence[_T]) -> tuple[_T, _T]:
    """Two different ones, in drawn order."""
    first = int(draw.integers(len(options)))
    step = 1 + int(draw.integers(len(options) - 1))
    return options[first], options[(first + step) % len(options)]


def _length(text: str) -> int:
    return len(text.split()) + sum(text.count(mark) for mark in ".,;")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
