"""FlashAttention's kernels for attn: flash/fa2, flash/fa3 and flash/fa4, where their libraries are installed.

There is nothing to call here: `attn_core.attention` chooses among them, and among all others. The libraries themselves
are imported when one of their kernels is first weighed.
"""

from __future__ import annotations

__version__ = "0.1.0"
