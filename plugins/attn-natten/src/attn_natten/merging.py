"""merge_attentions(): attention over all keys, from attention over parts of them; NATTEN's call of the core's merge."""

from __future__ import annotations

from collections.abc import Sequence

from attn_core import merge
from attn_core.errors import InputError, InputTypeError
from torch import Tensor

from .errors import ConstraintError
from .no_effect import say_without_effect

#: Why two arguments change nothing here.
NOT_COMPILED = "the few operations of a merge are run as they are; torch.compile around the caller fuses them"
RIGHT_ANYWAY = "gradients flow to every output and its LSE, which is right for any attention"

OUTPUT = ("batch", "seqlen", "num_heads", "head_dim")


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Joins attentions of one query to disjoint parts of the keys, as if the parts had been one.

    Args:
        outputs: two or more `[batch, seqlen, num_heads, head_dim]`, of one shape and dtype.
        lse_tensors: as many `[batch, seqlen, num_heads]`, natural log; -inf where a part has no key for a query, whose
            output then does not matter. Where no part has one, the result is 0 and its LSE -inf.
        torch_compile, use_autograd_fix: as in NATTEN; without effect here.

    Returns:
        `(output, logsumexp)`, shaped as one output and its LSE. Computed in float32 (float64 for a float64 LSE), and
        differentiable in every output and LSE; so each LSE must come from an attention that is differentiable in it,
        as all of this package are. Unlike NATTEN's autograd fix, the backward overwrites no tensor of the caller.

    Raises InputError for fewer than two parts, or another number of LSEs; ConstraintError, naming the tensor, for
    shapes, dtypes or devices that do not agree; InputTypeError for anything but floating tensors.
    """
    if not torch_compile:
        say_without_effect("merge_attentions", "torch_compile", NOT_COMPILED)
    if not use_autograd_fix:
        say_without_effect("merge_attentions", "use_autograd_fix", RIGHT_ANYWAY)
    if len(outputs) < 2:
        raise InputError(f"outputs: takes two or more tensors, got {len(outputs)}")
    if len(outputs) != len(lse_tensors):
        raise InputError(f"lse_tensors: takes one for each of the {len(outputs)} outputs, got {len(lse_tensors)}")
    _check("outputs", outputs, OUTPUT, outputs[0])
    _check("lse_tensors", lse_tensors, OUTPUT[:-1], outputs[0])
    output, lse = merge(list(outputs), [lse.transpose(1, 2) for lse in lse_tensors])
    return output, lse.transpose(1, 2)


def _check(name: str, tensors: Sequence[Tensor], dims: tuple[str, ...], like: Tensor) -> None:
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputTypeError(f"{name}[{i}]: takes a floating tensor, got {got}")
        if tensor.ndim != len(dims) or tensor.shape != like.shape[: len(dims)]:
            sizes = f", here {list(like.shape[: len(dims)])}" if like.ndim == len(OUTPUT) else ""
            raise ConstraintError(f"{name}[{i}]: must be [{', '.join(dims)}]{sizes}; got {list(tensor.shape)}")
        if tensor.dtype != tensors[0].dtype:
            raise ConstraintError(
                f"{name}[{i}]: must have the dtype of {name}[0], {tensors[0].dtype}; got {tensor.dtype}"
            )
        if tensor.device != like.device:
            raise ConstraintError(
                f"{name}[{i}]: must be on the device of outputs[0], {like.device}; got {tensor.device}"
            )
