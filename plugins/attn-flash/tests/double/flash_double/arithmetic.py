"""What FlashAttention's kernels compute for one sequence, in plain torch: the arithmetic of all doubles in this folder.

Rounded where the kernels round: products are summed up in float32, the weights and the gradient of the scores are
rounded to the dtype of query before they are multiplied by value, key and query, and a gradient to a key that several
query heads share is rounded per query head before it is summed up. So an error budget that holds here has been held
with the errors that a GPU makes, too.

And scaled when the kernels scale: after the mask and the largest score of a row. With a scale of 0 a masked score
becomes NaN, with a negative one +inf, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which scores one call asks for.

    The diagonal is that of the bottom-right corner: query i lies on key i + seqlen_k - seqlen_q. A row that sees no
    key has output 0 and `empty_lse`.
    """

    scale: float
    softcap: float = 0.0  #: 0 or less: none
    left: int | None = None  #: keys before the diagonal that are seen; None: all
    right: int | None = None  #: keys behind the diagonal that are seen; None: all
    slopes: Tensor | None = None  #: of ALiBi, [num_heads], float32
    slopes_by_key: bool = False  #: slope * key is added, not -slope * |distance|: the same weights, another LSE
    dropout_p: float = 0.0
    empty_lse: float = math.inf

    @property
    def factor(self) -> float:
        """What the masked scores are multiplied by; a softcap has scaled them before."""
        return self.softcap if self.softcap > 0 else self.scale


def forward(query: Tensor, key: Tensor, value: Tensor, rules: Rules, kept: Tensor | None = None) -> tuple[Tensor, ...]:
    """Output, LSE and weights before they are divided by their sum.

    Args:
        query, key, value: `[seqlen_q, num_heads, head_dim]`, `[seqlen_k, num_kv_heads, head_dim]` and
            `[seqlen_k, num_kv_heads, head_dim_v]`.
        kept: what dropout leaves, `[num_heads, seqlen_q, seqlen_k]`, boolean.

    Returns:
        `[seqlen_q, num_heads, head_dim_v]` in query's dtype, `[num_heads, seqlen_q]` and
        `[num_heads, seqlen_q, seqlen_k]` in float32.
    """
    scores, _ = _scores(query, key, rules)
    no_key = scores.new_full((*scores.shape[:2], 1), -math.inf)
    highest = _finite(torch.cat([scores, no_key], -1).amax(-1, keepdim=True)) * rules.factor
    weights = torch.exp(scores * rules.factor - highest)
    total = weights.sum(-1, keepdim=True)
    empty = (total == 0) | total.isnan()
    lse = torch.where(empty, rules.empty_lse, highest + total.log()).squeeze(-1)
    used = weights if kept is None else weights.masked_fill(~kept, 0.0)
    out = used.to(query.dtype).float() @ _of_each_head(value, query)
    out = out / torch.where(empty, 1.0, total) / (1.0 - rules.dropout_p)
    return out.transpose(0, 1).to(query.dtype), lse, weights


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rules: Rules,
    kept: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value: the weights are made again, of the LSE that the forward pass returned."""
    dtype, keep = query.dtype, 1.0 - rules.dropout_p
    scores, slope = _scores(query, key, rules)
    weights = torch.exp(scores * rules.factor - _finite(lse.unsqueeze(-1)))
    grad_out = grad.float().transpose(0, 1)  # [num_heads, seqlen_q, head_dim_v]
    grad_weights = grad_out @ _of_each_head(value, query).mT
    used = weights if kept is None else weights.masked_fill(~kept, 0.0)
    if kept is not None:
        grad_weights = grad_weights.masked_fill(~kept, 0.0)
    mean = keep * (grad_out * out.float().transpose(0, 1)).sum(-1, keepdim=True)
    if grad_lse is not None:
        mean = mean - grad_lse.unsqueeze(-1)
    grad_scores = weights * (grad_weights - mean)
    if slope is not None:
        grad_scores = grad_scores * slope
    grad_scores = grad_scores.to(dtype).float()
    factor = rules.scale / keep
    grad_query = factor * (grad_scores @ _of_each_head(key, query))
    grad_key = factor * (grad_scores.mT @ query.float().transpose(0, 1))
    grad_value = (used.to(dtype).float().mT @ grad_out) / keep
    return (
        grad_query.transpose(0, 1).to(dtype),
        _summed_up(grad_key.to(dtype), key),
        _summed_up(grad_value.to(dtype), value),
    )


def _scores(query: Tensor, key: Tensor, rules: Rules) -> tuple[Tensor, Tensor | None]:
    """Scores before `rules.factor`, `[num_heads, seqlen_q, seqlen_k]`, and what a softcap multiplies gradients by."""
    scores = query.float().transpose(0, 1) @ _of_each_head(key, query).mT
    slope = None
    if rules.softcap > 0:
        scores = torch.tanh(scores * (rules.scale / rules.softcap))
        slope = 1 - scores * scores
    seqlen_q, seqlen_k = scores.shape[1:]
    column = torch.arange(seqlen_k)
    diagonal = torch.arange(seqlen_k - seqlen_q, seqlen_k)[:, None]
    if rules.slopes is not None:
        distance = column if rules.slopes_by_key else -(diagonal - column).abs()
        scores = scores + rules.slopes[:, None, None] / rules.factor * distance
    if rules.left is not None:
        scores = scores.masked_fill(column < diagonal - rules.left, -math.inf)
    if rules.right is not None:
        scores = scores.masked_fill(column > diagonal + rules.right, -math.inf)
    return scores, slope


def _finite(x: Tensor) -> Tensor:
    """0 in place of -inf: without this, a row without keys would be -inf - -inf, that is NaN."""
    return torch.where(x == -math.inf, 0.0, x)


def _of_each_head(key_or_value: Tensor, query: Tensor) -> Tensor:
    """`[num_heads, seqlen_k, dim]` in float32: query head h reads head h // (num_heads // num_kv_heads)."""
    shared = query.shape[1] // key_or_value.shape[1]
    return key_or_value.float().repeat_interleave(shared, 1).transpose(0, 1)


def _summed_up(grad: Tensor, key_or_value: Tensor) -> Tensor:
    """The gradient of each query head, `[num_heads, seqlen_k, dim]`, to that of the heads of key or value."""
    shared = grad.shape[0] // key_or_value.shape[1]
    return grad.transpose(0, 1).unflatten(1, (-1, shared)).sum(2, dtype=torch.float32).to(grad.dtype)
