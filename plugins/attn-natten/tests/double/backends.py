"""The predicates of the double, by which NATTEN says what it can run. They say yes, but to what is in REFUSES."""

from __future__ import annotations

#: name of a predicate -> a function (query, key, value, options) -> why not, or None
REFUSES = {}


def _answer(name, query, key, value, raise_error, **options):
    reason = REFUSES[name](query, key, value, options) if name in REFUSES else None
    if reason is not None and raise_error:
        raise ValueError(reason)
    return reason is None


def can_run_cutlass_fna(query, key, value, raise_error=False):
    return _answer("can_run_cutlass_fna", query, key, value, raise_error)


def can_run_cutlass_hopper_fna(query, key, value, raise_error=False):
    return _answer("can_run_cutlass_hopper_fna", query, key, value, raise_error)


def can_run_cutlass_blackwell_fna(query, key, value, raise_error=False):
    return _answer("can_run_cutlass_blackwell_fna", query, key, value, raise_error)


def can_run_cutlass_fmha(query, key, value, is_causal, is_varlen, raise_error=False):
    return _answer("can_run_cutlass_fmha", query, key, value, raise_error, is_causal=is_causal, is_varlen=is_varlen)


def can_run_cutlass_hopper_fmha(query, key, value, is_causal, is_varlen, raise_error=False):
    return _answer(
        "can_run_cutlass_hopper_fmha", query, key, value, raise_error, is_causal=is_causal, is_varlen=is_varlen
    )


def can_run_cutlass_blackwell_fmha(query, key, value, is_causal, is_varlen, raise_error=False):
    return _answer(
        "can_run_cutlass_blackwell_fmha", query, key, value, raise_error, is_causal=is_causal, is_varlen=is_varlen
    )


def can_run_flex_attention(query, key, value, torch_compile, is_causal=False, is_varlen=False, raise_error=False):
    return _answer("can_run_flex_attention", query, key, value, raise_error, is_causal=is_causal, is_varlen=is_varlen)
