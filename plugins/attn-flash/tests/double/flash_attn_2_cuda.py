"""A double of `flash_attn_2_cuda`, the compiled extension of FlashAttention 2.8.3, on CPU tensors.

The real Python package runs over it: `import flash_attn` imports it by this name, and calls its five functions with
their arguments by position. What they check, how they read windows and the causal flag, what they leave unwritten and
what they cannot launch is as in the extension. That has consequences which the documented rule, "query i sees the keys
from i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right", does not have:

- A window's `right` of seqlen_k or more counts as unlimited, and an unlimited `right` beside a limited `left` counts as
  seqlen_k. Where seqlen_q is larger than seqlen_k, neither is the rule: the first rows see more keys, or fewer.
- With the causal flag (or a window without a left limit and with `right` 0), ALiBi adds slope * key instead of
  -slope * distance. The output is the same; the LSE is not: of row i it is larger by
  slope * (i + seqlen_k - seqlen_q).
- A row that sees no key has an LSE of +inf.
- Pages of a KV cache are multiples of 256 keys, and dropout does nothing to them.
- Rows that belong to no sequence are not written, neither of the output nor of the gradients.
- With `max_seqlen_q` 1, fewer heads of key than of query and no limit, `cu_seqlens_q` is not read: every sequence must
  have its one query.
- No query in the forward pass, or no key in the backward pass, is a grid of no blocks, which CUDA refuses.

Rotary embeddings, which nothing here asks for, are refused by name.
"""

from flash_double.fa2_dense import bwd, fwd
from flash_double.fa2_kvcache import fwd_kvcache
from flash_double.fa2_varlen import varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
