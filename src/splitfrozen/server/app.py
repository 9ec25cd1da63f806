"""HTTP, and nothing but: each handler reads a message, calls one function and answers.

Bodies are MessagePack (`records.py`), except chunks, files and the probe. Every route is in
`ENDPOINTS` with who may use it. Replies that are not a success carry a `Refusal`; what it says is
meant for the device, so paths and tracebacks stay in the server's log.

Handlers run in threads, as SQLite, fsync and decoding block. Bodies are read before that, on the
event loop, within limits on length, time and the sum of all.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from splitfrozen.config import Config
from splitfrozen.errors import RefusedError, SplitFrozenError, StoreError, WireError
from splitfrozen.records import (
    PROTOCOL,
    Announcement,
    Assignment,
    DeviceProfile,
    DeviceReport,
    Enrolment,
    Failure,
    Message,
    Prepared,
    RunInfo,
)
from splitfrozen.server.answers import (
    RETRY_S,
    Answer,
    bad_body,
    busy,
    internal_error,
    missing,
    refuse,
    reply,
    status_of,
    too_long,
)
from splitfrozen.server.assignment import front_of, take_profile
from splitfrozen.server.auth import bearer
from splitfrozen.server.intake import Upload, receive
from splitfrozen.server.registry import Registry
from splitfrozen.server.reports import check_report
from splitfrozen.server.store import Store

MESSAGE_BYTES = 64 * 1024
PROBE_BYTES = 1024 * 1024
LEAST_BPS = 32_000.0
"""A body must come at this rate, beyond the patience of `Limits.body_s`."""

_MessageT = TypeVar("_MessageT", bound=Message)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the process takes at most.

    Attributes:
        chunk_bytes: of one chunk; twice `wire.chunk_bytes` where that is more, as a long sample
            makes a long chunk.
        in_flight_bytes: chunks of all devices at one moment, as they were sent. A chunk that is
            decoded takes a few times the float32 activations that it holds.
        in_flight_chunks: chunks of one device at one moment.
        body_s: seconds that a body may take however short it is.
    """

    chunk_bytes: int = 64 << 20
    in_flight_bytes: int = 256 << 20
    in_flight_chunks: int = 8
    body_s: float = 30.0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers work with.

    Attributes:
        config: of the run.
        store, registry: of the run.
        files: folder with the files of `Prepared`, by their names.
        prepared: returns what was prepared, or None before that.
    """

    config: Config
    store: Store
    registry: Registry
    files: Path
    prepared: Callable[[], Prepared | None]


@dataclass(frozen=True, slots=True)
class Call:
    """One request: who asks (empty on a public route), parameters of the path, the whole body."""

    device: str
    parameters: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route. `policy`: "public", or "device" for whoever bears a device's secret."""

    method: Literal["GET", "POST", "PUT"]
    path: str
    policy: Literal["public", "device"]
    handler: Callable[[Services, Call], Response]
    body: Literal["none", "message", "chunk", "probe"] = "none"


