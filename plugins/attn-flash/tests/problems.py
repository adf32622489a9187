"""Problems with something of everything that FlashAttention takes, and their answers by the reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from attn_core import (
    ALiBi,
    AttnBias,
    Cached,
    Causal,
    KeyPadding,
    Paged,
    Segments,
    Window,
    attention,
    reference_attention,
)

SEED = 20261121
HALF_CLOSE = {"atol": 2e-2, "rtol": 2e-2}
#: Sums of rounded parts, as of the gradients of keys that many queries see.
GRADIENTS_CLOSE = {"atol": 4e-2, "rtol": 4e-2}


@dataclass(frozen=True)
class Asked:
    """One call: what is asked, and its sizes."""

    bias: AttnBias | None = None
    seqlen_q: int = 9
    seqlen_kv: int = 9
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    batch: int = 2
    dtype: torch.dtype = torch.float16
    options: dict[str, Any] = field(default_factory=dict)

    def operands(self, seed: int = SEED) -> list[torch.Tensor]:
        """Query, key and value that require a gradient; behind the ends of sequences, key and value are NaN."""
        generator = torch.Generator().manual_seed(seed)
        paged = self.bias.paged if self.bias is not None else None
        keys = (self.batch, self.seqlen_kv) if paged is None else (int(paged.page_table.max()) + 1, paged.page_size)
        shapes = (
            (self.batch, self.seqlen_q, self.heads[0], self.dims[0]),
            (*keys, self.heads[1], self.dims[0]),
            (*keys, self.heads[1], self.dims[1]),
        )
        query, key, value = (torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes)
        if self.bias is not None and paged is None:
            valid = self.bias.bind(self.seqlen_q, self.seqlen_kv).valid_keys("cpu")
            if valid is not None:
                gone = ~valid[:, :, None, None].expand(self.batch, -1, 1, 1)
                key, value = (tensor.masked_fill(gone, float("nan")) for tensor in (key, value))
        return [tensor.requires_grad_() for tensor in (query, key, value)]

    def right(self, operands: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in float64, by the reference."""
        options = {name: value for name, value in self.options.items() if name in ("scale", "softcap")}
        return reference_attention(*operands, self.bias, **options)

    def by(self, kernel: str, operands: list[torch.Tensor], **more: Any) -> Any:
        return attention(*operands, self.bias, kernel=kernel, **self.options, **more)


