"""The HTTP interface in process: who may do what, what is refused and how it is said."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from splitfrozen.config import Config, ModelSpec, convert
from splitfrozen.disk import disk_full
from splitfrozen.errors import SplitFrozenError
from splitfrozen.records import (
    MAX_SPANS,
    PROTOCOL,
    Announcement,
    Assignment,
    Chunk,
    ChunkSpan,
    DeviceProfile,
    DeviceReport,
    EncodedSample,
    Enrolled,
    Enrolment,
    Failure,
    FileRef,
    FrontManifest,
    Prepared,
    Receipt,
    Refusal,
    RunInfo,
    TaskSpec,
)
from splitfrozen.server.app import ENDPOINTS, MESSAGE_BYTES, Limits, Services, build_app
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import CrashPoint, Store
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin, pack

WIDTH = 8
TOKENIZER = b'{"a tokenizer": true}'
GRAPH = bytes(range(256)) * 40


def ref(name: str, data: bytes) -> FileRef:
    return FileRef(name=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def front(depth: int) -> FrontManifest:
    return FrontManifest(
        depth=depth,
        width=WIDTH,
        precision="float32",
        hash=str(depth) * 64,
        graph="graph.onnx",
        files=(ref("graph.onnx", GRAPH),),
        flops_per_token=1000 * depth,
        memory_bytes=1000,
    )


def task(kind: Any = "classification") -> TaskSpec:
    return TaskSpec(kind=kind, columns={}, labels=("no", "yes"), max_tokens=16)


def prepared(spec: TaskSpec) -> Prepared:
    return Prepared(
        task=spec,
        tokenizer=ref("tokenizer.json", TOKENIZER),
        fronts=tuple(front(depth) for depth in (2, 1, 3)),
        blocks=6,
        width=WIDTH,
        vocabulary=50,
        weights_hash="f" * 64,
        codec="float16",
    )


def config(**devices: Any) -> Config:
    return convert(
        {
            "model": {"name": "tiny", "cut": 3},
            "task": {"labels": ["no", "yes"]},
            "devices": {"count": 2, "depth": [1, 3]} | devices,
            "wire": {"codec": "float16", "compression": "none"},
            "run": {"seed": 5},
        },
        Config,
    )


@dataclass
class World:
    """A run, and two devices that speak to it over HTTP without a network."""

    services: Services
    client: TestClient
    secrets: tuple[str, str] = ("first-secret-" * 3, "second-secret" * 3)

    def bearer(self, device: int = 0) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secrets[device]}"}

    def call(
        self, method: str, path: str, message: object = None, device: int = 0
    ) -> httpx2.Response:
        body = None if message is None else msgspec.msgpack.encode(message)
        return self.client.request(method, path, content=body, headers=self.bearer(device))

    def enrol(self, device: int = 0) -> httpx2.Response:
        token = self.services.registry.tokens()[f"device-0{device}"]
        return self.call("POST", "/v1/enrol", enrolment(token, self.secrets[device]))

    def ready(self, device: int = 0) -> FrontManifest:
        """Enrol, announce and get a front."""
        self.enrol(device)
        assert self.call("POST", "/v1/announcement", ANNOUNCED, device).status_code == 204
        got = self.call("GET", "/v1/assignment", device=device)
        return msgspec.msgpack.decode(got.content, type=Assignment).front

    def put(self, chunk: Chunk, device: int = 0, sha256: str | None = None) -> httpx2.Response:
        return self.client.put(
            f"/v1/chunks/{sha256 or chunk.sha256}",
            content=chunk.frame,
            headers=self.bearer(device),
        )

    def stored(self) -> int:
        return len(self.services.store.samples())


def make_world(folder: Path, spec: TaskSpec, **devices: Any) -> Services:
    folder.mkdir()
    files = folder / "files"
    files.mkdir()
    (files / "graph.onnx").write_bytes(GRAPH)
    (files / "tokenizer.json").write_bytes(TOKENIZER)
    registry = Registry(folder)
    registry.ensure_slots(2)
    made = prepared(spec)
    return Services(config(**devices), Store(folder / "store"), registry, files, lambda: made)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = make_world(tmp_path / "run-1", task())
    yield made
    made.registry.close()
    made.store.close()


@pytest.fixture
def world(services: Services) -> Iterator[World]:
    with TestClient(build_app(services)) as client:
        yield World(services, client)


def enrolment(token: str, secret: str) -> Enrolment:
    return Enrolment(protocol=PROTOCOL, token=token, secret=secret, name="pi", version="0")


ANNOUNCED = Announcement(samples=10, tokens=30, skipped=0, digest="a" * 64)
PROFILE = DeviceProfile(flops=1e9, memory_bytes=1 << 30, uplink_bps=1e7, cores=2, platform="Linux")
SPAN = ChunkSpan(2, 3, 1, 2, 7, (0.0, 5.0), (1.0, 1.0), (2.0, 4.0))
LATER = ChunkSpan(5, 5, 1, 1, 7, (5.0, 1.0), (6.0, 1.0), (7.5, 1.5))
REPORT = DeviceReport(seconds=9.0, padding=0.1, spans=(SPAN, LATER))


def origin(manifest: FrontManifest, device: str = "device-00") -> Origin:
    return Origin("run-1", device, manifest.hash, manifest.depth, WIDTH, "float16")


def sample(number: int, targets: list[int] | None = None, tokens: int = 3) -> EncodedSample:
    hidden = np.full((tokens, WIDTH), number, np.float32)
    values = np.array([number % 2] if targets is None else targets, np.int32)
    return EncodedSample(number, tokens, values, codec("float16").encode(hidden))


def refusal(response: httpx2.Response) -> tuple[int, str, str]:
    said = msgspec.msgpack.decode(response.content, type=Refusal)
    assert isinstance(said.message, str)
    return response.status_code, said.error, said.message


def test_devices_hear_the_name_of_a_model_and_not_its_place(
    services: Services, tmp_path: Path
) -> None:
    (tmp_path / "secret" / "my-model").mkdir(parents=True)
    for name, told in (
        (str(tmp_path / "secret" / "my-model"), "my-model"),
        ("openai-community/gpt2", "openai-community/gpt2"),
    ):
        model = ModelSpec(name=name, cut=3)
        changed = replace(services, config=msgspec.structs.replace(services.config, model=model))
        with TestClient(build_app(changed)) as client:
            world = World(changed, client)
            if services.registry.tokens().keys() >= {"device-00"}:
                world.enrol()
            info = msgspec.msgpack.decode(world.call("GET", "/v1/run").content, type=RunInfo)
        assert info.model == told


# --- a device's life -------------------------------------------------------------------------


def test_a_devices_whole_life(world: World) -> None:
    enrolled = world.enrol()
    assert msgspec.msgpack.decode(enrolled.content, type=Enrolled) == Enrolled("run-1", "device-00")
    info = msgspec.msgpack.decode(world.call("GET", "/v1/run").content, type=RunInfo)
    assert (info.run, info.model, info.seed) == ("run-1", "tiny", 5)
    assert (info.probe, info.task, info.tokenizer) == (
        front(1),
        task(),
        ref("tokenizer.json", TOKENIZER),
    )
    assert world.call("POST", "/v1/announcement", ANNOUNCED).status_code == 204
    assert world.client.put("/v1/probe", content=b"x" * 10**6, headers=world.bearer()).is_success
    assert world.call("POST", "/v1/profile", PROFILE).status_code == 204
    got = msgspec.msgpack.decode(world.call("GET", "/v1/assignment").content, type=Assignment)
    assert got == Assignment(depth=1, front=front(1), codec="float16")
    assert world.call("GET", "/v1/chunks").content == msgspec.msgpack.encode([])
    chunk = pack(origin(got.front), 4, [sample(0), sample(7)])
    for status, stored in ((201, 2), (200, 0)):
        reply = world.put(chunk)
        assert reply.status_code == status
        assert msgspec.msgpack.decode(reply.content, type=Receipt) == Receipt(4, stored, depth=1)
    assert world.call("GET", "/v1/chunks").content == msgspec.msgpack.encode([4])
    assert world.call("POST", "/v1/report", REPORT).status_code == 204
    assert world.call("POST", "/v1/failure", Failure("no\nmore")).status_code == 204
    row = world.services.registry.device("device-00")
    assert (row.announcement, row.profile, row.report) == (ANNOUNCED, PROFILE, REPORT)
    assert row.failure == "no\nmore"
    assert world.stored() == 2


def test_files_are_served_by_content_and_continue(world: World) -> None:
    world.enrol()
    for data in (GRAPH, TOKENIZER):
        path = f"/v1/files/{hashlib.sha256(data).hexdigest()}"
        assert world.call("GET", path).content == data
        part = world.client.get(path, headers=world.bearer() | {"Range": "bytes=5-"})
        assert (part.status_code, part.content) == (206, data[5:])


@pytest.mark.parametrize(
    "name",
    ["graph.onnx", "..", "%2e%2e%2fconfig.json", "0" * 64, "%00", "a" * 4096, "..%2f..%2fetc", "é"],
)
def test_hostile_names_find_nothing(world: World, name: str) -> None:
    world.enrol()
    assert world.call("GET", f"/v1/files/{name}").status_code == 404
    assert refusal(world.call("GET", "/nowhere"))[0] == 404
    assert refusal(world.call("DELETE", "/v1/chunks"))[0] == 405


def test_the_assignment_waits_and_may_change(tmp_path: Path) -> None:
    services = make_world(tmp_path / "auto", task(), depth="auto")
    with TestClient(build_app(services)) as client:
        world = World(services, client)
        for device in (0, 1):
            world.enrol(device)
        assert refusal(world.call("GET", "/v1/assignment"))[:2] == (403, "RefusedError")
        world.call("POST", "/v1/profile", PROFILE)
        waiting = world.call("GET", "/v1/assignment")
        assert (waiting.status_code, waiting.headers["Retry-After"]) == (202, "2")
        small = msgspec.structs.replace(PROFILE, memory_bytes=1)
        assert refusal(world.call("POST", "/v1/profile", small, device=1))[:2] == (409, "PlanError")
        for depth in (3, 2):
            services.registry.assign({"device-00": depth})
            got = world.call("GET", "/v1/assignment")
            assert msgspec.msgpack.decode(got.content, type=Assignment).depth == depth
    services.registry.close()
    services.store.close()


def test_before_the_run_is_prepared(services: Services) -> None:
    with TestClient(build_app(replace(services, prepared=lambda: None))) as client:
        world = World(services, client)
        world.enrol()
        for path in ("/v1/run", "/v1/assignment", "/v1/files/x"):
            waiting = world.call("GET", path)
            assert refusal(waiting)[:2] == (503, "UnreachableError")
            assert waiting.headers["Retry-After"] == "2"
        services.registry.set_state("failed", "/secret/path is gone")
        status, error, message = refusal(world.call("GET", "/v1/run"))
        assert (status, error) == (410, "RefusedError")
        assert "secret" not in message


# --- who may do what -------------------------------------------------------------------------

POLICY = {
    ("POST", "/v1/enrol"): "public",
    ("GET", "/v1/run"): "device",
    ("POST", "/v1/announcement"): "device",
    ("POST", "/v1/profile"): "device",
    ("GET", "/v1/assignment"): "device",
    ("GET", "/v1/files/{sha256}"): "device",
    ("PUT", "/v1/probe"): "device",
    ("GET", "/v1/chunks"): "device",
    ("PUT", "/v1/chunks/{sha256}"): "device",
    ("POST", "/v1/report"): "device",
    ("POST", "/v1/failure"): "device",
}
"""Written down a second time on purpose: a new route must be decided on here."""


def test_every_route_is_in_the_policy_table(services: Services) -> None:
    app: Starlette = build_app(services)
    routes = {
        (method, route.path)
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert len(routes) == len(app.routes) == 11
    assert routes == set(POLICY)
    assert {(one.method, one.path): one.policy for one in ENDPOINTS} == POLICY


@pytest.mark.parametrize(
    ("method", "path"), [key for key, policy in POLICY.items() if policy == "device"]
)
def test_no_route_without_a_credential(world: World, method: str, path: str) -> None:
    front_ = world.ready(0)
    world.ready(1)
    chunk = pack(origin(front_), 0, [sample(0)])
    path = path.format(depth=1, sha256=chunk.sha256 if method == "PUT" else ref("", GRAPH).sha256)
    before = world.services.registry.devices(), world.stored()
    bodies = {
        "/v1/announcement": ANNOUNCED,
        "/v1/profile": PROFILE,
        "/v1/report": REPORT,
        "/v1/failure": Failure("x"),
    }
    body = msgspec.msgpack.encode(bodies[path]) if path in bodies else None
    body = chunk.frame if method == "PUT" else body
    for header in (None, "Bearer", "Bearer wrong", f"Basic {world.secrets[0]}", "Bearer \xff"):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        response = world.client.request(method, path, content=body, headers=headers)
        assert refusal(response)[:2] == (401, "RefusedError")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert (world.services.registry.devices(), world.stored()) == before
    good = world.client.request(method, path, content=body, headers=world.bearer())
    assert good.is_success
    world.services.registry.revoke("device-00")
    response = world.client.request(method, path, content=body, headers=world.bearer())
    assert refusal(response)[:2] == (403, "RefusedError")
    assert world.client.head(path, headers={}).status_code in (401, 405)


def test_a_device_reads_and_writes_its_own_only(world: World) -> None:
    first = world.ready(0)
    world.ready(1)
    chunk = pack(origin(first), 3, [sample(0)])
    status, error, message = refusal(world.put(chunk, device=1))
    assert (status, error) == (403, "RefusedError")
    assert "got device-00; allowed: device-01" in message
    assert world.put(chunk).status_code == 201
    assert world.call("GET", "/v1/chunks", device=1).content == msgspec.msgpack.encode([])
    world.call("POST", "/v1/failure", Failure("mine"), device=1)
    assert world.services.registry.device("device-00").failure is None


# --- what is refused -------------------------------------------------------------------------


def test_chunks_of_a_depth_before_are_taken_and_the_depth_now_is_told(world: World) -> None:
    before = origin(world.ready())
    world.services.registry.assign({"device-00": 2})
    old = world.put(pack(before, 0, [sample(0)]))
    assert msgspec.msgpack.decode(old.content, type=Receipt) == Receipt(0, 1, depth=2)
    assert world.put(pack(origin(front(2)), 1, [sample(1)])).status_code == 201
    status, _, message = refusal(world.put(pack(origin(front(3)), 2, [sample(2)])))
    assert status == 403
    assert "another front" in message or "another depth" in message
    assert world.stored() == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": "run-2"}, "another run: got run-2; allowed: run-1"),
        ({"front": "9" * 64}, f"another front: got {'9' * 64}; allowed: {'1' * 64}"),
        ({"depth": 3}, "another depth: got 3; allowed: 1"),
        ({"width": 12}, "another width: got 12; allowed: 8"),
        ({"codec": "int8"}, "another codec: got int8; allowed: float16"),
        ({"device": "device-01"}, "another device: got device-01; allowed: device-00"),
    ],
)
def test_another_origin_is_told_what_was_expected(
    world: World, change: dict[str, Any], words: str
) -> None:
    chunk = pack(replace(origin(world.ready()), **change), 0, [sample(0)])
    status, error, message = refusal(world.put(chunk))
    assert (status, error) == (403, "RefusedError")
    assert words in message
    assert world.stored() == 0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (sample(10), "sample 10 was not announced: got 10; allowed: 0..9"),
        (sample(3, [2]), "sample 3 has a wrong label: got 2; allowed: 0..1"),
        (sample(3, [-100]), "wrong label: got -100"),
        (sample(3, [0, 1, 0]), "one label"),
        (sample(3, tokens=17), "17 tokens; allowed: at most 16"),
        (EncodedSample(3, 1, np.zeros(1, np.int32), b"\xff" * 16), "not finite"),
        (EncodedSample(3, 1, np.zeros(1, np.int32), b"\x00" * 15), "wrong length"),
    ],
)
def test_numbers_out_of_range_are_refused(world: World, bad: EncodedSample, words: str) -> None:
    chunk = pack(origin(world.ready()), 0, [sample(0), bad])
    status, error, message = refusal(world.put(chunk))
    assert (status, error) == (400, "WireError")
    assert words in message
    assert world.stored() == 0


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([1, -1, 2], "wrong target: got -1"),
        ([1, 50, 2], "wrong target: got 50"),
        ([1, 2], None),
        ([5], "3 of them"),
        ([5, -100, 9], ""),
    ],
)
def test_targets_of_a_language_model(tmp_path: Path, targets: list[int], words: str | None) -> None:
    services = make_world(tmp_path / "run-1", task("causal_lm"))
    with TestClient(build_app(services)) as client:
        world = World(services, client)
        manifest = world.ready()
        if words is None:
            with pytest.raises(SplitFrozenError):
                pack(origin(manifest), 0, [sample(1, targets)])
        else:
            response = world.put(pack(origin(manifest), 0, [sample(1, targets)]))
            assert response.status_code == (400 if words else 201)
            assert words.encode() in response.content
    services.registry.close()
    services.store.close()


@pytest.mark.parametrize(("tokens", "status"), [(4, 400), (5, 201), (6, 400)])
def test_all_images_have_one_length(tmp_path: Path, tokens: int, status: int) -> None:
    image = msgspec.structs.replace(task("image"), image=(3, 8, 8), image_tokens=5)
    services = make_world(tmp_path / "run-1", image)
    with TestClient(build_app(services)) as client:
        world = World(services, client)
        response = world.put(pack(origin(world.ready()), 0, [sample(1, tokens=tokens)]))
    assert response.status_code == status
    if status == 400:
        assert f"wrong length: got {tokens} tokens; allowed: 5" in refusal(response)[2]
    services.registry.close()
    services.store.close()


def test_a_chunk_needs_an_assignment_first(world: World) -> None:
    world.enrol()
    response = world.put(pack(origin(front(1)), 0, [sample(0)]))
    assert refusal(response)[0] == 403
    assert world.services.registry.device("device-00").strikes == 0


def test_three_bad_chunks_in_a_row_mean_quarantine(world: World) -> None:
    chunk = pack(origin(world.ready()), 0, [sample(0)])
    torn = Chunk(0, hashlib.sha256(chunk.frame[:-1]).hexdigest(), chunk.frame[:-1])
    for _ in range(2):
        assert refusal(world.put(torn))[0] == 400
    assert world.put(chunk).status_code == 201
    assert world.services.registry.device("device-00").strikes == 0
    for _ in range(3):
        assert refusal(world.put(chunk, sha256="0" * 64))[:2] == (400, "WireError")
    status, _, message = refusal(world.put(chunk))
    assert (status, "quarantine" in message) == (403, True)
    assert world.services.registry.device("device-00").strikes == 3
    assert world.call("POST", "/v1/announcement", ANNOUNCED).status_code == 204
    assert world.put(chunk).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/announcement", b""),
        ("/v1/announcement", msgspec.msgpack.encode({"samples": 1})),
        ("/v1/announcement", b"\x91" * 60_000),
        ("/v1/report", msgspec.msgpack.encode(msgspec.structs.replace(REPORT, seconds=np.nan))),
        ("/v1/profile", msgspec.msgpack.encode(msgspec.structs.replace(PROFILE, flops=np.inf))),
        ("/v1/failure", msgspec.msgpack.encode({"message": "x" * 2001})),
        ("/v1/enrol", b"\xc1"),
    ],
)
def test_messages_that_are_none(world: World, path: str, body: bytes) -> None:
    world.ready()
    before = world.services.registry.devices()
    response = world.client.post(path, content=body, headers=world.bearer())
    assert refusal(response)[:2] == (400, "WireError")
    assert world.services.registry.devices() == before


def span_with(**changes: object) -> DeviceReport:
    """The good report, its second span changed."""
    return msgspec.structs.replace(REPORT, spans=(SPAN, msgspec.structs.replace(LATER, **changes)))


@pytest.mark.parametrize(
    ("report", "match"),
    [
        (msgspec.structs.replace(REPORT, seconds=-1.0), "lasts too long"),
        (msgspec.structs.replace(REPORT, seconds=1e12), "lasts too long"),
        (msgspec.structs.replace(REPORT, padding=-1.0), "wrong padding"),
        (msgspec.structs.replace(REPORT, spans=(LATER, SPAN)), "chunks that cannot be"),
        (msgspec.structs.replace(REPORT, spans=(SPAN, SPAN)), "chunks that cannot be"),
        (span_with(last=10), "chunks that cannot be: got 5..10; allowed: ascending, 4..9"),
        (span_with(first=5, last=4), "chunks that cannot be"),
        (span_with(chunks=2), "counts chunks 5..5 wrong: got 2; allowed: at most 1"),
        (span_with(bytes=2**60), "too many bytes"),
        (span_with(front=(-0.1, 1.0)), "wrong `front` of chunk 5"),
        (span_with(front=(5.0, -1.0)), "wrong `front`"),
        (span_with(front=(np.nan, 1.0)), "wrong `front`"),
        (span_with(front=(5.0, np.inf)), "wrong `front`"),
        (span_with(encode=(4.0, 1.0)), "wrong `encode`"),
        (span_with(send=(1.5, 0.1)), "wrong `send`"),
        (span_with(send=(7.5, 2.0)), "wrong `send`"),
        (msgspec.structs.replace(REPORT, spans=(SPAN,) * (MAX_SPANS + 1)), "Expected `array`"),
        (span_with(bytes=0), ">= 1"),
    ],
)
def test_reports_that_cannot_be_true(world: World, report: DeviceReport, match: str) -> None:
    world.ready()
    status, error, message = refusal(world.call("POST", "/v1/report", report))
    assert (status, error) == (400, "WireError")
    assert match in message
    assert world.services.registry.device("device-00").report is None
    assert world.call("POST", "/v1/report", REPORT).status_code == 204


def test_the_longest_report_is_a_message() -> None:
    huge = 2**53
    span = ChunkSpan(huge, huge, 1, huge, huge, (0.1, 0.1), (0.1, 0.1), (0.1, 0.1))
    longest = DeviceReport(seconds=0.1, padding=0.1, spans=(span,) * MAX_SPANS)
    assert len(msgspec.msgpack.encode(longest)) < MESSAGE_BYTES


def test_a_changed_announcement_is_refused(world: World) -> None:
    world.ready()
    changed = msgspec.structs.replace(ANNOUNCED, samples=11)
    status, _, message = refusal(world.call("POST", "/v1/announcement", changed))
    assert (status, "got samples 11; allowed: samples 10" in message) == (403, True)


# --- limits ----------------------------------------------------------------------------------


def test_bodies_have_limits(world: World) -> None:
    world.ready()

    bearer = world.bearer()
    put, post = world.client.put, world.client.post
    assert refusal(put("/v1/chunks/x", content=iter([b"x"]), headers=bearer))[0] == 411
    declared = bearer | {"Content-Length": str(64 * 2**20 + 1)}
    assert refusal(put("/v1/chunks/x", content=b"", headers=declared))[0] == 413
    digits = bearer | {"Content-Length": "1" * 5000}
    assert refusal(put("/v1/chunks/x", content=b"", headers=digits))[0] == 413
    zeros = bearer | {"Content-Length": "0" * 30 + str(64 * 2**20 + 1)}
    assert refusal(put("/v1/chunks/x", content=b"", headers=zeros))[0] == 413
    nothing = bearer | {"Content-Length": "0" * 5000}
    assert put("/v1/probe", content=b"", headers=nothing).status_code == 204
    assert refusal(put("/v1/probe", content=b"x" * (2**20 + 1), headers=bearer))[0] == 413
    assert refusal(post("/v1/report", content=b"x" * (2**16 + 1), headers=bearer))[0] == 413
    assert refusal(post("/v1/report", content=iter([b"x" * 60_000] * 2), headers=bearer))[0] == 413
    assert world.services.registry.device("device-00").strikes == 0


async def _endless(app: Starlette, world: World, size: int, asked: list[int]) -> httpx2.Response:
    """PUT a chunk whose body never ends; `asked` grows when the app begins to read it."""

    async def body() -> Any:
        asked.append(size)
        yield b"x"
        await anyio.sleep_forever()

    headers = world.bearer() | {"Content-Length": str(size)}
    return await _put(app, "0" * 64, body(), headers)


async def _put(app: Starlette, sha256: str, body: Any, headers: dict[str, str]) -> httpx2.Response:
    received: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "method": "PUT",
        "path": f"/v1/chunks/{sha256}",
        "raw_path": b"",
        "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
    }

    async def receive() -> dict[str, Any]:
        try:
            return {"type": "http.request", "body": await anext(body), "more_body": True}
        except StopAsyncIteration:
            return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        received.append(message)

    await app(scope, receive, send)
    head = {key.decode(): value.decode() for key, value in received[0]["headers"]}
    return httpx2.Response(received[0]["status"], headers=head, content=received[1]["body"])


def test_a_device_is_there_until_its_upload_has_ended(services: Services, tmp_path: Path) -> None:
    now = 1000.0
    registry = Registry(tmp_path / "run-1", lambda: now)
    app = build_app(replace(services, registry=registry))
    world = World(services, TestClient(app))
    chunk = pack(origin(world.ready()), 0, [sample(0)])

    async def body() -> Any:
        nonlocal now
        now += 100
        yield chunk.frame

    declared = world.bearer() | {"Content-Length": str(len(chunk.frame))}
    assert anyio.run(_put, app, chunk.sha256, body(), declared).status_code == 201
    assert services.registry.device("device-00").last_seen == 1100
    registry.close()


def test_a_body_that_stops_is_given_up(services: Services) -> None:
    app = build_app(services, Limits(body_s=0.05))
    world = World(services, TestClient(app))
    world.ready()
    response = anyio.run(_endless, app, world, 2, [])
    assert refusal(response)[:2] == (408, "WireError")


@pytest.mark.parametrize(
    ("limits", "others"),
    [(Limits(in_flight_chunks=3), 201), (Limits(in_flight_bytes=3000), 429)],
)
def test_half_sent_chunks_are_limited(services: Services, limits: Limits, others: int) -> None:
    """By device, so that the others are served; and in sum, so that memory lasts."""
    app = build_app(services, limits)
    world = World(services, TestClient(app))
    chunk = pack(origin(world.ready(1), "device-01"), 0, [sample(0)])
    world.ready(0)

    async def put(device: int) -> httpx2.Response:
        async def body() -> Any:
            yield chunk.frame

        declared = {"Content-Length": str(len(chunk.frame))}
        return await _put(app, chunk.sha256, body(), world.bearer(device) | declared)

    async def scene() -> list[httpx2.Response]:
        asked: list[int] = []
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(_endless, app, world, 1000, asked)
            while len(asked) < 3:
                await anyio.sleep(0)
            crowded = [await put(0), await put(1)]
            group.cancel_scope.cancel()
        return [*crowded, await put(1), await put(0)]

    mine, other, later, foreign = anyio.run(scene)
    assert refusal(mine)[0] == 429
    assert mine.headers["Retry-After"] == "2"
    assert other.status_code == others
    assert later.status_code in (200, 201)
    assert foreign.status_code == 403


# --- trouble ---------------------------------------------------------------------------------


def test_a_full_disk_is_507_and_heals(
    services: Services, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = True

    def at(point: CrashPoint) -> None:
        if full and point == "payload written":
            raise disk_full(tmp_path / "secret-folder" / "file")

    store = Store(tmp_path / "other-store", at)
    (tmp_path / "secret-folder").mkdir()
    with TestClient(build_app(replace(services, store=store))) as client:
        world = World(services, client)
        chunk = pack(origin(world.ready()), 0, [sample(0)])
        response = world.put(chunk)
        status, error, message = refusal(response)
        assert (status, error) == (507, "UnreachableError")
        assert response.headers["Retry-After"] == "2"
        assert "secret-folder" not in message
        assert "secret-folder" in caplog.text
        assert services.registry.device("device-00").strikes == 0
        full = False
        assert world.put(chunk).status_code == 201
    assert len(store.samples()) == 1
    store.close()


def test_our_own_errors_leak_nothing(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Prepared:
        raise ValueError("/secret/path")

    with TestClient(build_app(replace(services, prepared=broken))) as client:
        world = World(services, client)
        world.enrol()
        with caplog.at_level(logging.ERROR):
            response = world.call("GET", "/v1/run")
    assert refusal(response)[:2] == (500, "SplitFrozenError")
    assert b"secret" not in response.content
    assert "ValueError: /secret/path" in caplog.text


def test_the_web_process_is_light() -> None:
    code = (
        "import splitfrozen.server.app, sys; "
        "print([m for m in ('torch', 'transformers', 'peft', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
