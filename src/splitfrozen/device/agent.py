"""A device of a run, from the join string to the last acknowledgement.

The way: trust the server's certificate, enrol, read the data, announce it, measure this machine,
get a depth, compute and upload. Every step may be repeated, so a device that was killed anywhere
continues when the same command is run again.
"""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from splitfrozen import __version__
from splitfrozen.data.readers import BadRow, read_rows
from splitfrozen.data.tasks import announce, build_samples, truncation
from splitfrozen.device import probe
from splitfrozen.device.front import OnnxFront
from splitfrozen.device.patience import Patience
from splitfrozen.device.pilot import Steered
from splitfrozen.device.pinning import pinned_context
from splitfrozen.device.pipeline import Making, Work, upload_all
from splitfrozen.device.plan import plan_chunks, planned_bytes, typical_batch
from splitfrozen.device.progress import Progress
from splitfrozen.device.state import DeviceState, Identity, hold, state_folder
from splitfrozen.device.uploader import HttpClient, HttpUploader, network
from splitfrozen.errors import ConfigError, DataError, ModelError, StoreError, UnreachableError
from splitfrozen.records import (
    PROTOCOL,
    Announcement,
    Assignment,
    Codec,
    DeviceProfile,
    DeviceReport,
    Enrolled,
    Enrolment,
    Failure,
    FileRef,
    FrontManifest,
    Outcome,
    RunInfo,
    Sample,
)
from splitfrozen.wire.codec import codec
from splitfrozen.wire.frame import Origin
from splitfrozen.wire.join import JoinString
from splitfrozen.wire.side import Side

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """What a device is asked to do.

    Attributes:
        join: where to go and whom to trust.
        data: file or folder with this device's rows.
        name: what people call the device.
        columns: our name -> the file's column, where this file differs from the run's.
        state: parent of the state folder; None for the user's data folder.
        threads: of the computation; None for all cores.
        strict: stop at the first bad row instead of leaving it out.
        patience_s: how long to try in vain to reach the server.
    """

    join: JoinString
    data: str
    name: str
    columns: dict[str, str]
    state: Path | None = None
    threads: int | None = None
    strict: bool = False
    patience_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Joined:
    """What came of it: `report` is about this process, the rest about the device.

    `truncated`: rows that were cut to the run's `task.max_tokens`.
    """

    device: Enrolled
    depth: int
    announced: Announcement
    report: DeviceReport
    truncated: int


def join_command(
    join: str,
    data: str,
    name: str | None,
    columns: Sequence[str],
    state: Path | None,
    threads: int | None,
    strict: bool,
    patience: float,
) -> Outcome:
    """`splitfrozen join`. Raises what `join` raises, ConfigError for an option."""
    if threads is not None and threads < 1:
        raise ConfigError(
            "`--threads` is wrong", got=threads, allowed="1 or more", remedy="leave it out"
        )
    request = JoinRequest(
        join=JoinString.parse(join),
        data=data,
        name=_sayable(name or platform.node() or "device")[:100],
        columns=dict(_renamed(column) for column in columns),
        state=state,
        threads=threads,
        strict=strict,
        patience_s=patience,
    )
    joined = be_device(request)
    said, report = joined.announced, joined.report
    return Outcome(
        {
            **msgspec.structs.asdict(joined.device),
            "depth": joined.depth,
            "samples": said.samples,
            "skipped": said.skipped,
            "truncated": joined.truncated,
            "seconds": report.seconds,
            "compute_s": report.compute_s,
            "encode_s": report.encode_s,
            "upload_s": report.upload_s,
            "bytes_up": report.bytes_up,
            "chunks": report.chunks,
            "padding": report.padding,
        },
        f"{joined.device.device}: all {said.samples} samples are stored at depth {joined.depth} "
        f"({report.bytes_up / 1e6:.1f} MB in {report.seconds:.1f} s now)",
    )


