"""attention inside a traced graph: fullgraph, the choice made at trace time, as few graphs as the choice needs."""

from __future__ import annotations

import threading

import pytest
import torch
from attn_core import (
    ANY_DIM,
    Backward,
    Capabilities,
    Causal,
    Cost,
    InputError,
    Kernel,
    KeyPadding,
    Refusal,
    TensorBias,
    Window,
    attention,
    explain,
    prefer,
    record,
    register,
    scaled_dot_product_attention,
)
from attn_core.registry import registry
from torch._dynamo.testing import CompileCounterWithBackend

LENGTHS = (24, 16, 64, 128, 300)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(seqlen=16, *, heads=4, kv_heads=None, dim=32, seqlen_kv=None, **options):
    kv = (2, seqlen_kv or seqlen, kv_heads or heads, dim)
    return torch.randn(2, seqlen, heads, dim, **options), torch.randn(kv, **options), torch.randn(kv, **options)


def compiled(function, *, dynamic=None):
    counter = CompileCounterWithBackend("eager")
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


def ops(counter) -> list[str]:
    """Names of the attention ops in the graph traced last."""
    names = [getattr(node.target, "__name__", str(node.target)) for node in counter.graphs[-1].graph.nodes]
    return [name for name in names if "scaled_dot_product" in name]


