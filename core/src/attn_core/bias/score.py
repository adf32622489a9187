"""Score: a bias that adds a number to every logit, defined by the rule of that number."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .base import Kind, check_shape, indices


class Score(Kind):
    """A bias that adds to the logits what `added` says; nothing is masked by it."""

    @abstractmethod
    def added(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the logit of query `q` and key `k` of batch entry `b` and head `h`, computed in `dtype`.

        Index tensors broadcast against each other; a rule that ignores one leaves that dimension out. Differentiable
        in the tensors that the bias holds.
        """

    def check_rule(self) -> None:
        if self.is_for_any_batch_and_head() and 0 not in self.bound_lengths():
            added = self.added(*indices(1, 1, 1, 1, self.device or "cpu"), torch.float32)
            check_shape(self, "rule", added, (1, 1, 1, 1))

    def score(self, logit: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return logit + self.added(b, h, q, k, logit.dtype)

    def materialize(self, device: torch.device | str | None = None) -> Tensor:
        """Floating tensor, added to the logits, broadcastable to `[batch, num_heads, seqlen_q, seqlen_kv]`; float32."""
        return self.dense(device, torch.float32)

    def dense(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        lengths = self.bound_lengths()
        return self.added(*indices(*self.batch_and_heads, *lengths, device or self.device or "cpu"), dtype)