class _Traffic:
    """Chunks that are being received; only the event loop touches it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._bytes = 0
        self._chunks: Counter[str] = Counter()

    @contextmanager
    def admit(self, device: str, size: int) -> Iterator[None]:
        """Count a chunk in. Raises Answer(429) where it would be too much."""
        crowded = self._bytes and self._bytes + size > self._limits.in_flight_bytes
        if crowded or self._chunks[device] >= self._limits.in_flight_chunks:
            raise Answer(429, busy("too many uploads at once"), retry_s=RETRY_S)
        self._bytes += size
        self._chunks[device] += 1
        try:
            yield
        finally:
            self._bytes -= size
            self._chunks[device] -= 1
            self._chunks += Counter()  # drops the devices that count 0


# --- handlers --------------------------------------------------------------------------------


def enrol(services: Services, call: Call) -> Response:
    """The one request without a secret: it brings a token, and the secret of all that follow."""
    return reply(services.registry.enrol(_message(call, Enrolment)))


def run_info(services: Services, call: Call) -> Response:
    """The probe is the shallowest front: a device that cannot run it can run none."""
    del call
    prepared, config = _prepared(services), services.config
    name = config.model.name
    return reply(
        RunInfo(
            run=services.registry.run,
            # Where it lies on this machine is nobody's business.
            model=Path(name).name if Path(name).is_dir() else name,
            task=prepared.task,
            tokenizer=prepared.tokenizer,
            probe=min(prepared.fronts, key=lambda front: front.depth),
            chunk_bytes=config.wire.chunk_bytes,
            seed=config.run.seed,
        )
    )


def announcement(services: Services, call: Call) -> Response:
    services.registry.announce(call.device, _message(call, Announcement))
    return Response(status_code=204)


def profile(services: Services, call: Call) -> Response:
    said, spec = _message(call, DeviceProfile), services.config.devices
    take_profile(call.device, said, services.registry, _prepared(services), spec)
    return Response(status_code=204)


def assignment(services: Services, call: Call) -> Response:
    """202 while the pace waits for the profiles of other devices."""
    prepared = _prepared(services)
    front = front_of(call.device, services.registry, prepared, services.config.devices)
    if front is None:
        return Response(status_code=202, headers={"Retry-After": str(RETRY_S)})
    depth = front.depth
    return reply(Assignment(depth, front, prepared.codec_at(depth), prepared.sides.get(depth)))


def file(services: Services, call: Call) -> Response:
    """No part of the request reaches the disk: it is looked up among the prepared files."""
    prepared = _prepared(services)
    refs = [ref for manifest in prepared.fronts for ref in manifest.files]
    refs += [prepared.tokenizer] if prepared.tokenizer else []
    refs += prepared.sides.values()
    for ref in refs:
        path = services.files / ref.name
        if ref.sha256 == call.parameters["sha256"] and path.is_file():
            return FileResponse(path, media_type="application/octet-stream")
    raise missing("a file of this run")


def probe(services: Services, call: Call) -> Response:
    """The body was read and thrown away: the device measures its link."""
    del services, call
    return Response(status_code=204)


def chunks(services: Services, call: Call) -> Response:
    """What a device that starts again need not send again."""
    return reply(sorted(services.store.chunks(call.device)))


def put_chunk(services: Services, call: Call) -> Response:
    """The receipt is given once the samples are on disk; 200 where none was new."""
    upload = Upload(call.device, call.parameters["sha256"], call.body)
    receipt = receive(upload, services.store, services.registry, _prepared(services))
    return reply(receipt, 201 if receipt.stored else 200)


def report(services: Services, call: Call) -> Response:
    said = _message(call, DeviceReport)
    announced = services.registry.device(call.device).announcement
    check_report(said, 0 if announced is None else announced.samples)
    services.registry.report(call.device, said)
    return Response(status_code=204)


def failure(services: Services, call: Call) -> Response:
    """Escaped in the log: a message with line breaks cannot pose as other lines."""
    message = _message(call, Failure).message
    _log.warning("%s gives up: %s", call.device, message.encode("unicode_escape").decode())
    services.registry.fail(call.device, message)
    return Response(status_code=204)


ENDPOINTS = (
    Endpoint("POST", "/v1/enrol", "public", enrol, "message"),
    Endpoint("GET", "/v1/run", "device", run_info),
    Endpoint("POST", "/v1/announcement", "device", announcement, "message"),
    Endpoint("POST", "/v1/profile", "device", profile, "message"),
    Endpoint("GET", "/v1/assignment", "device", assignment),
    Endpoint("GET", "/v1/files/{sha256}", "device", file),
    Endpoint("PUT", "/v1/probe", "device", probe, "probe"),
    Endpoint("GET", "/v1/chunks", "device", chunks),
    Endpoint("PUT", "/v1/chunks/{sha256}", "device", put_chunk, "chunk"),
    Endpoint("POST", "/v1/report", "device", report, "message"),
    Endpoint("POST", "/v1/failure", "device", failure, "message"),
)


# --- the way of a request --------------------------------------------------------------------


def build_app(services: Services, limits: Limits = DEFAULT_LIMITS) -> Starlette:
    """The ASGI application."""
    traffic = _Traffic(limits)
    routes = [
        Route(endpoint.path, _serve(services, endpoint, limits, traffic), methods=[endpoint.method])
        for endpoint in ENDPOINTS
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _no_route})


def _serve(
    services: Services, endpoint: Endpoint, limits: Limits, traffic: _Traffic
) -> Callable[[Request], Awaitable[Response]]:
    longest = {
        "none": 0,
        "message": MESSAGE_BYTES,
        "probe": PROBE_BYTES,
        "chunk": max(2 * services.config.wire.chunk_bytes, limits.chunk_bytes),
    }[endpoint.body]

    async def answer(request: Request) -> Response:
        device = ""
        if endpoint.policy == "device":
            secret = bearer(request.headers.get("Authorization", ""))
            device = await run_in_threadpool(services.registry.authenticate, secret)
        size = _declared(request, endpoint, longest)
        # Only chunks are long; what else is half received costs next to nothing.
        with traffic.admit(device, size) if endpoint.body == "chunk" else nullcontext():
            body = await _read(request, endpoint, size, limits.body_s)
            call = Call(device, request.path_params, body)
            return await run_in_threadpool(_handle, services, endpoint, call)

    async def serve(request: Request) -> Response:
        try:
            return await answer(request)
        except Answer as given:
            return given.response
        except SplitFrozenError as error:
            return refuse(
                error, status_of(error), RETRY_S if isinstance(error, StoreError) else None
            )
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception:
            _log.exception("%s %s failed", endpoint.method, endpoint.path)
            return refuse(internal_error(), 500)

    return serve


def _handle(services: Services, endpoint: Endpoint, call: Call) -> Response:
    response = endpoint.handler(services, call)
    if call.device:
        # A body may take minutes: who sent it was there until now, not only when it began.
        services.registry.note_seen(call.device)
    return response


def _declared(request: Request, endpoint: Endpoint, longest: int) -> int:
    """Length that the body may have: what the request declares, within the route's limit."""
    text = request.headers.get("Content-Length", "")
    if not (text.isascii() and text.isdigit()):
        if endpoint.body in ("none", "message"):
            return longest
        raise Answer(411, bad_body("no Content-Length", "a request that declares its length"))
    # Python refuses to read numbers of thousands of digits, which may all be zeros.
    size = int(text.lstrip("0")[:20] or "0")
    if size > longest:
        raise too_long(longest)
    return size


