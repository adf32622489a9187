"""NeighborhoodAttention1D, 2D, 3D: parameters of NATTEN's names, fused and unfused alike, and what they refuse."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
import sys

import attn_natten
import pytest
import torch
from attn_core import AttnError
from attn_core.errors import InputError
from attn_natten import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D, use_fused_na
from attn_natten.errors import ConstraintError, UnsupportedError
from torch.nn.functional import linear, pad, scaled_dot_product_attention

LAYERS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
EXTENTS = {1: (17,), 2: (9, 8), 3: (6, 7, 6)}
each_rank = pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)


@pytest.fixture(autouse=True)
def _seed_and_switch():
    torch.manual_seed(20261121)
    yield
    use_fused_na(False)


def fused(layer, x):
    use_fused_na()
    try:
        return layer(x)
    finally:
        use_fused_na(False)


# What the page shows


def test_layers_of_the_page_run_as_they_are_written():
    na1d = NeighborhoodAttention1D(dim=128, num_heads=4, kernel_size=7, dilation=2, is_causal=True)
    na2d = NeighborhoodAttention2D(dim=128, num_heads=4, kernel_size=7, dilation=2)
    na3d = NeighborhoodAttention3D(dim=128, num_heads=4, kernel_size=7, dilation=2)
    assert na1d(torch.randn(2, 16, 128)).shape == (2, 16, 128)
    assert na2d(torch.randn(1, 15, 14, 128)).shape == (1, 15, 14, 128)
    assert fused(na3d, torch.randn(1, 14, 15, 14, 128)).shape == (1, 14, 15, 14, 128)
    arguments = {"dim": 128, "kernel_size": (7, 9, 9), "dilation": (1, 1, 1), "num_heads": 4}
    x = torch.randn(1, 7, 9, 10, 128)
    assert NeighborhoodAttention3D(is_causal=(True, False, False), **arguments)(x).shape == x.shape
    assert NeighborhoodAttention3D(is_causal=False, rel_pos_bias=True, **arguments)(x).shape == x.shape


# Fused and unfused


KINDS = {
    "plain": {"kernel_size": 3},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "even": {"kernel_size": 4},
    "causal": {"kernel_size": 5, "is_causal": True},
    "rpb": {"kernel_size": 5, "rel_pos_bias": True},
    "scale": {"kernel_size": 3, "qk_scale": 0.3},
    "scale-of-zero": {"kernel_size": 3, "qk_scale": 0.0},
    "no-bias": {"kernel_size": 3, "qkv_bias": False},
}


@each_rank
@pytest.mark.parametrize("kind", KINDS)
def test_fused_and_unfused_give_the_same_with_gradients(rank, kind):
    layer = LAYERS[rank](16, 2, **KINDS[kind])
    x = torch.randn(2, *EXTENTS[rank], 16, requires_grad=True)
    leaves = [x, *layer.parameters()]
    outs = layer(x), fused(layer, x)
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(x)
    for one, other in zip(*(torch.autograd.grad((out * weight).sum(), leaves) for out in outs)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@each_rank
def test_a_window_of_the_whole_grid_is_plain_attention_between_projections(rank):
    layer = LAYERS[rank](16, 2, kernel_size=EXTENTS[rank])
    x = torch.randn(2, *EXTENTS[rank], 16)
    tokens = x.flatten(1, -2)
    qkv = linear(tokens, layer.qkv.weight, layer.qkv.bias).reshape(2, -1, 3, 2, 8)  # in this order
    out = scaled_dot_product_attention(*qkv.transpose(1, 3).unbind(2)).transpose(1, 2).flatten(-2)
    want = linear(out, layer.proj.weight, layer.proj.bias).reshape(x.shape)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(fused(layer, x), want)


def test_a_stride_is_fused_whatever_the_switch_says():
    layer = NeighborhoodAttention2D(16, 2, kernel_size=4, stride=(2, 4))
    x = torch.randn(2, 9, 8, 16)
    out = layer(x)
    assert not torch.allclose(out, NeighborhoodAttention2D(16, 2, kernel_size=4)(x))
    torch.testing.assert_close(out, fused(layer, x), atol=0, rtol=0)
    qkv = layer.qkv(x).reshape(2, 9, 8, 3, 2, 8)
    want = layer.proj(attn_natten.na2d(*qkv.unbind(3), 4, stride=(2, 4)).flatten(-2))
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("is_fused", [False, True], ids=["unfused", "fused"])
def test_autocast_runs_both_in_its_dtype(is_fused):
    layer = NeighborhoodAttention2D(16, 2, kernel_size=3, rel_pos_bias=True)
    x = torch.randn(2, 9, 8, 16)
    want = layer(x)
    use_fused_na(is_fused)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), want, atol=3e-2, rtol=0)


@pytest.mark.parametrize("is_fused", [False, True], ids=["unfused", "fused"])
def test_a_layer_is_one_graph(is_fused):
    torch._dynamo.reset()
    layer = NeighborhoodAttention2D(16, 2, kernel_size=3, rel_pos_bias=True, attn_drop=0.1).eval()
    x = torch.randn(2, 9, 8, 16)
    use_fused_na(is_fused)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    use_fused_na(not is_fused)
    torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()


# Parameters and checkpoints


@each_rank
def test_parameters_have_nattens_names_and_shapes(rank):
    layer = LAYERS[rank](dim=24, num_heads=3, kernel_size=5, rel_pos_bias=True)
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "rpb": (3, *(9,) * rank),
        "qkv.weight": (72, 24),
        "qkv.bias": (72,),
        "proj.weight": (24, 24),
        "proj.bias": (24,),
    }
    assert LAYERS[rank](24, 3, 5).rpb is None
    assert "rpb" not in LAYERS[rank](24, 3, 5).state_dict()
    assert LAYERS[rank](24, 3, 5, qkv_bias=False).qkv.bias is None


def test_a_checkpoint_of_natten_loads_and_gives_what_it_says():
    layer = NeighborhoodAttention1D(dim=8, num_heads=2, kernel_size=3, rel_pos_bias=True)
    generator = torch.Generator().manual_seed(1)
    checkpoint = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in layer.state_dict().items()}
    assert str(layer.load_state_dict(checkpoint)) == "<All keys matched successfully>"
    x = torch.randn(1, 5, 8)
    qkv = linear(x, checkpoint["qkv.weight"], checkpoint["qkv.bias"]).reshape(5, 3, 2, 4)
    rows = []
    for i in range(5):
        start = min(max(i - 1, 0), 2)
        heads = []
        for h in range(2):
            logits = torch.stack(
                [qkv[i, 0, h] @ qkv[j, 1, h] / 2 + checkpoint["rpb"][h, j - i + 2] for j in range(start, start + 3)]
            )
            heads.append(logits.softmax(0) @ qkv[start : start + 3, 2, h])
        rows.append(torch.cat(heads))
    want = linear(torch.stack(rows), checkpoint["proj.weight"], checkpoint["proj.bias"])[None]
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(fused(layer, x), want)


def test_a_table_of_relative_positions_starts_normal_with_a_deviation_of_002():
    rpb = NeighborhoodAttention2D(64, 16, kernel_size=13, rel_pos_bias=True).rpb
    assert rpb.requires_grad
    assert abs(rpb.std().item() - 0.02) < 1e-3
    assert abs(rpb.mean().item()) < 1e-3


def test_parameters_are_drawn_in_nattens_order():
    torch.manual_seed(7)
    layer = NeighborhoodAttention2D(16, 2, kernel_size=3, rel_pos_bias=True)
    torch.manual_seed(7)
    qkv = torch.nn.Linear(16, 48)
    rpb = torch.nn.init.trunc_normal_(torch.zeros(2, 5, 5), std=0.02, mean=0.0, a=-2.0, b=2.0)
    proj = torch.nn.Linear(16, 16)
    for got, want in ((layer.qkv.weight, qkv.weight), (layer.rpb, rpb), (layer.proj.weight, proj.weight)):
        assert torch.equal(got, want)


def test_a_layer_can_be_copied_and_pickled():
    layer = NeighborhoodAttention2D(16, 2, kernel_size=3, rel_pos_bias=True)
    x = torch.randn(1, 4, 4, 16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x), atol=0, rtol=0)


def test_both_names_of_the_width_are_taken():
    for arguments in ({"dim": 16}, {"embed_dim": 16}):
        layer = NeighborhoodAttention1D(num_heads=2, kernel_size=3, use_experimental_ops=True, **arguments)
        assert (layer.embed_dim, layer.head_dim, layer.scale) == (16, 8, 8**-0.5)


def test_it_prints_what_it_is():
    layer = NeighborhoodAttention2D(16, 2, kernel_size=(3, 5), is_causal=(True, False))
    assert layer.extra_repr() == (
        "head_dim=8, num_heads=2, kernel_size=(3, 5), dilation=(1, 1), is_causal=(True, False), has_bias=False"
    )
    assert "stride=(2, 2), dilation=(1, 1)" in NeighborhoodAttention2D(16, 2, kernel_size=3, stride=2).extra_repr()
    assert "has_bias=True" in repr(NeighborhoodAttention1D(16, 2, kernel_size=3, rel_pos_bias=True))


# Dropout


def test_unfused_weights_are_dropped_in_training_alone():
    layer = NeighborhoodAttention1D(16, 2, kernel_size=3, attn_drop=0.5)
    x = torch.randn(2, 9, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), atol=0, rtol=0)
    layer.attn_drop.p = 0.0
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), atol=0, rtol=0)


def test_fused_weights_are_not_dropped_and_each_layer_logs_that_once_as_an_error(caplog):
    layer = NeighborhoodAttention1D(16, 2, kernel_size=3, attn_drop=0.5)
    x = torch.randn(2, 9, 16)
    use_fused_na()
    caplog.clear()
    with caplog.at_level(logging.ERROR, "attn_natten"):
        layer.eval()
        want = layer(x)
        assert not caplog.records
        layer.train()
        for _ in range(2):
            torch.testing.assert_close(layer(x), want, atol=0, rtol=0)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "NeighborhoodAttention1D: attn_drop=0.5 is NOT applied" in caplog.text
        NeighborhoodAttention1D(16, 2, kernel_size=3, attn_drop=0.5)(x)
        assert len(caplog.records) == 2


@pytest.mark.parametrize("is_fused", [False, True], ids=["unfused", "fused"])
def test_the_result_is_dropped_in_training(is_fused):
    layer = NeighborhoodAttention1D(16, 2, kernel_size=3, proj_drop=0.5)
    use_fused_na(is_fused)
    assert (layer(torch.randn(2, 9, 16)) == 0).float().mean() > 0.3
    assert not (layer.eval()(torch.randn(2, 9, 16)) == 0).any()


# Small inputs


@each_rank
def test_an_input_smaller_than_a_window_is_an_error_unless_it_shall_be_padded(rank):
    small, whole = (3,) * rank, (6,) * rank
    x = torch.randn(2, *small, 16)
    for is_fused in (False, True):
        use_fused_na(is_fused)
        layer = LAYERS[rank](16, 2, kernel_size=3, dilation=2)
        with pytest.raises(ConstraintError, match="is 3, with kernel_size=3 . dilation=2 = 6"):
            layer(x)
        layer.pad_small_inputs = True
        padded = pad(x, (0, 0, *(0, 3) * rank))
        assert padded.shape == (2, *whole, 16)
        torch.testing.assert_close(layer(x), layer(padded)[(slice(None), *(slice(3),) * rank)])


def test_only_what_is_too_small_is_padded():
    layer = NeighborhoodAttention2D(16, 2, kernel_size=(5, 3), pad_small_inputs=True)
    for extents in ((3, 9), (5, 2), (6, 7), (1, 1)):
        assert layer(torch.randn(2, *extents, 16)).shape == (2, *extents, 16)
    plain = NeighborhoodAttention2D(16, 2, kernel_size=(5, 3))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 7, 16)
    torch.testing.assert_close(layer(x), plain(x), atol=0, rtol=0)


# Bad input

BAD = {
    "heads-do-not-divide": (
        {"embed_dim": 10, "num_heads": 4},
        InputError,
        "embed_dim: must be a multiple of num_heads=4, got 10",
    ),
    "no-heads": ({"num_heads": 0}, InputError, "num_heads: takes an int >= 1, got 0"),
    "width-a-float": ({"embed_dim": 16.0}, InputError, "embed_dim: takes an int >= 1, got 16.0"),
    "two-widths": ({"dim": 16}, InputError, "dim, embed_dim: two names of one argument"),
    "kernel-of-three-axes": ({"kernel_size": (3, 3, 3)}, InputError, "kernel_size: takes an int, or a tuple of 2 ints"),
    "kernel-of-one": ({"kernel_size": 1}, RuntimeError, "greater than 1"),
    "dilation": ({"dilation": 0}, ConstraintError, "dilation: must be an int >= 1, got 0"),
    "stride": ({"stride": 4}, ConstraintError, "stride: must be from 1 to kernel_size=3"),
    "causal": ({"is_causal": 1}, InputError, "is_causal: takes True or False"),
    "rpb-and-causal": ({"rel_pos_bias": True, "is_causal": (True, False)}, NotImplementedError, "rpb: .* causal"),
    "rpb-and-an-even-kernel": ({"rel_pos_bias": True, "kernel_size": 4}, ConstraintError, "rpb: .* odd"),
    "rpb-no-bool": ({"rel_pos_bias": 1}, InputError, "rel_pos_bias: takes True or False, got 1"),
    "attn-drop": ({"attn_drop": 1.5}, InputError, "attn_drop: takes a number from 0 to 1, got 1.5"),
    "proj-drop": ({"proj_drop": "much"}, InputError, "proj_drop: takes a number from 0 to 1, got 'much'"),
    "scale": ({"qk_scale": "small"}, InputError, "qk_scale: takes a number or None, got 'small'"),
}


@pytest.mark.parametrize(("arguments", "error", "match"), BAD.values(), ids=BAD)
def test_a_bad_argument_is_an_error_that_names_it(arguments, error, match):
    with pytest.raises(error, match=match):
        NeighborhoodAttention2D(**{"embed_dim": 16, "num_heads": 2, "kernel_size": 3} | arguments)


def test_a_missing_argument_is_named():
    with pytest.raises(TypeError, match="NeighborhoodAttention2D: missing the argument 'num_heads'"):
        NeighborhoodAttention2D(16, kernel_size=3)


def test_what_nattens_versions_order_differently_is_taken_by_keyword_alone():
    with pytest.raises(TypeError, match="NeighborhoodAttention2D: takes .* got 1 more by position: 2. The fourth"):
        NeighborhoodAttention2D(16, 2, 3, 2)


@each_rank
@pytest.mark.parametrize("is_fused", [False, True], ids=["unfused", "fused"])
def test_an_input_of_another_rank_or_width_is_an_error(rank, is_fused):
    layer = LAYERS[rank](16, 2, kernel_size=3)
    use_fused_na(is_fused)
    with pytest.raises(ValueError, match=rf"x: must be \[batch, .*\], {rank + 2} dimensions; got {rank + 1}"):
        layer(torch.randn(*EXTENTS[rank], 16))
    with pytest.raises(ValueError, match="x: embed_dim must be 16, got 8"):
        layer(torch.randn(2, *EXTENTS[rank], 8))
    with pytest.raises(TypeError, match="x: takes a tensor, got list"):
        layer([1.0])


def test_errors_are_of_attn():
    assert issubclass(ConstraintError, AttnError)
    assert issubclass(UnsupportedError, AttnError)


# Deprecated paths


@each_rank
def test_the_old_path_of_a_layer_warns_and_leads_to_it(rank):
    name = f"attn_natten.natten{rank}d"
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} is deprecated; import NeighborhoodAttention{rank}D") as said:
        module = importlib.import_module(name)
    assert len(said) == 1
    assert getattr(module, f"NeighborhoodAttention{rank}D") is LAYERS[rank]
