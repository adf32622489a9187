"""attention(): plain and packed, by NATTEN's signature."""

from __future__ import annotations

import itertools

import attn_core
import pytest
import torch
from attn_core.errors import InputError, InputTypeError, KernelRefusedError, UnknownKernelError
from attn_natten import attention
from attn_natten.errors import ConstraintError, NoEffectWarning, UnknownBackendError, UnsupportedError
from attn_natten.no_effect import forget_what_was_said
from torch.nn.functional import scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20261121)


def operands(seqlen=6, seqlen_kv=None, *, batch=2, heads=4, kv_heads=None, dim=8, dim_v=None, **options):
    seqlen_kv, kv_heads = seqlen_kv or seqlen, kv_heads or heads
    return (
        torch.randn(batch, seqlen, heads, dim, **options),
        torch.randn(batch, seqlen_kv, kv_heads, dim, **options),
        torch.randn(batch, seqlen_kv, kv_heads, dim_v or dim, **options),
    )


def sdpa(query, key, value, **options):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, enable_gqa=True, **options).transpose(1, 2)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("scale", [None, 0.3, 0.0], ids="scale-{}".format)
def test_it_is_torchs_attention_heads_last(causal, scale):
    given = operands(5, 9, kv_heads=2, dim_v=6)
    torch.testing.assert_close(attention(*given, causal, scale), sdpa(*given, is_causal=causal, scale=scale))


def test_the_lse_is_heads_last_in_float32_and_differentiable():
    query, key, value = (x.requires_grad_() for x in operands(5, 9))
    _, lse = attention(query, key, value, return_lse=True)
    want = torch.einsum("bihd,bjhd->bihj", query, key).mul(8**-0.5).logsumexp(-1)
    assert lse.dtype is torch.float32
    torch.testing.assert_close(lse, want)
    for one, other in zip(*(torch.autograd.grad(each.square().sum(), (query, key)) for each in (lse, want))):
        torch.testing.assert_close(one, other)
    half = [x.detach().to(torch.bfloat16) for x in (query, key, value)]
    assert attention(*half, return_lse=True)[1].dtype is torch.float32


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("by", ["lengths", "offsets", "offsets-and-longest"])
def test_packed_sequences_do_not_see_each_other(causal, by):
    seqlens_q, seqlens_kv = [3, 1, 4], [3, 2, 6]
    query, key, value = (x.requires_grad_() for x in operands(8, 11, batch=1, kv_heads=2))
    offsets = [int32(0, *itertools.accumulate(lengths)) for lengths in (seqlens_q, seqlens_kv)]
    arguments = {
        "lengths": {"seqlens_Q": int32(*seqlens_q), "seqlens_KV": int32(*seqlens_kv)},
        "offsets": {"cumulative_seqlen_Q": offsets[0], "cumulative_seqlen_KV": offsets[1]},
    }
    arguments["offsets-and-longest"] = arguments["offsets"] | {"max_seqlen_Q": 4, "max_seqlen_KV": 6}
    out, lse = attention(query, key, value, causal, return_lse=True, **arguments[by])
    parts = zip(query.split(seqlens_q, 1), key.split(seqlens_kv, 1), value.split(seqlens_kv, 1))
    alone = [attention(*part, causal, return_lse=True) for part in parts]
    want, want_lse = (torch.cat(each, 1) for each in zip(*alone))
    torch.testing.assert_close((out, lse), (want, want_lse))
    grads = (torch.autograd.grad(each.square().sum(), (query, key, value)) for each in (out, want))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_a_packed_sequence_may_be_empty():
    query, key, value = operands(5, batch=1)
    got = attention(query, key, value, seqlens_Q=int32(2, 0, 3), seqlens_KV=int32(2, 0, 3))
    want = torch.cat([attention(*(x[:, part] for x in (query, key, value))) for part in (slice(2), slice(2, 5))], 1)
    torch.testing.assert_close(got, want)


def test_what_natten_says_of_sequences_that_are_not_packed_is_taken():
    given = operands()
    torch.testing.assert_close(attention(*given, max_seqlen_Q=0, max_seqlen_KV=0), attention(*given), atol=0, rtol=0)


