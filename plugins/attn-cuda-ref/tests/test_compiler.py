"""NVRTC as it is called: what an error says, what a key depends on, where the library is looked for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from attn_cuda_ref import compiler
from attn_cuda_ref.compiler import Asked, Nvrtc, architecture
from attn_cuda_ref.errors import CompileError, CudaError

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from doubled_cuda import DoubledNvrtc

SOURCE = '#include "simple_delta.cuh"\n'


def asked(source: str = SOURCE, arch: str = "sm_90a", version: tuple[int, int] = (13, 0), **constants: str) -> Asked:
    return Asked.of(source, "simple_delta", {"HEAD_DIM": 64, **constants}, arch, version)


def test_architectures_from_sm_90_on_have_what_is_theirs_alone() -> None:
    assert [architecture(each) for each in ((7, 5), (8, 6), (9, 0), (12, 1))] == ["sm_75", "sm_86", "sm_90a", "sm_121a"]


def test_a_text_is_compiled_with_what_it_includes_and_its_constants() -> None:
    library = DoubledNvrtc()
    cubin = Nvrtc(library).compile(asked(ELEMENT="bf16", MASK="And<Band, Cached>"))
    assert cubin.startswith(b"\x7fELF")
    assert {"--gpu-architecture=sm_90a", "-DELEMENT=bf16", "-DMASK=And<Band, Cached>", "-DHEAD_DIM=64"} <= {
        *library.options
    }
    assert {name for name, _ in asked().headers} == {
        "simple_delta.cuh",
        "simple_tile.cuh",
        "masks.cuh",
        "scores.cuh",
        "primitives.cuh",
    }
    assert library.destroyed == 1


def test_what_does_not_compile_is_an_error_with_the_log_s_first_lines_and_the_key() -> None:
    log = "\n".join(f'simple_delta.cu({n}): error: identifier "that_{n}" is undefined' for n in range(40))
    library = DoubledNvrtc(log)
    with pytest.raises(CompileError) as caught:
        Nvrtc(library).compile(asked())
    said = str(caught.value)
    assert "NVRTC 13.0 does not compile simple_delta" in said
    assert asked().key in said
    assert "that_0" in said
    assert "that_11" in said
    assert "that_12" not in said
    assert "28 lines more" in said
    assert "-DHEAD_DIM=64" in said
    assert library.destroyed == 1


def test_a_key_depends_on_text_constants_architecture_compiler_and_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [
        asked(SOURCE + "\n"),
        asked(arch="sm_80"),
        asked(version=(13, 1)),
        asked(ELEMENT="f16"),
        Asked.of(SOURCE, "another", {"HEAD_DIM": 64}, "sm_90a", (13, 0)),
    ]
    monkeypatch.setattr(compiler, "__version__", "0.1.1")
    others.append(asked())
    monkeypatch.undo()
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, **how: read_text(path, **how) + ("//" if path.name == "masks.cuh" else "")
    )
    others.append(asked())
    monkeypatch.undo()
    keys = {asked().key, *(other.key for other in others)}
    assert len(keys) == 1 + len(others)
    assert asked() == asked()


def test_without_a_library_the_error_says_what_was_tried_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_candidates", lambda: iter(["/nowhere/libnvrtc.so.13", "/nowhere/libnvrtc.so.12"]))
    compiler.nvrtc.cache_clear()
    words = "/nowhere/libnvrtc.so.13: .*; /nowhere/libnvrtc.so.12: .*nvidia-cuda-nvrtc; .*LD_LIBRARY_PATH"
    with pytest.raises(CudaError, match=words):
        compiler.nvrtc()
    compiler.nvrtc.cache_clear()


def test_a_call_of_nvrtc_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = DoubledNvrtc()
    of = Nvrtc(library)
    monkeypatch.setattr(library, "nvrtcCreateProgram", lambda *_: 3, raising=False)
    with pytest.raises(CudaError, match="nvrtcCreateProgram: error 3"):
        of.compile(asked())


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    """The real one, where it is installed."""
    compiler.nvrtc.cache_clear()
    try:
        return compiler.nvrtc()
    except CudaError as error:
        pytest.skip(str(error))


def test_the_real_compiler_names_the_file_and_the_line_of_an_error(nvrtc: Nvrtc) -> None:
    wrong = replace(asked(), source="\nextern void __global__ simple_delta() { that = 1; }", headers=())
    with pytest.raises(CompileError, match=r'simple_delta\.cu\(2\): error: identifier "that" is undefined'):
        nvrtc.compile(wrong)


def test_the_real_compiler_makes_a_cubin_without_a_gpu(nvrtc: Nvrtc) -> None:
    options = ("--gpu-architecture=sm_75",)
    text = replace(asked(), source='extern "C" __global__ void f(int* x) { *x = 1; }', headers=(), options=options)
    assert nvrtc.compile(text).startswith(b"\x7fELF")
    assert {75, 80, 90, 100} <= nvrtc.architectures()
