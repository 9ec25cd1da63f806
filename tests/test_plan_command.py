"""`splitfrozen plan`: whose problem a file states, and the run that a plan is written into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splitfrozen import config
from splitfrozen.errors import ConfigError, StoreError
from splitfrozen.planning.sft import Choice
from splitfrozen.records import Outcome
from splitfrozen.studies import plan_fedsllm, plan_fedsllm_file, plan_file, plan_run, plan_sft
from splitfrozen.studies import plan_sft_file as sft_file
from splitfrozen.studies.plan import SYSTEMS, _not_looked_at, plan

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NETWORK = """
system = "splitfrozen"
[model]
shape = "gpt2-small"
rank = 4
cut = 3
[data]
tokens = 32
batch_size = 8
[server]
flops = 4e12
[[devices]]
name = "one"
count = 2
flops = 1e12
samples = 20
bps = 2e8
paper_depth = 1
[[codecs]]
name = "int8"
bits = 8.0
"""
RUN = """
[model]
name = "gpt2"
cut = 1
[task]
labels = ["no", "yes"]
[devices]
count = 7
patience_s = 30.0
[train]
lr = 1e-4
"""


def files(folder: Path, network: str = NETWORK, run: str = RUN) -> tuple[Path, Path]:
    paths = folder / "network.toml", folder / "run.toml"
    for path, text in zip(paths, (network, run), strict=True):
        path.write_text(text)
    return paths


def test_a_plan_is_written_into_a_copy_of_a_run(tmp_path: Path) -> None:
    network, run = files(tmp_path)
    found = plan(network, run, tmp_path / "out")
    made, base = config.load(tmp_path / "out" / "run.toml"), config.load(run)
    data: dict[str, Any] = found.data
    depths = tuple(data["plan"]["depth"].values())
    assert made.devices.depth == depths
    assert (made.devices.count, made.model.cut, made.wire.codec) == (2, 3, "int8")
    assert (made.method.name, made.lora.rank) == ("splitfrozen", 4)
    assert made.devices.patience_s == 30.0
    assert (made.train.epochs, made.train.batch_size) == (1, 8)
    assert made.train.lr == base.train.lr
    assert run.read_text() == RUN
    assert f"wrote {tmp_path / 'out' / 'run.toml'}, which has in place of" in found.text
    for line in ("model.cut = 3 (was 1)", "train.epochs = 1 (was 3)", "devices.count = 2 (was 7)"):
        assert f"  {line}\n" in found.text
    assert "join strings device-00 to device-01: one-0 to one-1" in found.text
    assert "whether gpt2 and its data are so is not looked at" in found.text
    assert "They are not" not in found.text


def test_the_copy_reads_like_a_file_of_a_person(tmp_path: Path) -> None:
    """Only what differs from the defaults and what the plan fixes; paths from where it is."""
    (tmp_path / "rows.jsonl").write_text("")
    own = '[data]\ntrain = "rows.jsonl"\nalpha = 0.5\n'
    text = RUN.replace("[devices]", 'columns = { pair = "text b" }\n[devices]') + own
    plan(*files(tmp_path, run=text), tmp_path / "out")
    made = (tmp_path / "out" / "run.toml").read_text()
    depth = config.load(tmp_path / "out" / "run.toml").devices.depth
    assert (
        made
        == f"""\
# join strings device-00 to device-01: one-0 to one-1

[model]
name = "gpt2"
cut = 3

[task]
columns = {{ pair = "text b" }}
labels = ["no", "yes"]

[devices]
count = 2
depth = {list(depth)}
patience_s = 30.0

[lora]
rank = 4

[train]
epochs = 1
batch_size = 8
lr = 0.0001

[wire]
codec = "int8"

[method]
name = "splitfrozen"
reuse = "once"

[data]
train = "../rows.jsonl"

