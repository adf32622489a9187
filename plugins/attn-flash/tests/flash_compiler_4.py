"""FlashAttention-4 as a whole, its kernels compiled or not: what it takes of a call, asked without a GPU.

Its functions check a call, make a kernel for it, and compile that for an architecture, which need not be here. With
torch's fake tensors they stop there, before anything is launched; and with the compiler put aside, before that.

    pip install flash-attn-4==4.0.0b36 triton
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attn_core import Problem
from attn_core.kernel import resolve
from attn_core.testing import fake_distribution
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parent))  # where a module beside this one is found
import flash_real_4
from flash_doubled import BY_NAME, DOUBLE, VERSIONS, installed_from

#: What compiles the kernels, and what imports it.
NEEDED = ("cutlass", "quack", "tvm_ffi", "triton")
#: As many as an H100 has; it changes how work is divided.
MULTIPROCESSORS = "132"
PASSES = ("_flash_attn_fwd", "_flash_attn_bwd")
#: Functions that keep what they compiled.
KEEPING = (*PASSES, "_bwd_preprocess", "_bwd_postprocess_convert")


def is_there() -> bool:
    """Whether the release that the double is of is installed with all that it needs."""
    return flash_real_4.source() is not None and all(find_spec(name) for name in NEEDED)


@contextmanager
def whole(folder: Path) -> Iterator[ModuleType]:
    """Within it, the real `flash_attn.cute` is what is installed, by links in `folder`; its `interface`.

    What lies in `folder` is forgotten behind it, and the compiler must not be: it can be imported once in a process.
    """
    source = flash_real_4.source()
    assert source is not None
    (folder / "flash_attn").mkdir(parents=True)
    (folder / "flash_attn" / "cute").symlink_to(source.parent)
    fake_distribution(folder, "flash-attn-4", VERSIONS["fa4"], {}, {}, ())
    with installed_from(folder, DOUBLE):
        interface = importlib.import_module("flash_attn.cute.interface")
        assert Path(interface.__file__).resolve() == source.resolve()
        yield interface


@contextmanager
def over_the_double(folder: Path) -> Iterator[None]:
    """Within it, it is there as a whole, but for the two functions that launch kernels, which are their doubles."""
    with whole(folder) as interface, pytest.MonkeyPatch.context() as patch:
        double = importlib.import_module("flash_double.fa4")
        patch.setattr(interface, "_flash_attn_fwd", double.flash_attn_fwd)
        patch.setattr(interface, "_flash_attn_bwd", double.flash_attn_bwd)
        yield


class PutAside:
    """In place of the compiler: takes whatever it is given, and makes nothing of it."""

    def __call__(self, *given: Any, **options: Any) -> None:
        pass

    def __getitem__(self, options: Any) -> PutAside:
        return self


class Library:
    """FlashAttention-4's own word on a problem, for one architecture (90: sm_90)."""

    def __init__(self, interface: ModuleType, architecture: int, patch: pytest.MonkeyPatch) -> None:
        self.interface, self.patch = interface, patch
        patch.setattr(interface, "_get_device_arch", lambda: architecture)
        patch.setenv("FLASH_ATTENTION_NUM_SMS", MULTIPROCESSORS)
        compiler = importlib.import_module("cutlass.cutlass_dsl").CuTeDSL._get_dsl()
        patch.setattr(compiler.envar, "arch", f"sm_{architecture}a")
        self.run = resolve(BY_NAME["fa4"])

    def against(self, problem: Problem) -> str | None:
        """What it raises for the call that `problem` becomes, forward and backward; None where it takes it."""
        with self.patch.context() as patch:
            patch.setattr(self.interface.cute, "compile", PutAside())
            return self._raised(problem)

    def calls(self, problem: Problem) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
        """What its two passes are called with: (name, arguments, keywords)."""
        seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        with self.patch.context() as patch:
            patch.setattr(self.interface.cute, "compile", PutAside())
            for name in PASSES:
                patch.setattr(self.interface, name, noting(seen, name, getattr(self.interface, name)))
            raised = self._raised(problem)
        assert raised is None, raised
        return seen

    def compile(self, problem: Problem) -> int:
        """Compiles the kernels of the call that `problem` becomes; of how many passes. Raises as the compiler does."""
        calls = self.calls(problem)
        for name, given, options in calls:
            self._forget()
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                there, told = tree_map(on_cuda, (given, options))
                if name == "_flash_attn_fwd" and problem.requires_grad:
                    told["return_lse"] = True  # what it does for a gradient, which here none is needed for
                getattr(self.interface, name)(*there, **told)
            assert len(getattr(self.interface, name).compile_cache.cache) == 1
        self._forget()
        return len(calls)

    def _forget(self) -> None:
        """What was compiled; what was put aside is kept like it."""
        for name in KEEPING:
            getattr(self.interface, name).compile_cache.clear()

    def _raised(self, problem: Problem) -> str | None:
        options = {"bias": problem.bias, "softcap": problem.softcap, "return_lse": problem.return_lse}
        self._forget()
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(problem.deterministic)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                given = operands(problem)
                result = self.run(*given, scale=problem.scale, **{name: told for name, told in options.items() if told})
                if problem.requires_grad:
                    results = list(result) if problem.return_lse else [result]
                    torch.autograd.grad(results, given, [torch.empty_like(each) for each in results])
        except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            torch.use_deterministic_algorithms(before)
            self._forget()
        return None


def noting(seen: list[Any], name: str, function: Any) -> Any:
    """The function, whose calls are noted."""

    @functools.wraps(function)  # which takes along what it keeps, as an attribute
    def noted(*given: Any, **options: Any) -> Any:
        seen.append((name, given, options))
        return function(*given, **options)

    return noted


def operands(problem: Problem) -> list[Tensor]:
    """Query, key and value of these sizes, on a CPU: torch's autograd knows no device that is not there."""
    paged = None if problem.bias is None else problem.bias.paged
    keys = (problem.batch, problem.seqlen_kv) if paged is None else (4, paged.page_size)
    shapes = (
        (problem.batch, problem.seqlen_q, problem.num_heads, problem.head_dim),
        (*keys, problem.num_kv_heads, problem.head_dim),
        (*keys, problem.num_kv_heads, problem.head_dim_v),
    )
    return [torch.empty(shape, dtype=problem.dtype, requires_grad=problem.requires_grad) for shape in shapes]


def on_cuda(given: Any) -> Any:
    """The same, on a device that the compiler makes kernels for; to be called where tensors are fake."""
    if not isinstance(given, Tensor):
        return given
    return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device="cuda")
