"""The file of `plan` for SplitFrozen as specs, and the network that it describes.

    [model]     ModelPart    shape, cut, rank
    [data]      DataPart     how it goes through training
    [server]    MachinePart  its speed
    [[devices]] DeviceGroup  equal devices: how many, how fast, how much data, their links
    [[codecs]]  CodecPart    settings to choose from; the first is for going without a choice
    [limits]    LimitsPart   accuracy budget, least depth; optional
    [air]       AirPart      what uplinks divide; optional
    [check] [crowd] [figure] CheckPart, CrowdPart, FigurePart: what else is measured; optional

experiments/splitfrozen-plan.toml is an example with reasons.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

from msgspec import Meta

from splitfrozen.config import Above0, Natural, Spec, Whole
from splitfrozen.errors import WireError
from splitfrozen.model.costs import FLOAT_BYTES
from splitfrozen.planning.makespan import Knob, Medium, Subchannels
from splitfrozen.simulation.experiment import SHAPES, MachineGroup, MachinePart, named
from splitfrozen.simulation.setting import Setting
from splitfrozen.simulation.work import Counting
from splitfrozen.studies.plan_file import bad, refuse_unsorted
from splitfrozen.studies.plan_splitfrozen_cases import Case, Flow, Party, case
from splitfrozen.wire.codec import needs_side

MEGA = 1e6
MOST_DEVICES, MOST_SHARES = 1000, 10**6
"""Of devices, and of devices times steps: some hundred plans are simulated, each to the end."""
AtMost1 = Annotated[float, Meta(ge=0, le=1)]


class ModelPart(Spec, frozen=True):
    """`cut`: M. `rank`: of LoRA. `counting`: as in `simulation.work`."""

    shape: Literal["gpt2-small", "vit-base"]
    cut: Whole
    rank: Whole
    counting: Counting = "exact"

    def __post_init__(self) -> None:
        blocks = SHAPES[self.shape]().blocks
        if self.cut >= blocks:
            raise bad(
                "model.cut", self.cut, f"1..{blocks - 1}, as it has {blocks} blocks", "lower it"
            )


class DataPart(Spec, frozen=True):
    """`tokens`: T of every sample. `batch_size`: over all devices. `reuse`: a sample is sent
    "once", or in every epoch ("never")."""

    tokens: Whole
    batch_size: Whole
    epochs: Whole = 1
    reuse: Literal["once", "never"] = "once"


class LimitsPart(Spec, frozen=True):
    """`accuracy_loss`: the budget, as a fraction. `least_depth`: of every device."""

    accuracy_loss: AtMost1 = 0.0
    least_depth: Whole = 1


class CodecPart(Spec, frozen=True):
    """`name`: as in a run's `wire.codec`. `bits`: of an activation's value on the wire.
    `accuracy_loss`: a fraction. `encode_mb_s`: 10^6 bytes of float32 a second on a device; left
    out where it takes no time."""

    name: str
    bits: Above0
    accuracy_loss: AtMost1 = 0.0
    encode_mb_s: Above0 | None = None

    def __post_init__(self) -> None:
        try:
            needs_side(self.name)
        except WireError as error:
            raise bad("codecs.name", error.got, error.allowed, error.remedy) from error
        if "@" in self.name:
            raise bad("codecs.name", repr(self.name), "a name without @", "leave the rest out")


class AirPart(Spec, frozen=True):
    """What uplinks divide: `bps` of a medium, or `rates`: for each device, bit/s on each
    subchannel."""

    bps: Above0 | None = None
    rates: tuple[tuple[Above0, ...], ...] = ()


class DeviceGroup(MachineGroup, frozen=True, kw_only=True):
    """Equal devices. `samples`: of each, on average (need not be whole). `bps`: of each uplink,
    unless [air] is divided. `memory_mb`: 10^6 bytes; left out for enough. `paper_depth`: what the
    paper's rule gives them."""

    samples: Above0
    bps: Above0 | None = None
    memory_mb: Above0 | None = None
    paper_depth: Whole


class CheckPart(Spec, frozen=True):
    """`instances`: drawn networks that the planner is compared with brute force on."""

    instances: Annotated[int, Meta(ge=1, le=10_000)]
    seed: Natural = 0


class CrowdPart(Spec, frozen=True):
    """A drawn cell of many devices."""

    clients: Annotated[int, Meta(ge=1, le=1000)]
    subchannels: Annotated[int, Meta(ge=1, le=1000)]
    seed: Natural = 0


class FigurePart(Spec, frozen=True):
    """`bps`: rates of every uplink, from the lowest, for which the makespans are drawn."""

    bps: Annotated[tuple[Above0, ...], Meta(min_length=2)]

    def __post_init__(self) -> None:
        refuse_unsorted("figure.bps", self.bps)


