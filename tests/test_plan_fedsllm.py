"""`plan` for FedsLLM: the delay model, its constraints, the descent, and the study."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitfrozen.config import read_toml
from splitfrozen.errors import ConfigError, PlanError
from splitfrozen.model import costs
from splitfrozen.model.costs import Tokens
from splitfrozen.planning import fedsllm
from splitfrozen.planning.channel import Allocation, Link
from splitfrozen.planning.fedsllm import Block, Plan, Problem, Workload, time_s, violated
from splitfrozen.planning.power import by_bisection, end_s
from splitfrozen.planning.rounds import FORMS, Fit, Form, fit, rounds_to, target_of
from splitfrozen.planning.subchannels import best, greedy
from splitfrozen.records import Outcome
from splitfrozen.studies import plan_fedsllm, plan_fedsllm_text, plan_file
from splitfrozen.studies.plan_fedsllm_file import (
    Experiment,
    drawn,
    easier_rounds,
    rounds,
    small_instances,
    varied,
    workload,
)

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "experiments" / "fedsllm.toml"
ROUNDS = {1: 36.0, 2: 28.0, 4: 24.0, 6: 22.7, 8: 22.0}
"""No measurement: any table that falls."""


def load(content: dict[str, Any]) -> Experiment:
    return plan_file.load(content, Experiment)


def table(**changes: Any) -> dict[str, Any]:
    """The committed experiment with the rounds above, few cells and few instances."""
    content = read_toml(FILE)
    content["rounds"] = {str(rank): value for rank, value in ROUNDS.items()}
    content["cells"] = 3
    content["small"]["draws"] = 4
    content["large"] = {"clients": 12, "subchannels": 15}
    content["figures"] = {key: values[::3] for key, values in content["figures"].items()}
    return {**content, **changes}


@pytest.fixture(scope="module")
def spec() -> Experiment:
    return load(table())


def by_hand() -> tuple[Problem, Plan]:
    """Two clients, numbers that can be followed."""
    link = Link(np.ones((2, 3)), 10.0, 1000.0, 1000.0)
    problem = Problem(
        client_flops=np.array([10.0, 20.0]),
        server_flops=100.0,
        batch=4,
        local_steps=5,
        workloads={
            1: Workload(5.0, 1.0, 20.0, 2.0, 30.0, 6.0),
            2: Workload(10.0, 2.0, 15.0, 1.0, 30.0, 12.0),
        },
        rounds={1: 9.0, 3: 7.0},
        main=link,
        federated=link,
    )
    # Densities 1, 1 and 3: rates 10 + 10 and 20 bit/s.
    use = Allocation(np.array([0, 0, 1]), np.array([1.0, 1.0, 3.0]))
    return problem, Plan(1, 3, use, use)


# --- the delay model -------------------------------------------------------------------------


def test_the_delay_by_hand() -> None:
    problem, plan = by_hand()
    forward = np.array([4 * (5 + 3 * 1) / 10, 4 * (5 + 3 * 1) / 20])
    upload = 4 * 30 / 20
    server = 3 * 2 * 4 * (20 + 3 * 2) / 100
    local = max(forward + upload) + server + max(2 * forward)
    assert time_s(problem, plan) == pytest.approx(7.0 * (5 * local + 3 * 6 / 20))


def test_a_client_without_a_rate_never_ends() -> None:
    problem, plan = by_hand()
    silent = replace(plan.main, owner=np.array([0, 0, 0]))
    assert time_s(problem, replace(plan, main=silent)) == np.inf


def test_workload_of_gpt2_small(spec: Experiment) -> None:
    """A block has 24 N D^2 + 4 N^2 D; LoRA of query and value 2 * 2 * N * 2 D for each rank."""
    one, seven = workload(spec, 1), workload(spec, 7)
    block = 24 * 512 * 768**2 + 4 * 512**2 * 768
    assert one.client_flops == block
    assert seven.client_flops == 7 * block
    assert one.server_flops == 11 * block + 2 * 512 * 768 * 50257
    assert one.client_lora_flops == 2 * 2 * 512 * 2 * 768
    assert seven.server_lora_flops == 5 * one.client_lora_flops
    assert one.activation_bits == seven.activation_bits == 512 * 768 * 32
    assert seven.adapter_bits == 7 * 2 * 2 * 768 * 32


def test_table_3_of_the_paper_counts_longer_samples_and_blocks_twice() -> None:
    """Its figures are those of 16 samples of 1,024 tokens, the maps of a block counted twice."""
    shape, load_ = costs.gpt2_small(), Tokens.uniform(16, 1024)
    attention = replace(shape, maps=shape.maps[:4])
    mlp = 2 * 16 * 1024 * 2 * 768 * 3072
    assert 2 * costs.forward_flops(attention, 1, load_) / 1e9 == pytest.approx(257.7, rel=1e-3)
    assert 2 * mlp / 1e9 == pytest.approx(309.2, rel=1e-3)
    head = 2 * 16 * 1024 * 768 * 50257
    assert head / 1e9 == pytest.approx(1264.1, rel=1e-3)
    assert costs.lora_flops([(768, 768)], 1, load_, 1) / 1e9 == pytest.approx(0.050, rel=1e-2)


def test_lora_on_some_maps_adds_up_to_lora_on_all() -> None:
    shape, load_ = costs.gpt2_small(), Tokens.uniform(3, 50)
    on_all = costs.forward_flops(shape, 4, load_, 8) - costs.forward_flops(shape, 4, load_)
    parts = [costs.lora_flops(part, 4, load_, 8) for part in (shape.maps[:2], shape.maps[2:])]
    assert sum(parts) == on_all
    assert costs.lora_parameters(shape.maps, 4, 8) == costs.adapter_parameters(shape, 4, 8)


# --- constraints -----------------------------------------------------------------------------


def _psd(*values: float) -> Callable[[Allocation], Allocation]:
    return lambda use: replace(use, psd=np.array(values))


BROKEN: list[tuple[str, Callable[[Plan], Plan]]] = [
    ("C1", lambda p: replace(p, main=replace(p.main, owner=np.array([0, 1, 2])))),
    ("C1", lambda p: replace(p, main=Allocation(p.main.owner[:2], p.main.psd[:2]))),
    ("C2", lambda p: replace(p, federated=replace(p.federated, owner=np.array([-1, 1, 0])))),
    ("C3", lambda p: replace(p, split=3)),
    ("C4", lambda p: replace(p, main=_psd(1.0, 1.0, 101.0)(p.main))),
    ("C5", lambda p: replace(p, federated=_psd(40.0, 40.0, 40.0)(p.federated))),
    ("C6", lambda p: replace(p, main=_psd(2.0, -1.0, 3.0)(p.main))),
    ("C7", lambda p: replace(p, rank=2)),
]


@pytest.mark.parametrize(("name", "broken"), BROKEN)
def test_a_broken_constraint_is_named(name: str, broken: Callable[[Plan], Plan]) -> None:
    problem, plan = by_hand()
    assert violated(problem, plan) is None
    found = violated(problem, broken(plan))
    assert found is not None
    assert found.startswith(f"{name}: ")


def test_every_constraint_has_its_case() -> None:
    assert {name for name, _ in BROKEN} == {f"C{number}" for number in range(1, 8)}


def test_fewer_subchannels_than_clients_are_refused_with_the_number_it_takes() -> None:
    content = table()
    content["link"]["subchannels"] = 4
    problem = drawn(load(content), ROUNDS, 0)
    with pytest.raises(PlanError, match="C1 and C2") as caught:
        fedsllm.solve(problem)
    assert "5 subchannels" in caught.value.remedy


# --- the descent -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instances(spec: Experiment) -> list[Problem]:
    several = load(table(small={**read_toml(FILE)["small"], "draws": 16}))
    return [problem for _, problem in small_instances(several, rounds(spec, ROOT))]


def test_the_descent_is_near_the_optimum(instances: list[Problem]) -> None:
    gaps, chosen = [], set()
    for problem in instances:
        best, found = fedsllm.optimum(problem), fedsllm.solve(problem)
        assert violated(problem, best) is None
        assert violated(problem, found) is None
        gaps.append(time_s(problem, found) / time_s(problem, best) - 1)
        chosen.add((best.split, best.rank))
    assert min(gaps) >= -1e-9
    assert np.mean(gaps) <= 0.01
    assert max(gaps) <= 0.05
    assert len(chosen) >= 3


def test_no_other_plan_beats_the_optimum(instances: list[Problem]) -> None:
    """All of one small problem at once: both links, all splits and ranks, no decoupling."""
    problem = instances[1]
    cut = {
        name: replace(link, gain=link.gain[:2, :3])
        for name, link in (("main", problem.main), ("federated", problem.federated))
    }
    problem = replace(problem, **cut, client_flops=problem.client_flops[:2])
    owners = [np.array(one) for one in itertools.product(range(2), repeat=3) if len(set(one)) == 2]
    times = []
    for split, rank in itertools.product(problem.workloads, problem.rounds):
        main, federated = (
            [by_bisection(upload, owner) for owner in owners]
            for upload in (
                fedsllm.activations(problem, split, rank),
                fedsllm.adapters(problem, split, rank),
            )
        )
        times += [
            time_s(problem, Plan(split, rank, *pair)) for pair in itertools.product(main, federated)
        ]
    assert len(times) == 4 * 3 * 36
    assert time_s(problem, fedsllm.optimum(problem)) == pytest.approx(min(times), rel=1e-11)


def test_local_search_is_what_mends_the_greedy_step(instances: list[Problem]) -> None:
    ours = [time_s(one, fedsllm.solve(one)) for one in instances]
    papers = [time_s(one, fedsllm.solve(one, search=False)) for one in instances]
    ratios = [a / b for a, b in zip(ours, papers, strict=True)]
    assert max(ratios) <= 1.001
    assert min(ratios) < 0.99


def test_without_search_subchannels_are_algorithm_2s(instances: list[Problem]) -> None:
    """Whatever else is at hand; and still a descent, though these may be worse."""
    worse = 0
    free: tuple[Block, ...] = ("links",)
    for problem in instances:
        own = fedsllm.optimum(problem)
        upload = fedsllm.adapters(problem, own.split, own.rank)
        better = by_bisection(upload, best(upload)[0])
        start = replace(own, federated=better)
        found = fedsllm.descend(problem, start, free, search=False).federated
        assert found.owner.tolist() == greedy(upload).tolist()
        worse += end_s(upload, found) > end_s(upload, better) * (1 + 1e-6)
        start = replace(own, federated=found)
        again = fedsllm.descend(problem, start, free, search=False)
        assert time_s(problem, again) <= time_s(problem, start) * (1 + 1e-9)
    assert worse > 0


def test_a_descent_changes_what_is_free_and_nothing_else(spec: Experiment) -> None:
    for number in range(4):
        problem = drawn(spec, ROUNDS, number)
        plans = plan_fedsllm.plans(spec, problem, number)
        start = plans["a"]
        assert plans["b"].main is start.main
        assert plans["b"].federated is start.federated
        assert plans["c"].split == start.split
        assert plans["d"].rank == start.rank
        times = {name: time_s(problem, plan) for name, plan in plans.items()}
        assert all(violated(problem, plan) is None for plan in plans.values())
        assert times["proposed"] <= min(times.values()) * (1 + 1e-9)
        assert max(times.values()) == times["a"]


def test_the_same_problem_has_the_same_plan(spec: Experiment) -> None:
    one, other = (fedsllm.solve(drawn(spec, ROUNDS, 2)) for _ in range(2))
    assert one.main.owner.tolist() == other.main.owner.tolist()
    assert one.main.psd.tolist() == other.main.psd.tolist()


def test_more_bandwidth_power_or_speed_is_never_slower(spec: Experiment) -> None:
    problem = drawn(spec, ROUNDS, 1)
    least = time_s(problem, fedsllm.solve(problem))
    for key, value in (
        ("bandwidth_hz", 1e6),
        ("client_dbm", 60.0),
        ("client_flop_per_cycle", 2048.0),
        ("server_hz", 9e9),
    ):
        more = drawn(varied(spec, key, value), ROUNDS, 1)
        assert np.all(more.main.gain == problem.main.gain)
        found = time_s(more, fedsllm.solve(more))
        assert found <= least if key == "client_dbm" else found < least


def test_a_rank_that_needs_few_rounds_is_chosen(spec: Experiment) -> None:
    for rank in ROUNDS:
        few = {other: 30.0 if other == rank else 40.0 for other in ROUNDS}
        assert fedsllm.solve(drawn(spec, few, 0)).rank == rank
    same = dict.fromkeys(ROUNDS, 30.0)
    assert fedsllm.solve(drawn(spec, same, 0)).rank == 1


# --- the study -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    folder = tmp_path_factory.mktemp("plan")
    same = dict.fromkeys(map(str, ROUNDS), 9.0)
    measured = {"rounds": table()["rounds"], "easier": {"0.5": {"rounds": same}}}
    (folder / "rounds.json").write_text(json.dumps(measured))
    content = table(rounds=str(folder / "rounds.json"))
    return plan_fedsllm.plan(FILE, content, folder / "out"), folder / "out"


def test_the_study_holds_what_it_is_for(study: tuple[Outcome, Path]) -> None:
    data: dict[str, Any] = study[0].data
    assert data["power_gap"] <= 1e-6
    assert data["power_instances"] == 4 + 2 * 3
    assert data["descent_gap_mean"] <= 0.01
    assert data["descent_gap_max"] <= 0.05
    assert data["descent_gap_max"] <= data["paper_greedy_gap_max"] + 1e-9
    for key in ("descent_gap", "paper_greedy_gap"):
        assert -1e-9 <= data[f"{key}_min"] <= data[f"{key}_mean"] <= data[f"{key}_max"]
        assert f"{data[f'{key}_min']:+.3%} to {data[f'{key}_max']:+.3%}" in study[0].text
    assert data["large"]["cpu_s"] > 0
    assert f"planned in {data['large']['cpu_s']:.2f} s of CPU" in study[0].text
    assert 0 < data["delay_saved"] < 1
    assert data["delay_saved"] == max(data["delay_saved_against"].values())
    assert data["paper_delay_saved"] == 0.6
    assert set(data["trends"]) == {"5", "6", "7"}
    assert (data["large"]["clients"], data["large"]["subchannels"]) == (12, 15)
    assert set(data["order"]) == {"5", "6", "7", "8"}
    for number, claims in data["claims"].items():
        *lie, fall = claims
        assert fall == "all fall"
        assert data["order"][number] == all(claims[name] for name in lie)
    assert all(claims["proposed is least"] for claims in data["claims"].values())
    for number, varied_ in zip(
        "5678", ("bandwidth", "FLOP of a client", "speed of the main", "most power"), strict=True
    ):
        assert f"Figure {number} of the paper: {varied_}" in study[0].text
    assert "bandwidth of a link, kHz" in study[0].text


def test_the_first_cells_plan_gives_every_subchannel_away_and_keeps_the_limits(
    study: tuple[Outcome, Path], spec: Experiment
) -> None:
    data: dict[str, Any] = study[0].data
    plan, problem = data["plan"], drawn(spec, ROUNDS, 0)
    assert plan["split"] in problem.workloads
    assert plan["rank"] in ROUNDS
    uses = {}
    for name, link in (("main", problem.main), ("federated", problem.federated)):
        owner, watts = np.array(plan[name]["owner"]), np.array(plan[name]["watts"])
        assert len(owner) == len(watts) == spec.link.subchannels
        assert set(owner) == set(range(spec.cell.clients)), "each subchannel has one of them"
        assert np.bincount(owner, watts).max() <= link.client_w * (1 + 1e-9)
        assert 0 < watts.sum() <= link.total_w * (1 + 1e-9)
        uses[name] = Allocation(owner, watts / link.subchannel_hz)
    again = Plan(plan["split"], plan["rank"], **uses)
    assert time_s(problem, again) == pytest.approx(plan["delay_s"], rel=1e-9)
    assert violated(problem, again) is None
    said = f"The first cell: split {plan['split']}, rank {plan['rank']}, "
    table_ = study[0].text.partition(said)[2].splitlines()[1:7]
    assert table_[0].split()[0] == "client"
    own = [str(i) for i, one in enumerate(plan["main"]["owner"]) if one == 0]
    assert table_[1].split()[: 1 + len(own)] == ["0", *own]


def test_the_paper_may_be_left_out(study: tuple[Outcome, Path]) -> None:
    content = table()
    del content["paper"]
    assert load(content).paper is None
    data = {key: value for key, value in study[0].data.items() if key != "paper_delay_saved"}
    text = plan_fedsllm_text.told(data, ROUNDS)
    assert text == study[0].text.partition("\n\nwrote")[0].replace(" (paper: about 60%)", "")


def test_what_is_saved_has_a_spread_and_depends_on_the_target(
    study: tuple[Outcome, Path], spec: Experiment
) -> None:
    data: dict[str, Any] = study[0].data
    delays, _ = plan_fedsllm._delays(spec, ROUNDS)
    each = 1 - delays["proposed"] / delays["a"]
    low, high = data["delay_saved_low"], data["delay_saved_high"]
    assert min(each) < low < high < max(each)
    assert (low, high) == pytest.approx(tuple(np.percentile(each, (10, 90))))
    assert f"percentile of the cells {low:.1%} to {high:.1%}" in study[0].text
    # Where all ranks take as many rounds, nothing is saved by the rank.
    saved = data["delay_saved_by_target"]
    assert set(saved) == {"0.5"}
    assert saved["0.5"] < data["delay_saved"] - 0.01
    assert f"with E(r) at 50% of the way to the target: {saved['0.5']:.1%}" in study[0].text


def test_curves_and_files_agree(study: tuple[Outcome, Path]) -> None:
    outcome, out = study
    written = json.loads((out / "fedsllm.json").read_text())
    assert written["environment"]["numpy"] == np.__version__
    assert written["figures"] == json.loads(json.dumps(outcome.data["figures"]))
    with (out / "fedsllm.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(one["values"]) for one in written["figures"]) * 5
    for row in rows:
        assert float(row["low_s"]) <= float(row["mean_s"]) * (1 + 1e-9)
    assert (out / "fedsllm.png").read_bytes().startswith(b"\x89PNG")


def test_the_setting_is_a_point_of_the_figures() -> None:
    spec = load({**read_toml(FILE)})
    for key in plan_fedsllm.FIGURES.values():
        part = spec.link if hasattr(spec.link, key) else spec.compute
        assert getattr(part, key) in getattr(spec.figures, key)
    assert spec.cells >= 50


def test_claims_are_judged_by_the_curves() -> None:
    def figure(number: str, **curves: list[float]) -> dict[str, Any]:
        return {"figure": number, "delay_s": {name: {"mean": m} for name, m in curves.items()}}

    good = {"proposed": [5.0, 2.0], "a": [12.0, 7.0], "b": [8.0, 3.0], "c": [9.0, 4.0]}
    lie, fall = plan_fedsllm._claims(figure("5", **good, d=[10.0, 5.0]))
    assert set(lie.values()) == {True}
    assert fall
    lie, fall = plan_fedsllm._claims(figure("6", **{**good, "c": [5.5, 4.0]}, d=[7.0, 8.0]))
    assert {name for name, holds in lie.items() if not holds} == {"a is most", "d is above b"}
    assert not fall
    lie, fall = plan_fedsllm._claims(figure("7", **{**good, "proposed": [9.0, 2.0]}, d=[10.0, 5.0]))
    assert not lie["proposed is least"]
    assert fall


@pytest.mark.parametrize(
    ("number", "ours", "own", "says", "holds", "as_part"),
    [
        ("5", [5.0, 1.0], [8.0, 2.0], "b comes nearer", True, False),
        ("5", [5.0, 1.0], [8.0, 5.0], "b comes nearer", False, False),
        ("6", [5.0, 4.0], [9.0, 4.1], "c comes nearer", True, True),
        ("7", [9.0, 5.0], [10.0, 6.0], "b falls back", False, True),
        ("7", [9.0, 5.0], [10.0, 6.5], "b falls back", True, True),
        ("7", [9.0, 5.0], [10.0, 6.0 + 1e-12], "b falls back", False, True),
        ("7", [9.0, 9.5], [10.0, 10.4], "b falls back", False, False),
    ],
)
def test_trends_are_judged_by_seconds(
    number: str, ours: list[float], own: list[float], says: str, holds: bool, as_part: bool
) -> None:
    """At the ends, whatever lies between; the gap as a part of the delay is told beside."""
    curves = {"proposed": ours, says[0]: own}
    means = {name: {"mean": [ends[0], 7.0, ends[1]]} for name, ends in curves.items()}
    found = plan_fedsllm._trend({"figure": number, "delay_s": means})
    assert found["says"] == says
    assert (found["holds"], found["holds_as_part"]) == (holds, as_part)
    gap = [a - b for a, b in zip(own, ours, strict=True)]
    assert found["gap_s"] == pytest.approx(gap)
    assert found["gap_part"] == pytest.approx([g / a for g, a in zip(gap, own, strict=True)])
    text = plan_fedsllm_text._trend_text(found)
    assert text.startswith(f"{says}: {'yes' if holds else 'no'}, from ")
    assert f"as a part of its delay: {'yes' if as_part else 'no'}, from " in text


# --- the file --------------------------------------------------------------------------------


def test_rounds_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rounds.json"
    path.write_text(json.dumps({"rounds": {str(r): v for r, v in ROUNDS.items()}, "target": 3.0}))
    spec = load(table(rounds="rounds.json"))
    assert rounds(spec, tmp_path) == ROUNDS
    assert easier_rounds(spec, tmp_path) == {}


def test_rounds_at_easier_targets_are_read_beside(tmp_path: Path) -> None:
    given = {str(r): v for r, v in ROUNDS.items()}
    half = {rank: value / 3 for rank, value in ROUNDS.items()}
    easier = {"0.50": {"rounds": {str(r): v for r, v in half.items()}, "target": 4.0}}
    path, spec = tmp_path / "rounds.json", load(table(rounds="rounds.json"))
    path.write_text(json.dumps({"rounds": given, "easier": easier}))
    assert rounds(spec, tmp_path) == ROUNDS
    assert easier_rounds(spec, tmp_path) == {"0.5": half}
    assert easier_rounds(load(table()), tmp_path) == {}
    del easier["0.50"]["rounds"]["6"]  # type: ignore[attr-defined]
    path.write_text(json.dumps({"rounds": given, "easier": easier}))
    with pytest.raises(ConfigError, match=r"none for rank 6 in `easier` 0\.5 of"):
        easier_rounds(spec, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "rounds.json"),
        ('{"rounds": {"1": 0}}', "rounds.json"),
        ('{"rounds": {"1": 1e308}}', "rounds.json"),
        ('{"rounds": {"1": 5, "2": 4, "4": 3, "8": 2}}', "none for rank 6"),
        ('{"rounds": {}, "easier": {"most": {"rounds": {}}}}', "rounds.json"),
        ('{"x": ' + "[" * 100_000, "rounds.json"),
    ],
)
def test_rounds_that_cannot_be_used(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "rounds.json").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        rounds(load(table(rounds="rounds.json")), tmp_path)
    assert "python scripts/measure_rounds.py --data ../shared" in caught.value.remedy


def test_a_path_that_can_be_none_is_refused(tmp_path: Path) -> None:
    for path in ("", "\0"):
        with pytest.raises(ConfigError, match="rounds"):
            rounds(load(table(rounds=path)), tmp_path)


def test_a_client_that_nobody_hears_is_refused_with_the_power_it_takes() -> None:
    content = table()
    content["cell"]["main_server_m"] = 1e5
    content["link"] |= {"client_dbm": -50, "total_dbm": -40}
    with pytest.raises(PlanError, match=r"C4 and C5 leave client . of cell 0 lost") as caught:
        drawn(load(content), ROUNDS, 0)
    [more] = re.findall(r"by (\d+)", caught.value.remedy)
    content["link"] |= {"client_dbm": -50 + int(more), "total_dbm": -40 + int(more)}
    problem = drawn(load(content), ROUNDS, 0)
    assert violated(problem, fedsllm.solve(problem)) is None
    content["link"] |= {"client_dbm": -51 + int(more), "total_dbm": -41 + int(more)}
    with pytest.raises(PlanError, match="by 1, or"):
        drawn(load(content), ROUNDS, 0)


@pytest.mark.parametrize("dbm", [-60.0, 100.0])
def test_plans_at_the_ends_of_power_and_noise_keep_the_limits(dbm: float) -> None:
    for noise in (-250.0, -130.0):
        content = table()
        content["link"] |= {
            "client_dbm": dbm,
            "total_dbm": min(dbm + 5, 100.0),
            "noise_dbm_hz": noise,
        }
        problem = drawn(load(content), ROUNDS, 0)
        plan = fedsllm.solve(problem)
        assert violated(problem, plan) is None
        assert np.isfinite(time_s(problem, plan))


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("small", "splits", [1, 12], "small.splits"),
        ("small", "ranks", [1, 3], r"small.ranks.*got \[1, 3\]; allowed: some of 1, 2, 4, 6, 8;"),
        ("small", "subchannels", 30, "small"),
        ("small", "draws", 2**62, "small.draws"),
        ("compute", "server_hz", 1e-300, "compute.server_hz"),
        ("figures", "server_hz", [1e9, 1e22], r"figures.server_hz\[1\]"),
        ("cell", "client_hz", [2e9, 1e9], "cell.client_hz"),
        ("link", "subchannels", 0, "link.subchannels"),
        ("figures", "server_hz", [2e9, 1e9], "figures.server_hz"),
        ("link", "bandwith_hz", 1.0, "link.bandwidth_hz"),
    ],
)
def test_wrong_keys_are_named(part: str, key: str, value: object, said: str) -> None:
    content = table()
    content[part][key] = value
    with pytest.raises(ConfigError, match=said):
        load(content)


# --- the fit of E(r) -----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_fit_finds_the_form_that_made_the_table(form: Form) -> None:
    made = Fit(form, 20.0, 30.0, 0.7, 0.0)
    found = fit({rank: made(rank) for rank in ROUNDS})
    assert found.form == form
    assert found.error < 1e-3
    assert [found(rank) for rank in ROUNDS] == pytest.approx([made(r) for r in ROUNDS], rel=2e-3)


def test_the_fit_falls_however_noisy_its_points_are() -> None:
    for measured in ([30, 29, 31, 20, 22], [10, 20, 30, 40, 50], [5, 5, 5, 5, 5]):
        found = fit(dict(zip(ROUNDS, measured, strict=True)))
        values = [found(rank) for rank in ROUNDS]
        assert all(a >= b - 1e-9 for a, b in itertools.pairwise(values))
        assert min(values) > 0


def test_rounds_to_a_loss_are_counted_between_rounds() -> None:
    losses = [4.0, 3.0, 2.5, 2.6, 2.0]
    assert rounds_to(2.75, losses) == pytest.approx(1.5)
    assert rounds_to(2.0, losses) == pytest.approx(4.0)
    assert rounds_to(4.5, losses) == 0.0


def test_the_target_is_what_all_runs_get_to_or_on_the_way_there() -> None:
    runs = [[4.0, 3.0, 2.0, 2.5], [4.4, 3.5, 2.2, 2.4]]
    assert target_of(runs) == 2.2
    assert target_of(runs, 0.75) == pytest.approx(2.2 + 0.25 * 2.0)
    for way in (0.5, 0.75, 1.0):
        assert all(rounds_to(target_of(runs, way), run) <= 3 for run in runs)
