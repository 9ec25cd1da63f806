"""A device: the pipeline against good and bad uploaders, and the whole way over TLS."""

from __future__ import annotations

import _thread
import datetime
import hashlib
import http.server
import io
import json
import logging
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import msgspec
import numpy as np
import onnx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from splitfrozen.device.agent import JoinRequest, Member, be_device, join_command
from splitfrozen.device.patience import Patience
from splitfrozen.device.pipeline import (
    QUEUE,
    THREADS,
    Fixed,
    Making,
    Work,
    merged,
    upload_all,
)
from splitfrozen.device.plan import plan_chunks
from splitfrozen.device.progress import Progress
from splitfrozen.device.state import DeviceState, hold, state_folder
from splitfrozen.device.uploader import HttpClient
from splitfrozen.errors import (
    ConfigError,
    DataError,
    ModelError,
    RefusedError,
    RequestError,
    StoreError,
    UnreachableError,
    WireError,
)
from splitfrozen.records import (
    Announcement,
    Assignment,
    Chunk,
    ChunkSpan,
    DeviceProfile,
    DeviceReport,
    Enrolled,
    Enrolment,
    Failure,
    FileRef,
    Floats,
    FrontManifest,
    Message,
    Receipt,
    Refusal,
    RunInfo,
    Sample,
    TaskSpec,
)
from splitfrozen.server.reports import check_report
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, unpack
from splitfrozen.wire.join import JoinString

WIDTH = 8

# --- the pipeline ------------------------------------------------------------------------------


class NumpyFront:
    """Token id and position into a row; counts what it computes."""

    depth = 2

    def __init__(self, fail_at: int | None = None, value: float = 0.0) -> None:
        self.computed: list[int] = []
        self.fail_at = fail_at
        self.value = value

    def __call__(self, batch: Sequence[Sample]) -> list[Floats]:
        if self.fail_at is not None and len(self.computed) >= self.fail_at:
            raise ModelError("broken", got="this", allowed="that", remedy="mend")
        self.computed += [sample.id for sample in batch]
        return [self.hidden(sample) + np.float32(self.value) for sample in batch]

    @staticmethod
    def hidden(sample: Sample) -> Floats:
        rows = sample.tokens[:, None] + np.arange(WIDTH) / WIDTH + sample.id
        return rows.astype(np.float32)


class Memory:
    """An uploader that keeps everything."""

    def __init__(self) -> None:
        self.frames: dict[int, bytes] = {}

    def stored(self) -> set[int]:
        return set(self.frames)

    def put(self, chunk: Chunk) -> Receipt:
        assert hashlib.sha256(chunk.frame).hexdigest() == chunk.sha256
        new = chunk.index not in self.frames
        self.frames[chunk.index] = chunk.frame
        return Receipt(index=chunk.index, stored=int(new))

    def samples(self) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for frame in self.frames.values():
            header, encoded = unpack(frame)
            for one in encoded:
                assert one.sample not in found
                found[one.sample] = codec(header.codec).decode(one.payload, one.tokens, WIDTH)
        return found


class Lossy(Memory):
    """Keeps a chunk and swallows the acknowledgement, every third time."""

    puts = 0

    def put(self, chunk: Chunk) -> Receipt:
        receipt = super().put(chunk)
        self.puts += 1
        if self.puts % 3 == 0:
            raise UnreachableError("lost", got="nothing", allowed="a reply", remedy="again")
        return receipt


def samples(count: int = 300) -> list[Sample]:
    draw = np.random.default_rng(3)
    made = []
    for number in range(count):
        tokens = draw.integers(0, 50, int(draw.integers(5, 60))).astype(np.int32)
        target = np.array([number % 2], np.int32)
        made.append(Sample(number, tokens, None, None, target, len(tokens)))
    return made


