"""FLOPs by torch's counter: those of torch's own formula for dense attention, and of a mask those that it leaves."""

import json
import os
import subprocess
import sys

import pytest
import torch
from attn_core import ALiBi, Causal, Segments, Window, attention, flops, scaled_dot_product_attention
from attn_core.torch_kernels.tiling import traced
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

SHAPES = {
    "equal lengths": ((2, 9, 4, 8), (2, 9, 4, 8)),
    "unequal lengths": ((1, 5, 2, 16), (1, 12, 2, 16)),
    "one query": ((3, 1, 2, 8), (3, 40, 2, 8)),
}
#: Those of equal lengths, heads-first.
SAME = [(2, 4, 9, 8)] * 3
DENSE = ("torch/flash", "torch/math")
WINDOW = Window(2, 1, "top-left")
DOCUMENTS = Segments([4, 5], within=Causal())


def operands(what, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    of_query, of_key = SHAPES[what]
    shapes = (of_query, of_key, of_key)
    return [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]


def counted(call):
    with FlopCounterMode(display=False, custom_mapping=flops.formulas()) as counter:
        call()
    return counter.get_total_flops()


def heads_first(tensor):
    batch, seqlen, heads, dim = tensor.shape
    return batch, heads, seqlen, dim


@pytest.mark.parametrize("kernel", DENSE)
@pytest.mark.parametrize("what", SHAPES)
def test_a_dense_kernel_counts_what_torch_counts_for_dense_attention(kernel, what):
    query, key, value = operands(what)
    wanted = sdpa_flop_count(*map(heads_first, (query, key, value)))
    assert counted(lambda: attention(query, key, value, kernel=kernel)) == wanted > 0


@pytest.mark.parametrize("what", SHAPES)
def test_its_backward_counts_what_torch_counts_for_dense_attention(what):
    query, key, value = operands(what, requires_grad=True)
    out = attention(query, key, value, kernel="torch/flash")
    wanted = sdpa_backward_flop_count(*map(heads_first, (out, query, key, value)))
    assert counted(lambda: out.sum().backward()) == wanted > 0


def test_a_dense_kernel_counts_all_pairs_whatever_its_mask_as_torch_does():
    query, key, value = operands("equal lengths")
    call = {"kernel": "torch/flash"}
    causal = counted(lambda: attention(query, key, value, Causal(), **call))
    assert causal == counted(lambda: attention(query, key, value, **call))


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_heads_count_as_many_as_query_has(num_kv_heads):
    query = operands("equal lengths")[0]
    key = query[:, :, :num_kv_heads]
    wanted = sdpa_flop_count(*map(heads_first, (query, query, query)))
    assert counted(lambda: attention(query, key, key, kernel="torch/flash")) == wanted


def test_sdpa_by_name_and_stock_sdpa_count_the_same():
    query, key, value = (tensor.transpose(1, 2) for tensor in operands("equal lengths"))
    stock = counted(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value))
    assert counted(lambda: scaled_dot_product_attention(query, key, value)) == stock > 0


@pytest.mark.parametrize("bias", [None, WINDOW, DOCUMENTS, Causal()], ids=["none", "window", "documents", "causal"])
def test_tiled_counts_the_pairs_that_the_mask_leaves(bias):
    query, key, value = operands("equal lengths", requires_grad=True)
    left = 81 if bias is None else int(bias.bind(9, 9).materialize().sum())
    dense = sdpa_flop_count(*map(heads_first, (query, key, value)))
    backward = sdpa_backward_flop_count(*map(heads_first, (query, query, key, value)))
    results = []
    assert (
        counted(lambda: results.append(attention(query, key, value, bias, kernel="torch/tiled"))) == dense * left // 81
    )
    assert counted(lambda: results[0].sum().backward()) == backward * left // 81


def test_the_op_of_a_graph_with_scores_counts_the_same():
    query, key, value = (tensor.transpose(1, 2) for tensor in operands("equal lengths", requires_grad=True))
    mask, alibi = (bias.bind(9, 9) for bias in (WINDOW, ALiBi(4)))
    left = int(mask.materialize().sum())
    dense, backward = sdpa_flop_count(*SAME), sdpa_backward_flop_count(SAME[0], *SAME)
    results = []

    def call():
        results.append(traced.tiled(query, key, value, alibi + mask, 0.3)[0])

    assert counted(call) == dense * left // 81
    assert counted(lambda: results[0].sum().backward()) == backward * left // 81


def test_without_the_formulas_torch_is_told_nothing():
    query, key, value = operands("equal lengths")
    before = dict(flop_registry)
    flops.formulas()
    assert flop_registry == before
    with FlopCounterMode(display=False) as counter:
        attention(query, key, value, kernel="torch/tiled")
    assert counter.get_total_flops() == 0


def test_registered_they_count_in_every_counter_made_afterwards_and_torchs_own_stay():
    query, key, value = operands("equal lengths")
    wanted = sdpa_flop_count(*map(heads_first, (query, key, value)))
    before = dict(flop_registry)
    own = torch.ops.attn_core.tiled
    try:
        flop_registry[own] = lambda *args, **options: 7
        flops.register()
        flops.register()
        changed = {str(op) for op, formula in before.items() if flop_registry[op] is not formula}
        assert changed - {"torch_attn._varlen_attn"} == {
            f"aten._flash_attention_{way}" for way in ("forward", "backward")
        }
        with FlopCounterMode(display=False) as counter:
            attention(query, key, value, kernel="torch/flash")
        assert counter.get_total_flops() == wanted
        with FlopCounterMode(display=False) as counter:
            attention(query, key, value, kernel="torch/tiled")
        assert counter.get_total_flops() == 7
    finally:
        flop_registry.clear()
        flop_registry.update(before)


def test_importing_attn_core_and_calling_it_loads_no_counter():
    code = """
    import json, sys, torch
    before = "torch.utils.flop_counter" in sys.modules
    import attn_core
    x = torch.randn(1, 4, 2, 8)
    attn_core.attention(x, x, x)
    attn_core.attention(x, x, x, attn_core.Window(1, 1), kernel="torch/tiled")
    print(json.dumps([before, "torch.utils.flop_counter" in sys.modules, "attn_core.flops" in sys.modules]))
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ATTN_")} | {
        "ATTN_PLUGINS": ""
    }
    ended = subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True, check=True)
    before, counter, formulas = json.loads(ended.stdout)
    assert counter == before
    assert not formulas
