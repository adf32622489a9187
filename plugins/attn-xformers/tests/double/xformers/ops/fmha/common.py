"""What operators are made of: their class attributes, and the reasons that follow from them."""

from dataclasses import dataclass

import torch

from .attn_bias import LowerTriangularMaskWithTensorBias, _Blocks


@dataclass
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_bias: object = None
    p: float = 0.0
    scale: float | None = None

    @property
    def device(self):
        return self.query.device

    @property
    def scale_float(self):
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def validate_inputs(self):
        query, key, value, bias = self.query, self.key, self.value, self.attn_bias
        if not query.ndim == key.ndim == value.ndim or query.ndim not in (4, 5):
            raise ValueError("Query/Key/Value should all have BMGHK or BMHK shape")
        if not query.dtype is key.dtype is value.dtype:
            raise ValueError("Query/Key/Value should all have the same dtype")
        if query.shape[2:-1] != key.shape[2:-1] or key.shape[:-1] != value.shape[:-1] or query.shape[0] != key.shape[0]:
            raise ValueError("Incompatible shapes for attention inputs: broadcasting is not supported")
        tensor = bias._bias if isinstance(bias, LowerTriangularMaskWithTensorBias) else bias
        if isinstance(tensor, torch.Tensor) and query.ndim == 4:
            expected = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            if tensor.shape != expected:
                raise ValueError(f"Invalid shape for attention bias: {tensor.shape} (expected {expected})")
        if isinstance(bias, _Blocks):
            if query.shape[0] != 1:
                raise ValueError("Expected batch_size=1 when using block-diagonal bias")
            if bias.q_seqinfo.seqstart.device != query.device:
                raise ValueError("Attention bias and Query/Key/Value should be on the same device")


@dataclass
class Context:
    lse: torch.Tensor
    out: torch.Tensor
    op_bw: type | None = None
    rng_state: object = None


@dataclass
class Gradients:
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    db: torch.Tensor | None = None


class AttentionOpBase:
    OPERATOR = None
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (5, 0)
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = None
    SUPPORTED_MIN_K = 0
    SUPPORTED_ATTN_BIAS_TYPES = (type(None),)
    SUPPORTS_CUSTOM_SCALE = False
    SUPPORTS_DIFFERENT_VALUE_EMBED = False
    IS_DETERMINISTIC = True
    SUPPORTS_BMGHK = False
    VARLEN_LSE_PACKED = True

    @classmethod
    def is_available(cls):
        return cls.OPERATOR is not None

    @classmethod
    def shape_not_supported_reasons(cls, Mq, Mkv, K, Kv):  # noqa: N803
        reasons = []
        if not cls.SUPPORTS_DIFFERENT_VALUE_EMBED and Kv != K:
            reasons.append("query.shape[-1] != value.shape[-1]")
        if max(K, Kv) > cls.SUPPORTED_MAX_K:
            reasons.append(f"max(query.shape[-1], value.shape[-1]) > {cls.SUPPORTED_MAX_K}")
        if min(K, Kv) < cls.SUPPORTED_MIN_K:
            reasons.append(f"min(query.shape[-1], value.shape[-1]) < {cls.SUPPORTED_MIN_K}")
        return reasons

    @classmethod
    def not_supported_reasons(cls, d):
        (dim, dim_v), device, dtype = (d.query.shape[-1], d.value.shape[-1]), d.query.device.type, d.query.dtype
        reasons = cls.shape_not_supported_reasons(d.query.shape[1], d.key.shape[1], dim, dim_v)
        if device not in cls.SUPPORTED_DEVICES:
            reasons.append(f"device={device} (supported: {cls.SUPPORTED_DEVICES})")
        if dtype not in cls.SUPPORTED_DTYPES:
            reasons.append(f"dtype={dtype} (supported: {cls.SUPPORTED_DTYPES})")
        if type(d.attn_bias) not in cls.SUPPORTED_ATTN_BIAS_TYPES:
            reasons.append(f"attn_bias type is {type(d.attn_bias)}")
        if d.p and not cls.SUPPORTS_DROPOUT:
            reasons.append("dropout > 0.0")
        if d.scale is not None and not cls.SUPPORTS_CUSTOM_SCALE:
            reasons.append("has custom scale")
        if dtype is torch.bfloat16 and device != "cuda":
            reasons.append("bf16 is only supported on A100+ GPUs")
        if not cls.is_available():
            reasons.append("operator wasn't built")
        if not cls.IS_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            reasons.append("operator is non-deterministic, but `torch.use_deterministic_algorithms` is set")
        if not cls.SUPPORTS_BMGHK and d.query.ndim == 5:
            reasons.append("operator does not support BMGHK format")
        return reasons


class AttentionFwOpBase(AttentionOpBase):
    pass


class AttentionBwOpBase(AttentionOpBase):
    SUPPORTS_ATTN_BIAS_GRAD = False

    @classmethod
    def not_supported_reasons(cls, d):
        reasons = super().not_supported_reasons(d)
        if isinstance(d.attn_bias, torch.Tensor) and d.attn_bias.requires_grad and not cls.SUPPORTS_ATTN_BIAS_GRAD:
            reasons.append("Computing the bias gradient is not supported (attn_bias.requires_grad = True)")
        return reasons


def for_cuda(base, name):
    """An operator that this double names, and does not have."""
    attributes = {
        "SUPPORTED_DEVICES": frozenset({"cuda"}),
        "SUPPORTED_DTYPES": frozenset({torch.half, torch.bfloat16}),
        "SUPPORTED_MAX_K": 256,
        "SUPPORTS_DROPOUT": False,
        "NAME": name,
    }
    return type(name, (base,), attributes)
