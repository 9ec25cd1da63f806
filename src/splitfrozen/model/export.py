"""A front as ONNX: a graph and weights, each a file named by what is in it.

Every tensor of at least LARGE bytes is a file of its own, so two depths share the files of the
blocks they share. What the exporter notes about this machine and this process is removed: the same
model gives the same bytes elsewhere. The graph is compared with torch before it gets its name.

Precisions. Activations enter and leave every linear map in float32; weights are kept as

    float32   they are;
    float16   half of it, widened when the runtime loads them (embeddings: after the lookup);
    int8      8 bits with one scale for each output of a map and each row of an embedding. A map's
              input is rounded to 8 bits with one scale for each token, so that a sample's
              activation does not depend on the samples it is batched with.

Eight bits are stored as uint8 around 128: the runtime's uint8 x int8 kernels saturate on x86
machines without VNNI, its uint8 x uint8 kernels do not.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch

from splitfrozen.disk import write_whole
from splitfrozen.errors import ModelError
from splitfrozen.model import costs
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import FileRef, FrontManifest, Precision

LARGE = 16 * 1024
OPSET = 20

# Largest |ONNX - torch| / |torch| over the real tokens (Frobenius norms).
TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "float16": 1e-2, "int8": 0.2}
_CHECKED_LENGTHS = ((1,), (12, 7, 1), (33, 20))

_PLAIN_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0}

Array = npt.NDArray[Any]


def export_front(
    sliced: SlicedModel,
    depth: int,
    precision: Precision,
    folder: Path,
    longest: int = 128,
    chunk_bytes: int = costs.CHUNK_BYTES,
) -> FrontManifest:
    """Write front(depth) to `folder` and check it against torch.

    Files that are there already are kept; a name appears only with its whole content. The model
    is on the CPU in float32.

    Args:
        sliced: the model.
        depth: n.
        precision: of the weights.
        folder: of all files.
        longest, chunk_bytes: T of the longest sample that a device may have, and the size of its
            uploads; only the memory that it needs depends on them.

    Raises:
        ModelError: `depth` is not in 1..L, or the graph does not reproduce the front.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = _trace(sliced, depth)
    _anonymise(model)
    if precision == "float16":
        _halve(model.graph)
    elif precision == "int8":
        _quantise(model.graph)
    _drop_unread(model.graph)
    weight_bytes = _runtime_bytes(model.graph)
    weights = _detach(model.graph, folder)
    graph = ir.to_proto(model).SerializeToString(deterministic=True)
    graph_ref = _ref(graph, ".onnx")
    _keep(folder / graph_ref.name, graph, lambda path: _compare(sliced, depth, precision, path))
    files = (graph_ref, *weights)
    identity = "\n".join([*(file.sha256 for file in files), str(depth), precision])
    return FrontManifest(
        depth=depth,
        width=sliced.width,
        precision=precision,
        hash=hashlib.sha256(identity.encode()).hexdigest(),
        graph=graph_ref.name,
        files=files,
        flops_per_token=costs.map_flops_per_token(sliced.linear_maps(0, depth).values()),
        memory_bytes=costs.front_memory_bytes(sliced.shape, weight_bytes, longest, chunk_bytes),
    )


def _trace(sliced: SlicedModel, depth: int) -> ir.Model:
    batch = sliced.example(_CHECKED_LENGTHS[-1], seed=0)
    free = torch.export.Dim.DYNAMIC
    dynamic = {0: free} if sliced.kind == "image" else {0: free, 1: free}
    front = sliced.front(depth)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                front,
                batch,
                dynamo=True,
                dynamic_shapes={"inputs": (dynamic,) * len(batch)},
                input_names=list(sliced.inputs),
                output_names=["hidden"],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(
            f"{type(sliced.model).__name__} cannot be exported to ONNX",
            got=str(error.__cause__ or error).splitlines()[0],
            allowed="a model whose blocks torch.export can trace",
            remedy="choose a model of another family",
        ) from error
    assert program is not None
    return program.model


def _anonymise(model: ir.Model) -> None:
    """Remove what tells of this machine or process: stack traces, versions, names of symbols."""
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "splitfrozen", None
    graph = model.graph
    graph.metadata_props.clear()
    ends = (*graph.inputs, *graph.outputs)
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in ends:
                value.type = value.shape = None
    for value in (*ends, *graph.initializers.values()):
        value.metadata_props.clear()
    for value in ends:
        assert value.shape is not None
        dims = [dim if isinstance(dim, int) else "BT"[axis] for axis, dim in enumerate(value.shape)]
        value.shape = ir.Shape(dims)


