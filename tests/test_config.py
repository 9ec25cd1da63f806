"""A run's TOML file: what is accepted, and what the errors say."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitfrozen import config
from splitfrozen.config import MethodSpec
from splitfrozen.errors import ConfigError
from splitfrozen.wire.codec import CODECS
from splitfrozen.wire.join import JoinString

SMALL = '[model]\nname = "gpt2"\ncut = 3\n[task]\nlabels = ["a", "b"]\n[devices]\ncount = 2\n'


def load(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return config.load(path)


def test_defaults_and_folder(tmp_path: Path) -> None:
    run = load(tmp_path, SMALL)
    assert run.folder == Path("runs/run")
    assert (run.lora.rank, run.wire.name, run.run.start) == (8, "float16+zstd", "complete")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name in ("test.csv", "train.csv"):
        (tmp_path / name).touch()
    text = SMALL.replace('"gpt2"', '"models"').replace("[task]", '[task]\neval = "test.csv"')
    run = load(tmp_path, text + '[run]\nfolder = "out"\n[data]\ntrain = "train.csv"\n')
    assert run.data is not None
    assert run.data.train == str(tmp_path / "train.csv")
    assert run.model.name == str(tmp_path / "models")
    assert run.task.eval == str(tmp_path / "test.csv")
    assert run.folder == tmp_path / "out"


def test_dump_and_undump_are_inverse(tmp_path: Path) -> None:
    text = SMALL + "depth = [1, 3]\n[lora]\ntargets = ['query']\n[method]\nname = 'sft'\n"
    for data in ("", "[data]\ntrain = 'rows.csv'\nalpha = 0.1\n"):
        run = load(tmp_path, text + data)
        assert config.undump(config.dump(run)) == run
        assert (run.data is None) == (data == "")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("dept = 1", "`devices.dept`.*did you mean `devices.depth`"),
        ("depth = [1]", "1 depths.*2 depths"),
        ("depth = [1, 4]", r"devices.depth.*4.*1\.\.3"),
        ("least_depth = 4", r"devices.least_depth.*got 4; allowed: 1\.\.3, the cut; lower"),
        (
            "depth = [1, 2]\nleast_depth = 2",
            'devices.least_depth.*2 with a list of depths; allowed: only with .*"auto"; leave it',
        ),
        ('[lora]\nrank = "x"', "lora.rank.*got 'x'; allowed: a whole number from 1 to 2.63 - 1"),
        ("[lora]\nrank = 0", "lora.rank.*got 0; allowed: a whole number from 1 "),
        ("[train]\nlr = -1.0", "train.lr.*got -1.0; allowed: a number above 0;"),
        ("[train]\nwarmup = 1.0", "train.warmup.*a number of at least 0 and below 1;"),
        ("[wire]\ncodec = 'gzip'", "wire.codec.*gzip"),
        ("[wire]\nchunk_bytes = 1", "wire.chunk_bytes"),
        ("[server]\nport = 70000", "server.port.*a whole number from 0 to 65535;"),
        ("[servers]\nport = 1", "did you mean `server`"),
        ("[run]\nstart = 'now'", 'run.start.*allowed: "complete", "streaming"'),
        ("[wire]\ncodec = 'int9'", "wire.codec.*int9.*did you mean int8"),
        ("[wire]\ncodec = 'topk:2:8'", "wire.codec.*topk:2:8.*RATE above 0"),
        ("[wire]\ncodec = 'topk:0.2:8'\ncompression = 'zstd'", "wire.compression.*topk.*codes by"),
        (
            "[wire]\ncodec = 'ecsq:1'\ncompression = 'zlib'\npublic = 'a.csv'",
            "wire.compression.*ecsq",
        ),
        ("[wire]\ncodec = 'int8+zstd'\ncompression = 'zstd'", "wire.compression.*int8.zstd;"),
        ("[wire]\ncodec = 'int8+zlib'\ncompression = 'none'", "wire.compression.*names its"),
        ("[wire]\ncodec = 'topk:nan:8'\ncompression = 'zstd'", "wire.codec.*got 'topk:nan:8';"),
        ("[wire]\ncodec = 'ecsq:2.50'", r"wire.codec.*did you mean ecsq:2\.5\?"),
        ("[wire]\ncodec = 'ecsq:1.5'", "wire.public.*a file of rows with ecsq:1.5"),
        ("[method]\nname = 'sft'\ngradients = 'ecsq:1.5'", "method.gradients.*without side data"),
        ("depth = 'deep'", "devices.depth.*'deep'.*\"auto\", a list"),
        ("depth = [0, 1]", r"devices.depth\[0\].*got 0; allowed: a whole number from 1 "),
        ("depth = [1, 'x']", r"devices.depth\[1\].*got 'x'; "),
        ("gather_s = inf", "devices.gather_s.*got inf; allowed: a finite number"),
        ("patience_s = nan", "devices.patience_s.*got nan; allowed: a finite number"),
        ("[train]\nlr = inf", "train.lr.*got inf; allowed: a finite number"),
        ("[train]\nclip = 1e999", "train.clip.*finite"),
        ("[train]\nweight_decay = inf", "train.weight_decay.*finite"),
        ("[train]\nepochs = 9223372036854775808", "train.epochs.*to 2.63 - 1;"),
        ("[lora]\nalpha = nan", "lora.alpha.*finite"),
        ("[lora]\ntargets = []", r"lora.targets.*got \[\]"),
        ("[run]\nseed = -1", "run.seed.*got -1; allowed: a whole number from 0 "),
        ("[run]\nseed = 9223372036854775808", "run.seed.*to 2.63 - 1;"),
        ("[run]\nfolder = ''", "run.folder.*got ''; allowed: a path"),
        ('[run]\nfolder = "a\\u0000b"', "run.folder.*allowed: a path"),
        ("[server]\nname = ''", "server.name.*got ''"),
        ("[server]\nname = 'my machine'", "server.name.*'my machine'"),
        (f"[server]\nname = '{'a' * 64}.org'", "server.name"),
        ("[server]\nname = 'a..b'", "server.name"),
        ("[server]\nname = 'fe80::1%eth0'", "server.name"),
        ("[server]\nname = 'bücher.example'", "server.name.*write xn--bcher-kva.example"),
        (f"[server]\nname = '{'ü' * 64}'", "server.name"),
        ("[server]\nhost = ''", "server.host.*got ''"),
        ("[method]\nname = 'fedprox'", 'method.name.*allowed: "centralized", "fedlora"'),
        ("[method]\nshufle = 'none'", "`method.shufle`.*did you mean `method.shuffle`"),
        ("[method]\nlocal_steps = 0", "method.local_steps.*got 0; allowed: a whole number from 1 "),
        (
            "[data]\npartition = 'iid'",
            "`data.train` is missing: got nothing; allowed: text; add it",
        ),
        ("[data]\ntrain = ''", "data.train.*got ''"),
        ("[data]\ntrain = 'a.csv'\npartitoin = 'iid'", "did you mean `data.partition`"),
        ("[data]\ntrain = 'a.csv'\npartition = 'odd'", 'data.partition.*"iid", "dirichlet"'),
        ("[data]\ntrain = 'a.csv'\nalpha = 0", "data.alpha"),
        ("[data]\ntrain = 'a.csv'\nalpha = inf", "data.alpha.*finite"),
        ("[data]\ntrain = 'a.csv'\nrows = 0", "data.rows"),
        ("[data]\ntrain = 'a.csv'\ncolumn = 'x'", "data.column.*give both or neither"),
        ("[data]\ntrain = 'a.csv'\npartition = 'column'", "data.column.*give both or neither"),
        ("[server]\nhost = 'fe80::1%eth0'", "server.host"),
    ],
)
def test_errors_name_key_and_cure(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load(tmp_path, SMALL + extra + "\n")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ('labels = ["a"]', "task.labels"),
        ('labels = ["a", "b", "a"]', "task.labels.*got 'a'; allowed: names that differ"),
        ('labels = ["a", ""]', "task.labels.*got ''"),
        ('labels = ["a", "b"]\neval = ""', "task.eval.*got ''"),
        ('kind = "causal_lm"\ntemplate = "Q:"', "task.template"),
        ('kind = "causal_lm"\nanswer = "####"', "task.answer.*one group"),
        ('kind = "causal_lm"\nanswer = "("', "task.answer.*regular expression"),
        (
            'kind = "causal_lm"\n[data]\ntrain = "a.csv"\npartition = "dirichlet"',
            "data.partition.*no labels",
        ),
    ],
)
def test_tasks_check_themselves(tmp_path: Path, task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, SMALL.replace('labels = ["a", "b"]', task))


@pytest.mark.parametrize("text", ["[model", "\udcff"])
def test_what_is_not_toml_is_said_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match="not TOML"):
        config.load(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "server",
    [
        "name = 'my_server-2.example.org'",
        "name = '192.0.2.7'",
        "name = '2001:db8::1'",
        f"name = '{'a' * 63}.org'",
        "host = 'fe80::1%eth0'\nname = 'here'",
        "host = '::'",
    ],
)
def test_names_that_a_join_string_takes(tmp_path: Path, server: str) -> None:
    run = load(tmp_path, f"{SMALL}[server]\n{server}\n")
    told = run.server.name or run.server.host
    assert JoinString.parse(str(JoinString("t", told, 1, "0" * 64))).host == told


def test_the_largest_seed_is_kept(tmp_path: Path) -> None:
    run = load(tmp_path, SMALL + f"[run]\nseed = {2**63 - 1}\n")
    assert config.undump(config.dump(run)).run.seed == 2**63 - 1


def test_a_name_that_no_file_can_have_is_a_hub_name(tmp_path: Path) -> None:
    name = "a" * 300
    assert load(tmp_path, SMALL.replace("gpt2", name)).model.name == name


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({"name": "fedlora", "reuse": "never"}, "reuse"),
        ({"name": "sft", "shuffle": "none"}, "shuffle"),
        ({"name": "sft", "server": "per_device"}, "server"),
        ({"name": "fedlora", "gradients": "int8"}, "gradients"),
        ({"name": "sft", "gradients": "int9"}, "gradients"),
        ({"name": "centralized", "local_epochs": 2}, "local_epochs"),
        ({"name": "splitfrozen", "local_steps": 2}, "local_steps"),
        ({"name": "fedlora", "local_steps": 2, "local_epochs": 2}, "local_epochs"),
    ],
)
def test_an_option_that_the_method_would_not_use_is_refused(
    method: dict[str, object], key: str
) -> None:
    with pytest.raises(ConfigError, match=rf"`method\.{key}` is wrong"):
        MethodSpec(**method)  # type: ignore[arg-type]
    MethodSpec(method["name"])  # type: ignore[arg-type]


def test_gradients_may_have_any_codec() -> None:
    assert [MethodSpec("sft", gradients=name).gradients for name in CODECS] == list(CODECS)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(SMALL.replace("\n", "\r\n").encode("utf-8-sig"))
    assert config.load(tmp_path / "run.toml").model.name == "gpt2"


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 3000 + "]" * 3000])
def test_what_no_parser_takes_is_not_toml(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="is not TOML"):
        load(tmp_path, f"{SMALL}x = {value}\n")


def test_numbers_in_lists_are_finite_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`devices.depth\[1\]` is wrong: got inf.*finite"):
        load(tmp_path, SMALL + "depth = [1, inf]\n")


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("[experiment]\nranks = [4]", "compare"),
        ("[[datasets]]", "simulate"),
        ("system = 'sft'", "plan"),
    ],
)
def test_an_experiment_is_no_run(tmp_path: Path, text: str, command: str) -> None:
    path = tmp_path / "some.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"try: splitfrozen {command} .*some.toml"):
        config.load(path)
