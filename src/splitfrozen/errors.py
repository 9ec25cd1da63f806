"""Everything that splitfrozen raises on purpose.

    SplitFrozenError            exit code 1: the work failed
    ├── RequestError            exit code 2: the request was wrong
    │   ├── ConfigError         a TOML file or a command-line option
    │   ├── DataError           a data file: missing column, bad row, wrong shape
    │   ├── ModelError          a model that cannot be loaded, located or cut
    │   └── PlanError           no assignment satisfies the constraints
    ├── WireError               bytes from the network that are not what they claim
    ├── StoreError              the activation store or the registry on disk
    │   └── DiskFullError   no space; the same request succeeds once there is some
    ├── RefusedError            the other side said no: token, fingerprint, quota
    └── UnreachableError        the other side did not answer in time

Every message has four parts: what is wrong, what was got, what is allowed and how to mend it.
"""

from __future__ import annotations


class SplitFrozenError(Exception):
    """Base of the tree; `str()` is the one line that a person reads."""

    exit_code = 1

    def __init__(self, what: str, *, got: object, allowed: str, remedy: str) -> None:
        """Compose the message.

        Args:
            what: what is wrong, without a full stop.
            got: the offending value, shown as `str` (pass `repr(x)` where quotes help).
            allowed: what would have been accepted.
            remedy: what to do, as an instruction.
        """
        super().__init__(f"{what}: got {got}; allowed: {allowed}; {remedy}")
        self.what = what
        self.got = str(got)
        self.allowed = allowed
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.got, self.allowed, self.remedy)


def _rebuild(
    kind: type[SplitFrozenError], what: str, got: str, allowed: str, remedy: str
) -> SplitFrozenError:
    return kind(what, got=got, allowed=allowed, remedy=remedy)


class RequestError(SplitFrozenError):
    """The request was wrong; nothing was changed."""

    exit_code = 2


class ConfigError(RequestError):
    """A key of a TOML file or an option of a command."""


class DataError(RequestError):
    """A data file that cannot be used."""


class ModelError(RequestError):
    """A model that cannot be loaded, located, cut or exported."""


class PlanError(RequestError):
    """No assignment satisfies the constraints."""


class WireError(SplitFrozenError):
    """Bytes from the network that are not what they claim to be."""


class StoreError(SplitFrozenError):
    """The store or the registry on disk cannot be read or written."""


class DiskFullError(StoreError):
    """No space is left: nothing was written, and the same request succeeds once there is some."""


class RefusedError(SplitFrozenError):
    """The other side refused: token, fingerprint, ownership or limit."""


class UnreachableError(SplitFrozenError):
    """The other side did not answer in time."""
