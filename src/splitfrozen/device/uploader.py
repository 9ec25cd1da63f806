"""HTTP to the server: typed, patient, resumable.

Every request may be repeated without harm (chunks and files are addressed by their content, the
rest says the same again), so a lost reply is repaired by asking again. An error that asking again
cannot mend is raised as the class and with the words that the server gave.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import msgspec

from splitfrozen import __version__, errors
from splitfrozen.device.patience import Again, Patience
from splitfrozen.device.pinning import CONNECT_S, tls_refusal
from splitfrozen.errors import RefusedError, SplitFrozenError, StoreError, WireError
from splitfrozen.records import Chunk, Count, FileRef, Message, Receipt, Refusal

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

SILENCE_S = 30.0
"""A connection on which nothing moves for so long is dead, even if nobody closed it."""

POLL_S = 2.0
"""Between two questions where the server does not say."""

REPLY_BYTES = 16 * 1024 * 1024
"""A reply that is a message is never longer."""

_PASSING = {408, 429, 502, 503, 504, 507}
_ERRORS: dict[str, type[SplitFrozenError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, SplitFrozenError)
}
_FOUR_PARTS = re.compile(r"(.*?): got (.*?); allowed: (.*?); (.*)", re.DOTALL)


def network(context: ssl.SSLContext) -> httpx2.HTTPTransport:
    """Return the real network, trusting the servers that `context` trusts.

    The certificate was fetched directly (see `pinning`), so proxies are not asked for.
    """
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        # Megabytes waiting in the kernel would make a slow link look like a silent server.
        options.append((socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 128 * 1024))
    return httpx2.HTTPTransport(verify=context, trust_env=False, socket_options=options)


class HttpClient:
    """Requests to one server. Threads may share it."""

    def __init__(self, base_url: str, patience: Patience, transport: httpx2.BaseTransport) -> None:
        """Args: `base_url` as in "https://host:8443"; `transport`: `network(context)`."""
        self._patience = patience
        self._client = httpx2.Client(
            base_url=base_url,
            transport=transport,
            timeout=httpx2.Timeout(SILENCE_S, connect=CONNECT_S),
            headers={
                "User-Agent": f"splitfrozen/{__version__}",
                "Accept-Encoding": "identity",
                "Content-Type": "application/msgpack",
            },
        )

    def close(self) -> None:
        self._client.close()

    def authorize(self, secret: str) -> None:
        """Send `secret` as bearer token from now on."""
        self._client.headers["Authorization"] = f"Bearer {secret}"

    def get(self, path: str, kind: type[_T]) -> _T:
        """Return the reply to GET, decoded. Raises as `put`."""
        return self._decode(path, self._insist("GET", path)[1], kind)

    def poll(self, path: str, kind: type[_T], until: str) -> _T:
        """Like `get`, asking again for as long as the server answers 202 (not yet).

        `until` tells people what is waited for.
        """
        told = False
        while True:
            response, body = self._insist("GET", path)
            if response.status_code != 202:
                return self._decode(path, body, kind)
            if not told:
                _log.info("waiting until %s", until)
                told = True
            asked_s = _retry_after(response)
            self._patience.rest(POLL_S if asked_s is None else asked_s)

    def post(self, path: str, message: Message, kind: type[_T] | None = None) -> _T | None:
        """Send a message; return the reply, decoded, where `kind` says what it is."""
        _, body = self._insist("POST", path, msgspec.msgpack.encode(message))
        return None if kind is None else self._decode(path, body, kind)

    def put(self, path: str, body: bytes, kind: type[_T] | None = None) -> _T | None:
        """Send bytes.

        Raises:
            UnreachableError: no answer, or a passing trouble that did not pass.
            RefusedError, or the class that the server names: it said no.
            WireError: the reply is not what it should be.
        """
        _, reply = self._insist("PUT", path, body)
        return None if kind is None else self._decode(path, reply, kind)

    def tell(self, path: str, message: Message) -> None:
        """Send a message once, as well as it goes."""
        try:
            self._exchange("POST", path, msgspec.msgpack.encode(message), httpx2.Timeout(5.0))
        except Exception as error:
            # Whatever prevents it must not hide the error that the message tells of.
            _log.debug("%s was not told: %s", path, error)

    def download(self, ref: FileRef, folder: Path) -> Path:
        """Return the path of a file in `folder`, named by its hash, fetched if it is not there.

        A cut download continues where it ended; one that comes out wrong starts again, once.

        Raises:
            WireError: the server's file is not what its name says.
            StoreError: no space, or the folder cannot be written.
            UnreachableError, RefusedError: as `put`.
        """
        path, part = folder / ref.sha256, folder / f"{ref.sha256}.part"
        try:
            if path.exists():
                if _hash(path) == ref.sha256:
                    return path
                _log.warning("%s is damaged on disk; fetching it again", ref.name)
                path.unlink()
            for _ in range(2):
                self._patience.persist(f"fetching {ref.name}", lambda: self._fetch(ref, part))
                if _hash(part) == ref.sha256:
                    return part.replace(path)
                part.unlink()
        except OSError as error:
            raise StoreError(
                f"cannot keep {ref.name} in {folder}",
                got=error.strerror or str(error),
                allowed=f"a folder that takes {ref.bytes} bytes",
                remedy="free space or choose another --state folder",
            ) from error
        raise WireError(
            f"the server's {ref.name} is not the file it announced",
            got="another sha256, twice",
            allowed=ref.sha256,
            remedy="tell who runs the server",
        )

    def _fetch(self, ref: FileRef, part: Path) -> None:
        """One attempt to complete `part`. Raises Again where the connection ends before."""
        part.touch()
        have = part.stat().st_size
        if have > ref.bytes:
            part.write_bytes(b"")
            have = 0
        free = shutil.disk_usage(part.parent).free
        if free < ref.bytes - have:
            raise StoreError(
                f"no space for {ref.name} in {part.parent}",
                got=f"{free} bytes free",
                allowed=f"at least {ref.bytes - have}",
                remedy="free space or choose another --state folder",
            )
        if have == ref.bytes:
            return
        grown = 0
        path, headers = f"/v1/files/{ref.sha256}", {"Range": f"bytes={have}-"} if have else {}
        try:
            with self._stream("GET", path, headers=headers) as response:
                if response.status_code == 416:
                    part.unlink()
                    raise Again("the server does not continue this file")
                _raise_for(response)
                resumed = response.status_code == 206 and _start(response) == have
                room = ref.bytes - (have if resumed else 0)
                with part.open("ab" if resumed else "wb") as file:
                    for block in _bounded(response, room):
                        grown += file.write(block)
        except Again as again:
            raise Again(again.reason, again.wait_s, moved=grown > 0) from again
        if grown < room:
            raise Again("the connection ended early", moved=grown > 0)

    def _insist(
        self, method: str, path: str, body: bytes | None = None
    ) -> tuple[httpx2.Response, bytes]:
        return self._patience.persist(
            f"{method} {path}", lambda: self._exchange(method, path, body)
        )

    def _exchange(
        self, method: str, path: str, body: bytes | None, timeout: httpx2.Timeout | None = None
    ) -> tuple[httpx2.Response, bytes]:
        extra = {} if timeout is None else {"timeout": timeout}
        with self._stream(method, path, content=body, **extra) as response:
            _raise_for(response)
            return response, b"".join(_bounded(response, REPLY_BYTES))

    @contextmanager
    def _stream(self, method: str, path: str, **options: Any) -> Iterator[httpx2.Response]:
        try:
            with self._client.stream(method, path, **options) as response:
                yield response
        except (
            httpx2.TimeoutException,
            httpx2.NetworkError,
            httpx2.RemoteProtocolError,
        ) as error:
            refusal = tls_refusal(error)
            if refusal is not None:
                raise refusal from error
            raise Again(str(error) or type(error).__name__) from error

    def _decode(self, path: str, body: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise WireError(
                f"the server's reply to {path} is not understood",
                got=str(error),
                allowed="the messages of this splitfrozen version",
                remedy="install the splitfrozen version of the server",
            ) from error


class HttpUploader:
    """Chunks over HTTPS, as `records.Uploader`."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def stored(self) -> set[int]:
        """Indices of the chunks that the server has already."""
        return set(self._client.get("/v1/chunks", list[Count]))

    def put(self, chunk: Chunk) -> Receipt:
        """Return once the chunk is durable. Raises as `HttpClient.put`."""
        receipt = self._client.put(f"/v1/chunks/{chunk.sha256}", chunk.frame, Receipt)
        assert receipt is not None
        if receipt.index != chunk.index:
            raise WireError(
                "the server acknowledged another chunk",
                got=receipt.index,
                allowed=str(chunk.index),
                remedy="tell who runs the server",
            )
        return receipt


