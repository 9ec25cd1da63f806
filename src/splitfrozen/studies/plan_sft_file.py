"""The file of `splitfrozen plan` with `system = "sft"` as specs, and what is planned from it.

    rounds, seed         T, and of all that is drawn
    [model]     ModelPart      shape, LoRA, batch
    [devices]   DevicesPart    how many, how fast, with how much memory and how many samples
    [server]    ServerPart     its speed
    [channel]   ChannelPart    bandwidth and signal-to-noise ratios
    [bounds]    BoundsPart     of the three variables of P1
    [accuracy]  AccuracyPart   how accurate which compression is, and how accurate it is to be
    [figures]   FiguresPart    what the delay is drawn over
    [paper]     PaperPart      its setting and results, to print beside; optional

experiments/sft.toml is an example with sources; docs/planning.md lists the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, field

from splitfrozen import rng
from splitfrozen.config import Above0, Natural, Spec, Whole
from splitfrozen.errors import DataError
from splitfrozen.model.costs import ModelShape
from splitfrozen.planning import surface as surfaces
from splitfrozen.planning.bandwidth import Reals
from splitfrozen.planning.sft import Bounds, Problem
from splitfrozen.planning.sft_delay import Device, System
from splitfrozen.planning.surface import Kept, Point, Share, Surface
from splitfrozen.simulation.experiment import SHAPES
from splitfrozen.studies.plan_file import bad, refuse_unsorted, with_vocabulary
from splitfrozen.wire import topk

Decibels = Annotated[float, Meta(ge=-50, le=100)]
Levels = Annotated[int, Meta(ge=2, le=topk.LEVELS)]
"""Those that the codec has."""


class ModelPart(Spec, frozen=True):
    """`tokens`: N of a sample. `batch`: samples of a device's step. `rank`: of LoRA. `moments`:
    that the optimiser keeps: 1 for SGD with momentum, 2 for Adam. `vocabulary`: where the shape
    reads tokens."""

    shape: Literal["gpt2-small", "vit-base"]
    tokens: Whole
    batch: Whole
    rank: Whole
    moments: Literal[0, 1, 2] = 1
    vocabulary: Whole | None = None

    def __post_init__(self) -> None:
        reads = self.shape == "gpt2-small"
        if reads != (self.vocabulary is not None):
            got = "nothing" if reads else self.vocabulary
            allowed = "how many tokens there are" if reads else f"nothing with {self.shape}"
            remedy = "add it, such as GPT-2's 50257" if reads else "remove it"
            raise bad("model.vocabulary", got, allowed, remedy)

    def costs(self) -> ModelShape:
        """With its head, which the server has."""
        shape = SHAPES[self.shape]()
        return shape if self.vocabulary is None else with_vocabulary(shape, self.vocabulary)


class DevicesPart(Spec, frozen=True):
    """`flops`: least and most FLOP/s; each device's is drawn between them. `samples`: of each, a
    round. `most_hz`: bandwidth of each at most, by default all there is."""

    count: Annotated[int, Meta(ge=1, le=1000)]
    flops: tuple[Above0, Above0]
    memory_bytes: Above0
    samples: Whole
    most_hz: Above0 | None = None


class ServerPart(Spec, frozen=True):
    """`flops`: FLOP/s of the whole server."""

    flops: Above0


class ChannelPart(Spec, frozen=True):
    """`total_hz`: of all devices. `snr_db`: of uplinks, which P1 plans for; in each round each
    device's is drawn from a normal distribution about it with deviation `spread_db`.
    `server_snr_db`: of all that the server sends."""

    total_hz: Above0
    snr_db: Decibels
    server_snr_db: Decibels
    spread_db: Annotated[float, Meta(ge=0, le=30)] = 0.0


class BoundsPart(Spec, frozen=True):
    """Least and most keep rate, levels, and blocks on the devices."""

    rho: tuple[Kept, Kept]
    levels: tuple[Levels, Levels]
    blocks: tuple[Whole, Whole]


class AccuracyPart(Spec, frozen=True):
    """`loss`: how much less accurate than without compression it may be, as a share of 1.
    `surface`: file that scripts/measure_surface.py wrote; or instead `points` of [keep rate,
    levels, accuracy], and `reference`, the accuracy without compression."""

    loss: Share
    surface: str | None = None
    points: tuple[Point, ...] = ()
    reference: Share | None = None

    def __post_init__(self) -> None:
        given = {
            "surface": self.surface is not None,
            "points": bool(self.points),
            "reference": self.reference is not None,
        }
        if tuple(given.values()) not in ((True, False, False), (False, True, True)):
            raise bad(
                "accuracy",
                ", ".join(key for key, there in given.items() if there) or "neither",
                "`surface` alone, or `points` with `reference`",
                "name the file of a surface, or give measured points",
            )


class FiguresPart(Spec, frozen=True):
    """`total_hz`: bandwidths, from the least, that the delay is drawn over."""

    total_hz: tuple[Above0, ...] = ()

    def __post_init__(self) -> None:
        refuse_unsorted("figures.total_hz", self.total_hz)


class PaperPart(Spec, frozen=True):
    """The setting that the paper reports, and what it reports: parts of 1 that are saved against
    SFT without compression (`band_saved`: of the communication of a round, by its bandwidths), and
    minutes by scheme."""

    rho: Kept
    levels: Levels
    blocks: Whole
    delay_saved: Share
    bytes_saved: Share
    band_saved: Share
    minutes: dict[str, Above0] = field(default_factory=dict)


class Experiment(Spec, frozen=True):
    """A whole file."""

    system: Literal["sft"]
    rounds: Annotated[int, Meta(ge=1, le=10_000)]
    model: ModelPart
    devices: DevicesPart
    server: ServerPart
    channel: ChannelPart
    bounds: BoundsPart
    accuracy: AccuracyPart
    paper: PaperPart | None = None
    figures: FiguresPart = FiguresPart()
    seed: Natural = 0

    def __post_init__(self) -> None:
        for key, (least, most) in (
            ("devices.flops", self.devices.flops),
            ("bounds.rho", self.bounds.rho),
            ("bounds.levels", self.bounds.levels),
            ("bounds.blocks", self.bounds.blocks),
        ):
            if least > most:
                raise bad(key, [least, most], "the least before the most", "exchange them")
        blocks = self.model.costs().blocks
        for key, most in (
            ("bounds.blocks", self.bounds.blocks[1]),
            ("paper.blocks", self.paper.blocks if self.paper else 1),
        ):
            if most >= blocks:
                allowed = f"1..{blocks - 1}, as {self.model.shape} has {blocks} blocks"
                raise bad(key, most, allowed, "lower it: the server has one at least")


def system_of(spec: Experiment) -> System:
    """Devices, drawn by the file's seed, and their server."""
    speeds = rng.stream(spec.seed, "devices").uniform(*spec.devices.flops, spec.devices.count)
    own, most_hz = spec.devices, spec.devices.most_hz or spec.channel.total_hz
    return System(
        shape=spec.model.costs(),
        tokens=spec.model.tokens,
        batch=spec.model.batch,
        rank=spec.model.rank,
        moments=spec.model.moments,
        devices=tuple(
            Device(f"device-{number:03}", float(flops), own.memory_bytes, own.samples, most_hz)
            for number, flops in enumerate(speeds)
        ),
        server_flops=spec.server.flops,
        total_hz=spec.channel.total_hz,
        server_snr=_ratio(spec.channel.server_snr_db),
        rounds=spec.rounds,
    )


