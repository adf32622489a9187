"""Operators that this double names, and does not have."""

from .common import AttentionBwOpBase, AttentionFwOpBase, for_cuda

FwOp = for_cuda(AttentionFwOpBase, "cutlass-F")
BwOp = for_cuda(AttentionBwOpBase, "cutlass-B")
