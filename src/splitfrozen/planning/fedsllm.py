"""FedsLLM: subchannels, transmit power, split and LoRA rank for the least training time.

Problem 18 of the FedsLLM paper (arXiv 2504.14667). A local step is, in turn, forward passes and
uploads of all clients, the server's forward and backward pass over all of them, and the clients'
backward passes; a global round is `local_steps` of these and the upload of the clients' adapters,
and E(r) rounds reach the target with LoRA of rank r:

    E(r) (I (max_k (T_k^F + T_k^s) + T_s^F + T_s^B + max_k T_k^B) + max_k T_k^f)        (16, 17)

    C1, C2  every subchannel of the link to the main and to the federated server has one client
    C3      one split of those allowed          C6  no negative power
    C4, C5  power of a client, and of all       C7  a rank of those allowed, which are whole

`descend` is Algorithm 3, block-coordinate descent. Power, one of the paper's four blocks, is part
of each of the others here: subchannels, a split or a rank are judged by what the best power makes
of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from splitfrozen.planning.channel import Allocation, Doubles, Link, Owners, uniform
from splitfrozen.planning.power import Upload, by_bisection, end_s
from splitfrozen.planning.subchannels import best, greedy, improve

BACKWARD = 2.0
"""A backward pass costs so many forward passes; section VII-A."""

Block = Literal["links", "split", "rank"]
BLOCKS: tuple[Block, ...] = ("links", "split", "rank")

SETTLED = 1e-9
"""The descent ends with a pass that saves less than this part of the time."""
KEPT = 1e-9
"""Part of a limit by which rounding may exceed it."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What one sample costs at one split. FLOP are those of a forward pass.

    Attributes:
        client_flops, server_flops: Phi, without LoRA.
        client_lora_flops, server_lora_flops: Delta Phi, for each rank.
        activation_bits: Gamma, of the activations at the split.
        adapter_bits: Delta Theta, of the client's LoRA for each rank; not a sample's but all there
            is.
    """

    client_flops: float
    client_lora_flops: float
    server_flops: float
    server_lora_flops: float
    activation_bits: float
    adapter_bits: float


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that is given.

    Attributes:
        client_flops: f_k / kappa_k, FLOP/s [K].
        server_flops: f_s / kappa_s, FLOP/s.
        batch: B, samples of a client in a local step.
        local_steps: I.
        workloads: by split, the splits that are allowed.
        rounds: E(r) by rank, the ranks that are allowed.
        main, federated: the links.
    """

    client_flops: Doubles
    server_flops: float
    batch: int
    local_steps: int
    workloads: Mapping[int, Workload]
    rounds: Mapping[int, float]
    main: Link
    federated: Link


@dataclass(frozen=True, slots=True)
class Plan:
    """What is decided.

    Attributes:
        split: mu, blocks on the client.
        rank: r.
        main, federated: how the links are used.
    """

    split: int
    rank: int
    main: Allocation
    federated: Allocation


# --- how long it takes -----------------------------------------------------------------------


def forward_s(problem: Problem, split: int, rank: int) -> Doubles:
    """T_k^F [K]: equation 8."""
    work = problem.workloads[split]
    flops = work.client_flops + rank * work.client_lora_flops
    return problem.batch * flops / problem.client_flops


def server_s(problem: Problem, split: int, rank: int) -> float:
    """T_s^F + T_s^B, over the samples of all clients: equations 11 and 12."""
    work = problem.workloads[split]
    flops = work.server_flops + rank * work.server_lora_flops
    samples = len(problem.client_flops) * problem.batch
    return (1 + BACKWARD) * samples * flops / problem.server_flops


def activations(problem: Problem, split: int, rank: int) -> Upload:
    """What goes to the main server in a local step: equation 10."""
    bits = problem.batch * problem.workloads[split].activation_bits
    return Upload(problem.main, forward_s(problem, split, rank), bits)


def adapters(problem: Problem, split: int, rank: int) -> Upload:
    """What goes to the federated server after a round: equation 15."""
    start = np.zeros_like(problem.client_flops)
    return Upload(problem.federated, start, rank * problem.workloads[split].adapter_bits)


def time_s(problem: Problem, plan: Plan) -> float:
    """The whole training: equation 17."""
    return _time(
        problem,
        plan.split,
        plan.rank,
        end_s(activations(problem, plan.split, plan.rank), plan.main),
        end_s(adapters(problem, plan.split, plan.rank), plan.federated),
    )


def _time(problem: Problem, split: int, rank: int, uploaded_s: float, adapted_s: float) -> float:
    """Equations 16 and 17 for given ends of the two uploads."""
    backward = BACKWARD * float(forward_s(problem, split, rank).max())  # Equation 13.
    local = uploaded_s + server_s(problem, split, rank) + backward
    return problem.rounds[rank] * (problem.local_steps * local + adapted_s)


# --- constraints -----------------------------------------------------------------------------


def violated(problem: Problem, plan: Plan) -> str | None:
    """The first constraint that a plan breaks, by name and how; None where it keeps them all."""
    for name, link, use in (
        ("C1", problem.main, plan.main),
        ("C2", problem.federated, plan.federated),
    ):
        if len(use.owner) != link.subchannels or len(use.psd) != link.subchannels:
            return f"{name}: {len(use.owner)} subchannels are given out, of {link.subchannels}"
        strays = np.flatnonzero((use.owner < 0) | (use.owner >= link.clients))
        if len(strays):
            return f"{name}: subchannel {strays[0]} belongs to no client"
    if plan.split not in problem.workloads:
        return f"C3: {plan.split} is none of the splits {sorted(problem.workloads)}"
    for name, link, use in (
        ("main", problem.main, plan.main),
        ("federated", problem.federated, plan.federated),
    ):
        broken = _broken_power(link, use)
        if broken:
            return f"{broken} to the {name} server"
    if plan.rank not in problem.rounds:
        return f"C7: {plan.rank} is none of the ranks {sorted(problem.rounds)}"
    return None


