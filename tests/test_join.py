import shlex
import subprocess

import pytest

from splitfrozen.errors import RequestError
from splitfrozen.wire.join import JoinString

TOKEN = "a-Token_1234567890abcdefABCDEF"
PRINT = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("host", "written"),
    [
        ("example.org", "example.org"),
        ("my_server-2", "my_server-2"),
        ("192.168.0.7", "192.168.0.7"),
        ("::1", "[::1]"),
        ("fe80::a:b", "[fe80::a:b]"),
    ],
)
def test_round_trip(host: str, written: str):
    text = f"splitfrozen://{TOKEN}@{written}:8443/{PRINT}"
    join = JoinString.parse(f"  {text}\n")
    assert join == JoinString(TOKEN, host, 8443, PRINT)
    assert str(join) == text


def test_needs_no_quotes_in_a_shell():
    text = str(JoinString(TOKEN, "example.org", 8443, PRINT))
    assert shlex.split(text) == [text]
    done = subprocess.run(["sh", "-c", f"printf %s {text}"], capture_output=True, check=True)
    assert done.stdout.decode() == text


def test_repr_shows_no_token():
    join = JoinString(TOKEN, "example.org", 8443, PRINT)
    assert TOKEN not in repr(join)
    assert "example.org" in repr(join)
    assert TOKEN not in f"{[join]}"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "in its form"),
        (TOKEN, "in its form"),
        (f"https://{TOKEN}@h:1/{PRINT}", "in its form"),
        (f"splitfrozen://h:1/{PRINT}", "in its form"),
        (f"splitfrozen://{TOKEN}@h/{PRINT}", "in its form"),
        (f"splitfrozen://{TOKEN}@::1:8443/{PRINT}", "in its form"),
        (f"splitfrozen://{TOKEN}@h:8443", "in its form"),
        (f"splitfrozen://@h:1/{PRINT}", "in its token"),
        (f"splitfrozen://{TOKEN}=@h:1/{PRINT}", "in its token"),
        (f"splitfrozen://{'x' * 101}@h:1/{PRINT}", "in its token: got 101"),
        (f"splitfrozen://{TOKEN}@:1/{PRINT}", "in its host"),
        (f"splitfrozen://{TOKEN}@a b:1/{PRINT}", "in its host"),
        (f"splitfrozen://{TOKEN}@a..b:1/{PRINT}", "in its host"),
        (f"splitfrozen://{TOKEN}@{'a' * 64}.org:1/{PRINT}", "in its host"),
        (f"splitfrozen://{TOKEN}@$(id):1/{PRINT}", "in its host"),
        (f"splitfrozen://{TOKEN}@[h]:1/{PRINT}", "in its host"),
        (f"splitfrozen://{TOKEN}@[fe80::1%eth0]:1/{PRINT}", "in its host"),
        (f"splitfrozen://{TOKEN}@h:0/{PRINT}", "in its port: got 0"),
        (f"splitfrozen://{TOKEN}@h:65536/{PRINT}", "in its port: got 65536"),
        (f"splitfrozen://{TOKEN}@h:x/{PRINT}", "in its port: got 'x'"),
        (f"splitfrozen://{TOKEN}@h:٣/{PRINT}", "in its port"),
        (f"splitfrozen://{TOKEN}@h:1/{PRINT[:-1]}", "in its fingerprint: got 63"),
        (f"splitfrozen://{TOKEN}@h:1/{PRINT.upper()}", "in its fingerprint"),
        (f"splitfrozen://{TOKEN}@h:1/{PRINT}/", "in its fingerprint"),
    ],
)
def test_says_what_is_wrong_and_keeps_the_token_secret(text: str, match: str):
    with pytest.raises(RequestError, match=match) as caught:
        JoinString.parse(text)
    assert TOKEN not in str(caught.value)
    assert caught.value.exit_code == 2


def test_cannot_be_made_wrong():
    with pytest.raises(RequestError, match="in its fingerprint"):
        JoinString(TOKEN, "h", 1, "zz")
