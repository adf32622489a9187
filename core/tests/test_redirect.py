"""redirect_sdpa and enable("torch"): every call of torch's attention by attn where it was asked, and nowhere else."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import attn_core
import pytest
import torch
import torch.nn.functional as F
from attn_core import (
    ANY_DIM,
    AttnBias,
    Capabilities,
    IntegrationWarning,
    Kernel,
    KernelRefusedError,
    TensorBias,
    UnknownKernelError,
    attention,
    record,
    register,
    register_sdpa,
)
from attn_core.integrations.torch import disable, enable, is_enabled, redirect_sdpa, redirection
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.bias import causal_lower_right
from torch.nn.modules import activation, transformer
from torch.utils.checkpoint import checkpoint

SEED = 20261121
#: Before, torch.compile takes what stands in torch.nn.functional for torch's own, or does not notice that it changes.
follows_when_compiled = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="a compiled function follows redirection from torch 2.13 on",
)
STOCK = torch._C._nn.scaled_dot_product_attention
ATOL = 1e-6


@pytest.fixture(autouse=True)
def _as_it_was():
    """Every test leaves torch as it came."""
    redirection._said.clear()
    yield
    disable()
    assert F.scaled_dot_product_attention is STOCK
    assert activation.F is F
    assert activation.torch is transformer.torch is torch


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(seqlen=6, heads=2, dim=8, **options):
    generator = torch.Generator().manual_seed(SEED)
    return tuple(torch.randn(2, heads, seqlen, dim, generator=generator, **options) for _ in range(3))


def kernels_of(function, *args):
    with record() as calls:
        function(*args)
    return calls.kernels


def sdpa(*args, **kwargs):
    return F.scaled_dot_product_attention(*args, **kwargs)


# Where it was asked, and nowhere else


def test_within_the_block_calls_are_attns_and_after_it_torch_is_the_identical_object():
    q, k, v = operands()
    stock = sdpa(q, k, v)
    with redirect_sdpa():
        assert F.scaled_dot_product_attention is not STOCK
        with record() as calls:
            ours = sdpa(q, k, v)
    assert F.scaled_dot_product_attention is STOCK
    assert list(calls.kernels.values()) == [1]
    assert torch.allclose(ours, stock, atol=ATOL)
    assert torch.equal(sdpa(q, k, v), stock)
    assert kernels_of(sdpa, q, k, v) == {}


CALLS = {
    "plain": lambda q, k, v: sdpa(q, k, v),
    "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "causal-by-place": lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
    "boolean-mask": lambda q, k, v: sdpa(q, k, v, torch.ones(6, 6, dtype=torch.bool).tril()),
    "float-mask": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.linspace(-1, 1, 36).view(6, 6)),
    "scale": lambda q, k, v: sdpa(q, k, v, scale=1.0),
    "grouped-heads": lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True),
    "one-head-broadcast": lambda q, k, v: sdpa(q, k[:, :1], v[:, :1]),
    "three-dimensions": lambda q, k, v: sdpa(q[0], k[0], v[0]),
    "five-dimensions": lambda q, k, v: sdpa(q[None], k[None], v[None]),
    "two-dimensions": lambda q, k, v: sdpa(q[0, 0], k[0, 0], v[0, 0]),
    "all-by-name": lambda q, k, v: sdpa(query=q, key=k, value=v),
    "value-dim": lambda q, k, v: sdpa(q, k, v[..., :5]),
    "vmap": lambda q, k, v: torch.vmap(sdpa)(q, k, v),
    "torchs-own-causal-bias": lambda q, k, v: sdpa(q[:, :, :4], k, v, causal_lower_right(4, 6)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_every_form_of_call_gives_what_torchs_gives_with_gradients(call):
    inputs = operands(requires_grad=True)
    stock = call(*inputs)
    with redirect_sdpa(), record() as calls:
        ours = call(*inputs)
    assert len(calls) == 1
    assert torch.allclose(ours, stock, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (stock, ours)]
    for of_stock, of_ours in zip(*grads):
        assert torch.allclose(of_ours, of_stock, atol=1e-5)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_beside_a_redirection_that_is_not_theirs_calls_are_bitwise_torchs(call):
    inputs = operands()
    stock = call(*inputs)
    inside, go = threading.Event(), threading.Event()

    def other():
        with redirect_sdpa():
            inside.set()
            go.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert inside.wait(60)
        assert F.scaled_dot_product_attention is not STOCK
        with record() as calls:
            ours = call(*inputs)
    finally:
        go.set()
        thread.join()
    assert calls.kernels == {}
    assert torch.equal(ours, stock)


def test_what_is_no_argument_of_torchs_is_none_here():
    q, k, v = operands()
    with redirect_sdpa():
        with pytest.raises(TypeError, match="scaled_dot_product_attention"):
            sdpa(q, k, v, softcap=1.0)
        with pytest.raises(TypeError):
            sdpa(q, k, v, None, 0.0, False, 1.0)


def test_integrations_say_nothing_of_plain_tensors():
    q, k, v = operands()
    with warnings.catch_warnings(), redirect_sdpa():
        warnings.simplefilter("error")
        sdpa(q, k, v, torch.zeros(6, 6))


def test_nested_tensors_go_to_torch_and_record_says_so():
    q, k, v = (torch.nested.as_nested_tensor([x[0], x[1]], layout=torch.jagged) for x in operands())
    stock = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    with redirect_sdpa(), record() as calls:
        ours = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert calls.kernels == {"torch (stock)": 1}
    assert torch.equal(ours.values(), stock.values())


def test_an_exception_restores():
    with pytest.raises(ZeroDivisionError), redirect_sdpa():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is STOCK
    q, k, v = operands()
    with pytest.raises(Exception, match="head_dim"), redirect_sdpa():
        sdpa(q, k[..., :3], v)
    assert F.scaled_dot_product_attention is STOCK
    assert kernels_of(sdpa, q, k, v) == {}


def test_of_nested_blocks_the_innermost_counts_and_each_may_be_entered_again():
    q, k, v = operands()
    outer, inner = redirect_sdpa(prefer="torch/math"), redirect_sdpa(prefer="torch/flash")
    with outer:
        assert kernels_of(sdpa, q, k, v) == {"torch/math": 1}
        with inner:
            assert kernels_of(sdpa, q, k, v) == {"torch/flash": 1}
            with outer:
                assert kernels_of(sdpa, q, k, v) == {"torch/math": 1}
            assert kernels_of(sdpa, q, k, v) == {"torch/flash": 1}
        assert kernels_of(sdpa, q, k, v) == {"torch/math": 1}
        assert F.scaled_dot_product_attention is not STOCK
    assert F.scaled_dot_product_attention is STOCK


def test_prefer_is_for_the_calls_that_are_redirected_alone():
    q, k, v = operands()
    with redirect_sdpa(prefer="torch/math"):
        assert kernels_of(sdpa, q, k, v) == {"torch/math": 1}
        direct = kernels_of(lambda: attn_core.scaled_dot_product_attention(q, k, v))
    assert direct == kernels_of(lambda: attn_core.scaled_dot_product_attention(q, k, v))


def test_a_strict_block_raises_where_no_kernel_that_matches_takes_the_call():
    q, k, v = operands()
    mask = torch.zeros(6, 6, requires_grad=True)
    with redirect_sdpa(prefer="torch/flash", strict=True):
        sdpa(q, k, v)
        with pytest.raises(KernelRefusedError, match="torch/flash"):
            sdpa(q, k, v, mask)
    assert F.scaled_dot_product_attention is STOCK


def test_a_kernel_that_nobody_registered_is_an_error_before_anything_is_replaced():
    with pytest.raises(UnknownKernelError, match="torch/flsh"):
        redirect_sdpa(prefer="torch/flsh")
    with pytest.raises(UnknownKernelError, match="torch/flsh"):
        enable(prefer="torch/flsh")
    assert not is_enabled()


# Threads and tasks


def test_eight_threads_each_with_its_own_kernel_or_none():
    q, k, v = operands()
    choices = ["torch/math", "torch/flash", "torch/reference", None] * 2
    barrier = threading.Barrier(len(choices))

    def work(choice):
        seen = set()
        for _ in range(20):
            if choice is None:
                barrier.wait(60)
                seen.update(kernels_of(sdpa, q, k, v))
            else:
                with redirect_sdpa(prefer=choice):
                    barrier.wait(60)
                    seen.update(kernels_of(sdpa, q, k, v))
        return seen

    with ThreadPoolExecutor(len(choices)) as pool:
        results = list(pool.map(work, choices))
    assert results == [{choice} - {None} for choice in choices]


def test_tasks_of_one_thread_do_not_see_each_others_redirection():
    q, k, v = operands()

    async def work(choice, turns):
        seen = []
        for turn in range(3):
            await asyncio.sleep(0)
            if choice is None:
                seen.append(kernels_of(sdpa, q, k, v))
                continue
            with redirect_sdpa(prefer=choice):
                await asyncio.sleep(0.001 * (turns + turn))
                seen.append(kernels_of(sdpa, q, k, v))
        return seen

    async def together():
        return await asyncio.gather(work("torch/math", 0), work(None, 1), work("torch/flash", 2))

    assert asyncio.run(together()) == [[{"torch/math": 1}] * 3, [{}] * 3, [{"torch/flash": 1}] * 3]


def test_a_task_begun_within_follows_the_block_and_is_not_redirected_after_it():
    q, k, v = operands()

    async def child(left):
        within = kernels_of(sdpa, q, k, v)
        await left.wait()
        with redirect_sdpa():  # somebody else's, so that torch's attribute is replaced
            pass
        return within, kernels_of(sdpa, q, k, v)

    async def parent():
        left = asyncio.Event()
        with redirect_sdpa(prefer="torch/math"):
            task = asyncio.create_task(child(left))
            await asyncio.sleep(0.01)
        enable(prefer="torch/flash")
        left.set()
        result = await task
        disable()
        return result

    assert asyncio.run(parent()) == ({"torch/math": 1}, {"torch/flash": 1})


def test_leaving_in_another_thread_is_an_error_and_changes_nothing():
    block = redirect_sdpa()
    block.__enter__()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="another task or thread"):
        pool.submit(block.__exit__, None, None, None).result()
    assert F.scaled_dot_product_attention is not STOCK
    block.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is STOCK


# The process


def test_enable_is_for_every_thread_until_disable_and_a_second_time_changes_the_options():
    q, k, v = operands()

    def elsewhere():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(kernels_of, sdpa, q, k, v).result()

    assert not is_enabled()
    enable(prefer="torch/math")
    assert is_enabled()
    assert elsewhere() == kernels_of(sdpa, q, k, v) == {"torch/math": 1}
    enable(prefer=("torch/flash",))
    assert elsewhere() == {"torch/flash": 1}
    disable()
    assert not is_enabled()
    assert F.scaled_dot_product_attention is STOCK
    assert elsewhere() == {}
    disable()


def test_a_block_within_the_enabled_process_counts_first_and_outlives_disable():
    q, k, v = operands()
    enable(prefer="torch/flash")
    with redirect_sdpa(prefer="torch/math"):
        assert kernels_of(sdpa, q, k, v) == {"torch/math": 1}
        disable()
        assert kernels_of(sdpa, q, k, v) == {"torch/math": 1}
    assert F.scaled_dot_product_attention is STOCK


# Others who replace the same attribute


def test_a_replacement_made_after_ours_is_left_in_place_and_ours_passes_on(monkeypatch):
    q, k, v = operands()
    with monkeypatch.context() as patch:
        block = redirect_sdpa()
        block.__enter__()
        ours, theirs_calls = F.scaled_dot_product_attention, []

        def theirs(*args, **kwargs):
            theirs_calls.append(1)
            return ours(*args, **kwargs)

        patch.setattr(F, "scaled_dot_product_attention", theirs)
        assert list(kernels_of(sdpa, q, k, v).values()) == [1]
        with pytest.warns(IntegrationWarning, match="scaled_dot_product_attention was replaced by somebody else"):
            block.__exit__(None, None, None)
        assert F.scaled_dot_product_attention is theirs
        assert kernels_of(sdpa, q, k, v) == {}
        assert theirs_calls == [1, 1]
        with redirect_sdpa():  # around theirs, and back to it
            assert list(kernels_of(sdpa, q, k, v).values()) == [1]
        assert F.scaled_dot_product_attention is theirs
        assert torch.equal(sdpa(q, k, v), STOCK(q, k, v))
    # They put back what they had found: ours, which nobody needs any more, and which the next block takes for torch's.
    assert F.scaled_dot_product_attention is ours
    assert kernels_of(sdpa, q, k, v) == {}
    with redirect_sdpa():
        assert list(kernels_of(sdpa, q, k, v).values()) == [1]
    assert F.scaled_dot_product_attention is STOCK


# Kernels that call torch's attention


def test_a_kernel_that_calls_torchs_attention_gets_torchs():
    inner = []

    @register_sdpa("mine/again", devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM, biases={TensorBias})
    def again(query, key, value, attn_mask=None, *, scale=None):
        with record() as calls:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)
        inner.append(calls.kernels)
        return out

    q, k, v = operands()
    with again:
        for context in (redirect_sdpa(prefer="mine/again"), redirect_sdpa(prefer="mine/again", strict=True)):
            with context:
                assert kernels_of(sdpa, q, k, v) == {"mine/again": 1}
        enable(prefer="mine/again")
        assert kernels_of(sdpa, q, k, v) == {"mine/again": 1}
    assert inner == [{}] * 3


DOORS = {
    "attention": lambda q, k, v: attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
    "scaled_dot_product_attention": attn_core.scaled_dot_product_attention,
    "plan": lambda q, k, v: attn_core.plan(q, k, v, layout="heads-first")(q, k, v),
    "unchecked-plan": lambda q, k, v: attn_core.plan(q, k, v, layout="heads-first", unchecked=True)(q, k, v, None),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS.keys())
@pytest.mark.parametrize("how", ["block", "process"])
def test_so_does_one_that_attn_was_asked_for_directly(door, how):
    depth = []

    @register_sdpa("mine/again", devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM)
    def again(query, key, value, *, scale=None):
        depth.append(None)
        assert len(depth) == 1, "it was called by itself"
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    q, k, v = operands()
    with again, attn_core.prefer("mine/again"):
        if how == "process":
            enable(prefer="mine/again")
            ours = door(q, k, v)
        else:
            with redirect_sdpa(prefer="mine/again"):
                ours = door(q, k, v)
    assert depth == [None]
    assert torch.equal(ours, STOCK(q, k, v))


@follows_when_compiled
@pytest.mark.usefixtures("fresh_dynamo")
def test_so_does_one_in_a_compiled_graph():
    @register_sdpa("mine/traced", devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM, compile=True)
    def again(query, key, value, *, scale=None):
        return F.scaled_dot_product_attention(query, key, value, scale=scale) + 1

    q, k, v = operands()
    with again:
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(sdpa, fullgraph=True, backend=counter)
        with redirect_sdpa(prefer="mine/traced", strict=True):
            out = compiled(q, k, v)
        assert torch.allclose(out, STOCK(q, k, v) + 1, atol=ATOL)
        with attn_core.prefer("mine/traced"), redirect_sdpa():  # by the other door
            compiled = torch.compile(lambda *x: attention(*x), fullgraph=True, backend=counter)
            assert compiled(q, k, v).shape == q.shape


@follows_when_compiled
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS.keys())
@pytest.mark.usefixtures("fresh_dynamo")
def test_so_does_one_that_is_compiled_itself(door):
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def inner(query, key, value):
        return F.scaled_dot_product_attention(query, key, value)

    @register_sdpa("mine/compiled", devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM)
    def compiled(query, key, value, *, scale=None):
        return inner(query, key, value)

    q, k, v = operands()
    enable(prefer="torch/math")
    with compiled, attn_core.prefer("mine/compiled"):
        assert torch.equal(door(q, k, v), STOCK(q, k, v))
    assert ops(counter) == ["scaled_dot_product_attention"]
    inner(q, k, v)  # the same function, by itself
    assert ops(counter) == ["_scaled_dot_product_attention_math"]


@follows_when_compiled
@pytest.mark.parametrize("region", ["plain", "checkpointed"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_so_does_one_of_a_plan_in_a_compiled_graph(region):
    @register_sdpa("mine/planned", devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM, compile=True)
    def again(query, key, value, *, scale=None):
        return F.scaled_dot_product_attention(query, key, value, scale=scale) + 1

    q, k, v = operands()
    with again:
        planned = attn_core.plan(q, k, v, layout="heads-first", kernel="mine/planned")
        enable(prefer="mine/planned")

        def model(*x):
            return planned(*x) if region == "plain" else checkpoint(planned, *x, use_reentrant=False)

        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(q, k, v), STOCK(q, k, v) + 1, atol=ATOL)


def test_so_does_a_probe_and_what_a_bias_brings_as_its_own_call():
    inner = []

    def attend(query, key, value, **options):
        with record() as calls:
            out = F.scaled_dot_product_attention(query, key, value)
        inner.append(calls.kernels)
        return out

    def probe():
        attend(q, k, v)

    class Own(AttnBias):
        def materialize(self, device=None):
            raise AssertionError("it brings its own call")

        def needs_materialization(self):
            return False

        @staticmethod
        def dispatch(query, key, value, attn_bias, causal, scale, dropout_p):
            return attend(query, key, value)

    q, k, v = operands()
    cpu = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM)
    probed = Kernel(name="mine/probed", run=lambda query, key, value, *, scale: query, capabilities=cpu, probe=probe)
    enable()
    with register(probed):
        sdpa(q, k, v)
    assert torch.equal(attn_core.scaled_dot_product_attention(q, k, v, Own()), STOCK(q, k, v))
    assert torch.equal(sdpa(q, k, v, Own()), STOCK(q, k, v))
    assert inner == [{}] * 3


def test_a_kernel_that_raises_leaves_redirection_as_it_was():
    @register_sdpa("mine/raises", devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM)
    def raises(query, key, value, *, scale=None):
        F.scaled_dot_product_attention(query, key, value)
        raise ArithmeticError("out of order")

    q, k, v = operands()
    with raises, redirect_sdpa(prefer="torch/math"):
        for call in (lambda: attention(q, k, v, kernel="mine/raises"), lambda: DOORS["attention"](q, k, v)):
            with attn_core.prefer("mine/raises"), pytest.raises(ArithmeticError):
                call()
            assert kernels_of(sdpa, q, k, v) == {"torch/math": 1}


def test_while_a_kernel_runs_in_one_thread_the_others_are_redirected():
    q, k, v = operands()
    seen = []

    def work(context):
        seen.append(context.run(kernels_of, sdpa, q, k, v))

    @register_sdpa("mine/slow", devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM)
    def slow(query, key, value, *, scale=None):
        with ThreadPoolExecutor(1) as pool:  # of the same context, too: what it runs is not the kernel
            pool.submit(work, contextvars.copy_context()).result()
        seen.append(kernels_of(sdpa, query, key, value))
        return query

    enable(prefer="torch/math")
    with slow:
        attention(q, k, v, kernel="mine/slow")
    assert seen == [{"torch/math": 1}, {}]


def test_a_task_that_a_kernel_begins_is_redirected_when_it_runs():
    q, k, v = operands()

    async def later():
        return kernels_of(sdpa, q, k, v)

    tasks = []

    @register_sdpa("mine/begins", devices={"cpu"}, dtypes={torch.float32}, head_dims=ANY_DIM)
    def begins(query, key, value, *, scale=None):
        tasks.append(asyncio.get_running_loop().create_task(later()))
        return query

    async def main():
        sdpa(q, k, v)
        return await tasks[0]

    with begins:
        enable(prefer="mine/begins")
        first = asyncio.run(main())
    assert first == {"mine/begins": 1}


# torch.compile


def ops(counter):
    names = [getattr(node.target, "__name__", str(node.target)) for node in counter.graphs[-1].graph.nodes]
    return [name for name in names if "scaled_dot_product" in name or "multi_head" in name or "encoder_layer" in name]


@follows_when_compiled
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_function_is_one_graph_that_follows_the_block_both_ways():
    q, k, v = operands()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(sdpa, fullgraph=True, backend=counter)
    stock = compiled(q, k, v)
    assert ops(counter) == ["scaled_dot_product_attention"]
    with redirect_sdpa(prefer="torch/math"):
        ours = compiled(q, k, v)
        assert ops(counter) == ["_scaled_dot_product_attention_math"]
    with redirect_sdpa(prefer="torch/flash"):
        compiled(q, k, v)
        assert ops(counter) == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert counter.frame_count == 3
    for _ in range(2):  # each finds its graph again
        assert torch.equal(compiled(q, k, v), stock)
        with redirect_sdpa(prefer="torch/math"):
            assert torch.equal(compiled(q, k, v), ours)
    assert counter.frame_count == 3
    assert torch.allclose(ours, stock, atol=ATOL)


@follows_when_compiled
@pytest.mark.usefixtures("fresh_dynamo")
def test_another_thread_in_the_same_compiled_function_keeps_torchs():
    q, k, v = operands()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(sdpa, fullgraph=True, backend=counter)
    with redirect_sdpa(prefer="torch/math"):
        compiled(q, k, v)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(compiled, q, k, v).result(), STOCK(q, k, v))
        assert ops(counter) == ["scaled_dot_product_attention"]
    enable(prefer="torch/math")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(compiled, q, k, v).result()
    assert ops(counter) == ["_scaled_dot_product_attention_math"]


@pytest.mark.parametrize("prefer", [(), "torch/math"], ids=["no-preference", "prefer"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_checkpointed_region_is_one_graph_as_it_is_without(prefer):
    def model(q, k, v):
        return checkpoint(lambda q, k, v: sdpa(q, k, v).tanh(), q, k, v, use_reentrant=False)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for context in (torch.enable_grad(), redirect_sdpa(prefer=prefer)):
        inputs = operands(requires_grad=True)
        with context:
            compiled(*inputs).sum().backward()
        grads.append([x.grad for x in inputs])
    for stock, ours in zip(*grads):
        assert torch.allclose(stock, ours, atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [None, torch.ones(6, 6, dtype=torch.bool).tril(), causal_lower_right(6, 6)],
    ids=["none", "tensor", "torchs-own-causal-bias"],
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_an_idle_stand_in_compiles_as_torchs_does(mask):
    inputs = (*operands(), mask)
    stock = torch.compile(sdpa, backend="eager", fullgraph=True)(*inputs)
    torch._dynamo.reset()
    inside, go = threading.Event(), threading.Event()

    def other():
        with redirect_sdpa():
            inside.set()
            go.wait(120)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert inside.wait(60)
        compiled = torch.compile(sdpa, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*inputs), stock)
    finally:
        go.set()
        thread.join()


# Programs that run elsewhere


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def as_heard(make):
    """What `make()` gives, and what it said of redirection."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        made = make()
    return made, [str(each.message) for each in heard if each.category is IntegrationWarning]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_program_has_torchs_attention_and_a_warning(strict):
    inputs = operands()
    with redirect_sdpa():
        program, heard = as_heard(lambda: torch.export.export(Attention(), inputs, strict=strict))
        again, silent = as_heard(lambda: torch.export.export(Attention(), inputs, strict=strict))
    assert len(heard) == 1
    assert "torch.export" in heard[0]
    assert silent == []
    for each in (program, again):
        assert any("aten.scaled_dot_product_attention" in str(node.target) for node in each.graph.nodes)
    assert torch.allclose(program.module()(*inputs), Attention()(*inputs), atol=ATOL)


