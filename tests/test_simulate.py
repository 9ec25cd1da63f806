"""`simulate`: the experiment's file, the table, and Table II of the SplitFrozen paper."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from splitfrozen.cli import main
from splitfrozen.errors import ConfigError
from splitfrozen.model import costs
from splitfrozen.model.costs import Tokens
from splitfrozen.records import Outcome
from splitfrozen.simulation import experiment
from splitfrozen.studies.simulate import simulate

TABLE2 = Path(__file__).parents[1] / "experiments" / "table2.toml"
SMALL = """
methods = ["centralized", "fedlora", "splitlora", "sft", "fedsllm", "splitfrozen"]
[model]
shape = "gpt2-small"
ranks = [4]
cut = 3
[train]
batch_size = 20
reuse_epochs = 2
[server]
flops = 1e14
stages = 2
micro_batches = 4
[link]
bps = 1e9
[[devices]]
name = "slow"
count = 1
flops = 1e12
depth = 1
[[devices]]
name = "fast"
count = 1
flops = 2e12
depth = 3
[[datasets]]
name = "tiny"
samples = 50
tokens = 32
"""


@pytest.fixture(scope="module")
def table2() -> Outcome:
    return simulate(TABLE2, None)


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    found = outcome.data["rows"]
    assert isinstance(found, list)
    return found


def small(folder: Path, *changes: tuple[str, str]) -> Path:
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / "small.toml"
    path.write_text(text)
    return path


# --- Table II --------------------------------------------------------------------------------


def test_every_cell_of_table_2_is_there_with_the_papers_figures(table2: Outcome) -> None:
    cells = {(row["dataset"], row["rank"], row["method"]) for row in rows(table2)}
    assert len(cells) == len(rows(table2)) == 3 * 2 * 4
    assert all(row["paper"] for row in rows(table2))
    assert "9476" in table2.text


def test_device_flop_are_the_papers_within_one_percent_beyond_rounding(table2: Outcome) -> None:
    for row in rows(table2):
        said = row["paper"]["device_tflop"]
        off = max(0.0, abs(row["device_tflop"] - said) - 0.5)
        assert off <= 0.01 * said, row


def test_headline_reductions_hold(table2: Outcome) -> None:
    found = table2.data["reductions"]
    assert isinstance(found, dict)
    assert found["device_flop"] == pytest.approx(0.868, abs=0.005)
    assert found["total_time"] >= 0.502
    assert 0 < found["device_time"] < 1
    # Those of the paper's own figures are what its abstract says, within its rounding.
    said = table2.data["paper_reductions"]
    assert isinstance(said, dict)
    assert said["device_flop"] == pytest.approx(0.867, abs=0.001)
    assert said["total_time"] == pytest.approx(0.508, abs=0.001)
    assert said["device_time"] == pytest.approx(0.523, abs=0.001)


def test_unequal_depths_are_counted_apart(table2: Outcome) -> None:
    for row in rows(table2):
        if row["method"] == "splitfrozen":  # 7 devices with 3 blocks, 3 with 1
            assert row["device_tflop_unequal"] == pytest.approx(row["device_tflop"] * 0.8)
        else:
            assert row["device_tflop_unequal"] == row["device_tflop"]


def test_reuse_computes_and_sends_once(table2: Outcome) -> None:
    reuse: Any = table2.data["reuse"]
    ours = [row for row in reuse["rows"] if row["method"] == "splitfrozen"]
    assert len(ours) == 2 * 3 * 2
    for never, once in zip(ours[::2], ours[1::2], strict=True):
        assert (never["reuse"], once["reuse"]) == ("never", "once")
        for column in ("device_tflop", "up_gb"):
            assert never[column] == pytest.approx(3 * once[column])
        assert once["total_s"] < never["total_s"] < never["sequential_s"]
    assert reuse["reductions"]["once"]["device_flop"] > 0.95
    assert reuse["reductions"]["once"]["total_time"] > reuse["reductions"]["never"]["total_time"]


def test_a_pipeline_of_stages_loses_less_under_zb_h1(table2: Outcome) -> None:
    stages: Any = table2.data["stages"]
    total = {(row["dataset"], row["schedule"]): row["total_s"] for row in stages["rows"]}
    for dataset in ("MRPC", "MNLI", "SST-2"):
        one = total[dataset, "one machine"]
        assert one <= total[dataset, "zb-h1"] < total[dataset, "1f1b"]


# --- what the columns mean -------------------------------------------------------------------


def test_seconds_are_those_of_a_calculation_by_hand(tmp_path: Path) -> None:
    path = small(tmp_path, ("samples = 50", "samples = 20"), ("reuse_epochs = 2", ""))
    row = {row["method"]: row for row in rows(simulate(path, None))}
    shape, share, batch = costs.gpt2_small(), Tokens.uniform(10, 32), Tokens.uniform(20, 32)
    b, w = costs.backward_flops(shape, 12, share, 4, input_gradient=False)
    local = (costs.forward_flops(shape, 12, share, 4) + b + w) / 1e12
    adapter = 8 * 4 * costs.adapter_parameters(shape, 12, 4) / 1e9
    assert row["fedlora"]["device_compute_s"] == pytest.approx(local)
    assert row["fedlora"]["device_s"] == pytest.approx(local + 2 * adapter)
    assert row["fedlora"]["total_s"] == pytest.approx(local + 2 * adapter, rel=1e-5)
    front = costs.forward_flops(shape, 3, share) / 2e12
    up = 8 * 4 * costs.activation_values(shape, share) / 1e9
    b, w = costs.backward_flops(shape, 9, batch, 4, input_gradient=False)
    server = (costs.forward_flops(shape, 9, batch, 4) + b + w) / 1e14
    assert row["splitfrozen"]["device_compute_s"] == pytest.approx(front)
    assert row["splitfrozen"]["device_s"] == pytest.approx(front + up)
    assert row["splitfrozen"]["total_s"] == pytest.approx(front + up + server)
    assert row["splitfrozen"]["sequential_s"] == row["splitfrozen"]["total_s"]
    assert row["splitfrozen"]["down_gb"] == 0


def test_the_last_batch_holds_the_rest(tmp_path: Path) -> None:
    spec = experiment.load(small(tmp_path))
    plan = list(experiment.steps(spec, spec.datasets[0], 2, once=True))
    assert [step.number for step in plan] == list(range(6))
    assert [step.shares[0].load.samples for step in plan] == [10, 10, 5] * 2
    assert [step.ends_round for step in plan] == [False, False, True] * 2
    assert [step.stored for step in plan] == [False] * 3 + [True] * 3
    assert [share.device for share in plan[0].shares] == ["slow-0", "fast-0"]


def test_a_shared_link_takes_longer_than_a_dedicated_one(tmp_path: Path) -> None:
    links = ("", "\nshared = true", "\ntrace = [[0.0, 0.5]]")
    totals = []
    for more in links:
        path = small(tmp_path, ("bps = 1e9", f"bps = 1e8{more}"))
        totals.append({row["method"]: row["total_s"] for row in rows(simulate(path, None))})
    for method in ("fedlora", "splitlora", "sft", "fedsllm", "splitfrozen"):
        assert totals[1][method] > totals[0][method]
        assert totals[2][method] > totals[0][method]
    assert totals[1]["centralized"] == totals[2]["centralized"] == totals[0]["centralized"]


def test_reductions_need_all_three_methods(tmp_path: Path) -> None:
    path = small(tmp_path, ('"fedlora", ', ""))
    outcome = simulate(path, None)
    assert outcome.data["reductions"] == {}
    assert "not all of the three" in outcome.text


# --- files and command -----------------------------------------------------------------------


def test_out_gets_table_plots_and_traces(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    outcome = simulate(small(tmp_path), out)
    with (out / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["method"] for row in read] == [row["method"] for row in rows(outcome)]
    assert float(read[0]["total_s"]) == rows(outcome)[0]["total_s"]
    for name in ("equal", "unequal"):
        assert (out / f"gantt-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "gantt-equal.png").read_bytes() != (out / "gantt-unequal.png").read_bytes()
    for row in read:
        trace = json.loads((out / f"trace-{row['method']}.json").read_text())
        assert len(trace["traceEvents"]) > 3
    kept = json.loads((out / "small.json").read_text())
    assert kept.pop("environment")["python"]
    assert kept == json.loads(json.dumps(outcome.data))
    assert all(str(path) in outcome.text for path in out.iterdir())


def test_the_command_prints_one_json_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(small(tmp_path)), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {"rows", "reductions", "reuse", "stages"} <= data.keys()
    wanted = {"dataset", "rank", "method", "device_tflop", "device_s", "total_s"}
    assert all(wanted <= row.keys() for row in data["rows"])
    assert data["reductions"].keys() == {"device_flop", "device_time", "total_time"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"sft"', '"stf"', r'methods\[3\]` is wrong: got \'stf\'; allowed: .*"fedsllm"'),
        ("cut = 3", "cutt = 3", r"got `model\.cutt`; .* did you mean `model\.cut`"),
        ("count = 1", "cuont = 1", r"got `devices\[0\]\.cuont`; .*`devices\[0\]\.count`"),
        ("samples = 50", "sample = 50", r"did you mean `datasets\[0\]\.samples`"),
        ("cut = 3", "cut = 12", r"`model\.cut` is wrong: got 12; allowed: 1\.\.11"),
        ("depth = 3", "depth = 4", r"`devices\[1\]\.depth` is wrong: got 4; allowed: 1\.\.3"),
        ("bps = 1e9", "bps = -1e9", r"`link\.bps` is wrong: got -1"),
        ("bps = 1e9", "bps = inf", r"`link\.bps` is wrong: got inf"),
        ("flops = 1e12", "flops = 0", r"`devices\[0\]\.flops` is wrong: got 0"),
        ("depth = 1", "depth = 1\nefficiency = 1.1", r"efficiency` is wrong: got 1\.1"),
        ("count = 1", "count = 0", r"`devices\[0\]\.count` is wrong: got 0"),
        ('"fast"', '"slow"', r"`devices\.name` is wrong: got 'slow' twice"),
        ("[4]", "[]", r"`model\.ranks` is wrong"),
        ("[4]", "[4, 4]", r"`model\.ranks` is wrong: got 4 twice"),
        ('"gpt2-small"', '"gpt3"', r'`model\.shape` is wrong: got \'gpt3\'; allowed: "gpt2-small"'),
        ("[link]", "[links]", r"got `links`; .* did you mean `link`"),
    ],
)
def test_a_wrong_file_says_where_and_what(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(small(tmp_path, (old, new)), None)


def test_a_trace_that_runs_backwards_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small(tmp_path, ("bps = 1e9", "bps = 1e9\ntrace = [[5.0, 1.0], [2.0, 0.5]]"))
    assert main(["simulate", str(path)]) == 2
    assert "seconds that grow" in capsys.readouterr().err


def test_what_no_machine_can_hold_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path)
    text = re.sub(r"(?m)^samples = .*$", "samples = 9223372036854775807", path.read_text())
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"`datasets\[0\]` takes too many steps"):
        simulate(path, None)
