"""The run's TOML file as small frozen specs that check themselves.

    [model]   ModelSpec     which model, where it is cut, the precision of the fronts
    [task]    TaskConfig    what the rows mean, and the data that the server evaluates on
    [lora]    LoraSpec      the adapters
    [train]   TrainSpec     the optimisation
    [wire]    WireSpec      codec and chunk size
    [devices] DevicesSpec   how many, how deep, how long to wait for them
    [server]  ServerSpec    where to listen
    [run]     RunSpec       folder, seed, start

An unknown key is an error that names the nearest known one; relative paths are relative to the
file.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from splitfrozen.errors import ConfigError
from splitfrozen.records import Precision, TaskKind

Whole = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(ge=0, lt=1)]
Above0 = Annotated[float, Meta(gt=0)]


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


class TrainSpec(Spec, frozen=True):
    """The optimisation.

    `batch_size` is in samples and exact; `micro_tokens` bounds the padded tokens of a micro-batch
    (memory only, the gradient does not depend on it). `warmup` is the share of all steps.
    `checkpoint_steps` is the number of steps between checkpoints.
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
    """`codec` and `compression` make the codec's name, as in "float16+zstd"."""

    codec: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    compression: Literal["none", "zlib", "zstd"] = "zstd"
    chunk_bytes: Annotated[int, Meta(ge=64 * 1024, le=32 * 1024 * 1024)] = 4 * 1024 * 1024

    @property
    def name(self) -> str:
        return self.codec if self.compression == "none" else f"{self.codec}+{self.compression}"


class DevicesSpec(Spec, frozen=True):
    """`depth`: "auto", or one depth for each device in the order of their join strings.
    `gather_s`: how long the assignment waits for all `count` devices after the first profile.
    `patience_s`: a device that is silent so long counts as gone, and the run goes on with what it
    sent; 0 waits for ever."""

    count: Annotated[int, Meta(ge=1, le=100_000)]
    depth: Literal["auto"] | tuple[Whole, ...] = "auto"
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


class ServerSpec(Spec, frozen=True):
    """`host`: address to listen on. `port`: 0 picks a free one. `name`: the address that devices
    are told, by default this machine's name (or `host` where that is an address)."""

    host: str = "0.0.0.0"  # noqa: S104 -- it is there for other machines
    port: Annotated[int, Meta(ge=0, le=65535)] = 8443
    name: str | None = None


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

    def __post_init__(self) -> None:
        depths = () if self.devices.depth == "auto" else self.devices.depth
        if depths and max(depths) > self.model.cut:
            raise _bad(
                "devices.depth",
                max(depths),
                f"1..{self.model.cut}, the cut",
                "lower the depth or raise model.cut",
            )

    @property
    def folder(self) -> Path:
        """The run folder; `load` fills it in."""
        if self.run.folder is None:
            raise _bad("run.folder", None, "a path", "name the run's folder")
        return Path(self.run.folder)


def load(path: Path) -> Config:
    """Read a run's TOML file. Raises ConfigError.

    `run.folder` defaults to `runs/<name of the file>` in the working directory; relative paths in
    `run.folder`, `task.eval` and `model.name` (where such a folder exists) are taken from the
    file's folder.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}",
            got=error.strerror,
            allowed="a readable TOML file",
            remedy="check the path",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not TOML",
            got=str(error),
            allowed="TOML 1.0",
            remedy="mend that line",
        ) from error
    base = path.resolve().parent
    run = table.setdefault("run", {})
    if isinstance(run, dict):
        run["folder"] = str(
            base / run["folder"] if isinstance(run.get("folder"), str) else Path("runs", path.stem)
        )
    task, model = table.get("task"), table.get("model")
    if isinstance(task, dict) and isinstance(task.get("eval"), str):
        task["eval"] = str(base / task["eval"]) if (base / task["eval"]).exists() else task["eval"]
    if isinstance(model, dict) and isinstance(model.get("name"), str):
        folder = base / model["name"]
        model["name"] = str(folder) if folder.is_dir() else model["name"]
    return convert(table, Config)


_SpecT = TypeVar("_SpecT", bound=Spec)


def convert(table: dict[str, Any], kind: type[_SpecT]) -> _SpecT:
    """Turn nested tables into a spec. Raises ConfigError that names the key and the cure."""
    _refuse_unknown(table, kind, "")
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        what, _, where = str(error).partition(" - at `$")
        key = where.rstrip("`").lstrip(".") or "the file"
        raise ConfigError(
            f"`{key}` is wrong",
            got=repr(_lookup(table, key)),
            allowed=what[0].lower() + what[1:],
            remedy="see docs/configuration.md",
        ) from error


def dump(config: Config) -> bytes:
    """JSON of a config, as the run folder keeps it."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2)


def undump(data: bytes) -> Config:
    """Read back what `dump` wrote. Raises ConfigError."""
    return convert(msgspec.json.decode(data), Config)


def _lookup(table: Any, key: str) -> Any:
    for part in key.split("."):
        table = table.get(part) if isinstance(table, dict) else None
    return table


def _refuse_unknown(table: dict[str, Any], kind: type[Spec], prefix: str) -> None:
    known = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else "remove it"
            raise _bad(prefix.rstrip(".") or "the file", f"`{prefix}{key}`", ", ".join(known), hint)
        inner = known[key]
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, Spec):
            _refuse_unknown(value, inner, f"{prefix}{key}.")


def _bad(key: str, got: object, allowed: str, remedy: str) -> ConfigError:
    return ConfigError(f"`{key}` is wrong", got=got, allowed=allowed, remedy=remedy)