def test_a_traced_module_has_torchs_attention_and_a_warning():
    inputs = operands()
    with redirect_sdpa():
        traced, heard = as_heard(lambda: torch.jit.trace(Attention(), inputs))
    assert len(heard) == 1
    assert "torch.jit.trace" in heard[0]
    assert "aten::scaled_dot_product_attention" in str(traced.graph)


def test_a_scripted_module_has_torchs_attention_and_a_warning():
    inputs = operands()
    with redirect_sdpa():
        scripted, heard = as_heard(lambda: torch.jit.script(Attention()))
        assert len(heard) == 1
        assert "torch.jit.script" in heard[0]
        assert torch.equal(scripted(*inputs), STOCK(*inputs, is_causal=True))
    assert "aten::scaled_dot_product_attention" in str(scripted.inlined_graph)


def test_scripting_beside_a_redirection_that_is_not_ours_says_nothing():
    block = redirect_sdpa()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.__enter__).result()
        try:
            scripted, heard = as_heard(lambda: torch.jit.script(Attention()))
        finally:
            pool.submit(block.__exit__, None, None, None).result()
    assert heard == []
    assert torch.equal(scripted(*operands()), STOCK(*operands(), is_causal=True))


def test_a_graph_of_fx_calls_torchs_attention_with_a_warning():
    inputs = operands()
    with redirect_sdpa():
        graph, heard = as_heard(lambda: torch.fx.symbolic_trace(Attention()))
    assert len(heard) == 1
    assert "torch.fx" in heard[0]
    assert STOCK in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(*inputs), Attention()(*inputs))