def work(front: NumpyFront, rows: Sequence[Sample], name: str = "float16+zstd") -> Work:
    one = codec(name)
    chunks = plan_chunks(rows, lambda t: one.most_bytes(t, WIDTH), 1 << 14, 0, "device-0")
    assert len(chunks) > 8
    origin = Origin("run", "device-0", "0" * 64, 2, WIDTH, name)
    return Work(rows, chunks, Fixed(Making(front, one, origin)))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, though whoever started the tests may have told them to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(task: Work, uploader: Memory) -> DeviceReport:
    return upload_all(task, uploader, Progress(len(task.samples)), threading.Event())


def stages_end() -> None:
    """Wait for the threads; one that was told to stop may take a moment longer than STOP_S."""
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS):
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} goes on"


def test_every_sample_arrives_once_and_is_what_the_front_made() -> None:
    rows, front, server = samples(), NumpyFront(), Memory()
    task = work(front, rows)
    report = run(task, server)
    arrived = server.samples()
    assert sorted(arrived) == list(range(len(rows)))
    for sample in rows:
        hidden = NumpyFront.hidden(sample)
        assert (
            np.abs(arrived[sample.id] - hidden) <= task.pilot.making().codec.error_bound(hidden)
        ).all()
    assert report.chunks == len(task.chunks) == len(server.frames)
    assert report.bytes_up == sum(map(len, server.frames.values()))
    assert 0 < report.padding < 0.1
    assert report.seconds > 0
    assert min(report.compute_s, report.encode_s, report.upload_s) > 0
    assert [span.first for span in report.spans] == [chunk.index for chunk in task.chunks]
    assert [span.bytes for span in report.spans] == [len(server.frames[i]) for i in server.frames]
    check_report(report, len(rows))


def test_the_report_says_when_each_stage_worked_on_each_chunk() -> None:
    rows, front = samples(), NumpyFront()
    task = work(front, rows)

    class Slow(Memory):
        def put(self, chunk: Chunk) -> Receipt:
            time.sleep(0.01)
            return super().put(chunk)

    spans = run(task, Slow()).spans
    assert {(span.first, span.last, span.chunks) for span in spans} == {
        (chunk.index, chunk.index, 1) for chunk in task.chunks
    }
    ends = [[begin + lasts for begin, lasts in (s.front, s.encode, s.send)] for s in spans]
    for span, (front_end, encode_end, _) in zip(spans, ends, strict=True):
        assert front_end <= span.encode[0]
        assert encode_end <= span.send[0]
        assert span.send[1] >= 0.01
    for k in range(1, len(spans)):
        # One chunk at a time in each stage, and no further ahead than the queues allow: what the
        # event log takes for granted.
        assert ends[k - 1][0] <= spans[k].front[0]
        assert ends[k - 1][1] <= spans[k].encode[0]
        assert ends[k - 1][2] <= spans[k].send[0]
        if k >= 2 + QUEUE:
            assert ends[k - 2 - QUEUE][1] <= spans[k].front[0]
            assert ends[k - 2 - QUEUE][2] <= spans[k].encode[0]
        if k >= 3 + 2 * QUEUE:
            assert ends[k - 3 - 2 * QUEUE][2] <= spans[k].front[0]


def test_many_spans_become_few_and_their_sums_stay() -> None:
    spans = [
        ChunkSpan(2 * i, 2 * i, 3, 1, 10 + i, (i, 0.5), (i + 0.5, 0.25), (i + 0.75, 0.25))
        for i in range(10)
    ]
    assert merged(spans, 10) == tuple(spans)
    few = merged(spans, 4)
    assert [(s.first, s.last, s.chunks) for s in few] == [
        (0, 4, 3),
        (6, 10, 3),
        (12, 16, 3),
        (18, 18, 1),
    ]
    assert few[1] == ChunkSpan(6, 10, 3, 3, 42, (3, 1.5), (3.5, 0.75), (3.75, 0.75))
    assert sum(s.bytes for s in few) == sum(s.bytes for s in spans)
    check_report(DeviceReport(seconds=10.0, padding=0.0, spans=few), 19)
    assert merged([], 4) == ()


