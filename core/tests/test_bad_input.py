"""What does not fit together is an error that names the argument, what it got and what it takes; what is merely odd has
a defined result. Calls that would take the process down, were they to reach torch's bare ops, run in a subprocess."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from attn_core import (
    AttnError,
    Causal,
    InputError,
    InputTypeError,
    KernelRefusedError,
    KeyPadding,
    TensorBias,
    UnknownKernelError,
    Window,
    attention,
    explain,
    plan,
    reference_attention,
    scaled_dot_product_attention,
)

KERNELS = ("torch/flash", "torch/math", "torch/flex", "torch/reference")
NAN, INF = float("nan"), float("inf")


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def integers(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64)


@dataclass
class Bad:
    """A call and the text of its error, in which the argument comes first."""

    text: str
    error: type[AttnError] = InputError
    query: Any = field(default_factory=lambda: tensor(2, 5, 4, 8))
    key: Any = field(default_factory=lambda: tensor(2, 7, 2, 8))
    value: Any = field(default_factory=lambda: tensor(2, 7, 2, 8))
    bias: Any = None
    options: dict[str, Any] = field(default_factory=dict)


BAD = {
    # rank
    "a query of rank 3": Bad(
        r"query: must be \[batch, seqlen, num_heads, head_dim\], got shape \[5, 4, 8\]", query=tensor(5, 4, 8)
    ),
    "a key of rank 5": Bad(r"key: must be \[batch, .*got shape \[1, 2, 7, 2, 8\]", key=tensor(1, 2, 7, 2, 8)),
    "a value of rank 0": Bad(r"value: must be .*got shape \[\]", value=torch.tensor(1.0)),
    # shapes
    "another batch of keys": Bad(
        r"key: batch must be query's 2, got 3 \(shape \[3, 7, 2, 8\]\)", key=tensor(3, 7, 2, 8)
    ),
    "another batch of values": Bad("value: batch must be query's 2, got 1", value=tensor(1, 7, 2, 8)),
    "fewer values than keys": Bad("value: seqlen must be key's 7, got 6", value=tensor(2, 6, 2, 8)),
    "more values than keys": Bad("value: seqlen must be key's 7, got 9", value=tensor(2, 9, 2, 8)),
    "other heads of value": Bad("value: num_heads must be key's 2, got 4", value=tensor(2, 7, 4, 8)),
    "another head_dim of key": Bad("key: head_dim must be query's 8, got 16", key=tensor(2, 7, 2, 16)),
    "heads that do not divide": Bad(
        r"key: num_heads must divide query's num_heads=4 .*got 3", key=tensor(2, 7, 3, 8), value=tensor(2, 7, 3, 8)
    ),
    "more key heads than query heads": Bad(
        r"key: num_heads must divide query's num_heads=4 .*got 8", key=tensor(2, 7, 8, 8), value=tensor(2, 7, 8, 8)
    ),
    "no key heads": Bad("num_heads must divide .*got 0", key=tensor(2, 7, 0, 8), value=tensor(2, 7, 0, 8)),
    "no query heads": Bad("query: num_heads must be at least 1, got 0", query=tensor(2, 5, 0, 8)),
    "head_dim 0": Bad("query: head_dim must be at least 1, got 0", query=tensor(2, 5, 4, 0), key=tensor(2, 7, 2, 0)),
    "head_dim_v 0": Bad("value: head_dim must be at least 1, got 0", value=tensor(2, 7, 2, 0)),
    # types
    "a list": Bad("query: takes a tensor, got list", InputTypeError, query=[[[[1.0]]]]),
    "None for value": Bad("value: takes a tensor, got NoneType", InputTypeError, value=None),
    "integer tensors": Bad("query: must be floating, got torch.int64", InputTypeError, query=integers(2, 5, 4, 8)),
    "an integer key": Bad("key: must be floating, got torch.int64", InputTypeError, key=integers(2, 7, 2, 8)),
    "boolean tensors": Bad("query: must be floating, got torch.bool", InputTypeError, query=tensor(2, 5, 4, 8) > 0),
    "complex tensors": Bad(
        "query: must be floating, got torch.complex64", InputTypeError, query=tensor(2, 5, 4, 8).to(torch.complex64)
    ),
    "mixed dtypes": Bad(
        "key: must have query's dtype torch.float32, got torch.bfloat16",
        InputTypeError,
        key=tensor(2, 7, 2, 8).bfloat16(),
    ),
    "a value of another dtype": Bad(
        "value: must have query's dtype torch.float32, got torch.float64",
        InputTypeError,
        value=tensor(2, 7, 2, 8).double(),
    ),
    "mixed devices": Bad("key: must be on query's device cpu, got meta", key=tensor(2, 7, 2, 8).to("meta")),
    "a nested tensor": Bad(
        "query: attention takes plain tensors, got a nested tensor",
        InputTypeError,
        query=torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(1, 3, 4)]),
    ),
    "a sparse tensor": Bad(
        "query: attention takes plain tensors, got a tensor of layout torch.sparse_coo",
        InputTypeError,
        query=tensor(2, 5, 4, 8).to_sparse(),
    ),
    # options
    "scale NaN": Bad("scale: must be finite, got nan", options={"scale": NAN}),
    "scale infinite": Bad("scale: must be finite, got inf", options={"scale": INF}),
    "scale beyond floats": Bad(
        "scale: must be finite, got an int of 1329 bits, which no float holds", options={"scale": 10**400}
    ),
    "scale too long to print": Bad("scale: must be finite, got an int of 16610 bits", options={"scale": -(10**5000)}),
    "scale of a string": Bad("scale: takes a number or None, got str", InputTypeError, options={"scale": "0.1"}),
    "scale of a tensor": Bad("scale: takes a number or None, got Tensor", InputTypeError, options={"scale": tensor(1)}),
    "softcap 0": Bad(r"softcap: must be finite and above 0 \(None for none\), got 0", options={"softcap": 0.0}),
    "softcap below 0": Bad("softcap: must be finite and above 0 .*got -1", options={"softcap": -1.0}),
    "softcap NaN": Bad("softcap: must be finite and above 0 .*got nan", options={"softcap": NAN}),
    "softcap infinite": Bad("softcap: must be finite and above 0 .*got inf", options={"softcap": INF}),
    "softcap beyond floats": Bad("softcap: must be finite .*got an int of 1329 bits", options={"softcap": 10**400}),
    "softcap of a list": Bad("softcap: takes a number or None, got list", InputTypeError, options={"softcap": [1.0]}),
    "dropout of 1": Bad(r"dropout_p: must lie in \[0, 1\), got 1", options={"dropout_p": 1.0}),
    "dropout below 0": Bad(r"dropout_p: must lie in \[0, 1\), got -0.1", options={"dropout_p": -0.1}),
    "dropout NaN": Bad(r"dropout_p: must lie in \[0, 1\), got nan", options={"dropout_p": NAN}),
    "dropout beyond floats": Bad(r"dropout_p: must lie in \[0, 1\), got an int of", options={"dropout_p": 10**5000}),
    "dropout None": Bad("dropout_p: takes a number, got NoneType", InputTypeError, options={"dropout_p": None}),
    # biases
    "Causal() on unequal lengths": Bad(
        'Causal\\(\\) has no corner.*seqlen_q=5.*seqlen_kv=7.*"top-left".*"bottom-right"', bias=Causal()
    ),
    "Window() on unequal lengths": Bad('Window\\(\\) has no corner.*"top-left".*"bottom-right"', bias=Window(1, 1)),
    "a bias bound to other lengths": Bad(
        "made for seqlen_q=4, seqlen_kv=4, got seqlen_q=5, seqlen_kv=7", bias=Causal("top-left").bind(4, 4)
    ),
    "a mask of other lengths": Bad(
        r"shape \[5, 8\] does not broadcast to \[batch, num_heads, seqlen_q=5, seqlen_kv=7\]", bias=torch.zeros(5, 8)
    ),
    "a mask of another batch": Bad("made for batch=3, got batch=2", bias=torch.zeros(3, 1, 5, 7)),
    "a mask of other heads": Bad("made for num_heads=2, got num_heads=4", bias=torch.zeros(2, 5, 7)),
    "a mask of rank 5": Bad("does not broadcast", bias=torch.zeros(1, 2, 4, 5, 7)),
    "a mask on another device": Bad(
        "bias: must be on query's device cpu, got meta", bias=torch.zeros(5, 7, device="meta")
    ),
    "an integer mask": Bad("boolean .* floating .*got torch.int64", InputTypeError, bias=integers(5, 7)),
    "a padding of another batch": Bad("made for batch=3, got batch=2", bias=KeyPadding([1, 2, 3])),
    "a padding longer than the keys": Bad(r"\[0, seqlen_kv=7\], got \[3, 8\]", bias=KeyPadding([3, 8])),
    "the class of a bias": Bad(
        r"bias: takes an object, got the class Causal: write Causal\(…\)", InputTypeError, bias=Causal
    ),
    "a string for a bias": Bad("bias: takes None, AttnBias, torch.Tensor.*got str", InputTypeError, bias="causal"),
    # kernels
    "an unknown kernel": Bad(
        r"no kernel 'torch/flush'\. Did you mean 'torch/flash'", UnknownKernelError, options={"kernel": "torch/flush"}
    ),
    "a kernel of an unknown plugin": Bad(
        "no kernel 'nobody/knows'", UnknownKernelError, options={"kernel": "nobody/knows"}
    ),
    "a kernel that is no text": Bad(
        r"kernel: takes the name of a kernel, got \['torch/math'\]", InputTypeError, options={"kernel": ["torch/math"]}
    ),
    "a pattern for a kernel": Bad(
        r"no kernel 'torch/\*'.*A pattern is for prefer: `with prefer\('torch/\*'\):`",
        UnknownKernelError,
        options={"kernel": "torch/*"},
    ),
    "a forced kernel that refuses": Bad(
        "(?s)kernel 'torch/flash' refuses this problem:\n.*softcap: takes no softcap, got 2\n.*The problem: batch 2",
        KernelRefusedError,
        options={"kernel": "torch/flash", "softcap": 2.0},
    ),
    "a forced kernel that is not on this machine": Bad(
        "kernel 'torch/cudnn' is unavailable: (this torch is built without CUDA|torch sees no CUDA device here)",
        KernelRefusedError,
        options={"kernel": "torch/cudnn"},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_call_that_cannot_be_meant_says_so(name):
    bad = BAD[name]
    for _ in range(2):  # also after the first time: nothing of a refused call is kept
        with pytest.raises(bad.error, match=f"(?s){bad.text}"):
            attention(bad.query, bad.key, bad.value, bad.bias, **bad.options)


@pytest.mark.parametrize("name", [name for name in BAD if "kernel" not in BAD[name].options])
@pytest.mark.parametrize("call", [explain, plan], ids=["explain", "plan"])
def test_explain_and_plan_raise_what_the_call_would_raise(name, call):
    bad = BAD[name]
    with pytest.raises(bad.error, match=f"(?s){bad.text}"):
        call(bad.query, bad.key, bad.value, bad.bias, **bad.options)


#: A graph does not know the numbers in a tensor, nor dynamo how to look at such a bias, and it refuses such tensors.
NOT_IN_A_GRAPH = ("a padding longer than the keys", "a string for a bias", "a nested tensor", "a sparse tensor")


@pytest.mark.parametrize("name", [name for name in BAD if name not in NOT_IN_A_GRAPH])
def test_a_graph_is_not_traced_for_what_the_call_refuses(name):
    """Dynamo wraps an error in its own, which holds the text."""
    bad = BAD[name]
    torch._dynamo.reset()
    traced = torch.compile(lambda q, k, v, b: attention(q, k, v, b, **bad.options), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=f"(?s){bad.text}"):
        traced(bad.query, bad.key, bad.value, bad.bias)


@pytest.mark.parametrize("argument", ["query", "key", "value"])
def test_what_is_no_tensor_is_named_by_the_drop_in_and_by_a_plan(argument):
    first = dict.fromkeys(("query", "key", "value"), tensor(2, 4, 5, 8))
    for call in (scaled_dot_product_attention, plan(*first.values()), lambda **x: explain(**x, layout="heads-first")):
        with pytest.raises(InputTypeError, match=f"{argument}: takes a tensor, got NoneType"):
            call(**first | {argument: None})


def test_errors_are_also_of_the_built_in_types_that_fit():
    query = tensor(2, 5, 4, 8)
    for error, call in {
        ValueError: lambda: attention(query, query[:1], query[:1]),
        TypeError: lambda: attention(query, query.double(), query),
        RuntimeError: lambda: attention(query, query, query, softcap=1.0, kernel="torch/math"),
    }.items():
        with pytest.raises(error) as caught:
            call()
        assert isinstance(caught.value, AttnError)


def test_a_forced_kernel_gives_all_its_reasons_at_once():
    x = tensor(2, 5, 4, 8).requires_grad_()
    with pytest.raises(KernelRefusedError) as caught:
        attention(x, x, x, softcap=2.0, dropout_p=0.5, return_lse=True, kernel="torch/math")
    text = str(caught.value)
    for reason in ("softcap: takes no softcap, got 2", "return_lse: does not return the LSE", "lse_grad: "):
        assert reason in text
    assert "dropout_p" not in text.partition("The problem")[0], "what it can do is no reason"


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
def test_a_floating_dtype_that_no_kernel_computes_is_refused_with_every_kernels_reason():
    from attn_core import NoKernelError

    x = tensor(1, 4, 1, 8).to(torch.float8_e4m3fn)
    with pytest.raises(
        NoKernelError, match=r"(?s)torch/flash.*dtype: takes .*float32.*got float8_e4m3fn.*torch/reference"
    ):
        attention(x, x, x)


# Crashes: each of these kills the process, or reads out of bounds, when it reaches the bare op


def in_a_subprocess(body: str) -> str:
    code = (
        "import torch\n"
        "from attn_core import *\n"
        "torch.manual_seed(0)\n"
        "def near(got, wanted):\n"
        "    assert got.shape == wanted.shape, (got.shape, wanted.shape)\n"
        "    assert torch.allclose(got.double(), wanted.double(), atol=1e-5), (got, wanted)\n"
        f"{body}\n"
        "print('alive')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, f"exit {ran.returncode}\n{ran.stdout}\n{ran.stderr[-2000:]}"
    return ran.stdout


SURVIVED = {
    "empty lengths": """
