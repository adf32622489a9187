"""Dense forms that are written out once for every layer that asks for them."""

from __future__ import annotations

import threading

import pytest
import torch
from attn_core import ALiBi, Causal, KeyPadding, Window, attention, mask_mod, reference_attention, written
from attn_core.written import forget_written, written_out
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_kept():
    forget_written()
    yield
    forget_written()


def operands(seqlen=9, **options):
    generator = torch.Generator().manual_seed(20261121)
    return [torch.randn(1, seqlen, 2, 8, generator=generator, **options) for _ in range(3)]


def test_a_constant_is_written_out_once():
    bias = Window(3, 2).bind(9, 9)
    first = written_out(bias, CPU, torch.float32)
    assert written_out(Window(3, 2).bind(9, 9), CPU, torch.float32) is first
    assert torch.equal(first, bias.materialize())


@pytest.mark.parametrize(
    ("bias", "dtype"),
    [(Window(3, 1), torch.float32), (ALiBi(2), torch.float64), (ALiBi(4), torch.float32)],
    ids=["rule", "dtype", "heads"],
)
def test_another_bias_or_dtype_is_another_form(bias, dtype):
    for kept in (Window(3, 2), ALiBi(2)):
        written_out(kept.bind(9, 9), CPU, torch.float32)
    assert torch.equal(written_out(bias.bind(9, 9), CPU, dtype), bias.bind(9, 9).dense(CPU, dtype))


def test_what_holds_data_or_a_function_is_written_out_anew():
    for make in (
        lambda n: KeyPadding([n]),
        lambda n: mask_mod(lambda b, h, q, k: k < n),
        lambda n: Causal() & KeyPadding([n]),
    ):
        for n in (2, 5):
            bias = make(n).bind(9, 9)
            assert torch.equal(written_out(bias, CPU, torch.float32), bias.materialize())
    assert not written._kept


def test_the_bound_holds_and_the_least_lately_used_goes_first(monkeypatch):
    monkeypatch.setattr(written, "LIMIT", 4 * 81)  # four masks of 9 x 9 booleans
    biases = [Window(left, 0).bind(9, 9) for left in range(1, 6)]
    kept = [written_out(bias, CPU, torch.float32) for bias in biases[:4]]
    assert written_out(biases[0], CPU, torch.float32) is kept[0]
    written_out(biases[4], CPU, torch.float32)
    assert written_out(biases[0], CPU, torch.float32) is kept[0]
    assert written_out(biases[1], CPU, torch.float32) is not kept[1]
    assert sum(tensor.nbytes for tensor in written._kept.values()) <= written.LIMIT


def test_what_is_larger_than_half_the_bound_is_never_kept(monkeypatch):
    monkeypatch.setattr(written, "LIMIT", 2 * 81 - 1)
    written_out(Window(3, 2).bind(9, 9), CPU, torch.float32)
    assert not written._kept


def test_calls_agree_with_the_reference_whoever_wrote_the_mask_out():
    query, key, value = operands()
    want = reference_attention(query, key, value, Window(3, 2))[0].float()
    for _ in range(2):
        with torch.inference_mode():
            assert torch.allclose(attention(query, key, value, Window(3, 2), kernel="torch/math"), want, atol=1e-5)
        for kernel in ("torch/flash", "torch/math"):
            trained = [x.clone().requires_grad_() for x in (query, key, value)]
            out = attention(*trained, Window(3, 2), kernel=kernel)
            assert torch.allclose(out, want, atol=1e-5)
            out.sum().backward()
    assert len(written._kept) == 1


def test_neither_a_fake_tensor_nor_one_of_a_transform_is_kept():
    query, key, value = operands()

    def total(query):
        return attention(query, key, value, Window(3, 2), kernel="torch/math").sum()

    got = torch.func.grad(total)(query)
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in written._kept.values())
    with FakeTensorMode():
        attention(*operands(), Window(3, 2), kernel="torch/math")
    assert all(type(tensor) is torch.Tensor for tensor in written._kept.values())
    query.requires_grad_()
    (want,) = torch.autograd.grad(attention(query, key, value, Window(3, 2), kernel="torch/math").sum(), query)
    assert torch.allclose(got, want, atol=1e-5)


def test_threads_get_the_same_numbers(monkeypatch):
    monkeypatch.setattr(written, "LIMIT", 3 * 81)
    wrong = []

    def work(left):
        bias = Window(left, 1).bind(9, 9)
        for _ in range(200):
            if not torch.equal(written_out(bias, CPU, torch.float32), bias.materialize()):
                wrong.append(left)

    threads = [threading.Thread(target=work, args=(left,)) for left in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_kept_is_not_given_to_tensors_without_data():
    bias = Window(3, 2)
    query, key, value = operands()
    attention(query, key, value, bias, kernel="torch/math")
    with FakeTensorMode():
        query, key, value = (torch.empty(1, 9, 2, 8) for _ in range(3))
        assert attention(query, key, value, bias, kernel="torch/math").shape == query.shape
