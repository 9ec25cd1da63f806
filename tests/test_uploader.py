"""HTTP that survives: retries, resumed downloads, refusals, and one pinned certificate."""

from __future__ import annotations

import datetime
import hashlib
import http.server
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import httpx2
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from splitfrozen.device.patience import LONGEST_WAIT_S, Again, Patience
from splitfrozen.device.pinning import pinned_context
from splitfrozen.device.uploader import HttpClient, HttpUploader, network
from splitfrozen.errors import (
    DataError,
    RefusedError,
    SplitFrozenError,
    StoreError,
    UnreachableError,
    WireError,
)
from splitfrozen.records import Chunk, Failure, FileRef, Receipt, Refusal

Handler = Callable[[httpx2.Request], httpx2.Response]


class Time:
    """A clock that only sleeping moves; it remembers the naps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.naps: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds

    def patience(self, limit_s: float = 3600.0) -> Patience:
        return Patience(
            limit_s,
            clock=lambda: self.now,
            sleep=self.sleep,
            uniform=lambda _, high: high,
        )


def client(handler: Handler, time: Time | None = None, limit_s: float = 3600.0) -> HttpClient:
    patience = (time or Time()).patience(limit_s)
    return HttpClient("https://server:1", patience, httpx2.MockTransport(handler))


def answer(status: int, body: bytes = b"", **headers: str) -> httpx2.Response:
    """A reply whose body is still to be read, as from the network."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.Response(status, headers=named, stream=httpx2.ByteStream(body))


def refusal(status: int, error: SplitFrozenError) -> httpx2.Response:
    body = msgspec.msgpack.encode(Refusal(type(error).__name__, str(error)))
    return answer(status, body)


def reply(message: object, status: int = 200) -> httpx2.Response:
    return answer(status, msgspec.msgpack.encode(message))


CHUNK = Chunk(index=7, sha256="a" * 64, frame=b"frame" * 1000)


# --- retries -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("silence"),
        httpx2.WriteError("reset"),
        httpx2.RemoteProtocolError("cut"),
        408,
        429,
        502,
        503,
        504,
        507,
    ],
)
def test_passing_trouble_is_waited_out(trouble: Exception | int) -> None:
    time, seen = Time(), []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append((request.method, request.url.path, request.content))
        if len(seen) < 4:
            if isinstance(trouble, Exception):
                raise trouble
            return answer(trouble)
        return reply(Receipt(index=7, stored=3))

    assert HttpUploader(client(handler, time)).put(CHUNK) == Receipt(index=7, stored=3)
    assert seen == [("PUT", f"/v1/chunks/{CHUNK.sha256}", CHUNK.frame)] * 4
    assert time.naps == [0.5, 1.0, 2.0]


def test_back_off_grows_to_its_limit_and_patience_ends() -> None:
    time = Time()

    def handler(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("no route")

    with pytest.raises(UnreachableError, match=r"did not work for 600 s: got no route.*continues"):
        HttpUploader(client(handler, time, limit_s=600)).stored()
    assert max(time.naps) == LONGEST_WAIT_S
    assert 500 < time.now <= 600


def test_jitter_spreads_the_devices() -> None:
    naps: list[float] = []

    def attempt() -> None:
        raise Again("gone")

    for _ in range(20):
        with pytest.raises(UnreachableError):
            Patience(100, clock=lambda: sum(naps), sleep=naps.append).persist("x", attempt)
        naps.append(1e6)
    first = [naps[i + 1] for i, nap in enumerate(naps[:-1]) if nap == 1e6]
    assert len({round(nap, 6) for nap in first}) == len(first)
    assert max(nap for nap in naps if nap < 1e6) <= LONGEST_WAIT_S


def test_retry_after_is_kept_to_and_cut() -> None:
    time, asked = Time(), ["7", "999999", "soon"]

    def handler(_: httpx2.Request) -> httpx2.Response:
        if asked:
            return answer(503, Retry_After=asked.pop(0))
        return reply([])

    assert HttpUploader(client(handler, time)).stored() == set()
    # The jitter's upper end is a quarter more; an unreadable value falls back to the back-off.
    assert time.naps == [7 * 1.25, 60 * 1.25, 2.0]


def test_not_yet_is_asked_again_without_end() -> None:
    time, count = Time(), 0

    def handler(_: httpx2.Request) -> httpx2.Response:
        nonlocal count
        count += 1
        if count <= 300:
            return answer(202, Retry_After="30")
        return reply([1, 2])

    assert client(handler, time).poll("/v1/assignment", list[int], "all are there") == [1, 2]
    assert time.now > 3600


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 500])
def test_a_refusal_keeps_its_class_and_words_and_is_not_repeated(status: int) -> None:
    said = DataError("row: bad", got="a; b", allowed="c", remedy="mend; it")
    count = 0

    def handler(_: httpx2.Request) -> httpx2.Response:
        nonlocal count
        count += 1
        return refusal(status, said)

    with pytest.raises(DataError) as caught:
        HttpUploader(client(handler)).put(CHUNK)
    assert str(caught.value) == str(said)
    assert count == 1


