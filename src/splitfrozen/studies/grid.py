"""An experiment's file: what is compared with what, and the trainings that this takes.

    [experiment]    ExperimentSpec  ranks, seeds, folder
    [tune]          TuneSpec        which learning rates are tried, and on how much
    [[partition]]   Choice          a name, and the keys in which it differs
    [[dataset]]     DatasetChoice   the same, with trials of its own size
    [[method]]      MethodChoice    the same, with a label
    [model] [task] [devices] ...    as in a run's file (config.py): what all trainings share

A cell is one training. Its config is that of the shared tables, changed by its dataset, partition
and method in this order, then by rank, seed and learning rate. Its key is a hash of its config and
of the contents of its files, their places not, so that what was trained once is found again, by
another experiment too. It knows the package's version; what the source was is kept with the cell.
"""

from __future__ import annotations

import copy
import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, field

from splitfrozen import __version__, config
from splitfrozen.config import Above0, Config, DataSpec, Natural, Spec, Whole
from splitfrozen.errors import ConfigError
from splitfrozen.wire.codec import needs_side

Table = dict[str, Any]
_SpecT = TypeVar("_SpecT", bound=Spec)

FILES = ("model.name", "data.train", "task.eval", "wire.public")
"""Keys that may be paths; where they are given on the command line, from the working directory."""


