"""model.costs: the formulas against the papers' tables, by hand, and against a real device.

What torch counts in real passes is compared in equivalence/test_costs_counted.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitfrozen.device import plan
from splitfrozen.device.pipeline import QUEUE
from splitfrozen.model import costs
from splitfrozen.model.blocks import SlicedModel
from splitfrozen.model.costs import HeadMap, Tokens

# --- Table II of the SplitFrozen paper, device column, 10^12 FLOP -------------------------------

SAMPLES = {"MRPC": 3668, "MNLI": 9815, "SST-2": 67315}
TABLE_2 = {
    ("MRPC", 4): {"fedlora": 513, "splitlora": 128, "splitfrozen": 43},
    ("MRPC", 8): {"fedlora": 517, "splitlora": 129, "splitfrozen": 43},
    ("MNLI", 4): {"fedlora": 1375, "splitlora": 344, "splitfrozen": 114},
    ("MNLI", 8): {"fedlora": 1385, "splitlora": 346, "splitfrozen": 114},
    ("SST-2", 4): {"fedlora": 9410, "splitlora": 2353, "splitfrozen": 779},
    ("SST-2", 8): {"fedlora": 9476, "splitlora": 2370, "splitfrozen": 779},
}
CELLS = [(*key, method) for key, row in TABLE_2.items() for method in row]


def device_flops(method: str, samples: int, rank: int) -> float:
    """One epoch over all samples of 256 tokens on the devices, as the paper counts."""
    load, shape = Tokens.uniform(samples, 256), costs.gpt2_small()
    blocks, passes = {
        "fedlora": (12, costs.PAPER_TRAINING),
        "splitlora": (3, costs.PAPER_TRAINING),
        "splitfrozen": (3, 1.0),
    }[method]
    lora = 0 if method == "splitfrozen" else rank
    forward = costs.forward_flops(shape, blocks, load, lora)
    return passes * (forward + costs.elementwise_flops(shape, blocks, load))


@pytest.mark.parametrize(("dataset", "rank", "method"), CELLS)
def test_device_column_of_table_2(dataset: str, rank: int, method: str) -> None:
    printed = TABLE_2[dataset, rank][method]
    formula = device_flops(method, SAMPLES[dataset], rank) / 1e12
    assert formula == pytest.approx(printed, abs=0.5 + 0.01 * printed)


def test_saving_of_computation() -> None:
    saved = [
        1 - splitfrozen / ((fedlora + splitlora) / 2)
        for fedlora, splitlora, splitfrozen in (
            [device_flops(method, SAMPLES[name], rank) for method in row]
            for (name, rank), row in TABLE_2.items()
        )
    ]
    assert sum(saved) / len(saved) == pytest.approx(0.868, abs=0.005)


def test_gpt2_small_is_what_the_paper_writes() -> None:
    shape, width, length = costs.gpt2_small(), 768, 256
    load = Tokens.uniform(1, length)
    assert costs.forward_flops(shape, 1, load) == 24 * length * width**2 + 4 * length**2 * width
    lora = costs.forward_flops(shape, 1, load, 4) - costs.forward_flops(shape, 1, load)
    assert lora == 2 * length * 18 * width * 4
    assert costs.adapter_parameters(shape, 12, 4) == 12 * 18 * width * 4
    assert 0 < costs.elementwise_flops(shape, 1, load) < 0.01 * costs.forward_flops(shape, 1, load)


# --- equations 21 to 26 and Table III of the SFT paper ------------------------------------------

MIB = 2**20
BATCH_64 = Tokens.uniform(64, 197)
SGD = 1


def test_equations_21_to_25_written_out() -> None:
    d, r, b, n, a = 768, 16, 64, 197, 12
    shape = costs.vit_base()
    assert costs.sft_model_bytes(shape, r) == 4 * (12 * d**2 + 18 * d * r)
    assert costs.sft_optimiser_bytes(shape, r, 2) == 8 * (12 * d**2 + 18 * d * r)
    assert costs.sft_gradient_bytes(shape, r) == 4 * (12 * d**2 + 18 * d * r)
    activations = 34 * b * n * d + 5 * b * n**2 * a
    assert costs.sft_activation_bytes(shape, BATCH_64) == activations
    block = (2 * 4 + 8) * (12 * d**2 + 18 * d * r) + activations
    assert costs.sft_block_bytes(shape, BATCH_64, r, 2) == block
    device = 16 * d**2 + b * n * d + 5 * block
    assert costs.sft_device_bytes(shape, 5, BATCH_64, r, 2) == device


def test_ratios_of_sft_table_3() -> None:
    """FL-based : FL-LoRA : proposed = 2.39 : 2.4 : 1; split learning holds what the proposal does.

    With the full weights' gradients that equation 23 has, whatever is trained.
    """
    shape = costs.vit_base()
    proposed = costs.sft_device_bytes(shape, 5, BATCH_64, 16, SGD)
    lora = costs.sft_device_bytes(shape, 12, BATCH_64, 16, SGD)
    based = costs.sft_device_bytes(shape, 12, BATCH_64, 0, SGD)
    assert lora / proposed == pytest.approx(2.40, rel=0.01)
    assert based / proposed == pytest.approx(2.39, rel=0.01)
    assert based < lora


def test_rows_of_sft_table_3() -> None:
    """The row of the model follows from equation 21 but for embedding and biases, some 1.5 %.

    The row of the activations is 1.7 times equation 24, whose coefficients are for values of two
    bytes where the paper trained in four; its ratio of 12 blocks to 5 is right. The rows of the
    optimiser are not equation 22, which counts frozen weights: they are LoRA's alone, of a model
    whose query, key and value are one map (16 D r a block instead of 18 D r).
    """
    shape, fused = costs.vit_base(), 16 * 768 * 16
    assert 5 * costs.sft_model_bytes(shape, 16) / MIB == pytest.approx(141.19, rel=0.015)
    assert 12 * costs.sft_model_bytes(shape, 16) / MIB == pytest.approx(337.03, rel=0.015)
    assert 12 * costs.sft_model_bytes(shape, 0) / MIB == pytest.approx(327.88, rel=0.015)
    activations = costs.sft_activation_bytes(shape, BATCH_64)
    blocks_12, blocks_5 = 9513.82, 3941.23
    assert blocks_12 / blocks_5 == pytest.approx(12 / 5, rel=0.01)
    assert blocks_12 / 12 / (activations / MIB) == pytest.approx(1.74, abs=0.01)
    state = costs.sft_optimiser_bytes(shape, 0, SGD)
    assert 12 * state / MIB == pytest.approx(329.76, rel=0.02), "all weights are trained"
    assert 5 * costs.FLOAT_BYTES * fused / MIB == 3.75
    assert 12 * costs.FLOAT_BYTES * fused / MIB == pytest.approx(9.09, rel=0.015)


def test_kept_values_explain_the_activations_of_sft_table_3() -> None:
    """Values of four bytes come closer than equation 24; dropout's masks are not in them."""
    kept = 4 * costs.kept_values(costs.vit_base(), 12, BATCH_64, 16) / MIB
    assert kept == pytest.approx(9513.82, rel=0.12)


