"""prefer(strict=True): nothing runs but kernels that match, in eager calls, plans and compiled functions."""

import asyncio
import json
import threading

import pytest
import torch
from attn_core import (
    AttnBias,
    Causal,
    InputError,
    InputTypeError,
    KernelRefusedError,
    NoKernelError,
    allow,
    attention,
    explain,
    plan,
    prefer,
    record,
    refresh,
    scaled_dot_product_attention,
)
from attn_core.scope import current, mirror

X = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))
STRICT = "prefer('torch/flash', strict=True)"


def ran(x=X):
    with record() as calls:
        attention(x, x, x)
    [kernel] = calls.kernels
    return kernel


# What may run


def test_a_kernel_that_matches_runs_and_the_estimate_decides_among_those():
    with prefer("torch/math", "torch/reference", strict=True):
        assert ran() == explain(X, X, X).chosen == "torch/math"
    with prefer("torch/*", strict=True):
        best = ran()
    assert best == ran()


def test_where_no_kernel_that_matches_takes_the_problem_the_error_has_each_one_s_reasons_and_who_would():
    with prefer("torch/flash", "torch/cudnn", strict=True), pytest.raises(KernelRefusedError) as caught:
        attention(X, X, X, softcap=3.0)
    text = str(caught.value)
    assert text.startswith(
        "prefer('torch/flash', 'torch/cudnn', strict=True): none of these takes this problem: batch 1"
    )
    assert "kernel 'torch/flash' refuses this problem:\n  softcap:" in text
    assert "kernel 'torch/cudnn' " in text
    assert "kernel 'torch/math'" not in text  # its reasons are not asked for: it is left out
    last = text.splitlines()[-1]
    assert last.startswith("Without strict, ")
    assert "torch/flash" not in last


def test_the_error_names_just_those_that_would_take_the_problem_without_strict():
    free = sorted(v.kernel for v in explain(X, X, X, softcap=3.0) if v.state in ("chosen", "ready"))
    with prefer("torch/flash", strict=True), pytest.raises(KernelRefusedError) as caught:
        attention(X, X, X, softcap=3.0)
    last = str(caught.value).splitlines()[-1]
    assert sorted(last.removeprefix("Without strict, ").removesuffix(" would take it.").split(", ")) == free != []


def test_a_refusal_is_a_no_kernel_error_as_others_are():
    with prefer("torch/flash", strict=True), pytest.raises(NoKernelError):
        attention(X, X, X, softcap=3.0)


def test_a_pattern_that_matches_no_kernel_warns_and_lets_nothing_run():
    with pytest.warns(UserWarning, match="no kernel matches"):
        nobody = prefer("flsh/*", strict=True)
    with nobody, pytest.raises(KernelRefusedError, match="no kernel matches; `attn kernels` lists all"):
        attention(X, X, X)


def test_kernel_in_the_call_is_held_to_it():
    with prefer("torch/flash", strict=True):
        attention(X, X, X, kernel="torch/flash")
        with pytest.raises(KernelRefusedError) as caught:
            attention(X, X, X, kernel="torch/math")
    assert f"strict: is left out by {STRICT}" in str(caught.value)


def test_an_adaptation_may_be_used():
    query, kv = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 2, 8)
    free = explain(query, kv, kv, kernel="torch/flash")
    with prefer("torch/flash", strict=True), record() as calls:
        attention(query, kv, kv)
    [row] = calls
    assert row.adaptations == free["torch/flash"].adaptations


def test_strict_without_a_pattern_is_an_error():
    with pytest.raises(InputError, match="prefer: strict needs a pattern; without one, nothing could run"):
        prefer(strict=True)


@pytest.mark.parametrize("strict", [True, False])
def test_a_pattern_that_is_no_text_is_an_error(strict):
    with pytest.raises(InputTypeError, match=r"prefer: takes kernel name patterns, got \('torch/math',\)"):
        prefer(("torch/math",), strict=strict)


# Past the kernels


class Own(AttnBias):
    """Brings its own call."""

    def materialize(self, device=None):
        return torch.zeros(4, 4, device=device)

    def needs_materialization(self):
        return False

    @staticmethod
    def dispatch(query, key, value, attn_bias, causal, scale, dropout_p):
        return torch.zeros_like(query)


def test_what_would_be_handed_to_torch_is_refused_unless_a_pattern_names_it():
    class Foreign(torch.Tensor):
        pass

    x = torch.randn(1, 2, 4, 8).as_subclass(Foreign)
    told = r"strict=True\): this call would go to 'torch \(stock\)' \(.*Foreign.*\), past every kernel"
    with prefer("torch/*", strict=True), pytest.raises(KernelRefusedError, match=told):
        scaled_dot_product_attention(x, x, x)
    with prefer("torch/*", "torch (stock)", strict=True), record() as calls:
        scaled_dot_product_attention(x, x, x)
    assert calls.kernels == {"torch (stock)": 1}


def test_a_bias_s_own_dispatch_is_refused_unless_a_pattern_names_it():
    with prefer("torch/*", strict=True):
        with pytest.raises(KernelRefusedError, match="this call would go to 'bias/Own'"):
            attention(X, X, X, Own())
        verdict = explain(X, X, X, Own())["bias/Own"]
        assert (verdict.state, verdict.refused_fields) == ("refused", ("strict",))
    with prefer("bias/Own", strict=True):
        assert attention(X, X, X, Own()).eq(0).all()
        assert explain(X, X, X, Own()).chosen == "bias/Own"
    with prefer("bias/*", strict=True):
        assert attention(X, X, X, Own()).eq(0).all()


