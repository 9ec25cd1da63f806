"""model.export: fronts as ONNX that plain ONNX Runtime opens and that repeat torch."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from splitfrozen.errors import ModelError
from splitfrozen.model import export
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.records import FrontManifest, Precision

# Relative error (Frobenius) seen on tiny models: 5e-7, 3e-4 and 2e-2 at most.
BOUNDS: dict[Precision, float] = {"float32": 3e-6, "float16": 2e-3, "int8": 0.1}
SHAPES = ((1,), (14, 12, 5, 1), (20, 20), (9,) * 6)
DECODERS = [
    f"{name}-causal_lm" for name in ("gemma2", "gemma3", "gpt_neox", "mistral", "opt", "qwen2")
]
# Wide enough that its matrices become files of their own.
WIDE = {"hidden_size": 128, "n_inner": 256, "vocab_size": 500}


class Exports:
    """Fronts of tiny models, each exported once for all tests of this file."""

    def __init__(self, tiny: Callable[..., Any], folder: Path) -> None:
        self.folder = folder
        self._tiny = tiny
        self._sliced: dict[str, SlicedModel] = {}
        self._manifests: dict[tuple[str, int, Precision], FrontManifest] = {}

    def sliced(self, id_: str) -> SlicedModel:
        if id_ not in self._sliced:
            changes = WIDE if id_ == "gpt2-causal_lm" else {}
            self._sliced[id_] = SlicedModel(self._tiny(id_, **changes))
        return self._sliced[id_]

    def __call__(self, id_: str, depth: int, precision: Precision) -> FrontManifest:
        key = (id_, depth, precision)
        if key not in self._manifests:
            self._manifests[key] = export.export_front(
                self.sliced(id_), depth, precision, self.folder
            )
        return self._manifests[key]


@pytest.fixture(scope="module")
def exports(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tiny, tmp_path_factory.mktemp("fronts"))


def run(manifest: FrontManifest, folder: Path, feed: dict[str, Any]) -> Any:
    session = onnxruntime.InferenceSession(
        str(folder / manifest.graph), providers=["CPUExecutionProvider"]
    )
    assert [output.name for output in session.get_outputs()] == ["hidden"]
    return session.run(["hidden"], feed)[0]


def error(sliced: SlicedModel, manifest: FrontManifest, folder: Path, lengths: Any) -> float:
    inputs = sliced.example(lengths, seed=3)
    with torch.no_grad():
        wanted = sliced.front(manifest.depth)(*inputs).numpy()
    feed = {name: value.numpy() for name, value in zip(sliced.inputs, inputs, strict=True)}
    got = run(manifest, folder, feed)
    assert got.dtype == np.float32
    assert got.shape == wanted.shape
    if sliced.kind != "image":
        real = inputs[1].numpy().astype(bool)
        got, wanted = got[real], wanted[real]
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def large_files(manifest: FrontManifest) -> set[str]:
    return {file.name for file in manifest.files[1:]}


@pytest.mark.parametrize(
    ("id_", "precision"),
    [
        ("gpt2-causal_lm", "float32"),
        ("gpt2-causal_lm", "float16"),
        ("gpt2-causal_lm", "int8"),
        ("llama-causal_lm", "float32"),
        pytest.param("llama-causal_lm", "float16", marks=pytest.mark.slow),
        ("llama-causal_lm", "int8"),
        ("bert-classification", "float32"),
        pytest.param("bert-classification", "float16", marks=pytest.mark.slow),
        pytest.param("bert-classification", "int8", marks=pytest.mark.slow),
        ("vit-image", "float32"),
        pytest.param("vit-image", "float16", marks=pytest.mark.slow),
        ("vit-image", "int8"),
    ],
)
def test_the_graph_repeats_torch(exports: Exports, id_: str, precision: Precision) -> None:
    manifest = exports(id_, 1, precision)
    errors = [error(exports.sliced(id_), manifest, exports.folder, shape) for shape in SHAPES]
    assert max(errors) <= BOUNDS[precision]
    if precision != "float32":
        assert min(errors) > 1e-6  # it did round


@pytest.mark.slow
@pytest.mark.parametrize("id_", ["distilbert-classification", "roberta-classification", *DECODERS])
def test_every_family_can_be_exported(tiny: Callable[..., Any], tmp_path: Path, id_: str) -> None:
    """Whole models, all maps rounded; the families above are left out."""
    sliced = SlicedModel(tiny(id_))
    manifest = export.export_front(sliced, sliced.block_count, "int8", tmp_path)
    assert max(error(sliced, manifest, tmp_path, shape) for shape in SHAPES) <= BOUNDS["int8"]
    nodes = [node.op_type for node in onnx.load(tmp_path / manifest.graph).graph.node]
    maps = len(sliced.linear_maps(0, sliced.block_count))
    assert nodes.count("MatMulIntegerToFloat") >= maps


def test_a_deeper_front_adds_only_the_files_of_its_blocks(exports: Exports) -> None:
    one = exports("gpt2-causal_lm", 1, "float32")
    two = exports("gpt2-causal_lm", 2, "float32")
    assert large_files(one) < large_files(two)
    assert len(large_files(one)) == 6  # tokens, positions and the four maps of a block
    assert len(large_files(two)) == 10
    assert one.hash != two.hash


def test_the_manifest_tells_what_is_on_disk(exports: Exports) -> None:
    manifest = exports("gpt2-causal_lm", 2, "float32")
    assert (manifest.depth, manifest.width, manifest.precision) == (2, 128, "float32")
    assert manifest.graph == manifest.files[0].name
    for file in manifest.files:
        data = (exports.folder / file.name).read_bytes()
        assert len(data) == file.bytes
        assert hashlib.sha256(data).hexdigest() == file.sha256
        assert file.name.startswith(file.sha256[:40])
    maps = 128 * 384 + 128 * 128 + 2 * 128 * 256
    assert manifest.flops_per_token == 2 * 2 * maps
    assert manifest.memory_bytes > sum(file.bytes for file in manifest.files)


def test_lower_precision_shrinks_the_download(exports: Exports) -> None:
    whole, half, eighth = (
        sum(file.bytes for file in exports("gpt2-causal_lm", 1, precision).files[1:])
        for precision in ("float32", "float16", "int8")
    )
    assert half <= 0.51 * whole
    assert eighth <= 0.26 * whole


def test_an_int8_activation_does_not_depend_on_the_batch(exports: Exports) -> None:
    manifest = exports("gpt2-causal_lm", 1, "int8")
    sliced = exports.sliced("gpt2-causal_lm")
    ids, mask = (value.numpy() for value in sliced.example((14, 6), seed=3))
    together = run(manifest, exports.folder, {"input_ids": ids, "attention_mask": mask})
    alone = run(
        manifest, exports.folder, {"input_ids": ids[1:, :6], "attention_mask": mask[1:, :6]}
    )
    np.testing.assert_allclose(together[1, :6], alone[0], rtol=1e-5, atol=1e-5)


def test_files_that_are_there_are_kept_and_damaged_ones_replaced(exports: Exports) -> None:
    manifest = exports("gpt2-causal_lm", 1, "float32")
    names = {path.name for path in exports.folder.iterdir()}
    kept, damaged = (exports.folder / file.name for file in manifest.files[:2])
    content = damaged.read_bytes()
    damaged.write_bytes(bytes(len(content)))
    inode = kept.stat().st_ino
    sliced = exports.sliced("gpt2-causal_lm")
    assert export.export_front(sliced, 1, "float32", exports.folder) == manifest
    assert kept.stat().st_ino == inode
    assert damaged.read_bytes() == content
    assert {path.name for path in exports.folder.iterdir()} == names


def test_a_graph_that_is_off_is_refused_and_not_named(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("gpt2-causal_lm")
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e6)  # beyond float16
    with pytest.raises(ModelError, match=r"front\(1\) in float16 does not reproduce the model"):
        export.export_front(SlicedModel(model), 1, "float16", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_process_makes_the_same_bytes(exports: Exports, tmp_path: Path) -> None:
    exports.sliced("gpt2-causal_lm").model.save_pretrained(tmp_path / "model")
    script = """
import sys
from pathlib import Path
from splitfrozen.model.blocks import SlicedModel, load_model
from splitfrozen.model.export import export_front
sliced = SlicedModel(load_model(sys.argv[1], "causal_lm", (), seed=1))
print(export_front(sliced, 1, "int8", Path(sys.argv[2])).hash)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "there")],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "77", "PATH": "", "HOME": str(tmp_path)},
    )
    manifest = exports("gpt2-causal_lm", 1, "int8")
    assert done.stdout.split() == [manifest.hash]
    assert {path.name for path in (tmp_path / "there").iterdir()} == {
        file.name for file in manifest.files
    }
    graph = (tmp_path / "there" / manifest.graph).read_bytes()
    for trace in (b"site-packages", b".py", b"torch", str(tmp_path).encode()):
        assert trace not in graph