def widened(system: System, total_hz: float) -> System:
    """The same devices with another bandwidth, of which each may have the same part."""
    factor = total_hz / system.total_hz
    devices = tuple(replace(one, most_hz=one.most_hz * factor) for one in system.devices)
    return replace(system, total_hz=total_hz, devices=devices)


def channel(spec: Experiment, number: int) -> Reals:
    """Signal-to-noise ratios of the devices' uplinks in round `number`, float64 [N]."""
    drawn = rng.stream(spec.seed, "channel", number).normal(0, 1, spec.devices.count)
    return np.asarray(_ratio(spec.channel.snr_db + spec.channel.spread_db * drawn))


def problem_of(spec: Experiment, system: System, folder: Path) -> Problem:
    """P1 of a file in `folder`. Raises ConfigError, DataError."""
    surface = _surface(spec.accuracy, folder)
    own = spec.bounds
    measured = [point[:2] for point in surface.points]
    _refuse_beyond("bounds.rho", own.rho, [rho for rho, _ in measured])
    _refuse_beyond("bounds.levels", own.levels, [levels for _, levels in measured])
    if spec.paper is not None:
        _refuse_beyond("paper.rho", [spec.paper.rho], [rho for rho, _ in measured])
        _refuse_beyond("paper.levels", [spec.paper.levels], [levels for _, levels in measured])
    return Problem(
        system=system,
        snr=np.full(spec.devices.count, _ratio(spec.channel.snr_db)),
        surface=surface,
        least_accuracy=surface.reference - spec.accuracy.loss,
        bounds=Bounds(own.rho, own.levels, own.blocks),
    )


def _surface(part: AccuracyPart, folder: Path) -> Surface:
    if part.surface is None:
        assert part.reference is not None
        return surfaces.fit(part.points, part.reference, "the file's points", "")
    path = folder / part.surface
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f"the accuracy surface {path} cannot be read",
            got=getattr(error, "strerror", None) or str(error),
            allowed="a file that scripts/measure_surface.py wrote",
            remedy="measure it in a quarter of an hour: python scripts/measure_surface.py"
            " --data MRPC_FOLDER --model MINILM_FOLDER; or give `accuracy.points` and"
            " `accuracy.reference` instead",
        ) from error
    return surfaces.read(data, str(path))


def _refuse_beyond(key: str, wanted: Sequence[float], measured: Sequence[float]) -> None:
    """A polynomial says nothing of what is outside of its points."""
    least, most = min(measured), max(measured)
    if min(wanted) < least or max(wanted) > most:
        got = ", ".join(f"{one:g}" for one in wanted)
        allowed = f"within {least:g} to {most:g}, where the accuracy was measured"
        raise bad(key, got, allowed, "keep within that, or measure more points")


def _ratio(decibels: Any) -> Any:
    return 10 ** (decibels / 10)