# Nesting


def test_the_innermost_strict_scope_counts_and_a_looser_one_within_it_changes_the_order_alone():
    with prefer("torch/math", "torch/reference", strict=True):
        with prefer("torch/flash"):
            assert ran() == "torch/math"
        with prefer("torch/reference"):
            assert ran() == "torch/reference"
        with prefer("torch/flash", strict=True):
            assert ran() == "torch/flash"
            with allow("approximate"):
                assert ran() == "torch/flash"
                assert current.get().settings.only == ("torch/flash",)
        assert ran() == "torch/math"
    assert current.get().settings.only == mirror.said.only == ()


def test_a_strict_scope_and_a_loose_one_of_the_same_patterns_do_not_share_choices():
    for _ in range(2):
        with prefer("torch/flash"):
            attention(X, X, X, softcap=3.0)
        with prefer("torch/flash", strict=True), pytest.raises(KernelRefusedError):
            attention(X, X, X, softcap=3.0)


def test_strict_ends_with_an_error():
    def fails():
        with prefer("torch/flash", strict=True):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert mirror.said.only == ()
    attention(X, X, X, softcap=3.0)


def test_refresh_leaves_an_open_strict_scope_as_it_is():
    with prefer("torch/math", strict=True):
        refresh()
        assert mirror.said.only == ("torch/math",)
        assert ran() == "torch/math"


# Explain and plan


def test_explain_says_of_those_left_out_that_they_are_and_of_the_others_what_they_have():
    with prefer("torch/flash", strict=True):
        explained = explain(X, X, X, softcap=3.0)
    assert explained.strict == ("torch/flash",)
    assert explained.chosen is None
    assert explained["torch/flash"].refused_fields == ("softcap",)
    for verdict in explained:
        if verdict.kernel != "torch/flash" and verdict.state == "refused":
            assert f"strict: is left out by {STRICT}" in verdict.reasons
    assert explained["torch/math"].state == "refused"
    assert "strict: torch/flash" in str(explained)
    assert json.loads(json.dumps(explained.to_dict()))["strict"] == ["torch/flash"]
    assert explain(X, X, X).strict == ()


def test_a_plan_is_made_within_the_scope_and_keeps_it():
    with prefer("torch/math", strict=True):
        made = plan(X, X, X)
        with pytest.raises(KernelRefusedError, match="none of these takes"), prefer("torch/cudnn", strict=True):
            plan(X, X, X)
    assert made.kernel == "torch/math"
    assert made.explain().strict == ("torch/math",)
    assert made.explain()["torch/flash"].refused_fields == ("strict",)


# Threads and tasks


def test_threads_have_strict_scopes_of_their_own():
    names, seen, barrier = ("torch/math", "torch/reference"), {}, threading.Barrier(2)

    def work(name):
        with prefer(name, strict=True):
            barrier.wait()
            seen[name] = ({ran() for _ in range(10)}, mirror.said.only)
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {name: ({name}, (name,)) for name in names}
    assert mirror.said.only == ()


def test_tasks_have_strict_scopes_of_their_own():
    async def work(name, turns):
        with prefer(name, strict=True):
            for _ in range(turns):
                await asyncio.sleep(0)
                assert ran() == name

    async def main():
        await asyncio.gather(work("torch/math", 3), work("torch/reference", 1))

    asyncio.run(main())
    assert mirror.said.only == ()


# Compile


@pytest.fixture
def traced():
    """A compiled attention without code generation, and the kernels of its graphs, in the order of tracing."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, bias=None: attention(x, x, x, bias), backend=backend, fullgraph=True)
    yield compiled, graphs
    torch._dynamo.reset()


def kernels_of(calls):
    return [row.kernel for row in calls.rows()]


def test_a_compiled_function_follows_a_strict_scope_by_guard(traced):
    compiled, graphs = traced
    expected = attention(X, X, X, kernel="torch/reference")
    for name in ("torch/math", "torch/reference"):
        with prefer(name, strict=True), record() as calls:
            assert torch.allclose(compiled(X), expected, atol=1e-5)
        assert kernels_of(calls) == [name]
    compiled(X)
    assert len(graphs) == 3
    with prefer("torch/math", strict=True):  # its graph is there
        compiled(X)
    assert len(graphs) == 3


def test_a_loose_graph_is_not_taken_for_a_strict_call(traced):
    compiled, graphs = traced
    with prefer("torch/cudnn"):
        compiled(X)
    with prefer("torch/cudnn", strict=True), pytest.raises(Exception, match="none of these takes this problem"):
        compiled(X)
    assert len(graphs) == 1


def test_a_strict_scope_within_a_compiled_function_holds_there():
    torch._dynamo.reset()

    def two(x):
        with prefer("torch/math", strict=True):
            first = attention(x, x, x)
        return first + attention(x, x, x, Causal())

    with record() as calls:
        torch.compile(two, backend="eager", fullgraph=True)(X)
    assert "torch/math" in kernels_of(calls)
    assert mirror.said.only == ()


def test_a_bias_s_own_dispatch_in_a_graph_is_refused():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: attention(x, x, x, Own()), backend="eager", fullgraph=True)
    with prefer("torch/*", strict=True), pytest.raises(Exception, match="this call would go to 'bias/Own'"):
        compiled(X)
