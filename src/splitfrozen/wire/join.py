"""The join string: all that a device needs to reach a run and to trust its server.

    splitfrozen://TOKEN@HOST:PORT/FINGERPRINT

TOKEN lets one device enrol: it is a secret, so nothing here shows it except `str()`. FINGERPRINT is
the sha256 of the server certificate's DER, in hex: the device accepts that certificate and no
other. No character of it means anything to a POSIX shell, save the brackets of an IPv6 address.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from splitfrozen.errors import RequestError

SCHEME = "splitfrozen"

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,100}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_SHAPE = re.compile(
    rf"{SCHEME}://(?P<token>[^@/]*)@(?P<host>\[[^\]/]*\]|[^:/\[\]]*):(?P<port>[^:/]*)/(?P<print>.*)"
)


@dataclass(frozen=True, slots=True, repr=False)
class JoinString:
    """A parsed join string; `str()` gives the text back, token and all.

    Attributes:
        token: urlsafe base64 without padding.
        host: name, IPv4 or IPv6 address (without brackets).
        port: 1 to 65535.
        fingerprint: sha256 of the certificate's DER, lowercase hex.

    Raises RequestError where a part is not as it should be.
    """

    token: str
    host: str
    port: int
    fingerprint: str

    def __post_init__(self) -> None:
        if not _TOKEN.fullmatch(self.token):
            got = f"{len(self.token)} characters"
            raise _wrong("its token", got, "1 to 100 of A-Z a-z 0-9 _ -")
        if not (_NAME.fullmatch(self.host) or _is_ipv6(self.host)):
            raise _wrong(
                "its host", repr(self.host), "a name, an IPv4 or a [bracketed] IPv6 address"
            )
        if not 1 <= self.port <= 65535:
            raise _wrong("its port", self.port, "1 to 65535")
        if not _FINGERPRINT.fullmatch(self.fingerprint):
            got = f"{len(self.fingerprint)} characters: {self.fingerprint[:80]!r}"
            raise _wrong("its fingerprint", got, "64 of 0-9 a-f")

    @classmethod
    def parse(cls, text: str) -> JoinString:
        """Read a join string; blanks around it are ignored. Raises RequestError."""
        match = _SHAPE.fullmatch(text.strip())
        if match is None:
            # Not shown: a token may be anywhere in it.
            raise _wrong(
                "its form", f"{len(text)} characters", f"{SCHEME}://TOKEN@HOST:PORT/FINGERPRINT"
            )
        token, host, port, fingerprint = match.groups()
        if not re.fullmatch(r"[0-9]{1,5}", port):
            raise _wrong("its port", repr(port), "1 to 65535")
        if host.startswith("[") and not _is_ipv6(host[1:-1]):
            raise _wrong("its host", repr(host), "an IPv6 address in the brackets")
        return cls(token, host.strip("[]"), int(port), fingerprint)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEME}://{self.token}@{host}:{self.port}/{self.fingerprint}"

    def __repr__(self) -> str:
        fields = f"host={self.host!r}, port={self.port}, fingerprint={self.fingerprint!r}"
        return f"JoinString(token='***', {fields})"


def _is_ipv6(host: str) -> bool:
    try:
        # A zone (fe80::1%eth0) means another thing on every machine.
        return ipaddress.IPv6Address(host).scope_id is None
    except ValueError:
        return False


def _wrong(what: str, got: object, allowed: str) -> RequestError:
    return RequestError(
        f"the join string is wrong in {what}",
        got=got,
        allowed=allowed,
        remedy="copy it again from the server's output",
    )
