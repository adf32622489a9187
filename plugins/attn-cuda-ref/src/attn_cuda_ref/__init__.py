"""A first-party CUDA kernel for every bias of attn: readable text, compiled on first use for the problem at hand.

Importing this package imports nothing of CUDA.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
