"""What an operator would do otherwise than asked, without saying so, or cannot do at all."""

from __future__ import annotations

from collections.abc import Iterator

from attn_core import Problem, Refusal, Segments, TensorBias
from attn_core.bias import Sum

from .forms import may_leave_a_row_empty
from .operators import Manners


def refusals(problem: Problem, manners: Manners) -> Iterator[Refusal]:
    """Beside what the operator itself says."""
    bias = problem.bias
    if problem.scale <= 0:  # those that scale after they have masked turn -inf into +inf
        yield Refusal("scale", f"takes a scale above 0, got {problem.scale:g}")
    if problem.dropout_p and problem.return_lse:
        yield Refusal("dropout_p", "xFormers gives no LSE where weights are dropped")
    if isinstance(bias, Segments) and bias.has_gaps and not manners.never_reads_padding:
        yield Refusal("bias", "takes keys of documents with nothing between, as it only masks that; got starts_kv")
    if not manners.rows_without_keys and may_leave_a_row_empty(bias, problem.seqlen_q, problem.seqlen_kv):
        yield Refusal("bias", f"takes masks that leave every query a key, got {bias!r}")
    if isinstance(bias, Sum) and problem.return_lse:
        yield Refusal("bias", "takes a sum without the LSE, which would be wrong where a query sees no key")
    if problem.bias_requires_grad and not isinstance(bias, TensorBias):
        yield Refusal("bias_grad", f"gives a gradient to a tensor alone, got {bias!r}")
