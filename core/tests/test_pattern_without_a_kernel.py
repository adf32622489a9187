"""Kernel patterns that match no kernel: every door that takes them says so, once, and what was asked still runs."""

from __future__ import annotations

import warnings

import attn_core
import pytest
import torch
from attn_core import UnknownKernelError, assign, attention, explain, prefer, record, refresh, register_sdpa
from attn_core.integrations import torch as torch_host
from torch import nn

X = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(20261121))


class Attn(nn.Module):
    def forward(self, x):
        return attention(x, x, x)


def through_transformers(pattern):
    pytest.importorskip("transformers")
    attn_core.enable("transformers", prefer=pattern)


DOORS = {
    "prefer": prefer,
    "strict": lambda pattern: prefer(pattern, strict=True),
    "assign": lambda pattern: assign(Attn(), {"": pattern}),
    "redirect_sdpa": lambda pattern: torch_host.redirect_sdpa(prefer=pattern),
    "enable torch": lambda pattern: attn_core.enable("torch", prefer=pattern),
    "enable transformers": through_transformers,
}


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    attn_core.disable()


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS.keys())
def test_a_pattern_without_a_kernel_warns_and_a_plain_name_is_an_error(door):
    with pytest.warns(UserWarning, match=r"no kernel matches 'flsh/\*'; `attn kernels` lists all") as heard:
        door("flsh/*")
    assert len(heard) == 1
    with pytest.raises(UnknownKernelError, match="no kernel 'torch/flsh'. Did you mean 'torch/flash'"):
        door("torch/flsh")


# ATTN_PREFER, which has no caller whom an error would tell


@pytest.fixture
def told(monkeypatch):
    """told(value): what is said of ATTN_PREFER=value by three calls, and which kernels ran."""

    def tell(value):
        monkeypatch.setenv("ATTN_PREFER", value)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            refresh()
            assert heard == []  # not before a kernel is chosen: it may be registered until then
            with record() as calls:
                for length in (2, 3, 4):
                    attention(X[:, :length], X[:, :length], X[:, :length])
        return [str(each.message) for each in heard], calls.kernels

    yield tell
    monkeypatch.delenv("ATTN_PREFER")
    refresh()


@pytest.mark.parametrize("value", ["torch/mth", "torch/x?th", "flsh/*"])
def test_attn_prefer_without_a_kernel_is_one_warning_and_the_best_kernel_runs(told, value):
    said, ran = told(f"{value},torch/math")
    assert len(said) == 1
    assert said[0].startswith(f"ATTN_PREFER: no kernel {value!r}.")
    assert ran == {"torch/math": 3}


def test_near_names_are_said(told):
    [said], _ = told("torch/mth")
    assert said.startswith("ATTN_PREFER: no kernel 'torch/mth'. Did you mean 'torch/math'")
    assert said.endswith("? `attn kernels` lists all")


def test_each_pattern_without_a_kernel_is_said_and_no_other(told):
    said, _ = told("one/*,torch/*,two/x")
    assert [text.split("'")[1] for text in said] == ["one/*", "two/x"]


def test_a_kernel_that_is_registered_before_the_first_call_is_found(monkeypatch):
    monkeypatch.setenv("ATTN_PREFER", "mine/late")
    refresh()

    @register_sdpa("mine/late", devices={"cpu"}, dtypes={torch.float32}, head_dims=range(1, 257))
    def late(query, key, value, *, scale=None):
        return torch._C._nn.scaled_dot_product_attention(query, key, value, scale=scale)

    with late, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(X, X, X).chosen == "mine/late"
    monkeypatch.delenv("ATTN_PREFER")
    refresh()