def test_a_refusal_of_no_known_form_is_still_one() -> None:
    with pytest.raises(RefusedError, match="HTTP 418"):
        client(lambda _: answer(418, b"tea")).get("/v1/run", list[int])
    unknown = msgspec.msgpack.encode(Refusal("Exception", "no"))
    with pytest.raises(RefusedError, match="got no; allowed"):
        client(lambda _: answer(400, unknown)).get("/v1/run", list[int])


def test_the_disk_full_message_reaches_the_person_when_patience_ends() -> None:
    full = StoreError("disk full", got="0 bytes", allowed="more", remedy="free space")
    with pytest.raises(UnreachableError, match="507: disk full"):
        HttpUploader(client(lambda _: refusal(507, full), limit_s=10)).put(CHUNK)


def test_what_is_no_message_is_a_wire_error() -> None:
    for body in (b"", b"<html>", msgspec.msgpack.encode({"index": -1, "stored": 0})):
        with pytest.raises(WireError, match="not understood"):
            HttpUploader(client(lambda _, b=body: answer(200, b))).put(CHUNK)
    with pytest.raises(WireError, match="acknowledged another chunk"):
        HttpUploader(client(lambda _: reply(Receipt(index=8, stored=0)))).put(CHUNK)


def test_an_endless_reply_is_cut() -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1 << 20
            yield bytes(1 << 20)

    with pytest.raises(WireError, match="too long"):
        client(lambda _: httpx2.Response(200, content=endless())).get("/v1/run", list[int])
    assert sent <= 18 << 20


def test_a_bearer_token_is_sent_once_known() -> None:
    seen: list[str | None] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get("Authorization"))
        return reply([])

    one = client(handler)
    one.get("/v1/chunks", list[int])
    one.authorize("secret")
    one.get("/v1/chunks", list[int])
    assert seen == [None, "Bearer secret"]


def test_telling_of_a_failure_never_fails_and_never_waits() -> None:
    time, seen = Time(), []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append(msgspec.msgpack.decode(request.content, type=Failure))
        raise httpx2.ConnectError("gone")

    client(handler, time).tell("/v1/failure", Failure("out of memory"))
    assert seen == [Failure("out of memory")]
    assert time.naps == []


# --- downloads ---------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 4000
REF = FileRef(name="weights.bin", sha256=hashlib.sha256(CONTENT).hexdigest(), bytes=len(CONTENT))


def serve(request: httpx2.Request, content: bytes = CONTENT, until: int | None = None) -> Handler:
    """Answer as a server with ranges does; the connection ends at byte `until` of the reply."""
    start = int(request.headers.get("Range", "bytes=0-")[6:-1])

    def body() -> Iterator[bytes]:
        yield content[start : start + until if until is not None else None]
        if until is not None and start + until < len(content):
            raise httpx2.ReadError("cut")

    headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
    if start:
        return httpx2.Response(206, content=body(), headers=headers)
    return httpx2.Response(200, content=body())


