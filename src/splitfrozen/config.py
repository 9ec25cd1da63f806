"""The run's TOML file as small frozen specs that check themselves.

    [model]   ModelSpec     which model, where it is cut, the precision of the fronts
    [task]    TaskConfig    what the rows mean, and the data that the server evaluates on
    [lora]    LoraSpec      the adapters
    [train]   TrainSpec     the optimisation
    [wire]    WireSpec      codec and chunk size
    [devices] DevicesSpec   how many, how deep, how long to wait for them
    [method]  MethodSpec    how it is trained: SplitFrozen, or a method to compare it with
    [data]    DataSpec      `train` and `partition`: the rows, and who holds which
    [server]  ServerSpec    where to listen
    [run]     RunSpec       folder, seed, start

An unknown key is an error that names the nearest known one; relative paths are relative to the
file.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from splitfrozen.errors import ConfigError, WireError
from splitfrozen.records import Precision, TaskKind
from splitfrozen.wire.codec import compressible, needs_side

LARGEST = 2**63 - 1
"""Of whole numbers: what travels and is stored is a signed number of 64 bits."""

Whole = Annotated[int, Meta(ge=1, le=LARGEST)]
Natural = Annotated[int, Meta(ge=0, le=LARGEST)]
Rate = Annotated[float, Meta(ge=0, lt=1)]
Above0 = Annotated[float, Meta(gt=0)]

_FILES = (("task", "eval"), ("data", "train"), ("wire", "public"))
"""Keys that name a file or folder of rows."""

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")


def _is_host(host: str, zone_too: bool) -> bool:
    try:
        return zone_too or getattr(ipaddress.ip_address(host), "scope_id", None) is None
    except ValueError:
        return _HOST.fullmatch(host) is not None


class Spec(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all specs."""


class ModelSpec(Spec, frozen=True):
    """`name`: Hugging Face hub name or folder. `cut`: M. `front`: precision of the devices'
    weights. `precision`: what the server computes in; "auto" takes bfloat16 where the hardware
    multiplies it natively."""

    name: str
    cut: Whole
    front: Precision = "float32"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


class TaskConfig(Spec, frozen=True):
    """What the rows mean.

    `columns`: our name -> the file's column, where they differ. `labels`: class names in order.
    `eval`: data on the server to evaluate on. `answer`: regular expression whose first group is
    the final answer of a generated text (exact match is reported if it is given), tried on the
    first `answer_samples` rows of `eval`.
    """

    kind: TaskKind = "classification"
    columns: dict[str, str] = {}
    labels: tuple[str, ...] = ()
    max_tokens: Whole = 128
    template: str = "{prompt}\n"
    eval: str | None = None
    answer: str | None = None
    answer_samples: Whole = 200

    def __post_init__(self) -> None:
        if self.kind != "causal_lm" and len(self.labels) < 2:
            raise _bad("task.labels", list(self.labels), "two or more names", "name the classes")
        twice = [name for name in self.labels if self.labels.count(name) > 1 or not name.strip()]
        if twice:
            raise _bad("task.labels", repr(twice[0]), "names that differ", "mend it")
        if "{prompt}" not in self.template:
            raise _bad("task.template", self.template, "text with {prompt} in it", "add {prompt}")
        try:
            groups = re.compile(self.answer or "()").groups
        except re.error as error:
            raise _bad("task.answer", self.answer, "a regular expression", str(error)) from error
        if groups < 1:
            raise _bad("task.answer", self.answer, "an expression with one group", "add (...)")


class LoraSpec(Spec, frozen=True):
    """Adapters on blocks[M:L]. `targets`: "all-linear" or the names of linear maps."""

    rank: Whole = 8
    alpha: Above0 = 16.0
    dropout: Rate = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if not self.targets:
            raise _bad("lora.targets", "[]", '"all-linear" or names', "leave it out for all")


class TrainSpec(Spec, frozen=True):
    """The optimisation.

    `batch_size` is in samples and exact; `micro_tokens` bounds the padded tokens of a micro-batch:
    memory only, the gradient does not depend on it but for rounding. With `lora.dropout` above 0,
    which values are dropped follows from the micro-batches; how many does not. `warmup` is the
    share of all steps. `checkpoint_steps` is the number of steps between checkpoints.
    """

    epochs: Whole = 3
    batch_size: Whole = 32
    lr: Above0 = 5e-4
    warmup: Rate = 0.06
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    clip: Above0 = 1.0
    micro_tokens: Whole = 4096
    checkpoint_steps: Whole = 50