# Modules of torch.nn


def encoder(**options):
    torch.manual_seed(SEED)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)


def tokens():
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(SEED))


PADDED = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
MASKS = {
    "no-mask": {},
    "causal": {"src_mask": nn.Transformer.generate_square_subsequent_mask(6), "is_causal": True},
    "padding": {"src_key_padding_mask": PADDED},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_encoder_layer_gives_what_it_gives_without_by_attn(mask, training):
    layer, x = encoder().train(training), tokens()
    stock = layer(x, **mask)
    with redirect_sdpa(), record() as calls:
        ours = layer(x, **mask)
    assert sum(calls.kernels.values()) == 1
    assert "torch (stock)" not in calls.kernels
    assert torch.allclose(ours, stock, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), tuple(layer.parameters())) for out in (stock, ours)]
    for of_stock, of_ours in zip(*grads):
        assert torch.allclose(of_ours, of_stock, atol=1e-4)


@pytest.mark.parametrize("mask", [{}, {"src_key_padding_mask": PADDED}], ids=["no-mask", "padding"])
def test_the_native_path_is_off_where_we_redirect_and_on_everywhere_else(mask):
    model = nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=True).eval()
    x = tokens()
    kept = ~mask.get("src_key_padding_mask", torch.zeros(2, 6, dtype=torch.bool))
    with torch.no_grad():
        stock = model(x, **mask)
        with redirect_sdpa():
            with record() as calls:
                ours = model(x, **mask)
            with ThreadPoolExecutor(1) as pool:
                elsewhere = pool.submit(torch.no_grad()(lambda: model(x, **mask))).result()
    assert sum(calls.kernels.values()) == 2
    assert torch.allclose(ours[kept], stock[kept], atol=1e-5)  # the native path gives zeros for padded queries
    assert torch.equal(elsewhere, stock)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "seqlen-first"])
