"""attn: one attention call, any kernel.

This module loads no kernel library, opens no CUDA context and finds no plugin; the first call does what it needs.
"""

from __future__ import annotations

from collections.abc import Collection

from .assign import Assignment, assign
from .bias import (
    ALiBi,
    AttnBias,
    BlockMask,
    Cached,
    Causal,
    CausalBias,
    CausalVariant,
    Intersection,
    KeyPadding,
    Mask,
    MaskMod,
    Neighborhood,
    Paged,
    PrefixLM,
    RelPosTable,
    Score,
    ScoreMod,
    Segments,
    Sum,
    TensorBias,
    Window,
    as_bias,
    causal_lower_right,
    causal_upper_left,
    mask_mod,
    score_mod,
)
from .capabilities import ANY_DEVICE, ANY_DIM, Backward, Capabilities, Refusal
from .cost import Cost, Work
from .environment import hosts_to_enable as _hosts_to_enable
from .errors import (
    AttnError,
    BrokenLibraryError,
    CalibrationWarning,
    DeclarationError,
    DuplicateKernelError,
    InputError,
    InputTypeError,
    IntegrationWarning,
    KernelRefusedError,
    NoKernelError,
    PlanError,
    PluginWarning,
    UnboundBiasError,
    UnknownKernelError,
)
from .explain import Explanation, Verdict, explain, explain_problem
from .functional import attention, scaled_dot_product_attention
from .hookspecs import hookimpl
from .kernel import Kernel, Unusable
from .library import Library
from .merge import merge
from .plan import Plan, plan
from .probes import no_cuda
from .problem import Problem
from .record import Recorder, Row, record
from .reference import reference_attention
from .register_sdpa import register_sdpa
from .registry import Plugin, Registration, registry
from .scope import allow, prefer, refresh
from .usage import Usage, count_usage

__all__ = [
    "ANY_DEVICE",
    "ANY_DIM",
    "ALiBi",
    "Assignment",
    "AttnBias",
    "AttnError",
    "Backward",
    "BlockMask",
    "BrokenLibraryError",
    "Cached",
    "CalibrationWarning",
    "Capabilities",
    "Causal",
    "CausalBias",
    "CausalVariant",
    "Cost",
    "DeclarationError",
    "DuplicateKernelError",
    "Explanation",
    "InputError",
    "InputTypeError",
    "IntegrationWarning",
    "Intersection",
    "Kernel",
    "KernelRefusedError",
    "KeyPadding",
    "Library",
    "Mask",
    "MaskMod",
    "Neighborhood",
    "NoKernelError",
    "Paged",
    "Plan",
    "PlanError",
    "Plugin",
    "PluginWarning",
    "PrefixLM",
    "Problem",
    "Recorder",
    "Refusal",
    "Registration",
    "RelPosTable",
    "Row",
    "Score",
    "ScoreMod",
    "Segments",
    "Sum",
    "TensorBias",
    "UnboundBiasError",
    "UnknownKernelError",
    "Unusable",
    "Usage",
    "Verdict",
    "Window",
    "Work",
    "allow",
    "as_bias",
    "assign",
    "attention",
    "causal_lower_right",
    "causal_upper_left",
    "count_usage",
    "disable",
    "enable",
    "explain",
    "explain_problem",
    "hookimpl",
    "is_available",
    "kernel",
    "kernels",
    "mask_mod",
    "merge",
    "no_cuda",
    "plan",
    "plugins",
    "prefer",
    "record",
    "reference_attention",
    "refresh",
    "register",
    "register_sdpa",
    "scaled_dot_product_attention",
    "score_mod",
]

kernel = registry.kernel
kernels = registry.kernels
plugins = registry.plugins
register = registry.register


def is_available(name: str) -> bool:
    """Whether a kernel of that name is registered and can run on this machine. Raises nothing for an unknown name."""
    return any(k.name == name and registry.condition(k).state in ("ready", "failed") for k in kernels(name))


def enable(*hosts: str, prefer: Collection[str] | str = (), strict: bool = False) -> None:
    """Has these libraries run their attention by attn, in the whole process: "torch", "timm", "transformers", …

        attn_core.enable("timm", "transformers", prefer="flash/*")

    The same as each integration's own `enable`. Enabled ones take the new options. Where one cannot be enabled, those
    that this call enabled are disabled again.

    Args:
        hosts: names of integrations; at least one.
        prefer: patterns of kernel names, as in `prefer`, for the calls that come from these libraries; one or several.
        strict: for these calls only kernels that match run, else KernelRefusedError.

    Raises InputError for no or an unknown name, MissingPackageError where a library is not installed, and what `prefer`
    raises. Warns, once, of a version of the library that is outside of the range that is tested.
    """
    from .integrations import hosts as integrations  # only what is used is loaded

    integrations.enable(*hosts, prefer=prefer, strict=strict)


def disable(*hosts: str) -> None:
    """Gives these libraries their own attention back; without names, all that are enabled.

    What is not enabled is left alone. Raises InputError for an unknown name.
    """
    from .integrations import hosts as integrations

    integrations.disable(*hosts)


if _hosts_to_enable():
    from .integrations.hosts import enable_as_told

    enable_as_told(_hosts_to_enable())
