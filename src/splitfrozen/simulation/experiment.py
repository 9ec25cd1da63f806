"""The file of `splitfrozen simulate` as specs, and what a simulation is made of from it.

    methods     names, in the order of the table
    [model]     ModelPart      shape, ranks, cut, how FLOP are counted
    [train]     TrainPart      batch size and epochs
    [wire]      WirePart       bytes a value
    [server]    ServerPart     its speed; the federated server of FedsLLM has the same
    [link]      LinkPart       of each device, each way
    [[devices]] DeviceGroup    equal devices: how many, how fast, how deep
    [[datasets]] DatasetPart   samples and their length
    [paper]     PaperPart      `rows` of published figures, to print beside; optional

experiments/table2.toml is an example with reasons; docs/simulation.md lists the keys. The file of
`splitfrozen replay --network` (`NetworkFile`) has the same [server], [link] and [[devices]].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from msgspec import Meta

from splitfrozen.config import Above0, MethodName, Spec, Whole, convert, read_toml
from splitfrozen.errors import ConfigError
from splitfrozen.model import costs
from splitfrozen.model.costs import ModelShape, Tokens
from splitfrozen.records import FEDERATED, SERVER
from splitfrozen.simulation.network import Link, Machine, Network
from splitfrozen.simulation.setting import AHEAD, Setting, Share, Step, Wire
from splitfrozen.simulation.work import Counting

SHAPES: dict[str, Callable[[], ModelShape]] = {
    "gpt2-small": costs.gpt2_small,
    "vit-base": costs.vit_base,
}

MOST_SHARES = 10**8
"""Devices times steps of a simulation: each is some events, which are held in memory."""

Part = Annotated[float, Meta(gt=0, le=1)]
Seconds = Annotated[float, Meta(ge=0)]
_Group = TypeVar("_Group", bound="MachineGroup")


class ModelPart(Spec, frozen=True):
    """`cut`: M, and the blocks that devices train in the two-way methods. `ranks`: of LoRA, each
    simulated. `counting`: as in `schedules.Setting`."""

    shape: Literal["gpt2-small", "vit-base"]
    cut: Whole
    ranks: Annotated[tuple[Whole, ...], Meta(min_length=1)]
    counting: Counting = "exact"

    def __post_init__(self) -> None:
        blocks = SHAPES[self.shape]().blocks
        if self.cut >= blocks:
            raise ConfigError(
                "`model.cut` is wrong",
                got=self.cut,
                allowed=f"1..{blocks - 1}, as {self.shape} has {blocks} blocks",
                remedy="lower it: blocks above the cut are trained",
            )


class TrainPart(Spec, frozen=True):
    """`batch_size`: over all devices, in equal parts. A round is an epoch. `reuse_epochs`: over
    how many epochs `reuse = "once"` is compared; 1 for not at all."""

    batch_size: Whole
    epochs: Whole = 1
    reuse_epochs: Whole = 1


class WirePart(Spec, frozen=True):
    """Bytes a value: of what goes up, of what comes back, and of adapters."""

    activations: Above0 = 4.0
    gradients: Above0 = 4.0
    adapters: Above0 = 4.0


class MachinePart(Spec, frozen=True):
    """`flops`: FLOP/s at its peak; `efficiency`: the part of it that is reached."""

    flops: Above0
    efficiency: Part = 1.0


class ServerPart(MachinePart, frozen=True):
    """The server as one machine, for every method; and where `stages` is above 1, SplitFrozen's
    also as a pipeline, to compare: so many equal machines, each with its part of `flops` and of
    the blocks, which take a batch in `micro_batches` parts."""

    stages: Annotated[int, Meta(ge=1, le=64)] = 1
    micro_batches: Annotated[int, Meta(ge=1, le=1024)] = 8


class LinkPart(Spec, frozen=True):
    """`bps`: bit/s. `shared`: devices' links divide that rate, each direction for itself.
    `trace`: pairs of second and factor, how the rate changes over time."""

    bps: Above0
    latency_s: Seconds = 0.0
    shared: bool = False
    trace: tuple[tuple[float, float], ...] = ()


class MachineGroup(Spec, frozen=True):
    """Equal devices, called `name`-0, `name`-1 ..."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]{1,40}$")]
    count: Annotated[int, Meta(ge=1, le=100_000)]
    flops: Above0
    efficiency: Part = 1.0


class DeviceGroup(MachineGroup, frozen=True, kw_only=True):
    """`depth`: n with SplitFrozen."""

    depth: Whole


class NetworkFile(Spec, frozen=True):
    """What a run's events are replayed on: machines and links, for devices in their order."""

    server: MachinePart
    link: LinkPart
    devices: Annotated[tuple[MachineGroup, ...], Meta(min_length=1)]


class DatasetPart(Spec, frozen=True):
    """`tokens`: T of every sample."""

    name: str
    samples: Whole
    tokens: Whole


class Published(Spec, frozen=True):
    """What a paper says of one cell of the table, in the units of `studies.simulate`."""

    dataset: str
    rank: Whole
    method: MethodName
    device_tflop: Above0
    device_s: Above0
    total_s: Above0