for n, m, b in ((0, 7, 2), (5, 0, 2), (0, 0, 2), (5, 7, 0)):
    for grad in (False, True):
        q, k, v = (torch.randn(b, s, 4, 8, requires_grad=grad) for s in (n, m, m))
        for mask in (None, Causal("top-left"), Causal("bottom-right"), Window(1, 1, "top-left"), KeyPadding([0] * b),
                     torch.ones(n, m, dtype=torch.bool), torch.zeros(n, m)):
            out, lse = attention(q, k, v, mask, return_lse=True)
            assert out.shape == (b, n, 4, 8) and (out == 0).all()
            assert lse.shape == (b, 4, n) and (lse == -torch.inf).all()
            out = attention(q, k, v, mask)
            assert out.shape == (b, n, 4, 8) and (out == 0).all()
            if grad:
                for x, g in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v))):
                    assert g.shape == x.shape and (g == 0).all()
        first = [x.transpose(1, 2) for x in (q, k, v)]
        near(scaled_dot_product_attention(*first), torch.nn.functional.scaled_dot_product_attention(*first))
""",
    "strided last dimensions": """
wide = torch.randn(2, 5, 4, 16)
for q, k, v in (([wide[..., ::2]] * 3), ([wide[..., :8].transpose(1, 3).contiguous().transpose(1, 3)] * 3)):
    assert q.stride(-1) != 1
    wanted = reference_attention(q, k, v)[0]
    near(attention(q, k, v), wanted)
    near(attention(q.contiguous(), k, v), wanted)
    near(attention(q, k.contiguous(), v), wanted)
    for name in ("torch/flash", "torch/math", "torch/flex"):
        near(attention(q, k, v, kernel=name), wanted)
    first = [x.transpose(1, 2) for x in (q, k, v)]
    near(scaled_dot_product_attention(*first).transpose(1, 2), wanted)