class PlanFile(Spec, frozen=True):
    """A whole file."""

    system: Literal["splitfrozen"]
    model: ModelPart
    data: DataPart
    server: MachinePart
    devices: Annotated[tuple[DeviceGroup, ...], Meta(min_length=1)]
    codecs: Annotated[tuple[CodecPart, ...], Meta(min_length=1)]
    limits: LimitsPart = LimitsPart()
    air: AirPart | None = None
    check: CheckPart | None = None
    crowd: CrowdPart | None = None
    figure: FigurePart | None = None

    def __post_init__(self) -> None:
        for key, names in (("devices", self.devices), ("codecs", self.codecs)):
            twice = {one.name for one in names if [o.name for o in names].count(one.name) > 1}
            if twice:
                raise bad(f"{key}.name", f"{min(twice)!r} twice", "each once", "rename one")
        for number, group in enumerate(self.devices):
            if group.paper_depth > self.model.cut:
                allowed = f"1..{self.model.cut}, the cut"
                raise bad(f"devices[{number}].paper_depth", group.paper_depth, allowed, "lower it")
            if (group.bps is None) == (self.air is None):
                got = "a rate of its own beside [air]" if self.air else "neither a rate nor [air]"
                remedy = "remove it" if self.air else f"give {group.name} `bps`, or add [air]"
                allowed = "`bps` in every group, or [air] for all"
                raise bad(f"devices[{number}].bps", got, allowed, remedy)
        self._refuse_endless()
        if self.air is not None:
            _check_air(self.air, sum(group.count for group in self.devices))
        if self.figure is not None and self.air is not None and self.air.rates:
            raise bad("figure", "[figure] with subchannels", "links or a medium", "remove it")

    def _refuse_endless(self) -> None:
        devices = sum(group.count for group in self.devices)
        if devices > MOST_DEVICES:
            remedy = f"take {devices - MOST_DEVICES} out, or join some to faster ones"
            raise bad("devices", devices, f"at most {MOST_DEVICES} together", remedy)
        samples = sum(group.count * group.samples for group in self.devices)
        steps = max(1.0, samples / self.data.batch_size) * self.data.epochs
        if devices * steps > MOST_SHARES:
            got = f"{steps:.3g} steps of {devices} devices"
            allowed = f"at most {MOST_SHARES:.0e} shares of devices in steps"
            raise bad("data", got, allowed, "plan for a part of the samples, or larger batches")


def _check_air(air: AirPart, devices: int) -> None:
    if (air.bps is None) == (not air.rates):
        both = air.bps is not None
        got, remedy = (
            ("both of its keys", "remove one") if both else ("none of its keys", "add one")
        )
        raise bad("air", got, "`bps` of a medium, or `rates` of subchannels", remedy)
    if not air.rates:
        return
    lacking = devices - len(air.rates)
    if lacking:
        remedy = f"add {lacking} rows" if lacking > 0 else f"remove {-lacking} rows"
        raise bad("air.rates", f"{len(air.rates)} rows", f"{devices}, one a device", remedy)
    width = len(air.rates[0])
    for number, row in enumerate(air.rates):
        if len(row) != width or not row:
            allowed = f"{width or 'some'}, one a subchannel, as in the other rows"
            raise bad(f"air.rates[{number}]", f"{len(row)} rates", allowed, "add or remove some")


def case_of(spec: PlanFile) -> Case:
    """The network of a file, whose devices are sorted by name.

    In a file [air] `rates` are in the order of [[devices]], as is all that is told of a plan.
    """
    shape = SHAPES[spec.model.shape]()
    setting = Setting(shape, spec.model.rank, spec.model.cut, counting=spec.model.counting)
    flow = Flow(spec.data.tokens, spec.data.batch_size, spec.data.epochs, spec.data.reuse == "once")
    parties = [
        Party(
            id=name,
            flops=group.flops * group.efficiency,
            memory_bytes=math.inf if group.memory_mb is None else group.memory_mb * MEGA,
            samples=group.samples,
            bps=group.bps or 1.0,
        )
        for name, group in named(spec.devices)
    ]
    knobs = [
        Knob(
            name=codec.name,
            bytes_per_token=shape.width * codec.bits / 8,
            accuracy_loss=codec.accuracy_loss,
            encode_s=FLOAT_BYTES * shape.width / (codec.encode_mb_s * MEGA)
            if codec.encode_mb_s
            else 0.0,
        )
        for codec in spec.codecs
    ]
    made = case(setting, flow, parties, spec.server.flops * spec.server.efficiency, knobs)
    problem = replace(
        made.problem,
        air=_air(spec),
        most_loss=spec.limits.accuracy_loss,
        least_depth=spec.limits.least_depth,
    )
    return replace(made, problem=problem)


def _air(spec: PlanFile) -> Medium | Subchannels | None:
    if spec.air is None:
        return None
    if spec.air.bps is not None:
        return Medium(spec.air.bps)
    names = [name for name, _ in named(spec.devices)]
    return Subchannels(tuple(row for _, row in sorted(zip(names, spec.air.rates, strict=True))))
