"""`splitfrozen serve`: the web process, and the worker that it starts and watches.

The web process holds no torch: it receives, stores and acknowledges. The worker prepares, lifts and
trains. A worker that is killed is started again and continues from its checkpoint; one that fails
with an error ends the run, and `status` says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from splitfrozen import config, logs
from splitfrozen.config import Config
from splitfrozen.disk import write_whole
from splitfrozen.errors import ConfigError, SplitFrozenError, StoreError
from splitfrozen.records import Outcome, Prepared
from splitfrozen.runs import networklog, summary
from splitfrozen.runs.assigning import Assigning
from splitfrozen.runs.folder import NO_SPACE, Address, RunFolder
from splitfrozen.runs.forecast import Forecast, foretell
from splitfrozen.server import connections
from splitfrozen.server.app import Services, build_app
from splitfrozen.server.assignment import bytes_per_token
from splitfrozen.server.auth import identity
from splitfrozen.server.registry import Registry
from splitfrozen.server.store import Store

log = logging.getLogger("splitfrozen.serve")

RESTARTS = 5
"""How often a worker that was killed is started again before the run counts as failed."""
POLL_S = 0.2
INTERRUPTED = 1
"""Exit code of a run that was stopped before it was done."""
GRACE_S = 10.0
"""How long a finished run waits for devices' last reports, and a stopped one for its worker."""
SPACE_S = 10.0
"""How long to wait where the disk was full."""
LONG_S = 600.0
"""A worker that lived so long was able to work."""
STATUS_S = 10.0
SHOWN_JOINS = 20
"""More of them are in join.txt only."""


def serve(source: Path, hide_joins: bool) -> Outcome:
    """Serve a run until it is done or stopped.

    Args:
        source: the run's TOML file, or its folder.
        hide_joins: leave the join strings to join.txt.

    Raises:
        ConfigError: the file, or it differs from the run that its folder holds.
        StoreError: another process serves the run, or the disk refuses.
        SplitFrozenError: the run failed.
    """
    wanted = RunFolder(source).config if source.is_dir() else config.load(source)
    _refuse_what_train_does(wanted)
    run = RunFolder(source) if source.is_dir() else RunFolder.create(wanted)
    _refuse_trained(run)
    logs.also_to(run.root / "run.log")
    with (
        run.lock("serve"),
        contextlib.closing(Registry(run.root)) as registry,
        contextlib.closing(Store(run.store, codecs=run.codecs)) as store,
    ):
        return _Server(run, registry, store, hide_joins).run()


def _refuse_what_train_does(wanted: Config) -> None:
    """Over the network there is SplitFrozen so far. Raises ConfigError."""
    for key, served in (("name", "splitfrozen"), ("reuse", "once"), ("shuffle", "global")):
        got = getattr(wanted.method, key)
        if got != served:
            raise ConfigError(
                f"`method.{key}` cannot be served",
                got=repr(got),
                allowed=repr(served),
                remedy="train it in one process: splitfrozen train RUN.toml, with the rows in "
                "[data]; or leave it out",
            )


def _refuse_trained(run: RunFolder) -> None:
    if run.command == "train":
        raise ConfigError(
            f"{run.root} holds a run that was begun in one process",
            got="`splitfrozen serve`",
            allowed=f"splitfrozen train {run.root}",
            remedy="continue it so, or give the served run its own run.folder",
        )


