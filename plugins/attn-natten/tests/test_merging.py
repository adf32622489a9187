"""merge_attentions: attention over all keys from attention over parts of them, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from attn_core.errors import InputError, InputTypeError
from attn_natten import attention, merge_attentions
from attn_natten.errors import ConstraintError, NoEffectWarning
from attn_natten.no_effect import forget_what_was_said

INF = float("inf")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20261121)


@pytest.mark.parametrize("parts", [(5, 7), (1, 4, 7), (12, 0), (0, 3, 0, 9)], ids=str)
def test_parts_of_the_keys_give_attention_over_all_of_them_with_gradients(parts):
    query = torch.randn(2, 6, 3, 8, requires_grad=True)
    key, value = (torch.randn(2, sum(parts), 3, 8, requires_grad=True) for _ in range(2))
    pairs = [attention(query, *both, return_lse=True) for both in zip(key.split(parts, 1), value.split(parts, 1))]
    got = merge_attentions(*map(list, zip(*pairs)))
    want = attention(query, key, value, return_lse=True)
    torch.testing.assert_close(got, want)
    weights = torch.randn(2, 6, 3, 8), torch.randn(2, 6, 3)
    losses = ((out * weights[0]).sum() + (lse * weights[1]).sum() for out, lse in (got, want))
    for one, other in zip(*(torch.autograd.grad(loss, (query, key, value)) for loss in losses)):
        torch.testing.assert_close(one, other)


def test_an_empty_part_on_either_side_counts_for_nothing_whatever_it_holds():
    out, lse = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2)
    nothing, empty = torch.full_like(out, float("nan")), torch.full_like(lse, -INF)
    for outputs, lses in (((out, nothing), (lse, empty)), ((nothing, out), (empty, lse))):
        torch.testing.assert_close(merge_attentions(outputs, lses), (out, lse), atol=0, rtol=0)


def test_where_every_part_is_empty_the_result_is_zero_and_its_lse_is_minus_infinity():
    out, empty = torch.randn(1, 4, 2, 3, requires_grad=True), torch.full((1, 4, 2), -INF, requires_grad=True)
    merged, lse = merge_attentions([out, out], [empty, empty])
    assert not merged.any()
    assert (lse == -INF).all()
    grads = torch.autograd.grad(merged.sum(), (out, empty))
    assert all(not grad.any() for grad in grads)


def test_sizes_of_lse_far_apart_neither_overflow_nor_vanish():
    out = torch.randn(3, 1, 1, 1, 1)
    for shift in (-1e4, 0.0, 1e4):
        lses = [torch.tensor(x + shift).view(1, 1, 1) for x in (0.0, 1.0, -200.0)]
        merged, lse = merge_attentions(list(out), lses)
        weights = torch.tensor([0.0, 1.0, -200.0]).softmax(0)
        torch.testing.assert_close(merged.flatten(), (weights @ out.flatten())[None])
        torch.testing.assert_close(lse.flatten(), torch.tensor([shift + 1.3132617]))


def test_half_precision_is_computed_in_float32():
    outs = [torch.randn(1, 4, 2, 3).to(torch.bfloat16) for _ in range(2)]
    lses = [torch.randn(1, 4, 2) for _ in range(2)]
    merged, lse = merge_attentions(outs, lses)
    want, want_lse = merge_attentions([x.double() for x in outs], [x.double() for x in lses])
    assert merged.dtype is torch.bfloat16
    assert lse.dtype is torch.float32
    torch.testing.assert_close(merged, want.to(torch.bfloat16))
    torch.testing.assert_close(lse, want_lse.float())


def test_the_order_of_parts_does_not_matter():
    outs, lses = torch.randn(3, 1, 4, 2, 3), torch.randn(3, 1, 4, 2)
    results = [
        merge_attentions(*([x[i] for i in order] for x in (outs, lses))) for order in itertools.permutations(range(3))
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_nattens_options_have_no_effect_and_say_so():
    outs, lses = torch.randn(2, 1, 4, 2, 3), torch.randn(2, 1, 4, 2)
    forget_what_was_said()
    with pytest.warns(NoEffectWarning) as said:
        got = merge_attentions(outs, lses, torch_compile=False, use_autograd_fix=False)
    assert [str(each.message).split()[1] for each in said] == ["torch_compile", "use_autograd_fix"]
    assert said[0].filename == __file__
    torch.testing.assert_close(got, merge_attentions(outs, lses), atol=0, rtol=0)


OUT, LSE = torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2)
BAD = {
    "one-part": ([OUT], [LSE], InputError, "outputs: takes two or more tensors, got 1"),
    "fewer-lses": ([OUT, OUT], [LSE], InputError, "lse_tensors: takes one for each of the 2 outputs, got 1"),
    "rank": (
        [OUT[0], OUT[0]],
        [LSE, LSE],
        ConstraintError,
        r"outputs\[0\]: must be \[batch, seqlen, num_heads, head_dim\]",
    ),
    "shapes": (
        [OUT, OUT[:, :3]],
        [LSE, LSE],
        ConstraintError,
        r"outputs\[1\]: .* here \[1, 4, 2, 3\]; got \[1, 3, 2, 3\]",
    ),
    "heads-first-lse": ([OUT, OUT], [LSE, LSE.mT], ConstraintError, r"lse_tensors\[1\]: must be .*; got \[1, 2, 4\]"),
    "dtypes": ([OUT, OUT.half()], [LSE, LSE], ConstraintError, r"outputs\[1\]: must have the dtype of outputs\[0\]"),
    "device": ([OUT, OUT], [LSE, LSE.to("meta")], ConstraintError, r"lse_tensors\[1\]: must be on the device .*cpu"),
    "integers": (
        [OUT, OUT.int()],
        [LSE, LSE],
        InputTypeError,
        r"outputs\[1\]: takes a floating tensor, got torch.int32",
    ),
    "no-tensor": ([OUT, None], [LSE, LSE], InputTypeError, r"outputs\[1\]: takes a floating tensor, got NoneType"),
}


@pytest.mark.parametrize(("outputs", "lses", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_an_error_that_names_the_tensor(outputs, lses, error, match):
    with pytest.raises(error, match=match):
        merge_attentions(outputs, lses)
