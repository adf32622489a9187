"""Whether fused calls run by FlexAttention, and whether FlexAttention may be compiled.

In NATTEN 0.17.5, FlexAttention was asked for by `use_flex_attention()`, and by `force_flex_attention()`. Here these are
a wish and a condition on what the core chooses: `with scope():` around a fused call puts it into force.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .effect import Effect, say_no_effect
from .flag import LOCK, Flag, checked_mode

#: The kernels that are FlexAttention, by whoever calls it.
KERNELS = "*/flex*"

WANTED = Flag("flex_attention")
FORCED = Flag("flex_attention_forced")
COMPILE = Flag("flex_compile")
COMPILE_BACKPROP = Flag("flex_compile_backprop")

WHY_NOT = "torch/flex is compiled on CUDA and in a graph, natten/flex-fna is not, whatever is allowed"


def use_flex_attention() -> None:
    """`use_fused_na()` with FlexAttention preferred, where it takes the call."""
    from .fused import use_fused_na

    use_fused_na(use_flex_attention=True)


def force_flex_attention() -> None:
    """`use_fused_na()` with FlexAttention or nothing: a fused call that it refuses raises KernelRefusedError."""
    from .fused import use_fused_na

    use_fused_na(use_flex_attention=True, force_flex_attention=True)


def is_flex_attention_enabled() -> bool:
    """Whether fused calls prefer FlexAttention, or insist on it; False at first."""
    return WANTED.value or FORCED.value


def is_flex_attention_forced() -> bool:
    """Whether fused calls insist on FlexAttention; False at first."""
    return FORCED.value


should_use_flex_attention = is_flex_attention_enabled  # as in natten.context
should_force_flex_attention = is_flex_attention_forced


def turn(wanted: bool, forced: bool) -> None:
    with LOCK:
        WANTED.value, FORCED.value = wanted, forced


def scope() -> AbstractContextManager[Any]:
    """What a fused call is made in: where asked for, FlexAttention comes first, or alone."""
    if not is_flex_attention_enabled():
        return nullcontext()
    from attn_core import prefer

    return prefer(KERNELS, strict=FORCED.value)


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Allows FlexAttention to be compiled, with `backprop` also where it is differentiated; False forbids both.

    The state is kept, and nothing asks for it: warns of that, once. Raises InputError for what is not a bool.
    """
    checked_mode(mode, "allow_flex_compile")
    checked_mode(backprop, "allow_flex_compile", "backprop")
    say_no_effect("allow_flex_compile", WHY_NOT)
    with LOCK:
        COMPILE.value, COMPILE_BACKPROP.value = mode, mode and backprop


def allow_flex_compile_backprop(mode: bool = True) -> None:
    """Allows FlexAttention to be compiled where it is differentiated, too, if it is allowed at all.

    Kept, and warned of, as `allow_flex_compile` is; raises what that does.
    """
    checked_mode(mode, "allow_flex_compile_backprop")
    say_no_effect("allow_flex_compile_backprop", WHY_NOT)
    with LOCK:
        COMPILE_BACKPROP.value = COMPILE.value and mode


def disable_flex_compile() -> None:
    """Forbids FlexAttention to be compiled."""
    say_no_effect("disable_flex_compile", WHY_NOT)
    with LOCK:
        COMPILE.value = COMPILE_BACKPROP.value = False


def disable_flex_compile_backprop() -> None:
    """Forbids FlexAttention to be compiled where it is differentiated."""
    say_no_effect("disable_flex_compile_backprop", WHY_NOT)
    COMPILE_BACKPROP.value = False


def is_flex_compile_allowed() -> bool:
    """False until `allow_flex_compile()`."""
    return COMPILE.value


def is_flex_compile_backprop_allowed() -> bool:
    """False until `allow_flex_compile(backprop=True)`, or `allow_flex_compile_backprop()` after it."""
    return COMPILE_BACKPROP.value


def effects() -> list[Effect]:
    if FORCED.value:
        text = f"fused calls run by {KERNELS}, or raise KernelRefusedError"
    elif WANTED.value:
        text = f"fused calls prefer {KERNELS}"
    else:
        text = "the core chooses the kernel of a fused call"
    return [
        Effect(name=WANTED.name, value=is_flex_attention_enabled(), effect=text),
        Effect(name=FORCED.name, value=FORCED.value, effect=text),
        Effect(name=COMPILE.name, value=COMPILE.value, effect=WHY_NOT, works=False),
        Effect(name=COMPILE_BACKPROP.name, value=COMPILE_BACKPROP.value, effect=WHY_NOT, works=False),
    ]