[run]
folder = "run"
"""
    )


def test_samples_that_the_run_cuts_are_told(tmp_path: Path) -> None:
    network, run = files(tmp_path, run=RUN.replace("[devices]", "max_tokens = 16\n[devices]"))
    assert "task.max_tokens cuts samples to 16." in plan(network, run, tmp_path / "out").text


def test_what_is_said_of_another_method_is_left_out(tmp_path: Path) -> None:
    network, run = files(tmp_path, run=RUN + '[method]\nname = "fedlora"\nlocal_steps = 4\n')
    found = plan(network, run, tmp_path / "out")
    assert config.load(tmp_path / "out" / "run.toml").method.local_steps is None
    assert "  method.local_steps = nothing (was 4)\n" in found.text


def test_a_codec_that_needs_public_rows_is_told_with_the_key(tmp_path: Path) -> None:
    network, run = files(tmp_path, NETWORK.replace('"int8"', '"ecsq:1.5"'))
    with pytest.raises(
        ConfigError, match=r"the plan chooses ecsq:1\.5, which needs `wire.public`"
    ) as e:
        plan(network, run, tmp_path / "out")
    assert e.value.got == "none in run.toml"
    assert not (tmp_path / "out" / "run.toml").exists()
    assert (tmp_path / "out" / "network.json").exists()
    (tmp_path / "rows.jsonl").write_text("")
    run.write_text(RUN + '[wire]\npublic = "rows.jsonl"\n')
    plan(network, run, tmp_path / "out")
    wire = config.load(tmp_path / "out" / "run.toml").wire
    assert wire.codec == "ecsq:1.5"
    assert wire.public is not None
    assert Path(wire.public).resolve() == (tmp_path / "rows.jsonl").resolve()


def test_what_does_not_fit_the_plan_is_told_by_key(tmp_path: Path) -> None:
    network, run = files(tmp_path, NETWORK.replace('"int8"', '"int8+zlib"'))
    run.write_text(RUN + '[wire]\ncompression = "zstd"\n')
    with pytest.raises(
        ConfigError, match=r"does not fit run.toml: `wire.compression`.*planned is in"
    ):
        plan(network, run, tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], []),
        (["a-0"], ["join string device-00: a-0"]),
        (
            ["a-0", "a-1", "b-0"],
            ["join strings device-00 to device-01: a-0 to a-1", "join string device-02: b-0"],
        ),
        ([f"a-{i}" for i in range(101)], ["join strings device-000 to device-100: a-0 to a-100"]),
    ],
)
def test_join_strings_are_told_by_group(names: list[str], told: list[str]) -> None:
    assert list(plan_run._join_strings(names)) == told


def test_an_absolute_path_stays_one_and_links_are_followed(tmp_path: Path) -> None:
    """`..` of a linked folder is not where the link is."""
    inside, out = tmp_path / "far" / "inside", tmp_path / "out"
    inside.mkdir(parents=True)
    out.mkdir()
    (tmp_path / "far" / "rows.jsonl").write_text("")
    (tmp_path / "link").symlink_to(inside)
    own = RUN + f'[data]\ntrain = "link/../rows.jsonl"\n[wire]\npublic = "{tmp_path}/p.jsonl"\n'
    _, run = files(tmp_path, run=own)
    plan_run.write(run, {"model": {"cut": 2}}, (), out / "run.toml")
    text = (out / "run.toml").read_text()
    assert 'train = "../far/rows.jsonl"' in text
    assert f'public = "{tmp_path}/p.jsonl"' in text


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ('system = "splitfed"', "'splitfed'"),
        ("system = 3", "3"),
        ("[model]\n", "nothing"),
    ],
)
def test_a_file_says_whose_problem_it_states(tmp_path: Path, text: str, got: str) -> None:
    network, _ = files(tmp_path, text)
    with pytest.raises(ConfigError, match=r"`system` is (wrong|missing) in") as caught:
        plan(network, None, None)
    assert caught.value.got == got
    assert caught.value.allowed == ", ".join(SYSTEMS)


def test_a_run_needs_a_folder_for_its_copy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`--run` needs `--out`"):
        plan(*files(tmp_path), None)


def test_a_run_that_is_none_is_refused_before_it_is_planned(tmp_path: Path) -> None:
    network, _ = files(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        plan(network, tmp_path / "missing.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[devices]\ncount = 7\npatience_s = 30.0", "devices = 7"), "`devices` is wrong"),
        (("lr = 1e-4", "lr = 0.0"), "`train.lr` is wrong"),
    ],
)
def test_a_run_that_is_wrong_is_told_before_it_is_planned(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    """`devices` has to stand before the tables that TOML would put it in."""
    text = RUN.replace(*change)
    if change[1].startswith("devices"):
        text = f"{change[1]}\n{RUN.replace(change[0], '')}"
    network, run = files(tmp_path, run=text)
    with pytest.raises(ConfigError, match=said):
        plan(network, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_runs_own_file_is_not_replaced(tmp_path: Path) -> None:
    network, run = files(tmp_path)
    with pytest.raises(ConfigError, match="would replace the run's own file"):
        plan(network, run, tmp_path)
    assert run.read_text() == RUN


def test_the_copys_run_has_a_folder_of_its_own_beside_it(tmp_path: Path) -> None:
    """Unless the run's file names one."""
    network, run = files(tmp_path)
    plan(network, run, tmp_path / "out")
    assert config.load(tmp_path / "out" / "run.toml").folder == tmp_path / "out" / "run"
    network, run = files(tmp_path, run=RUN + '[run]\nfolder = "mine"\n')
    plan(network, run, tmp_path / "out")
    folder = config.load(tmp_path / "out" / "run.toml").folder
    assert folder.resolve() == tmp_path / "mine"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    network, _ = files(tmp_path)
    (tmp_path / "out").write_text("")
    with pytest.raises(StoreError, match="out"):
        plan(network, None, tmp_path / "out")