def be_device(request: JoinRequest) -> Joined:
    """Be a device of a run until all its samples are stored.

    Raises:
        RequestError: another process is this device; DataError: the data cannot be used, or is
            not what was announced before; ModelError: the front does not run here.
        RefusedError: another certificate, or the server says no.
        UnreachableError: patience ended; the same call continues.
        StoreError: the state folder. WireError: the server does not keep the protocol.
    """
    # A misspelt path is told before the server hears of us.
    read_rows(request.data, {}, report=lambda _: None)
    join, stop = request.join, threading.Event()
    patience = Patience(request.patience_s, sleep=lambda seconds: _sleep(stop, seconds))
    host = f"[{join.host}]" if ":" in join.host else join.host
    with hold(state_folder(request.state, join.fingerprint, join.token)) as state:
        context = pinned_context(join.host, join.port, join.fingerprint, patience)
        client = HttpClient(f"https://{host}:{join.port}", patience, network(context))
        with closing(client):
            device = _enrol(request, state, client)
            try:
                return _attend(request, state, client, device, stop)
            except (KeyboardInterrupt, UnreachableError):
                raise
            except BaseException as error:
                message = _sayable(f"{type(error).__name__}: {error}")
                client.tell("/v1/failure", Failure(message[:2000]))
                raise


def _attend(
    request: JoinRequest,
    state: DeviceState,
    client: HttpClient,
    device: Enrolled,
    stop: threading.Event,
) -> Joined:
    """Everything between enrolment and the report."""
    run = client.get("/v1/run", RunInfo)
    samples, said = _read_data(request, run, state, client)
    client.post("/v1/announcement", said)
    threads = request.threads or probe.cores()
    profile = _profile(run.probe, samples, state, client, threads)
    client.post("/v1/profile", profile)
    member = Member(device, state, client, threads)
    first = member.assigned()
    _log.info("computing depth %d of %s", first.depth, run.model)
    pilot = Steered(first, member.open, member.assigned, member.tell, profile)
    size = planned_bytes(pilot.making().codec, run.probe.width)
    chunks = plan_chunks(samples, size, run.chunk_bytes, run.seed, device.device)
    with closing(Progress(len(samples))) as progress:
        report = upload_all(Work(samples, chunks, pilot), HttpUploader(client), progress, stop)
    client.post("/v1/report", report)
    truncated = sum(sample.truncated for sample in samples)
    return Joined(device, pilot.depth, said, report, truncated)


@dataclass(frozen=True, slots=True)
class Member:
    """A device that takes part, as its pilot uses it."""

    device: Enrolled
    state: DeviceState
    client: HttpClient
    threads: int

    def assigned(self) -> Assignment:
        """The assignment as it is now."""
        return self.client.poll("/v1/assignment", Assignment, "the other devices are measured")

    def open(self, assignment: Assignment) -> Making:
        """Fetch what an assignment takes and open it. Raises what `be_device` does."""
        manifest = assignment.front
        front = _open_front(manifest, self.state, self.client, self.threads)
        chosen = _open_codec(assignment, self.state, self.client)
        run, device = self.device.run, self.device.device
        origin = Origin(run, device, manifest.hash, manifest.depth, manifest.width, chosen.name)
        return Making(front, chosen, origin, front.interrupt)

    def tell(self, measured: DeviceProfile) -> None:
        """Tell the server what this machine can do now, and keep it for the next start."""
        try:
            self.state.write("profile", measured)
        except StoreError as error:
            # What is kept from before will do, and a full disk is no reason to stop sending.
            _log.warning("the new speed is not kept: %s", error)
        self.client.post("/v1/profile", measured)


def _enrol(request: JoinRequest, state: DeviceState, client: HttpClient) -> Enrolled:
    """Enrol, or be recognised: the secret was on disk before the server first heard of it."""
    identity = state.identity()
    enrolled = client.post(
        "/v1/enrol",
        Enrolment(
            protocol=PROTOCOL,
            token=request.join.token,
            secret=identity.secret,
            name=request.name,
            version=__version__,
        ),
        Enrolled,
    )
    assert enrolled is not None
    client.authorize(identity.secret)
    state.write("identity", Identity(secret=identity.secret, device=enrolled.device))
    _log.info("enrolled in %s as %s", enrolled.run, enrolled.device)
    return enrolled


