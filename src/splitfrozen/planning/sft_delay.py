"""The SFT paper's delay model: what a round takes and sends, for SFT and for its benchmarks.

A round is one local epoch of every device (K = 1). It broadcasts the devices' adapters; then each
device goes forward, sends activations, waits for the server and for gradients, goes backward, and
sends its adapter. All this is sequential (equation 18), devices are parallel (19), and what depends
on a device's bandwidth is in proportion to its inverse, so a round is a `bandwidth.Demand`.

The equations have B samples, of one batch; a round here has all samples of a device, as many
batches as they make. So figure 10 of the paper is reproduced (docs/planning.md), and with one batch
it would be in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitfrozen.model import costs
from splitfrozen.model.costs import FLOAT_BYTES, PAPER_TRAINING, ModelShape, Tokens
from splitfrozen.planning.bandwidth import Band, Demand, Reals

FLOAT_BITS = 8 * FLOAT_BYTES


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    Attributes:
        id: by which ties are broken.
        flops: FLOP/s, f C D of equation 12.
        memory_bytes: what blocks and their training may take.
        samples: of a round.
        most_hz: bandwidth that it may have, equation 27f.
    """

    id: str
    flops: float
    memory_bytes: float
    samples: float
    most_hz: float


@dataclass(frozen=True, slots=True)
class System:
    """Who trains what.

    Attributes:
        shape: of the model.
        tokens: N of a sample.
        batch: samples of a device's step, for its memory.
        rank: of LoRA.
        moments: of the optimiser, as in `costs.sft_optimiser_bytes`.
        devices: at least one.
        server_flops: of the whole server; in a round each device has an equal part of it.
        total_hz: bandwidth of all devices, and of the broadcast.
        server_snr: as a ratio: of all that the server sends.
        rounds: T.
    """

    shape: ModelShape
    tokens: int
    batch: int
    rank: int
    moments: int
    devices: tuple[Device, ...]
    server_flops: float
    total_hz: float
    server_snr: float
    rounds: int

    @property
    def band(self) -> Band:
        return Band(self.total_hz, np.array([one.most_hz for one in self.devices]))

    @property
    def flops(self) -> Reals:
        return np.array([one.flops for one in self.devices])

    @property
    def samples(self) -> Reals:
        return np.array([one.samples for one in self.devices], np.float64)

    @property
    def sample(self) -> Tokens:
        return Tokens.uniform(1, self.tokens)

    @property
    def down_bps_hz(self) -> float:
        """Spectral efficiency of the downlink, bit/s/Hz."""
        return float(_efficiency(self.server_snr))


# --- the delay of a round: equations 11 to 19 ----------------------------------------------------


def round_demand(system: System, blocks: int, ratio: npt.ArrayLike, snr: Reals) -> Demand:
    """A round of SFT that is not the first.

    Args:
        blocks: l, on the devices.
        ratio: beta: a number, or float64 [K] for K instances.
        snr: float64 [N], of the devices' uplinks in this round, as ratios; or [K, N].
    """
    samples = system.samples
    computing = samples * _device_flops(system, blocks) / system.flops
    # The server takes what arrives in turn, so of equation 14's f_n^s each has an equal part.
    served = samples * len(samples) * _server_flops(system, blocks) / system.server_flops
    crossing = np.asarray(ratio)[..., None] * samples * _crossing_hertz_s(system, snr)
    adapter = _adapter_bytes(system, blocks)
    fixed_s = _broadcast_s(system, adapter) + computing + served
    return Demand(fixed_s, crossing + _upload_hertz_s(adapter, snr))


def first_round_s(system: System, blocks: int) -> float:
    """What the first round takes more: the broadcast of frozen weights, equation 11."""
    return _broadcast_s(system, _frozen_bytes(system, blocks))


def federated_demand(system: System, snr: Reals) -> Demand:
    """A round of FL with LoRA: devices train the whole model, and only adapters and head travel."""
    blocks = system.shape.blocks
    head = PAPER_TRAINING * costs.head_flops(system.shape, system.sample)
    computing = system.samples * (_device_flops(system, blocks) + head) / system.flops
    adapter = _adapter_bytes(system, blocks)
    return Demand(_broadcast_s(system, adapter) + computing, _upload_hertz_s(adapter, snr))


