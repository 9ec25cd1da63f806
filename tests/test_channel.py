"""planning.channel, .power and .subchannels: path loss, rates, and the best use of one link."""

from __future__ import annotations

import itertools

import cvxpy
import numpy as np
import pytest

from splitfrozen import rng
from splitfrozen.errors import PlanError
from splitfrozen.planning import channel
from splitfrozen.planning.channel import Allocation, Link, Owners, rates, shared_out, uniform
from splitfrozen.planning.power import (
    Upload,
    by_bisection,
    by_convex,
    earliest_end,
    end_s,
    least_density,
)
from splitfrozen.planning.subchannels import VALUES, _with_one_more, best, greedy, improve

NOISE = channel.watts(-174)


def upload(
    number: int, clients: int = 3, subchannels: int = 6, *, rayleigh: bool = True
) -> tuple[Upload, Owners]:
    """A drawn upload, over narrow or wide bands and at low or high power, and drawn owners."""
    random = rng.stream(number, "upload")
    distance = np.hypot(*(channel.positions(clients, 20, random) - [100.0, 0.0]).T)
    gamma = channel.path_gains(distance, subchannels, 8, random, rayleigh=rayleigh)
    link = Link(
        gain=160 * gamma / NOISE,
        subchannel_hz=5e5 * 10 ** random.uniform(-1, 2) / subchannels,
        client_w=channel.watts(41.76) * 10 ** random.uniform(-6, 0.5),
        total_w=channel.watts(46.99) * 10 ** random.uniform(-6, 0.5),
    )
    start = 10 ** random.uniform(-1, 1) * random.uniform(1, 2, clients)
    return Upload(link, start, 2e8), shared_out(link, random)


def spent(link: Link, use: Allocation) -> np.ndarray:
    """Watts of each client."""
    return link.subchannel_hz * np.bincount(use.owner, use.psd, link.clients)


# --- the channel -----------------------------------------------------------------------------


def test_units_and_path_loss_by_hand() -> None:
    assert channel.watts(41.76) == pytest.approx(15, rel=1e-3)
    assert channel.watts(46.99) == pytest.approx(50, rel=1e-3)
    at = np.array([1000.0, 100.0, 100.0])
    loss = -10 * np.log10(channel.path_gain(at, np.array([0.0, 0.0, 8.0])))
    assert loss == pytest.approx([128.1, 90.5, 82.5])


def test_a_client_on_top_of_a_server_does_not_amplify() -> None:
    [gain] = channel.path_gain(np.array([0.0]), np.array([0.0]))
    assert 0 < gain < 1


def test_positions_fill_the_disc_evenly() -> None:
    radius = np.hypot(*channel.positions(20_000, 20, rng.stream(0, "x")).T)
    assert radius.max() <= 20
    assert np.mean(radius < 10) == pytest.approx(0.25, abs=0.02)


def test_shadowing_is_a_client_s_and_fading_a_subchannel_s() -> None:
    distance = np.full(4000, 100.0)
    flat = channel.path_gains(distance, 2, 8, rng.stream(0, "g"), rayleigh=False)
    assert np.all(flat[:, 0] == flat[:, 1])
    assert np.std(10 * np.log10(flat[:, 0])) == pytest.approx(8, rel=0.05)
    faded = channel.path_gains(distance, 50, 0, rng.stream(0, "g"), rayleigh=True)
    assert np.mean(faded) / channel.path_gain(distance, np.zeros(4000))[0] == pytest.approx(1, 0.02)
    assert np.std(faded) > 0.9 * np.mean(faded)


def test_rates_by_hand() -> None:
    link = Link(np.array([[1.0, 3.0, 7.0], [1.0, 1.0, 1.0]]), 10.0, 1e9, 1e9)
    use = Allocation(np.array([0, 0, 1]), np.array([1.0, 1.0, 3.0]))
    assert rates(link, use) == pytest.approx([10 * (1 + 2), 10 * 2])


def test_uniform_density_reaches_the_first_limit() -> None:
    owner = np.array([0, 0, 0, 1])
    for client_w, total_w in ((3.0, 1e9), (1e9, 4.0)):
        link = Link(np.ones((2, 4)), 2.0, client_w, total_w)
        watts = spent(link, uniform(link, owner))
        assert watts == pytest.approx([3.0, 1.0])