class _Server:
    """One `serve`, from the certificate to the summary."""

    def __init__(self, run: RunFolder, registry: Registry, store: Store, hide_joins: bool) -> None:
        self._run = run
        self._registry = registry
        self._store = store
        self._hide_joins = hide_joins
        self._assigning = Assigning(run, registry, store)
        self._prepared: Prepared | None = None
        self._stopping = threading.Event()
        self._failure: SplitFrozenError | None = None
        self._told, self._told_at = "", time.monotonic()
        self._foretold = (run.root / "forecast.json").exists()

    def run(self) -> Outcome:
        run, registry = self._run, self._registry
        if registry.state().state == "done":
            log.info("the run was done already")
            return self._done()
        log.info("serving %s", run.root)
        self._refuse_strange_store()
        self._store.recover()
        registry.ensure_slots(run.config.devices.count)
        if registry.state().state in ("failed", "stopped"):
            registry.set_state("preparing" if self._load_prepared() is None else "receiving")
        host = told_host(run.config)
        found = identity(run.root / "tls", [host, "localhost", "127.0.0.1"])
        connections.raise_file_limit()
        connections.quieten_accept()
        with _listening(run) as listener:
            self._invite(Address(host, listener.getsockname()[1], found.fingerprint))
            web = uvicorn.Server(
                uvicorn.Config(
                    build_app(self._services()),
                    http=connections.Connection,
                    ssl_certfile=found.certificate,
                    ssl_keyfile=found.key,
                    ws="none",
                    log_config=None,
                    # Below that uvicorn has a line for each bad request, which anybody may send.
                    log_level="error",
                    access_log=False,
                    server_header=False,
                    timeout_graceful_shutdown=5,
                )
            )
            self._serve(web, listener)
        return self._end()

    def _refuse_strange_store(self) -> None:
        """Samples that no device of the registry sent are somebody else's. Raises StoreError."""
        if self._store.totals() and not self._registry.devices():
            raise StoreError(
                f"{self._run.root} holds samples of devices that it does not know",
                got="a store without its registry.sqlite",
                allowed="both, as this run wrote them",
                remedy="restore registry.sqlite, or start a new run folder",
            )

    def _serve(self, web: uvicorn.Server, listener: connections.Listener) -> None:
        """Run the web server and the worker until one of them ends."""

        def stop(*_: object) -> None:
            self._stopping.set()
            web.should_exit = True

        # uvicorn raises the signals it got once more when it has shut down; they end here.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        watcher = threading.Thread(target=self._watch, args=(web,), name="watcher")
        watcher.start()
        try:
            connections.run(web, listener)
        finally:
            self._stopping.set()
            watcher.join()

    def _end(self) -> Outcome:
        registry = self._registry
        if self._failure is not None:
            registry.set_state("failed", str(self._failure))
            raise self._failure
        if registry.state().state == "done":
            return self._done()
        registry.set_state("stopped")
        log.info("stopped; the same command continues")
        # Not 0: what a script does next with the adapter has to wait.
        return dataclasses.replace(
            summary.outcome(self._run, registry, self._store), exit_code=INTERRUPTED
        )

    def _done(self) -> Outcome:
        """The summary. A run that was trained is not lost to its event log, which is made again."""
        try:
            networklog.write(self._run, self._registry, self._store)
        except Exception as error:
            log.warning("no event log was written: %s: %s", type(error).__name__, error)
        return summary.outcome(self._run, self._registry, self._store)

    # --- the worker --------------------------------------------------------------------------

    def _watch(self, web: uvicorn.Server) -> None:
        """Keep a worker at work; when the run has ended, end the web server."""
        try:
            self._failure = self._keep_working()
            if self._failure is None and not self._stopping.is_set():
                self._await_reports()
        except SplitFrozenError as error:
            self._failure = error
        except Exception as error:
            log.exception("the run cannot be looked after")
            self._failure = _WorkerError(f"{type(error).__name__}: {error}", 1)
        finally:
            web.should_exit = True

    def _keep_working(self) -> SplitFrozenError | None:
        """Start workers until one is done; returns why none will be."""
        killed = 0
        while killed <= RESTARTS:
            began = time.monotonic()
            code = self._work()
            if code == 0 or self._stopping.is_set():
                return None
            if code == NO_SPACE:
                log.warning("the disk is full; trying again in %.0f s", SPACE_S)
                self._stopping.wait(SPACE_S)
                continue
            state = self._registry.state()
            if state.state == "failed":
                return _WorkerError(state.error or "", code)
            # One that worked for long and was then killed is not one that cannot work here.
            killed = 1 if time.monotonic() - began > LONG_S else killed + 1
            log.warning("the worker was killed (code %d); starting it again", code)
        return SplitFrozenError(
            "the worker was killed again and again",
            got=f"exit code {code}, {killed} times in a row",
            allowed="a worker that lives",
            remedy=f"see {self._run.root / 'run.log'}; is there enough memory?",
        )

    def _work(self) -> int:
        """Run one worker to its end, and look after the run meanwhile; returns its exit code."""
        worker = subprocess.Popen(
            [sys.executable, "-m", "splitfrozen.runs.worker", str(self._run.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # Ctrl-C is for us; we tell the worker when it is its turn.
            process_group=0,
            # Threads that spin at barriers starve each other where cores are shared, as with us:
            # a training step then takes eight times as long (docs/log.md, 2026-11-20).
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
        try:
            while worker.poll() is None and not self._stopping.wait(POLL_S):
                self._forecast(anew=self._assigning.look())
                self._tell_progress()
            if worker.poll() is None:
                worker.terminate()
            return worker.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            return worker.wait()
        finally:
            assert worker.stdin is not None
            worker.stdin.close()

    def _tell_progress(self) -> None:
        """One line now and then, where it is another than before."""
        if time.monotonic() - self._told_at < STATUS_S:
            return
        self._told_at, line = time.monotonic(), summary.line(self._run, self._registry, self._store)
        if line != self._told:
            self._told = line
            log.info("%s", line)

    def _await_reports(self) -> None:
        """Devices that have just had their last receipt are about to report."""
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end and any(
            row.depth is not None and row.report is None and row.failure is None and not row.revoked
            for row in self._registry.devices()
        ):
            time.sleep(POLL_S)

    # --- what people see ---------------------------------------------------------------------

    def _forecast(self, *, anew: bool) -> None:
        """Once every device has a depth, say what is expected; `anew` where there is a new plan."""
        prepared = self._load_prepared()
        self._foretold &= not anew
        if self._foretold or prepared is None:
            return
        rows = [row for row in self._registry.devices() if not row.revoked]
        if any(row.depth is None for row in rows):
            return
        shape = networklog.model_shape(self._run)
        if shape is None:
            return
        path, self._foretold = self._run.root / "forecast.json", True
        first = not path.exists()
        try:
            expected = foretell(rows, self._run.config, shape, bytes_per_token(prepared))
            told = json.dumps([dataclasses.asdict(one) for one in expected])
            write_whole(path, told.encode())
        except SplitFrozenError as error:
            log.warning("no forecast: %s", error)
            return
        if first:
            log.info("forecast\n%s", forecast_table(expected))

    def _invite(self, address: Address) -> None:
        run, tokens = self._run, self._registry.tokens().values()
        run.write_address(address)
        joins = [address.join(token) for token in tokens]
        path = run.root / "join.txt"
        write_whole(path, "".join(join + "\n" for join in joins).encode(), mode=0o600)
        log.info("listening on %s port %d", address.host, address.port)
        if joins:
            log.info("join strings, one for each device, are in %s", path)
        if joins and not self._hide_joins:
            # Not logged: they are secrets, and logs are passed on.
            shown = [f"  splitfrozen join {join} --data FILE\n" for join in joins[:SHOWN_JOINS]]
            more = f"  ... and {len(joins) - SHOWN_JOINS} more\n" if joins[SHOWN_JOINS:] else ""
            sys.stderr.write(f"\non each device, one of these:\n\n{''.join(shown)}{more}\n")
            sys.stderr.flush()

    # --- small things ------------------------------------------------------------------------

    def _services(self) -> Services:
        run = self._run
        return Services(run.config, self._store, self._registry, run.files, self._load_prepared)

    def _load_prepared(self) -> Prepared | None:
        if self._prepared is None:
            self._prepared = self._run.prepared()
        return self._prepared


class _WorkerError(SplitFrozenError):
    """What the worker said before it ended, with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        Exception.__init__(self, message)
        self.exit_code = exit_code


def told_host(wanted: Config) -> str:
    """The name or address that devices are told."""
    server = wanted.server
    if server.name is not None:
        return server.name
    try:
        unspecified = ipaddress.ip_address(server.host).is_unspecified
    except ValueError:
        unspecified = False
    return _outward_address() if unspecified else server.host


def _outward_address() -> str:
    """The address of this machine that others reach; its name where it has no route outward."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only chooses a route (RFC 5737 address).
            probe.connect(("192.0.2.1", 9))
            found = str(probe.getsockname()[0])
        except OSError:
            found = socket.gethostname()
    if found == "localhost" or found.startswith("127."):
        log.warning("devices are told %s, which is themselves; set server.name", found)
    return found


def forecast_table(expected: Sequence[Forecast]) -> str:
    """What each device is expected to do, for people."""
    rows = [
        (f.device, str(f.depth), str(f.samples), f"{f.bytes / 1e6:.1f}", f"{f.seconds:.1f}")
        for f in expected
    ]
    return summary.table(("device", "depth", "samples", "MB", "seconds"), rows)


@contextmanager
def _listening(run: RunFolder) -> Iterator[connections.Listener]:
    """A bound socket. A port that was free is kept from start to start: devices were told it."""
    server, before = run.config.server, run.address()
    port = server.port or (0 if before is None else before.port)
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with connections.Listener(family, connections.most_connections()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((server.host, port))
            listener.listen(1024)
        except OSError as error:
            raise ConfigError(
                "`server.host` and `server.port` cannot be listened on",
                got=f"{server.host} port {port}: {error.strerror}",
                allowed="an address of this machine and a free port",
                remedy="choose another, or 0 for any free port",
            ) from error
        yield listener
