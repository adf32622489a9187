"""Kernels that ask a score's rule for every pair are estimated by how often they do."""

import pytest
import torch
from attn_core import ALiBi, Causal, Neighborhood, RelPosTable, explain
from attn_core.torch_kernels import by_rule

HEADS, SIDE = 4, 8
BIASES = {
    "alibi": (ALiBi(HEADS), 1.0),
    "alibi-causal": (ALiBi(HEADS) + Causal(), 1.0),
    "line": (RelPosTable(torch.zeros(HEADS, 9), SIDE**2), by_rule.AXIS),
    "plane": (RelPosTable(torch.zeros(HEADS, 9, 9), (SIDE, SIDE)), 2 * by_rule.AXIS),
    "plane-neighborhood": (
        RelPosTable(torch.zeros(HEADS, 9, 9), (SIDE, SIDE)) + Neighborhood((SIDE, SIDE), kernel_size=5),
        2 * by_rule.AXIS,
    ),
}


def explained(bias, seqlen=SIDE**2):
    query = torch.zeros(2, seqlen, HEADS, 16)
    return explain(query, query, query, bias)


@pytest.mark.parametrize("name", BIASES)
def test_every_number_that_a_rule_makes_counts_once_for_each_head(name):
    bias, each = BIASES[name]
    pairs = SIDE**4
    counted = by_rule.work(explained(bias).problem)
    assert (counted.pairs, counted.added) == (pairs, each * HEADS * pairs)


@pytest.mark.parametrize("bias", [None, Causal(), torch.zeros(SIDE**2, SIDE**2)], ids=["none", "causal", "tensor"])
def test_where_no_rule_makes_numbers_nothing_is_counted(bias):
    assert by_rule.work(explained(bias).problem) is None


@pytest.mark.parametrize("kernel", ["torch/flex", "torch/reference"])
def test_a_rule_makes_the_estimate_larger_and_one_of_two_axes_more_so(kernel):
    seconds = [explained(BIASES[name][0])[kernel].seconds for name in ("alibi", "line", "plane")]
    assert explained(None)[kernel].seconds < seconds[0] < seconds[1] < seconds[2]


def test_a_large_table_on_a_plane_is_written_out_for_a_kernel_that_reads_it():
    found = explained(RelPosTable(torch.zeros(HEADS, 63, 63), (32, 32)), 1024)
    assert found.chosen == "torch/flash"
    assert "materialize" in found["torch/flash"].adaptations
