"""Connections that bring nothing, on a server on loopback: they end, and devices get through."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from splitfrozen.server import connections
from splitfrozen.server.auth import identity
from splitfrozen.server.connections import Connection, Listener, SeldomAccept

SHORT_S = 0.3
PATIENCE_S = 10.0
"""Of a test: what has to end and does not fails it."""
HEAD = b"POST /take HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
LONG = 32 << 20
GET = b"GET /take HTTP/1.1\r\nHost: x\r\n\r\n"


class ShortConnection(Connection):
    head_s = SHORT_S
    stall_s = SHORT_S


class PatientConnection(ShortConnection):
    """With whoever reads slowly only."""

    stall_s = 2 * PATIENCE_S


async def take(request: Request) -> Response:
    return Response(str(len(await request.body())))


async def refuse(request: Request) -> Response:
    """An answer before the body is there."""
    del request
    return Response("no", 401)


async def give(request: Request) -> Response:
    """More than fits into the buffers between server and client."""
    del request
    return Response(bytes(LONG))


async def stream(request: Request) -> Response:
    """The same, never more at once than the buffers take."""
    del request
    return StreamingResponse(iter([bytes(LONG >> 6)] * (1 << 6)))


def application() -> Starlette:
    return Starlette(
        routes=[
            Route("/take", take, methods=["GET", "POST"]),
            Route("/refuse", refuse, methods=["POST"]),
            Route("/give", give),
            Route("/stream", stream),
        ]
    )


@contextmanager
def served(
    http: type[Connection] = ShortConnection, most: int = 64, folder: Path | None = None
) -> Iterator[int]:
    """A server in a thread; with TLS where there is a folder for its certificate. Its port."""
    found = None if folder is None else identity(folder, ["localhost"])
    web = uvicorn.Server(
        uvicorn.Config(
            application(),
            http=http,
            log_config=None,
            access_log=False,
            ssl_certfile=None if found is None else found.certificate,
            ssl_keyfile=None if found is None else found.key,
            timeout_graceful_shutdown=1,
        )
    )
    with Listener(socket.AF_INET, most) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        port = listener.getsockname()[1]
        thread = threading.Thread(target=connections.run, args=(web, listener, SHORT_S))
        thread.start()
        try:
            yield port
        finally:
            web.should_exit = True
            thread.join()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def ended(connection: socket.socket) -> bool:
    """Whether the server ends it before patience does; what comes before that is read."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return True


def answer(connection: socket.socket) -> bytes:
    """Status line, head and a body of a few bytes, which come in one piece or in two."""
    got = b""
    while b"\r\n\r\n" not in got or got.endswith(b"\r\n\r\n"):
        part = connection.recv(4096)
        assert part, got
        got += part
    return got


@pytest.mark.parametrize("begun", [b"", GET[:20]], ids=["nothing", "half a head"])
def test_a_connection_without_a_request_ends(begun: bytes) -> None:
    with served() as port, connect(port) as idle:
        idle.sendall(begun)
        assert ended(idle)


def test_the_next_head_has_its_time_after_an_answer() -> None:
    with served() as port, connect(port) as client:
        client.sendall(GET)
        assert answer(client).endswith(b"0")
        client.sendall(GET)
        assert answer(client).endswith(b"0")
        client.sendall(GET[:20])
        assert ended(client)


def test_a_body_may_take_longer_than_a_head() -> None:
    """Ended would be another connection, which is made later: the time of this one is over."""
    with served() as port, connect(port) as client:
        client.sendall(HEAD % 6 + b"abc")
        for _ in range(2):
            with connect(port) as idle:
                assert ended(idle)
        client.sendall(b"def")
        assert answer(client).endswith(b"6")


def test_a_body_that_was_refused_is_not_waited_for() -> None:
    with served() as port, connect(port) as client:
        client.sendall(HEAD.replace(b"/take", b"/refuse") % 10**9 + b"abc")
        assert answer(client).startswith(b"HTTP/1.1 401")
        assert ended(client)


def test_who_does_not_read_the_answer_is_left() -> None:
    with served() as port, connect(port) as client:
        client.sendall(GET.replace(b"/take", b"/stream"))
        assert late(port, client) < LONG


def test_an_answer_on_its_way_is_not_cut() -> None:
    with served(PatientConnection) as port, connect(port) as client:
        client.sendall(GET.replace(b"/take", b"/give"))
        assert late(port, client) > LONG


