"""Operators that this double names, and does not have."""

from .common import AttentionBwOpBase, AttentionFwOpBase, for_cuda

FwOp = for_cuda(AttentionFwOpBase, "flash-F")
BwOp = for_cuda(AttentionBwOpBase, "flash-B")