def _broken_power(link: Link, use: Allocation) -> str | None:
    watts = link.subchannel_hz * np.bincount(use.owner, use.psd, link.clients)
    loudest = int(np.argmax(watts))
    if watts[loudest] > link.client_w * (1 + KEPT):
        return f"C4: client {loudest} sends {watts[loudest]:.6g} W of {link.client_w:.6g} W"
    if watts.sum() > link.total_w * (1 + KEPT):
        return f"C5: all clients send {watts.sum():.6g} W of {link.total_w:.6g} W"
    if not np.all(use.psd >= 0):
        return f"C6: subchannel {int(np.argmin(use.psd))} has a negative density"
    return None


# --- solvers ---------------------------------------------------------------------------------


def evenly(problem: Problem, owners: tuple[Owners, Owners], split: int, rank: int) -> Plan:
    """A plan with one density on all subchannels of the two links."""
    main, federated = owners
    return Plan(split, rank, uniform(problem.main, main), uniform(problem.federated, federated))


def solve(problem: Problem, *, search: bool = True) -> Plan:
    """A good plan: the descent from subchannels given out in turn.

    Args:
        search: as in `descend`.

    Raises:
        PlanError: a link has fewer subchannels than clients.
    """
    main, federated = (
        np.arange(link.subchannels) % link.clients for link in (problem.main, problem.federated)
    )
    start = evenly(problem, (main, federated), min(problem.workloads), min(problem.rounds))
    return descend(problem, start, search=search)


def descend(
    problem: Problem, start: Plan, free: Collection[Block] = BLOCKS, *, search: bool = True
) -> Plan:
    """Algorithm 3: from `start`, choose anew what is `free`, block by block, while that helps.

    A descent may come to rest at a split or a rank only because the rest was fitted to it. So where
    these are free there are several, from their least and their greatest, and the best one counts.

    Args:
        search: by local search, from the subchannels of Algorithm 2 and from those at hand;
            without, subchannels are always Algorithm 2's, the paper's.

    Raises:
        PlanError: a link has fewer subchannels than clients.
    """
    if "links" in free:
        # Once is enough: all send equally much at once, so the best use of this link is the same
        # for every split and rank.
        upload = adapters(problem, start.split, start.rank)
        start = replace(start, federated=_choose(upload, start.federated, search=search))
    splits = {min(problem.workloads), max(problem.workloads)} if "split" in free else {start.split}
    ranks = {min(problem.rounds), max(problem.rounds)} if "rank" in free else {start.rank}
    starts = [
        replace(start, split=split, rank=rank)
        for split, rank in itertools.product(sorted(splits), sorted(ranks))
    ]
    return _least(problem, [_descend(problem, one, free, search=search) for one in starts])


def _descend(problem: Problem, start: Plan, free: Collection[Block], *, search: bool) -> Plan:
    plan = start
    while True:
        found = _passed(problem, plan, free, search=search)
        if time_s(problem, found) >= time_s(problem, plan) * (1 - SETTLED):
            # Algorithm 2 alone may give out subchannels worse than those that the plan has.
            return _least(problem, [found, plan])
        plan = found


def _passed(problem: Problem, plan: Plan, free: Collection[Block], *, search: bool) -> Plan:
    """After each block that is free was chosen anew once."""
    if "links" in free:
        upload = activations(problem, plan.split, plan.rank)
        plan = replace(plan, main=_choose(upload, plan.main, search=search))
    if "split" in free:
        others = [replace(plan, split=split) for split in sorted(problem.workloads)]
        plan = _least(problem, [_fitted(problem, one, free) for one in others])
    if "rank" in free:
        others = [replace(plan, rank=rank) for rank in sorted(problem.rounds)]
        plan = _least(problem, [_fitted(problem, one, free) for one in others])
    return plan


def _fitted(problem: Problem, plan: Plan, free: Collection[Block]) -> Plan:
    """With the best power for its split and rank, where that may be chosen."""
    if "links" not in free:
        return plan
    upload = activations(problem, plan.split, plan.rank)
    return replace(plan, main=by_bisection(upload, plan.main.owner))


def _least(problem: Problem, plans: list[Plan]) -> Plan:
    """Exhaustive search, problems 26 and 27; the first of equals."""
    return min(plans, key=lambda plan: time_s(problem, plan))


def _choose(upload: Upload, present: Allocation, *, search: bool) -> Allocation:
    """Problems 19 and 25. With local search, from Algorithm 2's subchannels and from those at hand,
    so the result is never worse than these; without, Algorithm 2's whatever they are worth."""
    if not search:
        return by_bisection(upload, greedy(upload))
    owners = [present.owner, greedy(upload)]
    found = [by_bisection(upload, improve(upload, owner)) for owner in owners]
    return min(found, key=lambda one: end_s(upload, one))


def optimum(problem: Problem) -> Plan:
    """The best of all plans, for problems with few clients and subchannels.

    For a split and a rank the two links do not depend on each other, so each is enumerated alone;
    the federated one once, as in `descend`.
    """
    pairs = list(itertools.product(sorted(problem.workloads), sorted(problem.rounds)))
    federated, _ = best(adapters(problem, *pairs[0]))
    plans = []
    for split, rank in pairs:
        owner, _ = best(activations(problem, split, rank))
        plans.append(
            Plan(
                split,
                rank,
                by_bisection(activations(problem, split, rank), owner),
                by_bisection(adapters(problem, split, rank), federated),
            )
        )
    return _least(problem, plans)