class WireSpec(Spec, frozen=True):
    """`codec` and `compression` make the codec's name, as in "float16+zstd"; "auto" compresses
    what a codec leaves to be compressed. `public`: rows that every device may know, which codecs
    with side data are fitted to; others do without."""

    codec: str = "float16"
    compression: Literal["auto", "none", "zlib", "zstd"] = "auto"
    public: str | None = None
    chunk_bytes: Annotated[int, Meta(ge=64 * 1024, le=32 * 1024 * 1024)] = 4 * 1024 * 1024

    def __post_init__(self) -> None:
        needs = _needs_side("wire.codec", self.codec)
        if "@" in self.codec:
            raise _bad("wire.codec", repr(self.codec), "a name without @", "leave the rest out")
        self._refuse_twice_compressed()
        if needs and self.public is None:
            raise _bad(
                "wire.public",
                self.public,
                f"a file of rows with {self.codec}",
                "name rows like those of the task that every device may know, or take a codec "
                "without side data",
            )

    def _refuse_twice_compressed(self) -> None:
        """What names its compression has it; what codes by itself leaves nothing for one."""
        named = "+" in self.codec
        none_to_add = named or not compressible(self.codec)
        if none_to_add and self.compression in ("zlib", "zstd", *(["none"] if named else [])):
            raise _bad(
                "wire.compression",
                f'"{self.compression}" with {self.codec}',
                '"auto" with a codec that names its compression, "auto" or "none" with one that '
                "codes by itself",
                "leave it out",
            )

    @property
    def name(self) -> str:
        if self.compression != "auto":
            return self.codec if self.compression == "none" else f"{self.codec}+{self.compression}"
        return f"{self.codec}+zstd" if compressible(self.codec) else self.codec


def _needs_side(key: str, name: str) -> bool:
    """Whether a codec needs side data. Raises ConfigError where there is no such codec."""
    try:
        return needs_side(name)
    except WireError as error:
        raise _bad(key, error.got, error.allowed, error.remedy) from error


class DevicesSpec(Spec, frozen=True):
    """`depth`: "auto", or one depth for each device in the order of their join strings.
    `least_depth`: with "auto", no device runs fewer blocks, as shallow activations tell more of
    what they are made of. `gather_s`: how long the assignment waits for all `count` devices after
    the first profile. `patience_s`: a device that is silent so long counts as gone, and the run
    goes on with what it sent; 0 waits for ever."""

    count: Annotated[int, Meta(ge=1, le=100_000)]
    depth: Literal["auto"] | tuple[Whole, ...] = "auto"
    least_depth: Whole = 1
    gather_s: Annotated[float, Meta(ge=0)] = 60.0
    patience_s: Annotated[float, Meta(ge=0)] = 0.0

    def __post_init__(self) -> None:
        if self.depth != "auto" and len(self.depth) != self.count:
            raise _bad(
                "devices.depth",
                f"{len(self.depth)} depths",
                f'"auto" or {self.count} depths',
                "give one depth for each of devices.count",
            )
        if self.depth != "auto" and self.least_depth > 1:
            raise _bad(
                "devices.least_depth",
                f"{self.least_depth} with a list of depths",
                'only with devices.depth = "auto"',
                "leave it out, as the list says how deep each device is",
            )


MethodName = Literal["centralized", "fedlora", "splitlora", "sft", "fedsllm", "splitfrozen"]