def _bounded(response: httpx2.Response, limit: int) -> Iterator[bytes]:
    """The body, as long as it is not longer than `limit`. Raises WireError."""
    total = 0
    for block in response.iter_raw():
        total += len(block)
        if total > limit:
            raise WireError(
                f"the server's reply to {response.request.url.path} is too long",
                got=f"more than {limit} bytes",
                allowed=f"{limit} bytes",
                remedy="tell who runs the server",
            )
        yield block


def _raise_for(response: httpx2.Response) -> None:
    """Raise what a status other than success stands for: Again, or the server's refusal."""
    status = response.status_code
    if 200 <= status < 300:
        return
    body = b"".join(_bounded(response, REPLY_BYTES))
    try:
        refusal = msgspec.msgpack.decode(body, type=Refusal)
    except msgspec.MsgspecError:
        refusal = Refusal("RefusedError", f"HTTP {status}")
    if status in _PASSING:
        raise Again(f"the server answers {status}: {refusal.message}", _retry_after(response))
    kind = _ERRORS.get(refusal.error, RefusedError)
    parts = _FOUR_PARTS.fullmatch(refusal.message)
    if parts is not None:
        what, got, allowed, remedy = parts.groups()
        raise kind(what, got=got, allowed=allowed, remedy=remedy)
    raise kind(
        f"the server refused {response.request.url.path}",
        got=refusal.message,
        allowed="a request that it accepts",
        remedy="see the server's log",
    )


def _retry_after(response: httpx2.Response) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text) else None


def _start(response: httpx2.Response) -> int | None:
    """First byte of a 206's range."""
    match = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
