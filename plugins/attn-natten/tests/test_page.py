"""What NATTEN's page of its front end shows, with the import line changed: each call, and the result that it describes.

What is expected is computed in float64 over all pairs of tokens, with the neighborhoods of the oracle.
"""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import attn_natten
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from oracle import each, neighbors

SEED = 20261121
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ENVIRONMENT = ("has_half", "has_bfloat", "has_fna", "has_gemm", "has_tf32_gemm", "has_fp32_gemm", "has_fp64_gemm")

is_casual = pytest.mark.filterwarnings("ignore:is_casual is a misspelling:DeprecationWarning")
without_effect = pytest.mark.filterwarnings("ignore::attn_natten.errors.NoEffectWarning")


@pytest.fixture(autouse=True)
def seeded_and_without_the_autotuner_afterwards():
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        yield
    attn_natten.disable_autotuner()


def expected(
    query, key, value, kernel_size, dilation=1, is_causal=False, *, scale=None, rpb=None, more=None, some=None
):
    """Attention in float64; operands and result are heads-last, `[batch, *extents, num_heads, head_dim]`.

    Args:
        more: additional keys and values, `[batch, tokens, num_heads, head_dim]`.
        some: only these queries, by their flat indices; the result is then `[batch, queries, num_heads, head_dim]`.
    """
    extents = query.shape[1:-2]
    rank = len(extents)
    axes = list(zip(extents, *(each(values, rank) for values in (kernel_size, dilation, is_causal))))
    queries = torch.arange(math.prod(extents)) if some is None else some
    at = torch.unravel_index(queries, extents)
    keep, offset = torch.ones(len(queries), 1, dtype=torch.bool), torch.zeros(len(queries), 1, dtype=torch.long)
    for (extent, kernel, step, causal), i in zip(axes, at):
        seen = torch.zeros(extent, extent, dtype=torch.bool)
        for row, keys in zip(seen, neighbors(extent, kernel, step, causal=causal)):
            row[keys] = True
        keep = (keep[:, :, None] & seen[i][:, None, :]).flatten(1)
        entry = (torch.arange(extent) - i[:, None]).div(step, rounding_mode="floor") + kernel - 1
        entry = entry.clamp(0, 2 * kernel - 2)  # what lies beyond is masked
        offset = (offset[:, :, None] * (2 * kernel - 1) + entry[:, None, :]).flatten(1)
    q, k, v = (x.double().flatten(1, rank).transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * q[:, :, queries] @ k.mT
    if rpb is not None:
        logits = logits + rpb.double().flatten(1)[:, offset]
    logits = logits.masked_fill(~keep, -math.inf)
    if more is not None:
        keys, values = (x.double().transpose(1, 2) for x in more)
        logits = torch.cat([logits, scale * q[:, :, queries] @ keys.mT], dim=-1)
        v = torch.cat([v, values], dim=2)
    out = (logits.softmax(-1) @ v).transpose(1, 2)
    return out if some is not None else out.unflatten(1, extents)


def drawn(*shape, count=3):
    return list(torch.randn(count, *shape))


def heads_first(*tensors):
    return [x.movedim(-2, 1) for x in tensors]


# Modules

MODULES = {
    "1-D, dilated and causal": (1, {"kernel_size": 7, "dilation": 2, "is_causal": True}, (23,)),
    "2-D, dilated": (2, {"kernel_size": 7, "dilation": 2}, (15, 14)),
    "3-D, dilated": (3, {"kernel_size": 7, "dilation": 2}, (14, 14, 14)),
    "3-D, a video: tuples, the time axis causal": (
        3,
        {"kernel_size": (7, 9, 9), "dilation": (1, 1, 1), "is_causal": (True, False, False)},
        (8, 9, 10),
    ),
    "3-D, relative positional biases": (
        3,
        {"kernel_size": (7, 9, 9), "dilation": (1, 1, 1), "is_causal": False, "rel_pos_bias": True},
        (8, 9, 10),
    ),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("is_fused", [False, True], ids=["unfused", "fused"])
@without_effect
def test_a_module_of_the_page_computes_neighborhood_attention_between_its_two_linear_layers(name, is_fused):
    from attn_natten import (
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
        use_fused_na,
    )

    rank, arguments, extents = MODULES[name]
    kind = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)[rank - 1]
    layer = kind(dim=128, num_heads=4, **arguments)
    x = torch.randn(1, *extents, 128)
    use_fused_na(is_fused)
    with torch.no_grad():
        out = layer(x)
        query, key, value = layer.qkv(x).unflatten(-1, (3, 4, 32)).movedim(-3, 0)
        where = {key: given for key, given in arguments.items() if key != "rel_pos_bias"}
        some = torch.randint(math.prod(extents), (150,))
        within = expected(query, key, value, **where, rpb=layer.rpb, some=some)
        want = layer.proj(within.flatten(2).float())
    assert out.shape == x.shape
    torch.testing.assert_close(out.flatten(1, rank)[:, some], want, **CLOSE)


def test_relative_positional_biases_are_there_unless_causal_masking_is():
    with pytest.raises(NotImplementedError, match="rpb"):
        attn_natten.NeighborhoodAttention1D(dim=8, num_heads=2, kernel_size=3, is_causal=True, rel_pos_bias=True)


@without_effect
def test_use_fused_na_and_back_again_is_a_switch_of_the_modules():
    from attn_natten import is_fused_na_enabled, use_fused_na

    states = [is_fused_na_enabled()]
    use_fused_na()
    states.append(is_fused_na_enabled())
    use_fused_na(False)
    states.append(is_fused_na_enabled())
    assert states == [False, True, False]


@without_effect
def test_the_autotuner_changes_results_by_rounding_alone():
    from attn_natten import disable_autotuner, is_autotuner_enabled, use_autotuner, use_fused_na

    layer = attn_natten.NeighborhoodAttention2D(dim=32, num_heads=4, kernel_size=7)
    x = torch.randn(1, 14, 15, 32)
    use_fused_na(True)
    untuned = layer(x)
    use_autotuner(forward_pass=True, backward_pass=False)
    assert is_autotuner_enabled()
    tuned = [layer(x) for _ in range(2)]
    use_fused_na(False)
    unfused = layer(x)
    disable_autotuner()
    assert not is_autotuner_enabled()
    use_autotuner(False, False)
    assert not is_autotuner_enabled()
    for result in (*tuned, unfused, layer(x)):
        torch.testing.assert_close(result, untuned, **CLOSE)


@without_effect
def test_kv_parallelism_is_turned_on_and_off():
    from attn_natten import (
        is_kv_parallelism_in_fused_na_enabled,
        use_kv_parallelism_in_fused_na,
    )

    use_kv_parallelism_in_fused_na(True)
    assert is_kv_parallelism_in_fused_na_enabled()
    use_kv_parallelism_in_fused_na(False)
    assert not is_kv_parallelism_in_fused_na_enabled()


@pytest.mark.parametrize("preference", ["strict", "unrestricted", "default"])
@without_effect
def test_the_memory_preference_has_three_settings(preference):
    from attn_natten import set_memory_usage_preference

    set_memory_usage_preference(preference)
    for each_one in ("strict", "unrestricted", "default"):
        assert getattr(attn_natten, f"is_memory_usage_{each_one}")() is (each_one == preference)


# Unfused operations


@is_casual
def test_unfused_1_d_with_causal_masking():
    from attn_natten.functional import na1d_av, na1d_qk

    query, key, value = drawn(2, 30, 3, 8)
    query_1d, key_1d, value_1d = heads_first(query, key, value)

    attn_1d = na1d_qk(
        query_1d, key_1d,
        kernel_size=7, dilation=4, is_casual=True,
    )  # fmt: skip
    attn_1d = attn_1d.softmax(dim=-1)
    output_1d = na1d_av(
        attn_1d, value_1d,
        kernel_size=7, dilation=4, is_casual=True,
    )  # fmt: skip

    assert attn_1d.shape == (2, 3, 30, 7)
    want = expected(query, key, value, 7, 4, True, scale=1.0)
    torch.testing.assert_close(output_1d.movedim(1, -2).double(), want, **CLOSE)


def test_unfused_2_d_with_relative_positional_biases():
    from attn_natten.functional import na2d_av, na2d_qk

    query, key, value = drawn(1, 28, 30, 2, 4)
    query_2d, key_2d, value_2d = heads_first(query, key, value)
    rpb_2d = torch.randn(2, 13, 13)

    attn_2d = na2d_qk(
        query_2d, key_2d,
        rpb=rpb_2d,
        kernel_size=7, dilation=4,
    )  # fmt: skip
    attn_2d = attn_2d.softmax(dim=-1)
    output_2d = na2d_av(
        attn_2d, value_2d,
        kernel_size=7, dilation=4,
    )  # fmt: skip

    assert attn_2d.shape == (1, 2, 28, 30, 49)
    want = expected(query, key, value, 7, 4, scale=1.0, rpb=rpb_2d)
    torch.testing.assert_close(output_2d.movedim(1, -2).double(), want, **CLOSE)


def test_unfused_3_d_with_varying_parameters():
    from attn_natten.functional import na3d_av, na3d_qk

    query, key, value = drawn(1, 8, 9, 10, 1, 4)
    query_3d, key_3d, value_3d = heads_first(query, key, value)

    attn_3d = na3d_qk(
        query_3d, key_3d,
        kernel_size=(7, 9, 9),
        dilation=(1, 1, 1),
        is_causal=(True, False, False),
    )  # fmt: skip
    attn_3d = attn_3d.softmax(dim=-1)
    output_3d = na3d_av(
        attn_3d, value_3d,
        kernel_size=(7, 9, 9),
        dilation=(1, 1, 1),
        is_causal=(True, False, False),
    )  # fmt: skip

    assert attn_3d.shape == (1, 1, 8, 9, 10, 7 * 9 * 9)
    want = expected(query, key, value, (7, 9, 9), 1, (True, False, False), scale=1.0)
    torch.testing.assert_close(output_3d.movedim(1, -2).double(), want, **CLOSE)


def test_unfused_operations_take_additional_keys_and_values():
    query, key, value = drawn(1, 9, 8, 2, 4)
    keys, values = drawn(1, 5, 2, 4, count=2)
    (q, k, v), (more_keys, more_values) = heads_first(query, key, value), heads_first(keys, values)
    weights = attn_natten.na2d_qk(q, k, kernel_size=5, additional_keys=more_keys).softmax(-1)
    out = attn_natten.na2d_av(weights, v, kernel_size=5, additional_values=more_values)
    want = expected(query, key, value, 5, scale=1.0, more=(keys, values))
    torch.testing.assert_close(out.movedim(1, -2).double(), want, **CLOSE)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_unfused_operations_take_nested_tensors_forward():
    alone = [[torch.randn(1, 2, *extents, 8) for _ in range(3)] for extents in ((7, 9), (12, 8))]
    query, key, value = (torch.nested.nested_tensor(list(each_one)) for each_one in zip(*alone))
    weights = attn_natten.na2d_qk(query, key, kernel_size=7)
    weights = torch.nested.nested_tensor([each_one.softmax(-1) for each_one in weights.unbind()])
    out = attn_natten.na2d_av(weights, value, kernel_size=7)
    for got, (q, k, v) in zip(out.unbind(), alone, strict=True):
        want = expected(*(x.movedim(1, -2) for x in (q, k, v)), 7, scale=1.0)
        torch.testing.assert_close(got.movedim(1, -2).double(), want, **CLOSE)


def test_unfused_operations_have_reverse_and_forward_mode_differentiation():
    query, key, value, *tangents = (x.double() for x in drawn(1, 2, 12, 4, count=6))

    def whole(query, key, value):
        weights = attn_natten.na1d_qk(query, key, kernel_size=5, dilation=2).softmax(-1)
        return attn_natten.na1d_av(weights, value, kernel_size=5, dilation=2)

    operands, grad = (query, key, value), torch.randn(1, 2, 12, 4, dtype=torch.double)
    with torch.autograd.forward_ad.dual_level():
        dual = whole(*map(torch.autograd.forward_ad.make_dual, operands, tangents))
        forward = torch.autograd.forward_ad.unpack_dual(dual).tangent
    leaves = [x.clone().requires_grad_() for x in operands]
    reverse = torch.autograd.grad(whole(*leaves), leaves, grad)
    torch.testing.assert_close((forward * grad).sum(), sum((x * y).sum() for x, y in zip(reverse, tangents)))
    assert torch.autograd.gradcheck(whole, leaves)


def test_biases_of_unfused_operations_exclude_causal_masking_and_forward_mode():
    query, key = drawn(1, 2, 9, 4, count=2)
    rpb = torch.randn(2, 5)
    with pytest.raises(NotImplementedError, match="rpb"):
        attn_natten.na1d_qk(query, key, kernel_size=3, is_causal=True, rpb=rpb)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(ValueError, match="rpb"):
            attn_natten.na1d_qk(dual, key, kernel_size=3, rpb=rpb)


# Fused operations


@is_casual
def test_fused_1_d_with_causal_masking():
    from attn_natten.functional import na1d

    query_1d, key_1d, value_1d = drawn(2, 30, 3, 8)
    output_1d = na1d(
        query_1d, key_1d, value_1d,
        kernel_size=7, dilation=4, is_casual=True
    )  # fmt: skip
    torch.testing.assert_close(output_1d.double(), expected(query_1d, key_1d, value_1d, 7, 4, True), **CLOSE)


@is_casual
def test_fused_2_d():
    from attn_natten.functional import na2d

    query_2d, key_2d, value_2d = drawn(1, 29, 28, 2, 8)
    output_2d = na2d(
        query_2d, key_2d, value_2d,
        kernel_size=7, dilation=4, is_casual=False
    )  # fmt: skip
    torch.testing.assert_close(output_2d.double(), expected(query_2d, key_2d, value_2d, 7, 4), **CLOSE)


@is_casual
def test_fused_3_d():
    from attn_natten.functional import na3d

    query_3d, key_3d, value_3d = drawn(1, 28, 28, 28, 1, 4)
    output_3d = na3d(
        query_3d, key_3d, value_3d,
        kernel_size=7, dilation=4, is_casual=False
    )  # fmt: skip
    some = torch.cat([torch.tensor([0, 28**3 - 1]), torch.randint(28**3, (60,))])
    want = expected(query_3d, key_3d, value_3d, 7, 4, some=some)
    torch.testing.assert_close(output_3d.flatten(1, 3)[:, some].double(), want, **CLOSE)


@is_casual
def test_fused_2_d_with_a_value_for_each_axis():
    from attn_natten.functional import na2d

    query_2d, key_2d, value_2d = drawn(1, 9, 11, 2, 8)
    output_2d = na2d(
        query_2d, key_2d, value_2d,
        kernel_size=(7, 3), dilation=(1, 3), is_casual=(True, False)
    )  # fmt: skip
    want = expected(query_2d, key_2d, value_2d, (7, 3), (1, 3), (True, False))
    torch.testing.assert_close(output_2d.double(), want, **CLOSE)


@is_casual
def test_fused_3_d_with_a_value_for_each_axis():
    from attn_natten.functional import na3d

    query_3d, key_3d, value_3d = drawn(1, 8, 5, 6, 2, 8)
    output_3d = na3d(
        query_3d, key_3d, value_3d,
        kernel_size=(7, 3, 5), dilation=(1, 1, 1), is_casual=(True, False, False)
    )  # fmt: skip
    want = expected(query_3d, key_3d, value_3d, (7, 3, 5), 1, (True, False, False))
    torch.testing.assert_close(output_3d.double(), want, **CLOSE)


@pytest.mark.parametrize("function", ["na1d", "na2d", "na3d", "na1d_qk", "na1d_av"])
def test_the_misspelled_keyword_of_the_page_is_taken_and_said_to_be_deprecated(function):
    rank = int(function[2])
    operands = drawn(1, *(6,) * rank, 2, 4)
    if function.endswith("qk"):
        operands = heads_first(*operands[:2])
    if function.endswith("av"):
        operands = [torch.randn(1, 2, 6, 3), torch.randn(1, 2, 6, 4)]
    op = getattr(importlib.import_module("attn_natten.functional"), function)
    with pytest.warns(DeprecationWarning, match="is_casual"):
        misspelled = op(*operands, kernel_size=3, is_casual=True)
    assert torch.equal(misspelled, op(*operands, kernel_size=3, is_causal=True))
    with pytest.raises(ValueError, match="is_causal"):
        op(*operands, kernel_size=3, is_casual=True, is_causal=True)


@pytest.mark.parametrize("option", ["default", "query scaled", "query and key scaled"])
def test_the_scale_is_applied_once_wherever_it_is_done(option):
    from attn_natten.functional import na2d

    q, k, v = drawn(1, 9, 8, 2, 16)
    attn_scale, attn_scale_sqrt = 16**-0.5, 16**-0.25
    if option == "default":
        o = na2d(
            q, k, v,
            kernel_size=(7, 3),
        )  # fmt: skip
    elif option == "query scaled":
        q_1 = q * attn_scale
        o = na2d(
            q_1, k, v,
            kernel_size=(7, 3),
            scale=1.0,
        )  # fmt: skip
    else:
        q_2 = q * attn_scale_sqrt
        k_2 = k * attn_scale_sqrt
        o = na2d(
            q_2, k_2, v,
            kernel_size=(7, 3),
            scale=1.0,
        )  # fmt: skip
    torch.testing.assert_close(o.double(), expected(q, k, v, (7, 3)), **CLOSE)


# Static functions


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_cuda_every_check_of_the_environment_says_no():
    from attn_natten import has_cuda
    from attn_natten.utils import get_device_cc

    assert has_cuda() is False
    for name in ENVIRONMENT:
        for home in ("attn_natten", "attn_natten.functional"):
            check = getattr(importlib.import_module(home), name)
            assert check() is False
            assert check(0) is False
    for device in ((), (0,)):
        with pytest.raises(RuntimeError, match="CUDA"):
            get_device_cc(*device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_with_cuda_every_check_of_the_environment_answers():
    from attn_natten import has_cuda
    from attn_natten.utils import get_device_cc

    assert has_cuda() is True
    assert (
        get_device_cc()
        == get_device_cc(0)
        == 10 * torch.cuda.get_device_capability(0)[0] + (torch.cuda.get_device_capability(0)[1])
    )
    for name in ENVIRONMENT:
        check = getattr(importlib.import_module("attn_natten.functional"), name)
        assert check() is check(0)
        assert check() in (True, False)


@pytest.mark.parametrize("kind", ["gemm", "tiled"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@without_effect
def test_the_dispatcher_settings_return_and_keep_their_state(kind):
    functional = importlib.import_module("attn_natten.functional")
    is_enabled = getattr(attn_natten, f"is_{kind}_na_enabled")
    query, key = drawn(1, 2, 9, 9, 32, count=2)
    results = []
    for verb, state in (("disable", False), ("enable", True)):
        assert getattr(functional, f"{verb}_{kind}_na")() is state
        assert is_enabled() is state
        results.append(functional.na2d_qk(query, key, kernel_size=7))
    torch.testing.assert_close(*results)


def test_every_name_that_the_page_imports_is_where_the_page_has_it():
    top = (
        *("NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D", "use_fused_na"),
        *("use_autotuner", "disable_autotuner", "use_kv_parallelism_in_fused_na", "set_memory_usage_preference"),
        *("is_kv_parallelism_in_fused_na_enabled", "has_cuda", "has_half", "has_bfloat", "has_fna"),
    )
    functional = (
        *(f"na{rank}d{kind}" for rank in (1, 2, 3) for kind in ("", "_qk", "_av")),
        *("has_gemm", "has_tf32_gemm", "has_fp32_gemm", "has_fp64_gemm"),
        *(f"{verb}_{kind}_na" for verb in ("enable", "disable") for kind in ("gemm", "tiled")),
    )
    for home, names in {"": top, ".functional": functional, ".utils": ("get_device_cc",)}.items():
        module = importlib.import_module(f"attn_natten{home}")
        assert [name for name in names if not hasattr(module, name)] == []


def test_code_that_imports_natten_runs_where_it_is_told_that_this_is_it():
    page = Path(__file__).parents[3] / "docs" / "how-to" / "neighborhood-attention-from-natten-0.17.md"
    (alias,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    theirs = """
import torch
from natten import NeighborhoodAttention2D, use_fused_na
from natten.functional import na2d
from natten.flops import fna_flop_count
from natten.utils import get_device_cc

print(list(NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3)(torch.randn(1, 4, 5, 8)).shape))
"""
    ran = subprocess.run([sys.executable, "-c", alias + theirs], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "[1, 4, 5, 8]\n"
