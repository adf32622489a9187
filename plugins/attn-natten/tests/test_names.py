"""The names under which NATTEN is imported, and that NATTEN itself is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import attn_natten
import pytest
import torch
from attn_natten import functional, machine, utils

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from natten_doubled import doubled

#: What the front page of NATTEN 0.17 imports, by module.
PAGE = {
    "": (
        "NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D use_fused_na use_autotuner"
        " disable_autotuner use_kv_parallelism_in_fused_na is_kv_parallelism_in_fused_na_enabled"
        " set_memory_usage_preference has_cuda has_half has_bfloat has_fna"
    ),
    "functional": (
        "na1d_qk na1d_av na2d_qk na2d_av na3d_qk na3d_av na1d na2d na3d has_gemm has_tf32_gemm has_fp32_gemm"
        " has_fp64_gemm disable_gemm_na enable_gemm_na disable_tiled_na enable_tiled_na"
    ),
    "utils": "get_device_cc",
}
#: What NATTEN 0.17.5 and 0.21 have at the top, and what stands here for it.
TOP = (
    "are_deterministic_algorithms_enabled disable_gemm_na disable_tf32 disable_tiled_na enable_gemm_na enable_tf32"
    " enable_tiled_na force_flex_attention get_memory_usage_preference has_fp32_gemm has_fp64_gemm has_fused_na"
    " has_gemm has_tf32_gemm is_autotuner_enabled is_autotuner_enabled_for_backward is_autotuner_enabled_for_forward"
    " is_autotuner_thorough_for_backward is_autotuner_thorough_for_forward is_fna_enabled is_fused_na_enabled"
    " is_gemm_na_enabled is_memory_usage_default is_memory_usage_strict is_memory_usage_unrestricted"
    " is_tf32_in_gemm_na_enabled is_tiled_na_enabled use_deterministic_algorithms use_flex_attention use_fna"
    " use_gemm_na use_tf32_in_gemm_na use_tiled_na allow_flex_compile allow_flex_compile_backprop disable_flex_compile"
    " disable_flex_compile_backprop is_flex_compile_allowed is_flex_compile_backprop_allowed na1d na2d na3d attention"
    " merge_attentions HAS_LIBNATTEN get_configs_for_cutlass_fna get_bwd_configs_for_cutlass_fna"
    " get_configs_for_cutlass_hopper_fna get_bwd_configs_for_cutlass_hopper_fna get_configs_for_cutlass_blackwell_fna"
    " get_bwd_configs_for_cutlass_blackwell_fna get_configs_for_flex_fna get_configs_for_cutlass_fmha"
    " get_bwd_configs_for_cutlass_fmha get_configs_for_cutlass_hopper_fmha get_bwd_configs_for_cutlass_hopper_fmha"
    " get_configs_for_cutlass_blackwell_fmha get_bwd_configs_for_cutlass_blackwell_fmha get_configs_for_flex_fmha"
)
NAMED = [(module, name) for module, names in [*PAGE.items(), ("", TOP)] for name in names.split()]

#: Nobody can import NATTEN, and whoever tries is told.
NO_NATTEN = """
    import json, sys
    class Guard:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "natten":
                raise AssertionError(f"{name} is imported")
    sys.meta_path.insert(0, Guard())
"""


def last_line_of(code):
    """What `code` prints as JSON on its last line, in a process of its own in which NATTEN cannot be imported."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(NO_NATTEN) + textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize(("module", "name"), NAMED, ids=[f"{module or 'top'}-{name}" for module, name in NAMED])
def test_a_name_of_nattens_is_here(module, name):
    where = getattr(attn_natten, module) if module else attn_natten
    assert getattr(where, name) is not None
    assert name in dir(where)


def test_a_name_is_one_object_wherever_it_is_imported_from():
    for name in set(functional.__all__) & set(attn_natten.__all__):
        assert getattr(functional, name) is getattr(attn_natten, name)


@pytest.mark.parametrize("module", [attn_natten, functional, utils], ids=lambda module: module.__name__)
def test_every_listed_name_is_defined_and_an_unknown_one_is_an_attribute_error(module):
    for name in module.__all__:
        assert hasattr(module, name)
    with pytest.raises(AttributeError, match="na4d"):
        module.na4d  # noqa: B018


def test_no_name_is_listed_twice():
    assert len(attn_natten.__all__) == len(set(attn_natten.__all__))


def test_no_name_but_that_which_asks_for_it_imports_natten():
    loaded = last_line_of("""
        import attn_natten, attn_natten.functional, attn_natten.utils
        for module in (attn_natten, attn_natten.functional, attn_natten.utils):
            for name in set(module.__all__) - {"HAS_LIBNATTEN"}:
                getattr(module, name)
        attn_natten.use_fused_na()
        attn_natten.NeighborhoodAttention2D(embed_dim=8, num_heads=2, kernel_size=3)
        assert not attn_natten.has_cuda() or attn_natten.get_device_cc()
        print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] == "natten")))
    """)
    assert loaded == []


