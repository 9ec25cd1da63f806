"""Connections that bring nothing, and too many of them: neither keeps the devices out.

What an endpoint may take is `app.py`'s; this is what comes before a request. Whoever reaches the
port, without any credential, is limited in how many connections are open (refused as they are
accepted, so that a TLS handshake that never ends counts too) and in how long each may be without a
whole request head. A body may take as long as `app.py` allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import socket
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 20.0
"""For a TLS handshake, and then for each head of a request: since the connection was made, or since
the answer before. Without a byte, uvicorn closes 5 s after an answer."""
STALL_S = 120.0
"""For a peer to read on. asyncio's buffers hold 400 kB: less than `app.LEAST_BPS` takes longer."""
FILES = 65536
RESERVE = 128
"""Files that are not connections: segments, databases, logs, libraries."""
MOST = 4096
"""Connections, however many files there may be: one with TLS takes 0.3 MB."""
QUIET_S = 60.0

_log = logging.getLogger(__name__)


def raise_file_limit() -> None:
    """Let this process, and those that it starts, open as many files as they may, up to `FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Some systems have a lower limit that they do not tell: then it stays as it was.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """How many the file limit has room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else min(max(soft - RESERVE, 2), MOST)


class Listener(socket.socket):
    """A TCP socket that accepts at most `most` connections at once, half of them from one peer."""

    def __init__(self, family: socket.AddressFamily, most: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._most = most
        self._open: Counter[str] = Counter()
        self._may_tell = _Seldom()

    def accept(self) -> tuple[socket.socket, Any]:
        """Raises ConnectionAbortedError for one that is refused: asyncio then goes on."""
        accepted, address = super().accept()
        peer = _peer(address[0])
        if self._open.total() >= self._most or self._open[peer] >= max(self._most // 2, 1):
            accepted.close()
            if self._may_tell():
                _log.warning(
                    "refused a connection from %s: %d are open, %d of them from there",
                    peer,
                    self._open.total(),
                    self._open[peer],
                )
            raise ConnectionAbortedError
        self._open[peer] += 1
        return _Accepted(accepted, lambda: self._left(peer)), address

    def _left(self, peer: str) -> None:
        self._open[peer] -= 1
        if not self._open[peer]:
            del self._open[peer]


class _Accepted(socket.socket):
    """A connection that tells when it is closed, once."""

    def __init__(self, accepted: socket.socket, left: Callable[[], None]) -> None:
        family, kind, protocol = accepted.family, accepted.type, accepted.proto
        super().__init__(family, kind, protocol, fileno=accepted.detach())
        self._left = weakref.finalize(self, left)

    def close(self) -> None:
        super().close()
        self._left()


def _peer(host: str) -> str:
    """Who counts as one: an address; of IPv6 the network of 64 bits, which one machine may fill."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), 64), strict=False))


class Connection(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, ended where the peer brings no request or reads no answer."""

    head_s = HEAD_S
    stall_s = STALL_S
    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head(self.head_s)

    def on_response_complete(self) -> None:
        # An answer is complete for uvicorn when it is in the buffers: it may have to travel yet.
        self._await_head(self.stall_s if self.transport.get_write_buffer_size() else self.head_s)
        super().on_response_complete()

    def _await_head(self, limit_s: float) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = self.loop.call_later(limit_s, self._end_without_head, self.cycle)

    def _end_without_head(self, before: object) -> None:
        # uvicorn makes a cycle of each head. The rest of a body that was answered before it was
        # whole brings none, and is of no use.
        if self.cycle is before:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reads_on()

    def _reads_on(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head is not None:
            self._head.cancel()
        self._reads_on()
        super().connection_lost(exc)


class _Loop(asyncio.SelectorEventLoop):
    """The standard library's, as others do not ask `Listener.accept`. uvicorn sets no limits on
    TLS: a handshake has a minute, and what is left to send when a connection is closed half one."""

    def __init__(self, handshake_s: float) -> None:
        super().__init__()
        self._handshake_s = handshake_s

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:
        if options.get("ssl"):
            options["ssl_handshake_timeout"] = self._handshake_s
            options["ssl_shutdown_timeout"] = STALL_S
        server: asyncio.Server = await super().create_server(*args, **options)
        return server


def run(web: uvicorn.Server, listener: Listener, handshake_s: float = HEAD_S) -> None:
    """Serve until `web.should_exit`; its configuration has `http=Connection`."""
    with asyncio.Runner(loop_factory=lambda: _Loop(handshake_s)) as runner:
        runner.run(web.serve(sockets=[listener]))


class _Seldom:
    """True at most once in `QUIET_S`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = -float("inf")

    def __call__(self) -> bool:
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + QUIET_S
        return True


class SeldomAccept(logging.Filter):
    """Without files left, asyncio complains 2048 times a second, with a traceback each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._may_tell = _Seldom(clock)

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("socket.accept() out of") or self._may_tell()


def quieten_accept() -> None:
    """Let asyncio's complaint that no connection can be accepted into the log once a minute."""
    log = logging.getLogger("asyncio")
    if not any(isinstance(one, SeldomAccept) for one in log.filters):
        log.addFilter(SeldomAccept())
