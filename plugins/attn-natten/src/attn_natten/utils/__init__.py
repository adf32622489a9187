"""`natten.utils` by its names: the capability of a device, and NATTEN 0.17's checks of parameters."""

from __future__ import annotations

from ..machine import get_device_cc
from .checks import (
    check_all_args,
    check_causal_arg,
    check_dilation_arg,
    check_kernel_size_arg,
    check_stride_arg,
    get_num_na_weights,
)

__all__ = [
    "check_all_args",
    "check_causal_arg",
    "check_dilation_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
    "get_device_cc",
    "get_num_na_weights",
]
