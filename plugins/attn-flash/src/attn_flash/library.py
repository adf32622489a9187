"""Which FlashAttention is installed, and whether its kernels can be there.

Forced by what an installation can be beside what any library can:
- Three libraries share two names. `flash_attn` is FlashAttention-2, or just the folder that FlashAttention-4 lies in
  (`flash_attn.cute`): a namespace, which imports without an error and offers nothing. A release of FlashAttention-2 may
  bring an early `flash_attn.cute` of its own. FlashAttention-3 is `flash_attn_interface`, and once had the distribution
  name of FlashAttention-2. So a library is found by its distribution and by its module, both.
- Built without CUDA, its extension is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from attn_core import Unusable
from attn_core.library import Library, distributed


@dataclass(frozen=True, kw_only=True, eq=False)
class FlashAttention(Library):
    """One generation of FlashAttention."""

    extension: tuple[str, ...]  #: what its CUDA kernels are in
    needs: Mapping[str, tuple[str, ...]]  #: function -> parameters without which it is another generation
    borrowed: str = ""  #: another distribution that had this library in it, at such versions alone

    def unusable(self) -> Unusable | None:
        found = self.unfit()
        if found is not None:
            return found
        if torch.version.hip is not None:
            return Unusable("unavailable", f"{self.name} is spoken to on NVIDIA's GPUs; this torch is built for ROCm")
        failure = self.failure()
        if isinstance(failure, ModuleNotFoundError) and failure.name in self.extension:
            return Unusable("unavailable", f"{self} has no {failure.name}, its CUDA kernels", self.rebuild)
        return super().unusable() or self._lacking(self.module())

    def distributed(self) -> str | None:
        found = super().distributed()
        if found is None and self.borrowed:
            borrowed = distributed(self.borrowed)
            return borrowed if borrowed is not None and self.is_supported(borrowed) else None
        return found

    def _lacking(self, module: ModuleType) -> Unusable | None:
        for function, parameters in self.needs.items():
            missing = [name for name in parameters if not self.takes(function, name)]
            if missing:
                what = f"{function}({', '.join(missing)})" if hasattr(module, function) else function
                return Unusable("unavailable", f"{self} is of another generation: it has no {what}", self.install)
        return None


FA2 = FlashAttention(
    name="FlashAttention-2",
    distribution="flash-attn",
    supported=">=2.7,<3",
    modules=("flash_attn.flash_attn_interface",),
    extension=("flash_attn_2_cuda",),
    needs={
        "flash_attn_func": ("softcap", "alibi_slopes", "deterministic", "return_attn_probs"),
        "flash_attn_varlen_func": ("softcap", "alibi_slopes", "deterministic", "return_attn_probs"),
        "flash_attn_with_kvcache": ("softcap", "block_table", "cache_seqlens", "return_softmax_lse"),
    },
    install="pip install --no-build-isolation 'attn-flash[fa2]'",
    rebuild="pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir 'flash-attn>=2.7,<3'",
)
FA3 = FlashAttention(
    name="FlashAttention-3",
    distribution="flash-attn-3",
    supported=">=3.0.0b1,<4",
    modules=("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    extension=("flash_attn_3", "flash_attn_3._C", "flash_attn_3_cuda"),
    needs={
        "flash_attn_func": ("softcap", "deterministic"),
        "flash_attn_varlen_func": ("softcap", "deterministic", "seqused_k"),
        "flash_attn_with_kvcache": ("softcap", "page_table", "cache_seqlens", "return_softmax_lse"),
    },
    install="pip install --no-build-isolation"
    " 'flash-attn-3 @ git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    rebuild="pip install --force-reinstall --no-deps --no-build-isolation"
    " 'flash-attn-3 @ git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    borrowed="flash-attn",
)
FA4 = FlashAttention(
    name="FlashAttention-4",
    distribution="flash-attn-4",
    supported=">=4.0.0b13,<5",  # before, a backward that is to be bit-equal counts its blocks wrongly
    modules=("flash_attn.cute",),
    extension=(),
    needs={
        "flash_attn_func": ("softcap", "deterministic", "return_lse"),
        "flash_attn_varlen_func": ("softcap", "deterministic", "return_lse", "seqused_k", "page_table"),
    },
    install="pip install 'attn-flash[fa4]'",
    rebuild="pip install --force-reinstall --no-deps 'flash-attn-4>=4.0.0b13,<5'",
    told_by_distribution=True,
)


def forget() -> None:
    """Looks again at the next call, as after an installation."""
    for library in (FA2, FA3, FA4):
        library.forget()
