"""Problem: what is asked of a kernel, without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .bias import AttnBias


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention call, described by everything that a kernel's acceptance or speed may depend on.

    Hashable and picklable; holds no tensor data (a tensor bias is kept on the meta device). While a graph is traced,
    `batch`, `seqlen_q` and `seqlen_kv` may be symbolic; the rest are plain numbers.
    """

    batch: int
    seqlen_q: int
    seqlen_kv: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: str  #: device type: "cpu", "cuda", "meta", …
    compute_capability: tuple[int, int] | None = None  #: of a CUDA device; None where there is none to ask
    bias: AttnBias | None = None  #: bound to the lengths and normalized
    scale: float = 1.0  #: resolved: never None
    softcap: float | None = None
    dropout_p: float = 0.0
    return_lse: bool = False
    requires_grad: bool = False  #: a gradient to query, key or value is needed
    bias_requires_grad: bool = False
    deterministic: bool = False  #: `torch.use_deterministic_algorithms` is on
    forward_ad: bool = False  #: inside `torch.func.jvp` or `torch.autograd.forward_ad.dual_level`
    compiling: bool = False  #: a graph is being traced
    strided_head_dim: bool = False  #: a last dimension of query, key or value is not contiguous

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def in_pages(self) -> bool:
        """Whether key and value are `[num_pages, page_size, num_kv_heads, head_dim]`, found by the bias's table."""
        return self.bias is not None and self.bias.paged is not None

    @property
    def needs_backward(self) -> bool:
        return self.requires_grad or self.bias_requires_grad

    def pairs_left(self) -> float:
        """(query, key) pairs that the bias leaves, per batch entry and head."""
        return float(self.seqlen_q) * float(self.seqlen_kv) if self.bias is None else self.bias.pairs()

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        heads = f"{self.num_heads}" if self.num_heads == self.num_kv_heads else f"{self.num_heads}:{self.num_kv_heads}"
        dim = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}:{self.head_dim_v}"
        lengths = f"{self.seqlen_q}"
        if lengths != f"{self.seqlen_kv}":  # compared as text: symbolic lengths must not be compared here
            lengths = f"{lengths}x{self.seqlen_kv}"
        parts = [f"batch {self.batch}", f"seqlen {lengths}", f"heads {heads}", f"head_dim {dim}", name, self.device]
        if self.compute_capability is not None:
            parts[-1] += f" (sm_{self.compute_capability[0]}{self.compute_capability[1]})"
        if self.bias is not None:
            parts.append(repr(self.bias))
        if self.softcap is not None:
            parts.append(f"softcap {self.softcap:g}")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p:g}")
        flags = ("return_lse", "requires_grad", "bias_requires_grad", "deterministic", "forward_ad", "compiling")
        parts += [flag for flag in flags if getattr(self, flag)]
        return ", ".join(parts)