def test_a_cut_download_continues_where_it_ended(tmp_path: Path) -> None:
    starts: list[str | None] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        starts.append(request.headers.get("Range"))
        return serve(request, until=300_000 if len(starts) < 4 else None)

    path = client(handler).download(REF, tmp_path)
    assert path.read_bytes() == CONTENT
    assert path == tmp_path / REF.sha256
    assert starts[0] is None
    assert starts[1:] == ["bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert [entry.name for entry in tmp_path.iterdir()] == [REF.sha256]


def test_a_slow_download_that_moves_outlasts_patience(tmp_path: Path) -> None:
    time, count = Time(), 0

    def handler(request: httpx2.Request) -> httpx2.Response:
        nonlocal count
        count += 1
        return serve(request, until=70_000)

    path = client(handler, time, limit_s=3).download(REF, tmp_path)
    assert path.read_bytes() == CONTENT
    assert time.now > 3
    assert count > 10


def test_a_file_that_is_there_is_not_fetched_and_a_damaged_one_is(tmp_path: Path) -> None:
    count = 0

    def handler(request: httpx2.Request) -> httpx2.Response:
        nonlocal count
        count += 1
        return serve(request)

    one = client(handler)
    one.download(REF, tmp_path)
    one.download(REF, tmp_path)
    assert count == 1
    (tmp_path / REF.sha256).write_bytes(b"x" * len(CONTENT))
    assert one.download(REF, tmp_path).read_bytes() == CONTENT
    assert count == 2


def test_a_wrong_part_file_starts_again_from_zero(tmp_path: Path) -> None:
    starts: list[str | None] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        starts.append(request.headers.get("Range"))
        return serve(request)

    (tmp_path / f"{REF.sha256}.part").write_bytes(b"wrong" * 100)
    assert client(handler).download(REF, tmp_path).read_bytes() == CONTENT
    assert starts == ["bytes=500-", None]


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 5])
def test_a_full_part_file_is_taken_or_dropped_by_its_hash(tmp_path: Path, size: int) -> None:
    count = 0

    def handler(request: httpx2.Request) -> httpx2.Response:
        nonlocal count
        count += 1
        return serve(request)

    (tmp_path / f"{REF.sha256}.part").write_bytes((CONTENT + b"extra")[:size])
    assert client(handler).download(REF, tmp_path).read_bytes() == CONTENT
    assert count == (0 if size == len(CONTENT) else 1)


def test_a_server_without_ranges_is_taken_from_the_start(tmp_path: Path) -> None:
    (tmp_path / f"{REF.sha256}.part").write_bytes(CONTENT[:500])
    whole = client(lambda _: answer(200, CONTENT))
    assert whole.download(REF, tmp_path).read_bytes() == CONTENT

    def unsatisfiable(request: httpx2.Request) -> httpx2.Response:
        return answer(416) if "Range" in request.headers else serve(request)

    (tmp_path / REF.sha256).unlink()
    (tmp_path / f"{REF.sha256}.part").write_bytes(CONTENT[:500])
    assert client(unsatisfiable).download(REF, tmp_path).read_bytes() == CONTENT


def test_another_content_twice_is_a_wire_error(tmp_path: Path) -> None:
    count = 0

    def handler(_: httpx2.Request) -> httpx2.Response:
        nonlocal count
        count += 1
        return answer(200, CONTENT[::-1])

    with pytest.raises(WireError, match="not the file it announced"):
        client(handler).download(REF, tmp_path)
    assert count == 2
    assert list(tmp_path.iterdir()) == []


def test_a_longer_file_than_announced_is_cut(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="too long"):
        client(lambda _: answer(200, CONTENT * 2)).download(REF, tmp_path)
    assert sum(entry.stat().st_size for entry in tmp_path.iterdir()) <= len(CONTENT)


def test_a_disk_without_space_is_told_before_the_download(tmp_path: Path) -> None:
    huge = FileRef(name="weights.bin", sha256="0" * 64, bytes=2**60)

    def handler(_: httpx2.Request) -> httpx2.Response:
        raise AssertionError("nothing should be asked for")

    with pytest.raises(StoreError, match="no space"):
        client(handler).download(huge, tmp_path)
    with pytest.raises(StoreError, match="cannot keep"):
        client(handler).download(REF, tmp_path / "missing")


# --- the pinned certificate --------------------------------------------------------------------