def sequential_s(system: System, blocks: int, snr: Reals) -> Reals:
    """A round [...] of vanilla SL: devices one after the other, uncompressed, each with the whole
    server and all the bandwidth that it may have; the adapter goes from one to the next."""
    samples, adapter = system.samples, _adapter_bytes(system, blocks)
    computing = samples * _device_flops(system, blocks) / system.flops
    served = samples * _server_flops(system, blocks) / system.server_flops
    alone = Demand(
        _broadcast_s(system, adapter) + computing + served,
        samples * _crossing_hertz_s(system, snr) + _upload_hertz_s(adapter, snr),
    )
    each = alone.delays(np.minimum(system.band.most_hz, system.total_hz))
    return np.asarray(each.sum(axis=-1))


# --- bytes of all rounds and devices -------------------------------------------------------------


def split_bytes(system: System, blocks: int, ratio: float, *, sequential: bool = False) -> float:
    """What SFT sends, or SL where `sequential`: there each device is sent the adapter by itself."""
    count = len(system.devices)
    values = costs.activation_values(system.shape, system.sample) * system.samples.sum()
    adapters = ((count if sequential else 1) + count) * _adapter_bytes(system, blocks)
    each = 2 * ratio * FLOAT_BYTES * float(values) + adapters
    return _frozen_bytes(system, blocks) + system.rounds * each


def federated_bytes(system: System) -> float:
    """What FL with LoRA sends."""
    blocks = system.shape.blocks
    adapters = (1 + len(system.devices)) * _adapter_bytes(system, blocks)
    return _frozen_bytes(system, blocks) + system.rounds * adapters


# --- section V-C, of one sample ------------------------------------------------------------------


def _device_flops(system: System, blocks: int) -> float:
    """Phi_c^F + Phi_c^B: a pass back is two forward, frozen weights or not.

    Printed, both have a term of the K classes, though the head is on the server, and none of the
    embedding, which is on the device; here it is the other way about. LoRA's own FLOP, 1.5 r / D of
    the others, are left out as in the paper.
    """
    forward = costs.forward_flops(system.shape, blocks, system.sample)
    return PAPER_TRAINING * forward + costs.embedding_flops(system.shape, system.sample)


def _server_flops(system: System, blocks: int) -> float:
    """Phi_s^F + Phi_s^B; the head goes forward too, once a sample."""
    forward = costs.forward_flops(system.shape, system.shape.blocks - blocks, system.sample)
    return PAPER_TRAINING * (forward + costs.head_flops(system.shape, system.sample))


def _crossing_hertz_s(system: System, snr: Reals) -> Reals:
    """Seconds times Hz [N] of an uncompressed activation up (equation 13) and its gradient down
    (15), which is as large."""
    bits = FLOAT_BITS * costs.activation_values(system.shape, system.sample)
    return np.asarray(bits / _efficiency(snr) + bits / system.down_bps_hz)


# --- adapters and frozen weights -----------------------------------------------------------------


def _adapter_bytes(system: System, blocks: int) -> float:
    """Psi_L(l), with the head where a device has that.

    Printed as 2 l B D r, the LoRA of one square map a block, times a batch; its memory, and Psi(l),
    count 18 D r a block, six maps. So it is b l 18 D r with b bytes a parameter.
    """
    shape = system.shape
    head = costs.head_parameters(shape) if blocks == shape.blocks else 0
    return FLOAT_BYTES * (costs.adapter_parameters(shape, blocks, system.rank) + head)


def _frozen_bytes(system: System, blocks: int) -> float:
    """Psi(l) without LoRA."""
    # LoRA of rank 0 is none.
    return costs.sft_front_bytes(system.shape, blocks, system.tokens, 0)


def _upload_hertz_s(size: float, snr: Reals) -> Reals:
    """Equation 17, seconds times Hz [N]."""
    return np.asarray(8 * size / _efficiency(snr))


def _broadcast_s(system: System, size: float) -> float:
    """Equation 11."""
    return 8 * size / (system.total_hz * system.down_bps_hz)


def _efficiency(snr: npt.ArrayLike) -> Reals:
    """bit/s/Hz; log2(1 + SNR), which would be 0 where the signal is lost in the 1."""
    return np.asarray(np.log1p(snr) / np.log(2))
