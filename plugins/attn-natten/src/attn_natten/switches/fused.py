"""Whether modules run fused neighborhood attention, or qk, softmax and av one after another."""

from __future__ import annotations

from ..log import logger
from . import flex, kv_parallelism
from .effect import Effect
from .flag import LOCK, Flag, checked_mode

FUSED = Flag("fused_na")


def use_fused_na(
    mode: bool = True,
    kv_parallel: bool = True,
    use_flex_attention: bool = False,
    force_flex_attention: bool = False,
) -> None:
    """Has `NeighborhoodAttention1D`, `2D` and `3D` run one fused call, or (False) unfused ones, as at first.

    Args:
        mode: False also turns KV parallelism and FlexAttention off, whatever the others say.
        kv_parallel: as by `use_kv_parallelism_in_fused_na`.
        use_flex_attention: prefer FlexAttention in fused calls, where it takes them; see `switches.flex`.
        force_flex_attention: let nothing else run them.

    Raises, and then changes nothing: InputError for what is not a bool; NonDeterministicError for `kv_parallel` in the
    deterministic mode of this package.
    """
    for name, value in (
        ("mode", mode),
        ("kv_parallel", kv_parallel),
        ("use_flex_attention", use_flex_attention),
        ("force_flex_attention", force_flex_attention),
    ):
        checked_mode(value, "use_fused_na", name)
    with LOCK:
        kv_parallelism.turn(mode and kv_parallel, "use_fused_na: kv_parallel")
        flex.turn(mode and use_flex_attention, mode and force_flex_attention)
        FUSED.value = mode
    if mode:
        parallel = "; a kernel that splits its backward pass over keys is not deterministic" if kv_parallel else ""
        logger.info("modules run fused neighborhood attention from now on%s", parallel)


def is_fused_na_enabled() -> bool:
    """False until `use_fused_na()`."""
    return FUSED.value


use_fna = use_fused_na
is_fna_enabled = is_fused_na_enabled


def effects() -> list[Effect]:
    how = "one fused call" if FUSED.value else "qk, softmax and av, one after another"
    return [Effect(name=FUSED.name, value=FUSED.value, effect=f"modules run {how}")]