def _read_data(
    request: JoinRequest, run: RunInfo, state: DeviceState, client: HttpClient
) -> tuple[list[Sample], Announcement]:
    """Read the samples and what to announce of them. Raises DataError."""
    unknown = sorted(request.columns.keys() - run.task.columns.keys())
    if unknown:
        raise ConfigError(
            "`--column` names columns that the task does not have",
            got=", ".join(unknown),
            allowed=", ".join(run.task.columns),
            remedy="write OURS=THEIRS: the task's name first, then your file's",
        )
    task = msgspec.structs.replace(run.task, columns={**run.task.columns, **request.columns})
    tokenizer = None if run.tokenizer is None else _open_tokenizer(run.tokenizer, state, client)
    skipped = 0

    def report(bad: BadRow) -> None:
        nonlocal skipped
        if request.strict:
            raise DataError(
                f"{request.data} has a bad row",
                got=bad,
                allowed="good rows only, as --strict was given",
                remedy="mend the row, or leave --strict out to skip it",
            )
        skipped += 1
        _log.warning("row left out: %s", bad)

    rows = read_rows(request.data, task.columns, report=report)
    samples = list(build_samples(rows, task, tokenizer, report=report))
    said = announce(samples, skipped)
    before = state.read("announcement", Announcement)
    if before is not None and before != said:
        raise DataError(
            f"{request.data} has changed since this device announced it",
            got=f"{said.samples} samples of {said.tokens} tokens, {said.skipped} rows left out",
            allowed=f"the announced {before.samples} samples of {before.tokens} tokens, "
            f"{before.skipped} rows left out",
            remedy="restore the file, or purge this device and join anew with another join string",
        )
    state.write("announcement", said)
    _log.info("%d samples of %d tokens, %d rows left out", said.samples, said.tokens, skipped)
    cut = sum(sample.truncated for sample in samples)
    if told := truncation(cut, said.samples, task.max_tokens):
        _log.warning("%s where the run is served", told)
    return samples, said


def _profile(
    manifest: FrontManifest,
    samples: Sequence[Sample],
    state: DeviceState,
    client: HttpClient,
    threads: int,
) -> DeviceProfile:
    """Measure this machine, once in the device's life."""
    known = state.read("profile", DeviceProfile)
    if known is not None:
        return known
    memory_bytes = probe.available_memory()
    front = _open_front(manifest, state, client, threads)
    profile = DeviceProfile(
        flops=probe.measure_flops(front, typical_batch(samples), manifest.flops_per_token),
        memory_bytes=memory_bytes,
        uplink_bps=probe.measure_uplink(lambda body: _put_probe(client, body)),
        cores=threads,
        platform=probe.platform_text(),
    )
    state.write("profile", profile)
    _log.info(
        "this machine: %.1f GFLOP/s, %.1f GB of memory, %.1f Mbit/s up",
        profile.flops / 1e9,
        profile.memory_bytes / 1e9,
        profile.uplink_bps / 1e6,
    )
    return profile


def _open_front(
    manifest: FrontManifest, state: DeviceState, client: HttpClient, threads: int
) -> OnnxFront:
    free = probe.available_memory()
    if free < manifest.memory_bytes:
        _log.warning(
            "the front of depth %d wants %d MB of memory and %d are free",
            manifest.depth,
            manifest.memory_bytes // 10**6,
            free // 10**6,
        )
    for ref in manifest.files:
        client.download(ref, state.files)
    return OnnxFront(manifest, state.front_folder(manifest), threads)


def _open_codec(assignment: Assignment, state: DeviceState, client: HttpClient) -> Codec:
    if assignment.side is None:
        return codec(assignment.codec)
    path = client.download(assignment.side, state.files)
    return codec(assignment.codec, Side.from_bytes(path.read_bytes()))


def _open_tokenizer(ref: FileRef, state: DeviceState, client: HttpClient) -> Tokenizer:
    path = client.download(ref, state.files)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower.
        raise ModelError(
            "the run's tokenizer cannot be opened",
            got=str(error)[:300],
            allowed="a tokenizer.json of the tokenizers library",
            remedy="update the tokenizers package",
        ) from error


def _put_probe(client: HttpClient, body: bytes) -> None:
    client.put("/v1/probe", body)


def _sleep(stop: threading.Event, seconds: float) -> None:
    """Sleep, but not on after a stop: an uploading thread must not hold up the end."""
    if stop.wait(seconds):
        raise InterruptedError


def _sayable(text: str) -> str:
    """Without what came from bytes that are not UTF-8, as names of files may: it cannot be sent."""
    return text.encode(errors="replace").decode()


def _renamed(column: str) -> tuple[str, str]:
    ours, equals, theirs = column.partition("=")
    if not (ours and equals and theirs):
        raise ConfigError(
            "`--column` is wrong",
            got=repr(column),
            allowed="OURS=THEIRS, as in label=sentiment",
            remedy="name our column, = and the file's",
        )
    return ours, theirs
