"""An operator that this double names, and does not have."""

from .common import AttentionFwOpBase, for_cuda

FwOp = for_cuda(AttentionFwOpBase, "triton_splitk-F")