""",
    "strided after contiguous operands of the same shape": """
x = torch.randn(2, 5, 4, 8)
attention(x, x, x)
y = torch.randn(2, 5, 4, 16)[..., ::2]
near(attention(y, y, y), reference_attention(y, y, y)[0])
""",
    "operands expanded from one number": """
x = torch.randn(1, 1, 1, 1).expand(2, 5, 4, 8)
near(attention(x, x, x), reference_attention(x, x, x)[0])
k = torch.randn(2, 1, 4, 8).expand(2, 5, 4, 8)
near(attention(x, k, k), reference_attention(x, k, k)[0])
""",
    "shapes that do not fit": """
def refused(*shapes):
    q, k, v = (torch.randn(s) for s in shapes)
    for call in (attention, lambda *x: attention(*x, kernel="torch/flash")):
        try:
            call(q, k, v)
        except InputError:
            continue
        raise AssertionError(shapes)
attention(*(torch.randn(2, 7, 4, 8) for _ in "qkv"))
refused((2, 5, 4, 8), (1, 7, 4, 8), (1, 7, 4, 8))
refused((2, 5, 4, 8), (2, 7, 4, 8), (1, 7, 4, 8))
refused((2, 5, 4, 8), (2, 7, 3, 8), (2, 7, 3, 8))
refused((2, 5, 4, 8), (2, 7, 4, 8), (2, 3, 4, 8))
refused((2, 5, 4, 8), (2, 7, 4, 8), (2, 7, 2, 8))
refused((2, 5, 4, 8), (2, 7, 4, 16), (2, 7, 4, 8))
""",
    "the drop-in with fewer values than keys": """