def test_shared_out_is_as_even_as_it_can_be() -> None:
    link = Link(np.ones((3, 8)), 1.0, 1.0, 1.0)
    drawn = [shared_out(link, rng.stream(0, n)) for n in range(20)]
    assert all(sorted(np.bincount(owner)) == [2, 3, 3] for owner in drawn)
    assert len({tuple(owner) for owner in drawn}) > 10


# --- power -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(30))
def test_the_two_solvers_agree_and_keep_the_limits(number: int) -> None:
    task, owner = upload(number, *((3, 6), (5, 20), (1, 4))[number % 3], rayleigh=number % 2 == 0)
    exact, convex = by_bisection(task, owner), by_convex(task, owner)
    assert end_s(task, convex) == pytest.approx(end_s(task, exact), rel=1e-8)
    assert end_s(task, exact) <= end_s(task, uniform(task.link, owner)) * (1 + 1e-12)
    for use in (exact, convex):
        watts = spent(task.link, use)
        assert np.all(use.psd >= 0)
        assert watts.max() <= task.link.client_w * (1 + 1e-9)
        assert watts.sum() <= task.link.total_w * (1 + 1e-9)


def test_both_limits_bind_somewhere() -> None:
    binding = set()
    for number in range(30):
        task, owner = upload(number)
        watts = spent(task.link, by_bisection(task, owner))
        binding.add("client" if watts.max() > 0.999999 * task.link.client_w else "total")
    assert binding == {"client", "total"}


@pytest.mark.parametrize("number", range(6))
def test_power_against_cvxpy(number: int) -> None:
    """Problem 25 as an exponential-cone programme, in the units of this instance."""
    task, owner = upload(number)
    link, floors = task.link, 1 / task.link.gain[owner, np.arange(6)]
    exact = end_s(task, by_bisection(task, owner))
    theta, late = cvxpy.Variable(6, nonneg=True), cvxpy.Variable()
    limits = []
    for mine, limit in (
        *((np.flatnonzero(owner == client), link.client_w) for client in range(3)),
        (np.arange(6), link.total_w),
    ):
        room = limit / link.subchannel_hz + floors[mine].sum()
        heights = np.log(2) * theta[mine] + np.log(floors[mine] / room)
        limits.append(cvxpy.sum(cvxpy.exp(heights)) <= 1)
    for client in range(3):
        share = task.bits / link.subchannel_hz / exact
        rate = cvxpy.sum(theta[np.flatnonzero(owner == client)])
        limits.append(task.start_s[client] / exact + share * cvxpy.inv_pos(rate) <= late)
    problem = cvxpy.Problem(cvxpy.Minimize(late), limits)
    problem.solve(solver="CLARABEL")
    assert problem.status == "optimal"
    assert late.value == pytest.approx(1.0, abs=1e-6)


def test_clients_that_are_early_save_power() -> None:
    link = Link(np.full((2, 2), 1e6), 1e3, 1e-3, 1.0)
    task = Upload(link, np.array([0.0, 5.0]), 1e4)
    watts = spent(link, by_bisection(task, np.array([0, 1])))
    assert watts[1] == pytest.approx(link.client_w)
    assert 0 < watts[0] < 0.7 * link.client_w


def test_a_weak_subchannel_stays_silent_at_low_power() -> None:
    gain = np.array([[1e6, 1.0]])
    for client_w, silent in ((1e-3, True), (1e5, False)):
        link = Link(gain, 1e3, client_w, client_w)
        use = by_bisection(Upload(link, np.zeros(1), 1e4), np.array([0, 0]))
        assert (use.psd[1] == 0) == silent


@pytest.mark.parametrize("number", range(10))
def test_more_of_anything_is_never_slower(number: int) -> None:
    task, owner = upload(number)
    link, end = task.link, float(earliest_end(task, owner))
    for more in (
        Link(link.gain * 2, link.subchannel_hz, link.client_w, link.total_w),
        Link(link.gain, link.subchannel_hz * 2, link.client_w, link.total_w),
        Link(link.gain, link.subchannel_hz, link.client_w * 2, link.total_w * 2),
    ):
        assert float(earliest_end(Upload(more, task.start_s, task.bits), owner)) < end
    assert float(earliest_end(Upload(link, task.start_s, 2 * task.bits), owner)) > end