class ExperimentSpec(Spec, frozen=True):
    """`ranks` and `seeds`: each dataset, partition and method is trained with every pair of them.
    `folder` keeps the finished cells; experiments that share it share cells. `prompts`: causal_lm:
    what every trained model is asked to continue."""

    ranks: Annotated[tuple[Whole, ...], Meta(min_length=1)]
    seeds: Annotated[tuple[Natural, ...], Meta(min_length=1)] = (0,)
    folder: str | None = None
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, texts in (("folder", (self.folder or "",)), ("prompts", self.prompts)):
            if any("\0" in text for text in texts):
                raise _bad(f"experiment.{key}", "a NUL character", "text without it", "mend it")
        for key, values in (("ranks", self.ranks), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise _bad(f"experiment.{key}", list(values), "each once", "remove one")


class TuneSpec(Spec, frozen=True):
    """How a learning rate is chosen, in the same way for every method.

    Each dataset, partition and method tries `rates` with the highest rank and `seed`, for `epochs`
    on `rows` rows, and is measured on `held_out` others, all of them rows of `data.train`. Of the
    rates whose accuracy is within one standard error of the best, the one with the least loss is
    taken. Where that is the first or the last, one more is tried beyond it, `extend` times at most.
    One rate and `extend = 0` take it untried."""

    rates: Annotated[tuple[Above0, ...], Meta(min_length=1)]
    epochs: Whole = 1
    rows: Whole = 2000
    held_out: Whole = 500
    seed: Natural = 0
    extend: Natural = 0

    def __post_init__(self) -> None:
        if list(self.rates) != sorted(set(self.rates)):
            raise _bad("tune.rates", list(self.rates), "rates that rise", "sort them")
        if self.extend and len(self.rates) < 2:
            raise _bad("tune.rates", list(self.rates), "two or more to go on from", "add one")

    @property
    def needed(self) -> bool:
        return len(self.rates) > 1


class Choice(Spec, frozen=True):
    """One value of an axis: its name, and tables of a run's file that replace keys."""

    name: str
    model: Table = field(default_factory=dict)
    task: Table = field(default_factory=dict)
    lora: Table = field(default_factory=dict)
    train: Table = field(default_factory=dict)
    wire: Table = field(default_factory=dict)
    devices: Table = field(default_factory=dict)
    method: Table = field(default_factory=dict)
    data: Table = field(default_factory=dict)
    server: Table = field(default_factory=dict)
    run: Table = field(default_factory=dict)

    @property
    def changes(self) -> dict[str, Table]:
        return {section: getattr(self, section) for section in SECTIONS}


class TrialSpec(Spec, frozen=True):
    """What of TuneSpec a dataset has otherwise. Where trainings pass once over many rows, trials
    that pass several times over few would choose a rate for something else."""

    epochs: Whole | None = None
    rows: Whole | None = None
    held_out: Whole | None = None


class DatasetChoice(Choice, frozen=True):
    tune: TrialSpec = TrialSpec()


class MethodChoice(Choice, frozen=True):
    """`label`: how tables and plots call it. `ranks`: only these of the experiment's. `rate_of`:
    another method, whose learning rate it takes instead of being tuned: as a variant of it."""

    label: str | None = None
    rate_of: str | None = None
    ranks: tuple[Whole, ...] | None = None

    @property
    def title(self) -> str:
        return self.label or self.name


SECTIONS = Config.__struct_fields__


class Group(NamedTuple):
    """What gets a learning rate of its own."""

    dataset: DatasetChoice
    partition: Choice
    method: MethodChoice


class Split(NamedTuple):
    """Two files with rows of a dataset's training data: to tune on, and to measure that on."""

    train: Path
    held_out: Path


@dataclass(frozen=True, slots=True)
class Cell:
    """One training. `config.run.folder` is not yet the folder that it will run in."""

    dataset: str
    partition: str
    method: str
    rank: int
    seed: int
    lr: float
    tuning: bool
    config: Config
    prompts: tuple[str, ...]
    key: str

    def __str__(self) -> str:
        what = "tuning " if self.tuning else ""
        where = f"{self.dataset}, {self.partition}, {self.method}"
        return f"{what}{where}, rank {self.rank}, seed {self.seed}, lr {self.lr:g}"


@dataclass(frozen=True)
class Experiment:
    """The file, read and checked. `source` is what stood in it, `settings` what goes before that,
    in runs and in the experiment itself."""

    path: Path
    spec: ExperimentSpec
    tune: TuneSpec
    datasets: tuple[DatasetChoice, ...]
    partitions: tuple[Choice, ...]
    methods: tuple[MethodChoice, ...]
    base: Table
    settings: Table
    source: Table

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def folder(self) -> Path:
        """Where finished cells are kept."""
        own = self.spec.folder
        # Absolute: cells are processes whose files have other places.
        return (self.path.parent / own if own else Path("runs", self.name)).resolve()

    def groups(self) -> list[Group]:
        return [
            Group(dataset, partition, method)
            for dataset in self.datasets
            for partition in self.partitions
            for method in self.methods
        ]

    def trials(self, dataset: DatasetChoice) -> TuneSpec:
        """How large the trials of a dataset are."""
        own = msgspec.structs.asdict(dataset.tune)
        own = {key: value for key, value in own.items() if value is not None}
        return msgspec.structs.replace(self.tune, **own)

    def cells(self, group: Group, lr: float) -> list[Cell]:
        """The trainings whose results are reported. Raises ConfigError."""
        ranks = [rank for rank in self.spec.ranks if rank in (group.method.ranks or (rank,))]
        return [
            self._cell(group, {"lora": {"rank": rank}, "train": {"lr": lr}, "run": {"seed": seed}})
            for rank in ranks
            for seed in self.spec.seeds
        ]

    def tuning_cell(self, group: Group, lr: float, split: Split) -> Cell:
        """The training that tries a learning rate. Raises ConfigError."""
        changes: dict[str, Table] = {
            "lora": {"rank": max(self.spec.ranks)},
            "train": {"lr": lr, "epochs": self.trials(group.dataset).epochs},
            "run": {"seed": self.tune.seed},
            "data": {"train": str(split.train), "rows": None},
            # Answers are slow to generate, and the loss tells rates apart.
            "task": {"eval": str(split.held_out), "answer": None},
        }
        return self._cell(group, changes, tuning=True)

    def config(self, group: Group, changes: Mapping[str, Table] | None = None) -> Config:
        """A config with the group's changes, and others after them. Raises ConfigError."""
        table = copy.deepcopy(self.base)
        told = {section: one for section, one in self.settings.items() if section in SECTIONS}
        own = [*(choice.changes for choice in group), told, changes or {}]
        for section, values in ((s, v) for change in own for s, v in change.items()):
            table.setdefault(section, {}).update(copy.deepcopy(values))
        names = f"{group.dataset.name}, {group.partition.name}, {group.method.name}"
        try:
            made = config.complete(
                {section: values for section, values in table.items() if values}, self.path
            )
        except ConfigError as error:
            raise _named(error, f"{self.path.name}, {names}") from error
        if made.data is None or made.task.eval is None:
            missing = "data.train" if made.data is None else "task.eval"
            raise _bad(missing, f"none for {names}", "a file of rows", "give it to the dataset")
        return made

    def _cell(self, group: Group, changes: dict[str, Table], tuning: bool = False) -> Cell:
        made = _canonical(self.config(group, changes))
        prompts = () if tuning else self.spec.prompts
        return Cell(
            dataset=group.dataset.name,
            partition=group.partition.name,
            method=group.method.name,
            rank=made.lora.rank,
            seed=made.run.seed,
            lr=made.train.lr,
            tuning=tuning,
            config=made,
            prompts=prompts,
            key=_key(made, prompts),
        )


def load(path: Path, settings: Sequence[str] = ()) -> Experiment:
    """Read an experiment's file.

    Args:
        path: the TOML file.
        settings: `table.key=value` each, with the value as in TOML or plain text: it replaces what
            the file says, in every cell.

    Raises:
        ConfigError: names the table, the key and the nearest one that is known.
    """
    source = config.read_toml(path)
    table = copy.deepcopy(source)
    shared = [name for name in SECTIONS if name != "method" and name in table]
    base = {name: table.pop(name) for name in shared}
    for name, values in base.items():
        if not isinstance(values, dict):
            raise _bad(name, repr(values), "a table, as in a run's file", f"write [{name}]")
    known = {"experiment", "tune", "dataset", "partition", "method"}
    unknown = sorted(table.keys() - known)
    if unknown:
        every = sorted(known | set(SECTIONS))
        near = get_close_matches(unknown[0], every, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "remove it: see docs/comparing.md"
        raise _bad(path.name, f"`{unknown[0]}`", ", ".join(every), hint)
    told: dict[str, Table] = {}
    for text in settings:
        section, key, value = _setting(text)
        told.setdefault(section, {})[key] = value
        own = table.setdefault(section, {}) if section in ("experiment", "tune") else None
        if isinstance(own, dict):  # Else it is refused below.
            own[key] = value
        if section == "tune":
            _let_go(table.get("dataset"), key)
    experiment = Experiment(
        path=path.resolve(),
        spec=_convert(table.get("experiment", {}), ExperimentSpec, "[experiment]"),
        tune=_convert(table.get("tune", {}), TuneSpec, "[tune]"),
        datasets=_axis(table, "dataset", DatasetChoice),
        partitions=_axis(table, "partition", Choice),
        methods=_axis(table, "method", MethodChoice),
        base=base,
        settings=told,
        source=source,
    )
    _check_methods(experiment)
    for group in experiment.groups():
        experiment.config(group)
    return experiment


def _let_go(datasets: object, key: str) -> None:
    """Take from the datasets what of [tune] is set for all."""
    for entry in datasets if isinstance(datasets, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("tune"), dict):
            entry["tune"].pop(key, None)


def _check_methods(experiment: Experiment) -> None:
    """What a method says of others and of the ranks."""
    tuned = [method.name for method in experiment.methods if method.rate_of is None]
    for method in experiment.methods:
        if method.rate_of is not None and method.rate_of not in tuned:
            where = f"[[method]] {method.name}: rate_of"
            raise _bad(where, repr(method.rate_of), ", ".join(tuned), "name a method that is tuned")
        if method.ranks is not None and not set(method.ranks) & set(experiment.spec.ranks):
            where, ranks = f"[[method]] {method.name}: ranks", list(experiment.spec.ranks)
            raise _bad(where, list(method.ranks), f"some of {ranks}", "take one of these")


def _axis(table: Table, name: str, kind: type[_SpecT]) -> tuple[_SpecT, ...]:
    entries = table.get(name)
    if not isinstance(entries, list) or not entries:
        raise _bad(f"[[{name}]]", entries, "one table or more", f"add [[{name}]] with a name")
    found = [
        _convert(entry, kind, f"[[{name}]] {number}") for number, entry in enumerate(entries, 1)
    ]
    names = [str(getattr(one, "name", "")) for one in found]
    twice = [one for one in names if names.count(one) > 1 or not one.strip()]
    if twice:
        raise _bad(f"[[{name}]]", repr(twice[0]), "names that differ", "rename it")
    return tuple(found)


def _convert(entry: Any, kind: type[_SpecT], where: str) -> _SpecT:
    if not isinstance(entry, dict):
        raise _bad(where, repr(entry), "a table", "see the files in experiments/")
    try:
        return config.convert(entry, kind, "docs/comparing.md")
    except ConfigError as error:
        raise _named(error, where) from error


def _setting(text: str) -> tuple[str, str, Any]:
    """Section, key and value of a `table.key=value`."""
    name, equals, value = text.partition("=")
    section, _, key = name.strip().partition(".")
    known = ("experiment", "tune", *SECTIONS)
    if not equals or not key or section not in known:
        raise ConfigError(
            "`--set` is wrong",
            got=text,
            allowed="table.key=value with a table of " + ", ".join(known),
            remedy="write, for example, --set model.name=PATH",
        )
    if name.strip() in FILES:
        # An empty path would be the working directory.
        there = bool(value) and Path(value).exists()
        return section, key, str(Path(value).resolve()) if there else value
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):  # No TOML: a text.
        return section, key, value


def _canonical(made: Config) -> Config:
    """The config, with keys that change nothing for its method, partition or codec as unset."""
    assert made.data is not None
    data = made.data
    if made.method.name == "centralized":
        data = DataSpec(train=data.train, rows=data.rows)
    elif data.partition == "iid":
        data = msgspec.structs.replace(data, alpha=DataSpec(train="").alpha)
    wire = made.wire
    if not needs_side(wire.name):
        wire = msgspec.structs.replace(wire, public=None)
    return msgspec.structs.replace(made, data=data, wire=wire)


def _key(made: Config, prompts: Sequence[str]) -> str:
    table = msgspec.to_builtins(made)
    # What only `serve` acts on.
    del table["run"]["folder"], table["server"], table["devices"]["least_depth"]
    for name in FILES:
        section, _, key = name.partition(".")
        if table[section][key] is not None:
            table[section][key] = fingerprint(table[section][key])
    told = msgspec.json.encode([__version__, table, list(prompts)], order="sorted")
    return hashlib.sha256(told).hexdigest()[:20]


@cache
def fingerprint(name: str) -> str:
    """Hash over the files at a path; the name itself where nothing is there, as of a hub."""
    path = Path(name.partition("#")[0])
    if not path.exists():
        return name
    digest = hashlib.sha256(name.partition("#")[2].encode())
    for file in _files(path):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    yield from [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def to_toml(made: Config) -> str:
    """The file of a run, which `config.load` reads back to the same config."""
    lines: list[str] = []
    for section, values in msgspec.to_builtins(made).items():
        if values is None:
            continue
        plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
        lines += [f"[{section}]", *_pairs(plain)]
        for key, value in values.items():
            lines += [f"[{section}.{key}]", *_pairs(value)] if isinstance(value, dict) else []
    return "\n".join(lines) + "\n"


def _pairs(values: Table) -> list[str]:
    """JSON of texts, numbers, truths and lists is TOML; what is None is left out."""
    return [
        f"{_quoted(key)} = {_quoted(value)}" for key, value in values.items() if value is not None
    ]


def _quoted(value: object) -> str:
    # DEL is the one character that JSON has as it is and TOML has not.
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")


def _bad(key: str, got: object, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(f"`{key}` is wrong", got=got, allowed=allowed, remedy=remedy)


def _named(error: ConfigError, where: str) -> ConfigError:
    return ConfigError(
        f"{where}: {error.what}", got=error.got, allowed=error.allowed, remedy=error.remedy
    )
