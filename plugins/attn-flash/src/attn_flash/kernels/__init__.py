"""Kernels of the installed generations of FlashAttention, each under the name that users know it by.

`fa2`, `fa3` and `fa4` declare them; `masks` says which biases are FlashAttention's, in its terms, and refuses the rest;
`run_fa2` and so on call the libraries, and are the only modules that import them.
"""

from __future__ import annotations

from . import fa2, fa3, fa4

KERNELS = (fa2.KERNEL, fa3.KERNEL, fa4.KERNEL)
