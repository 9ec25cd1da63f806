"""Which floating-point format the server computes in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""What torch calls the instructions of x86 and ARM that multiply bfloat16."""


def resolve(precision: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """Return the format; "auto" takes bfloat16 where `device` multiplies it natively."""
    wanted = native_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    return torch.bfloat16 if wanted else torch.float32


def native_bfloat16(device: torch.device) -> bool:
    """Say whether `device` multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and has_native_bfloat16(_cpu_capabilities())


def has_native_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Say so from a CPU's capability flags, as `torch.cpu.get_capabilities` names them."""
    return any(capabilities.get(name, False) for name in _NATIVE_BFLOAT16)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Compute in `dtype` where torch deems it safe; parameters keep their own format."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def _cpu_capabilities() -> Mapping[str, Any]:
    # Newer than the oldest torch that is supported; without it float32 is the safe answer.
    get = getattr(torch.cpu, "get_capabilities", dict)
    capabilities: Mapping[str, Any] = get()
    return capabilities
