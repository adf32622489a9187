"""A stand-in for the Python side of FlashAttention-2, for where the real one is not installed."""

__version__ = "2.8.3"

from .flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
