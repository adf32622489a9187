"""The gate that compiles every kernel without a GPU: what it compiles, by whom, and what makes it fail."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attn_core import Intersection, Sum
from attn_cuda_ref import compiler
from attn_cuda_ref.compiler import Asked
from attn_cuda_ref.errors import CompileError, CudaError
from attn_cuda_ref.kernels.simple import KERNEL
from attn_cuda_ref.launcher import TEXT

sys.path.insert(0, str(Path(__file__).parents[1] / "checks"))
import compile_gate
import cubin
import nvcc
from compile_gate import ARCHITECTURES, DIMS, DTYPES, Compilation, Result

SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(const float* x, float* y, int n) {
  float kept[100];
#pragma unroll
  for (int i = 0; i < 100; i++) kept[i] = x[i * n + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 100; i++) y[i * n + threadIdx.x] = kept[i] * kept[99 - i];
}
"""
PLAIN = 'extern "C" __global__ void plain(int* x) { *x = 1; }'


def asked(source: str, entry: str) -> Asked:
    return Asked(source, entry, (), ("--gpu-architecture=sm_80",), "")


@pytest.fixture(params=["NVRTC", "nvcc"])
def real(request: pytest.FixtureRequest) -> compile_gate.Nvrtc | nvcc.Nvcc:
    """Each of the two compilers, where it is there."""
    try:
        return compile_gate.compilers([request.param.lower()])[request.param]
    except (CudaError, LookupError) as error:
        pytest.skip(str(error))


# What is compiled


def test_every_dtype_head_dim_and_kind_of_bias_is_compiled_for_every_architecture() -> None:
    found = {
        (each.entry, each.bias, each.dtype, each.head_dim, each.arch)
        for each in compile_gate.compilations(ARCHITECTURES)
    }
    wanted = product(compile_gate.ENTRIES, compile_gate.biases(), DTYPES, DIMS, ARCHITECTURES)
    assert set(wanted) <= found


def test_every_kind_that_the_kernel_declares_is_among_the_biases() -> None:
    parts: set[type] = set()
    for bias in compile_gate.biases().values():
        if bias is not None:
            masks = (
                () if bias.mask is None else bias.mask.parts if isinstance(bias.mask, Intersection) else (bias.mask,)
            )
            parts |= {type(bias), type(bias.mask), *map(type, masks), *map(type, bias.scores)}
    (declared,) = KERNEL.declarations
    assert set(declared.biases) - {Sum, Intersection} <= parts


def test_every_entry_of_the_texts_is_compiled() -> None:
    entries = {path.stem for path in TEXT.glob("*.cuh") if "__global__" in path.read_text()}
    assert {each.entry for each in compile_gate.compilations(ARCHITECTURES)} == entries


# What a cubin says


def test_a_kernel_that_needs_more_registers_than_there_are_has_a_stack(real: compile_gate.Nvrtc | nvcc.Nvcc) -> None:
    spilling, plain = (cubin.usage(real.compile(asked(*each))) for each in ((SPILLING, "spilling"), (PLAIN, "plain")))
    assert spilling.stack_bytes > 0
    assert spilling.registers <= 64  # of 65,536 for 1,024 threads
    assert plain.stack_bytes == 0
    assert 0 < plain.registers < spilling.registers