CALLS = {
    "plain": (lambda q, k, v: attention(q, k, v), operands),
    "causal-built-in-graph": (lambda q, k, v: attention(q, k, v, Causal()), operands),
    "corner": (lambda q, k, v: attention(q, k, v, Causal("bottom-right")), lambda: operands(seqlen_kv=20)),
    "window-built-in-graph": (lambda q, k, v: attention(q, k, v, Window(3, 1)), operands),
    "causal-passed-in": (attention, lambda: (*operands(), Causal("top-left"))),
    "window-passed-in": (attention, lambda: (*operands(), Window(2, 2))),
    "key-padding-passed-in": (attention, lambda: (*operands(), KeyPadding([3, 16]))),
    "tensor-bias-passed-in": (attention, lambda: (*operands(), TensorBias(torch.randn(16, 16)))),
    "tensor": (attention, lambda: (*operands(), torch.rand(2, 1, 16, 16) > 0.3)),
    "tensor-bias-built-in-graph": (
        lambda q, k, v, t: attention(q, k, v, TensorBias(t)),
        lambda: (*operands(), torch.randn(16, 16)),
    ),
    "gqa": (lambda q, k, v: attention(q, k, v), lambda: operands(kv_heads=2)),
    "softcap": (lambda q, k, v: attention(q, k, v, softcap=5.0), operands),
    "scale": (lambda q, k, v: attention(q, k, v, scale=0.3), operands),
    "lse": (lambda q, k, v: attention(q, k, v, return_lse=True)[1], operands),
    "odd-head-dim": (lambda q, k, v: attention(q, k, v), lambda: operands(dim=7)),
    "sdpa": (lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), operands),
    "sdpa-3d": (lambda q, k, v: scaled_dot_product_attention(q[0], k[0], v[0]), operands),
    "sdpa-one-kv-head": (lambda q, k, v: scaled_dot_product_attention(q, k[:, :1], v[:, :1]), operands),
    "forced": (lambda q, k, v: attention(q, k, v, kernel="torch/math"), operands),
    "flex": (lambda q, k, v: attention(q, k, v, Window(2, 0), kernel="torch/flex"), operands),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_one_graph_and_equals_eager(name):
    function, inputs = CALLS[name]
    arguments = inputs()
    traced, counter = compiled(function)
    torch.testing.assert_close(traced(*arguments), function(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("bias", [None, Causal(), Window(4, 4)], ids=["none", "causal", "window"])
def test_gradients_flow_through_a_graph(bias):
    inputs = [x.requires_grad_() for x in operands(dim=8)]
    weights = torch.randn(2, 16, 4, 8)
    traced = torch.compile(lambda q, k, v: attention(q, k, v, bias), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(traced(*inputs), inputs, weights)
    want = torch.autograd.grad(attention(*inputs, bias), inputs, weights)
    torch.testing.assert_close(got, want)


def test_a_graph_of_inductor_equals_eager():
    inputs = operands()
    traced = torch.compile(lambda q, k, v: attention(q, k, v, Causal()) * 2, fullgraph=True)
    torch.testing.assert_close(traced(*inputs), attention(*inputs, Causal()) * 2)


@pytest.mark.parametrize("bias", [None, Causal()], ids=["none", "causal"])
def test_five_lengths_are_one_graph_where_the_choice_never_changes(bias):
    traced, counter = compiled(lambda q, k, v: attention(q, k, v, bias), dynamic=True)
    for seqlen in LENGTHS:
        inputs = operands(seqlen)
        torch.testing.assert_close(traced(*inputs), attention(*inputs, bias))
        assert explain(*inputs, bias).chosen == "torch/flash"
    assert counter.frame_count == 1


def test_five_lengths_with_a_window_are_a_graph_for_each_kernel_that_is_best_at_one():
    bias = Window(10, 4)
    traced, counter = compiled(lambda q, k, v: attention(q, k, v, bias), dynamic=True)
    chosen = set()
    for seqlen in (*LENGTHS, 2048):
        inputs = operands(seqlen)
        torch.testing.assert_close(traced(*inputs), attention(*inputs, bias))
        chosen.add(explain(*inputs, bias).chosen)
    assert chosen == {"torch/flash", "torch/tiled"}
    assert counter.frame_count == 2


@pytest.fixture
def long_calls_only():
    """A kernel that is slow to start and fast afterwards, so that the choice crosses over among LENGTHS."""

    def doubled(query, key, value, *, scale):
        return 2.0 * torch._scaled_dot_product_attention_math(query, key, value, scale=scale)[0]

    kernel = Kernel(
        name="toy/long",
        run=doubled,  # a result of its own, so that it shows who ran
        layout="heads-first",
        capabilities=Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM, compile=True),
        costs={"cpu": Cost(call=60e-6, pair=1e-12)},
    )
    with register(kernel):
        yield kernel


def test_five_lengths_are_two_graphs_where_the_choice_crosses_over(long_calls_only):
    traced, counter = compiled(lambda q, k, v: attention(q, k, v), dynamic=True)
    chosen = set()
    for seqlen in LENGTHS:
        inputs = operands(seqlen)
        chosen.add(explain(*inputs).chosen)
        torch.testing.assert_close(traced(*inputs), attention(*inputs))
        factor = 2.0 if explain(*inputs).chosen == "toy/long" else 1.0
        torch.testing.assert_close(traced(*inputs), factor * attention(*inputs, kernel="torch/math"))
    assert chosen == {"torch/flash", "toy/long"}
    assert counter.frame_count == 2


def test_a_limit_of_a_kernel_on_lengths_holds_in_a_graph_with_symbolic_lengths(long_calls_only):
    def refuse(problem):
        if problem.seqlen_q > 200:
            yield Refusal("seqlen_q", f"takes up to 200, got {problem.seqlen_q}")

    def tripled(query, key, value, *, scale):
        return 3.0 * torch._scaled_dot_product_attention_math(query, key, value, scale=scale)[0]

    kernel = Kernel(
        name="toy/short",
        run=tripled,
        layout="heads-first",
        capabilities=Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM, compile=True),
        costs={"cpu": Cost(call=1e-9)},
        refuse=refuse,
    )
    with register(kernel):
        traced, _ = compiled(lambda q, k, v: attention(q, k, v), dynamic=True)
        for seqlen in LENGTHS:
            inputs = operands(seqlen)
            torch.testing.assert_close(traced(*inputs), attention(*inputs))
            assert explain(*inputs).chosen == ("toy/short" if seqlen <= 200 else "toy/long")


def test_head_dim_and_heads_are_specialised_lengths_are_not():
    traced, counter = compiled(lambda q, k, v: attention(q, k, v), dynamic=True)
    traced(*operands(24, dim=32))
    traced(*operands(48, dim=32))
    assert counter.frame_count == 1
    traced(*operands(24, dim=40))
    assert counter.frame_count == 2


def test_a_compiled_function_follows_the_scope_at_call_time_and_finds_the_old_graph_again():
    traced, counter = compiled(lambda q, k, v: attention(q, k, v))
    inputs = operands()
    traced(*inputs)
    assert ops(counter) == ["_scaled_dot_product_flash_attention_for_cpu"]
    with prefer("torch/math"):
        traced(*inputs)
        assert ops(counter) == ["_scaled_dot_product_attention_math"]
    for _ in range(3):
        traced(*inputs)
        with prefer("torch/math"):
            traced(*inputs)
    assert counter.frame_count == 2


def test_prefer_inside_the_graph_is_traced():
    def function(query, key, value):
        with prefer("torch/math"):
            inner = attention(query, key, value)
        return inner + attention(query, key, value)

    traced, counter = compiled(function)
    inputs = operands()
    torch.testing.assert_close(traced(*inputs), function(*inputs))
    assert ops(counter) == ["_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention_for_cpu"]


def test_one_graph_may_choose_two_kernels_that_no_graph_ran_before():
    def toy(name):
        def run(query, key, value, *, scale):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)

        cpu = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM, compile=True)
        return Kernel(name=name, run=run, capabilities=cpu, layout="heads-first")

    def function(query, key, value):
        with prefer("toy/one"):
            inner = attention(query, key, value)
        with prefer("toy/two"):
            return inner + attention(query, key, value)

    with register(toy("toy/one")), register(toy("toy/two")), record() as calls:
        traced, counter = compiled(function)
        inputs = operands()
        torch.testing.assert_close(traced(*inputs), function(*inputs))
    assert counter.frame_count == 1
    assert {row.kernel for row in calls if row.compiled} == {"toy/one", "toy/two"}


