"""The front on ONNX Runtime, against the same computation in numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitfrozen.device.front import OnnxFront, external_files
from splitfrozen.errors import ModelError, RefusedError
from splitfrozen.records import FileRef, FrontManifest, Sample

VOCABULARY, WIDTH = 50, 8


def weights() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(1)
    return (
        draw.standard_normal((VOCABULARY, WIDTH)).astype(np.float32),
        draw.standard_normal((WIDTH, WIDTH)).astype(np.float32),
    )


def tiny_front(folder: Path) -> FrontManifest:
    """Embedding, matrix product, plus the mean over the masked tokens: a wrong mask shows."""
    table, matrix = weights()
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "matrix"], ["moved"]),
        helper.make_node("Cast", ["attention_mask"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["real", "last"], ["mask"]),
        helper.make_node("Mul", ["moved", "mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "second"], ["sum"], keepdims=1),
        helper.make_node("ReduceSum", ["mask", "second"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("Add", ["moved", "mean"], ["hidden"]),
    ]
    shape = ["batch", "tokens"]
    graph = helper.make_graph(
        nodes,
        "front",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, shape),
        ],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*shape, WIDTH])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(matrix, "matrix"),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "second"),
        ],
    )
    return save(graph, folder)


def save(graph: onnx.GraphProto, folder: Path, width: int = WIDTH) -> FrontManifest:
    folder.mkdir(exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(
        model,
        folder / "front.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=100,
    )
    files = tuple(reference(folder / name) for name in ("front.onnx", "weights.bin"))
    return FrontManifest(
        depth=2,
        width=width,
        precision="float32",
        hash="0" * 64,
        graph="front.onnx",
        files=files,
        flops_per_token=2 * WIDTH * WIDTH,
        memory_bytes=1,
    )


def reference(path: Path) -> FileRef:
    data = path.read_bytes()
    return FileRef(name=path.name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def text(number: int, tokens: Sequence[int]) -> Sample:
    return Sample(
        number, np.array(tokens, np.int32), None, None, np.zeros(1, np.int32), len(tokens)
    )


SAMPLES = [text(0, [3, 4, 5]), text(1, [49]), text(2, [7, 1, 0, 2, 9])]


def expected(sample: Sample) -> np.ndarray:
    table, matrix = weights()
    moved = table[sample.tokens] @ matrix
    return moved + moved.mean(axis=0)


def test_each_sample_comes_out_as_if_alone_and_unpadded(tmp_path: Path) -> None:
    front = OnnxFront(tiny_front(tmp_path), tmp_path, threads=1)
    assert front.depth == 2
    for sample, hidden in zip(SAMPLES, front(SAMPLES), strict=True):
        assert hidden.dtype == np.float32
        assert hidden.shape == (sample.length, WIDTH)
        assert hidden.base is None
        np.testing.assert_allclose(hidden, expected(sample), rtol=1e-5, atol=1e-6)


def test_the_same_batch_gives_the_same_bytes(tmp_path: Path) -> None:
    manifest = tiny_front(tmp_path)
    once = [hidden.tobytes() for hidden in OnnxFront(manifest, tmp_path, 1)(SAMPLES)]
    again = [hidden.tobytes() for hidden in OnnxFront(manifest, tmp_path, 1)(SAMPLES)]
    assert once == again


def test_token_types_are_fed_and_float16_comes_out_as_float32(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["input_ids", "token_type_ids"], ["sum"]),
            helper.make_node("Gather", ["table", "sum"], ["half"]),
        ],
        "front",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"])
            for name in ("input_ids", "token_type_ids")
        ],
        [helper.make_tensor_value_info("half", TensorProto.FLOAT16, ["b", "t", WIDTH])],
        [numpy_helper.from_array(weights()[0].astype(np.float16), "table")],
    )
    front = OnnxFront(save(graph, tmp_path), tmp_path, 1)
    pair = Sample(
        0,
        np.array([1, 2], np.int32),
        np.array([0, 1], np.int32),
        None,
        np.zeros(1, np.int32),
        2,
    )
    hidden = front([pair])[0]
    assert hidden.dtype == np.float32
    np.testing.assert_array_equal(hidden, weights()[0].astype(np.float16)[[1, 3]])


def image_front(folder: Path) -> OnnxFront:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["pixel_values", "shape"], ["hidden"])],
        "front",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["b", 1, 4, 4])],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["b", "t", WIDTH])],
        [
            numpy_helper.from_array(np.array([-1, 2, WIDTH]), "shape"),
            numpy_helper.from_array(np.zeros(64, np.float32), "unused"),
        ],
    )
    return OnnxFront(save(graph, folder), folder, 1)


def test_images_are_fed_as_pixels(tmp_path: Path) -> None:
    front = image_front(tmp_path)
    pixels = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    nothing = np.zeros(0, np.int32)
    image = Sample(0, nothing, None, pixels, np.zeros(1, np.int32), 2)
    np.testing.assert_array_equal(front([image, image])[1], pixels.reshape(2, WIDTH))
    with pytest.raises(ModelError, match="got samples of text"):
        front([text(0, [1, 2])])


def test_a_changed_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    manifest = tiny_front(tmp_path)
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    with pytest.raises(RefusedError, match=r"weights\.bin is not the file"):
        OnnxFront(manifest, tmp_path, 1)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(RefusedError, match="No such file"):
        OnnxFront(manifest, tmp_path, 1)


@pytest.mark.parametrize("location", ["../secret", "other.bin"])
def test_a_graph_that_names_another_file_is_refused(tmp_path: Path, location: str) -> None:
    tiny_front(tmp_path / "front")
    path = tmp_path / "front" / "front.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    manifest = FrontManifest(
        depth=1,
        width=WIDTH,
        precision="float32",
        hash="0" * 64,
        graph="front.onnx",
        files=(reference(path), reference(tmp_path / "front" / "weights.bin")),
        flops_per_token=1,
        memory_bytes=1,
    )
    with pytest.raises(RefusedError, match="names other weight files"):
        OnnxFront(manifest, tmp_path / "front", 1)


def test_external_files_are_found_wherever_they_hide() -> None:
    def hidden_tensor(location: str) -> TensorProto:
        tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="offset", value="5")
        tensor.external_data.add(key="location", value=location)
        return tensor

    inner = helper.make_graph([], "inner", [], [], [hidden_tensor("in-subgraph")])
    nodes = [
        helper.make_node("Constant", [], ["a"], value=hidden_tensor("in-attribute")),
        helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [hidden_tensor("in-graph")])
    function = helper.make_function("own", "f", [], ["a"], nodes[:1], [])
    model = helper.make_model(graph, functions=[function])
    found = sorted(external_files(model.SerializeToString()))
    assert found == ["in-attribute"] * 2 + ["in-graph"] + ["in-subgraph"] * 2


def test_what_is_no_graph_is_a_model_error(tmp_path: Path) -> None:
    manifest = tiny_front(tmp_path)
    (tmp_path / "front.onnx").write_bytes(b"\xff" * 64)
    files = (reference(tmp_path / "front.onnx"), manifest.files[1])
    broken = FrontManifest(
        depth=1,
        width=WIDTH,
        precision="float32",
        hash="0" * 64,
        graph="front.onnx",
        files=files,
        flops_per_token=1,
        memory_bytes=1,
    )
    with pytest.raises(ModelError, match="not an ONNX graph"):
        OnnxFront(broken, tmp_path, 1)


def test_another_shape_than_promised_is_a_model_error(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["hidden"])],
        "front",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["b", "t", WIDTH])],
        [numpy_helper.from_array(weights()[0], "table")],
    )
    front = OnnxFront(save(graph, tmp_path, width=WIDTH + 1), tmp_path, 1)
    with pytest.raises(ModelError, match=r"\(3, 5, 8\)"):
        front(SAMPLES)


def test_an_id_beyond_the_vocabulary_is_a_model_error(tmp_path: Path) -> None:
    front = OnnxFront(tiny_front(tmp_path), tmp_path, 1)
    with pytest.raises(ModelError, match="cannot run the front"):
        front([text(0, [VOCABULARY])])


def test_an_unknown_input_is_a_model_error(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "positions"], ["hidden"])],
        "front",
        [helper.make_tensor_value_info("positions", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["b", "t", WIDTH])],
        [numpy_helper.from_array(weights()[0], "table")],
    )
    with pytest.raises(ModelError, match="unknown input: got positions"):
        OnnxFront(save(graph, tmp_path), tmp_path, 1)


def test_an_interrupted_front_does_not_run_on(tmp_path: Path) -> None:
    front = OnnxFront(tiny_front(tmp_path), tmp_path, 1)
    assert len(front(SAMPLES)) == 3
    front.interrupt()
    with pytest.raises(ModelError):
        front(SAMPLES)