q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 3, 8)
try:
    scaled_dot_product_attention(q, k, v)
except InputError as error:
    assert "value: seqlen must be key's 7, got 3" in str(error)
else:
    raise AssertionError
""",
}


@pytest.mark.parametrize("name", SURVIVED)
def test_what_crashes_the_bare_op_is_survived(name):
    assert "alive" in in_a_subprocess(SURVIVED[name])


# Defined results


@pytest.mark.parametrize("name", ["torch/math", "torch/reference"])
@pytest.mark.parametrize(("n", "m", "b"), [(0, 7, 2), (5, 0, 2), (5, 7, 0)], ids=["no queries", "no keys", "no batch"])
def test_an_empty_problem_has_a_result_on_every_kernel_that_takes_it(name, n, m, b):
    q, k, v = (torch.randn(b, s, 4, 8, requires_grad=True) for s in (n, m, m))
    out = attention(q, k, v, kernel=name)
    assert out.shape == (b, n, 4, 8)
    assert (out == 0).all()
    for x, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v))):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


def poisoned(dtype, what, requires_grad):
    query, key, value = tensor(3, 5, 4, 8), tensor(3, 7, 2, 8), tensor(3, 7, 2, 8)
    seqlens = [7, 3, 0]
    clean = [x.to(dtype) for x in (query, key, value)]
    for b, length in enumerate(seqlens):
        key[b, length:], value[b, length:] = what, what
    dirty = [x.to(dtype) for x in (query, key, value)]
    for b, length in enumerate(seqlens):
        clean[1][b, length:], clean[2][b, length:] = 0.0, 0.0
    return [x.requires_grad_(requires_grad) for x in clean], [x.requires_grad_(requires_grad) for x in dirty], seqlens


@pytest.mark.parametrize("what", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_what_lies_behind_the_lengths_never_leaks_forward(name, dtype, what):
    clean, dirty, seqlens = poisoned(dtype, what, requires_grad=False)
    out = attention(*dirty, KeyPadding(seqlens), kernel=name)
    assert torch.equal(out, attention(*clean, KeyPadding(seqlens), kernel=name))
    assert torch.isfinite(out).all()
    assert (out[2] == 0).all()


@pytest.mark.parametrize("what", [NAN, INF], ids=str)
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "torch/flex"])
def test_what_lies_behind_the_lengths_never_leaks_backward(name, what):
    clean, dirty, seqlens = poisoned(torch.float32, what, requires_grad=True)
    fed = tensor(3, 5, 4, 8)
    wanted = torch.autograd.grad(attention(*clean, KeyPadding(seqlens), kernel=name), clean, fed)
    got = torch.autograd.grad(attention(*dirty, KeyPadding(seqlens), kernel=name), dirty, fed)
    for one, two in zip(got, wanted):
        assert torch.equal(one, two)
        assert torch.isfinite(one).all()
    for b, length in enumerate(seqlens):
        assert (got[1][b, length:] == 0).all()
        assert (got[2][b, length:] == 0).all()


@pytest.mark.parametrize("name", ["torch/flash", "torch/flex", "torch/reference"])
def test_the_lse_is_that_of_the_keys_that_exist(name):
    clean, dirty, seqlens = poisoned(torch.float32, NAN, requires_grad=False)
    _, lse = attention(*dirty, KeyPadding(seqlens), return_lse=True, kernel=name)
    torch.testing.assert_close(lse.double(), reference_attention(*clean, KeyPadding(seqlens))[1], rtol=0, atol=1e-5)
    assert (lse[2] == -INF).all()


def test_the_chosen_kernel_does_not_leak_in_the_drop_in_either():
    clean, dirty, seqlens = poisoned(torch.float32, NAN, requires_grad=False)
    first = [x.transpose(1, 2) for x in dirty]
    out = scaled_dot_product_attention(*first, attn_mask=KeyPadding(seqlens), enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out.double(), reference_attention(*clean, KeyPadding(seqlens))[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("device_of_lengths", ["int32", "int64", "uint8"])
def test_lengths_of_any_integer_dtype_are_taken(device_of_lengths):
    x = tensor(2, 5, 4, 8)
    seqlens = torch.tensor([2, 5], dtype=getattr(torch, device_of_lengths))
    torch.testing.assert_close(attention(x, x, x, KeyPadding(seqlens)), attention(x, x, x, KeyPadding([2, 5])))


@pytest.mark.parametrize("name", KERNELS)
def test_a_single_query_and_key_return_the_value(name):
    query, key, value = tensor(1, 1, 1, 1), tensor(1, 1, 1, 1), tensor(1, 1, 1, 1) + 3
    torch.testing.assert_close(attention(query, key, value, kernel=name), value)


@pytest.mark.parametrize("name", KERNELS)
def test_scale_zero_averages_the_values(name):
    query, value = tensor(2, 5, 4, 8), tensor(2, 5, 4, 8)
    out = attention(query, query, value, scale=0.0, kernel=name)
    torch.testing.assert_close(out, value.mean(1, keepdim=True).expand_as(out))


def test_options_may_be_given_as_integers():
    x = tensor(2, 5, 4, 8)
    torch.testing.assert_close(attention(x, x, x, scale=1), attention(x, x, x, scale=1.0))
    torch.testing.assert_close(attention(x, x, x, softcap=2), attention(x, x, x, softcap=2.0))
    torch.testing.assert_close(attention(x, x, x, dropout_p=0), attention(x, x, x))


def test_lengths_are_checked_also_where_the_choice_is_cached():
    """A padding's numbers are no part of the key: the same choice serves the next call, which may be wrong."""
    x = tensor(2, 5, 4, 8)
    attention(x, x, x, KeyPadding([2, 5]))
    with pytest.raises(InputError, match=r"\[0, seqlen_kv=5\], got \[2, 6\]"):
        attention(x, x, x, KeyPadding([2, 6]))
    held = KeyPadding(torch.tensor([2, 5]))
    attention(x, x, x, held)
    held.seqlens[0] = 9
    with pytest.raises(InputError, match=r"got \[9, 5\]"):
        attention(x, x, x, held)