class _Swap:
    """Builds the nodes that stand in for `node`, then puts them into its place."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph = graph
        self._node = node
        self._nodes: list[ir.Node] = []

    @property
    def inputs(self) -> list[ir.Value]:
        return [value for value in self._node.inputs if value is not None]

    def apply(
        self, op: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: Any
    ) -> ir.Value:
        name = f"{self._node.name}.{len(self._nodes)}"
        output = ir.Value(name=name)
        node = ir.node(op, inputs, attributes, domain=domain, outputs=[output], name=name)
        self._nodes.append(node)
        return output

    def insert(self) -> None:
        self._graph.insert_before(self._node, self._nodes)

    def replace(self, result: ir.Value) -> None:
        self.insert()
        old = self._node.outputs[0]
        assert not old.is_graph_output(), "a front ends with a residual sum or a norm"
        old.replace_all_uses_with(result)
        self._graph.remove(self._node, safe=True)


def _halve(graph: ir.Graph) -> None:
    for value in _weights(graph):
        with np.errstate(over="ignore"):  # the comparison with torch finds it
            halves = _constant(value).astype(np.float16)
        half = _initializer(graph, f"{value.name}.half", halves)
        for node, index in tuple(value.uses()):
            swap = _Swap(graph, node)
            if node.op_type == "Gather":
                rows = swap.apply("Gather", [half, swap.inputs[1]], axis=0)
                swap.replace(swap.apply("Cast", [rows], to=ir.DataType.FLOAT))
            else:
                wide = swap.apply("Cast", [half], to=ir.DataType.FLOAT)
                swap.insert()
                node.replace_input_with(index, wide)


def _quantise(graph: ir.Graph) -> None:
    graph.opset_imports["com.microsoft"] = 1
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for value in _weights(graph):
        matrix = len(_constant(value).shape) == 2
        for node, index in tuple(value.uses()):
            if matrix and (node.op_type, index) == ("Gather", 0):
                _quantise_lookup(graph, node)
            elif matrix and (node.op_type, index) in (("MatMul", 1), ("Gemm", 1)):
                _quantise_map(graph, node, rounded)


def _quantise_lookup(graph: ir.Graph, node: ir.Node) -> None:
    swap = _Swap(graph, node)
    table, ids = swap.inputs
    levels, scales = _levels(_constant(table), axis=1)
    rows = swap.apply("Gather", [_initializer(graph, f"{table.name}.levels", levels), ids], axis=0)
    scale = swap.apply("Gather", [_initializer(graph, f"{table.name}.scales", scales), ids], axis=0)
    centred = swap.apply(
        "Sub", [swap.apply("Cast", [rows], to=ir.DataType.FLOAT), _scalar(graph, np.float32(128))]
    )
    swap.replace(swap.apply("Mul", [centred, scale]))


def _quantise_map(
    graph: ir.Graph, node: ir.Node, rounded: dict[ir.Value, tuple[ir.Value, ir.Value]]
) -> None:
    """Replace x @ W (+ b). `rounded` keeps the 8-bit inputs, which maps side by side share."""
    swap = _Swap(graph, node)
    source, weight, *rest = swap.inputs
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if any(attributes.get(name, usual) != usual for name, usual in _PLAIN_GEMM.items()):
        return
    matrix = _constant(weight).T if attributes.get("transB") else _constant(weight)
    if source not in rounded:
        rounded[source] = _round_tokens(graph, swap, source, matrix.shape[0])
    tokens, token_scales = rounded[source]
    levels, scales = _levels(matrix, axis=0)
    middle = _scalar(graph, np.uint8(128))
    result = swap.apply(
        "MatMulIntegerToFloat",
        [
            tokens,
            _initializer(graph, f"{weight.name}.levels", levels),
            _scalar(graph, np.float32(1)),
            _initializer(graph, f"{weight.name}.scales", scales.reshape(-1)),
            middle,
            middle,
        ],
        domain="com.microsoft",
    )
    result = swap.apply("Mul", [result, token_scales])
    for bias in rest:
        result = swap.apply("Add", [result, bias])
    if node.op_type == "MatMul":
        shape = swap.apply("Shape", [source], end=-1)
        width = _vector(graph, matrix.shape[1])
        result = swap.apply("Reshape", [result, swap.apply("Concat", [shape, width], axis=0)])
    swap.replace(result)


def _round_tokens(
    graph: ir.Graph, swap: _Swap, source: ir.Value, width: int
) -> tuple[ir.Value, ir.Value]:
    """8-bit rows [tokens, width] of `source` and their scales [tokens, 1]."""
    last = _vector(graph, 1)
    flat = swap.apply("Reshape", [source, _vector(graph, -1, width)])
    largest = swap.apply("ReduceMax", [swap.apply("Abs", [flat]), last], keepdims=1)
    # A token of zeros must not be divided by zero.
    largest = swap.apply("Max", [largest, _scalar(graph, np.float32(1e-12))])
    scales = swap.apply("Mul", [largest, _scalar(graph, np.float32(1 / 127))])
    each = swap.apply("Squeeze", [scales, last])
    middle = swap.apply("Expand", [_scalar(graph, np.uint8(128)), swap.apply("Shape", [each])])
    return swap.apply("QuantizeLinear", [flat, each, middle], axis=0), scales


def _levels(matrix: Array, axis: int) -> tuple[Array, Array]:
    """uint8 levels around 128 and float32 scales, one for all entries along `axis`."""
    scales = np.abs(matrix).max(axis, keepdims=True) / np.float32(127)
    scales[scales == 0] = 1
    return (np.rint(matrix / scales) + 128).astype(np.uint8), scales.astype(np.float32)


def _weights(graph: ir.Graph) -> list[ir.Value]:
    """float32 initializers that are matrices or more."""
    return [
        value
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) >= 2
    ]


def _constant(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _scalar(graph: ir.Graph, number: np.generic) -> ir.Value:
    return _initializer(graph, f"{number.dtype}.{number}", np.asarray(number))


def _vector(graph: ir.Graph, *numbers: int) -> ir.Value:
    return _initializer(graph, f"vector.{numbers}", np.array(numbers, np.int64))


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """The initializer called `name`, made at first use."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(
                name=name,
                const_value=tensor,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
            )
        )
    return graph.initializers[name]


