"""Compiled graphs with the real Python package of FlashAttention-2, whose ops a graph holds, over the double of its
extension."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from attn_core import ALiBi, Causal, KernelRefusedError, KeyPadding, Segments, Window, attention

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import flash_real
from flash_doubled import registered
from problems import ALIBI, ALL, CORNER, GRADIENTS_CLOSE, HALF_CLOSE, Asked

pytestmark = pytest.mark.skipif(flash_real.folder() is None, reason="flash-attn is not installed; nox -s flash has it")

FORMS = {
    label: asked
    for label, asked in (ALL | ALIBI).items()
    if label
    in (
        "dense",
        "softcap",
        "head_dim 20",
        "causal",
        "window, more keys",
        "documents, causal",
        "documents, window, more queries",
        "documents without queries",
        "ALiBi, causal",
        "ALiBi, causal documents, slopes of each batch entry",
    )
}


@pytest.fixture(scope="module", autouse=True)
def flash():
    with flash_real.over_the_double(), registered("fa2"):
        yield


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(bias, **options):
    """The call as one graph, differentiated by AOTAutograd; how often it is compiled is counted."""
    from torch._dynamo.testing import CompileCounterWithBackend  # seconds, which a skipped test need not wait

    counter = CompileCounterWithBackend("aot_eager")

    def call(query, key, value):
        return attention(query, key, value, bias, kernel="flash/fa2", **options)

    dynamic = options.pop("dynamic", None)
    return torch.compile(call, backend=counter, fullgraph=True, dynamic=dynamic), counter


@pytest.mark.parametrize("label", FORMS)
def test_one_graph_holds_the_call_forward_and_backward(label):
    asked = FORMS[label]
    operands = asked.operands()
    function, _ = compiled(asked.bias, **asked.options)
    out = function(*operands)
    expected, _ = asked.right(operands)
    torch.testing.assert_close(out.double(), expected, **HALF_CLOSE)
    ours = torch.autograd.grad(out, operands, torch.ones_like(out))
    theirs = torch.autograd.grad(expected, operands, torch.ones_like(expected))
    for mine, right in zip(ours, theirs):
        torch.testing.assert_close(mine, right, **GRADIENTS_CLOSE)


@pytest.mark.parametrize(
    "bias",
    [None, Causal(CORNER), Window(2, 1, CORNER), Causal(CORNER) + ALiBi(4, corner=CORNER)],
    ids=["none", "causal", "window", "ALiBi, causal"],
)
def test_one_graph_serves_all_lengths(bias):
    function, counter = compiled(bias, dynamic=True)
    compilations = []
    for lengths in ((9, 13), (10, 17), (12, 14)):
        asked = Asked(bias, *lengths)
        operands = [operand.detach() for operand in asked.operands()]
        torch.testing.assert_close(function(*operands).double(), asked.right(operands)[0], **HALF_CLOSE)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_the_lse_comes_out_of_a_graph():
    asked = Asked(Segments([4, 5], within=Causal()) + ALiBi(4))
    operands = [operand.detach() for operand in asked.operands()]
    function, _ = compiled(asked.bias, return_lse=True)
    out, lse = function(*operands)
    expected, expected_lse = asked.right(operands)
    torch.testing.assert_close(out.double(), expected, **HALF_CLOSE)
    torch.testing.assert_close(lse.double(), expected_lse, **HALF_CLOSE)


def test_padding_is_refused_in_a_graph():
    asked = Asked(KeyPadding(torch.tensor([4, 9])))
    operands = [operand.detach() for operand in asked.operands()]
    function, _ = compiled(asked.bias)
    with pytest.raises((KernelRefusedError, torch._dynamo.exc.TorchDynamoException), match="outside of graphs only"):
        function(*operands)
