"""NeighborhoodAttention1D, 2D and 3D: attention layers with projections, as NATTEN 0.17 and 0.20 and later write them.

Their parameters have NATTEN's names (`qkv`, `proj`, `rpb`) and are made in its order, so that its checkpoints load and
the same seed gives the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from attn_core.errors import InputError, InputTypeError
from attn_core.tracing import constant
from torch import Tensor, nn
from torch.nn.functional import pad

from .arguments import CausalPerAxis, PerAxis, check_rpb_is_possible, window
from .errors import ConstraintError
from .fused import na1d, na2d, na3d
from .log import logger
from .switches.fused import is_fused_na_enabled
from .unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

_is_tracing = torch.compiler.is_dynamo_compiling

NOT_DROPPED = (
    "%s: attn_drop=%s is NOT applied: fused neighborhood attention has no dropout of attention weights; without it"
    " (use_fused_na(False)) they are dropped"
)


class NeighborhoodAttention(nn.Module):
    """What the layers of 1, 2 and 3 axes have in common: `[batch, *spatial, embed_dim]` in and out.

    Args:
        embed_dim: channels, a multiple of num_heads; NATTEN before 0.20 calls them `dim`, which is taken too.
        num_heads: heads, of `embed_dim // num_heads` channels each.
        kernel_size: keys in a window, > 1.
        stride: queries that share one window, 1 to kernel_size.
        dilation: distance between the keys of a window; kernel_size * dilation is at most the axis.
        is_causal: the window ends with the query.
        rel_pos_bias: a trained number for each head and offset is added to the logits; for odd kernel sizes without a
            causal axis.
        qkv_bias: whether the projection to query, key and value has a bias.
        qk_scale: default `head_dim ** -0.5`; 0.0 is honoured.
        attn_drop: probability of dropping an attention weight in training; not applied in fused calls, which
            each layer logs once as an error.
        proj_drop: probability of dropping an element of the result in training.
        use_experimental_ops: accepted: the operations are always ops of torch.library, as those of NATTEN's were that
            it stood for.
        pad_small_inputs: pads an axis that is shorter than a window by zeros at its end, as NATTEN before 0.16 did, for
            checkpoints of that time. Such an input is an error otherwise.

    kernel_size, stride, dilation and is_causal are one value, or a tuple with one for each axis. Behind kernel_size,
    arguments are taken by keyword alone: the fourth is the dilation in NATTEN 0.17, and the stride since 0.20.

    After `use_fused_na()` it runs one fused call, else `qk`, softmax and `av`; with a stride, which the unfused calls
    have not, it is always fused. Both give the same, but for dropout.

    Raises, made or called: InputError, InputTypeError or ConstraintError (a ValueError), naming the argument;
    UnsupportedError (a NotImplementedError) for rel_pos_bias with a causal axis.
    """

    rank: ClassVar[int]
    _fused: ClassVar[Callable[..., Any]]
    _qk: ClassVar[Callable[..., Tensor]]
    _av: ClassVar[Callable[..., Tensor]]

    rpb: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: PerAxis | None = None,
        *by_position: Any,
        stride: PerAxis | None = 1,
        dilation: PerAxis | None = 1,
        is_causal: CausalPerAxis | None = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
        pad_small_inputs: bool = False,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if by_position:
            raise InputTypeError(
                f"{name}: takes embed_dim, num_heads and kernel_size by position and the rest by keyword, got"
                f" {len(by_position)} more by position: {', '.join(map(repr, by_position))}. The fourth is dilation in"
                " NATTEN 0.17, and stride since 0.20"
            )
        if embed_dim is not None and dim is not None:
            raise InputError(f"dim, embed_dim: two names of one argument, takes one; got {dim!r} and {embed_dim!r}")
        embed_dim = dim if embed_dim is None else embed_dim
        for argument, value in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kernel_size", kernel_size)):
            if value is None:
                raise InputTypeError(f"{name}: missing the argument {argument!r}")
        self.embed_dim, self.num_heads = _count("embed_dim", embed_dim), _count("num_heads", num_heads)
        if self.embed_dim % self.num_heads:
            raise InputError(f"embed_dim: must be a multiple of num_heads={self.num_heads}, got {self.embed_dim}")
        for argument, flag in (
            ("rel_pos_bias", rel_pos_bias),
            ("qkv_bias", qkv_bias),
            ("use_experimental_ops", use_experimental_ops),
            ("pad_small_inputs", pad_small_inputs),
        ):
            if not isinstance(flag, bool):
                raise InputError(f"{argument}: takes True or False, got {flag!r}")
        for argument, number in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if not _is_number(number) or not 0 <= number <= 1:
                raise InputError(f"{argument}: takes a number from 0 to 1, got {number!r}")
        if qk_scale is not None and not _is_number(qk_scale):
            raise InputError(f"qk_scale: takes a number or None, got {qk_scale!r}")
        assert kernel_size is not None  # said above
        self.kernel_size, self.stride, self.dilation, self.is_causal = window(
            self.rank, kernel_size, stride=stride, dilation=dilation, is_causal=is_causal
        )
        self.head_dim = self.embed_dim // self.num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.pad_small_inputs = pad_small_inputs
        self._said_not_dropped = False

        self.qkv = nn.Linear(self.embed_dim, 3 * self.embed_dim, bias=qkv_bias)
        if rel_pos_bias:
            check_rpb_is_possible(self.kernel_size, self.is_causal)
            self.rpb = nn.Parameter(torch.zeros(self.num_heads, *(2 * kernel - 1 for kernel in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, mean=0.0, std=0.02, a=-2.0, b=2.0)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop_rate = attn_drop
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, *spatial, embed_dim]` of such a tensor. Raises ConstraintError for another shape."""
        _check_input(x, self.rank, self.embed_dim)
        spatial = x.shape[1:-1]
        if self.pad_small_inputs:
            x = _padded(x, self.kernel_size, self.dilation)
        fused = is_fused_na_enabled() or max(self.stride) > 1
        x = self._attend_fused(x) if fused else self._attend_unfused(x)
        if self.pad_small_inputs:
            for axis, extent in enumerate(spatial):
                x = x.narrow(1 + axis, 0, extent)
        result: Tensor = self.proj_drop(self.proj(x))
        return result

    def _projected(self, x: Tensor) -> Tensor:
        """`[batch, *spatial, 3, num_heads, head_dim]`: query, key and value."""
        qkv: Tensor = self.qkv(x)
        return qkv.reshape(*x.shape[:-1], 3, self.num_heads, self.head_dim)

    def _attend_fused(self, x: Tensor) -> Tensor:
        if self.attn_drop_rate > 0 and self.training and not self._said_not_dropped:
            self._said_not_dropped = not _is_tracing()  # a graph says it while it is traced, and is not traced anew
            say_not_dropped(type(self).__name__, self.attn_drop_rate)
        query, key, value = self._projected(x).unbind(-3)
        out: Tensor = self._fused(
            query,
            key,
            value,
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            rpb=self.rpb,
            scale=self.scale,
        )
        return out.flatten(-2)

    def _attend_unfused(self, x: Tensor) -> Tensor:
        query, key, value = self._projected(x).movedim(-2, 1).unbind(-2)  # heads first
        attn = self._qk(
            query * self.scale, key, self.kernel_size, self.dilation, is_causal=self.is_causal, rpb=self.rpb
        )
        attn = self.attn_drop(attn.softmax(dim=-1))
        out = self._av(attn, value, self.kernel_size, self.dilation, is_causal=self.is_causal)
        return out.movedim(1, -2).flatten(-2)

    def extra_repr(self) -> str:
        stride = f"stride={self.stride}, " if max(self.stride) > 1 else ""
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, {stride}"
            f"dilation={self.dilation}, is_causal={self.is_causal}, has_bias={self.rpb is not None}"
        )


