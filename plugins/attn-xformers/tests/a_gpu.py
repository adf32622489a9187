"""A CUDA device that is not there, for operators that are asked what they would take on it; none is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from attn_xformers import library
from attn_xformers.kernels import read
from attn_xformers.kernels.operators import OPERATORS, Pair


@contextmanager
def a_gpu(capability: tuple[int, int]) -> Iterator[dict[str, Pair]]:
    """Within it, the operators of the real xFormers are built and see a device of that compute capability."""
    fmha = library.XFORMERS.module()
    pairs = {operator.name: operator.pair() for operator in OPERATORS}
    classes = {each for pair in pairs.values() for each in (pair.forward, pair.backward) if each is not None}
    patches = [
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.backends.cuda, "is_built", return_value=True),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.version, "cuda", "12.8"),
        mock.patch.object(fmha.common, "_built_with_cuda", True, create=True),
        # Views, of which it looks at none; a torch that is built without CUDA makes none of what lies there.
        mock.patch(f"{fmha.cutlass_blackwell.FwOp.__module__}._convert_input_format", return_value=(None,) * 6),
        *(mock.patch.object(each, "OPERATOR", print) for each in classes),
    ]
    for patch in patches:
        patch.start()
    read.capabilities.cache_clear()
    try:
        yield pairs
    finally:
        for patch in patches:
            patch.stop()
        read.capabilities.cache_clear()