def test_many_assignments_at_once_are_as_one_by_one() -> None:
    task, _ = upload(3)
    owners = np.array(list(itertools.permutations([0, 1, 2, 0, 1, 2])))[:40]
    together = earliest_end(task, owners)
    assert together == pytest.approx([float(earliest_end(task, owner)) for owner in owners], 1e-11)
    assert together[7] == pytest.approx(end_s(task, by_bisection(task, owners[7])), rel=1e-11)


# --- subchannels -----------------------------------------------------------------------------


def test_greedy_by_hand() -> None:
    """Client 1 starts late, so it takes its best subchannel first, and then the first that is
    left; client 0 takes its own best of the others."""
    gain = np.array([[4.0, 9.0, 2.0], [3.0, 8.0, 1.0]])
    link = Link(gain, 1.0, 1e9, 3e3)
    assert greedy(Upload(link, np.array([0.0, 9.0]), 10.0)).tolist() == [0, 1, 1]


def test_greedy_counts_on_no_more_power_than_clients_have() -> None:
    """C4 binds: what all may have together (C5) says nothing of who is late."""
    differs = 0
    for number in range(8):
        task, _ = upload(number, 4, 12)
        weak = Link(task.link.gain, task.link.subchannel_hz, 1e-9, 4e-9)
        loose = Link(task.link.gain, task.link.subchannel_hz, 1e-9, 1e3)
        owner = greedy(Upload(weak, task.start_s, task.bits))
        assert owner.tolist() == greedy(Upload(loose, task.start_s, task.bits)).tolist()
        strong = Link(task.link.gain, task.link.subchannel_hz, 1e3, 1e3)
        differs += owner.tolist() != greedy(Upload(strong, task.start_s, task.bits)).tolist()
    assert differs


@pytest.mark.parametrize("number", range(6))
def test_local_search_ends_where_uploads_are_lost_in_rounding(number: int) -> None:
    """They take 1e-16 to 1e-11 of the time: what looks better need not be."""
    task, owner = upload(number, 4, 12)
    late = Upload(task.link, task.start_s * 10 ** (10.0 + number), task.bits)
    found = improve(late, owner)
    assert earliest_end(late, found) <= earliest_end(late, owner)
    watts = spent(task.link, by_bisection(late, found))
    assert watts.max() <= task.link.client_w * (1 + 1e-9)
    assert watts.sum() <= task.link.total_w * (1 + 1e-9)


def test_many_subchannels_are_looked_at_in_parts() -> None:
    random = rng.stream(0, "floors")
    floors = np.sort(random.exponential(size=(3, 400)))
    more, need = random.exponential(size=(3, 6000)), np.array([1.0, 20.0, 300.0])
    assert more.size * 401 > VALUES
    found = _with_one_more(floors, more, need)
    for row, column in ((0, 0), (1, 17), (2, 5999)):
        both = np.sort(np.append(floors[row], more[row, column]))
        assert found[row, column] == pytest.approx(float(least_density(both, need[row])))


@pytest.mark.parametrize("number", range(12))
def test_local_search_finds_the_best_assignment_or_nearly(number: int) -> None:
    task, drawn = upload(number, rayleigh=number % 3 > 0)
    owner, end = best(task)
    assert end == pytest.approx(float(earliest_end(task, owner)))
    first, found = (float(earliest_end(task, one)) for one in (drawn, improve(task, drawn)))
    assert end * (1 - 1e-9) <= found <= first
    assert min(found, float(earliest_end(task, improve(task, greedy(task))))) <= 1.02 * end


def test_local_search_improves_on_greedy() -> None:
    ratios = []
    for number in range(12):
        task, _ = upload(number, 6, 14)
        owner = greedy(task)
        assert set(owner.tolist()) == set(range(6))
        ratios.append(float(earliest_end(task, improve(task, owner)) / earliest_end(task, owner)))
    assert max(ratios) <= 1
    assert min(ratios) < 0.98


def test_no_assignment_is_missed_by_best() -> None:
    task, _ = upload(5, 2, 5)
    every = [np.array(o) for o in itertools.product(range(2), repeat=5) if len(set(o)) == 2]
    ends = [float(earliest_end(task, owner)) for owner in every]
    assert best(task)[1] == pytest.approx(min(ends), rel=1e-11)


@pytest.mark.parametrize("solver", [greedy, best])
def test_too_few_subchannels_are_refused(solver: object) -> None:
    task, _ = upload(0, 5, 4)
    assert callable(solver)
    with pytest.raises(PlanError, match=r"C1 and C2.*4 subchannels for 5 clients.*link 5 sub"):
        solver(task)
