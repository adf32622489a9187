"""Every test finds the switches as a fresh process has them, and leaves them so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attn_natten import no_effect
from attn_natten.switches import deterministic, dispatcher, flex, fused, kv_parallelism, memory, strict
from attn_natten.switches.flag import Flag

FLAGS = {
    flag: flag.value
    for module in (deterministic, dispatcher, flex, fused, kv_parallelism, strict)
    for flag in vars(module).values()
    if isinstance(flag, Flag)
}


@pytest.fixture(autouse=True)
def _switches_as_at_first() -> Iterator[None]:
    yield
    for flag, value in FLAGS.items():
        flag.value = value
    memory._State.preference = memory.MemoryUsagePreference.Default
    no_effect.forget_what_was_said()
    if torch.are_deterministic_algorithms_enabled():  # setting it loads much of torch
        torch.use_deterministic_algorithms(False)