# --- shapes ------------------------------------------------------------------------------------


def test_shape_of_a_model_with_grouped_queries(tiny: Callable[..., Any]) -> None:
    shape = SlicedModel(tiny("llama-causal_lm")).shape
    maps = ((32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32))
    assert (shape.blocks, shape.width, shape.heads, shape.attention) == (3, 32, 4, 32)
    assert shape.maps == maps
    assert shape.entry == maps[:3]
    assert (shape.inner, shape.gated, shape.kept, shape.norms) == (48, True, 4, 2)
    assert shape.head == (HeadMap(32, 60, pooled=False, trained=False),)
    assert (shape.embedding, shape.vocabulary) == ((), 60)


def test_shape_of_a_model_of_images(tiny: Callable[..., Any]) -> None:
    shape = SlicedModel(tiny("vit-image")).shape
    assert shape.embedding == ((3 * 6 * 6, 32),)
    assert shape.head == (HeadMap(32, 3, pooled=True, trained=True),)
    assert (shape.gated, shape.vocabulary) == (False, 0)


def test_shape_of_a_model_whose_mlp_reads_the_blocks_input(tiny: Callable[..., Any]) -> None:
    shape = SlicedModel(tiny("gpt_neox-causal_lm")).shape
    assert shape.maps == ((32, 96), (32, 32), (32, 48), (48, 32))
    assert shape.entry == ((32, 96), (32, 48))


