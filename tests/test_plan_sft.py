"""SFT's two timescales: each solution against another way to it, and the paper's own figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cvxpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfrozen.config import read_toml
from splitfrozen.errors import ConfigError, DataError, PlanError
from splitfrozen.model import costs
from splitfrozen.planning import bandwidth, sft, sft_delay, surface
from splitfrozen.planning.bandwidth import Band, Demand, Reals
from splitfrozen.planning.sft import Bounds, Grid, Problem
from splitfrozen.planning.sft_delay import Device, System
from splitfrozen.studies import plan_file, plan_sft, plan_sft_file
from splitfrozen.studies.plan_sft_figures import LABELS

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "sft.toml"
POINTS = [
    (rho, levels, 0.80 - 0.35 * (1 - rho) ** 3 - 0.12 * rho / levels**1.2)
    for rho in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    for levels in (2, 4, 8, 16, 32, 64)
]
SNR = 10**1.7


def system(count: int = 4, **changes: Any) -> System:
    own = System(
        shape=costs.vit_base(),
        tokens=197,
        batch=64,
        rank=16,
        moments=1,
        devices=tuple(
            Device(f"{i}", (0.5 + 0.3 * i) * 1e12, 8e9, 1000, 10e6) for i in range(count)
        ),
        server_flops=1e13,
        total_hz=20e6,
        server_snr=SNR,
        rounds=10,
    )
    return replace(own, **changes)


def problem(least: float = 0.77, **changes: Any) -> Problem:
    own = system(**changes)
    fitted = surface.fit(POINTS, 0.80, "m", "d")
    snr = SNR * np.linspace(0.5, 2, len(own.devices))
    return Problem(own, snr, fitted, least, Bounds((0.05, 1.0), (3, 8), (1, 11)))


# --- P2 ------------------------------------------------------------------------------------------


def instance(number: int) -> tuple[Demand, Band]:
    draw = np.random.default_rng(number)
    count = int(draw.integers(1, 20))
    demand = Demand(draw.uniform(0, 100, count), 10 ** draw.uniform(6, 10, count))
    return demand, Band(30e6, draw.uniform(0.03, 1, count) * 30e6)


@pytest.mark.parametrize("number", range(5))
def test_bisection_is_the_optimum_of_a_convex_solver(number: int) -> None:
    demand, band = instance(number)
    # In units in which the solver's tolerances are small: x is the bandwidth over this.
    share_hz = demand.hertz_s / demand.hertz_s.sum() * band.total_hz
    unit_s = demand.hertz_s.sum() / band.total_hz
    x = cvxpy.Variable(len(share_hz))
    delay = cvxpy.max(demand.fixed_s / unit_s + cvxpy.inv_pos(x))
    constraints = [share_hz / band.total_hz @ x <= 1, x <= band.most_hz / share_hz]
    least = cvxpy.Problem(cvxpy.Minimize(delay), constraints).solve(cvxpy.CLARABEL)
    assert bandwidth.exact(demand, band).delay_s == pytest.approx(least * unit_s, rel=1e-6)


def test_both_solutions_keep_the_constraints_and_agree() -> None:
    steps = []
    for number in range(100):
        demand, band = instance(number)
        exact, paper = bandwidth.exact(demand, band), bandwidth.successive(demand, band)
        for found in (exact, paper):
            assert found.band_hz.sum() <= band.total_hz * (1 + 1e-9)
            assert (found.band_hz <= band.most_hz * (1 + 1e-12)).all()
            assert demand.delays(found.band_hz).max() == pytest.approx(found.delay_s, rel=1e-9)
        assert exact.delay_s * (1 - 1e-9) <= paper.delay_s <= exact.delay_s * (1 + 1e-6)
        steps.append(paper.steps)
    assert max(steps) > 2, "equal shares were not the answer to all"


def test_bandwidth_that_nobody_may_have_is_left_over() -> None:
    demand = Demand(np.array([1.0, 2.0]), np.array([1e7, 1e7]))
    band = Band(100e6, np.array([5e6, 10e6]))
    for found in (bandwidth.exact(demand, band), bandwidth.successive(demand, band)):
        assert found.delay_s == pytest.approx(3.0)
        assert found.band_hz[0] == pytest.approx(5e6)
        assert found.band_hz.sum() <= 15e6 * (1 + 1e-9)


def test_who_sends_nothing_gets_nothing() -> None:
    demand = Demand(np.array([5.0, 1.0]), np.array([0.0, 3e7]))
    found = bandwidth.exact(demand, Band(10e6, np.array([10e6, 10e6])))
    assert found.delay_s == pytest.approx(5.0)
    assert found.band_hz[0] == 0
    assert found.band_hz[1] == pytest.approx(7.5e6)


def test_instances_are_solved_together_as_one_by_one() -> None:
    draw = np.random.default_rng(0)
    fixed, hertz = draw.uniform(0, 10, 6), 10 ** draw.uniform(5, 9, (7, 6))
    band = Band(30e6, np.full(6, 9e6))
    together = bandwidth.least_delay(Demand(fixed, hertz), band)
    each = [bandwidth.exact(Demand(fixed, one), band).delay_s for one in hertz]
    np.testing.assert_allclose(together, each, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.just(0.0) | st.floats(1, 1e9)), min_size=1, max_size=100
    ),
    st.floats(1.0, 100.0),
)
def test_more_bandwidth_is_never_worse(devices: list[tuple[float, float]], factor: float) -> None:
    fixed, hertz = np.array(devices).T
    demand, caps = Demand(fixed, hertz), np.full(len(fixed), 5e6)
    narrow = bandwidth.exact(demand, Band(1e7, caps)).delay_s
    assert bandwidth.exact(demand, Band(1e7 * factor, caps)).delay_s <= narrow * (1 + 1e-9)
    assert demand.delays(bandwidth.shares(np.ones(len(fixed)), Band(1e7, caps))).max() >= (
        narrow * (1 - 1e-9)
    )


def test_shares_follow_weights_until_somebody_has_all_he_may() -> None:
    band = Band(10.0, np.array([1.0, 10.0, 10.0]))
    np.testing.assert_allclose(bandwidth.shares(np.array([2.0, 1.0, 2.0]), band), [1, 3, 6])
    np.testing.assert_allclose(bandwidth.shares(np.ones(3), Band(10.0, np.ones(3))), [1, 1, 1])
    several = np.array([[2.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(bandwidth.shares(several, band), [[1, 3, 6], [1, 4.5, 4.5]])


def test_what_is_lost_in_rounding_needs_no_bandwidth() -> None:
    demand = Demand(np.array([1e20, 1.0]), np.array([1.0, 1.0]))
    band = Band(10.0, np.array([10.0, 10.0]))
    for found in (bandwidth.exact(demand, band), bandwidth.successive(demand, band)):
        assert found.delay_s == pytest.approx(1e20)


# --- the delay model -----------------------------------------------------------------------------


def test_a_round_is_equations_11_to_18_written_out() -> None:
    own, blocks, ratio = system(2), 5, 0.1
    snr, hertz = np.array([SNR, 2 * SNR]), np.array([5e6, 15e6])
    d, n, r, s = 768, 197, 16, 1000
    block = 24 * n * d**2 + 4 * n**2 * d
    down, up = np.log2(1 + SNR), np.log2(1 + snr)
    lora = 4 * blocks * 18 * d * r
    flops = np.array([0.5e12, 0.8e12])
    broadcast = 8 * lora / (20e6 * down)
    device = s * (3 * blocks * block + 2 * n * d * d) / flops
    server = s * 3 * ((12 - blocks) * block + 2 * d * 100) / (1e13 / 2)
    crossing = ratio * 32 * s * n * d * (1 / (hertz * up) + 1 / (hertz * down))
    upload = 8 * lora / (hertz * up)
    expected = broadcast + device + server + crossing + upload
    found = sft_delay.round_demand(own, blocks, ratio, snr).delays(hertz)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    frozen = 4 * (blocks * 12 * d**2 + d * d + (n + 3) * d)
    assert sft_delay.first_round_s(own, blocks) == pytest.approx(8 * frozen / (20e6 * down))


def test_bytes_are_those_of_activations_gradients_adapters_and_the_first_broadcast() -> None:
    own, d, r = system(2), 768, 16
    lora, frozen = 4 * 5 * 18 * d * r, 4 * (5 * 12 * d**2 + d * d + 200 * d)
    values = 2 * 1000 * 197 * d
    split = frozen + 10 * (0.1 * 2 * 4 * values + 3 * lora)
    assert sft_delay.split_bytes(own, 5, 0.1) == pytest.approx(split)
    alone = sft_delay.split_bytes(own, 5, 0.1, sequential=True)
    assert alone - split == pytest.approx(10 * lora)
    whole, head = 4 * 12 * 18 * d * r, 4 * d * 100
    everything = 4 * (12 * 12 * d**2 + d * d + 200 * d)
    assert sft_delay.federated_bytes(own) == pytest.approx(everything + 10 * 3 * (whole + head))


def test_a_single_device_in_turn_is_uncompressed_sft() -> None:
    own = system(1)
    snr = np.array([SNR])
    demand = sft_delay.round_demand(own, 3, 1.0, snr)
    alone = bandwidth.exact(demand, own.band).delay_s
    assert sft_delay.sequential_s(own, 3, snr) == pytest.approx(alone)


def test_federated_devices_train_everything_and_wait_for_no_server() -> None:
    own = system(2)
    fast = sft_delay.federated_demand(replace(own, server_flops=1e20), np.full(2, SNR))
    np.testing.assert_array_equal(
        fast.fixed_s, sft_delay.federated_demand(own, np.full(2, SNR)).fixed_s
    )
    split = sft_delay.round_demand(replace(own, server_flops=1e20), 11, 1.0, np.full(2, SNR))
    assert (fast.fixed_s > split.fixed_s).all()
    assert (fast.hertz_s < split.hertz_s).all()


def test_rounds_together_are_as_one_by_one() -> None:
    own, snr = system(2), np.array([[SNR, 2 * SNR], [3.0, 0.5], [1e-17, SNR]])
    models: tuple[Callable[[Reals], Reals], ...] = (
        lambda one: sft_delay.round_demand(own, 5, 0.1, one).hertz_s,
        lambda one: sft_delay.federated_demand(own, one).hertz_s,
        lambda one: sft_delay.sequential_s(own, 5, one),
    )
    for model in models:
        together = model(snr)
        np.testing.assert_allclose(together, np.array([model(one) for one in snr]))
        assert np.isfinite(together).all(), "the weakest signal still brings something"


# --- P1 ------------------------------------------------------------------------------------------


def by_hand(own: Problem) -> tuple[float, int, int]:
    """The least delay over a coarse grid with its blocks and levels, one combination at a time."""
    found = []
    for blocks in range(1, 12):
        if any(own.memory_bytes(blocks) >= one.memory_bytes for one in own.system.devices):
            continue
        for levels in range(3, 9):
            for rho in np.linspace(0.05, 1, 20):
                if own.surface.accuracy(rho, levels) < own.least_accuracy:
                    continue
                ratio = sft.entropy_bits(rho, levels) / 32
                demand = sft_delay.round_demand(own.system, blocks, ratio, own.snr)
                later = bandwidth.least_delay(demand, own.system.band)
                first = sft_delay.first_round_s(own.system, blocks)
                found.append((float(first + 10 * later), blocks, levels))
    return min(found)


@pytest.mark.parametrize(
    ("server", "memory", "blocks"), [(1e14, 8e9, 1), (2e11, 8e9, 11), (2e11, 3e9, 5)]
)
def test_p1_is_brute_force_whatever_holds_it_back(
    server: float, memory: float, blocks: int
) -> None:
    devices = tuple(Device(f"{i}", 1e12, memory, 1000, 10e6) for i in range(2))
    own = problem(devices=devices, server_flops=server)
    solved, (least, at, _) = sft.solve(own), by_hand(own)
    assert solved.blocks == at == blocks
    assert solved.delay_s <= least * (1 + 1e-9)
    assert solved.delay_s >= least * 0.95
    assert solved.accuracy == pytest.approx(0.77, abs=1e-8), "the constraint is tight"
    grid = Grid.of(own, 201)
    searched, multiplied = sft.search(own, grid), sft.lagrange(own, grid)
    assert searched is not None
    assert solved.delay_s <= searched.delay_s <= solved.delay_s * 1.01
    assert multiplied is not None
    assert multiplied.blocks == blocks
    assert multiplied.accuracy >= 0.77 - 1e-9
    assert multiplied.delay_s <= solved.delay_s * 1.01


def peak(least: float, at: float = 0.6) -> Problem:
    """A = 0.8 - (rho - at)^2, whatever the levels."""
    points = [(rho, levels, 0.8 - (rho - at) ** 2) for rho, levels, _ in POINTS]
    return replace(problem(least), surface=surface.fit(points, 0.8, "m", "d"))


def test_the_summit_alone_is_enough() -> None:
    """Two roots in one point, which rounding makes complex."""
    for least in (0.8, 0.8 - 1e-12, 0.8 - 1e-7):
        assert sft.solve(peak(least)).rho == pytest.approx(0.6, abs=1e-3)


def test_a_grid_may_miss_what_there_is() -> None:
    own = peak(0.8 - 1e-6)
    assert 0.599 <= sft.solve(own).rho < 0.6
    grid = Grid.of(own, 11)
    assert sft.search(own, grid) is None
    assert sft.lagrange(own, grid) is None


def test_algorithm_2_has_settled_only_where_it_comes_to_rest() -> None:
    own = problem()
    found = sft.lagrange(own, Grid.of(own, 21))
    assert found is not None
    assert found.settled
    # The fastest lacks a point, so next comes the one with accuracy to spare; and then, for ever,
    # the one between them, which lacks so little that no multiplier drives it away.
    accuracy = own.least_accuracy + np.array([-0.01, 0.02, -2e-11])
    rho, levels, ratio = np.full(3, 0.5), np.full(3, 4), np.full(3, 0.1)
    grid = Grid(rho, levels, ratio, accuracy, (1,), np.array([[1.0, 1.9, 1.6]]))
    found = sft.lagrange(own, grid)
    assert found is not None
    assert found.delay_s == 1.9, "it came by what is allowed"
    assert found.steps > 10
    assert not found.settled


def test_a_surface_without_slope_has_no_roots() -> None:
    flat = surface.fit([(rho, levels, 0.0) for rho, levels, _ in POINTS], 0.0, "m", "d")
    own = replace(problem(0.0), surface=flat)
    assert (sft.solve(own).rho, sft.solve(own).levels) == (0.05, 3)
    with pytest.raises(PlanError, match="accurate enough"):
        sft.solve(replace(own, least_accuracy=0.1))


def test_entropy_of_the_papers_setting() -> None:
    """80 % sparsity, 3 bits and a sign: 21 times smaller than float32, 20 in the paper."""
    assert sft.entropy_bits(0.2, 8) == pytest.approx(0.7219 + 0.2 * 4, abs=1e-4)
    assert sft.entropy_bits(1.0, 8) == 4.0


def test_too_little_memory_names_the_device_and_what_it_lacks() -> None:
    devices = tuple(Device(name, 1e12, held, 100, 1e7) for name, held in (("a", 8e9), ("b", 1e8)))
    own = problem(devices=devices)
    with pytest.raises(PlanError, match="b has not the memory") as caught:
        sft.solve(own)
    more = int(caught.value.remedy.split()[-1])
    assert caught.value.remedy == f"give so many more bytes: b {more}"
    enough = (devices[0], replace(devices[1], memory_bytes=1e8 + more))
    assert sft.solve(problem(devices=enough)).blocks == 1
    # Equation 28c: all of it is too much.
    short = (devices[0], replace(devices[1], memory_bytes=1e8 + more - 1))
    with pytest.raises(PlanError, match=r"more bytes: b 1$"):
        sft.solve(problem(devices=short))


def test_too_little_memory_names_all_devices_that_lack_some() -> None:
    """With what each is given, it is enough; of many, those that have least are named."""
    held = {"a": 8e9, "b": 3e8, "c": 1e8, "d": 2e8, "e": 4e8, "f": 5e8}
    devices = tuple(Device(name, 1e12, size, 100, 1e7) for name, size in held.items())
    with pytest.raises(PlanError, match=r"^b has not") as one:
        sft.solve(problem(devices=devices[:2]))
    with pytest.raises(PlanError, match=r"^c, b have not") as two:
        sft.solve(problem(devices=devices[:3]))
    assert (one.value.got, two.value.got) == ("300000000 bytes", "100000000 bytes, 300000000 bytes")
    given = {"a": 0, **{n: int(m) for n, m in re.findall(r"(\w) (\d+)", two.value.remedy)}}
    mended = [replace(d, memory_bytes=d.memory_bytes + given[d.id]) for d in devices[:3]]
    assert sft.solve(problem(devices=tuple(mended))).blocks == 1
    with pytest.raises(PlanError, match=r"^c, d, b and 2 more devices have not") as many:
        sft.solve(problem(devices=devices))
    assert many.value.got.endswith(", 300000000 bytes, 400000000 bytes or more")
    more = int(many.value.remedy.rpartition(", the others up to ")[2])
    assert 4e8 + more == pytest.approx(problem().memory_bytes(1), abs=1.5)


def test_too_little_memory_names_the_blocks_that_fit() -> None:
    own = problem()
    own = replace(own, bounds=replace(own.bounds, blocks=(9, 11)))
    held = (own.memory_bytes(4) + own.memory_bytes(5)) / 2
    devices = tuple(replace(one, memory_bytes=held) for one in own.system.devices)
    with pytest.raises(PlanError, match=r"lower the least blocks to 4$"):
        sft.solve(replace(own, system=replace(own.system, devices=devices)))


def test_too_much_accuracy_says_how_much_less_can_be_had() -> None:
    own = problem(least=0.9)
    with pytest.raises(PlanError, match="accurate enough") as caught:
        sft.solve(own)
    assert sft.search(own, Grid.of(own, 11)) is None
    assert sft.lagrange(own, Grid.of(own, 11)) is None
    less = float(caught.value.remedy.split()[1])
    assert sft.solve(replace(own, least_accuracy=0.9 - less)).accuracy >= 0.9 - less - 1e-9
    with pytest.raises(PlanError):
        sft.solve(replace(own, least_accuracy=0.9 - less + 2e-4))


# --- the study -----------------------------------------------------------------------------------


def load(table: dict[str, Any]) -> plan_sft_file.Experiment:
    return plan_file.load(table, plan_sft_file.Experiment)


def content(**changes: Any) -> dict[str, Any]:
    """The committed experiment with points in it, and fewer levels and bandwidths."""
    table = read_toml(EXPERIMENT)
    points = [list(point) for point in POINTS]
    table["accuracy"] = {"loss": 0.02, "reference": 0.80, "points": points}
    table["bounds"]["levels"] = [4, 6]
    table["figures"]["total_hz"] = [5e6, 30e6]
    for key, value in changes.items():
        section, _, name = key.partition("__")
        table[section] = {**table[section], name: value} if name else value
    return table


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    out = tmp_path_factory.mktemp("sft") / "out"
    found = plan_sft.plan(EXPERIMENT, content(), out)
    return found.data, found.text, out


def test_both_timescales_agree_with_the_other_ways(
    outcome: tuple[dict[str, Any], str, Path],
) -> None:
    data, _, _ = outcome
    assert data["p2"]["instances"] == 100
    assert data["p2"]["within"] >= 0.99
    assert data["p2"]["max_gap"] < 1e-3
    assert abs(data["p1"]["gap"]) < 0.01
    assert data["p1"]["algorithm2"]["gap"] < 0.02
    drawn = data["p1"]["drawn"]
    assert data["p2"]["min_gap"] > -1e-9
    assert -0.01 < drawn["min_gap"] <= drawn["max_gap"] <= 1e-9
    assert drawn["algorithm2_found"] == drawn["algorithm2_settled"] == drawn["instances"]
    assert 0 <= drawn["algorithm2_min_gap"] < drawn["algorithm2_max_gap"] < 0.01
    ends = [f"{drawn[f'algorithm2_{end}_gap']:+.3%}" for end in ("min", "max")]
    assert f"settles in 20, {' to '.join(ends)} from the exact solution" in outcome[1]
    assert f"brute force {drawn['min_gap']:+.3%} to {drawn['max_gap']:+.3%}" in outcome[1]
    assert len(drawn["blocks"]) > 3, "the drawn problems differ in what is best"


def test_the_plan_is_p1s_choice_with_the_bandwidths_of_the_first_round(
    outcome: tuple[dict[str, Any], str, Path],
) -> None:
    data, text, _ = outcome
    plan, spec = data["plan"], load(content())
    own = plan_sft_file.system_of(spec)
    assert {key: plan[key] for key in ("rho", "levels", "blocks")} == {
        key: data["p1"][key] for key in ("rho", "levels", "blocks")
    }
    assert list(plan["bandwidth_hz"]) == [device.id for device in own.devices]
    band_hz = np.array(list(plan["bandwidth_hz"].values()))
    assert band_hz.sum() == pytest.approx(own.total_hz, rel=1e-6)
    assert band_hz.sum() <= own.total_hz * (1 + 1e-12)
    snr, ratio = plan_sft_file.channel(spec, 0), data["p1"]["ratio"]
    delays = sft_delay.round_demand(own, plan["blocks"], ratio, snr).delays(band_hz)
    assert delays.max() == pytest.approx(delays.min(), rel=1e-9), "all are there at once"
    assert f"{band_hz.min() / 1e6:.3g} to {band_hz.max() / 1e6:.3g} MHz for a device" in text


def test_what_the_papers_setting_costs_in_accuracy_is_told(
    outcome: tuple[dict[str, Any], str, Path],
) -> None:
    data, text, _ = outcome
    there, fitted = data["at_paper_setting"], surface.fit(POINTS, 0.80, "m", "d")
    assert there["accuracy"] == pytest.approx(float(fitted.accuracy(0.2, 8)))
    assert there["measured_accuracy"] == {(a, b): c for a, b, c in POINTS}[0.2, 8]
    told = f"{there['accuracy']:.4f} (measured: {there['measured_accuracy']:.4f})"
    assert f"accuracy by the surface {told}, without compression 0.8000" in text
    off, of = np.abs(fitted.residuals()), data["p1"]["surface"]
    assert of["rmse"] == pytest.approx(np.sqrt(np.mean(off**2)))
    assert of["largest_residual"] == pytest.approx(off.max())
    assert f"{of['rmse']:.4f} (root mean square), at most {of['largest_residual']:.4f}" in text


def test_a_choice_that_breaks_a_constraint_is_known() -> None:
    own = problem()
    good = sft.solve(own)
    assert sft.violated(own, good) is None
    small = replace(own.system.devices[1], memory_bytes=own.memory_bytes(good.blocks))
    short = replace(own.system, devices=(own.system.devices[0], small))
    for name, other, choice in (
        ("accuracy: ", own, replace(good, rho=good.rho * 0.99)),
        ("memory: ", replace(own, system=short), good),
        ("keep rate: ", own, replace(good, rho=1.01)),
        ("levels: ", own, replace(good, levels=9)),
        ("blocks: ", own, replace(good, blocks=12)),
    ):
        broken = sft.violated(other, choice)
        assert broken is not None
        assert broken.startswith(name)


def test_a_network_of_ones_own_needs_no_numbers_of_the_paper(tmp_path: Path) -> None:
    table = content(rounds=2, bounds={"rho": [0.05, 1.0], "levels": [4, 6], "blocks": [1, 2]})
    del table["paper"]
    found = plan_sft.plan(EXPERIMENT, table, tmp_path)
    assert not {"paper", "at_paper_setting"} & set(found.data)
    assert found.data["delay_saved"]
    assert "; the paper" not in found.text
    assert "paper's" not in found.text
    assert (tmp_path / "delay.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_of_tokens_has_a_table_of_them_and_a_head() -> None:
    text = content(model__shape="gpt2-small", model__vocabulary=50257, model__tokens=100)
    tokens, image = (plan_sft_file.system_of(load(one)) for one in (text, content()))
    patches = 4 * (3 * 16 * 16) * 768
    more = 4 * (50257 + 100) * 768 - patches - 4 * 197 * 768
    grown = sft_delay._frozen_bytes(tokens, 3) - sft_delay._frozen_bytes(image, 3)
    assert grown == pytest.approx(more)
    bare = replace(tokens, shape=costs.gpt2_small())
    head = 3 * 2 * 100 * 768 * 50257
    assert sft_delay._server_flops(tokens, 3) - sft_delay._server_flops(bare, 3) == head
    assert sft_delay._adapter_bytes(tokens, 12) == sft_delay._adapter_bytes(bare, 12)


def test_the_papers_setting_gives_the_papers_figures(
    outcome: tuple[dict[str, Any], str, Path],
) -> None:
    """Minutes of figure 10 within a fifth, but for SL, which took fewer rounds there."""
    data, _, _ = outcome
    there, paper = data["at_paper_setting"], data["paper"]
    for scheme in ("sft", "fl", "uncompressed"):
        assert there["delay_s"][scheme] / 60 == pytest.approx(paper["minutes"][scheme], rel=0.2)
    assert there["delay_saved"]["uncompressed"] == pytest.approx(paper["delay_saved"], abs=0.05)
    assert there["bytes_saved"]["uncompressed"] == pytest.approx(paper["bytes_saved"], abs=0.03)


def test_ours_takes_least_and_says_what_it_sends_more_than_fl(
    outcome: tuple[dict[str, Any], str, Path],
) -> None:
    data, text, _ = outcome
    assert data["delay_saved"].keys() == data["bytes_saved"].keys() == LABELS.keys() - {"sft"}
    for scheme in ("equal", "random", "uncompressed"):
        assert data["delay_saved"][scheme] > 0
    assert data["bytes_saved"]["equal"] == 0
    assert data["bytes_saved"]["fl"] < 0
    assert "SFT saves against it" in text
    assert "SFT has 25.3 times as much" in text
    assert "the channel of each drawn anew" in text
    assert "80.2%" in text
    assert "93.6%" in text


def test_figures_and_their_data_are_written(
    outcome: tuple[dict[str, Any], str, Path],
) -> None:
    data, text, out = outcome
    written = json.loads((out / "sft.json").read_text())
    assert {key: written[key] for key in data} == json.loads(json.dumps(data))
    assert written["environment"]["commit"] is not None
    wide, narrow = (
        next(row for row in written["figures"]["bandwidth"] if row["total_hz"] == hz)
        for hz in (30e6, 5e6)
    )
    assert wide["sft"] < narrow["sft"] < narrow["equal"]
    saved = data["band_saved"]
    assert saved["total_hz"] == 5e6
    for name in ("equal", "random"):
        assert saved["round"][name] == pytest.approx(1 - narrow["sft"] / narrow[name])
        kept = (narrow["sft"] - narrow["silent"]) / (narrow[name] - narrow["silent"])
        assert saved["communication"][name] == pytest.approx(1 - kept)
        assert 0 < saved["round"][name] < saved["communication"][name] < 1
        assert f"{saved['communication'][name]:.1%} against {name}" in text
    assert "at 5 MHz its bandwidths save, of the communication delay of a round, " in text
    assert "against random bandwidth; the paper up to 53.1%" in text
    for name in ("accuracy", "memory", "bytes", "bandwidth", "delay"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in text


def test_a_plan_that_no_grid_finds_is_a_plan(tmp_path: Path) -> None:
    at = 0.05 + 0.95 * 200.5 / 400  # Between two keep rates.
    points = [[rho, levels, 0.8 - (rho - at) ** 2] for rho, levels, _ in POINTS]
    accuracy = {"loss": 0.02, "reference": 0.82 - 1e-7, "points": points}
    bounds = {"rho": [0.05, 1.0], "levels": [4, 4], "blocks": [1, 2]}
    table = content(accuracy=accuracy, bounds=bounds, rounds=2)
    found = plan_sft.plan(EXPERIMENT, table, tmp_path / "new")
    data: dict[str, Any] = found.data
    assert data["p1"]["rho"] == pytest.approx(at, abs=1e-3)
    assert data["p1"]["gap"] is data["p1"]["brute_force"] is None
    assert "against brute force finds nothing; Algorithm 2 finds nothing" in found.text
    assert json.loads((tmp_path / "new" / "sft.json").read_text())["p1"]["gap"] is None


def test_the_same_seed_plans_the_same_and_another_another() -> None:
    spec = load(content())
    first, again = plan_sft_file.system_of(spec), plan_sft_file.system_of(spec)
    assert first == again
    other = load(content(seed=1))
    assert plan_sft_file.system_of(other) != first
    one, two = plan_sft_file.channel(spec, 0), plan_sft_file.channel(spec, 1)
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(one, plan_sft_file.channel(spec, 0))


def test_the_surface_is_read_beside_the_file(tmp_path: Path) -> None:
    fitted = surface.fit(POINTS, 0.80, "minilm", "mrpc")
    (tmp_path / "surface.json").write_bytes(fitted.to_json())
    spec = load(content(accuracy={"loss": 0.02, "surface": "surface.json"}))
    own = plan_sft_file.problem_of(spec, plan_sft_file.system_of(spec), tmp_path)
    assert own.surface == fitted
    assert own.least_accuracy == pytest.approx(0.78)
    command = "python scripts/measure_surface.py --data MRPC_FOLDER --model MINILM_FOLDER"
    with pytest.raises(DataError, match=command):
        plan_sft_file.problem_of(spec, plan_sft_file.system_of(spec), tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": {"loss": 0.02}}, "`accuracy` is wrong: got neither"),
        ({"accuracy__surface": "x.json"}, "`surface` alone"),
        ({"accuracy": {"loss": 0.1, "surface": "x", "reference": 0.8}}, "got surface, reference"),
        ({"bounds__levels": [2, 257]}, r"bounds\.levels\[1\].*a whole number from 2 to 256;"),
        (
            {"accuracy__loss": -0.5},
            r"accuracy\.loss` is wrong: got -0\.5; allowed: a number from 0",
        ),
        ({"devices__flops": [1e12]}, r"devices\.flops` is wrong: .*allowed: a list of 2;"),
        ({"devices__memory_bytes": 1e-300}, r"`devices\.memory_bytes`.*1e-09 to 1e\+21"),
        ({"bounds__rho": [0.5, 0.1]}, "`bounds.rho` is wrong"),
        ({"bounds__rho": [0.01, 1.0]}, r"within 0\.05 to 1"),
        ({"bounds__levels": [2, 128]}, "within 2 to 64"),
        ({"bounds__blocks": [1, 12]}, r"1\.\.11"),
        ({"model__tokens": 0}, "`model.tokens` is wrong"),
        ({"model__token": 1}, "did you mean `model.tokens`"),
        ({"model__shape": "gpt2-small"}, "`model.vocabulary` is wrong: got nothing"),
        ({"model__vocabulary": 5}, "got 5; allowed: nothing with vit-base; remove it"),
        ({"figures__total_hz": [30e6, 5e6]}, "`figures.total_hz` is wrong.*values that rise"),
        ({"paper__rho": 0.01}, r"`paper\.rho` is wrong: got 0\.01; allowed: within 0\.05 to 1"),
        ({"paper__levels": 128}, r"`paper\.levels` is wrong: got 128; allowed: within 2 to 64"),
    ],
)
def test_a_wrong_file_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_sft.plan(EXPERIMENT, content(**change), None)


def test_the_committed_experiment_names_a_surface_and_its_folder() -> None:
    spec = load(read_toml(EXPERIMENT))
    assert spec.accuracy.surface is not None
    path = EXPERIMENT.parent / spec.accuracy.surface
    assert path.parent.is_dir()
    assert spec.rounds == 20
    assert spec.devices.count == 8
