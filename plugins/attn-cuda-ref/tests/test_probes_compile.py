"""The probes are text that NVRTC compiles for every architecture: all PTX of the package is in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from attn_cuda_ref.compiler import Asked, nvrtc
from attn_cuda_ref.errors import CudaError
from attn_cuda_ref.launcher import TEXT

PROBES = (Path(__file__).parent / "gpu" / "probes.cu").read_text()
ENTRIES = set(re.findall(r"__global__ void (\w+)\(", PROBES))
#: What an architecture does not have.
MISSING = {"sm_75": {"copy"}}


def test_every_primitive_has_a_probe() -> None:
    text = (TEXT / "primitives.cuh").read_text()
    primitives = set(re.findall(r"^DEVICE [^(]*?(\w+)\(", text, re.MULTILINE)) | {"SharedMemory"}
    assert len(primitives) > 12
    within_others = {"shared_address"}
    assert {name for name in primitives if not re.search(rf"\b{name}\b", PROBES)} == within_others


@pytest.mark.parametrize(
    ("architecture", "number"),
    [("sm_75", "f16"), ("sm_80", "f16"), ("sm_80", "bf16"), ("sm_90a", "bf16"), ("sm_100a", "bf16")],
)
def test_nvrtc_compiles_every_probe(architecture: str, number: str) -> None:
    try:
        compiler = nvrtc()
    except CudaError as error:
        pytest.skip(str(error))
    cubin = compiler.compile(Asked.of(PROBES, "probes", {"TYPE": number}, architecture, compiler.version))
    assert {entry for entry in ENTRIES if entry.encode() in cubin} == ENTRIES - MISSING.get(architecture, set())
