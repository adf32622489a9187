"""A stand-in for FlashAttention-4, which lies in the namespace `flash_attn`, on CPU tensors."""

from .interface import flash_attn_func, flash_attn_varlen_func

__version__ = "4.0.0b36"
__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
