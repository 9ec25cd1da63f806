"""Copies of some of a model's parameters, one for each device, averaged at the end of a round.

There is one model. Of the copies one at a time is in it: entering a device swaps the parameters
themselves, no tensor is copied, so a device costs the memory of its adapters and their moments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from splitfrozen.errors import StoreError
from splitfrozen.training.optimise import Optimiser

_TRAINED = "trained"
_BEHIND = "behind"

Sent = Callable[[str, str, str, int], None]
"""Is told of what crosses the network: source, target, phase, bytes."""


def to_nobody(_source: str, _target: str, _phase: str, _bytes: int) -> None:
    """For what stays where it is."""


class Replicas:
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629) over parameters of one model.

    A device's optimiser keeps its moments from round to round, so with one device nothing differs
    from training in one place. Outside of `enter` the model holds the global parameters: those that
    the last average gave.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Collection[str],
        devices: Sequence[str],
        optimise: Callable[[Mapping[str, nn.Parameter]], Optimiser],
        hub: str,
        sent: Sent = to_nobody,
    ) -> None:
        """Give every device a copy of what the model has now.

        Args:
            model: holds the parameters.
            names: of the parameters, as in `model.named_parameters()`.
            devices: ids.
            optimise: makes the optimiser of a copy.
            hub: the party that averages.
            sent: is told of the copies on their way there and back.
        """
        self._slots = {name: _slot(model, name) for name in names}
        self._global = {name: model.get_parameter(name) for name in names}
        self._optimisers = {device: optimise(self._copy()) for device in sorted(devices)}
        self._trained = dict.fromkeys(self._optimisers, 0)
        self._behind: set[str] = set()
        """Devices that have not fetched the last average, as they had nothing to train on."""
        self._hub = hub
        self._sent = sent

    def enter(self, device: str, samples: int) -> Optimiser:
        """Put a device's parameters into the model, where they train on so many samples."""
        if device in self._behind:
            self._behind.remove(device)
            self._sent(self._hub, device, "adapter", self._bytes)
        optimiser = self._optimisers[device]
        self._place(optimiser.parameters)
        self._trained[device] += samples
        return optimiser

    def leave(self) -> None:
        """Put the global parameters back."""
        self._place(self._global)

    def average(self) -> None:
        """End a round: all devices that trained in it send their copies, and get the average.

        It is weighted by the samples that they trained on. The others keep out of it, and get it
        before they train again.
        """
        taking_part = [device for device, samples in self._trained.items() if samples]
        total = sum(self._trained.values())
        with torch.no_grad():
            for name, target in self._global.items():
                mean = torch.zeros_like(target, dtype=torch.float64)
                for device in taking_part:
                    value = self._optimisers[device].parameters[name]
                    mean += value.double() * (self._trained[device] / total)
                target.copy_(mean)
                for optimiser in self._optimisers.values():
                    optimiser.parameters[name].copy_(target)
        for device in taking_part:
            self._sent(device, self._hub, "adapter", self._bytes)
            self._sent(self._hub, device, "adapter", self._bytes)
        self._behind = self._optimisers.keys() - taking_part
        self._trained = dict.fromkeys(self._trained, 0)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, by name."""
        tensors: dict[str, torch.Tensor] = {}
        tensors |= {f"global.{name}": value for name, value in self._global.items()}
        for device, optimiser in self._optimisers.items():
            tensors |= {f"{device}.{name}": value for name, value in optimiser.state().items()}
            tensors[f"{device}.{_TRAINED}"] = torch.tensor(self._trained[device])
            tensors[f"{device}.{_BEHIND}"] = torch.tensor(device in self._behind)
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` gave. Raises StoreError on any other names or shapes."""
        rest = dict(tensors)
        for device, optimiser in self._optimisers.items():
            own = {name: rest.pop(name) for name in list(rest) if name.startswith(f"{device}.")}
            own = {name.removeprefix(f"{device}."): value for name, value in own.items()}
            # Of a device that the checkpoint does not know, `load_state` says so.
            self._trained[device] = int(own.pop(_TRAINED, torch.tensor(0)))
            (self._behind.add if own.pop(_BEHIND, None) else self._behind.discard)(device)
            optimiser.load_state(own)
        wanted = {f"global.{name}" for name in self._global}
        if rest.keys() != wanted:
            raise StoreError(
                "the checkpoint does not fit the devices' adapters",
                got=", ".join(sorted(rest.keys() ^ wanted)),
                allowed="the devices and adapters of this run",
                remedy="continue with the devices, model and [lora] that the run began with",
            )
        with torch.no_grad():
            for name, value in self._global.items():
                value.copy_(rest[f"global.{name}"])

    @property
    def _bytes(self) -> int:
        """Of one copy."""
        return sum(value.numel() * value.element_size() for value in self._global.values())

    def _copy(self) -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(value.detach().clone()) for name, value in self._global.items()}

    def _place(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            module, attribute = self._slots[name]
            module._parameters[attribute] = parameter


def _slot(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
