"""swap(): a model's attention by attn without replacing anything of torch, and its classes back afterwards."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn
import torch.nn.functional as F
from attn_core import InputError, prefer, record
from attn_core.integrations.torch import swap
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as renamed

SEED = 20261121
#: Before, torch.compile takes what stands in torch.nn.functional for torch's own, or does not notice that it changes.
follows_when_compiled = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="a compiled function follows redirection from torch 2.13 on",
)
STOCK = torch._C._nn.scaled_dot_product_attention


class Base(nn.Module):
    """Keeps its heads in the batch: `[batch, seqlen, 8]`."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("offset", torch.ones(8))

    def split(self, x):
        return self.qkv(x).chunk(3, dim=-1)


class ByAlias(Base):
    def forward(self, x):
        return F.scaled_dot_product_attention(*self.split(x)) + F.relu(self.offset)


class ByPath(Base):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(*self.split(x)).tanh()


class ByPackage(Base):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*self.split(x))


class ByName(Base):
    def forward(self, x):
        return scaled_dot_product_attention(*self.split(x), is_causal=True)


class ByAnotherName(Base):
    def forward(self, x):
        return renamed(*self.split(x), scale=0.5)


def helper(q, k, v):
    return deeper(q, k, v) if q.ndim else q


def deeper(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class ByHelper(Base):
    def forward(self, x):
        return helper(*self.split(x))


class InAnInnerFunction(Base):
    def forward(self, x):
        return (lambda qkv: F.scaled_dot_product_attention(*qkv))(self.split(x))


class Inherited(ByAlias):
    def extra(self):
        return 1


class WithSuper(Base):
    def forward(self, x):
        return scaled_dot_product_attention(*super().split(x)) * self.factor()

    def factor(self):
        return 2.0


class Decorated(Base):
    @torch.enable_grad()
    def forward(self, x):
        return F.scaled_dot_product_attention(*self.split(x))


class Static(Base):
    @staticmethod
    def attend(qkv):
        return F.scaled_dot_product_attention(*qkv)

    def forward(self, x):
        return self.attend(self.split(x))


class Overriding(ByAlias):
    """What the base class does is never called."""

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.split(x)) - 1


def even(q, k, v, steps):
    return odd(q, k, v, steps - 1) if steps else F.scaled_dot_product_attention(q, k, v)


def odd(q, k, v, steps):
    return even(q, k, v, steps - 1)


class ByFunctionsThatCallEachOther(Base):
    def forward(self, x):
        return even(*self.split(x), 4)


def closing_over(functional):
    class Closing(Base):
        def forward(self, x):
            return functional.scaled_dot_product_attention(*self.split(x))

    return Closing


KINDS = {
    cls.__name__: cls
    for cls in (
        ByAlias,
        ByPath,
        ByPackage,
        ByName,
        ByAnotherName,
        ByHelper,
        ByFunctionsThatCallEachOther,
        InAnInnerFunction,
        Inherited,
        Overriding,
        WithSuper,
        Decorated,
        Static,
    )
} | {"Closing": closing_over(F)}


def made(cls):
    torch.manual_seed(SEED)
    return cls()


def tokens():
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(SEED))


def kernels_of(function, *args):
    with record() as calls:
        function(*args)
    return calls.kernels


@pytest.fixture(autouse=True)
def _nothing_is_replaced():
    yield
    assert F.scaled_dot_product_attention is STOCK


@pytest.mark.parametrize("cls", KINDS.values(), ids=KINDS.keys())
def test_however_a_module_names_torchs_attention_it_is_attns_and_equal_with_gradients(cls):
    model, x = made(cls), tokens()
    stock = model(x)
    with swap(model) as handle:
        assert F.scaled_dot_product_attention is STOCK
        with record() as calls:
            ours = model(x)
        assert sum(calls.kernels.values()) == 1
        assert isinstance(model, cls)
        assert handle.swapped == {"": cls}
        assert handle.left == {}
    assert type(model) is cls
    assert torch.allclose(ours, stock, atol=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), tuple(model.parameters())) for out in (stock, ours)]
    for of_stock, of_ours in zip(*grads):
        assert torch.allclose(of_ours, of_stock, atol=1e-5)
    assert kernels_of(model, x) == {}
    assert torch.equal(model(x), stock)


def test_only_that_model_is_swapped_and_on_every_thread():
    ours, theirs, x = made(ByAlias), made(ByAlias), tokens()
    with swap(ours), ThreadPoolExecutor(1) as pool:
        assert sum(pool.submit(kernels_of, ours, x).result().values()) == 1
        assert kernels_of(theirs, x) == {}
        assert type(theirs) is ByAlias


def test_prefer_is_followed():
    model, x = made(ByAlias), tokens()
    with swap(model), prefer("torch/math"):
        assert kernels_of(model, x) == {"torch/math": 1}


def test_the_state_dict_the_repr_and_hooks_are_as_before():
    model, x = nn.Sequential(made(ByAlias), nn.Linear(8, 8)), tokens()
    before, text, heard = model.state_dict(), repr(model), []
    model[0].register_forward_hook(lambda *args: heard.append(1))
    handle = swap(model)
    assert list(model.state_dict()) == list(before)
    assert repr(model) == text
    model.load_state_dict(before)
    model(x)
    assert heard == [1]
    handle.remove()
    handle.remove()
    assert type(model[0]) is ByAlias


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_of_a_swapped_model_is_swapped(again):
    model, x = nn.Sequential(made(ByAlias)), tokens()
    stock = model(x)
    with swap(model):
        other = again(model)
    other = other if other[0] is not model[0] else nn.Sequential(again(model[0]))
    ours = kernels_of(other, x)
    assert torch.allclose(other(x), stock, atol=1e-6)
    assert sum(ours.values()) == (0 if again is copy.copy else 1)  # a shallow copy shares the modules


