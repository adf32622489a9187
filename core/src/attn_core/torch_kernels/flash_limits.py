"""What FlashAttention 2, as torch has it on CUDA, cannot do, and a declaration cannot say.

Read from torch 2.13's `flash_attn/flash_api.cpp`. Its windows have a trap: a limit behind the diagonal that is not
below the number of keys is taken for no limit, and no limit, beside one before the diagonal, for the number of keys.
Where there are more queries than keys, neither is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from ..bias import ALiBi, AttnBias, Causal, Mask, Segments, Window
from ..bias.base import known
from ..bias.diagonal import offset
from ..bias.documents import Band, unpack
from ..bias.segments import band_of
from ..capabilities import Refusal
from ..kernel import Unusable
from ..probes import no_cuda
from ..problem import Problem
from ..tracing import constant

#: Positions are kept in 32 bits.
MOST_TOKENS = (1 << 31) - 1
#: Devices with less shared memory than the A100.
SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))


def of_backward(problem: Problem) -> Iterator[Refusal]:
    """Head dims that have no backward on devices with little shared memory."""
    if not (problem.is_cuda and problem.needs_backward and problem.compute_capability in SMALL):
        return
    if 192 < problem.head_dim <= 224:
        text = f"takes up to 192, or 225 to 256, in the backward on sm_86, sm_89 and sm_12x, got {problem.head_dim}"
        yield Refusal("backward.head_dims", text)
    elif problem.head_dim > 224 and problem.dropout_p:
        text = f"takes up to 192 with dropout in the backward on sm_86, sm_89 and sm_12x, got {problem.head_dim}"
        yield Refusal("backward.head_dims", text)


def of_the_op(problem: Problem) -> Iterator[Refusal]:
    """What no call of it takes, whatever the bias."""
    yield from of_backward(problem)
    if problem.scale <= 0:  # it masks before it scales: 0 * -inf is NaN, and a negative scale turns -inf into +inf
        yield Refusal("scale", f"takes a scale above 0, got {problem.scale}")
    other = implementation_in_its_place()
    if other is not None:
        text = f"is FlashAttention 2, and {other} is activated in its place (torch.nn.attention)"
        yield Refusal("implementation", text)


@constant
def implementation_in_its_place() -> str | None:
    """What `torch.nn.attention.activate_flash_attention_impl` put behind torch's ops; None: what torch came with."""
    module = sys.modules.get("torch.nn.attention")
    current = getattr(module, "current_flash_attention_impl", None)
    return None if current is None else current()


def of_a_window(mask: Mask | None, seqlen_q: int, seqlen_kv: int) -> Iterator[Refusal]:
    """Masks of a dense call: where they start, and the trap of their limits."""
    if not isinstance(mask, Window):
        return
    if mask.corner == "top-left" and seqlen_q != seqlen_kv:
        yield Refusal("bias", f"takes windows from the bottom right, got {mask!r}")
    elif seqlen_q > seqlen_kv + 1:
        beyond = seqlen_kv if mask.left is None else seqlen_kv + 1  # of these it is taken for another
        if mask.right is None or mask.right >= beyond:
            text = f"takes right below {beyond} where seqlen_q={seqlen_q} and seqlen_kv={seqlen_kv}, got {mask!r}"
            yield Refusal("bias", text)


def of_documents(documents: Segments) -> Iterator[Refusal]:
    """Masks within documents, which start at the bottom right of each, or can be said so."""
    if documents.from_bottom_right() is None:
        yield Refusal("bias", f"takes masks from the bottom right of each document, got {documents!r}")


def of_alibi(alibi: ALiBi, mask: Mask | None, seqlen_q: int, seqlen_kv: int) -> Iterator[Refusal]:
    """Distances are counted from the bottom right, in documents of each."""
    if isinstance(mask, Segments):
        diagonal = offset(alibi.corner, seqlen_q, seqlen_kv)
        if not have_their_ends_on_it(mask.packed, diagonal):
            text = (
                f"takes ALiBi among documents whose last query and key lie on its diagonal, got {alibi!r} and {mask!r}"
            )
            yield Refusal("bias", text)
    elif alibi.corner == "top-left" and seqlen_q != seqlen_kv:
        yield Refusal("bias", f"takes ALiBi from the bottom right, got {alibi!r}")


def of_tokens(problem: Problem) -> Iterator[Refusal]:
    """Of a packed call: positions in all sequences together."""
    for seqlen in (problem.seqlen_q, problem.seqlen_kv):
        if known(problem.batch * seqlen > MOST_TOKENS):
            yield Refusal("batch", f"takes {MOST_TOKENS} tokens in all, got {problem.batch * seqlen}")
            return


@constant
def have_their_ends_on_it(packed: bytes, diagonal: int) -> bool:
    """Whether the last query of each document has its last key on the diagonal, `diagonal` being that of query 0."""
    documents = unpack(packed)
    ends = zip(documents.q, documents.q[1:], documents.k0, documents.k1)
    return all(k1 - q1 == diagonal for q0, q1, k0, k1 in ends if q0 < q1 and k0 < k1)


def parts_of(bias: AttnBias | None) -> tuple[tuple[AttnBias, ...], Mask | None]:
    """(what is added, what is masked)."""
    return ((), None) if bias is None else (bias.scores, bias.mask)


def window_of(mask: Causal | Window | None) -> tuple[int, int]:
    """(keys before the diagonal, keys behind it) as the op takes them: -1 is no limit."""
    return limits(band_of(mask))


def limits(band: Band) -> tuple[int, int]:
    """The same for a mask within documents."""
    left, right, _ = band
    return -1 if left is None else left, -1 if right is None else right


def unusable(needed: frozenset[str]) -> Unusable | None:
    """Why this torch has not what is needed: CUDA, FlashAttention, and these arguments of its op."""
    missing = no_cuda()
    if missing is not None:
        return missing
    if torch.version.hip is not None:
        return Unusable("unavailable", "this torch is built for ROCm, whose FlashAttention is another")
    if not torch.backends.cuda.is_flash_attention_available():
        return Unusable("unavailable", "this torch is built without FlashAttention")
    lacking = needed - arguments_of_the_op()
    if lacking:
        text = f"torch {torch.__version__} has a _flash_attention_forward without {', '.join(sorted(lacking))}"
        return Unusable("unavailable", text)
    return None


def arguments_of_the_op() -> frozenset[str]:
    """What `_flash_attention_forward` of this torch can be told; none where it has no such op."""
    op = getattr(torch.ops.aten, "_flash_attention_forward", None)
    return frozenset() if op is None else frozenset(argument.name for argument in op.default._schema.arguments)