def test_a_compiled_function_follows_the_scope_of_its_thread():
    traced, counter = compiled(lambda q, k, v: attention(q, k, v))
    inputs = operands()
    expected = traced(*inputs)
    results: dict[str, torch.Tensor] = {}
    inside = threading.Event()
    leave = threading.Event()

    def preferring():
        with prefer("torch/math"):
            results["thread"] = traced(*inputs)
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=preferring)
    thread.start()
    assert inside.wait(60)
    before = counter.frame_count
    results["main"] = traced(*inputs)  # the other thread is still within its scope
    leave.set()
    thread.join()
    assert counter.frame_count == before == 2
    torch.testing.assert_close(results["main"], expected, rtol=0, atol=0)
    torch.testing.assert_close(results["thread"], expected)


def test_a_kernel_that_comes_or_goes_is_noticed_by_a_compiled_function(long_calls_only):
    inputs = operands(300)
    single = attention(*inputs, kernel="torch/flash")
    traced, _ = compiled(lambda q, k, v: attention(q, k, v))
    torch.testing.assert_close(traced(*inputs), 2.0 * single)
    registry.unregister(long_calls_only)
    torch.testing.assert_close(traced(*inputs), single)
    with register(long_calls_only):
        torch.testing.assert_close(traced(*inputs), 2.0 * single)


def test_a_kernel_that_cannot_be_traced_is_passed_over_and_said_so():
    def run(query, key, value, *, scale):
        raise AssertionError("chosen in a graph")

    kernel = Kernel(
        name="toy/eager",
        run=run,
        capabilities=Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM, backward=Backward()),
        costs={"cpu": Cost(call=1e-9)},
    )
    with register(kernel):
        traced, counter = compiled(lambda q, k, v: attention(q, k, v))
        traced(*operands())
        assert ops(counter) == ["_scaled_dot_product_flash_attention_for_cpu"]
        with pytest.raises(Exception, match="compiling: cannot be traced into a graph"):
            compiled(lambda q, k, v: attention(q, k, v, kernel="toy/eager"))[0](*operands())


def test_record_lists_a_choice_made_while_tracing_and_never_recompiles():
    traced, counter = compiled(lambda q, k, v: attention(q, k, v, Causal()))
    inputs = operands()
    with record() as calls:
        traced(*inputs)
        traced(*inputs)
    (row,) = calls
    assert (row.kernel, row.compiled, row.calls, row.seconds) == ("torch/flash", True, None, None)
    assert "head_dim 32" in row.reason
    assert "Causal" in row.reason
    for _ in range(3):
        traced(*inputs)
        with record():
            traced(*inputs)
    assert counter.frame_count == 1


def test_autocast_in_a_graph_casts_as_eager_does():
    def function(query, key, value):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(query, key, value)

    inputs = operands()
    traced, _ = compiled(function)
    out = traced(*inputs)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, function(*inputs))


def test_a_bias_with_a_gradient_is_trained_through_a_graph():
    inputs = operands(dim=8)
    table = torch.randn(16, 16, requires_grad=True)
    traced = torch.compile(lambda q, k, v, t: attention(q, k, v, t).square().sum(), fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(traced(*inputs, table), table)
    (want,) = torch.autograd.grad(attention(*inputs, table).square().sum(), table)
    torch.testing.assert_close(got, want)
    assert want.abs().sum() > 0


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.7])
def test_a_limit_of_a_kernel_on_the_scale_holds_in_a_graph(scale, dynamic):
    inputs = operands()
    traced, _ = compiled(lambda q, k, v, s: attention(q, k, v, Causal(), scale=s), dynamic=dynamic)
    torch.testing.assert_close(traced(*inputs, scale), attention(*inputs, Causal(), scale=scale))


def test_a_call_is_not_traced_because_another_thread_compiles(monkeypatch):
    """torch says that it compiles by a flag of the whole process."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    x = torch.randn(2, 6, 4, 8)
    assert not explain(x, x, x).problem.compiling
    with pytest.raises(InputError, match="lengths must lie in"):
        attention(x, x, x, KeyPadding(torch.tensor([3, 7])))


def as_default(q, k, v, softcap=30.0, scale=0.3, dropout_p=0.0):
    return attention(q, k, v, softcap=softcap, scale=scale, dropout_p=dropout_p)


def dropping(q, k, v, dropout_p=0.25):
    return attention(q, k, v, dropout_p=dropout_p)


def test_numbers_that_are_defaults_are_taken_where_sizes_are_dynamic():
    """Dynamo makes symbols of them, though they never change."""
    q, k, v = (torch.randn(1, 7, 2, 8) for _ in range(3))
    traced = torch.compile(
        lambda q, k, v: as_default(as_default(q, k, v), k, v), fullgraph=True, dynamic=True, backend="eager"
    )
    torch.testing.assert_close(traced(q, k, v), as_default(as_default(q, k, v), k, v))


def test_so_is_a_probability_of_dropout():
    q, k, v = (torch.randn(1, 7, 2, 8) for _ in range(3))
    traced = torch.compile(
        lambda q, k, v: dropping(dropping(q, k, v), k, v), fullgraph=True, dynamic=True, backend="eager"
    )
    assert traced(q, k, v).shape == q.shape
