"""Every model of timm_models.py, as timm makes it and with `fused_attn` off. Minutes long; `nox -s timm` runs it.

Its name keeps it out of an ordinary run of the tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import timm_checks
from timm_models import ARCHS

timm_checks.define_torchvision_ops()

from timm.layers import set_fused_attn  # noqa: E402


def test_there_are_enough_of_them():
    assert len({arch.name for arch in ARCHS}) == len(ARCHS) >= 40


@pytest.mark.parametrize("fused_attn", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("arch", ARCHS, ids=str)
def test_a_model_computes_the_same_by_attn_its_report_is_complete_and_disable_is_bitwise_stock(
    arch, fused_attn, capsys
):
    set_fused_attn(fused_attn)
    try:
        checked = timm_checks.check(arch, arch.build(), arch.images())
    finally:
        set_fused_attn(True)
    kernels = ", ".join(f"{name} {calls}" for name, calls in checked.kernels.items()) or "none"
    differences = f"output {checked.output:.1e}, gradients {checked.gradient:.1e}"
    with capsys.disabled():
        sys.stdout.write(f"\n{arch}: {checked.modules} modules, {differences}, kernels: {kernels} ")
