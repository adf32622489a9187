"""The real Python package of FlashAttention-2 over the double of its extension, where the package is installed.

It need not have been compiled: without CUDA it is its Python files, which is what is wanted here.

    FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \\
        pip install --no-build-isolation --no-deps --target FOLDER flash-attn==2.8.3
    PYTHONPATH=FOLDER pytest …
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

from flash_doubled import DOUBLE, installed_from

#: Ops of torch that the package makes for CUDA alone.
OPS = (
    "_flash_attn_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
)


def folder() -> Path | None:
    """Where the package lies; None where it is not installed."""
    for found in distributions(name="flash-attn"):
        module = Path(str(found.locate_file("flash_attn/flash_attn_interface.py")))
        if module.is_file():
            return module.parent.parent
    return None


@contextmanager
def over_the_double() -> Iterator[ModuleType]:
    """The package, its four ops running on the CPU what they run on CUDA: Python that calls the extension."""
    where = folder()
    assert where is not None
    with installed_from(DOUBLE, where):
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        assert Path(interface.__file__).is_relative_to(where)
        for name in OPS:
            op = getattr(interface, name)
            op.register_kernel("cpu")(op._init_fn)
        yield interface
