"""An error that says that no kernel may run names the module that asked: its name in the model, and its class."""

from __future__ import annotations

import attn_core
import pytest
import torch
import torch.nn.functional as F
from attn_core import KernelRefusedError, assign, attention, prefer
from attn_core.integrations.torch import redirect_sdpa
from torch import nn

KIND = rf"\({__name__}.Attn\)".replace(".", r"\.")
REFUSED = r"prefer\('torch/flash', strict=True\): none of these takes this problem"
X = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(20261121))


class Attn(nn.Module):
    def __init__(self, softcap=None):
        super().__init__()
        self.softcap = softcap

    def forward(self, x):
        return attention(x, x, x, softcap=self.softcap)


class Block(nn.Module):
    def __init__(self, softcap):
        super().__init__()
        self.attn = Attn(softcap)

    def forward(self, x):
        return self.attn(x)


class Model(nn.Module):
    """Its second block asks for a softcap, which torch/flash refuses."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(None), Block(3.0)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Holder:
    """No module, with one that is not among its own."""

    def __init__(self):
        self.model = Model()

    def forward(self, x):
        return self.model(x)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def told(run):
    with prefer("torch/flash", strict=True), pytest.raises(KernelRefusedError) as caught:
        run(X)
    return str(caught.value)


def test_it_is_the_innermost_module_by_its_name_in_the_outermost():
    assert told(Model()).startswith(f"blocks.1.attn ({__name__}.Attn): prefer('torch/flash', strict=True): none")


def test_who_holds_the_model_does_not_count_unless_it_is_a_module_that_has_it():
    assert told(Holder().forward).startswith(f"blocks.1.attn ({__name__}.Attn): ")

    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = [Model()]

        def forward(self, x):
            return self.hidden[0](x)

    assert told(Hiding()).startswith(f"blocks.1.attn ({__name__}.Attn): ")
    assert told(nn.Sequential(nn.Identity(), Model())).startswith(f"1.blocks.1.attn ({__name__}.Attn): ")


def test_a_model_that_is_one_module_is_told_by_its_class():
    assert told(Attn(3.0)).startswith(f"{__name__}.Attn: prefer(")


def test_outside_of_every_module_nothing_is_named():
    assert told(lambda x: attention(x, x, x, softcap=3.0)).startswith("prefer('torch/flash', strict=True): none of")


def test_a_call_that_would_go_past_every_kernel_is_named_too():
    class Foreign(torch.Tensor):
        pass

    class ByTorch(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 4, 8).as_subclass(Foreign)
    with redirect_sdpa(prefer="torch/*", strict=True), pytest.raises(KernelRefusedError) as caught:
        nn.Sequential(ByTorch())(x)
    text = str(caught.value)
    assert text.startswith("0 (")
    assert "ByTorch): prefer('torch/*', strict=True): this call would go to 'torch (stock)'" in text


def test_a_redirected_model_is_told_as_one_that_calls_attn_itself():
    layer = nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    attn_core.enable("torch", prefer="torch/cudnn", strict=True)
    try:
        with torch.no_grad(), pytest.raises(KernelRefusedError) as caught:
            model(torch.randn(2, 3, 16))
    finally:
        attn_core.disable("torch")
    assert str(caught.value).startswith("layers.0.self_attn (torch.nn.modules.activation.MultiheadAttention): prefer(")


COMPILED = {
    "the model": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "in place": lambda model: (model.compile(backend="eager", fullgraph=True), model)[1],
    "a function": lambda model: torch.compile(lambda x: model(x), backend="eager", fullgraph=True),
}


@pytest.mark.parametrize("compile", COMPILED.values(), ids=COMPILED.keys())
def test_so_it_is_where_the_model_is_compiled(compile):
    run = compile(Model())
    with prefer("torch/flash", strict=True), pytest.raises(Exception, match=rf"blocks\.1\.attn {KIND}: {REFUSED}"):
        run(X)


def test_so_it_is_where_modules_of_a_compiled_model_have_kernels_of_their_own():
    model = Model()
    run = torch.compile(model, backend="eager", fullgraph=True)
    with (
        assign(model, {"blocks.*": "torch/flash"}, strict=True),
        pytest.raises(Exception, match=rf"blocks\.1\.attn {KIND}: {REFUSED}"),
    ):
        run(X)


def test_lengths_that_are_symbolic_change_nothing():
    run = torch.compile(Model(), backend="eager", fullgraph=True, dynamic=True)
    with prefer("torch/flash", strict=True), pytest.raises(Exception, match=rf"blocks\.1\.attn {KIND}: {REFUSED}"):
        run(X)
