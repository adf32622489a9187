"""Kernels of an installed NATTEN, each under NATTEN's own name for it.

`fna` and `fmha` declare them; `windows` and `documents` say which biases are NATTEN's, in its terms; `limits` and
`asked` refuse what NATTEN would; `run_fna` and `run_fmha` call it, and are the only modules that import it.
"""

from __future__ import annotations

from . import fmha, fna

KERNELS = (*fna.KERNELS, *fmha.KERNELS)
