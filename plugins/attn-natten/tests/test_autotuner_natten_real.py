"""With a real NATTEN 0.21: the functions that list its configurations are there, and what they list runs.

Skipped where it is not installed; see `test_kernels_real.py`.
"""

from __future__ import annotations

import importlib.util

import attn_natten
import pytest
import torch
from attn_core.registry import registry
from attn_natten import autotuner, library, profile
from attn_natten.autotuner.cache import FORWARD
from attn_natten.autotuner.natten_tiles import FINDERS, OWN
from attn_natten.autotuner.settings import Settings, State
from attn_natten.kernels import fna

IS_THERE = importlib.util.find_spec("natten") is not None and library.NATTEN.is_supported(
    library.NATTEN.distributed() or ""
)
pytestmark = pytest.mark.skipif(not IS_THERE, reason="NATTEN 0.21 is not installed: nox -s natten")


@pytest.fixture(autouse=True)
def kernels_are_there():
    """Registers the kernels of the plugin, where it is on the path but not installed."""
    there = {kernel.name for kernel in registry.kernels("natten/*")}
    handles = [registry.register(kernel) for kernel in fna.KERNELS if kernel.name not in there]
    State.settings = Settings(warmup_steps_forward=0, steps_forward=1)
    autotuner.clear_autotuner_cache()
    yield
    State.settings = Settings()
    autotuner.clear_autotuner_cache()
    for handle in handles:
        handle.unregister()


def test_every_function_that_lists_configurations_is_there():
    for finders in FINDERS.values():
        for name in filter(None, finders):
            assert callable(getattr(library.NATTEN.module(), name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extents", [(40,), (9, 12)], ids="{0}".format)
def test_flex_runs_in_each_configuration_that_natten_lists(extents):
    torch.manual_seed(20261121)
    function = (attn_natten.na1d, attn_natten.na2d, attn_natten.na3d)[len(extents) - 1]
    x = [torch.randn(1, *extents, 2, 32) for _ in range(3)]
    want = function(*x, kernel_size=3, backend="torch/reference")
    attn_natten.use_autotuner(forward_pass=True)
    out = function(*x, kernel_size=3, backend="natten/flex-fna")
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    problem = profile.Case(
        spatial=extents,
        kernel_size=(3,) * len(extents),
        stride=(1,) * len(extents),
        dilation=(1,) * len(extents),
        is_causal=(False,) * len(extents),
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        head_dim_v=32,
    ).problem()
    listed = autotuner.families.FAMILIES["natten/flex-fna"].configurations(problem, backward=False, thorough=False)
    assert listed[0] == OWN
    assert len(listed) > 1
    assert len(FORWARD) == 1
    for tiles in listed:
        with autotuner.families.FAMILIES["natten/flex-fna"].within(tiles, None):
            out = function(*x, kernel_size=3, backend="natten/flex-fna")
        torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