def test_importing_the_package_imports_none_of_its_modules():
    loaded = last_line_of("""
        import attn_natten
        print(json.dumps(sorted(name for name in sys.modules if name.startswith("attn_natten"))))
    """)
    assert loaded == ["attn_natten"]


def test_importing_the_names_of_functional_imports_no_module_before_one_is_used():
    loaded = last_line_of("""
        import attn_natten.functional
        print(json.dumps(sorted(name for name in sys.modules if name.startswith("attn_natten"))))
    """)
    assert loaded == ["attn_natten", "attn_natten.functional"]


# What only NATTEN knows


def test_without_natten_its_finders_of_configurations_say_what_to_install(monkeypatch):
    monkeypatch.setattr("attn_core.library.find_spec", lambda name: None)
    with pytest.raises(
        attn_natten.MissingLibraryError, match="^get_configs_for_flex_fna: asks NATTEN .*not installed: pip"
    ):
        attn_natten.get_configs_for_flex_fna(torch.zeros(1))
    assert machine.__getattr__("HAS_LIBNATTEN") is False


def test_a_finder_of_configurations_asks_natten(tmp_path):
    finder = "def get_configs_for_flex_fna(input_tensor, *, more=0): return [input_tensor, more]\n\n\ndef na1d("
    with doubled(tmp_path, changes={"def na1d(": finder}):
        assert attn_natten.get_configs_for_flex_fna("tensor", more=2) == ["tensor", 2]
        assert machine.__getattr__("HAS_LIBNATTEN") is True


def test_a_natten_that_cannot_be_imported_has_no_kernels(tmp_path):
    with doubled(tmp_path, source="raise OSError('another torch')"):
        assert machine.__getattr__("HAS_LIBNATTEN") is False


# The names of 0.14


def images(*spatial, dim=4):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(1, 2, *spatial, dim, generator=generator)


@pytest.mark.parametrize(("rank", "kernels", "dilations"), [(1, (3,), (2,)), (2, (3,), (2,)), (3, (5, 3), (1, 2))])
def test_the_old_names_compute_what_todays_do_and_warn(rank, kernels, dilations):
    spatial = (6, 7, 8)[:rank]
    query, key, value = (images(*spatial) for _ in range(3))
    kernel_size, dilation = (
        (kernels[0],) + (kernels[-1],) * (rank - 1),
        (dilations[0],) + (dilations[-1],) * (rank - 1),
    )
    rpb = torch.randn(2, *(2 * k - 1 for k in kernel_size), generator=torch.Generator().manual_seed(8))
    qk, av = getattr(functional, f"na{rank}d_qk"), getattr(functional, f"na{rank}d_av")
    attn = qk(query, key, kernel_size, dilation)
    for old, new, arguments, expected in (
        (f"natten{rank}dqk", f"na{rank}d_qk", (query, key), attn),
        (f"natten{rank}dqkrpb", f"na{rank}d_qk", (query, key, rpb), qk(query, key, kernel_size, dilation, rpb=rpb)),
        (f"natten{rank}dqkrpb", f"na{rank}d_qk", (query, key, None), attn),
        (f"natten{rank}dav", f"na{rank}d_av", (attn, value), av(attn, value, kernel_size, dilation)),
    ):
        with pytest.warns(DeprecationWarning, match=f"^{old} is deprecated; use {new}$") as caught:
            computed = getattr(functional, old)(*arguments, *kernels, *dilations)
        assert caught[0].filename == __file__
        torch.testing.assert_close(computed, expected, rtol=0, atol=0)


# The checks of natten.utils


def test_the_checks_give_one_value_for_each_axis():
    assert utils.check_kernel_size_arg(2, 3) == (3, 3)
    assert utils.check_dilation_arg(2, None) == (1, 1)
    assert utils.check_stride_arg(3, [1, 2, 3]) == (1, 2, 3)
    assert utils.check_stride_arg(1, None) == (1,)
    assert utils.check_causal_arg(2, None) == (False, False)
    assert utils.check_causal_arg(2, (True, False)) == (True, False)
    assert utils.check_all_args(2, 3, None, True) == ((3, 3), (1, 1), (True, True))
    assert utils.get_num_na_weights((3, 5)) == 15


def test_the_checks_refuse_what_is_no_parameter():
    with pytest.raises(ValueError, match="^kernel_size: takes an int"):
        utils.check_all_args(2, True, 1, False)
    with pytest.raises(ValueError, match="^is_causal: takes True or False"):
        utils.check_all_args(2, 3, 1, 1)
    with pytest.raises(ValueError, match="^kernel_size: takes a tuple, got int$"):
        utils.get_num_na_weights(3)
