"""Whether a kernel's declaration can be one, checked when the kernel is registered.

What a plugin declares is read at every choice, for every caller. A size where a set is meant would raise there, in a
call that has nothing to do with the plugin; so it is said here, once, and costs the plugin.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch

from .bias import AttnBias
from .capabilities import Backward, Capabilities
from .cost import Cost
from .errors import DeclarationError, InputError
from .kernel import Kernel

FLAGS = tuple(field.name for field in fields(Capabilities) if field.default is False)
FLAGS_OF_BACKWARD = tuple(field.name for field in fields(Backward) if field.default is False)


def check_declaration(kernel: Kernel) -> None:
    """Raises DeclarationError with every field that does not hold what it must."""
    wrong: list[str] = []
    for capabilities in kernel.declarations:
        wrong += _wrong_in_capabilities(capabilities)
        if isinstance(capabilities.backward, Backward):
            wrong += [f"backward.{reason}" for reason in _wrong_in_backward(capabilities.backward)]
    wrong += _wrong_in_kernel(kernel)
    if wrong:
        lines = "".join(f"\n  {reason}" for reason in dict.fromkeys(wrong))
        raise DeclarationError(f"kernel {kernel.name!r} declares what cannot be:{lines}")


def _wrong_in_capabilities(given: Any) -> list[str]:
    wrong = _wrong_members("devices", given.devices, str, 'device types, such as {"cpu"}')
    wrong += _wrong_members("dtypes", given.dtypes, torch.dtype, "dtypes, such as {torch.float16}")
    wrong += _wrong_sizes("head_dims", given.head_dims)
    if given.head_dims_v is not None:
        wrong += _wrong_sizes("head_dims_v", given.head_dims_v)
    wrong += _wrong_biases(given.biases)
    if given.backward is not None and not isinstance(given.backward, Backward):
        wrong.append(f"backward: must be Backward, True, False or None, got {given.backward!r}")
    wrong += _wrong_flags(given, FLAGS)
    low, high = given.min_compute_capability, given.max_compute_capability
    wrong += _wrong_compute_capability("min_compute_capability", low)
    wrong += _wrong_compute_capability("max_compute_capability", high)
    if not wrong and low is not None and high is not None and low > high:
        wrong.append(f"max_compute_capability: must not lie below min_compute_capability {low}, got {high}")
    return wrong


def _wrong_in_backward(given: Any) -> list[str]:
    wrong = []
    if given.dtypes is not None:
        wrong += _wrong_members("dtypes", given.dtypes, torch.dtype, "dtypes, such as {torch.float16}")
    if given.head_dims is not None:
        wrong += _wrong_sizes("head_dims", given.head_dims)
    if given.head_dims_v is not None:
        wrong += _wrong_sizes("head_dims_v", given.head_dims_v, may_be_empty=True)
    if given.biases is not None:
        wrong += _wrong_biases(given.biases)
    if given.gqa is not None and not isinstance(given.gqa, bool):
        wrong.append(f"gqa: must be True, False or None, got {given.gqa!r}")
    wrong += _wrong_flags(given, FLAGS_OF_BACKWARD)
    return wrong + _wrong_compute_capability("min_compute_capability", given.min_compute_capability)


def _wrong_in_kernel(given: Any) -> list[str]:
    wrong = [
        f"{name}: must be a function or None, got {getattr(given, name)!r}"
        for name in ("refuse", "probe", "work", "prepare")
        if getattr(given, name) is not None and not callable(getattr(given, name))
    ]
    costs = given.costs
    if not isinstance(costs, Mapping) or not all(isinstance(cost, Cost) for cost in costs.values()):
        wrong.append(f'costs: must be device type -> Cost, such as {{"cuda": Cost(call=1e-5)}}, got {costs!r}')
    skips = given.skips
    if isinstance(skips, str) or not isinstance(skips, Collection) or not all(map(_is_kind, skips)):
        wrong.append(f"skips: must hold kinds of AttnBias, got {skips!r}")
    return wrong + _wrong_flags(given, ("calls_sdpa",))


def _wrong_members(name: str, given: Any, kind: type, what: str) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Collection) or not given:
        return [f"{name}: must be a set of {what}, got {given!r}"]
    return [f"{name}: must hold {what}, got {member!r}" for member in given if not isinstance(member, kind)]


def _wrong_sizes(name: str, given: Any, *, may_be_empty: bool = False) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Collection) or not (given or may_be_empty):
        return [f"{name}: must be a range or a set of sizes, got {given!r}"]
    ends: Any = (given[0], given[-1]) if isinstance(given, range) and given else given
    return [
        f"{name}: must hold sizes of 1 and more, got {size!r}" for size in ends if type(size) is not int or size < 1
    ]


def _wrong_biases(given: Any) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Collection):
        return [f"biases: must be a set of kinds or values of AttnBias, got {given!r}"]
    return [f"biases: {reason}" for bias in given if (reason := _wrong_bias(bias)) is not None]


def _wrong_bias(given: Any) -> str | None:
    if _is_kind(given):
        return None
    if not isinstance(given, AttnBias):
        return f"must hold kinds or values of AttnBias, got {given!r}"
    if given.holds_data or given.lengths is not None:
        return f"a value must be written without lengths and data, got {given!r}; name its kind"
    try:
        given.bind(2, 3)
    except InputError as error:
        return f"a value must be one at every length; {error}"
    return None


def _is_kind(given: Any) -> bool:
    return isinstance(given, type) and issubclass(given, AttnBias)


def _wrong_flags(given: Any, names: tuple[str, ...]) -> list[str]:
    return [
        f"{name}: must be True or False, got {getattr(given, name)!r}"
        for name in names
        if not isinstance(getattr(given, name), bool)
    ]


def _wrong_compute_capability(name: str, given: Any) -> list[str]:
    if given is None or (isinstance(given, tuple) and len(given) == 2 and all(type(n) is int for n in given)):
        return []
    return [f"{name}: must be two numbers, such as (8, 0), or None, got {given!r}"]
