"""All methods by name. A new one is a row here and in the contract suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitfrozen.config import MethodName
from splitfrozen.methods import centralized, fedlora, fedsllm, sft, splitfrozen, splitlora
from splitfrozen.methods.bench import Bench, Built

METHODS: Mapping[MethodName, Callable[[Bench], Built]] = {
    "centralized": centralized.build,
    "fedlora": fedlora.build,
    "splitlora": splitlora.build,
    "sft": sft.build,
    "fedsllm": fedsllm.build,
    "splitfrozen": splitfrozen.build,
}


def build(bench: Bench) -> Built:
    """The method that the config names, on its model. Raises ModelError, WireError."""
    return METHODS[bench.config.method.name](bench)
