"""Operators that this double names, and does not have."""

from .common import AttentionBwOpBase, AttentionFwOpBase, for_cuda

FwOp = for_cuda(AttentionFwOpBase, "flash3-F")
BwOp = for_cuda(AttentionBwOpBase, "flash3-B")
FwOp_KVSplit = for_cuda(AttentionFwOpBase, "flash3-F-splitKV")