def test_a_run_with_a_least_depth_takes_a_plan_that_keeps_it(tmp_path: Path) -> None:
    floor = RUN.replace("count = 7\n", "count = 7\nleast_depth = {}\n")
    network, run = files(tmp_path, run=floor.format(1))
    depths = config.load(run).devices.least_depth, *_planned(plan(network, run, tmp_path / "a"))
    run.write_text(floor.format(min(depths[1:])).replace("cut = 1", "cut = 3"))
    plan(network, run, tmp_path / "b")
    made = config.load(tmp_path / "b" / "run.toml").devices
    assert (made.least_depth, made.depth) == (1, depths[1:])
    run.write_text(floor.format(min(depths[1:]) + 1).replace("cut = 1", "cut = 4"))
    with pytest.raises(ConfigError, match=r"plan with limits\.least_depth = "):
        plan(network, run, tmp_path / "c")


def _planned(found: Outcome) -> tuple[int, ...]:
    data: dict[str, Any] = found.data
    return tuple(data["plan"]["depth"].values())


def test_what_sft_decides_is_a_run(tmp_path: Path) -> None:
    """The codec's name is spelt as the codec spells it, for every rate and every level."""
    experiment = plan_file.load(config.read_toml(EXPERIMENTS / "sft.toml"), sft_file.Experiment)
    _, run = files(tmp_path, run=RUN + '[method]\nname = "sft"\nlocal_steps = 5\n')
    for rho, levels in ((1.0, 256), (0.05, 2), (0.123456, 8)):
        changes = plan_sft._run(experiment, Choice(rho, levels, 2, 0.1, 0.8, 1.0))
        plan_run.write(run, changes, (), tmp_path / "new.toml")
        spec = config.load(tmp_path / "new.toml")
        assert (spec.method.name, spec.model.cut) == ("sft", 2)
        assert (spec.method.local_epochs, spec.method.local_steps) == (1, None)
        assert (spec.devices.count, spec.train.epochs, spec.train.batch_size) == (8, 20, 64)
        assert spec.wire.codec == spec.method.gradients == f"topk:{rho:.4g}:{levels}"


def test_what_fedsllm_decides_is_a_run(tmp_path: Path) -> None:
    table = config.read_toml(EXPERIMENTS / "fedsllm.toml")
    experiment = plan_file.load(table, plan_fedsllm_file.Experiment)
    _, run = files(tmp_path, run=RUN + '[method]\nname = "fedsllm"\nlocal_epochs = 2\n')
    plan_run.write(run, plan_fedsllm._run(experiment, 1, 8, 2.0), (), tmp_path / "new.toml")
    spec = config.load(tmp_path / "new.toml")
    assert (spec.model.cut, spec.lora.rank, spec.devices.count) == (1, 8, 5)
    assert (spec.method.local_steps, spec.train.batch_size) == (12, 16)
    assert spec.lora.alpha == 16.0
    assert plan_fedsllm._run(experiment, 1, 8, 1.5)["lora"] == {"rank": 8, "alpha": 12.0}


@pytest.mark.parametrize(("bits", "codec"), [(32, "float32"), (16, "float16"), (12, None)])
def test_values_of_a_fedsllm_run_have_the_bits_that_are_planned_for(
    tmp_path: Path, bits: int, codec: str | None
) -> None:
    table = config.read_toml(EXPERIMENTS / "fedsllm.toml")
    table["model"]["value_bits"] = bits
    experiment = plan_file.load(table, plan_fedsllm_file.Experiment)
    _, run = files(tmp_path, run=RUN + '[wire]\ncodec = "int8"\ncompression = "zlib"\n')
    told = plan_run.write(run, plan_fedsllm._run(experiment, 1, 4, 2.0), (), tmp_path / "new.toml")
    spec = config.load(tmp_path / "new.toml")
    about = {"shape": "gpt2-small", "tokens": 512, "besides": plan_fedsllm._besides(experiment)}
    unseen = [line for line in _not_looked_at(spec, about) if line.startswith("Not looked at e")]
    assert "lora.targets; the plan has LoRA on the query and the value maps alone" in unseen[0]
    assert spec.lora.alpha == 8.0
    if codec:
        assert spec.wire.name == spec.method.gradients == codec
        assert f'  wire.codec = "{codec}" (was "int8")' in told
        assert len(unseen) == 1
    else:
        assert spec.wire.name == "int8+zlib"
        assert "wire.codec and method.gradients; the plan has values of 12 bits" in unseen[1]