def test_options_of_nattens_kernels_are_said_to_have_no_effect():
    given = operands()
    options = {"q_tile_size": 64, "kv_tile_size": 64, "backward_kv_splits": 2, "kernel_schedule": "pp"}
    forget_what_was_said()
    with pytest.warns(NoEffectWarning) as said:
        got = attention(*given, **options)
    assert [str(each.message).split()[1] for each in said] == list(options)
    assert said[0].filename == __file__
    torch.testing.assert_close(got, attention(*given), atol=0, rtol=0)


def test_a_backend_is_the_kernel_of_that_name():
    given = operands()
    with attn_core.record() as calls:
        attention(*given, backend="torch/math")
    assert [row.kernel for row in calls] == ["torch/math"]
    for backend in ("cutlass-fmha", "hopper-fmha", "blackwell-fmha", "flex-fmha"):
        with pytest.raises((KernelRefusedError, UnknownKernelError), match=f"natten/{backend}"):
            attention(*operands(dtype=torch.float64), backend=backend)
    with pytest.raises(UnknownBackendError, match="'cutlass-fmha'.*got 'cutlass-fna'"):
        attention(*given, backend="cutlass-fna")


Q, K, V = torch.zeros(1, 6, 2, 4), torch.zeros(1, 6, 2, 4), torch.zeros(1, 6, 2, 4)
OFFSETS = {"cumulative_seqlen_Q": int32(0, 2, 6), "cumulative_seqlen_KV": int32(0, 2, 6)}
BAD = {
    "dtype": ((Q, K, V.double()), {}, ConstraintError, "value: must have query's dtype torch.float32"),
    "nested": ((Q, torch.nested.nested_tensor([K[0]]), V), {}, UnsupportedError, "key: takes plain tensors"),
    "no-tensor": ((Q, 1, V), {}, InputTypeError, "key: takes a tensor, got int"),
    "rank": ((Q[0], K[0], V[0]), {}, InputError, "query: must be"),
    "head-dim": ((Q, K[..., :2], V), {}, InputError, "key: head_dim must be query's 4, got 2"),
    "causal": ((Q, K, V), {"is_causal": 1}, InputError, "is_causal: takes True or False, got 1"),
    "lengths-and-offsets": ((Q, K, V), {"seqlens_Q": int32(6), **OFFSETS}, InputError, "got both"),
    "one-side": ((Q, K, V), {"seqlens_Q": int32(6)}, InputError, "seqlens_KV: takes a tensor where seqlens_Q is given"),
    "other-side": ((Q, K, V), {"cumulative_seqlen_KV": int32(0, 6)}, InputError, "cumulative_seqlen_Q: takes a tensor"),
    "longest-alone": ((Q, K, V), {"max_seqlen_Q": 6}, InputError, "max_seqlen_Q, max_seqlen_KV: are for packed"),
    "longest-too-short": ((Q, K, V), {**OFFSETS, "max_seqlen_Q": 3}, InputError, "max_seqlen_Q: .* 4 or more; got 3"),
    "batch": (
        (torch.zeros(2, 6, 2, 4),) * 3, OFFSETS, ConstraintError, "query: packed sequences lie .* got batch=2",
    ),
    "floats": ((Q, K, V), {"seqlens_Q": torch.ones(6), "seqlens_KV": int32(6)}, ConstraintError, "seqlens_Q: must be"),
    "list": ((Q, K, V), {"seqlens_Q": [6], "seqlens_KV": [6]}, InputTypeError, "seqlens_Q: takes a tensor of integers"),
    "negative": ((Q, K, V), {"seqlens_Q": int32(7, -1), "seqlens_KV": int32(3, 3)}, InputError, "got -1 for"),
    "no-zero": ((Q, K, V), {**OFFSETS, "cumulative_seqlen_Q": int32(2, 6)}, InputError, "begins with 0"),
    "none": ((Q, K, V), {"seqlens_Q": int32(), "seqlens_KV": int32()}, InputError, "takes one sequence or more"),
    "numbers-of-sequences": (
        (Q, K, V), {"seqlens_Q": int32(6), "seqlens_KV": int32(3, 3)}, ConstraintError, "as many sequences",
    ),
    "other-total": ((Q, K, V), {"seqlens_Q": int32(5), "seqlens_KV": int32(6)}, InputError, "seqlen_q"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "options", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_an_error_that_names_it(given, options, error, match):
    with pytest.raises(error, match=match):
        attention(*given, **options)
