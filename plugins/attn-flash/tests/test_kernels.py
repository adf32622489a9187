"""FlashAttention's kernels through the core, by doubles of their libraries in plain torch: what comes out, and what
the libraries are told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from attn_core import (
    ALiBi,
    Cached,
    Causal,
    Paged,
    Segments,
    Window,
    attention,
    explain,
    merge,
    reference_attention,
)
from attn_core.conformance import check_kernel

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from flash_doubled import BY_NAME, LIBRARIES, doubled, registered
from problems import (
    ALIBI,
    ALL,
    CORNER,
    FORWARD,
    GAPS,
    GRADIENTS_CLOSE,
    HALF_CLOSE,
    ODD_DIMS,
    OTHER_DIMS,
    Asked,
    a_table,
)

TRAINED = [("fa2", label, asked) for label, asked in (ALL | ALIBI).items()]
TRAINED += [("fa3", label, asked) for label, asked in (ALL | OTHER_DIMS | ODD_DIMS).items()]
TRAINED += [("fa4", label, asked) for label, asked in (ALL | OTHER_DIMS).items()]
IN_FORWARD = [("fa4", label, asked) for label, asked in ODD_DIMS.items()]
IN_FORWARD += [("fa2", label, asked) for label, asked in FORWARD.items()]
IN_FORWARD += [(name, label, asked) for name in ("fa3", "fa4") for label, asked in (FORWARD | GAPS).items()]


def params(cases):
    return pytest.mark.parametrize(
        ("name", "asked"), [pytest.param(name, asked, id=f"{name}: {label}") for name, label, asked in cases]
    )


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory):
    """The doubles of all three libraries, with their kernels declared for the CPU."""
    with doubled(tmp_path_factory.mktemp("libraries"), *BY_NAME), registered(*BY_NAME):
        yield {name: each.module() for name, each in LIBRARIES.items()}


# What comes out


@params(TRAINED)
def test_output_and_gradients_are_those_of_the_reference(name, asked):
    operands = asked.operands()
    out = asked.by(f"flash/{name}", operands)
    expected, _ = asked.right(operands)
    assert out.dtype is asked.dtype
    torch.testing.assert_close(out.double(), expected, **HALF_CLOSE)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    ours = torch.autograd.grad(out, operands, grad)
    theirs = torch.autograd.grad(expected, operands, grad.double())
    for mine, right in zip(ours, theirs):
        torch.testing.assert_close(mine, right, **GRADIENTS_CLOSE)


@params(TRAINED + IN_FORWARD)
def test_the_lse_is_that_of_the_reference_heads_first_in_float32(name, asked):
    operands = [operand.detach() for operand in asked.operands()]
    out, lse = asked.by(f"flash/{name}", operands, return_lse=True)
    expected, expected_lse = asked.right(operands)
    assert (lse.shape, lse.dtype) == ((asked.batch, asked.heads[0], asked.seqlen_q), torch.float32)
    torch.testing.assert_close(out.double(), expected, **HALF_CLOSE)
    torch.testing.assert_close(lse.double(), expected_lse, **HALF_CLOSE)


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_queries_without_keys_have_output_0_and_lse_minus_infinity_in_every_form(name):
    forms = {
        "dense": Asked(Causal(CORNER), seqlen_q=5, seqlen_kv=2),
        "packed": Asked(Segments([3, 2], [0, 2]), seqlen_q=5, seqlen_kv=2),
        "cached": Asked(Cached([0, 2], within=Causal(CORNER)), seqlen_q=3, seqlen_kv=2),
    }
    for form, asked in forms.items():
        operands = [operand.detach() for operand in asked.operands()]
        out, lse = asked.by(f"flash/{name}", operands, return_lse=True)
        empty = asked.right(operands)[1] == float("-inf")
        assert empty.any(), form
        assert torch.equal(lse == float("-inf"), empty), form
        assert not lse.isposinf().any(), form
        assert (out.transpose(1, 2)[empty] == 0).all(), form


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_parts_of_the_keys_merge_to_all_of_them_with_empty_parts_too(name):
    query, key, value = (operand.detach() for operand in Asked(seqlen_kv=12).operands())
    parts = [
        attention(query, key[:, part], value[:, part], bias, return_lse=True, kernel=f"flash/{name}")
        for part, bias in ((slice(0, 4), None), (slice(4, 6), Causal(CORNER)), (slice(6, 12), None))
    ]
    out, lse = merge(*zip(*parts))
    mask = torch.ones(9, 12, dtype=torch.bool)
    mask[:, 4:6] = Causal(CORNER).bind(9, 2).materialize()
    expected, expected_lse = reference_attention(query, key, value, mask)
    torch.testing.assert_close(out.double(), expected, **HALF_CLOSE)
    torch.testing.assert_close(lse.double(), expected_lse, **HALF_CLOSE)


def test_only_flash_attention_4_differentiates_through_its_lse():
    asked = Asked(Causal())
    operands = asked.operands()
    verdicts = {v.kernel: v for v in explain(*operands, asked.bias, return_lse=True).verdicts}
    assert verdicts["flash/fa2"].refused_fields == verdicts["flash/fa3"].refused_fields == ("lse_grad",)
    lse = asked.by("flash/fa4", operands, return_lse=True)[1]
    ours = torch.autograd.grad(lse.sum(), operands[:2])
    theirs = torch.autograd.grad(asked.right(operands)[1].sum(), operands[:2])
    for mine, right in zip(ours, theirs):
        torch.testing.assert_close(mine, right, **GRADIENTS_CLOSE)


# What the libraries are told


def told(name, function, monkeypatch):
    """The keyword arguments of the calls of a function of that library, which runs as ever."""
    module = LIBRARIES[name].module()
    calls, runs = [], getattr(module, function)

    def spying(*args, **options):
        calls.append(options)
        return runs(*args, **options)

    monkeypatch.setattr(module, function, spying)
    return calls


def test_a_causal_mask_has_its_flag_and_a_window_has_none(monkeypatch):
    calls = told("fa2", "flash_attn_func", monkeypatch)
    for bias in (Causal(), Window(3, 0), Window(None, 2), Window(2, None), None):
        asked = Asked(bias)
        asked.by("flash/fa2", asked.operands())
    assert [(call["causal"], call["window_size"]) for call in calls] == [
        (True, (-1, -1)),
        (False, (3, 0)),
        (False, (-1, 2)),
        (False, (2, -1)),
        (False, (-1, -1)),
    ]


def test_flash_attention_4_is_told_none_where_the_others_are_told_minus_1(monkeypatch):
    calls = told("fa4", "flash_attn_func", monkeypatch)
    for bias in (Causal(), Window(3, 0), Window(None, 2), Window(2, None), None):
        asked = Asked(bias)
        asked.by("flash/fa4", asked.operands())
    assert [(call["causal"], call["window_size"]) for call in calls] == [
        (True, (None, None)),
        (False, (3, 0)),
        (False, (None, 2)),
        (False, (2, None)),
        (False, (None, None)),
    ]


def test_beside_alibi_a_causal_mask_is_told_as_a_window_where_the_lse_is_asked_for(monkeypatch):
    calls = told("fa2", "flash_attn_func", monkeypatch)
    asked = Asked(Causal() + ALiBi(4))
    operands = [operand.detach() for operand in asked.operands()]
    asked.by("flash/fa2", operands)
    asked.by("flash/fa2", operands, return_lse=True)
    assert [(call["causal"], call["window_size"]) for call in calls] == [(True, (-1, -1)), (False, (8, 0))]


def test_slopes_are_float32_and_each_document_has_those_of_its_batch_entry(monkeypatch):
    calls = told("fa2", "flash_attn_varlen_func", monkeypatch)
    slopes = torch.tensor([[0.5, 0.25, 0.125, 0.0625], [1.0, 0.5, 0.25, 0.125]], dtype=torch.float64)
    asked = Asked(Segments([4, 2, 3], within=Causal()) + ALiBi(4, slopes))
    asked.by("flash/fa2", asked.operands())
    [call] = calls
    assert call["alibi_slopes"].dtype is torch.float32
    assert torch.equal(call["alibi_slopes"], slopes.float().repeat_interleave(3, 0))
    assert call["cu_seqlens_q"].tolist() == [0, 4, 6, 9, 13, 15, 18]


def test_where_a_document_has_no_query_the_longest_is_not_said_to_have_one(monkeypatch):
    calls = told("fa2", "flash_attn_varlen_func", monkeypatch)
    asked = ALL["documents without queries"]
    asked.by("flash/fa2", asked.operands())
    assert calls[0]["max_seqlen_q"] == 2


@pytest.mark.parametrize("deterministic", [False, True], ids=["as it comes", "deterministic"])
def test_the_backward_is_told_of_torchs_deterministic_mode(monkeypatch, deterministic):
    calls = told("fa2", "flash_attn_func", monkeypatch)
    asked = Asked(Causal())
    torch.use_deterministic_algorithms(deterministic)
    try:
        asked.by("flash/fa2", asked.operands())
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls[0]["deterministic"] is deterministic


def test_a_table_of_pages_and_lengths_come_as_int32_within_the_pool(monkeypatch):
    calls = told("fa2", "flash_attn_with_kvcache", monkeypatch)
    table = a_table(2, 2)
    table[1, 1] = -1  # behind the end of the sequence: anything
    asked = Asked(Paged(table, torch.tensor([300, 17]), 256), seqlen_q=1, seqlen_kv=512)
    operands = [operand.detach() for operand in asked.operands()]
    out = asked.by("flash/fa2", operands)
    [call] = calls
    assert (call["block_table"].dtype, call["cache_seqlens"].dtype) == (torch.int32, torch.int32)
    assert call["block_table"].min() >= 0
    assert call["cache_seqlens"].tolist() == [300, 17]
    torch.testing.assert_close(out.double(), asked.right(operands)[0], **HALF_CLOSE)


def test_dropout_leaves_the_mean_and_is_the_same_in_the_backward():
    asked = Asked(seqlen_q=4, seqlen_kv=64, heads=(8, 8), batch=4, options={"dropout_p": 0.25})
    torch.manual_seed(0)
    query, key, value = asked.operands()
    ones = torch.ones_like(value, requires_grad=True)
    out = attention(query, key, ones, kernel="flash/fa2", dropout_p=0.25)
    assert abs(out.mean().item() - 1) < 0.05
    assert out.std() > 0.02  # something was dropped
    (grad,) = torch.autograd.grad(out.sum(), ones)
    torch.testing.assert_close(grad.double().sum(), out.double().sum(), atol=0.5, rtol=1e-2)


# The kit


QUICK = ("takes_what_it_claims", "refuses_what_it_does_not_claim", "its_reasons_can_be_read", "never_reads_padding")


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
@pytest.mark.parametrize("check", QUICK)
def test_checks_of_the_kit_pass(name, check):
    results = check_kernel(f"flash/{name}", only=check)
    assert results
    failed = [str(result) for result in results if not result]
    assert not failed, "\n".join(failed)