def test_multihead_attention_without_weights_is_attns_and_equal(training, batch_first):
    torch.manual_seed(SEED)
    module = nn.MultiheadAttention(16, 2, batch_first=batch_first).train(training)
    x = tokens() if batch_first else tokens().transpose(0, 1)
    asked = {
        "self": ((x, x, x), {}),
        "cross": ((x, 2 * x, x), {}),
        "padding": ((x, x, x), {"key_padding_mask": PADDED}),
        "unbatched": ((tokens()[0],) * 3, {}),
    }
    for name, (args, options) in asked.items():
        stock, _ = module(*args, need_weights=False, **options)
        with redirect_sdpa(), record() as calls:
            ours, weights = module(*args, need_weights=False, **options)
        assert weights is None
        assert sum(calls.kernels.values()) == 1, name
        assert torch.allclose(ours, stock, atol=1e-5), name


def test_multihead_attention_with_weights_is_torchs_and_record_says_why():
    module, x = nn.MultiheadAttention(16, 2, batch_first=True), tokens()
    stock, weights = module(x, x, x)
    with redirect_sdpa(), record() as calls:
        ours, same = module(x, x, x)
    (row,) = calls
    assert row.kernel == "torch (stock)"
    assert "need_weights=True" in row.reason
    assert torch.equal(ours, stock)
    assert torch.equal(same, weights)


