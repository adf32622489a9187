"""Pairs of operators for the CPU, in plain torch, as xFormers' own are written: classes with what they take.

Each computes by its bias object's dense form, and its backward starts from the LSE that its forward gave, so that both
formats of it are exercised. Which xFormers their base classes are of, the real one or the double, is the caller's.
"""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from typing import NamedTuple

import torch
from attn_xformers import Manners

INFINITY = float("inf")


class Operators(NamedTuple):
    forward: type
    backward: type | None
    manners: Manners


def dense_of(attn_bias, rows, columns):
    """`[batch or 1, heads or 1, rows, columns]`, added to the logits; 5-D ones with all heads in one dimension."""
    if attn_bias is None:
        return torch.zeros(1, 1, rows, columns)
    if not isinstance(attn_bias, torch.Tensor):
        tensor = getattr(attn_bias, "_bias", None)
        shape = (rows, columns) if tensor is None else (*tensor.shape[:-2], rows, columns)
        attn_bias = attn_bias.materialize(shape).float()
    dense = attn_bias.flatten(1, 2) if attn_bias.ndim == 5 else attn_bias
    return dense.reshape((1,) * (4 - dense.ndim) + tuple(dense.shape)).float()


def flat(x):
    """Heads in one dimension, in float32."""
    return (x.flatten(2, 3) if x.ndim == 5 else x).float()


def weights(inp, attn_bias):
    """Logits of all heads, `[batch, heads, rows, columns]`."""
    query, key = flat(inp.query), flat(inp.key)
    dense = dense_of(attn_bias, query.shape[1], key.shape[1])
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * inp.scale_float
    return torch.where(dense == -INFINITY, -INFINITY, logits + dense)  # what is masked may be NaN


def kept(p, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) >= p).float() / (1 - p)


def handed_out(lse, inp, packed, empty):
    """The LSE `[batch, heads, rows]` in one of xFormers' formats; rows without keys are `empty`."""
    lse = lse.masked_fill(lse == -INFINITY, empty)
    starts = inp.attn_bias.q_seqinfo.seqstart_py if hasattr(inp.attn_bias, "q_seqinfo") else None
    if packed:
        out = lse
    elif starts is None:
        out = padded(lse)
    else:
        longest = max(end - start for start, end in pairwise(starts))
        out = lse.new_full((len(starts) - 1, lse.shape[1], longest), INFINITY)
        for n, (start, end) in enumerate(pairwise(starts)):
            out[n, :, : end - start] = lse[0, :, start:end]
        out = padded(out)
    return out.unflatten(1, inp.query.shape[2:4]) if inp.query.ndim == 5 else out


def padded(lse):
    return torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=INFINITY)


def taken_in(lse, inp, packed, rows):
    """The LSE `[batch, heads, rows]` again."""
    if packed or not hasattr(inp.attn_bias, "q_seqinfo"):
        return lse[..., :rows]
    starts = inp.attn_bias.q_seqinfo.seqstart_py
    parts = [lse[n, :, : end - start] for n, (start, end) in enumerate(pairwise(starts))]
    return torch.cat(parts, -1)[None]