def _drop_unread(graph: ir.Graph) -> None:
    for name, value in tuple(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _runtime_bytes(graph: ir.Graph) -> int:
    """Bytes of the weights as the runtime holds them: halves that feed a map are widened."""
    total = 0
    for value in graph.initializers.values():
        widened = any(node.op_type == "Cast" for node, _ in value.uses())
        total += _constant(value).nbytes * (2 if widened else 1)
    return total


def _detach(graph: ir.Graph, folder: Path) -> list[FileRef]:
    """Move large initializers into files."""
    files: dict[str, FileRef] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < LARGE:
            continue
        data = tensor.tobytes()
        ref = _ref(data, ".bin")
        _keep(folder / ref.name, data)
        value.const_value = ir.ExternalTensor(
            ref.name,
            0,
            len(data),
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=folder,
        )
        files[ref.name] = ref
    return list(files.values())


def _ref(data: bytes, suffix: str) -> FileRef:
    digest = hashlib.sha256(data).hexdigest()
    return FileRef(name=digest[:40] + suffix, sha256=digest, bytes=len(data))


def _keep(path: Path, data: bytes, check: Callable[[Path], object] = lambda _: None) -> None:
    """Write `data` unless the file holds it already; it gets its name only if it passes `check`."""
    if not (path.exists() and path.stat().st_size == len(data) and path.read_bytes() == data):
        write_whole(path, data, check=check)


def _compare(sliced: SlicedModel, depth: int, precision: Precision, graph: Path) -> None:
    """Run graph and torch side by side on random batches with padding."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    front = sliced.front(depth)
    for lengths in _CHECKED_LENGTHS:
        inputs = sliced.example([min(length, sliced.longest) for length in lengths], seed=1)
        with torch.no_grad():
            wanted = front(*inputs).numpy()
        feed = {name: x.numpy() for name, x in zip(sliced.inputs, inputs, strict=True)}
        got = session.run(["hidden"], feed)[0]
        if sliced.kind != "image":
            real = inputs[1].numpy().astype(bool)
            wanted, got = wanted[real], got[real]
        with np.errstate(invalid="ignore"):
            error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        if not error <= TOLERANCE[precision]:
            raise ModelError(
                f"front({depth}) in {precision} does not reproduce the model",
                got=f"a relative error of {error:.2g}",
                allowed=f"at most {TOLERANCE[precision]:g}",
                remedy='choose model.front = "float32", or another model',
            )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    with warnings.catch_warnings():
        # torch 2.13 calls an interface of its own that it deprecates.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        # torchvision's operators are missing without torchvision; no front uses them.
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