class PaperPart(Spec, frozen=True):
    """`rows`: cells of the table, any of them."""

    rows: tuple[Published, ...] = ()


class Experiment(Spec, frozen=True):
    """A whole file."""

    model: ModelPart
    train: TrainPart
    server: ServerPart
    link: LinkPart
    methods: Annotated[tuple[MethodName, ...], Meta(min_length=1)]
    devices: Annotated[tuple[DeviceGroup, ...], Meta(min_length=1)]
    datasets: Annotated[tuple[DatasetPart, ...], Meta(min_length=1)]
    wire: WirePart = WirePart()
    paper: PaperPart = PaperPart()

    def __post_init__(self) -> None:
        for number, group in enumerate(self.devices):
            if group.depth > self.model.cut:
                raise ConfigError(
                    f"`devices[{number}].depth` is wrong",
                    got=group.depth,
                    allowed=f"1..{self.model.cut}, the cut",
                    remedy="lower the depth or raise model.cut",
                )
        _refuse_twice("methods", self.methods)
        _refuse_twice("model.ranks", self.model.ranks)
        _refuse_twice("devices.name", [group.name for group in self.devices])
        _refuse_twice("datasets.name", [dataset.name for dataset in self.datasets])
        self._refuse_endless()

    def _refuse_endless(self) -> None:
        devices = sum(group.count for group in self.devices)
        epochs = max(self.train.epochs, self.train.reuse_epochs)
        for number, dataset in enumerate(self.datasets):
            shares = -(-dataset.samples // self.train.batch_size) * epochs * devices
            if shares > MOST_SHARES:
                raise ConfigError(
                    f"`datasets[{number}]` takes too many steps",
                    got=f"{shares:.2g}, those of {devices} devices together",
                    allowed=f"at most {MOST_SHARES:.0e}",
                    remedy="simulate a part of its samples; time grows in proportion to them",
                )

    @property
    def shape(self) -> ModelShape:
        return SHAPES[self.model.shape]()


def _refuse_twice(key: str, values: Sequence[object]) -> None:
    twice = [value for place, value in enumerate(values) if value in values[:place]]
    if twice:
        raise ConfigError(
            f"`{key}` is wrong",
            got=f"{twice[0]!r} twice",
            allowed="each once",
            remedy="remove or rename one",
        )


def load(path: Path) -> Experiment:
    """Read the file of an experiment. Raises ConfigError."""
    return convert(read_toml(path), Experiment, "docs/simulation.md")


def network(experiment: Experiment) -> Network:
    """Machines and links. Raises RequestError for a trace that cannot be followed."""
    stages = experiment.server.stages
    stage = Machine(experiment.server.flops / stages, experiment.server.efficiency)
    machines = {f"{SERVER}/{number}": stage for number in range(stages)}
    for name, group in named(experiment.devices):
        machines[name] = Machine(group.flops, group.efficiency)
    return connected(machines, experiment.server, experiment.link)


def connected(machines: dict[str, Machine], server: MachinePart, link: LinkPart) -> Network:
    """Devices with a server and a federated one, each device with an equal link.

    Raises RequestError for a trace that cannot be followed.
    """
    hub = Machine(server.flops, server.efficiency)
    links = {}
    for party in (SERVER, FEDERATED):
        for source, target, medium in (("device", party, "uplink"), (party, "device", "downlink")):
            shared = medium if link.shared else None
            links[source, target] = Link(link.bps, link.latency_s, shared, link.trace)
    return Network({**machines, SERVER: hub, FEDERATED: hub}, links)


def named(groups: Iterable[_Group]) -> Iterator[tuple[str, _Group]]:
    """Every device and its group."""
    for group in groups:
        for number in range(group.count):
            yield f"{group.name}-{number}", group


def setting(experiment: Experiment, rank: int, *, once: bool = False) -> Setting:
    """What schedules depend on; `once`: the server stores what comes, so devices need not wait."""
    wire = experiment.wire
    return Setting(
        shape=experiment.shape,
        rank=rank,
        cut=experiment.model.cut,
        depths={name: group.depth for name, group in named(experiment.devices)},
        counting=experiment.model.counting,
        wire=Wire(wire.activations, wire.gradients, wire.adapters),
        ahead=None if once else AHEAD,
    )


def steps(
    experiment: Experiment, dataset: DatasetPart, epochs: int, *, once: bool = False
) -> Iterator[Step]:
    """All steps over a dataset that the devices hold equal parts of.

    Each takes part in each step with the same number of samples, which need not be whole: it is
    the mean of what whole batches would be. `once`: epochs after the first read what is stored.
    """
    names = [name for name, _ in named(experiment.devices)]
    size = experiment.train.batch_size
    full, rest = divmod(dataset.samples, size)
    batches = [size] * full + [rest] * bool(rest)
    shares = {
        samples: tuple(
            Share(name, Tokens.uniform(samples / len(names), dataset.tokens)) for name in names
        )
        for samples in set(batches)
    }
    for epoch in range(epochs):
        for place, samples in enumerate(batches):
            yield Step(
                number=epoch * len(batches) + place,
                shares=shares[samples],
                ends_round=place == len(batches) - 1,
                stored=once and epoch > 0,
            )