def test_a_restarted_device_computes_only_what_is_missing_and_makes_the_same_bytes() -> None:
    rows, whole = samples(), Memory()
    run(work(NumpyFront(), rows), whole)
    server, killed = Memory(), NumpyFront(fail_at=150)
    with pytest.raises(ModelError):
        run(work(killed, rows), server)
    had = set(server.samples())
    assert 0 < len(had) < len(rows)
    again = NumpyFront()
    report = run(work(again, rows), server)
    assert sorted(again.computed) == sorted(set(range(len(rows))) - had)
    assert server.frames == whole.frames
    assert 0 < report.chunks < len(whole.frames)
    idle = run(work(NumpyFront(fail_at=0), rows), server)
    assert (idle.chunks, idle.bytes_up, idle.seconds) == (0, 0, 0.0)


def test_lost_acknowledgements_double_and_lose_nothing() -> None:
    rows, server = samples(), Lossy()
    starts = 0
    while True:
        starts += 1
        try:
            run(work(NumpyFront(), rows), server)
            break
        except UnreachableError:
            continue
    assert starts > 3
    assert sorted(server.samples()) == list(range(len(rows)))
    assert server.puts == len(server.frames)


def test_an_error_of_any_stage_stops_the_others_and_comes_out_once() -> None:
    class Refusing(Memory):
        def put(self, chunk: Chunk) -> Receipt:
            raise RefusedError("no", got=chunk.index, allowed="none", remedy="stop")

    rows = samples()
    front = NumpyFront()
    with pytest.raises(RefusedError, match="no: got 0"):
        run(work(front, rows), Refusing())
    assert len(front.computed) < len(rows)
    with pytest.raises(WireError, match="not finite"):
        run(work(NumpyFront(value=np.inf), rows), Memory())
    with pytest.raises(ModelError, match="broken"):
        run(work(NumpyFront(fail_at=40), rows), Memory())
    stages_end()


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_stops_all_stages_even_in_a_blocked_upload() -> None:
    class Interrupted(Memory):
        def __init__(self, stop: threading.Event) -> None:
            super().__init__()
            self.stop = stop

        def put(self, chunk: Chunk) -> Receipt:
            if len(self.frames) == 3:
                _thread.interrupt_main()
                assert self.stop.wait(20), "nobody stopped"
                raise InterruptedError
            return super().put(chunk)

    rows, stop = samples(), threading.Event()
    interrupted: list[bool] = []
    task = work(NumpyFront(), rows)
    making = replace(task.pilot.making(), interrupt=lambda: interrupted.append(True))
    task = replace(task, pilot=Fixed(making))
    server = Interrupted(stop)
    with pytest.raises(KeyboardInterrupt):
        upload_all(task, server, Progress(len(rows)), stop)
    assert interrupted == [True]
    stages_end()
    rest = Memory()
    rest.frames = server.frames
    run(work(NumpyFront(), rows), rest)
    assert sorted(rest.samples()) == list(range(len(rows)))


def test_a_slow_upload_holds_the_computation_back() -> None:
    front, rows = NumpyFront(), samples()
    task = work(front, rows)
    largest = max(len(chunk.samples) for chunk in task.chunks)
    ahead: list[int] = []

    class Slow(Memory):
        def put(self, chunk: Chunk) -> Receipt:
            time.sleep(0.005)
            ahead.append(len(front.computed) - len(self.samples()))
            return super().put(chunk)

    run(task, Slow())
    # One chunk in the hands of each stage, and what the two queues hold.
    assert max(ahead) <= (3 + 2 * QUEUE) * largest
    assert max(ahead) > largest


# --- progress and state ------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now, screen, file = [0.0], Terminal(), io.StringIO()
    shown = [Progress(100, stream=stream, clock=lambda: now[0]) for stream in (screen, file)]
    for progress in shown:
        progress.begin(40)
        now[0] += 10
        progress.add(20, 5_000_000)
        now[0] += 30
        progress.add(40, 1_000_000)
        progress.close()
    assert "40/100" in screen.getvalue()
    assert "100/100" in screen.getvalue()
    assert "MB/s" in screen.getvalue()
    assert file.getvalue() == ""
    assert caplog.messages == ["100 of 100 samples stored, 1.5 samples/s, 0.15 MB/s, 0 s left"]


