"""Replies: messages as MessagePack, errors as a `Refusal` with the status that their class has."""

from __future__ import annotations

import logging

import msgspec
from starlette.responses import Response

from splitfrozen import errors
from splitfrozen.errors import (
    DiskFullError,
    PlanError,
    RefusedError,
    SplitFrozenError,
    StoreError,
    UnreachableError,
    WireError,
)
from splitfrozen.records import Refusal
from splitfrozen.server.auth import UnknownCredentialError

RETRY_S = 2
"""What a device is asked to wait before it tries again."""

_MESSAGE_TYPE = "application/msgpack"
_log = logging.getLogger(__name__)


class Answer(Exception):  # noqa: N818 -- an answer, not an error of ours
    """Answer with this status whatever the class of the error says."""

    def __init__(self, status: int, error: SplitFrozenError, retry_s: int | None = None) -> None:
        super().__init__(str(error))
        self.response = refuse(error, status, retry_s)


def reply(content: object, status: int = 200) -> Response:
    """A success with a message as its body."""
    return Response(msgspec.msgpack.encode(content), status, media_type=_MESSAGE_TYPE)


def status_of(error: SplitFrozenError) -> int:
    """The status that stands for a class of errors."""
    table: tuple[tuple[type[SplitFrozenError], int], ...] = (
        (UnknownCredentialError, 401),
        (RefusedError, 403),
        (WireError, 400),
        (PlanError, 409),
        (DiskFullError, 507),
        (StoreError, 503),
    )
    return next((status for kind, status in table if isinstance(error, kind)), 500)


def refuse(error: SplitFrozenError, status: int, retry_s: int | None = None) -> Response:
    """A reply that is not a success; what the store complains of stays in the log."""
    if isinstance(error, StoreError):
        _log.error("%s", error)
        error = busy("the server's disk is full" if status == 507 else "the store cannot be used")
    # Devices know the classes of errors.py; ours below them say more to us than to them.
    public = next(kind for kind in type(error).__mro__ if vars(errors).get(kind.__name__) is kind)
    headers = {} if retry_s is None else {"Retry-After": str(retry_s)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = msgspec.msgpack.encode(Refusal(error=public.__name__, message=str(error)))
    return Response(body, status, headers, media_type=_MESSAGE_TYPE)


def missing(what: str) -> Answer:
    """404."""
    return Answer(
        404,
        RefusedError(
            "it is not here", got="another name", allowed=what, remedy="ask GET /v1/assignment"
        ),
    )


def busy(what: str) -> UnreachableError:
    """The error of what will work later."""
    return UnreachableError(
        what, got="a request", allowed="the same request later", remedy="wait and try again"
    )


def bad_body(got: str, allowed: str) -> WireError:
    """The error of a body that breaks a limit."""
    return WireError(
        "the body of the request is not right", got=got, allowed=allowed, remedy="check the device"
    )


def too_long(limit: int) -> Answer:
    """413."""
    return Answer(413, bad_body("a longer one", f"at most {limit} bytes"))


def internal_error() -> SplitFrozenError:
    """What a device hears of an error of ours."""
    return SplitFrozenError(
        "the server failed at this request",
        got="an error of its own",
        allowed="none",
        remedy="tell who runs the server; its log says more",
    )
