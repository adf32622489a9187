"""Whether the backward pass of fused attention may split keys and values over parallel parts.

That is faster where batch and heads are few, takes more memory, and sums in no fixed order. NATTEN's page says that it
is on by default; its code starts with it off and turns it on in `use_fused_na()`, and so does this.
"""

from __future__ import annotations

import torch

from ..errors import NonDeterministicError
from ..log import logger
from .deterministic import are_deterministic_algorithms_enabled
from .effect import NOTHING_SPLITS, SPLITTING, Effect, say_no_effect, splits_somewhere
from .flag import LOCK, Flag, checked_mode

KV_PARALLELISM = Flag("kv_parallelism")
#: Whether a switch was ever thrown: until then, a library with a default of its own keeps it.
ASKED = Flag("kv_parallelism_asked")


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Turns KV parallelism on or off.

    Turning it on is ignored, with a logged warning, under `torch.use_deterministic_algorithms(True)`. It warns, once,
    where no kernel is ready that splits.

    Raises InputError for a mode that is not a bool; NonDeterministicError for True in the deterministic mode of this
    package.
    """
    checked_mode(mode, "use_kv_parallelism_in_fused_na")
    if not turn(mode, "use_kv_parallelism_in_fused_na"):
        return
    if not splits_somewhere():
        say_no_effect("use_kv_parallelism_in_fused_na", NOTHING_SPLITS)
    elif mode:
        logger.warning(
            "KV parallelism in fused neighborhood attention: the backward pass is faster, takes more memory, and is"
            " not deterministic"
        )


def turn(mode: bool, said_by: str) -> bool:
    """Whether it is now as `mode` says. Raises NonDeterministicError, naming who asked."""
    with LOCK:
        if mode and torch.are_deterministic_algorithms_enabled():
            logger.warning("%s: ignored, since torch.use_deterministic_algorithms(True) is in force", said_by)
            return False
        if mode and are_deterministic_algorithms_enabled():
            raise NonDeterministicError(
                f"{said_by}: KV parallelism is not deterministic; takes False after"
                " attn_natten.use_deterministic_algorithms(), got True"
            )
        KV_PARALLELISM.value, ASKED.value = mode, True
    return True


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """False until `use_fused_na()` or `use_kv_parallelism_in_fused_na()`."""
    return KV_PARALLELISM.value


def is_kv_parallelism_asked_about() -> bool:
    """Whether a switch was thrown, either way: until then, a library keeps its own default."""
    return ASKED.value


def effects() -> list[Effect]:
    how = "as kv_splits says" if KV_PARALLELISM.value else "not at all"
    works = splits_somewhere()
    text = f"{' and '.join(SPLITTING)} split their backward pass {how}" if works else NOTHING_SPLITS
    return [Effect(name=KV_PARALLELISM.name, value=KV_PARALLELISM.value, effect=text, works=works)]