@pytest.mark.parametrize(("content", "says"), [(b"", "not an ELF file"), (b"\x7fELG" + bytes(99), "not an ELF file")])
def test_what_is_no_cubin_is_refused(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cubin.usage(content)


# Both compilers


def test_each_compiler_takes_a_kernel_with_its_constants_and_headers(real: compile_gate.Nvrtc | nvcc.Nvcc) -> None:
    each = Compilation("simple_forward", "causal & key padding", torch.bfloat16, 32, False, "sm_80")
    found = compile_gate.compiled(each, real)
    assert 0 < found.usage.registers < 256
    assert found.usage.stack_bytes == 0
    assert found.seconds > 0


def test_each_compiler_says_the_line_of_an_error(real: compile_gate.Nvrtc | nvcc.Nvcc) -> None:
    wrong = replace(asked("\nextern void __global__ wrong() { that = 1; }", "wrong"), options=("-DN=1", "-DM=a, b"))
    with pytest.raises(CompileError, match=r'wrong\.cu\(2\): error: identifier "that" is undefined'):
        real.compile(wrong)


# nvcc


@pytest.fixture
def doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in place of nvcc, of CUDA 12.0: knows sm_75 and sm_80, writes down what it is given."""
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.0, V12.0.140" ;;
--list-gpu-code) printf 'sm_75\\nsm_80\\n' ;;
*) echo "$@" >> {tmp_path}/given
   for source; do :; done
   cat "$source" >> {tmp_path}/sources
   echo "x.cu(1): error: no" >&2
   exit 1 ;;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(program.parent), os.environ["PATH"]]))
    return program


def test_the_nvcc_on_path_is_found_and_asked_for_its_version_and_architectures(doubled: Path) -> None:
    assert nvcc.find() == doubled
    found = nvcc.Nvcc(doubled)
    assert found.version == (12, 0)
    assert found.architectures() == {75, 80}


@pytest.mark.parametrize("variable", nvcc.VARIABLES)
def test_the_nvcc_of_a_toolkit_that_a_variable_names_is_found(
    doubled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(variable, str(tmp_path))
    assert nvcc.find() == doubled


def test_the_nvcc_of_a_package_beside_nvrtc_is_found(
    doubled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packages = tmp_path / "nvidia"
    (packages / "cu13").mkdir(parents=True)
    doubled.parent.rename(packages / "cu13" / "bin")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvcc, "PLACES", ())
    for variable in nvcc.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    spec = SimpleNamespace(submodule_search_locations=[str(packages)])
    monkeypatch.setattr(nvcc.importlib.util, "find_spec", lambda name: spec)
    assert nvcc.find() == packages / "cu13" / "bin" / "nvcc"


def test_without_nvcc_none_is_found_and_to_ask_for_it_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in nvcc.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(nvcc, "PLACES", ())
    monkeypatch.setattr(nvcc.importlib.util, "find_spec", lambda name: None)
    assert nvcc.find() is None
    with pytest.raises(SystemExit):
        compile_gate.main(["--compiler", "nvcc"])
    assert "--compiler nvcc: there is none" in capsys.readouterr().err


def test_nvcc_gets_constants_as_lines_since_it_would_cut_them_at_commas(doubled: Path, tmp_path: Path) -> None:
    each = Compilation("simple_forward", "causal & key padding", torch.bfloat16, 32, False, "sm_80")
    with pytest.raises(CompileError) as caught:
        compile_gate.compiled(each, nvcc.Nvcc(doubled))
    assert "nvcc 12.0 does not compile simple_forward" in str(caught.value)
    assert "x.cu(1): error: no" in str(caught.value)
    given, source = (tmp_path / "given").read_text(), (tmp_path / "sources").read_text()
    assert "--gpu-architecture=sm_80" in given
    assert "--cubin" in given
    assert "-D" not in given
    assert "#define MASK And<Band, Cached>\n" in source
    assert source.endswith('#include "simple_forward.cuh"\n')


def test_an_architecture_that_nvcc_does_not_know_is_told_and_left_out(
    doubled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = list(compile_gate.compilations(("sm_80", "sm_100a")))
    left = compile_gate.known(every, nvcc.Nvcc(doubled), "nvcc 12.0")
    assert {each.arch for each in left} == {"sm_80"}
    assert capsys.readouterr().out == "nvcc 12.0 does not know sm_100a: left out\n"
    assert compile_gate.main(["--compiler", "nvcc", "--arch", "sm_100a"]) == 1, "nothing was compiled"


# What fails


class Doubled(compiler.Nvrtc):
    """Takes everything."""

    def __init__(self) -> None:
        self.version = 13, 0

    def compile(self, asked: Asked) -> bytes:
        return asked.entry.encode()


@pytest.mark.parametrize(("dim", "code"), [(128, 1), (256, 0)])
def test_spills_fail_up_to_head_dim_128(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dim: int, code: int
) -> None:
    def compiled(each: Compilation, by: compile_gate.Nvrtc | nvcc.Nvcc) -> Result:
        spills = each.entry == "simple_forward" and each.head_dim == dim
        return Result(each, cubin.Usage(99, 8 if spills else 0), 0.25)

    monkeypatch.setattr(compiler, "nvrtc", Doubled)
    monkeypatch.setattr(compile_gate, "compiled", compiled)
    assert compile_gate.main(["--compiler", "nvrtc", "--arch", "sm_90a"]) == code
    said, on_the_way = capsys.readouterr()
    line = "spills: NVRTC 13.0: simple_forward, float16, head_dim 128, causal, sm_90a: 8 bytes of stack, 99 registers"
    assert (line in said) == bool(code)
    assert f"{'simple_forward':28} {dim:8}" in said
    lines = on_the_way.splitlines()
    count = len(list(compile_gate.compilations(["sm_90a"])))
    assert len(lines) == len(compile_gate.biases()), "a line after each bias"
    assert lines[-1] == f"NVRTC 13.0: sm_90a, causal + alibi + table: {count} of {count}"


@pytest.mark.parametrize("every", ["0", "-3"])
def test_each_none_of_them_is_refused(capsys: pytest.CaptureFixture[str], every: str) -> None:
    with pytest.raises(SystemExit):
        compile_gate.main([f"--every={every}"])
    assert f"{every} is not above 0" in capsys.readouterr().err
