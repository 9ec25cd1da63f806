"""The file of `splitfrozen plan` with `system = "fedsllm"` as specs, and the cells drawn from it.

    seed, cells, rounds       of all that is drawn; cells to average over; E(r), or where it lies
    [model]    ModelPart      shape, samples, local steps, ranks
    [cell]     CellPart       who is where
    [compute]  ComputePart    what the server and a cycle do
    [link]     LinkPart       subchannels and power, the same to both servers
    [figures]  FiguresPart    what the delay is drawn over
    [small]    SmallPart      instances that are enumerated
    [large]    LargePart      an instance as large as is asked for
    [paper]    PaperPart      to print beside; optional

experiments/fedsllm.toml is an example with sources; docs/planning.md lists the keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta, structs

from splitfrozen import rng
from splitfrozen.config import Above0, Natural, Spec, Whole
from splitfrozen.errors import PlanError
from splitfrozen.model import costs
from splitfrozen.model.costs import ModelShape, Tokens
from splitfrozen.planning.channel import Doubles, Link, path_gains, positions, watts
from splitfrozen.planning.fedsllm import Problem, Workload
from splitfrozen.simulation.experiment import SHAPES
from splitfrozen.studies.plan_file import MOST, bad, refuse_unsorted, with_vocabulary

MEASURE = (
    "`python scripts/measure_rounds.py --data ../shared/data/sst2/train.jsonl --text '{text}'`"
)
"""What makes E(r), for people; the file that it writes is the one of experiments/fedsllm.toml."""
USUAL = 2.0
"""alpha / r of LoRA where a file says nothing of it."""
FAINTEST = 3e-6
"""Of a signal, over the noise: beside the 1 of log2(1 + SNR), weaker ones are lost in rounding."""
MOST_ENUMERATED = 20_000
"""Assignments of a link that are all looked at, for every split and rank of every instance."""

Several = Annotated[tuple[Above0, ...], Meta(min_length=2)]
Dbm = Annotated[float, Meta(ge=-60, le=100)]
Size = Annotated[int, Meta(ge=1, le=1000)]
Metres = Annotated[float, Meta(gt=0, le=1e5)]


class ModelPart(Spec, frozen=True):
    """`tokens`: of a sample. `batch`: B. `local_steps`: I. `ranks`: that may be chosen.
    `value_bits`: of a number that travels. `vocabulary`: of the head on the server."""

    shape: Literal["gpt2-small"]
    vocabulary: Whole
    tokens: Whole
    batch: Whole
    local_steps: Whole
    ranks: Annotated[tuple[Whole, ...], Meta(min_length=1)]
    value_bits: Whole = 32


class CellPart(Spec, frozen=True):
    """Clients lie on a disc about the federated server. `main_server_m`: from there to the main
    one. `client_hz`: f_k, the least and the most. `rayleigh`: subchannels fade apart."""

    clients: Size
    radius_m: Metres
    main_server_m: Metres
    shadowing_db: Annotated[float, Meta(ge=0, le=50)]
    client_hz: tuple[Above0, Above0]
    rayleigh: bool = False


class ComputePart(Spec, frozen=True):
    """`server_hz`: f_s. `..._flop_per_cycle`: 1 / kappa."""

    client_flop_per_cycle: Above0
    server_hz: Above0
    server_flop_per_cycle: Above0


class LinkPart(Spec, frozen=True):
    """`bandwidth_hz`: of all subchannels of one link. `main_gain`: G_c G_s; `federated_gain`:
    G_c G_f. `client_dbm`, `total_dbm`: the power limits of C4 and C5."""

    subchannels: Size
    bandwidth_hz: Above0
    noise_dbm_hz: Annotated[float, Meta(ge=-250, le=-130)]
    main_gain: Above0
    federated_gain: Above0
    client_dbm: Dbm
    total_dbm: Dbm


class FiguresPart(Spec, frozen=True):
    """Values, from the least to the most, of the keys of [link] and [compute] of the same names."""

    bandwidth_hz: Several
    client_flop_per_cycle: Several
    server_hz: Several
    client_dbm: Annotated[tuple[Dbm, ...], Meta(min_length=2)]

    def __post_init__(self) -> None:
        for key, values in structs.asdict(self).items():
            refuse_unsorted(f"figures.{key}", values)


class SmallPart(Spec, frozen=True):
    """`draws`: instances. `spread`: bandwidths, powers and speeds are drawn log-uniformly within
    this factor of where they are."""

    draws: Annotated[int, Meta(ge=1, le=10_000)]
    clients: Size
    subchannels: Size
    splits: Annotated[tuple[Whole, ...], Meta(min_length=1)]
    ranks: Annotated[tuple[Whole, ...], Meta(min_length=1)]
    spread: Annotated[float, Meta(ge=1, le=1e4)]


class LargePart(Spec, frozen=True):
    """One instance that is planned as a whole."""

    clients: Size
    subchannels: Size


class PaperPart(Spec, frozen=True):
    """`delay_saved`: against baseline a, section VII-C."""

    delay_saved: float


class Experiment(Spec, frozen=True):
    """A whole file. `rounds`: E(r) by rank, or the path of a file that holds them as `rounds`,
    from the folder of this one."""

    system: Literal["fedsllm"]
    rounds: str | dict[str, Above0]
    model: ModelPart
    cell: CellPart
    compute: ComputePart
    link: LinkPart
    figures: FiguresPart
    small: SmallPart
    large: LargePart
    paper: PaperPart | None = None
    cells: Annotated[int, Meta(ge=1, le=10_000)] = 50
    seed: Natural = 0

    def __post_init__(self) -> None:
        blocks = self.shape.blocks
        if max(self.small.splits) >= blocks:
            raise bad("small.splits", max(self.small.splits), f"1..{blocks - 1}", "lower it")
        if not set(self.small.ranks) <= set(self.model.ranks):
            known = ", ".join(map(str, self.model.ranks))
            remedy = "take the others out, or add them to model.ranks"
            raise bad("small.ranks", list(self.small.ranks), f"some of {known}", remedy)
        if self.small.clients**self.small.subchannels > MOST_ENUMERATED:
            raise bad(
                "small",
                f"{self.small.clients} clients and {self.small.subchannels} subchannels",
                f"at most {MOST_ENUMERATED} assignments",
                "take fewer of either",
            )
        if self.cell.client_hz[0] > self.cell.client_hz[1]:
            raise bad("cell.client_hz", self.cell.client_hz, "the least and the most", "swap them")

    @property
    def shape(self) -> ModelShape:
        """With its head, which the server has."""
        return with_vocabulary(SHAPES[self.model.shape](), self.model.vocabulary)


def rounds(spec: Experiment, folder: Path) -> dict[int, float]:
    """E(r) of the ranks that may be chosen; paths are from `folder`. Raises ConfigError."""
    if isinstance(spec.rounds, dict):
        return _of_ranks(spec, spec.rounds, "the file")
    path = folder / spec.rounds
    return _of_ranks(spec, _read(path).rounds, str(path))


def easier_rounds(spec: Experiment, folder: Path) -> dict[str, dict[int, float]]:
    """E(r) at easier targets, by the part of the way to the one of `rounds`, where a file of
    scripts/measure_rounds.py has them; else none. Raises ConfigError."""
    if isinstance(spec.rounds, dict):
        return {}
    path = folder / spec.rounds
    return {
        f"{way:g}": _of_ranks(spec, easier.rounds, f"`easier` {way:g} of {path}")
        for way, easier in _read(path).easier.items()
    }


def alpha_over_rank(spec: Experiment, folder: Path) -> float:
    """Of LoRA in the training that E(r) is of. Raises ConfigError."""
    return USUAL if isinstance(spec.rounds, dict) else _read(folder / spec.rounds).alpha_over_rank


def _of_ranks(spec: Experiment, given: Mapping[str, float], where: str) -> dict[int, float]:
    missing = [rank for rank in spec.model.ranks if str(rank) not in given]
    if missing:
        raise bad(
            "rounds",
            f"none for rank {missing[0]} in {where}",
            "a number of rounds for every rank of model.ranks, as in rounds = {4 = 20.5}",
            f"measure them with {MEASURE}, or leave the rank out",
        )
    return {rank: float(given[str(rank)]) for rank in sorted(spec.model.ranks)}


class _AtTarget(msgspec.Struct):
    rounds: dict[str, Annotated[float, Meta(gt=0, le=MOST)]]


class _Measured(_AtTarget):
    """What is read of the file that scripts/measure_rounds.py writes."""

    easier: dict[Annotated[float, Meta(gt=0, le=1)], _AtTarget] = msgspec.field(
        default_factory=dict
    )
    alpha_over_rank: Annotated[float, Meta(gt=0, le=MOST)] = USUAL


def _read(path: Path) -> _Measured:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Measured)
    except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
        raise bad(
            "rounds",
            f"{path}: {getattr(error, 'strerror', None) or error}",
            "the path of a file that scripts/measure_rounds.py wrote, or a table by rank",
            f"measure them with {MEASURE}, half an hour after scripts/pretrain_gsm8k.py, or write a"
            " table of all of model.ranks, as in rounds = {1 = 60, 4 = 40}",
        ) from error


# --- what is drawn ---------------------------------------------------------------------------


def workload(spec: Experiment, split: int) -> Workload:
    """What a sample costs with so many blocks on the client; LoRA on query and value (VII-A)."""
    shape, load, bits = spec.shape, Tokens.uniform(1, spec.model.tokens), spec.model.value_bits
    rest = shape.blocks - split
    adapted = ((shape.width, shape.attention),) * 2
    return Workload(
        client_flops=costs.forward_flops(shape, split, load),
        client_lora_flops=costs.lora_flops(adapted, split, load, 1),
        server_flops=costs.forward_flops(shape, rest, load) + costs.head_flops(shape, load),
        server_lora_flops=costs.lora_flops(adapted, rest, load, 1),
        activation_bits=bits * costs.activation_values(shape, load),
        adapter_bits=bits * costs.lora_parameters(adapted, split, 1),
    )


def drawn(spec: Experiment, rounds_by_rank: Mapping[int, float], number: int) -> Problem:
    """Cell `number`. Positions, shadowing and speeds depend on nothing that the figures vary.

    Raises PlanError where a signal is lost in the noise.
    """
    cell, link = spec.cell, spec.link
    random = rng.stream(spec.seed, "cell", number, cell.clients, link.subchannels)
    places = positions(cell.clients, cell.radius_m, random)
    server = np.array([cell.main_server_m, 0.0])

    def to(other: Doubles, antennas: float) -> Link:
        distance = np.hypot(*(places - other).T)
        gamma = path_gains(
            distance, link.subchannels, cell.shadowing_db, random, rayleigh=cell.rayleigh
        )
        made = Link(
            gain=antennas * gamma / watts(link.noise_dbm_hz),
            subchannel_hz=link.bandwidth_hz / link.subchannels,
            client_w=watts(link.client_dbm),
            total_w=watts(link.total_dbm),
        )
        _refuse_faint(made, number)
        return made

    return Problem(
        main=to(server, link.main_gain),
        federated=to(np.zeros(2), link.federated_gain),
        client_flops=random.uniform(*cell.client_hz, cell.clients)
        * spec.compute.client_flop_per_cycle,
        server_flops=spec.compute.server_hz * spec.compute.server_flop_per_cycle,
        batch=spec.model.batch,
        local_steps=spec.model.local_steps,
        workloads={split: workload(spec, split) for split in range(1, spec.shape.blocks)},
        rounds=rounds_by_rank,
    )


def _refuse_faint(link: Link, cell: int) -> None:
    """Every client is heard, on its best subchannel, with its part of the power of C4 and C5."""
    each_w = min(link.client_w, link.total_w / link.clients)
    heard = link.gain.max(axis=1) * each_w / link.subchannel_hz
    client = int(heard.argmin())
    if heard[client] < FAINTEST:
        lacks = math.ceil(10 * math.log10(FAINTEST / heard[client]))
        raise PlanError(
            f"C4 and C5 leave client {client} of cell {cell} lost in the noise",
            got=f"{10 * math.log10(heard[client]):.0f} dB over it at most",
            allowed=f"{10 * math.log10(FAINTEST):.0f} dB or more",
            remedy=f"raise link.client_dbm and link.total_dbm by {lacks}, or bring it nearer",
        )


def varied(spec: Experiment, key: str, value: float) -> Experiment:
    """With another value of a key of [link] or [compute]."""
    for part in ("link", "compute"):
        own = getattr(spec, part)
        if key in own.__struct_fields__:
            changed = structs.replace(own, **{key: value})
            return structs.replace(spec, **{part: changed})
    raise AssertionError(key)


def sized(spec: Experiment, clients: int, subchannels: int, *, rayleigh: bool) -> Experiment:
    """With other numbers of clients and subchannels."""
    return structs.replace(
        spec,
        cell=structs.replace(spec.cell, clients=clients, rayleigh=rayleigh),
        link=structs.replace(spec.link, subchannels=subchannels),
    )


def small_instances(
    spec: Experiment, rounds_by_rank: Mapping[int, float]
) -> Iterable[tuple[int, Problem]]:
    """Problems to enumerate, every other one with Rayleigh fading, and their numbers.

    In the setting the best split is the least and the best rank the one with the fewest rounds. So
    that there is something to choose, the server is drawn about as fast as all clients together,
    LoRA costs as much as in the setting or up to `spread` squared times that, and the number of
    rounds depends on the rank as much as in the setting, less, or not at all.
    """
    small = spec.small
    for number in range(small.draws):
        own = sized(spec, small.clients, small.subchannels, rayleigh=number % 2 == 1)
        problem = drawn(own, rounds_by_rank, number)
        random = rng.stream(spec.seed, "small", number)
        server, *links = small.spread ** random.uniform(-1, 1, 7)
        clients = problem.client_flops * small.spread ** random.uniform(-1, 1, small.clients)
        matters = random.random()
        larger = small.spread ** random.uniform(0, 2)
        yield (
            number,
            replace(
                problem,
                client_flops=clients,
                server_flops=clients.sum() * server,
                workloads={
                    split: _with_larger_lora(problem.workloads[split], larger)
                    for split in small.splits
                },
                rounds={rank: problem.rounds[rank] ** matters for rank in small.ranks},
                main=_scaled(problem.main, *links[:3]),
                federated=_scaled(problem.federated, *links[3:]),
            ),
        )


def _with_larger_lora(work: Workload, factor: float) -> Workload:
    return replace(
        work,
        client_lora_flops=work.client_lora_flops * factor,
        server_lora_flops=work.server_lora_flops * factor,
        adapter_bits=work.adapter_bits * factor,
    )


def _scaled(link: Link, band: float, client: float, total: float) -> Link:
    return replace(
        link,
        subchannel_hz=link.subchannel_hz * band,
        client_w=link.client_w * client,
        total_w=link.total_w * total,
    )


def rounds_text(given: Mapping[int, float]) -> str:
    """E(r) for people."""
    return json.dumps({rank: round(value, 2) for rank, value in given.items()})