class NeighborhoodAttention1D(NeighborhoodAttention):
    """Neighborhood attention on a line: `[batch, length, embed_dim]`. As its base class says."""

    rank = 1
    _fused, _qk, _av = staticmethod(na1d), staticmethod(na1d_qk), staticmethod(na1d_av)


class NeighborhoodAttention2D(NeighborhoodAttention):
    """Neighborhood attention on a plane: `[batch, height, width, embed_dim]`. As its base class says."""

    rank = 2
    _fused, _qk, _av = staticmethod(na2d), staticmethod(na2d_qk), staticmethod(na2d_av)


class NeighborhoodAttention3D(NeighborhoodAttention):
    """Neighborhood attention in space: `[batch, depth, height, width, embed_dim]`. As its base class says."""

    rank = 3
    _fused, _qk, _av = staticmethod(na3d), staticmethod(na3d_qk), staticmethod(na3d_av)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}: takes an int >= 1, got {value!r}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_input(x: Any, rank: int, embed_dim: int) -> None:
    if not isinstance(x, Tensor):
        raise InputTypeError(f"x: takes a tensor, got {type(x).__name__}")
    spatial = ("depth", "height", "width")[3 - rank :] if rank > 1 else ("length",)
    if x.ndim != rank + 2:
        shape = ", ".join(("batch", *spatial, "embed_dim"))
        raise ConstraintError(f"x: must be [{shape}], {rank + 2} dimensions; got {x.ndim} (shape {list(x.shape)})")
    if x.shape[-1] != embed_dim:
        raise ConstraintError(f"x: embed_dim must be {embed_dim}, got {x.shape[-1]} (shape {list(x.shape)})")


def _padded(x: Tensor, kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """`x` with zeros behind each axis that is shorter than a window."""
    missing = [max(kernel * step - extent, 0) for kernel, step, extent in zip(kernel_size, dilation, x.shape[1:-1])]
    if not any(missing):
        return x
    amounts = [0, 0]  # of embed_dim; `pad` counts from the last dimension
    for behind in reversed(missing):
        amounts += [0, behind]
    return pad(x, amounts)


@constant
def say_not_dropped(module: str, attn_drop: float) -> None:
    """Logs, as an error; where a graph is traced, while it is."""
    logger.error(NOT_DROPPED, module, attn_drop)