class MethodSpec(Spec, frozen=True):
    """How the model is trained; docs/baselines.md says what follows which paper.

    `reuse`: SplitFrozen's devices send an activation "once", or in every epoch anew ("never").
    `shuffle`: how SplitFrozen mixes devices: over all samples ("global"), in a window of
    `run.window` samples over what the devices send in turn, or not at all ("none": each batch is
    of one device). `server`: SplitLoRA's server trains one model with the devices' batches in turn
    ("shared") or a copy for each device ("per_device"). A round, after which devices' adapters are
    averaged, is `local_epochs` epochs, or `local_steps` steps where that is given. `gradients`:
    codec of what a server sends back."""

    name: MethodName = "splitfrozen"
    reuse: Literal["once", "never"] = "once"
    shuffle: Literal["global", "window", "none"] = "global"
    server: Literal["shared", "per_device"] = "shared"
    local_epochs: Whole = 1
    local_steps: Whole | None = None
    gradients: str = "float32"

    @property
    def two_way(self) -> bool:
        """Whether gradients come back to the devices."""
        return self.name in ("splitlora", "sft", "fedsllm")

    def __post_init__(self) -> None:
        if _needs_side("method.gradients", self.gradients):
            allowed = "a codec without side data, as gradients are of no fixed distribution"
            raise _bad("method.gradients", repr(self.gradients), allowed, "choose another")
        averages = self.two_way or self.name == "fedlora"
        for key, usable, with_ in (
            ("reuse", self.name == "splitfrozen", "splitfrozen"),
            ("shuffle", self.name == "splitfrozen", "splitfrozen"),
            ("server", self.name == "splitlora", "splitlora"),
            ("gradients", self.two_way, "splitlora, sft and fedsllm"),
            ("local_epochs", averages and self.local_steps is None, "rounds of epochs"),
            ("local_steps", averages, "fedlora, splitlora, sft and fedsllm"),
        ):
            value = getattr(self, key)
            if not usable and value != _METHOD[key]:
                raise _bad(f"method.{key}", repr(value), f"only with {with_}", "leave it out")


_METHOD = {field.name: field.default for field in msgspec.structs.fields(MethodSpec)}


class DataSpec(Spec, frozen=True):
    """The rows of all devices together, for `train` and `partition`; devices of a served run
    bring their own.

    `train`: file or folder. `partition`: "iid"; "dirichlet" (label skew, by `alpha`); "quantity"
    (sizes drawn from Dir(alpha)); "column" (one device for each value of `column`). `rows`: take
    so many, drawn at random; all where it is left out."""

    train: str
    partition: Literal["iid", "dirichlet", "quantity", "column"] = "iid"
    alpha: Above0 = 0.5
    column: str | None = None
    rows: Whole | None = None

    def __post_init__(self) -> None:
        if (self.partition == "column") != (self.column is not None):
            raise _bad(
                "data.column",
                self.column,
                'a column\'s name with partition = "column", and none without',
                "give both or neither",
            )


class ServerSpec(Spec, frozen=True):
    """`host`: address to listen on. `port`: 0 picks a free one. `name`: the address that devices
    are told, by default this machine's name (or `host` where that is an address)."""

    host: str = "0.0.0.0"  # noqa: S104 -- it is there for other machines
    port: Annotated[int, Meta(ge=0, le=65535)] = 8443
    name: str | None = None

    def __post_init__(self) -> None:
        for key, host in (("server.host", self.host), ("server.name", self.name)):
            # What is only listened on may have a zone (fe80::1%eth0); others cannot use it.
            zone_too = key == "server.host" and self.name is not None
            if host is not None and not _is_host(host, zone_too):
                raise _bad(key, repr(host), "a name or address as in a URL", _ascii_hint(host))


class RunSpec(Spec, frozen=True):
    """`folder` holds everything of the run. `start`: "complete" trains when all announced samples
    are in; "streaming" trains its first epoch from a shuffle window of `window` samples while
    devices still upload."""

    folder: str | None = None
    seed: Natural = 0
    start: Literal["complete", "streaming"] = "complete"
    window: Whole = 2048


class Config(Spec, frozen=True):
    """A whole run."""

    model: ModelSpec
    task: TaskConfig
    devices: DevicesSpec
    run: RunSpec = RunSpec()
    lora: LoraSpec = LoraSpec()
    train: TrainSpec = TrainSpec()
    wire: WireSpec = WireSpec()
    server: ServerSpec = ServerSpec()
    method: MethodSpec = MethodSpec()
    data: DataSpec | None = None

    def __post_init__(self) -> None:
        depths = () if self.devices.depth == "auto" else self.devices.depth
        if depths and max(depths) > self.model.cut:
            raise _bad(
                "devices.depth",
                max(depths),
                f"1..{self.model.cut}, the cut",
                "lower the depth or raise model.cut",
            )
        if self.devices.least_depth > self.model.cut:
            raise _bad(
                "devices.least_depth",
                self.devices.least_depth,
                f"1..{self.model.cut}, the cut",
                "lower the least depth or raise model.cut",
            )
        if self.task.kind == "causal_lm" and self.data and self.data.partition == "dirichlet":
            raise _bad(
                "data.partition",
                '"dirichlet", which divides classes',
                '"iid", "quantity" or "column", as causal_lm rows have no labels',
                "choose another",
            )

    @property
    def folder(self) -> Path:
        """The run folder; `load` fills it in."""
        if self.run.folder is None:
            raise _bad("run.folder", None, "a path", "name the run's folder")
        return Path(self.run.folder)


