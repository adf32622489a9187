"""Flags of the command: values on each axis, written as NATTEN's profiler takes them, and what they mean together."""

from __future__ import annotations

import re
from typing import Any

import click
from attn_core.errors import AttnError

from ..backends import FNA
from .case import DTYPES, Case

#: NATTEN's short names of dtypes.
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


class PerAxis(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Ints, or with `kind=bool` truth values: `16 16`, `16,16` or `16x16`."""

    def __init__(self, kind: type = int) -> None:
        self.kind = kind
        self.name = "bools" if kind is bool else "ints"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        words = [word for word in re.split(r"[,x\s]+", str(value).strip()) if word]
        try:
            if not 1 <= len(words) <= 3:
                raise ValueError
            return tuple(self._one(word) for word in words)
        except ValueError:
            what = "True or False" if self.kind is bool else "whole numbers"
            self.fail(f"{value!r} is not {what} on 1 to 3 axes, such as {self._example()}", param, ctx)

    def _one(self, word: str) -> int | bool:
        if self.kind is int:
            return int(word)
        if word.lower() in TRUE + FALSE:
            return word.lower() in TRUE
        raise ValueError(word)

    def _example(self) -> str:
        return "True False or True,False" if self.kind is bool else "56 56 or 56,56"


class Spread(click.Command):
    """A command whose PerAxis options take several words, as in `-i 56 56 -w 7 7`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread = {name for param in self.params if isinstance(param.type, PerAxis) for name in (*param.opts,)}
        joined: list[str] = []
        position = 0
        while position < len(args):
            joined.append(args[position])
            position += 1
            if joined[-1] in spread:
                words = []
                while position < len(args) and not args[position].startswith("-"):
                    words.append(args[position])
                    position += 1
                if words:
                    joined.append(",".join(words))
        return super().parse_args(ctx, joined)


def dtype_flag(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """The name of a dtype, by its short one too."""
    return SHORT.get(value, value)


DTYPE = click.Choice([*DTYPES, *SHORT])


def kernels_of(kernel: tuple[str, ...], backend: str | None) -> tuple[str, ...]:
    """The kernels that are insisted on. `--backend` is NATTEN's word for one of its own."""
    if backend is None:
        return kernel
    if kernel:
        raise click.UsageError(f"--kernel {' --kernel '.join(kernel)} and --backend {backend}: one or the other")
    if backend not in FNA:
        raise click.BadParameter(f"takes {', '.join(FNA)}, got {backend!r}", param_hint="--backend")
    return (f"natten/{backend}",)


def case_of(
    *,
    input_size: tuple[int, ...],
    batch_size: int,
    heads: int,
    heads_kv: int | None,
    dim: int,
    dim_value: int | None,
    window_size: tuple[int, ...] | None,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    dtype: str,
    device: str,
    backprop: bool,
    add_kv: int,
) -> Case:
    """What the flags describe. Raises a click error that names flags and values."""
    rank = len(input_size)

    def on_each_axis(flag: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(values) not in (1, rank):
            got = " ".join(map(str, values))
            raise click.UsageError(
                f"{flag} {got}: takes one value, or {rank}, as many as --input-size {_shown(input_size)}"
            )
        return values * rank if len(values) == 1 else values

    if heads_kv is not None and (heads_kv < 1 or heads % heads_kv):
        raise click.UsageError(f"--heads-kv {heads_kv}: must divide --heads {heads}")
    window = input_size if window_size is None else on_each_axis("--window-size", window_size)
    try:
        return Case(
            spatial=input_size,
            kernel_size=window,
            stride=on_each_axis("--stride", stride),
            dilation=on_each_axis("--dilation", dilation),
            is_causal=on_each_axis("--causal", causal),
            batch=batch_size,
            num_heads=heads,
            num_kv_heads=heads if heads_kv is None else heads_kv,
            head_dim=dim,
            head_dim_v=dim if dim_value is None else dim_value,
            dtype=dtype,
            device=device,
            backward=backprop,
            additional=add_kv,
        )
    except AttnError as error:
        given = [f"--input-size {_shown(input_size)}", f"--window-size {_shown(window)}"]
        given += [f"--stride {_shown(stride)}"] if set(stride) != {1} else []
        given += [f"--dilation {_shown(dilation)}"] if set(dilation) != {1} else []
        given += [f"--device {device}"] if "device" in str(error) else []
        raise click.UsageError(f"{' '.join(given)}: {error}") from error


def _shown(values: tuple[Any, ...]) -> str:
    return " ".join(map(str, values))