@follows_when_compiled
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_encoder_layer_is_one_graph_with_attns_kernel():
    layer, x = encoder().eval(), tokens()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        stock = compiled(x)
        assert ops(counter) == ["_transformer_encoder_layer_fwd"]
        with redirect_sdpa():
            ours = compiled(x)
            assert ops(counter) == ["_scaled_dot_product_flash_attention_for_cpu"]
        assert torch.equal(compiled(x), stock)
    assert counter.frame_count == 2
    assert torch.allclose(ours, stock, atol=1e-5)
    layer.train()
    with redirect_sdpa(), record() as calls:
        compiled(x).sum().backward()
    assert [row.compiled for row in calls] == [True]


@follows_when_compiled
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_call_with_weights_is_noted_as_torchs():
    module, x = nn.MultiheadAttention(16, 2, batch_first=True), tokens()
    compiled = torch.compile(lambda x: module(x, x, x), fullgraph=True, backend="eager")
    with redirect_sdpa(), record() as calls:
        ours, _ = compiled(x)
    assert [(row.kernel, row.compiled) for row in calls] == [("torch (stock)", True)]
    assert torch.allclose(ours, module(x, x, x)[0], atol=1e-5)


def test_encoder_layers_are_exported_as_torchs():
    layer, x = encoder().eval(), tokens()
    stock = torch.export.export(layer, (x,))
    with redirect_sdpa():
        ours, _ = as_heard(lambda: torch.export.export(layer, (x,)))
    assert [str(node.target) for node in ours.graph.nodes] == [str(node.target) for node in stock.graph.nodes]


def test_encoder_layers_are_scripted_as_torchs():
    layer, x = encoder().eval(), tokens()
    with redirect_sdpa():
        scripted, heard = as_heard(lambda: torch.jit.script(layer))
    assert len(heard) == 1
    with torch.no_grad():
        assert torch.allclose(scripted(x), layer(x), atol=1e-5)