def load(path: Path) -> Config:
    """Read a run's TOML file. Raises ConfigError."""
    return complete(read_toml(path), path)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError."""
    try:
        # Some editors begin a file with a byte order mark.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}",
            got=error.strerror,
            allowed="a readable TOML file",
            remedy="check the path",
        ) from error
    except (ValueError, RecursionError) as error:  # Numbers of 5,000 digits, lists in lists.
        raise ConfigError(
            f"{path} is not TOML",
            got=str(error),
            allowed="TOML 1.0",
            remedy="mend that line",
        ) from error


def complete(table: dict[str, Any], path: Path) -> Config:
    """Make the config of a run of the tables of the file `path`. Raises ConfigError.

    `run.folder` defaults to `runs/<name of the file>` in the working directory; relative paths in
    `run.folder`, `task.eval`, `data.train` and `model.name` (where such a folder exists) are taken
    from the file's folder.
    """
    _refuse_experiment(table, path)
    base = path.resolve().parent
    for section, key in (*_FILES, ("run", "folder"), ("model", "name")):
        _refuse_no_path(table, section, key)
    run = table.setdefault("run", {})
    if isinstance(run, dict):
        run["folder"] = str(
            base / run["folder"] if isinstance(run.get("folder"), str) else Path("runs", path.stem)
        )
    for section, key in _FILES:
        part = table.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            found = base / part[key]
            part[key] = str(found) if _is_there(found) else part[key]
    model = table.get("model")
    if isinstance(model, dict) and isinstance(model.get("name"), str):
        folder = base / model["name"]
        model["name"] = str(folder) if _is_there(folder) and folder.is_dir() else model["name"]
    return convert(table, Config)


_SpecT = TypeVar("_SpecT", bound=Spec)


def convert(
    table: dict[str, Any], kind: type[_SpecT], document: str = "docs/configuration.md"
) -> _SpecT:
    """Turn nested tables into a spec. Raises ConfigError that names the key and the cure.

    `document` lists the keys.
    """
    _refuse_unknown(table, kind, "", document)
    _refuse_infinite(table, "", document)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        what, _, where = str(error).partition(" - at `$")
        key = where.rstrip("`").lstrip(".")
        if missing := re.fullmatch(r"Object missing required field `(.+)`", what):
            key = f"{key}.{missing[1]}".lstrip(".")
            raise ConfigError(
                f"`{key}` is missing",
                got="nothing",
                allowed=_allowed(kind, key),
                remedy=f"add it: see {document}",
            ) from error
        key = key or "the file"
        raise ConfigError(
            f"`{key}` is wrong",
            got=_shortly(_lookup(table, key)),
            allowed=_allowed(kind, key) or what[0].lower() + what[1:],
            remedy=f"see {document}",
        ) from error


def dump(config: Config) -> bytes:
    """JSON of a config, as the run folder keeps it."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2)


def undump(data: bytes) -> Config:
    """Read back what `dump` wrote. Raises ConfigError, msgspec.DecodeError."""
    return convert(msgspec.json.decode(data, type=dict[str, Any]), Config)


def _refuse_experiment(table: dict[str, Any], path: Path) -> None:
    """Experiments look much like runs."""
    for key, command in (("experiment", "compare"), ("datasets", "simulate"), ("system", "plan")):
        if key in table:
            raise ConfigError(
                f"{path} is no run",
                got=f"`{key}`, as the files of `splitfrozen {command}` have it",
                allowed="the file of a run",
                remedy=f"try: splitfrozen {command} {path}",
            )


def _lookup(table: Any, key: str) -> Any:
    """The value at a place as msgspec writes it: `devices.depth[0]`; `[...]` is of any key."""
    for part in re.findall(r"\w+|\.\.\.", key):
        if isinstance(table, list | tuple) and part.isdigit():
            table = table[int(part)]
        elif part != "...":
            table = table.get(part) if isinstance(table, dict) else None
    return table


