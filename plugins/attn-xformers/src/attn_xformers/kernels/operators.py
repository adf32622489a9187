"""The operators of xFormers by name, and what they do that no class attribute of theirs tells.

What a class attribute or `not_supported_reasons` tells is asked of them, never written here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from attn_core import Unusable

from .. import library


@dataclass(frozen=True, kw_only=True)
class Manners:
    """What an operator does at the edges. The defaults are for one of which nothing is known.

    Args:
        never_reads_padding: keys and values behind a sequence's length may be NaN; else they are zeroed before.
        rows_without_keys: a query that sees no key gets zeros, and an LSE of +inf or -inf; else masks that leave one
            without keys are refused where that is known beforehand, and mended where it is not.
        needs_lengths: runs only with a bias that has lengths, though it says that it takes none.
        gives_lse: hands the LSE out.
    """

    never_reads_padding: bool = False
    rows_without_keys: bool = False
    needs_lengths: bool = False
    gives_lse: bool = True


@dataclass(frozen=True)
class Pair:
    """A forward operator and the backward that takes its LSE: classes of xFormers, or of someone's own."""

    forward: Any
    backward: Any = None
    manners: Manners = field(default_factory=Manners)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator of the installed xFormers: the classes `forward` and `backward` of `xformers.ops.fmha.<module>`."""

    name: str
    module: str
    forward: str = "FwOp"
    backward: str | None = "BwOp"
    manners: Manners = field(default_factory=Manners)
    needs: str = ""  #: what must be there beside xFormers

    def pair(self) -> Pair:
        """Its classes. Raises BrokenLibraryError where xFormers cannot be imported, AttributeError without them."""
        return _pair(self)

    def pair_if_imported(self) -> Pair | None:
        """Its classes, once it was weighed; None before, and where it has none."""
        if not library.XFORMERS.is_imported():
            return None
        try:
            return _pair(self)
        except (ImportError, AttributeError):
            return None

    def probe(self) -> Unusable | None:
        """Why it cannot run here, or None."""
        found = library.XFORMERS.unusable()
        if found is not None:
            return found
        try:
            pair = self.pair()
        except (ImportError, AttributeError):
            text = f"{library.XFORMERS} has no operator {self.module}.{self.forward}"
            return Unusable("unavailable", text)
        if not pair.forward.is_available():
            needs = f"; it needs {self.needs}" if self.needs else ""
            return Unusable("unavailable", f"{pair.forward.NAME} of {library.XFORMERS} is not built{needs}")
        return library.without_cuda(pair.forward) if "cpu" not in pair.forward.SUPPORTED_DEVICES else None


def _pair(operator: Operator) -> Pair:
    return _found(library.XFORMERS.module(), operator)


@functools.cache
def _found(fmha: Any, operator: Operator) -> Pair:
    module: Any = import_module(f"{fmha.__name__}.{operator.module}")
    backward = None if operator.backward is None else getattr(module, operator.backward)
    return Pair(getattr(module, operator.forward), backward, operator.manners)


#: FlashAttention says of a query without keys that its output is zero; its loads are bounded by the lengths, and what
#: is masked is overwritten, not added to.
FLASH = Manners(never_reads_padding=True, rows_without_keys=True)

OPERATORS = (
    Operator(name="cutlass", module="cutlass"),
    Operator(name="cutlass-blackwell", module="cutlass_blackwell", needs="fbgemm-gpu with its attention kernels"),
    Operator(name="flash", module="flash", manners=FLASH, needs="torch's flash attention, or flash-attn"),
    Operator(name="flash3", module="flash3", manners=Manners(rows_without_keys=True), needs="flash-attn-3"),
    Operator(
        name="flash3-splitkv",
        module="flash3",
        forward="FwOp_KVSplit",
        backward=None,
        manners=Manners(rows_without_keys=True, needs_lengths=True),
        needs="flash-attn-3",
    ),
    Operator(name="triton-splitk", module="triton_splitk", backward=None, needs="Triton"),
    Operator(name="ck", module="ck", needs="ROCm"),
    Operator(name="ck-splitk", module="ck_splitk", backward=None, manners=Manners(gives_lse=False), needs="ROCm"),
)