def test_who_reads_on_is_not_left() -> None:
    """Buffers were full again and again; no time that began then ends the connection later."""

    class Patient(Connection):
        stall_s = 3 * SHORT_S

    with served(Patient) as port, served() as other, connect(port) as client:
        client.sendall(GET.replace(b"/take", b"/stream"))
        with connect(other) as idle:
            assert ended(idle)
        end = b""
        while not end.endswith(b"0\r\n\r\n"):
            end = end[-8:] + client.recv(1 << 16)
        for _ in range(4):
            with connect(other) as idle:
                assert ended(idle)
        client.sendall(GET)
        assert answer(client).endswith(b"0")


def late(port: int, client: socket.socket) -> int:
    """How many bytes come where they are read only when others have been ended."""
    for _ in range(3):
        with connect(port) as idle:
            assert ended(idle)
    got = 0
    with contextlib.suppress(ConnectionError):
        while got <= LONG and (part := client.recv(1 << 16)):
            got += len(part)
    return got


def test_with_tls_the_handshake_has_a_limit_too(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with served(PatientConnection, folder=tmp_path) as port, connect(port) as silent:
        assert ended(silent)
        with connect(port) as plain, context.wrap_socket(plain) as idle:
            assert ended(idle)
        with connect(port) as plain, context.wrap_socket(plain) as client:
            client.sendall(HEAD % 3 + b"abc")
            assert answer(client).endswith(b"3")


def test_one_peer_gets_half_of_the_connections(caplog: pytest.LogCaptureFixture) -> None:
    with served(Connection, most=4) as port, connect(port) as first, connect(port) as second:
        for client in (first, second):
            client.sendall(GET)
            assert answer(client).endswith(b"0")
        for _ in range(3):
            with connect(port) as third:
                assert ended(third)
        # Those that are open go on, and a place that is left is taken by the next.
        first.sendall(GET)
        assert answer(first).endswith(b"0")
        second.close()
        assert until(lambda: accepted(port))
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert told == ["refused a connection from 127.0.0.1: 2 are open, 2 of them from there"]


def accepted(port: int) -> bool:
    with connect(port) as client, contextlib.suppress(ConnectionError):
        client.sendall(GET)
        return client.recv(4096) != b""
    return False


def until(holds: Callable[[], bool]) -> bool:
    return any(holds() for _ in range(1000))


def test_two_peers_get_no_more_than_all() -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(Listener(socket.AF_INET, 3))
        listener.bind(("0.0.0.0", 0))  # noqa: S104 -- every address of loopback
        listener.listen(8)
        port = listener.getsockname()[1]
        taken, refused = [], 0
        for last in (1, 2, 3, 4, 5):
            stack.enter_context(
                socket.create_connection(("127.0.0.1", port), source_address=(f"127.0.0.{last}", 0))
            )
            try:
                taken.append(stack.enter_context(listener.accept()[0]))
            except ConnectionAbortedError:
                refused += 1
        assert (len(taken), refused) == (3, 2)
        # Closed twice, it leaves one place.
        taken[0].close()
        taken[0].close()
        for last, fits in ((6, True), (7, False)):
            stack.enter_context(
                socket.create_connection(("127.0.0.1", port), source_address=(f"127.0.0.{last}", 0))
            )
            with contextlib.nullcontext() if fits else pytest.raises(ConnectionAbortedError):
                stack.enter_context(listener.accept()[0])


@pytest.mark.parametrize(
    ("host", "peer"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_peer_is_an_address_or_a_network(host: str, peer: str) -> None:
    assert connections._peer(host) == peer


def test_the_file_limit_is_raised_and_bounds_the_connections() -> None:
    """In a process of its own, whose limits are its own."""
    code = """
import resource
from splitfrozen.server import connections
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 300))
print(connections.most_connections())
connections.raise_file_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], connections.most_connections())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["128", "300", "172"]


def test_asyncio_complains_once_a_minute() -> None:
    now = [0.0]
    seldom = SeldomAccept(lambda: now[0])

    def passes(message: str) -> bool:
        record = logging.LogRecord("asyncio", logging.ERROR, "", 0, message, None, None)
        return bool(seldom.filter(record))

    complaint = "socket.accept() out of system resource\nsocket: <...>"
    assert [passes(complaint) for _ in range(3)] == [True, False, False]
    assert passes("another one")
    now[0] = connections.QUIET_S
    assert [passes(complaint) for _ in range(2)] == [True, False]


def test_the_filter_is_installed_once() -> None:
    log = logging.getLogger("asyncio")
    before = list(log.filters)
    try:
        connections.quieten_accept()
        connections.quieten_accept()
        assert len([one for one in log.filters if isinstance(one, SeldomAccept)]) == 1
    finally:
        log.filters[:] = before