def _shortly(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _allowed(kind: type[Spec], key: str) -> str:
    """What a key may be, for people; "" where the specs have no such key."""
    several: tuple[Any, ...] = (kind,)
    for part in re.findall(r"\w+|\.\.\.", key):
        several = tuple(
            each for one in several for inner in _inner(one, part) for each in _either(inner)
        )
    return ", ".join(_words(one, key) for one in several if one is not type(None))


def _inner(kind: Any, part: str) -> list[Any]:
    """The kind of what `part` names in a table or list: a key, or a place as msgspec writes it."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    items = get_args(plain)
    if get_origin(plain) is tuple:
        return [items[0] if items[-1] is Ellipsis else items[int(part)]]
    if get_origin(plain) is dict:
        return [items[1]]
    hints = get_type_hints(plain, include_extras=True) if isinstance(plain, type) else {}
    return [hints[part]] if part in hints else []


def _either(kind: Any) -> tuple[Any, ...]:
    """The kinds of `A | B`."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _words(kind: Any, key: str) -> str:
    """A kind in words, as in "a whole number from 1 to 100"."""
    plain, meta = get_args(kind)[:2] if get_origin(kind) is Annotated else (kind, Meta())
    if get_origin(plain) is Literal:
        words = get_args(plain)
        return ", ".join(f'"{word}"' if isinstance(word, str) else str(word) for word in words)
    if get_origin(plain) is tuple:
        items = get_args(plain)
        if list(_specs(items[0])):
            return f"tables [[{key}]]"
        several = f" of {meta.min_length} or more" if meta.min_length else ""
        return f"a list{several}" if items[-1] is Ellipsis else f"a list of {len(items)}"
    if plain in (int, float):
        return f"a {'whole ' if plain is int else ''}number{_range(meta)}"
    if plain is str:
        return f"text that matches {meta.pattern}" if meta.pattern else "text"
    return "true or false" if plain is bool else "a table"


def _range(meta: Meta) -> str:
    if meta.ge is not None and meta.le is not None:
        return f" from {meta.ge} to {'2^63 - 1' if meta.le == LARGEST else meta.le}"
    limits = (
        ("of at least", meta.ge),
        ("above", meta.gt),
        ("of at most", meta.le),
        ("below", meta.lt),
    )
    told = " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None)
    return f" {told}" if told else ""


def _refuse_infinite(table: dict[str, Any], prefix: str, document: str) -> None:
    """TOML has inf and nan; JSON, which keeps the config, has not."""
    for key, value in table.items():
        if isinstance(value, dict):
            _refuse_infinite(value, f"{prefix}{key}.", document)
        elif isinstance(value, list):
            items = {f"{key}[{i}]": item for i, item in enumerate(value)}
            _refuse_infinite(items, prefix, document)
        elif isinstance(value, float) and not math.isfinite(value):
            raise _bad(prefix + key, value, "a finite number", f"see {document}")


def _refuse_no_path(table: dict[str, Any], section: str, key: str) -> None:
    """An empty path would mean the folder of the file itself."""
    text = table[section].get(key) if isinstance(table.get(section), dict) else None
    if isinstance(text, str) and (not text.strip() or "\0" in text):
        raise _bad(f"{section}.{key}", repr(text), "a path", "mend it, or leave it out for none")


def _is_there(path: Path) -> bool:
    """False, too, where no file can have such a name."""
    try:
        return path.exists()
    except OSError:
        return False


def _ascii_hint(host: str) -> str:
    try:
        return f"write {host.encode('idna').decode()}" if not host.isascii() else "mend it"
    except UnicodeError:
        return "mend it"


def _refuse_unknown(table: dict[str, Any], kind: type[Spec], prefix: str, document: str) -> None:
    known = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"remove it: see {document}"
            where = f" in `{prefix.rstrip('.')}`" if prefix else ""
            raise ConfigError(
                f"an unknown key{where}",
                got=f"`{prefix}{key}`",
                allowed=", ".join(known),
                remedy=hint,
            )
        tables = {f"[{i}]": one for i, one in enumerate(value)} if isinstance(value, list) else {}
        for inner in _specs(known[key]):
            for place, table in (tables or {"": value}).items():
                if isinstance(table, dict):
                    _refuse_unknown(table, inner, f"{prefix}{key}{place}.", document)


def _specs(kind: Any) -> Iterator[type[Spec]]:
    """The kinds of tables in what a key may hold, such as `DataSpec | None` or a list of them."""
    if isinstance(kind, type) and issubclass(kind, Spec):
        yield kind
    for inner in get_args(kind):
        yield from _specs(inner)


def _bad(key: str, got: object, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(f"`{key}` is wrong", got=got, allowed=allowed, remedy=remedy)