async def _read(request: Request, endpoint: Endpoint, size: int, patience_s: float) -> bytes:
    """The body; nothing beyond `size` is read, and nothing of a probe is kept."""
    if endpoint.body == "none":
        return b""
    parts, received = [], 0
    try:
        with anyio.fail_after(patience_s + 8 * size / LEAST_BPS):
            async for part in request.stream():
                received += len(part)
                if received > size:
                    raise too_long(size)
                if endpoint.body != "probe":
                    parts.append(part)
    except TimeoutError:
        allowed = f"{LEAST_BPS:.0f} bit/s or more"
        raise Answer(408, bad_body("a slower one", allowed)) from None
    return b"".join(parts)


def _message(call: Call, kind: type[_MessageT]) -> _MessageT:
    try:
        message = msgspec.msgpack.decode(call.body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(
            f"this is no {kind.__name__}",
            got=str(error),
            allowed="the message of this protocol version",
            remedy="install the server's version on the device",
        ) from error
    numbers = [getattr(message, name) for name in message.__struct_fields__]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise WireError(
            f"a number of this {kind.__name__} is not finite",
            got="NaN or infinity",
            allowed="finite numbers",
            remedy="check the device",
        )
    return message


def _prepared(services: Services) -> Prepared:
    """What was prepared. Raises Answer where it is not there yet, or will never be."""
    prepared = services.prepared()
    if prepared is not None:
        return prepared
    state = services.registry.state()
    if state.state in ("failed", "stopped"):
        raise Answer(
            410,
            RefusedError(
                f"the run {state.state} before it was prepared",
                got="a device",
                allowed="a run that is served",
                remedy="tell who runs the server; its log says why",
            ),
        )
    raise Answer(503, busy("the run is being prepared"), retry_s=RETRY_S)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    del request
    return refuse(
        RefusedError(
            "there is no such request",
            got=f"status {error.status_code}",
            allowed=f"routes of protocol version {PROTOCOL}",
            remedy="install the server's version on the device",
        ),
        error.status_code,
    )