def a_table(batch: int, pages: int, seed: int = SEED) -> torch.Tensor:
    """Pages in any order, none of them shared."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(batch * pages, generator=generator).reshape(batch, pages)


CORNER = "bottom-right"
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])

#: What all generations take, forward and backward.
ALL: dict[str, Asked] = {
    "dense": Asked(),
    "one query": Asked(seqlen_q=1),
    "more keys": Asked(seqlen_kv=13),
    "bfloat16": Asked(dtype=torch.bfloat16),
    "one head of key": Asked(heads=(4, 1)),
    "as many heads of key": Asked(heads=(3, 3)),
    "head_dim 20": Asked(dims=(20, 20)),
    "scale": Asked(options={"scale": 0.7}),
    "softcap": Asked(options={"softcap": 2.0}),
    "causal": Asked(Causal()),
    "causal, more keys": Asked(Causal(CORNER), seqlen_kv=13),
    "causal, more queries": Asked(Causal(CORNER), seqlen_q=13),
    "causal, softcap": Asked(Causal(), options={"softcap": 2.0}),
    "window": Asked(Window(2, 1)),
    "window, more keys": Asked(Window(2, 1, CORNER), seqlen_kv=13),
    "window, more queries": Asked(Window(2, 1, CORNER), seqlen_q=13),
    "window to the left": Asked(Window(3, 0)),
    "window without a left limit": Asked(Window(None, 2)),
    "window without a right limit": Asked(Window(2, None)),
    "window of one key": Asked(Window(0, 0)),
    "documents": Asked(Segments([3, 1, 5])),
    "documents, causal": Asked(Segments([3, 1, 5], within=Causal())),
    "documents, causal, of other lengths": Asked(Segments([3, 1, 5], [5, 6, 2], within=Causal(CORNER)), seqlen_kv=13),
    "documents, window": Asked(Segments([4, 5], [6, 7], within=Window(2, 0, CORNER)), seqlen_kv=13),
    "documents, window, more queries": Asked(Segments([9, 4], [2, 7], within=Window(1, None, CORNER)), seqlen_q=13),
    "documents without keys": Asked(Segments([3, 1, 5], [4, 0, 5])),
    "documents without queries": Asked(Segments([1, 0, 1], [4, 2, 3]), seqlen_q=2),
    "one document": Asked(Segments([9], [9], within=Causal())),
}
#: What all generations take in the forward alone.
FORWARD: dict[str, Asked] = {
    "padding": Asked(KeyPadding([4, 9])),
    "padding, one sequence without keys": Asked(KeyPadding([0, 5])),
    "cache": Asked(Cached([4, 9], within=Causal(CORNER)), seqlen_q=3),
    "cache, one query": Asked(Cached([4, 9], within=Causal(CORNER)), seqlen_q=1),
    "cache, window": Asked(Cached([4, 9], within=Window(2, 0, CORNER)), seqlen_q=3),
    "cache, fewer keys than queries": Asked(Cached([1, 9], within=Causal(CORNER)), seqlen_q=3),
    "pages": Asked(Paged(a_table(2, 2), [300, 17], 256), seqlen_q=3, seqlen_kv=512),
    "pages, causal": Asked(Paged(a_table(2, 2), [300, 17], 256, within=Causal(CORNER)), seqlen_q=3, seqlen_kv=512),
    "pages, window": Asked(
        Paged(a_table(2, 2), [300, 17], 256, within=Window(20, 0, CORNER)), seqlen_q=3, seqlen_kv=512
    ),
    "pages, softcap": Asked(Paged(a_table(2, 2), [300, 17], 256), seqlen_q=3, seqlen_kv=512, options={"softcap": 2.0}),
}
#: What FlashAttention-2 alone takes.
ALIBI: dict[str, Asked] = {
    "ALiBi": Asked(ALiBi(4)),
    "ALiBi, more keys": Asked(ALiBi(4, corner=CORNER), seqlen_kv=13),
    "ALiBi, given slopes": Asked(ALiBi(4, SLOPES.double())),
    "ALiBi, slopes of each batch entry": Asked(ALiBi(4, torch.stack([SLOPES, 2 * SLOPES]))),
    "ALiBi, causal": Asked(Causal() + ALiBi(4)),
    "ALiBi, causal, more keys": Asked(Causal(CORNER) + ALiBi(4, corner=CORNER), seqlen_kv=13),
    "ALiBi, causal, more queries": Asked(Causal(CORNER) + ALiBi(4, corner=CORNER), seqlen_q=13),
    "ALiBi, window": Asked(Window(3, 1) + ALiBi(4)),
    "ALiBi, documents": Asked(Segments([4, 5]) + ALiBi(4)),
    "ALiBi, causal documents": Asked(Segments([4, 5], within=Causal()) + ALiBi(4)),
    "ALiBi, causal documents, slopes of each batch entry": Asked(
        Segments([4, 5], within=Causal()) + ALiBi(4, torch.stack([SLOPES, 2 * SLOPES]))
    ),
}
#: What FlashAttention-3 and 4 take: values of another head_dim.
OTHER_DIMS: dict[str, Asked] = {
    "head_dim_v 64": Asked(dims=(16, 64)),
    "head_dim_v 64, causal documents": Asked(Segments([4, 5], within=Causal()), dims=(16, 64)),
}
#: And FlashAttention-4 in the forward alone.
ODD_DIMS: dict[str, Asked] = {
    "head_dim_v 8": Asked(dims=(16, 8)),
    "head_dim_v 32": Asked(dims=(16, 32)),
    "head_dim_v 24, causal documents": Asked(Segments([4, 5], within=Causal()), dims=(16, 24)),
}
#: And documents between whose keys lie others, in the forward.
GAPS: dict[str, Asked] = {
    "documents with gaps": Asked(Segments([4, 5], [3, 4], starts_kv=[1, 6]), seqlen_kv=13),
    "documents with gaps, causal": Asked(
        Segments([4, 5], [3, 4], starts_kv=[1, 6], within=Causal(CORNER)), seqlen_kv=13
    ),
}
