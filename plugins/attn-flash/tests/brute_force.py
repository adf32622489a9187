"""FlashAttention's documented rule, taken at its word: score by score, in float64. Shares nothing with the doubles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: A weight of 1 in float16 is off by as much, and outputs here are sums of a few of them.
CLOSE = {"atol": 2e-3, "rtol": 2e-3}
GRADIENTS_CLOSE = {"atol": 8e-3, "rtol": 4e-3}
LSE_CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of one sequence, in float64; differentiable.

    Args:
        query, key, value: `[seqlen_q, num_heads, head_dim]`, `[seqlen_k, num_kv_heads, head_dim]` and
            `[seqlen_k, num_kv_heads, head_dim_v]`.
        causal, window: query i sees the keys from i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right,
            both included; -1 is no limit, and causal is a `right` of 0.
        slopes: `[num_heads]`; -slope * |i + seqlen_k - seqlen_q - j| is added to the score.

    Returns:
        `[seqlen_q, num_heads, head_dim_v]` and `[num_heads, seqlen_q]`; a query that sees no key has 0 and +inf.
    """
    query, key, value = (x.double() for x in (query, key, value))
    seqlen_q, heads, head_dim = query.shape
    seqlen_k, heads_k, _ = key.shape
    left, right = window[0], 0 if causal else window[1]
    scale = head_dim**-0.5 if scale is None else scale
    outs, lses = [], []
    for h in range(heads):
        kv = h // (heads // heads_k)
        for i in range(seqlen_q):
            place = i + seqlen_k - seqlen_q
            scores, values = [], []
            for j in range(seqlen_k):
                if (left >= 0 and j < place - left) or (right >= 0 and j > place + right):
                    continue
                score = scale * (query[i, h] * key[j, kv]).sum()
                if softcap > 0:
                    score = softcap * torch.tanh(score / softcap)
                if slopes is not None:
                    score = score - float(slopes[h]) * abs(place - j)
                scores.append(score)
                values.append(value[j, kv])
            if scores:
                lse = torch.logsumexp(torch.stack(scores), 0)
                outs.append(sum(torch.exp(score - lse) * row for score, row in zip(scores, values)))
                lses.append(lse)
            else:
                outs.append(torch.zeros(value.shape[-1], dtype=torch.float64))
                lses.append(torch.tensor(math.inf, dtype=torch.float64))
    out = torch.stack(outs).view(heads, seqlen_q, -1).transpose(0, 1)
    return out, torch.stack(lses).view(heads, seqlen_q)


def of_rules(query: Tensor, key: Tensor, value: Tensor, entry: int, rules: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same of batch entry `entry`, with a window given as `left` and `right`, and slopes perhaps by entry."""
    slopes = rules.get("slopes")
    rest = {name: rules[name] for name in ("scale", "causal", "softcap") if name in rules}
    window = (rules.get("left", -1), rules.get("right", -1))
    if slopes is not None and slopes.ndim == 2:
        slopes = slopes[entry]
    return attend(query, key, value, **rest, window=window, slopes=slopes)