def test_a_swapped_model_can_be_saved_and_loaded_whole():
    model, x = nn.Sequential(made(ByAlias)), tokens()
    stock = model(x)
    file = io.BytesIO()
    with swap(model):
        torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert sum(kernels_of(loaded, x).values()) == 1
    assert torch.allclose(loaded(x), stock, atol=1e-6)


def test_swapped_twice_the_second_says_so_and_the_first_undoes_it():
    model = made(ByAlias)
    with swap(model), pytest.raises(InputError, match="is swapped already"):
        swap(model)
    assert type(model) is ByAlias


def test_a_function_redefined_since_is_taken_at_the_next_swap(monkeypatch):
    model, x = made(ByHelper), tokens()
    with swap(model):
        model(x)
    monkeypatch.setitem(ByHelper.forward.__globals__, "helper", lambda q, k, v: q)
    with swap(model):
        assert torch.equal(model(x), model.split(x)[0])


# What is left alone, and why


class Wrapping:
    """A decorator that is an object."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __get__(self, instance, owner):
        return functools.partial(self.function, instance)

    def __call__(self, *args):
        return self.function(*args)


class Beneath(Base):
    @Wrapping
    def forward(self, x):
        return F.scaled_dot_product_attention(*self.split(x))


class BySuper(ByAlias):
    def forward(self, x):
        return super().forward(x) + 1


class Importing(Base):
    def forward(self, x):
        import torch.nn.functional as functional

        return functional.scaled_dot_product_attention(*self.split(x))


class Registering(Base):
    def __init_subclass__(cls, /, name, **options):
        super().__init_subclass__(**options)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.split(x))


class Traceable(Base):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


LEFT = {
    "beneath-a-decorator": (lambda: made(Beneath), "beneath a decorator"),
    "by-super": (lambda: made(BySuper), "by super"),
    "imported-within": (lambda: made(Importing), "imports it within itself"),
    "no-subclass": (lambda: made(Registering), "cannot be subclassed"),
    "graph": (lambda: torch.fx.symbolic_trace(made(Traceable)), "graph of torch.fx"),
    "scripted": (lambda: torch.jit.trace(made(Traceable), tokens()), "torch.jit"),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT.keys())
def test_what_cannot_be_swapped_is_left_with_the_reason(make, reason):
    model = nn.Sequential(make(), made(ByAlias))
    left = type(model[0])
    with swap(model) as handle:
        assert list(handle.swapped) == ["1"]
        assert type(model[0]) is left
        assert reason in handle.left["0"]
        assert f"0: left: {handle.left['0']}" in str(handle)
    with pytest.raises(InputError, match=reason):
        swap(model[0])


def test_a_forward_replaced_on_the_instance_is_left():
    model = nn.Sequential(made(ByAlias), made(ByAlias))
    model[0].forward = lambda x: x
    with swap(model) as handle:
        assert "on the instance" in handle.left["0"]


def test_a_model_without_torchs_attention_is_an_error():
    with pytest.raises(InputError, match="nothing was swapped in Sequential: no module calls torch's attention"):
        swap(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Conv2d(1, 1, 1)))


# torch's own modules, and graphs


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_encoder_is_swapped_whole_and_its_native_path_is_off(training):
    torch.manual_seed(SEED)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).train(training), tokens()
    with torch.no_grad():
        stock = model(x)
        with swap(model) as handle, record() as calls:
            ours = model(x)
        assert sum(calls.kernels.values()) == 2
        assert set(handle.swapped.values()) == {
            nn.TransformerEncoder,
            nn.TransformerEncoderLayer,
            nn.MultiheadAttention,
        }
        assert torch.allclose(ours, stock, atol=1e-5)
        assert torch.equal(model(x), stock)


def test_multihead_attention_with_weights_is_torchs_and_record_says_why():
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), tokens()
    with swap(model), record() as calls:
        _, weights = model(x, x, x)
    assert weights.shape == (2, 6, 6)
    assert [(row.kernel, "need_weights=True" in row.reason) for row in calls] == [("torch (stock)", True)]


@follows_when_compiled
def test_a_compiled_model_is_one_graph_swapped_and_one_without():
    torch._dynamo.reset()
    model = nn.Sequential(made(ByPath), made(ByHelper), nn.MultiheadAttention(8, 2, batch_first=True))
    graphs = []

    def backend(graph, inputs):
        graphs.append([getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes])
        return graph

    def run(x):
        return model[2](*(model[1](model[0](x)),) * 3, need_weights=False)[0]

    compiled, x = torch.compile(run, fullgraph=True, backend=backend), tokens()
    stock = compiled(x)
    with swap(model):
        ours = compiled(x)
    assert torch.equal(compiled(x), stock)
    assert len(graphs) == 2
    assert graphs[0].count("scaled_dot_product_attention") == 2
    assert graphs[1].count("_scaled_dot_product_flash_attention_for_cpu") == 3
    assert torch.allclose(ours, stock, atol=1e-5)
    torch._dynamo.reset()


def test_an_exported_swapped_model_has_torchs_attention():
    model, x = made(ByPath), tokens()
    with swap(model), pytest.warns(match="torch.export"):
        program = torch.export.export(model, (x,))
    assert any("aten.scaled_dot_product_attention" in str(node.target) for node in program.graph.nodes)
