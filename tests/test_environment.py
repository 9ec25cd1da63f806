"""What tells versions of the code apart."""

from __future__ import annotations

import pytest

from splitfrozen.studies.environment import _meaning, code, environment

SOURCE = (
    '"""What it is."""\nA = 1\n"""Of A."""\n\n\ndef f() -> int:\n    """Say it."""\n    return A\n'
)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("What it is", "What it was", True),
        ("Of A", "Of B", True),
        ("Say it", "Tell", True),
        ("A = 1\n", "A = 1  # one\n", True),
        ("A = 1", "A = 2", False),
        ("return A", "return -A", False),
    ],
)
def test_only_what_acts_makes_another_version(old: str, new: str, same: bool) -> None:
    assert old in SOURCE
    assert (_meaning(SOURCE.replace(old, new)) == _meaning(SOURCE)) == same


def test_a_version_is_a_short_hash() -> None:
    assert len(code()) == 12
    assert set(code()) <= set("0123456789abcdef")
    assert environment()["python"]
