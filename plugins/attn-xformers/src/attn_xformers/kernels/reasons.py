"""The fields that xFormers' reasons concern. Its reasons are sentences; what they name is known by their words."""

from __future__ import annotations

from collections.abc import Iterator

from attn_core import Refusal

#: (words, field of a forward's reason, of a backward's), the first that is found counts.
WORDS = (
    ("does not support BMGHK", "num_kv_heads", "backward.gqa"),
    ("Only supports BMHK", "num_kv_heads", "backward.gqa"),
    ("GQA is only supported", "num_kv_heads", "backward.gqa"),
    ("multiquery is only supported", "num_kv_heads", "backward.gqa"),
    ("bias gradient is not supported", "bias_grad", "bias_grad"),
    ("Broadcasting the `attn_bias`", "bias_grad", "bias_grad"),
    ("query.shape[-1] != value.shape[-1]", "head_dim_v", "head_dim_v"),
    ("Q/K head-dim", "head_dim_v", "head_dim_v"),
    ("value.shape[-1] %", "head_dim_v", "head_dim_v"),
    ("(query.shape[-1], value.shape[-1])", "head_dim", "backward.head_dims"),
    (".shape[-1] %", "head_dim", "head_dim"),
    ("Embed dim", "head_dim", "backward.head_dims"),
    ("for dropout when", "dropout_p", "dropout_p"),
    ("dropout > 0.0", "dropout_p", "dropout_p"),
    ("has custom scale", "scale", "scale"),
    ("non-deterministic", "deterministic", "backward.deterministic"),
    ("bf16 is only supported", "dtype", "backward.dtypes"),
    ("dtype=", "dtype", "backward.dtypes"),
    ("device=", "device", "device"),
    ("build with CUDA", "device", "device"),
    ("operator wasn't built", "device", "device"),
    ("triton is not available", "device", "device"),
    ("requires device with capability", "compute_capability", "backward.min_compute_capability"),
    ("requires GPU with", "compute_capability", "backward.min_compute_capability"),
    ("requires NVidia GPU", "compute_capability", "backward.min_compute_capability"),
    ("Only support Mq", "seqlen_q", "seqlen_q"),
    ("attn_bias", "bias", "backward.biases"),
    ("Only support BlockDiagonalCausalMask", "bias", "backward.biases"),
    ("Only support LowerTriangularMask", "bias", "backward.biases"),
    ("seqlens_k must be >=", "bias", "backward.biases"),
    ("query len", "bias", "backward.biases"),
    ("Query length", "bias", "backward.biases"),
    ("causal mask", "bias", "backward.biases"),
    ("dditive attention bias", "bias", "backward.biases"),
)
#: Of what is in none of these words.
UNKNOWN = "xformers"


def refusals(name: str, reasons: list[str], *, backward: bool) -> Iterator[Refusal]:
    """The reasons of the operator of that name, each with the field that it concerns."""
    for reason in dict.fromkeys(reasons):
        text = " ".join(reason.split())
        yield Refusal(field_of(text, backward=backward), f"{name} says: {text}")


def field_of(reason: str, *, backward: bool) -> str:
    """The field that a reason concerns; UNKNOWN where its words are none of those that are known."""
    for words, of_forward, of_backward in WORDS:
        if words in reason:
            return of_backward if backward else of_forward
    return UNKNOWN
