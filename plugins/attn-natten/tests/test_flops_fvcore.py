"""fvcore: multiply-accumulates of modules, where it is installed; and what is said where it is not."""

from __future__ import annotations

import sys

import attn_natten
import pytest
import torch
from attn_core.integrations.missing import MissingPackageError
from attn_natten import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D, add_natten_handle

CASES = {
    "line": (NeighborhoodAttention1D, (12,), {"kernel_size": 5, "dilation": 2}),
    "plane": (NeighborhoodAttention2D, (8, 9), {"kernel_size": (3, 5), "is_causal": (False, True)}),
    "plane relative": (NeighborhoodAttention2D, (8, 9), {"kernel_size": 3, "rel_pos_bias": True}),
    "space": (NeighborhoodAttention3D, (4, 5, 6), {"kernel_size": 3}),
}


def count_of(extents, channels, parameters):
    tokens = torch.Size(extents).numel()
    width = parameters["kernel_size"]
    width = torch.Size(width).numel() if isinstance(width, tuple) else width ** len(extents)
    return 2 * (tokens * 4 * channels**2 + 2 * tokens * width * channels)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_a_module_counts_half_its_flops(name, fused):
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    kind, extents, parameters = CASES[name]
    torch.manual_seed(20261121)
    module, x = kind(32, 4, **parameters), torch.randn(2, *extents, 32)
    attn_natten.use_fused_na(fused, kv_parallel=False)
    want = module(x)
    macs = count_of(extents, 32, parameters)
    assert attn_natten.get_flops(module, x, disable_warnings=True) == macs
    counter = fvcore.FlopCountAnalysis(module, x)
    assert add_natten_handle(counter) is counter
    assert counter.unsupported_ops_warnings(False).total() == macs
    torch.testing.assert_close(module(x), want)


def test_without_fvcore_the_package_works_and_the_call_says_what_to_type(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "fvcore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fvcore", None)
    from attn_natten import flops

    assert flops.na_qk_flop_count((1, 9, 2, 8), (1, 9, 2, 8), 3, 1, False, True) == 2 * 2 * 9 * 3 * 8
    with pytest.raises(
        MissingPackageError, match=r"get_flops needs fvcore.nn(.|\n)*pip install 'attn-natten\[flops\]'"
    ):
        attn_natten.get_flops(torch.nn.Linear(2, 2), torch.randn(1, 2))
