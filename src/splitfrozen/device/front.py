"""front(n) on ONNX Runtime: the frozen blocks that a device computes.

Nothing that came from the network is opened before its hash is checked, and a graph may name only
the weight files of its manifest: a graph that names another file of this machine as 'weights'
would carry it away in the activations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from splitfrozen.data.inputs import INPUTS, model_inputs
from splitfrozen.errors import ModelError, RefusedError
from splitfrozen.records import FileRef, Floats, FrontManifest, Sample

GRAPH_BYTES = 64 * 1024 * 1024
"""A graph without its weights is far smaller; more is refused before it is read."""


class OnnxFront:
    """A front in one file folder, as `records.Front`.

    Deterministic for one machine and one batch: sequential execution, fixed threads.
    """

    def __init__(self, manifest: FrontManifest, folder: Path, threads: int) -> None:
        """Load the front.

        Args:
            manifest: what the server says the front is.
            folder: holds the manifest's files under their names.
            threads: for the operators.

        Raises:
            RefusedError: a file is not the one of the manifest, or the graph names others.
            ModelError: ONNX Runtime cannot run the graph.
        """
        for ref in manifest.files:
            _require_hash(folder / ref.name, ref)
        _require_own_weights(manifest, folder)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.use_deterministic_compute = True
        # Batches differ in shape, so planned memory would be planned anew each time.
        options.enable_mem_pattern = False
        # Idle threads that spin take the cores from encoding and from whatever the device is for.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                str(folder / manifest.graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base.
            raise _cannot_run(manifest, error) from error
        self._manifest = manifest
        self._run_options = ort.RunOptions()
        self._inputs = [node.name for node in self._session.get_inputs()]
        unknown = set(self._inputs) - set(INPUTS)
        if unknown:
            raise ModelError(
                f"the front of depth {manifest.depth} takes an unknown input",
                got=", ".join(sorted(unknown)),
                allowed=", ".join(INPUTS),
                remedy="install the splitfrozen version of the server",
            )
        self._output = self._session.get_outputs()[0].name

    @property
    def depth(self) -> int:
        return self._manifest.depth

    def interrupt(self) -> None:
        """Make the forward pass that another thread is in, and every later one, fail soon."""
        self._run_options.terminate = True

    def __call__(self, batch: Sequence[Sample]) -> list[Floats]:
        """Return float32 [T, D] for each sample, in order, without padding.

        Raises ModelError where the graph fails or gives another shape.
        """
        feeds = dict(zip(self._inputs, model_inputs(batch, self._inputs), strict=True))
        try:
            hidden = self._session.run([self._output], feeds, self._run_options)[0]
        except Exception as error:
            raise _cannot_run(self._manifest, error) from error
        longest = max(sample.length for sample in batch)
        expected = (len(batch), longest, self._manifest.width)
        if hidden.shape != expected:
            raise ModelError(
                f"the front of depth {self.depth} gives activations of another shape",
                got=hidden.shape,
                allowed=f"{expected}: samples, tokens, width",
                remedy="tell who runs the server",
            )
        return [
            np.array(hidden[i, : sample.length], dtype=np.float32) for i, sample in enumerate(batch)
        ]


def _cannot_run(manifest: FrontManifest, error: Exception) -> ModelError:
    return ModelError(
        f"ONNX Runtime {ort.__version__} cannot run the front of depth {manifest.depth}",
        got=" ".join(str(error).split())[:300],
        allowed="a graph that this version runs",
        remedy="update onnxruntime, or check the free memory",
    )


def _require_hash(path: Path, ref: FileRef) -> None:
    try:
        if path.stat().st_size != ref.bytes:
            found = f"{path.stat().st_size} bytes"
        else:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        found = error.strerror or str(error)
    if found != ref.sha256:
        raise RefusedError(
            f"{path.name} is not the file that the server announced",
            got=found,
            allowed=f"sha256 {ref.sha256}, {ref.bytes} bytes",
            remedy="delete the device's state folder and join again",
        )


def _require_own_weights(manifest: FrontManifest, folder: Path) -> None:
    names = {ref.name: ref for ref in manifest.files}
    graph = names.get(manifest.graph)
    if graph is None or graph.bytes > GRAPH_BYTES:
        raise RefusedError(
            "the front's graph is not usable",
            got=f"{manifest.graph}, {graph.bytes} bytes" if graph else manifest.graph,
            allowed=f"one of the front's files, {GRAPH_BYTES} bytes at most",
            remedy="tell who runs the server",
        )
    try:
        named = set(external_files((folder / graph.name).read_bytes()))
    except (IndexError, ValueError) as error:
        raise ModelError(
            f"{graph.name} is not an ONNX graph",
            got=str(error),
            allowed="a protocol buffer of ONNX",
            remedy="tell who runs the server",
        ) from error
    if named != names.keys() - {graph.name}:
        raise RefusedError(
            "the front's graph names other weight files than its manifest",
            got=sorted(named),
            allowed=str(sorted(names.keys() - {graph.name})),
            remedy="do not join this server, or tell who runs it",
        )


# Which fields of ONNX's messages lead to a tensor, by field number (onnx/onnx.proto). A tensor's
# external_data holds its entries.
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}


def external_files(graph: bytes) -> Iterator[str]:
    """Yield the files that an ONNX graph names as weights, wherever in the graph.

    Raises ValueError or IndexError for bytes that are no protocol buffer.
    """
    pending = [("model", memoryview(graph))]
    while pending:
        kind, data = pending.pop()
        if kind == "entry":
            strings = {number: bytes(value) for number, value in _fields(data)}
            if strings.get(1) == b"location":
                yield strings.get(2, b"").decode()
            continue
        for number, value in _fields(data):
            if number in _FIELDS[kind]:
                pending.append((_FIELDS[kind][number], value))


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the length-delimited fields of one protocol-buffer message; skip the others."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field that is longer than its message")
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