def test_a_state_folder_is_private_and_held_by_one(tmp_path: Path) -> None:
    folder = state_folder(tmp_path, "ab" * 32, "token")
    assert folder != state_folder(tmp_path, "ab" * 32, "other")
    assert folder != state_folder(tmp_path, "cd" * 32, "token")
    assert "token" not in folder.name
    with hold(folder) as state:
        assert folder.stat().st_mode & 0o777 == 0o700
        secret = state.identity().secret
        assert (folder / "identity.json").stat().st_mode & 0o077 == 0
        with pytest.raises(RequestError, match="running already"), hold(folder):
            pass
    with hold(folder) as state:
        assert state.identity().secret == secret
        (folder / "identity.json").write_text("{")
        with pytest.raises(StoreError, match="cannot be read"):
            state.identity()


def test_the_default_state_folder_follows_xdg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert state_folder(None, "ab" * 32, "token").parent == tmp_path / "splitfrozen"


def test_a_front_folder_takes_plain_names_only(tmp_path: Path) -> None:
    with hold(tmp_path / "state") as state:
        for name in ("..", "../x", "a/b"):
            ref = FileRef(name=name, sha256="0" * 64, bytes=0)
            with pytest.raises(RefusedError, match="a file that is none"):
                state.front_folder(manifest_of((ref,)))


# --- the whole way -----------------------------------------------------------------------------

WORDS = [f"word{i}" for i in range(49)]


def manifest_of(files: tuple[FileRef, ...]) -> FrontManifest:
    return FrontManifest(
        depth=1,
        width=WIDTH,
        precision="float32",
        hash="1" * 64,
        graph="front.onnx",
        files=files,
        flops_per_token=1000,
        memory_bytes=1,
    )


def table() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((50, WIDTH)).astype(np.float32)


def write_run_files(folder: Path) -> tuple[FrontManifest, FileRef]:
    """An embedding as the front, and a tokenizer of whole words."""
    shape = ["batch", "tokens"]
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["hidden"])],
        "front",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*shape, WIDTH])],
        [numpy_helper.from_array(table(), "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(
        model,
        folder / "front.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    vocabulary = {word: i + 1 for i, word in enumerate(WORDS)} | {"?": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    refs = [
        FileRef(name, hashlib.sha256(data).hexdigest(), len(data))
        for name in ("front.onnx", "weights.bin", "tokenizer.json")
        for data in [(folder / name).read_bytes()]
    ]
    return manifest_of(tuple(refs[:2])), refs[2]


def write_certificate(folder: Path) -> tuple[Path, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "splitfrozen")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "server.pem").write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return folder / "server.pem", made.fingerprint(hashes.SHA256()).hex()


