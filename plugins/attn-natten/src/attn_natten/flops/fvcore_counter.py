"""fvcore, which counts multiply-accumulates (and calls them flops) in a trace of torch.jit. Not needed until asked."""

from __future__ import annotations

from typing import Any

from attn_core.integrations.missing import need

from . import unfused_in_a_trace
from .counted import macs

#: Arguments of the ops, by place: (query or value, additional keys or values, kernel_size).
OF_QK, OF_AV = (0, 2, 4), (1, 2, 3)
#: (query, value, additional keys, kernel_size)
OF_FNA = (0, 2, 4, 6)


def add_natten_handle(counter: Any) -> Any:
    """Tells an `fvcore.nn.FlopCountAnalysis` how to count this package's ops; returns it.

    counter = add_natten_handle(FlopCountAnalysis(model, x))
    macs = counter.total()
    """
    return counter.set_op_handle(
        **{
            "attn_natten::fna": lambda inputs, outputs: macs(*_read(inputs, OF_FNA)),
            "attn_natten::whole_qk": lambda inputs, outputs: unfused_in_a_trace.macs(*_read(inputs, OF_QK)),
            "attn_natten::whole_av": lambda inputs, outputs: unfused_in_a_trace.macs(*_read(inputs, OF_AV)),
        }
    )


def get_flops(model: Any, input: Any, disable_warnings: bool = False) -> int:
    """Multiply-accumulates of `model(input)` by fvcore, neighborhood attention included: half its FLOPs.

    Args:
        input: the model's input, or a tuple of its inputs.
        disable_warnings: say nothing of ops that fvcore does not count.

    Raises MissingPackageError, an ImportError, where fvcore is not installed.
    """
    fvcore: Any = need("fvcore.nn", "get_flops", "pip install 'attn-natten[flops]'")
    counter = add_natten_handle(fvcore.FlopCountAnalysis(model, input))
    if disable_warnings:
        counter = counter.unsupported_ops_warnings(False)
    return int(counter.total())


def _read(inputs: list[Any], places: tuple[int, ...]) -> list[Any]:
    """What a trace knows of arguments: the shapes of tensors, None for none, and last a list of numbers."""
    *tensors, numbers = (inputs[place] for place in places)
    return [*map(_shape, tensors), _ints(numbers)]


def _shape(value: Any) -> list[int] | None:
    """Of a tensor in the trace; None for none."""
    sizes: list[int] | None = value.type().sizes() if value.isCompleteTensor() else None
    return sizes


def _ints(value: Any) -> list[int]:
    """A list of numbers in the trace."""
    known = value.toIValue()
    return list(known) if known is not None else [each.toIValue() for each in value.node().inputs()]