def every_bias():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5, 5, generator=generator, dtype=torch.float32, device="cpu")
    return [None, Causal(), Window(1, 0), KeyPadding([2, 5]), TensorBias(numbers), TensorBias(numbers > 0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_dtype_changes_nothing(dtype):
    x = tensor(2, 5, 4, 8)
    wanted = [attention(x, x, x, bias, kernel=name) for bias in every_bias() for name in KERNELS]
    torch.set_default_dtype(dtype)
    try:
        got = [attention(x, x, x, bias, kernel=name) for bias in every_bias() for name in KERNELS]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(got, wanted):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one, two)


def test_torchs_default_device_changes_nothing():
    x = tensor(2, 5, 4, 8)
    wanted = [attention(x, x, x, bias, kernel=name) for bias in every_bias() for name in KERNELS]
    with torch.device("meta"):
        got = [attention(x, x, x, bias, kernel=name) for bias in every_bias() for name in KERNELS]
        assert KeyPadding([1, 3]).bind(2, 3).draw() == "█··\n█··"
    for one, two in zip(got, wanted):
        torch.testing.assert_close(one, two)


def test_a_choice_made_in_inference_mode_does_not_serve_training():
    x = tensor(2, 5, 4, 8)
    with torch.inference_mode():
        attention(x, x, x)
    query = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(attention(query, x, x).sum(), query)
    assert gradient.shape == query.shape


def test_a_bad_call_leaves_the_next_one_alone():
    x = tensor(2, 5, 4, 8)
    wanted = attention(x, x, x)
    calls: list[Callable[[], object]] = [
        lambda: attention(x, x[:1], x[:1]),
        lambda: attention(x, x, x, scale=NAN),
        lambda: attention(x, x, x, TensorBias(torch.zeros(9, 9))),
    ]
    for call in calls:
        with pytest.raises(InputError):
            call()
        assert torch.equal(attention(x, x, x), wanted)
