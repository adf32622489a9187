"""enable() and disable(): the one place that changes timm."""

from __future__ import annotations

import sys
import threading
import warnings

import torch

from ...errors import IntegrationWarning
from ..hosts import HOSTS, check_version
from . import calls, fused
from .host import host
from .sites import FUSED, RENAMED, SDPA, Site, sites

_lock = threading.Lock()
#: What is redirected now; empty where timm is as it came.
_redirected: list[Site] = []


def enable(*, prefer: tuple[str, ...] = (), strict: bool = False) -> None:
    """Has every timm model of this process compute attention by attn, whenever it was made; `disable()` undoes it.

    Modules that timm leaves out by default (Swin, Visformer, XCiT) and those with `fused_attn` off are redirected, too,
    where this computes the same; `report(model)` lists what is redirected and what is not. A second time changes the
    options only. Compiled functions are compiled anew (`torch.compiler.reset()`).

    Args:
        prefer: kernel name patterns for calls that come from timm, the most preferred first. They come before those of
            the scope that the model runs in.
        strict: nothing but these kernels may run; a call that none of them takes is a KernelRefusedError that names
            the module.

    Raises MissingPackageError without timm; what `attn_core.prefer` raises for its patterns.
    """
    check_version(HOSTS["timm"])
    host("timm")  # all its models, so that their functions are found
    layers = host("timm.layers")
    with _lock:
        calls.use(calls.Options(prefer=tuple(prefer), strict=strict))
        if not _redirected:
            _redirected.extend(found := sites())
            fused.learn(layers, found)
            setattr(torch.nn.functional, RENAMED[SDPA], calls.from_timm)
            for site in found:
                if site.owner is not None:
                    setattr(site.owner, RENAMED[FUSED], property(fused.fused))
            for site in found:  # once all that the new code looks up is there
                site.function.__code__ = site.redirected
        _forget_graphs()


def disable() -> None:
    """Gives timm its own code back; nothing happens where it has it. Compiled functions are compiled anew."""
    with _lock:
        for site in _redirected:
            if site.function.__code__ is site.redirected:
                site.function.__code__ = site.stock
            else:
                warnings.warn(
                    f"timm: {site.name} was changed by somebody else meanwhile; left as it is",
                    IntegrationWarning,
                    stacklevel=2,
                )
        if _redirected:
            _redirected.clear()
            calls.use(calls.Options())
            _forget_graphs()


def is_enabled() -> bool:
    """Whether timm's models compute attention by attn now."""
    return bool(_redirected)


def _forget_graphs() -> None:
    """Has all that was compiled compiled anew: the guards of a graph do not see that the code of a function changed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
