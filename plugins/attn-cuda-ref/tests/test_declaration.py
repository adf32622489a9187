"""What cuda-ref/simple says of itself: where it can run, what it takes, and what asking costs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core import Causal, KeyPadding, MaskMod, Paged, Problem, ScoreMod
from attn_core.kernel import resolve
from attn_core.registry import registry
from attn_core.scope import Settings
from attn_core.select import consider
from attn_cuda_ref import compiler, device
from attn_cuda_ref.compiler import Nvrtc
from attn_cuda_ref.errors import CudaError
from attn_cuda_ref.kernels.simple import KERNEL
from attn_cuda_ref.plugin import attn_kernels

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from doubled_cuda import DoubledNvrtc


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Nvrtc(DoubledNvrtc(architectures=(75, 80, 86, 90)))
    monkeypatch.setattr(compiler, "nvrtc", lambda: of)


def problem(**changes: Any) -> Problem:
    plain: dict[str, Any] = {
        "batch": 2,
        "seqlen_q": 32,
        "seqlen_kv": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "head_dim_v": 64,
        "dtype": torch.bfloat16,
        "device": "cuda",
        "compute_capability": (9, 0),
    }
    return Problem(**plain | changes)


def fields(**changes: Any) -> list[str]:
    return [refusal.field for refusal in KERNEL.refusals(problem(**changes))]


def test_the_plugin_offers_it() -> None:
    assert [kernel.name for kernel in attn_kernels()] == ["cuda-ref/simple"]
    assert resolve(KERNEL).__module__ == "attn_cuda_ref.kernels.run_simple"


LISTING = """
import sys
import attn_core, attn_cuda_ref.plugin
kernels = list(attn_cuda_ref.plugin.attn_kernels())
print(kernels[0].probe())
import torch
loaded = [name for name in sys.modules if name.startswith(("attn_cuda_ref.", "cuda", "nvidia", "torch._dynamo"))]
print(sorted(loaded), torch.cuda.is_initialized())
"""


def test_declaring_and_asking_import_no_module_of_cuda() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LISTING], env=environment, capture_output=True, text=True, check=True)
    _, loaded = done.stdout.splitlines()
    for name in ("gpu", "driver", "ops", "kernels.run_simple"):
        assert f"'attn_cuda_ref.{name}'" not in loaded
    assert "'cuda" not in loaded
    assert "'nvidia" not in loaded
    assert "torch._dynamo" not in loaded
    assert loaded.endswith("False")


@pytest.mark.skipif(torch.version.cuda is not None, reason="of a torch without CUDA")
def test_without_cuda_it_is_unavailable_and_says_why() -> None:
    by_another_name = replace(KERNEL, name="tried/simple")  # its own is taken where the plugin is installed
    with registry.register(by_another_name):
        condition = registry.condition(by_another_name)
    assert condition.state == "unavailable"
    assert "built for CPUs, not for CUDA" in condition.reason


@pytest.mark.parametrize(
    ("cuda", "hip", "sees", "words"),
    [
        (None, "6.2", False, "built for ROCm, not for CUDA"),
        ("13.0", None, False, "sees no CUDA device"),
        ("13.0", None, True, "NVRTC cannot be loaded"),
    ],
)
def test_each_reason_why_it_cannot_run_is_told(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, hip: str | None, sees: bool, words: str
) -> None:
    def none_there() -> None:
        raise CudaError("cuda-ref: NVRTC cannot be loaded")

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(sees))
    monkeypatch.setattr(compiler, "nvrtc", none_there)
    told = device.probe()
    assert told is not None
    assert told.state == "unavailable"
    assert words in told.reason


def test_an_ordinary_problem_is_taken(nvrtc: None) -> None:
    assert KERNEL.refusals(problem()) == []
    assert KERNEL.refusals(problem(head_dim=1, head_dim_v=255, dtype=torch.float32, softcap=2.0, return_lse=True)) == []


def test_an_architecture_that_the_compiler_does_not_know_is_refused(nvrtc: None) -> None:
    assert fields(compute_capability=(7, 0)) == ["compute_capability"]
    assert fields(compute_capability=(13, 0)) == ["compute_capability"]
    (refusal,) = KERNEL.refusals(problem(compute_capability=(13, 0)))
    assert refusal.message == "NVRTC 13.0 compiles for sm_75 to sm_90, got sm_130"


def test_what_it_cannot_do_is_refused_by_its_field(nvrtc: None) -> None:
    assert fields(head_dim=257, head_dim_v=257) == ["head_dim"]
    assert fields(head_dim_v=300) == ["head_dim_v"]
    assert fields(dtype=torch.float64) == ["dtype"]
    assert fields(dropout_p=0.1) == ["dropout_p"]
    assert fields(device="cpu", compute_capability=None) == ["device"]
    assert fields(batch=1 << 20, num_heads=1 << 8, seqlen_q=1 << 10) == ["seqlen_q"]


def test_a_function_of_the_logit_is_refused(nvrtc: None) -> None:
    bias = ScoreMod(lambda score, b, h, q, k: score).bind(32, 32).without_data()
    assert fields(bias=bias) == ["bias"]


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "in an intersection"])
def test_a_function_of_the_user_is_written_out_as_a_tensor(nvrtc: None, joined: bool) -> None:
    odd = MaskMod(lambda b, h, q, k: (q - k) % 2 == 0)
    bias = (odd & KeyPadding([32, 3]) & Causal()) if joined else odd
    asked = problem(bias=bias.bind(32, 32).without_data())
    assert "bias" in [refusal.field for refusal in KERNEL.refusals(asked)]
    steps = considered(asked)
    assert steps[-1] == "materialize"


def test_pages_are_gathered_first(nvrtc: None) -> None:
    table = torch.zeros(2, 2, dtype=torch.int32)
    asked = problem(bias=Paged(table, [32, 3], 16, within=Causal("bottom-right")).bind(32, 32).without_data())
    assert considered(asked) == ("gather_pages",)


def considered(asked: Problem) -> tuple[str, ...]:
    """The adaptations by which it takes a problem, on a machine that has what it needs."""
    ready = replace(KERNEL, name="tried/simple", probe=None)
    with registry.register(ready):
        candidate = consider(registry, ready, asked, Settings())
    assert candidate.takes, candidate.reasons()
    return candidate.adaptations
