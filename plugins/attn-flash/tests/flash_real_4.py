"""The real front end of FlashAttention-4 over a double of what launches its kernels.

Its `interface.py` cannot be imported without the compiler of its kernels, 260 MB. Where that is not installed, the part
that does not need it is taken out of an installed release and put where `flash_attn.cute` is looked for: the functions
that are called, and the two that torch's autograd calls, with all that they keep from one pass for the other. Where it
is, the whole is imported, and the two functions that launch kernels are replaced (`flash_compiler_4`).

    pip install --no-deps --target FOLDER flash-attn-4==4.0.0b36
    PYTHONPATH=FOLDER pytest …
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

from attn_core.testing import fake_distribution
from flash_doubled import DOUBLE, VERSIONS, installed_from

INTERFACE = Path("flash_attn/cute/interface.py")
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")
TAKEN = {"FlashAttnFunc", "FlashAttnVarlenFunc", "_validate_gather_bwd_kwargs", *FUNCTIONS}
#: What stands before them: their imports, and the double in place of what launches kernels.
HEAD = """\
from __future__ import annotations

import operator
import warnings
from typing import Callable, Optional, Tuple

import torch
from flash_double.fa4 import flash_attn_bwd as _flash_attn_bwd
from flash_double.fa4 import flash_attn_fwd as _flash_attn_fwd
"""


def source() -> Path | None:
    """The file of the release that the double is of; None where it is not installed."""
    for found in distributions(name="flash-attn-4"):
        if found.version == VERSIONS["fa4"]:
            return Path(str(found.locate_file(INTERFACE)))
    return None


@contextmanager
def over_the_double(folder: Path) -> Iterator[None]:
    """Within it, `flash_attn.cute` is the real one, or the part of it that needs no compiler, written into `folder`."""
    import flash_compiler_4  # which imports this module

    if flash_compiler_4.is_there():
        with flash_compiler_4.over_the_double(folder):
            yield
        return
    text = source().read_text(encoding="utf-8")
    lines = text.splitlines()
    nodes = [node for node in ast.parse(text).body if getattr(node, "name", None) in TAKEN]
    assert {node.name for node in nodes} == TAKEN
    parts = ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]
    (folder / INTERFACE).parent.mkdir(parents=True)
    (folder / INTERFACE).write_text("\n\n\n".join([HEAD, *parts]) + "\n", encoding="utf-8")
    init = f"from .interface import {', '.join(FUNCTIONS)}\n"
    (folder / INTERFACE).with_name("__init__.py").write_text(init, encoding="utf-8")
    fake_distribution(folder, "flash-attn-4", VERSIONS["fa4"], {}, {}, ())
    with installed_from(folder, DOUBLE):
        yield
