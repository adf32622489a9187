"""Everything by which a kept choice is found and recognised: flipped after the first call, the call chooses anew.

Two toy kernels say what ran. `toy/narrow` is the fastest and takes one call only, the base call; `toy/wide` takes
everything. Were an element missing from the key, the second call would find the first one's choice and run
`toy/narrow` on a problem that it refuses.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from attn_core import (
    ANY_DIM,
    AttnBias,
    Backward,
    Capabilities,
    Causal,
    Cost,
    InputError,
    InputTypeError,
    Kernel,
    KernelRefusedError,
    KeyPadding,
    Problem,
    Refusal,
    TensorBias,
    Window,
    as_bias,
    attention,
    prefer,
    reference_attention,
    refresh,
    register,
    scaled_dot_product_attention,
)
from attn_core.scope import LATEST, current, forget_choices

SHAPE = (2, 4, 3, 8)  # batch, seqlen, num_heads, head_dim


@pytest.fixture
def ran() -> Iterator[list[str]]:
    """Names of the toy kernels that ran, in order; both are registered meanwhile."""
    names: list[str] = []

    def narrow(query, key, value, *, bias=None, scale):
        names.append("narrow")
        return reference_attention(query, key, value, bias, scale=scale)[0].to(query.dtype)

    def wide(query, key, value, *, bias=None, scale, softcap=None, dropout_p=0.0, return_lse=False):
        names.append("wide")
        out, lse = reference_attention(query, key, value, bias, scale=scale, softcap=softcap, dropout_p=dropout_p)
        return (out.to(query.dtype), lse.float()) if return_lse else out.to(query.dtype)

    def refuse(problem: Problem) -> Iterator[Refusal]:
        base = {"batch": 2, "seqlen_q": 4, "seqlen_kv": 4, "num_heads": 3, "scale": 8**-0.5}
        for field, want in base.items():
            if getattr(problem, field) != want:
                yield Refusal(field, f"takes {want}, got {getattr(problem, field)}")

    kernels = (
        Kernel(
            name="toy/narrow",
            run=narrow,
            capabilities=Capabilities(
                devices={"cpu"}, dtypes={torch.float32}, head_dims={8}, biases={Causal("top-left"), TensorBias}
            ),
            refuse=refuse,
            costs={"*": Cost(call=1e-9)},
        ),
        Kernel(
            name="toy/wide",
            run=wide,
            capabilities=Capabilities(
                devices={"*"},
                dtypes={torch.float32, torch.float64, torch.bfloat16},
                head_dims=ANY_DIM,
                head_dims_v=ANY_DIM,
                biases={AttnBias, KeyPadding},
                backward=Backward(bias_grad=True, lse_grad=True, deterministic=True),
                gqa=True,
                softcap=True,
                dropout=True,
                return_lse=True,
                deterministic=True,
                forward_ad=True,
                strided_head_dim=True,
                empty_lengths=True,
            ),
            costs={"*": Cost(call=1e-8)},
        ),
    )
    handles = [register(kernel) for kernel in kernels]
    yield names
    for handle in handles:
        handle.unregister()


def operands(shape=SHAPE, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def kept() -> int:
    """How many choices the scope keeps."""
    return sum(map(len, current.get().values()))


def chosen_after(ran: list[str], second, first=lambda: attention(*operands())) -> str:
    """What ran in `second`, after `first` was run twice (chosen, then found) by the narrow kernel."""
    first()
    first()
    assert ran == ["narrow", "narrow"]
    second()
    return ran[-1] if len(ran) == 3 else f"{len(ran)} runs"


def test_the_base_call_is_chosen_once_and_found_again(ran):
    attention(*operands())
    before = kept()
    attention(*operands(seed=1))
    assert ran == ["narrow", "narrow"]
    assert kept() == before


@pytest.mark.parametrize(
    ("element", "shapes"),
    [
        ("batch", [(3, 4, 3, 8)] * 3),
        ("seqlen_q", [(2, 5, 3, 8), SHAPE, SHAPE]),
        ("seqlen_kv", [SHAPE, (2, 6, 3, 8), (2, 6, 3, 8)]),
        ("num_heads", [(2, 4, 6, 8), SHAPE, SHAPE]),
        ("num_kv_heads", [SHAPE, (2, 4, 1, 8), (2, 4, 1, 8)]),
        ("head_dim", [(2, 4, 3, 16)] * 3),
        ("head_dim_v", [SHAPE, SHAPE, (2, 4, 3, 5)]),
    ],
)
def test_each_shape(ran, element, shapes):
    query, key, value = (torch.randn(shape) for shape in shapes)
    assert chosen_after(ran, lambda: attention(query, key, value)) == "wide"


def test_the_shape_of_value_alone_when_it_does_not_fit(ran):
    query, key, value = operands()
    attention(query, key, value)
    with pytest.raises(InputError, match="value: seqlen must be key's 4, got 3"):
        attention(query, key, value[:, :3])


def test_dtype(ran):
    assert chosen_after(ran, lambda: attention(*operands(dtype=torch.float64))) == "wide"


@pytest.mark.parametrize("name", ["key", "value"])
def test_a_dtype_that_differs_between_operands(ran, name):
    mixed = dict(zip(("query", "key", "value"), operands()))
    attention(**mixed)
    mixed[name] = mixed[name].double()
    with pytest.raises(InputTypeError, match=f"{name}: must have query's dtype"):
        attention(**mixed)


def test_device(ran):
    assert chosen_after(ran, lambda: attention(*(x.to("meta") for x in operands()))) == "wide"


@pytest.mark.parametrize("name", ["key", "value"])
def test_a_device_that_differs_between_operands(ran, name):
    mixed = dict(zip(("query", "key", "value"), operands()))
    attention(**mixed)
    mixed[name] = mixed[name].to("meta")
    with pytest.raises(InputError, match=f"{name}: must be on query's device cpu, got meta"):
        attention(**mixed)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_the_class_of_each_operand(ran, name):
    class Tagged(torch.Tensor):
        pass

    tagged = dict(zip(("query", "key", "value"), operands()))
    attention(**tagged)
    tagged[name] = tagged[name].as_subclass(Tagged)
    with pytest.raises(InputTypeError, match=f"{name}: attention takes plain tensors, got a Tagged"):
        attention(**tagged)


@pytest.mark.parametrize("index", [0, 1, 2], ids=["query", "key", "value"])
def test_requires_grad_of_each_operand(ran, index):
    inputs = operands()
    inputs[index].requires_grad_()
    assert chosen_after(ran, lambda: attention(*inputs)) == "wide"


def test_grad_mode(ran):
    inputs = [x.requires_grad_() for x in operands()]

    def without_grad():
        with torch.no_grad():
            attention(*inputs)

    assert chosen_after(ran, lambda: attention(*inputs), first=without_grad) == "wide"


@pytest.mark.parametrize("index", [0, 1, 2], ids=["query", "key", "value"])
def test_the_strides_of_each_operand(ran, index):
    inputs = operands()
    inputs[index] = inputs[index].mT.contiguous().mT  # the same shape, the last dimension strided
    assert inputs[index].stride(-1) != 1
    expected = reference_attention(*inputs)[0].float()
    attention(*operands())
    out = attention(*inputs)
    assert ran == ["narrow", "wide"]
    torch.testing.assert_close(out, expected)


def test_deterministic_algorithms(ran):
    def deterministic():
        torch.use_deterministic_algorithms(True)
        try:
            attention(*operands())
        finally:
            torch.use_deterministic_algorithms(False)

    assert chosen_after(ran, deterministic) == "wide"


def test_autocast_and_its_dtype(ran):
    def under_autocast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert attention(*operands()).dtype is torch.bfloat16

    assert chosen_after(ran, under_autocast) == "wide"
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(KernelRefusedError, match="dtype: takes .*, got float16"),
    ):
        attention(*operands(), kernel="toy/wide")  # not the bfloat16 choice: this kernel refuses float16


def test_the_level_of_forward_mode_ad(ran):
    query, key, value = operands()

    def jvp():
        torch.func.jvp(lambda x: attention(x, key, value), (query,), (query,))

    assert chosen_after(ran, jvp) == "wide"


@pytest.mark.parametrize(
    "bias",
    [Causal("top-left"), TensorBias(torch.zeros(4, 4))],
    ids=["Causal", "TensorBias"],
)
def test_that_there_is_a_bias(ran, bias):
    plain = attention(*operands())
    before = kept()
    attention(*operands(), bias)
    assert ran == ["narrow", "narrow"]
    assert kept() == before + 1
    assert not torch.equal(plain, attention(*operands(), TensorBias(torch.rand(4, 4) > 0.5)))


def test_the_kind_of_the_bias(ran):
    causal = lambda: attention(*operands(), Causal("top-left"))  # noqa: E731
    assert chosen_after(ran, lambda: attention(*operands(), KeyPadding([1, 4])), first=causal) == "wide"


def test_the_corner_of_a_causal_bias(ran):
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 6, 3, 8), torch.randn(2, 6, 3, 8)
    top_left = attention(query, key, value, Causal("top-left"))
    bottom_right = attention(query, key, value, Causal("bottom-right"))
    expected = reference_attention(query, key, value, Causal("bottom-right"))[0].float()
    torch.testing.assert_close(bottom_right, expected)
    assert not torch.allclose(top_left, bottom_right)


def test_the_limits_of_a_window(ran):
    results = [attention(*operands(), Window(left, 0)) for left in (1, 2)]
    for left, result in zip((1, 2), results):
        torch.testing.assert_close(result, reference_attention(*operands(), Window(left, 0))[0].float())
    assert not torch.equal(*results)


def test_lengths_that_a_bias_is_bound_to(ran):
    attention(*operands(), Causal("top-left"))
    with pytest.raises(InputError, match="was made for seqlen_q=9"):
        attention(*operands(), Causal("top-left").bind(9, 9))


def test_the_gradient_of_a_bias_that_is_held(ran):
    table = torch.zeros(4, 4)
    bias = TensorBias(table)

    def trained():
        table.requires_grad_()
        attention(*operands(), bias)

    assert chosen_after(ran, trained, first=lambda: attention(*operands(), bias)) == "wide"


@pytest.mark.parametrize(
    ("what", "tensor", "accepted"),
    [
        ("shape", torch.zeros(5, 4), False),
        ("dtype", torch.zeros(4, 4, dtype=torch.float64), True),
        ("device", torch.zeros(4, 4, device="meta"), False),
        ("strides", torch.arange(16.0).reshape(4, 4).mT, True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_bias_of_another(ran, what, tensor, accepted):
    attention(*operands(), TensorBias(torch.zeros(4, 4)))
    before = kept()
    if accepted:
        out = attention(*operands(), TensorBias(tensor))
        torch.testing.assert_close(out, reference_attention(*operands(), tensor)[0].float())
        assert kept() == before + 1
    else:
        with pytest.raises(InputError, match="bias: "):
            attention(*operands(), TensorBias(tensor))


def test_scale(ran):
    assert chosen_after(ran, lambda: attention(*operands(), scale=0.0)) == "wide"


def test_a_scale_that_is_not_a_number_is_never_kept(ran):
    attention(*operands())
    for _ in range(2):
        with pytest.raises(InputError, match="scale: must be finite, got nan"):
            attention(*operands(), scale=float("nan"))


def test_softcap(ran):
    assert chosen_after(ran, lambda: attention(*operands(), softcap=2.0)) == "wide"


def test_dropout(ran):
    assert chosen_after(ran, lambda: attention(*operands(), dropout_p=0.5)) == "wide"


def test_return_lse(ran):
    assert chosen_after(ran, lambda: attention(*operands(), return_lse=True)) == "wide"


def test_the_kernel_asked_for(ran):
    assert chosen_after(ran, lambda: attention(*operands(), kernel="toy/wide")) == "wide"


def test_the_layout_of_the_caller(ran):
    square = (2, 3, 3, 8)  # heads and sequence alike: only the caller tells them apart
    query, key, value = (torch.randn(square) for _ in range(3))
    heads_last = attention(query, key, value, Causal())
    heads_first = scaled_dot_product_attention(query, key, value, is_causal=True)
    swapped = [x.transpose(1, 2) for x in (query, key, value)]
    torch.testing.assert_close(heads_first, attention(*swapped, Causal()).transpose(1, 2))
    assert not torch.allclose(heads_last, heads_first)


def test_enable_gqa(ran):
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with pytest.raises(InputError, match="enable_gqa=True"):
        scaled_dot_product_attention(query, key, value)


def test_the_scope(ran):
    def preferred():
        with prefer("toy/wide"):
            attention(*operands())

    assert chosen_after(ran, preferred) == "wide"
    attention(*operands())
    assert ran[-1] == "narrow"


def test_tables_stay_within_their_bound(monkeypatch):
    monkeypatch.setattr("attn_core.scope.TABLE_SIZE", 16)
    with prefer("torch/math"):
        for seqlen in range(1, 60):
            attention(*(torch.randn(1, seqlen, 1, 4) for _ in range(3)))
            assert len(current.get()) <= 16


@pytest.mark.parametrize("pattern", ["qkk", "qqq", "qqv", "qkq"])
def test_operands_that_are_one_object_are_recognised_and_told_from_others(ran, pattern):
    def call():
        made = {name: torch.randn(SHAPE) for name in "qkv"}
        return attention(*(made[name] for name in pattern))

    call()
    before = kept()
    for _ in range(3):
        call()
    assert kept() == before
    attention(*operands())
    assert kept() == before + 1


def test_parameters_are_recognised_as_tensors_are(ran):
    query = torch.nn.Parameter(torch.randn(SHAPE))
    _, key, value = operands()
    attention(query, key, value)
    before = kept()
    attention(query, *operands()[:2])
    assert kept() == before


def test_calls_alike_but_in_their_strides_are_kept_apart_up_to_a_bound(ran):
    for extra in range(20):
        packed = torch.randn(2, 4, 3, 8 + extra)[..., :8]
        query, key, value = packed, *operands()[:2]
        torch.testing.assert_close(attention(query, key, value), reference_attention(query, key, value)[0].float())
    assert max(map(len, current.get().values())) <= 8


def test_without_the_guard_object_of_torch_a_comparison_in_python_does_the_same(ran, monkeypatch):
    monkeypatch.setattr("attn_core.recognise._guard", lambda tensors: None)
    attention(*operands())
    before = kept()
    attention(*operands(seed=1))
    assert kept() == before
    attention(*operands(dtype=torch.float64))
    assert ran == ["narrow", "narrow", "wide"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*operands()).dtype is torch.bfloat16
    query, key, value = operands()
    attention(query.requires_grad_(), key, value)
    assert ran[3:] == ["wide", "wide"]


def test_what_is_kept_holds_no_tensor_of_a_call():
    query, key, value = operands()
    biases = [None, TensorBias(torch.zeros(4, 4)), KeyPadding([1, 4]), Causal() & KeyPadding([1, 4]), Window(1, 1)]
    for bias in biases:
        attention(query, key, value, bias)
        attention(query, key, value, bias, return_lse=True)
    held = [query, key, value, biases[1].tensor, biases[2].seqlens, biases[3].parts[1].seqlens]
    alive = [weakref.ref(tensor) for tensor in held]
    del query, key, value, bias, biases, held
    gc.collect()
    assert [tensor() for tensor in alive] == [None] * len(alive)


def test_what_is_handed_to_torch_is_not_kept_and_asked_for_no_strides(ran):
    sparse, dense = torch.randn(1, 2, 4, 8).to_sparse(), torch.randn(1, 2, 4, 8)
    before = kept()
    with pytest.raises(RuntimeError) as stock:
        torch.nn.functional.scaled_dot_product_attention(sparse, dense, dense)
    with pytest.raises(RuntimeError) as ours:
        scaled_dot_product_attention(sparse, dense, dense)
    assert str(ours.value) == str(stock.value)
    assert kept() == before


# The latest choice, which stands before the table


def test_calls_that_differ_in_shape_alone_take_turns_without_a_new_choice(ran):
    lengths = [operands((2, seqlen, 3, 8)) for seqlen in range(4, 14)]
    lengths += [operands((batch, 48 // batch, 3, 8)) for batch in (1, 2, 3, 4, 6, 8, 12)]  # as many elements
    expected = [reference_attention(*each)[0].float() for each in lengths]
    for each in lengths:
        attention(*each)
    before = kept()
    for _ in range(2):
        for each, out in zip(lengths, expected):
            torch.testing.assert_close(attention(*each), out)
    assert kept() == before


def test_biases_that_take_turns_are_never_taken_for_one_another(ran):
    biases = [
        None,
        Causal("top-left"),
        Window(1, 0),
        torch.rand(4, 4) > 0.5,
        TensorBias(torch.rand(4, 4)),
        Window(2, 0),
    ]
    expected = [reference_attention(*operands(), bias)[0].float() for bias in biases]
    for bias in biases:
        attention(*operands(), bias)
    before = kept()
    for _ in range(2):
        for bias, out in zip(biases, expected):
            torch.testing.assert_close(attention(*operands(), bias), out)
    assert kept() == before


@pytest.mark.parametrize("make", [torch.Tensor, TensorBias, torch.nn.Parameter], ids=lambda make: make.__name__)
def test_a_mask_is_that_of_the_call_and_not_of_the_first_like_it(ran, make):
    before = kept()
    for seed in range(3):
        mask = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        out = attention(*operands(), mask if make is torch.Tensor else make(mask))
        torch.testing.assert_close(out.detach(), reference_attention(*operands(), mask)[0].float())
    assert kept() == before + 1


def test_a_tensor_as_mask_is_checked_though_one_like_it_was_taken(ran):
    attention(*operands(), torch.zeros(4, 4))
    for _ in range(2):
        with pytest.raises(InputTypeError, match="takes a boolean tensor"):
            attention(*operands(), torch.zeros(4, 4, dtype=torch.int32))


def test_a_mask_of_another_library_is_converted_at_every_call(ran):
    class Foreign:
        key = "of another library"

        def __init__(self, mask):
            self.mask = mask

    as_bias.register(Foreign, lambda foreign: TensorBias(foreign.mask))
    for seed in range(3):
        mask = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        out = attention(*operands(), Foreign(mask))
        torch.testing.assert_close(out, reference_attention(*operands(), mask)[0].float())


def test_a_kernel_that_comes_is_chosen_though_the_latest_choice_is_at_hand(ran):
    for name in ("first", "second"):
        attention(*operands())
        attention(*operands())
        fastest = Kernel(
            name=f"toy/{name}",
            run=lambda query, key, value, *, scale: torch.full_like(query, 7.0),
            capabilities=Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8}),
            costs={"*": Cost(call=0.0)},
        )
        with register(fastest):
            assert (attention(*operands()) == 7.0).all()
            assert (attention(*operands()) == 7.0).all()
        assert not (attention(*operands()) == 7.0).any()


def test_refresh_forgets_the_latest_choice_too():
    x = operands()
    attention(*x)
    attention(*x)
    with_toy = register(
        Kernel(
            name="toy/sevens",
            run=lambda query, key, value, *, scale: torch.full_like(query, 7.0),
            capabilities=Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8}),
            costs={"*": Cost(call=0.0)},
        )
    )
    assert (attention(*x) == 7.0).all()
    refresh()  # kernels registered in the process are forgotten
    assert not (attention(*x) == 7.0).any()
    with_toy.unregister()


def test_a_choice_looked_up_while_kernels_come_is_not_the_latest_afterwards(ran):
    """The table is read, then emptied by another thread, then the choice is put where the next call finds it."""
    x, y = operands(), operands((4, 2, 3, 8))  # as many elements, so that they ask the same
    attention(*x)
    attention(*y)  # the latest of the two
    scope = current.get()
    [(place, choices)] = [item for item in scope.items() if item[0][1] == x[0].shape and item[0][0] in scope.latest]
    recognise, cast_to, run = choices[0]

    def overtaken(*looked_at):
        forget_choices()
        return recognise(*looked_at)

    scope[place] = ((overtaken, cast_to, run),)
    attention(*x)
    assert scope.latest == {}
    assert not scope


def test_threads_that_ask_for_other_shapes_each_get_their_own(ran):
    failed, barrier = [], threading.Barrier(8)

    def work(seqlen):
        inputs = operands((2, seqlen, 3, 8), seed=seqlen)
        expected = reference_attention(*inputs)[0].float()
        barrier.wait()
        for _ in range(200):
            if not torch.allclose(attention(*inputs), expected, atol=1e-6):
                failed.append(seqlen)

    threads = [threading.Thread(target=work, args=(4 + i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_what_is_asked_latest_is_bounded(ran):
    for i in range(200):
        attention(*operands(), scale=0.5 + i / 1000)
        assert len(current.get().latest) <= LATEST