def pair(
    name,
    *,
    types,
    backward_types=None,
    backward=True,
    packed=True,
    grouped=True,
    aligned=False,
    reads_padding=False,
    empty=INFINITY,
    manners=None,
    **attributes,
):
    """A forward and a backward operator, and what they do at the edges.

    Args:
        types: names of the bias classes that the forward takes; "None" and "Tensor" too.
        empty: the LSE of a row without keys.
    """
    common, biases = (import_module(f"xformers.ops.fmha.{name}") for name in ("common", "attn_bias"))

    def classes(names):
        found = {"None": type(None), "Tensor": torch.Tensor}
        return tuple(found.get(each) or getattr(biases, each) for each in names)

    shared = {
        "OPERATOR": True,
        "SUPPORTED_DEVICES": frozenset({"cpu"}),
        "SUPPORTED_DTYPES": frozenset({torch.float16, torch.float32}),
        "SUPPORTED_MAX_K": 256,
        "SUPPORTS_DROPOUT": True,
        "SUPPORTS_CUSTOM_SCALE": True,
        "SUPPORTS_DIFFERENT_VALUE_EMBED": True,
        "VARLEN_LSE_PACKED": packed,
    } | attributes

    class Aligned:
        @classmethod
        def not_supported_reasons(cls, d):
            reasons = super().not_supported_reasons(d)
            for which, x in (("query", d.query), ("value", d.value)) if aligned else ():
                if x.shape[-1] % 8:
                    reasons.append(f"{which}.shape[-1] % 8 != 0")
                elif x.stride(-2) % 8:
                    reasons.append(f"{which}.stride(-2) % 8 != 0")
            tensor = getattr(d.attn_bias, "_bias", d.attn_bias)
            if isinstance(tensor, torch.Tensor) and any(tensor.stride(i) % 8 for i in range(tensor.ndim - 1)):
                reasons.append(f"attn_bias.stride(-2) % 8 != 0 (attn_bias.stride() = {tensor.stride()})")
            return reasons

    class Forward(Aligned, common.AttentionFwOpBase):
        @classmethod
        def apply(cls, inp, needs_gradient):
            cls.calls.append(inp)
            logits = weights(inp, inp.attn_bias)
            lse = logits.logsumexp(-1)
            probabilities = (logits - lse[..., None]).exp().nan_to_num(0.0)
            seed = int(torch.randint(1 << 30, ()))
            if inp.p:
                probabilities = probabilities * kept(inp.p, probabilities.shape, seed)
            value = flat(inp.value)
            if not reads_padding:
                value = value.masked_fill((logits == -INFINITY).all(2).transpose(1, 2)[..., None], 0)
            out = torch.einsum("bhqk,bkhd->bqhd", probabilities, value).to(inp.query.dtype)
            out = out.reshape(*inp.query.shape[:-1], inp.value.shape[-1])
            if not needs_gradient:
                return out, None
            given = handed_out(lse, inp, packed, empty)
            if inp.p:
                return out, common.Context(lse=given, out=out, op_bw=Backward, rng_state=seed)
            return out, common.Context(lse=given, out=out)

    class Backward(Aligned, common.AttentionBwOpBase):
        SUPPORTS_ATTN_BIAS_GRAD = True

        @classmethod
        def apply(cls, ctx, inp, grad):
            logits = weights(inp, inp.attn_bias)
            lse = taken_in(ctx.lse, inp, packed, logits.shape[2])
            probabilities = (logits - lse[..., None]).exp()
            grad, value = grad.float(), flat(inp.value)
            of_weights = torch.einsum("bqhd,bkhd->bhqk", grad, value)
            dropped = kept(inp.p, probabilities.shape, ctx.rng_state) if inp.p else torch.ones(())
            delta = (grad * ctx.out.float()).sum(-1).transpose(1, 2)[..., None]
            of_logits = probabilities * (of_weights * dropped - delta)
            dq = torch.einsum("bhqk,bkhd->bqhd", of_logits, flat(inp.key)) * inp.scale_float
            dk = torch.einsum("bhqk,bqhd->bkhd", of_logits, flat(inp.query)) * inp.scale_float
            dv = torch.einsum("bhqk,bqhd->bkhd", probabilities * dropped, grad)
            trained = isinstance(inp.attn_bias, torch.Tensor) and inp.attn_bias.requires_grad
            db = of_logits.to(inp.attn_bias.dtype) if trained else None
            dtype = inp.query.dtype
            return common.Gradients(dq=dq.to(dtype), dk=dk.to(dtype), dv=dv.to(dtype), db=db)

    for cls, names, tail in ((Forward, types, "F"), (Backward, backward_types or types, "B")):
        own = {"NAME": f"{name}{tail}", "SUPPORTED_ATTN_BIAS_TYPES": classes(names)}
        for attribute, value in (shared | own).items():
            setattr(cls, attribute, value)
    Forward.SUPPORTS_BMGHK = grouped
    Forward.calls = []
    return Operators(Forward, Backward if backward else None, manners or Manners())


DENSE = (
    "None",
    "Tensor",
    "LowerTriangularMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularMaskWithTensorBias",
)
DOCUMENTS = (
    "BlockDiagonalMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
)
WITH_ROOM = (
    "BlockDiagonalPaddedKeysMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalLocalAttentionPaddedKeysMask",
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask",
    "BlockDiagonalGappyKeysMask",
    "BlockDiagonalCausalWithOffsetGappyKeysMask",
)
MANNERLY = Manners(never_reads_padding=True, rows_without_keys=True)


def like_flash():
    """Takes everything; its LSE of documents is packed, and +inf for rows without keys; no gradients with GQA, nor
    where keys have room."""
    types = DENSE + DOCUMENTS + WITH_ROOM
    return pair("everything", types=types, backward_types=DENSE[:6] + DOCUMENTS, manners=MANNERLY)


def like_cutlass():
    """Its LSE is padded with +inf, and 0 for rows without keys; fewer classes in the backward; sizes of 8."""
    types = (*DENSE[:5], DENSE[6], *DOCUMENTS, WITH_ROOM[1])
    backward_types = (*DENSE[:4], *DOCUMENTS[:4])
    return pair(
        "padded", types=types, backward_types=backward_types, packed=False, aligned=True, reads_padding=True, empty=0.0
    )


def like_splitk():
    """No gradients, no dropout, few classes, its own scale alone; reads padding."""
    types = ("None", "Tensor", *WITH_ROOM)
    return pair(
        "splitk",
        types=types,
        backward=False,
        grouped=False,
        reads_padding=True,
        empty=-INFINITY,
        SUPPORTS_DROPOUT=False,
        SUPPORTS_CUSTOM_SCALE=False,
        SUPPORTS_DIFFERENT_VALUE_EMBED=False,
    )


ALL = {"mine/everything": like_flash, "mine/padded": like_cutlass, "mine/splitk": like_splitk}
