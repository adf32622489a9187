"""transformers: models run their attention by attn, in one line.

    from attn_core.integrations import transformers as attn_transformers

    attn_transformers.enable()
    model(…)                                                            # set to "sdpa", as most are by default: by attn
    AutoModel.from_pretrained(…, attn_implementation="attn")            # or one that chooses it
    model.set_attn_implementation("attn")

Forced by the host:
- It asks one registry for the attention function and another for the mask function, both by the same name. For a name
  that the second does not know it hands over no mask at all, so padding would silently be attended. Hence both are
  registered.
- It passes whatever the caller of a model gave it on to the attention function. Under a name of attn's own, an argument
  that is not known here to be harmless is an error that names it. Under "sdpa", which attn only stands in for, such a
  call goes to the host's function, as it would have without attn; `record` has the reason.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import InputError, IntegrationWarning
from ..hosts import HOSTS, check_version
from ..in_scope import in_scope, scope_of
from ..missing import MissingPackageError, need
from .eager_only import is_for_eager_alone
from .forward import HARMLESS, PACKED, UNSUPPORTED, attention_forward
from .masks import structured_mask
from .stand_in import Forward, stand_in

if TYPE_CHECKING:
    from ..reported import Report

__all__ = [
    "HARMLESS",
    "PACKED",
    "TESTED",
    "UNSUPPORTED",
    "attention_forward",
    "disable",
    "enable",
    "is_enabled",
    "report",
]

NAME = "attn"
#: The host's name for torch's attention: what its models use by default.
STOCK_NAME = "sdpa"
#: A name with one of these in it means something to the host.
TAKEN_PARTS = ("flash", "flex_attention", STOCK_NAME, "/", "|", ":", "@")
#: The versions of transformers that this was run with.
TESTED = ">=5.23,<5.24"
FIX = 'pip install "transformers>=5.23,<6"'


@dataclass(kw_only=True)
class _Enabled:
    """What `enable` registered under a name, and what was there before."""

    attention: Forward
    mask: Callable[..., Any]
    before: tuple[Any, Any] | None  #: attention and mask function of the host; None for a new name


_lock = threading.RLock()
_enabled: dict[str, _Enabled] = {}


def enable(
    name: str | None = None,
    *,
    ignore: Collection[str] = (),
    prefer: tuple[str, ...] | str = (),
    strict: bool = False,
) -> None:
    """Makes models run their attention by attn: those that are set to "sdpa", and those that are set to "attn".

    With a `name`, only models that are set to that name: several names may have kernels of their own. A second time,
    the options are replaced.

    Args:
        name: registered with an attention function and a mask function. None: "attn", and attn stands in for "sdpa".
        ignore: further keyword arguments, which a model hands to its attention, that have no bearing on it.
        prefer: kernel name patterns, the most preferred first, for calls that come by this name.
        strict: no other kernel may run for them; where none that matches takes a call, KernelRefusedError has the
            reasons. Needs `prefer`.

    Raises MissingPackageError without transformers; InputError for a name that is registered by someone else, and for
    `strict` without `prefer`; UnknownKernelError for a plain name in `prefer` that nobody registered.
    """
    check_version(HOSTS["transformers"])
    attentions, masks = _registries()
    scope = scope_of(prefer, strict)
    harmless = HARMLESS | frozenset(ignore)
    own = NAME if name is None else name

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        return attention_forward(*args, harmless=harmless, **kwargs)

    with _lock:
        held = _enabled.get(own)
        theirs = attentions.get(own) is not (held.attention if held else None)
        if own == "eager" or theirs or (held is None and own in masks):
            raise InputError(f"enable: transformers has an attention {own!r} already; choose another name")
        for part in (part for part in TAKEN_PARTS if part in own):
            raise InputError(
                f"enable: transformers takes a name with {part!r} in it, as {own!r}, for a kernel of its own; choose"
                " another"
            )
        before = _before(attentions, masks)
        mask = _mask_function(before[1], masks["eager"])
        _register(own, in_scope(forward, scope), mask, None)
        if name is None:
            standing_in = stand_in(forward, before[0], harmless, _is_standing_in)
            _register(STOCK_NAME, in_scope(standing_in, scope), mask, before)


def disable(name: str | None = None) -> None:
    """Takes out what `enable` registered, and gives "sdpa" back to the host; nothing happens where nothing is.

    Args:
        name: only what was registered under it; None: everything.

    A model that is still set to a name of attn's own raises at its next call; set another with
    `set_attn_implementation`. Where somebody registered another function in place of attn's, theirs stays, with a
    warning.
    """
    with _lock:
        for each in [name] if name is not None else list(_enabled):
            held = _enabled.pop(each, None)
            if held is not None:
                _take_out(each, held)


def is_enabled(name: str | None = None) -> bool:
    """Whether attn is registered under that name; None: under any."""
    return bool(_enabled) if name is None else name in _enabled


def report(model: torch.nn.Module) -> Report:
    """Which modules of a transformers model run their attention by attn now, which do not, and why; nothing is run."""
    from .reporting import report_on

    return report_on(model, _enabled)


def _register(name: str, attention: Forward, mask: Callable[..., Any], before: tuple[Any, Any] | None) -> None:
    attentions, masks = _registries()
    _enabled[name] = _Enabled(attention=attention, mask=mask, before=before)
    attentions.register(name, attention)
    masks.register(name, mask)


def _before(attentions: Any, masks: Any) -> tuple[Any, Any]:
    """What "sdpa" is without attn."""
    held = _enabled.get(STOCK_NAME)
    if held is not None and held.before is not None and attentions[STOCK_NAME] is held.attention:
        return held.before
    return attentions[STOCK_NAME], masks[STOCK_NAME]


def _take_out(name: str, held: _Enabled) -> None:
    for registry, ours, before in zip(_registries(), (held.attention, held.mask), held.before or (None, None)):
        if registry._global_mapping.get(name) is not ours:
            if name in registry._global_mapping:
                warnings.warn(
                    f"disable: somebody registered another function under transformers' {name!r} since; it stays",
                    IntegrationWarning,
                    stacklevel=4,
                )
        elif before is None:  # the host has no public way to take one out
            del registry._global_mapping[name]
        else:
            registry.register(name, before)


def _is_standing_in() -> bool:
    return STOCK_NAME in _enabled


def _mask_function(stock: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """The host's, or one that gives structure, where the host is a version whose words are known here."""
    is_tested = _is_tested()

    def mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
        # The host hands its mask function for "sdpa" to kernels of the hub, too: theirs are dense.
        name = getattr(config, "_attn_implementation", None)
        if name not in _enabled:
            return stock(*args, config=config, **kwargs)
        made = stock
        if name != STOCK_NAME and is_for_eager_alone(config):
            made, kwargs = eager, {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        if args or not is_tested:
            return made(*args, config=config, **kwargs)
        floating = None if made is stock else kwargs.get("dtype", torch.float32)
        return structured_mask(made, config=config, floating=floating, **kwargs)

    return mask


@cache
def _is_tested() -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(TESTED).contains(need("transformers", __name__, FIX).__version__, prereleases=True)


def _registries() -> tuple[Any, Any]:
    """transformers' registries of attention functions and of mask functions."""
    purpose = "attn_core.integrations.transformers"
    need("transformers", purpose, FIX)
    modeling = need("transformers.modeling_utils", purpose, FIX)
    masking = need("transformers.masking_utils", purpose, FIX)
    try:
        return modeling.ALL_ATTENTION_FUNCTIONS, masking.ALL_MASK_ATTENTION_FUNCTIONS
    except AttributeError as error:
        raise MissingPackageError(
            f"{purpose} needs a transformers with a registry of mask functions: {error}.\nTo install it: {FIX}"
        ) from error
