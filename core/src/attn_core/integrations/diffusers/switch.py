"""diffusers switched to attn, and back.

Forced by the host:
- Its backends are members of an enum without an open end, and its registry is keyed by them. `enable` adds the member
  that the enum lacks, and `disable` takes it out again.
- It reads DIFFUSERS_ATTN_BACKEND when its module of backends is first imported, and does not start with a name that it
  does not know. `enable` imports that module, so it must come before the first model.
- It drops every argument that a backend's function does not name. That of attn takes all names: what it cannot honour
  is an error.
- It splits a sequence over devices (context parallelism) inside its own backends. Such a call goes to the backend that
  was active before.
- Its older models choose no backend: see own_calls.py. They follow the active one.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection
from functools import partial
from inspect import signature
from typing import Any

from ...bias import AttnBias
from ...errors import InputError
from ..hosts import HOSTS, check_version
from ..in_scope import in_scope, scope_of
from ..missing import MissingPackageError, need
from . import calls
from .calls import State, attention_forward, own_call
from .enum_member import add_member, member_of, remove_member
from .own_calls import DISPATCHER, OwnCalls

NAME = "attn"
MEMBER = "ATTN"
#: The versions of diffusers that this was run with.
TESTED = ">=0.36,<0.43"
FIX = 'pip install "diffusers>=0.36,<0.43"'

_lock = threading.RLock()
_own_calls = OwnCalls()


class _EveryName(frozenset[str]):
    """Names of the arguments that a backend takes: those that it lists, and all others; so diffusers drops none."""

    def __contains__(self, name: object) -> bool:
        return True


def enable(*, prefer: Collection[str] | str = (), strict: bool = False) -> None:
    """Adds the backend "attn" to diffusers, and makes it the active one: that of every model that chose none.

    Then `dispatch_attention_fn(…, backend="attn")`, `with attention_backend("attn")`,
    `model.set_attention_backend("attn")` and DIFFUSERS_ATTN_BACKEND=attn choose it, too. Models that call torch's
    scaled_dot_product_attention by themselves run by attn while it is the active one. A second time, it is made active
    again and the options are replaced.

    Args:
        prefer: kernel name patterns, the most preferred first, for calls that come from diffusers.
        strict: no other kernel may run for them; where none that matches takes a call, KernelRefusedError has the
            reasons. Needs `prefer`.

    Raises MissingPackageError without diffusers, or with one that has no such registry; InputError where diffusers has
    a backend "attn" of its own, and for `strict` without `prefer`; UnknownKernelError for a plain name in `prefer`
    that nobody registered.
    """
    check_version(HOSTS["diffusers"])
    scope = scope_of(prefer, strict)
    forward, own = in_scope(attention_forward, scope), in_scope(own_call, scope)
    module = _dispatcher()
    names, registry = module.AttentionBackendName, module._AttentionBackendRegistry
    with _lock:
        if calls.state is None and (NAME in names._value2member_map_ or MEMBER in vars(names)):
            raise InputError(f"enable: diffusers has a backend {NAME!r} already")
        member, before = member_of(names, MEMBER, NAME), registry._active_backend
        if before == member:
            before = calls.state.before if calls.state else names.NATIVE
        calls.state = State(module=module, member=member, before=before)
        add_member(names, member)
        registry._backends[member] = forward
        registry._constraints[member] = [
            module._check_attn_mask_or_causal,
            module._check_device,
            partial(_check_shape, module),
        ]
        registry._supported_arg_names[member] = _EveryName(signature(attention_forward).parameters)
        registry._supports_context_parallel.add(NAME)
        registry._active_backend = member
        _own_calls.start(own, lambda: registry._active_backend == member)


def disable() -> None:
    """Takes out what `enable` put in, and makes the backend active again that was; nothing happens where none is.

    A model that is still set to "attn" by name raises a KeyError that names it at its next call: call its
    `reset_attention_backend()` before. DIFFUSERS_ATTN_BACKEND=attn counts as "native" then.
    """
    with _lock:
        if calls.state is None:
            return
        module, member = calls.state.module, calls.state.member
        names, registry = module.AttentionBackendName, module._AttentionBackendRegistry
        if registry._active_backend == member:
            registry._active_backend = calls.state.before
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(member, None)
        registry._supports_context_parallel.discard(NAME)
        remove_member(names, member)
        _own_calls.stop()
        calls.state = None


def is_enabled() -> bool:
    """Whether diffusers has the backend "attn" now."""
    return calls.state is not None


def _check_shape(module: Any, **kwargs: Any) -> None:
    """diffusers' own check, where the mask is a tensor; attn checks a bias by itself."""
    if isinstance(kwargs.get("attn_mask"), AttnBias):
        kwargs = {**kwargs, "attn_mask": None}
    module._check_shape(**kwargs)


def _dispatcher() -> Any:
    """diffusers' module of backends. Raises MissingPackageError where there is none, or one without what is needed."""
    purpose = "attn_core.integrations.diffusers"
    need("diffusers", purpose, FIX)
    constants = need("diffusers.utils.constants", purpose, FIX)
    asked = getattr(constants, "DIFFUSERS_ATTN_BACKEND", None)
    if asked == NAME and DISPATCHER not in sys.modules:  # read at import, when the enum does not know it yet
        constants.DIFFUSERS_ATTN_BACKEND = "native"  # type: ignore[attr-defined]
    try:
        module = need(DISPATCHER, purpose, FIX)
    finally:
        if asked is not None:
            constants.DIFFUSERS_ATTN_BACKEND = asked  # type: ignore[attr-defined]
    registry = getattr(module, "_AttentionBackendRegistry", None)
    if not hasattr(registry, "_supports_context_parallel"):
        raise MissingPackageError(f"{purpose} needs a diffusers that splits calls by backend.\nTo install it: {FIX}")
    return module
