"""The kit beside copies of torch/tiled with one line changed: whatever the line, some check must fail.

A line that can be changed unnoticed is not tested, by the kit or at all.
"""

from __future__ import annotations

import importlib
import re
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest
from attn_core import Kernel, torch_kernels
from attn_core.conformance.checks import CHECKS
from attn_core.conformance.run import every_case, result_of
from attn_core.conformance.subject import Subject, registered
from attn_core.torch_kernels import tiled

SOURCE = Path(torch_kernels.__file__).parent

#: what is changed -> (file, line as it is, line as it is changed)
MUTANTS = {
    "window one key short on the left": ("intervals", "(diagonal - left)", "(diagonal - left + 1)"),
    "window one key short on the right": ("intervals", "(diagonal + right + 1)", "(diagonal + right)"),
    "queries without a key": ("windows", "q0, full = max(0, -mask.offset)", "q0, full = 0 * mask.offset"),
    "LSE of queries without a key": ("runs", "if batch.empty_rows:", "if batch.empty_rows and False:"),
    "results joined": ("runs", "torch.logaddexp(to_lse, lse)", "torch.maximum(to_lse, lse)"),
    "strips of gradients": ("runs", "grad[:, :, first : first + columns]", "grad[:, :, :columns]"),
    "gradient of the LSE": ("function", "torch.cat([out, -grad_lse], -1)", "torch.cat([out, grad_lse], -1)"),
    "stride of a neighborhood": ("boxes", "(points, kernel, stride, 1, causal)", "(points, kernel, 1, 1, causal)"),
    "gradients of strips on a grid": ("strips", "(first + column, step, count,", "(first, step, count,"),
    "keys of a document": ("documents", "k0=k0 + run.k0, count", "k0=q0 + run.k0, count"),
    "lines of a dilation": ("sequence", "self.start :: self.step", "0 * self.start :: self.step"),
    "negative scale": ("../tiled", "(-query, -scale)", "(query, -scale)"),
}


def within(name: str, module: str, home: str) -> str:
    """The full name of a module as imported by a file of package `home`: in package `name` if that is a copied one."""
    module = resolve_name(module, home)
    tiling = f"{torch_kernels.__name__}.tiling"
    return name + module.removeprefix(tiling) if f"{module}.".startswith(f"{tiling}.") else module


def mutant_of(folder: Path, name: str, file: str = "", old: str = "", new: str = "") -> Kernel:
    """torch/tiled from a copy of its files, with one line changed."""
    package = folder / name
    package.mkdir()
    files = {path.stem: path.read_text() for path in (SOURCE / "tiling").glob("*.py")}
    files["../tiled"] = (SOURCE / "tiled.py").read_text()
    if file:
        assert files[file].count(old) == 1, f"{file} has no such line, or several: {old}"
        files[file] = files[file].replace(old, new)
    for stem, text in files.items():
        home = torch_kernels.__name__ if stem == "../tiled" else f"{torch_kernels.__name__}.tiling"
        text = re.sub(r"from (\.[.\w]*)", lambda found: f"from {within(name, found[1], home)}", text)  # noqa: B023
        text = re.sub(
            r'"attn_core"|attn_core(?=::)', lambda m: m[0].replace("attn_core", name), text
        )  # the op's namespace
        text = text.replace("torch.ops.attn_core", f"torch.ops.{name}")
        (package / f"{stem.removeprefix('../')}.py").write_text(text)
    module = importlib.import_module(f"{name}.tiled")
    assert str(folder) in module.__file__
    return Kernel(
        name=f"mutant/{name}",
        run=module.run,
        capabilities=tiled.KERNEL.capabilities,
        layout="heads-first",
        refuse=module.refuse,
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("copied_")]:
        del sys.modules[name]


def failures(kernel, *, stop):
    """What the kit finds wrong with the cases that have a mask: the others are no different in a copy."""
    found = []
    with registered(kernel):
        subject = Subject(kernel, "cpu")
        for name in ("agrees", "a_query_without_keys_gets_zeros"):
            for check, case in every_case(subject, name):
                if check is not CHECKS[name] or case.problem.bias is None or not subject.takes(case.problem):
                    continue
                result = result_of(subject, check, case)
                if not result:
                    found.append(result)
                    if stop:
                        return found
    return found


def test_a_copy_without_a_change_is_right(folder):
    wrong = failures(mutant_of(folder, "copied_as_it_is"), stop=False)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("what", MUTANTS)
def test_a_changed_line_is_noticed(what, folder):
    kernel = mutant_of(folder, f"copied_{list(MUTANTS).index(what)}", *MUTANTS[what])
    assert failures(kernel, stop=True), f"nobody notices that {what} is wrong"
