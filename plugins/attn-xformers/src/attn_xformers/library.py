"""Which xFormers is installed, and why its operators cannot be used where they cannot.

Forced by what an installed xFormers can be beside what any library can: built for another torch, which it hides behind
a log line; or broken by a neighbour, as where `import xformers.ops` raises because the extension of an installed
flash-attn is missing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from attn_core import Unusable, no_cuda
from attn_core.library import Library

MSLK = "pip install mslk"
#: Distributions that xFormers imports where it finds them, and which take it down where they are broken.
NEIGHBOURS = {"flash_attn": "flash-attn", "flash_attn_3": "flash-attn-3", "fbgemm_gpu": "fbgemm-gpu", "mslk": "mslk"}


class _XFormers(Library):
    def unusable(self) -> Unusable | None:
        found = super().unusable()
        if found is None and not hasattr(
            self.module(), "Inputs"
        ):  # it hides that what it takes its operators from is missing
            return Unusable("absent", f"{self} takes its operators from mslk, which is not installed", MSLK)
        return found

    def lacks_another(self, missing: ModuleNotFoundError) -> bool:
        return not _neighbour(missing) and super().lacks_another(missing)

    def advice(self, failure: BaseException) -> str:
        name = _neighbour(failure)
        if not name:
            return super().advice(failure)
        return f"{name} is installed and broken, and xFormers imports it: reinstall it, or `pip uninstall {name}`"


def _neighbour(failure: BaseException) -> str:
    """The distribution whose modules the error went through last; empty where it is xFormers' own.

    A missing extension is a ModuleNotFoundError in the neighbour's own module, or names its file.
    """
    traceback = failure.__traceback__
    while traceback is not None:
        module = str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if module in NEIGHBOURS:
            return NEIGHBOURS[module]
        traceback = traceback.tb_next
    return ""


#: All operators are reached through its module; where their classes live (newer releases take them from mslk) does not
#: count.
XFORMERS = _XFormers(
    name="xFormers",
    distribution="xformers",
    supported=">=0.0.35,<0.0.36",
    modules=("xformers.ops.fmha",),
    install="pip install 'attn-xformers[xformers]'",
    version_in="xformers",
)


def without_cuda(operator: Any) -> Unusable | None:
    """Why an operator for CUDA cannot run on this machine, or None. Those of mslk need no extension of xFormers."""
    build: Any = import_module("xformers._cpp_lib")
    is_own = operator.__module__.partition(".")[0] == "xformers"
    if is_own and not build._built_with_cuda and torch.version.hip is None:
        cause = build._cpp_library_load_exception
        said = f": {_in_one_line(cause)}" if cause is not None else ""
        text = f"the extension of {XFORMERS} cannot be loaded beside torch {torch.__version__}{said}"
        return Unusable("unavailable", text, XFORMERS.install)
    return no_cuda()


def _in_one_line(error: BaseException) -> str:
    """Also of what caused it: xFormers raises its own error from that of the loader."""
    cause = error.__cause__
    lines = [*str(error).splitlines()[:2], *([f"({type(cause).__name__}: {cause})"] if cause is not None else [])]
    return " ".join(" ".join(lines).split())


def attn_bias() -> Any:
    """The module of xFormers' bias classes."""
    return XFORMERS.module().attn_bias
