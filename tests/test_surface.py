"""The accuracy surface: its fit, its file, and the script that measures one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from splitfrozen.errors import DataError
from splitfrozen.planning import surface
from splitfrozen.planning.surface import POWERS, Point
from splitfrozen.records import Activation

ROOT = Path(__file__).resolve().parents[1]
RATES, LEVELS = (0.1, 0.3, 0.5, 0.8, 1.0), (2, 4, 8, 16, 64)


def cubic(rho: float, levels: int) -> float:
    x, y = rho, np.log2(levels)
    return float(0.3 + 0.9 * x - 0.7 * x**2 + 0.2 * x**3 + 0.03 * y - 0.004 * y**2 + 0.01 * x * y)


def points(noise: float = 0.0) -> list[Point]:
    draw = np.random.default_rng(0)
    return [
        (rho, levels, cubic(rho, levels) + noise * draw.standard_normal())
        for rho in RATES
        for levels in LEVELS
    ]


def test_a_cubic_is_found_again_between_its_points() -> None:
    fitted = surface.fit(points(), 0.8, "m", "d")
    assert fitted.mse < 1e-20
    for rho, levels in ((0.15, 3), (0.66, 11), (0.95, 50)):
        assert fitted.accuracy(rho, levels) == pytest.approx(cubic(rho, levels), abs=1e-9)
        powers = np.array([rho**i for i in range(4)])
        assert powers @ fitted.cubic(levels) == pytest.approx(cubic(rho, levels), abs=1e-9)


def test_what_is_no_cubic_has_an_error_and_arrays_are_taken() -> None:
    fitted = surface.fit(points(noise=0.01), 0.8, "m", "d")
    assert 2e-5 < fitted.mse < 1e-4
    found = fitted.accuracy(np.array(RATES)[:, None], np.array(LEVELS))
    assert found.shape == (5, 5)
    assert found[1, 2] == pytest.approx(float(fitted.accuracy(0.3, 8)))


def test_a_file_is_read_as_it_was_written() -> None:
    fitted = surface.fit(points(noise=0.01), 0.8, "minilm", "mrpc", {"rows": 5})
    assert surface.read(fitted.to_json(), "it") == fitted
    assert len(json.loads(fitted.to_json())["coefficients"]) == len(POWERS)


def changed(**changes: Any) -> bytes:
    table = json.loads(surface.fit(points(noise=0.01), 0.8, "m", "d").to_json())
    return json.dumps({**table, **changes}).encode()


def test_a_file_is_its_points_and_what_was_fitted_to_them_is_fitted_again() -> None:
    fitted = surface.fit(points(noise=0.01), 0.8, "m", "d")
    assert surface.read(changed(coefficients=[0.5], mse=0.0), "it") == fitted


def test_a_surface_knows_what_was_measured_and_how_far_it_is_from_that() -> None:
    own = points(noise=0.01)
    fitted = surface.fit(own, 0.8, "m", "d")
    off = fitted.residuals()
    assert off[7] == float(fitted.accuracy(own[7][0], own[7][1])) - own[7][2]
    assert np.mean(off**2) == pytest.approx(fitted.mse)
    assert fitted.measured(0.3, 8) == own[7][2]
    assert fitted.measured(0.3, 9) is fitted.measured(0.31, 8) is None


DEEP = b'{"model": "m", "data": "d", "about": {"x": ' + b"[" * 100_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff{", "no accuracy surface"),
        (DEEP, "no accuracy surface"),
        (b"[]", "no accuracy surface"),
        (changed(reference=1.5), "no accuracy surface"),
        (changed(points=[[0.0, 2, 0.5]]), "no accuracy surface"),
        (changed(points=[]), "do not determine"),
        (changed(points=[[0.1, 2, 0.5]] * 20), "do not determine"),
    ],
)
def test_a_damaged_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        surface.read(data, "surface.json")


# --- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "measure_surface.py"
    spec = importlib.util.spec_from_file_location("measure_surface", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_finished_run_is_measured(
    script: ModuleType, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"text": f"{i % 10} {i * 3 % 10}", "label": i % 2} for i in range(60)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:30]))
    (tmp_path / "held.jsonl").write_text("\n".join(lines[30:]))
    model = save_model(tmp_path / "model", "bert-classification", num_labels=2)
    text = script.CONFIG.format(model=json.dumps(str(model)), seed=0, epochs=1)
    for old, new in (("cut = 2", "cut = 1"), ('columns = { pair = "text_pair" }\n', "")):
        assert old in text
        text = text.replace(old, new)
    text = text.replace("max_tokens = 128", "max_tokens = 16").replace("count = 10", "count = 2")
    (tmp_path / "run.toml").write_text(text)
    script.train(tmp_path / "run.toml")
    bench = script.Bench(tmp_path / "run")
    exact = bench.accuracy(bench.items)
    assert len(bench.items) == 30
    [fine] = script.points(bench.items, bench.accuracy, [(1.0, 256)])
    assert fine == (1.0, 256, exact), "all of it in fine steps is as good as it was"
    settings = product((0.2, 0.4, 0.7, 1.0), (2, 4, 8, 64))
    fitted = script.measure(tmp_path / "run", settings, "held")
    assert len(fitted.points) == 16
    assert fitted.reference == exact
    assert fitted.model == f"{tmp_path.name}/model"
    assert surface.read(fitted.to_json(), "it") == fitted


def test_each_point_is_of_activations_with_that_error(script: ModuleType) -> None:
    hidden = np.random.default_rng(3).standard_normal((20, 30)).astype(np.float32)
    items = [Activation(0, 1, hidden, np.zeros(1, np.int32))]

    def closeness(made: list[Activation]) -> float:
        return 1 - float(np.linalg.norm(made[0].hidden - hidden) / np.linalg.norm(hidden))

    settings = list(product((0.1, 0.5, 1.0), (8, 64)))
    found = list(script.points(items, closeness, settings))
    assert [point[:2] for point in found] == settings
    assert [point[2] for point in found] == sorted(point[2] for point in found)
    assert found == list(script.points(items, closeness, settings))