def certificate(folder: Path, days: int = 10) -> tuple[Path, str]:
    """A self-signed certificate and key in one PEM file, and its fingerprint."""
    folder.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "splitfrozen")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=20))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("10.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return pem, made.fingerprint(hashes.SHA256()).hex()


class Server(http.server.ThreadingHTTPServer):
    """Answers GET /v1/chunks; counts the requests that came through its TLS."""

    daemon_threads = True

    def __init__(self, pem: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Answer)
        self.requests: list[str] = []
        self.open: list[ssl.SSLSocket] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        self.context = context

    def get_request(self) -> tuple[ssl.SSLSocket, tuple[str, int]]:
        plain, address = super().get_request()
        plain.settimeout(5)
        self.open.append(self.context.wrap_socket(plain, server_side=True))
        return self.open[-1], address

    def handle_error(self, *_: object) -> None:
        """A client that refuses us is no error here."""


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        body = msgspec.msgpack.encode([3, 5])
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def running(pem: Path, port: int = 0) -> Iterator[Server]:
    server = Server(pem, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        for connection in server.open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()


@contextmanager
def connect(server: Server, context: ssl.SSLContext) -> Iterator[HttpUploader]:
    url = f"https://127.0.0.1:{server.server_port}"
    with closing(HttpClient(url, Time().patience(3), network(context))) as one:
        yield HttpUploader(one)


def test_the_pinned_certificate_is_accepted_on_any_address(tmp_path: Path) -> None:
    pem, fingerprint = certificate(tmp_path)
    with running(pem) as server:
        context = pinned_context("127.0.0.1", server.server_port, fingerprint, Time().patience())
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
        with connect(server, context) as uploader:
            assert uploader.stored() == {3, 5}
        assert server.requests == ["/v1/chunks"]


def test_another_fingerprint_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    pem, fingerprint = certificate(tmp_path)
    wrong = ("0" if fingerprint[0] != "0" else "1") + fingerprint[1:]
    with running(pem) as server:
        with pytest.raises(RefusedError, match="not the one of the join string") as caught:
            pinned_context("127.0.0.1", server.server_port, wrong, Time().patience())
        assert fingerprint in str(caught.value)
        assert server.requests == []


def test_a_changed_certificate_is_refused_on_a_later_connection(tmp_path: Path) -> None:
    pem, fingerprint = certificate(tmp_path / "one")
    other, _ = certificate(tmp_path / "two")
    with running(pem) as server:
        context = pinned_context("127.0.0.1", server.server_port, fingerprint, Time().patience())
    with running(other) as server:
        with (
            connect(server, context) as uploader,
            pytest.raises(RefusedError, match="certificate is not accepted"),
        ):
            uploader.stored()
        assert server.requests == []


def test_an_expired_certificate_is_refused_with_the_clock_named(tmp_path: Path) -> None:
    pem, fingerprint = certificate(tmp_path, days=-1)
    with running(pem) as server:
        context = pinned_context("127.0.0.1", server.server_port, fingerprint, Time().patience())
        with (
            connect(server, context) as uploader,
            pytest.raises(RefusedError, match=r"expired.*clock"),
        ):
            uploader.stored()
        assert server.requests == []


def test_a_server_without_tls_is_refused_and_an_absent_one_waited_for(tmp_path: Path) -> None:
    plain = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    plain.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
    port = plain.server_port
    thread = threading.Thread(target=plain.handle_request)
    thread.start()
    with pytest.raises(RefusedError, match="does not speak TLS"):
        pinned_context("127.0.0.1", port, "0" * 64, Time().patience())
    thread.join()
    plain.server_close()
    _, fingerprint = certificate(tmp_path)
    time = Time()
    with pytest.raises(UnreachableError, match="refused"):
        pinned_context("127.0.0.1", port, fingerprint, time.patience(30))
    assert len(time.naps) > 3


def test_a_connection_is_made_anew_after_the_server_restarts(tmp_path: Path) -> None:
    pem, fingerprint = certificate(tmp_path)
    with ExitStack() as client_side:
        with running(pem) as server:
            port = server.server_port
            context = pinned_context("127.0.0.1", port, fingerprint, Time().patience())
            uploader = client_side.enter_context(connect(server, context))
            assert uploader.stored() == {3, 5}
        with running(pem, port) as server:
            assert uploader.stored() == {3, 5}
            assert server.requests == ["/v1/chunks"]