class FakeServer(http.server.ThreadingHTTPServer):
    """The protocol of a server that stores everything; `log` holds what devices asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        pem, fingerprint = write_certificate(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        self.context = context
        self.files = folder
        self.manifest, self.tokenizer = write_run_files(folder)
        self.join = str(JoinString("token", "127.0.0.1", self.server_port, fingerprint))
        self.log: list[str] = []
        self.posted: dict[str, list[bytes]] = {}
        self.secrets: set[str] = set()
        self.uploads = Memory()
        self.refuse_chunk: int | None = None
        self.waits = {"/v1/run": 503, "/v1/assignment": 202}
        self.deeper: FrontManifest | None = None
        """What is assigned once a chunk is there, where that is another front."""

    def get_request(self) -> tuple[ssl.SSLSocket, tuple[str, int]]:
        plain, address = super().get_request()
        plain.settimeout(5)
        return self.context.wrap_socket(plain, server_side=True), address

    def handle_error(self, *_: object) -> None:
        """A device that goes away is no error here."""

    def last(self, path: str, kind: type[Message]) -> Message:
        return msgspec.msgpack.decode(self.posted[path][-1], type=kind)

    def run_info(self) -> RunInfo:
        return RunInfo(
            run="run",
            model="tiny",
            task=TaskSpec(
                kind="classification",
                columns={"text": "text", "label": "label"},
                labels=("no", "yes"),
                max_tokens=40,
            ),
            tokenizer=self.tokenizer,
            probe=self.manifest,
            chunk_bytes=1 << 14,
            seed=0,
        )

    def get(self, path: str) -> object:
        if path == "/v1/run":
            return self.run_info()
        if path == "/v1/assignment":
            deeper = self.deeper if self.uploads.frames else None
            front = deeper or self.manifest
            return Assignment(depth=front.depth, front=front, codec="float32")
        assert path == "/v1/chunks", path
        return sorted(self.uploads.stored())


class FakeHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeServer

    def answer(self, status: int, body: bytes = b"", wait: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if wait is not None:
            self.send_header("Retry-After", wait)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        self.server.log.append(f"{self.command} {self.path.rsplit('/', 1)[0]}")
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        self.body()
        server, path = self.server, self.path
        assert self.headers["Authorization"].removeprefix("Bearer ") in server.secrets
        if path in server.waits:
            return self.answer(server.waits.pop(path), wait="0")
        if path.startswith("/v1/files/"):
            refs = (*server.manifest.files, server.tokenizer)
            name = next((ref.name for ref in refs if ref.sha256 == path[10:]), None)
            if name is None:
                refusal = Refusal("RefusedError", "no such file: got it; allowed: others; stop")
                return self.answer(404, msgspec.msgpack.encode(refusal))
            return self.answer(200, (server.files / name).read_bytes())
        return self.answer(200, msgspec.msgpack.encode(server.get(path)))

    def do_POST(self) -> None:
        data, server = self.body(), self.server
        server.posted.setdefault(self.path, []).append(data)
        if self.path != "/v1/enrol":
            return self.answer(204)
        server.secrets.add(msgspec.msgpack.decode(data, type=Enrolment).secret)
        return self.answer(200, msgspec.msgpack.encode(Enrolled(run="run", device="device-0")))

    def do_PUT(self) -> None:
        data, server = self.body(), self.server
        if self.path == "/v1/probe":
            return self.answer(204)
        header, _ = unpack(data)
        if header.index == server.refuse_chunk:
            refusal = Refusal("RefusedError", "no: got it; allowed: none; stop")
            return self.answer(403, msgspec.msgpack.encode(refusal))
        chunk = Chunk(header.index, self.path.rsplit("/", 1)[1], data)
        receipt = server.uploads.put(chunk)
        if server.deeper is not None:
            receipt = msgspec.structs.replace(receipt, depth=server.deeper.depth)
        return self.answer(201, msgspec.msgpack.encode(receipt))

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def serving(folder: Path) -> Iterator[FakeServer]:
    folder.mkdir()
    server = FakeServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with serving(tmp_path / "server") as one:
        yield one


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """300 rows, two of them bad."""
    draw = np.random.default_rng(2)
    lines = ["text,label"]
    for number in range(300):
        words = " ".join(draw.choice(WORDS, int(draw.integers(3, 30))))
        lines.append(f"{words},{'maybe' if number in (7, 200) else ['no', 'yes'][number % 2]}")
    path = tmp_path / "data.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def request(server: FakeServer, data: Path, tmp_path: Path, strict: bool = False) -> JoinRequest:
    return JoinRequest(
        JoinString.parse(server.join), str(data), "pi", {}, tmp_path / "state", 1, strict, 5.0
    )


def test_join_goes_the_whole_way(
    server: FakeServer, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    outcome = join_command(server.join, str(data), "pi", [], state, 1, strict=False, patience=5.0)
    assert outcome.exit_code == 0
    assert json.loads(json.dumps(outcome.data))["samples"] == 298
    assert outcome.data["skipped"] == 2
    assert outcome.data["truncated"] == 0
    assert outcome.data["device"] == "device-0"
    said = server.last("/v1/announcement", Announcement)
    assert isinstance(said, Announcement)
    arrived = server.uploads.samples()
    assert sorted(arrived) == list(range(298))
    assert said.tokens == sum(len(hidden) for hidden in arrived.values())
    first = [WORDS.index(word) + 1 for word in data.read_text().split("\n")[1][:-3].split()]
    np.testing.assert_array_equal(arrived[0], table()[first])
    profile = server.last("/v1/profile", DeviceProfile)
    assert isinstance(profile, DeviceProfile)
    assert (profile.cores, profile.flops > 0, profile.uplink_bps > 0) == (1, True, True)
    report = server.last("/v1/report", DeviceReport)
    assert isinstance(report, DeviceReport)
    assert report.chunks == len(server.uploads.frames) > 3
    enrolment = server.last("/v1/enrol", Enrolment)
    assert isinstance(enrolment, Enrolment)
    assert (enrolment.name, enrolment.token) == ("pi", "token")
    assert any(f"{data}:9: " in message for message in caplog.messages)
    assert "/v1/failure" not in server.posted


def test_a_device_is_told_of_rows_that_are_cut(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "long.csv"
    texts = [" ".join([WORDS[0]] * count) for count in (39, 40, 41, 200)]
    path.write_text("text,label\n" + "".join(f"{text},no\n" for text in texts))
    joined = be_device(request(server, path, tmp_path))
    assert joined.truncated == 2
    told = "2 of 4 rows cut to 40 tokens; raise task.max_tokens where the run is served"
    assert told in caplog.messages


def test_the_same_command_continues_without_measuring_or_computing_again(
    server: FakeServer, data: Path, tmp_path: Path
) -> None:
    server.refuse_chunk = 4
    with pytest.raises(RefusedError, match="no: got it; allowed: none; stop"):
        be_device(request(server, data, tmp_path))
    told = server.last("/v1/failure", Failure)
    assert told == Failure("RefusedError: no: got it; allowed: none; stop")
    had = set(server.uploads.frames)
    assert had == {0, 1, 2, 3}
    server.refuse_chunk = None
    server.log.clear()
    joined = be_device(request(server, data, tmp_path))
    assert joined.report.chunks == len(server.uploads.frames) - len(had) > 0
    assert sorted(server.uploads.samples()) == list(range(298))
    assert len(server.secrets) == 1
    assert "PUT /v1" not in server.log, "the probe ran again"
    assert "GET /v1/files" not in server.log, "a file was fetched again"
    assert server.posted["/v1/profile"][0] == server.posted["/v1/profile"][1]
    assert server.posted["/v1/announcement"][0] == server.posted["/v1/announcement"][1]
    assert server.log.count("PUT /v1/chunks") == joined.report.chunks


def test_a_front_that_does_not_come_ends_nothing(
    server: FakeServer, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    missing = FileRef("block-2.bin", "2" * 64, 10)
    server.deeper = msgspec.structs.replace(
        server.manifest, depth=2, hash="2" * 64, files=(*server.manifest.files, missing)
    )
    joined = be_device(request(server, data, tmp_path))
    assert joined.depth == 1
    assert sorted(server.uploads.samples()) == list(range(298))
    assert {unpack(frame)[0].depth for frame in server.uploads.frames.values()} == {1}
    assert [m for m in caplog.messages if m.startswith("staying at depth 1, not 2: RefusedError:")]
    assert server.log.count("GET /v1/files") == 4, "three files at first, and once the missing one"
    assert "/v1/failure" not in server.posted


def test_a_speed_is_told_though_it_cannot_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[bytes] = []

    def handler(asked: httpx2.Request) -> httpx2.Response:
        told.append(asked.content)
        return httpx2.Response(204, stream=httpx2.ByteStream(b""))

    client = HttpClient("https://server:1", Patience(1.0), httpx2.MockTransport(handler))
    profile = DeviceProfile(flops=1e9, memory_bytes=1, uplink_bps=1e6, cores=1, platform="")
    with hold(tmp_path / "state") as state, closing(client):
        member = Member(Enrolled("run", "device-0"), state, client, 1)
        member.tell(profile)
        assert state.read("profile", DeviceProfile) == profile
        (state.folder / "profile.json").unlink()
        (state.folder / "profile.json").mkdir()
        member.tell(profile)
    assert told == [msgspec.msgpack.encode(profile)] * 2
    assert len([m for m in caplog.messages if "is not kept" in m]) == 1


def test_changed_data_is_refused_with_both_counts(
    server: FakeServer, data: Path, tmp_path: Path
) -> None:
    be_device(request(server, data, tmp_path))
    stored = dict(server.uploads.frames)
    data.write_text(data.read_text() + "word1 word2,yes\n")
    with pytest.raises(DataError, match=r"has changed.*got 299 samples.*announced 298 samples"):
        be_device(request(server, data, tmp_path))
    assert server.uploads.frames == stored
    assert len(server.posted["/v1/announcement"]) == 1


def test_strict_stops_at_the_first_bad_row(server: FakeServer, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.csv:9: .*maybe"):
        be_device(request(server, data, tmp_path, strict=True))
    assert "/v1/announcement" not in server.posted
    assert "maybe" in str(server.last("/v1/failure", Failure))


def test_a_running_device_is_not_started_twice(
    server: FakeServer, data: Path, tmp_path: Path
) -> None:
    asked = request(server, data, tmp_path)
    folder = state_folder(asked.state, asked.join.fingerprint, asked.join.token)
    with hold(folder) as state:
        assert isinstance(state, DeviceState)
        with pytest.raises(RequestError, match="running already"):
            be_device(asked)
    assert server.log == []


@pytest.mark.parametrize(
    ("threads", "columns", "match"), [(0, [], "--threads"), (1, ["label"], "--column")]
)
def test_bad_options_are_told(threads: int, columns: list[str], match: str) -> None:
    join = f"splitfrozen://token@localhost:1/{'0' * 64}"
    with pytest.raises(ConfigError, match=match):
        join_command(join, "data", None, columns, None, threads, strict=False, patience=5.0)


def test_columns_are_renamed_for_this_device(
    server: FakeServer, data: Path, tmp_path: Path
) -> None:
    data.write_text(data.read_text().replace("text,label", "phrase,verdict", 1))
    columns = ["text=phrase", "label=verdict"]
    outcome = join_command(
        server.join, str(data), None, columns, tmp_path / "s", 1, strict=False, patience=5.0
    )
    assert outcome.data["samples"] == 298


def test_what_is_not_utf_8_is_said_without(server: FakeServer, data: Path, tmp_path: Path) -> None:
    """As a shell gives it: a byte that is no text comes as a lone surrogate."""
    spoilt = data.rename(tmp_path / "d\udcff.csv")
    said = ("p\udcfcter", [], tmp_path / "s", 1)
    join_command(server.join, str(spoilt), *said, strict=False, patience=5.0)
    enrolment = server.last("/v1/enrol", Enrolment)
    assert isinstance(enrolment, Enrolment)
    assert enrolment.name == "p?ter"
    with pytest.raises(DataError, match="bad row"):
        join_command(server.join, str(spoilt), *said, strict=True, patience=5.0)
    assert "d?.csv has a bad row" in str(server.last("/v1/failure", Failure))


def test_a_device_loads_without_a_training_framework() -> None:
    heavy = ("torch", "transformers", "peft", "starlette", "cryptography", "onnx")
    code = (
        "import splitfrozen.device.agent, sys; "
        f"assert not [name for name in {heavy!r} if name in sys.modules]; print('light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "light\n"