def test_every_family_has_a_shape(family: Any) -> None:
    sliced = SlicedModel(family.build())
    shape = sliced.shape
    assert shape.maps == tuple(sliced.linear_maps(0, 1).values())
    assert shape.inner == 48
    assert shape.gated == (family.name in {"llama", "qwen2", "mistral", "gemma2", "gemma3"})
    # BERT's pooler comes with its checkpoint, OPT's projection with its blocks.
    assert any(one.trained for one in shape.head) == (sliced.kind != "causal_lm")
    weights = [
        module.weight.numel()
        for name, module in sliced.model.named_modules()
        if name in sliced.linear_maps(0, 2)
    ]
    assert costs.block_parameters(shape, 2) == sum(weights)


# --- loads and the lesser formulas ---------------------------------------------------------------


def test_loads_add_up() -> None:
    assert Tokens.of([2, 3, 3]) == Tokens(3, 8, 22)
    assert Tokens.of([2]) + Tokens.uniform(2, 3) == Tokens.of([2, 3, 3])
    assert Tokens.of([]) == costs.NOTHING
    shape = costs.gpt2_small()
    parts = sum(costs.forward_flops(shape, 3, Tokens.of([n]), 8) for n in (5, 70, 200))
    assert costs.forward_flops(shape, 3, Tokens.of([5, 70, 200]), 8) == parts
    assert costs.activation_values(shape, Tokens.of([5, 70])) == 75 * 768


def test_backward_of_blocks_that_nothing_is_trained_in() -> None:
    shape, load = costs.gpt2_small(), Tokens.uniform(2, 10)
    assert costs.backward_flops(shape, 3, load, 0, input_gradient=False) == (0, 0)
    assert costs.backward_flops(shape, 0, load, 4, input_gradient=False) == (0, 0)
    through, weights = costs.backward_flops(shape, 3, load, 0, input_gradient=True)
    assert weights == 0
    assert through > costs.forward_flops(shape, 3, load), "attention has two gradients"


def test_trained_heads_travel(tiny: Callable[..., Any]) -> None:
    assert costs.head_parameters(SlicedModel(tiny("gpt2-causal_lm")).shape) == 0
    assert costs.head_parameters(SlicedModel(tiny("gpt2-classification")).shape) == 32 * 3


def test_memory_of_training_is_mostly_activations() -> None:
    shape = costs.vit_base()
    trained = costs.training_bytes(shape, 12, BATCH_64, 16)
    assert trained > 4 * costs.kept_values(shape, 12, BATCH_64, 16) > 0.9 * trained
    frozen = costs.forward_bytes(shape, 12, BATCH_64)
    assert 4 * costs.block_parameters(shape, 12) < frozen < 0.2 * trained


def test_memory_of_a_vocabulary_is_the_answers() -> None:
    shape = replace(costs.gpt2_small(), head=(HeadMap(768, 50257, pooled=False, trained=False),))
    weights = costs.head_bytes(shape, costs.NOTHING)
    assert weights == 4 * 768 * 50257
    assert costs.head_bytes(shape, Tokens.uniform(1, 10)) == weights + 3 * 4 * 50257 * 10
    trained = replace(shape, head=(HeadMap(768, 2, pooled=True, trained=True),))
    assert costs.head_bytes(trained, Tokens.uniform(5, 10)) == 16 * 768 * 2 + 3 * 4 * 2 * 5


# --- a real device -------------------------------------------------------------------------------


def test_the_formula_has_the_devices_numbers() -> None:
    assert costs.BATCH_TOKENS == plan.BATCH_TOKENS
    # Float32 in the hands of two stages and in the queue between them; encoded ones are smaller.
    assert costs.HELD_CHUNKS == QUEUE + 2


def test_a_front_needs_more_with_more_of_anything() -> None:
    shape = costs.gpt2_small()
    least = costs.front_memory_bytes(shape, 1000, 128, 1 << 20)
    assert costs.front_memory_bytes(shape, 2000, 128, 1 << 20) == least + 1000
    assert costs.front_memory_bytes(shape, 1000, 1024, 1 << 20) > least + 100 * MIB
    assert costs.front_memory_bytes(shape, 1000, 128, 1 << 22) > least > costs.RUNTIME_BYTES


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_memory_of_a_real_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 15 %: a process that joins, computes the demo's front and uploads all of it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    memory = importlib.import_module("memory")
    result = memory.measure(*memory.write_demo(tmp_path, 3, "float32", rows=1200), tmp_path)
    assert result.samples == 1200
    assert result.predicted_bytes == pytest.approx(result.measured_bytes, rel=memory.WITHIN)
    assert result.manifest_bytes > 0.85 * result.measured_bytes
