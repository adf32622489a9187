"""Keys and values in pages: what a table says is read, and nothing else; on every kernel, in and out of a graph."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from attn_core import (
    ALiBi,
    AttnBias,
    Backward,
    Cached,
    Capabilities,
    Causal,
    InputError,
    InputTypeError,
    Intersection,
    Kernel,
    KernelRefusedError,
    KeyPadding,
    Paged,
    PlanError,
    Sum,
    TensorBias,
    Window,
    attention,
    dispatch,
    explain,
    is_available,
    kernels,
    plan,
    record,
    reference_attention,
    register,
    scaled_dot_product_attention,
)

WITHIN = {
    "all": None,
    "causal": Causal("bottom-right"),
    "causal-top-left": Causal("top-left"),
    "window": Window(2, 1, "bottom-right"),
    "window-left": Window(1, None, "bottom-right"),
    "window-top-left": Window(2, 0, "top-left"),
}
TORCH = [kernel.name for kernel in kernels("torch/*") if is_available(kernel.name)]
NAN = float("nan")


def may_see(within, q, k, seqlen_q, length):
    """The rule, for one query and one key of a sequence of this length, written out."""
    if k >= length:
        return False
    if within is None:
        return True
    diagonal = q + (length - seqlen_q if within.corner == "bottom-right" else 0)
    if isinstance(within, Causal):
        return k <= diagonal
    left, right = within.left, within.right
    return (left is None or k >= diagonal - left) and (right is None or k <= diagonal + right)


def by_loops(query, key, value, table, lengths, within=None, scale=None, added=None):
    """(out, lse) in float64, query by query and key by key; `added(b, h, q, k)` is added to the logit."""
    query, key, value = query.double(), key.double(), value.double()
    batch, seqlen_q, heads, dim = query.shape
    page_size, group = key.shape[1], heads // key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    outs, lses = [], []
    for b, q, h in itertools.product(range(batch), range(seqlen_q), range(heads)):
        seen = [k for k in range(lengths[b]) if may_see(within, q, k, seqlen_q, lengths[b])]
        rows = [(table[b][k // page_size], k % page_size, h // group) for k in seen]
        if not rows:
            outs.append(value.new_zeros(value.shape[3]))
            lses.append(value.new_tensor(-math.inf))
            continue
        logits = torch.stack([scale * (query[b, q, h] * key[row]).sum() for row in rows])
        if added is not None:
            logits = logits + torch.tensor([added(b, h, q, k) for k in seen], dtype=torch.float64)
        outs.append((logits.softmax(0)[:, None] * torch.stack([value[row] for row in rows])).sum(0))
        lses.append(logits.logsumexp(0))
    out = torch.stack(outs).reshape(batch, seqlen_q, heads, value.shape[3])
    return out, torch.stack(lses).reshape(batch, seqlen_q, heads).transpose(1, 2)


def poisoned(pages, table, lengths):
    """The same pages, NaN or inf where no sequence has a key."""
    page_size = pages.shape[1]
    used = torch.zeros(pages.shape[:2], dtype=torch.bool)
    for row, length in zip(table, lengths):
        for k in range(length):
            used[row[k // page_size], k % page_size] = True
    assert not used.all()  # there is something to poison
    poison = torch.where(torch.arange(page_size) % 2 == 0, NAN, math.inf)[None, :, None, None]
    return torch.where(used[:, :, None, None], pages, poison), used


#: Three sequences in pages of 4: the first two share page 6 as their prefix, the third is empty; the rest is garbage.
TABLE = [[6, 2, -1, 10**9], [6, 0, 5, 3], [-7, 99, -1, 4]]
LENGTHS = [7, 13, 0]


def operands(seqlen_q=5, num_pages=8, heads=4, kv_heads=2, dim=8, dim_v=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, seqlen_q, heads, dim), (num_pages, 4, kv_heads, dim), (num_pages, 4, kv_heads, dim_v))
    query, key, value = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return query, poisoned(key, TABLE, LENGTHS)[0], poisoned(value, TABLE, LENGTHS)[0]


def paged(within=None, table=TABLE, lengths=LENGTHS):
    return Paged(torch.tensor(table), torch.tensor(lengths), 4, within=within)


# What it means


@pytest.mark.parametrize("within", WITHIN.values(), ids=WITHIN)
@pytest.mark.parametrize("seqlen_q", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(("max_pages", "page_size"), [(0, 2), (1, 1), (3, 1), (1, 4), (2, 2), (2, 3)], ids=str)
def test_the_dense_form_is_the_rule_written_out_and_all_that_is_derived_from_it_agrees(
    within, seqlen_q, max_pages, page_size
):
    room = max_pages * page_size
    lengths = list(range(room + 1))
    bias = Paged(torch.zeros(room + 1, max_pages, dtype=torch.int32), lengths, page_size, within=within)
    bound = bias.bind(seqlen_q, room)
    pairs = [may_see(within, q, k, seqlen_q, n) for n in lengths for q in range(seqlen_q) for k in range(room)]
    want = torch.tensor(pairs, dtype=torch.bool).reshape(room + 1, 1, seqlen_q, room)
    gathered = bound.gathered()
    assert type(gathered) is Cached
    assert gathered == Cached(lengths, within=within).bind(seqlen_q, room)
    for mask in (bound, bound.normalize(), gathered, gathered.normalize()):
        assert torch.equal(mask.materialize().expand_as(want), want), mask
        valid = torch.arange(room) < torch.tensor(lengths)[:, None]
        assert torch.equal(mask.valid_keys(), valid)
    assert bound.pairs() >= max(want.sum((1, 2, 3)).tolist())
    for q0, q1 in itertools.combinations(range(seqlen_q + 1), 2):
        low, high = bound.span(q0, q1)
        assert not want[..., q0:q1, :low].any()
        assert not want[..., q0:q1, high:].any()
        for k0, k1 in itertools.combinations(range(room + 1), 2):
            block, kind = want[..., q0:q1, k0:k1], bound.tile(q0, q1, k0, k1)
            assert kind != "empty" or not block.any()
            assert kind != "full" or block.all()


def test_it_is_drawn_as_its_documentation_says():
    assert Paged([[2, 0], [2, 1]], [3, 4], 2).bind(1, 4).draw() == "███·"
    cached = Cached([3, 5], within=Causal("bottom-right")).bind(2, 6)
    assert cached.draw() == "██····\n███···"
    assert cached.materialize()[1, 0].tolist() == [[True] * 4 + [False] * 2, [True] * 5 + [False]]


@pytest.mark.parametrize(
    ("seqlen_q", "within", "left"),
    [
        (1, Causal("bottom-right"), None),
        (1, Window(None, 0, "bottom-right"), None),
        (1, Window(3, 0, "bottom-right"), Window(3, None, "bottom-right")),
        (1, Window(7, 3, "bottom-right"), None),
        (3, Window(7, 0, "bottom-right"), Causal("bottom-right")),
        (3, Window(7, 2, "bottom-right"), None),
        (3, Window(2, 7, "top-left"), None),
        (3, Window(2, 6, "top-left"), Window(None, 6, "top-left")),
        (3, Causal("bottom-right"), Causal("bottom-right")),
    ],
    ids=str,
)
def test_a_limit_that_leaves_nothing_out_is_dropped(seqlen_q, within, left):
    assert paged(within, [[0, 1]], [5]).bind(seqlen_q, 8).normalize().within == left
    simpler = Cached([5], within=within).bind(seqlen_q, 8).normalize()
    assert simpler == (KeyPadding([5]) if left is None else Cached([5], within=left)).bind(seqlen_q, 8)


def test_a_decoding_step_is_plain_padding_for_a_kernel_that_gathers():
    query, key, value = operands(seqlen_q=1)
    bias = paged(Causal("bottom-right"))
    got = explain(query, key, value, bias, kernel="torch/reference")
    assert got["torch/reference"].adaptations == ("gather_pages",)
    padding = bias.bind(1, 16).normalize().gathered().normalize()
    assert padding == KeyPadding(LENGTHS).bind(1, 16)


# What it gives


@pytest.mark.parametrize("within", WITHIN.values(), ids=WITHIN)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_every_kernel_reads_what_the_table_says_and_nothing_else(name, heads, within):
    query, key, value = operands(heads=heads[0], kv_heads=heads[1])
    bias = paged(within)
    if explain(query, key, value, bias, kernel=name).chosen is None:
        pytest.skip(f"{name} does not take it here: {explain(query, key, value, bias, kernel=name)}")
    want, want_lse = by_loops(query, key, value, TABLE, LENGTHS, within)
    torch.testing.assert_close(attention(query, key, value, bias, kernel=name), want.float())
    with_lse = explain(query, key, value, bias, return_lse=True, kernel=name)
    assert "gather_pages" in explain(query, key, value, bias, kernel=name)[name].adaptations
    if with_lse.chosen is None:
        assert with_lse[name].refused_fields == ("return_lse",)
        return
    out, lse = attention(query, key, value, bias, return_lse=True, kernel=name)
    torch.testing.assert_close(out, want.float())
    torch.testing.assert_close(lse, want_lse.float())
    assert out[2].abs().max() == 0
    assert (lse[2] == -math.inf).all()


def test_the_kernels_of_the_processor_are_all_among_them():
    query, key, value = operands()
    taken = [name for name in TORCH if explain(query, key, value, paged(), kernel=name).chosen]
    assert {"torch/flash", "torch/math", "torch/flex", "torch/reference"} <= set(taken)


@pytest.mark.parametrize("within", [None, Causal("bottom-right")], ids=["all", "causal"])
@pytest.mark.parametrize("name", [None, *TORCH])
def test_gradients_reach_the_pages_and_a_shared_page_gets_the_sum(name, within):
    given = operands(dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    bias = paged(within)
    if name is not None and explain(*leaves, bias, kernel=name).chosen is None:
        pytest.skip(f"{name} does not take it here: {explain(*leaves, bias, kernel=name)}")
    out = attention(*leaves, bias, kernel=name)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((out * weights).sum(), leaves)
    exact = [tensor.clone().requires_grad_() for tensor in given]
    want = torch.autograd.grad((by_loops(*exact, TABLE, LENGTHS, within)[0] * weights).sum(), exact)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)
    unused = ~poisoned(torch.zeros_like(given[1]), TABLE, LENGTHS)[1]
    assert got[1][unused].abs().max() == 0
    assert got[2][unused].abs().max() == 0
    assert got[1][6].abs().min() > 0  # the shared one


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"scale": 0.0}, {"softcap": 2.0}], ids=str)
def test_options_count_as_they_do_without_pages(options):
    query, key, value = operands()
    rows, values = Paged(TABLE, LENGTHS, 4).gather(key, value)
    want = reference_attention(query, rows, values, KeyPadding(LENGTHS), **options)[0].float()
    torch.testing.assert_close(attention(query, key, value, paged(), **options), want)


@pytest.mark.parametrize("of_table", [torch.int32, torch.int64, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("of_lengths", [torch.int32, torch.uint8], ids=str)
def test_tables_and_lengths_may_be_integers_of_any_width(of_table, of_lengths):
    query, key, value = operands()
    table = torch.tensor([[6, 2, 9, 11], [6, 0, 5, 3], [7, 99, 1, 4]], dtype=of_table)
    bias = Paged(table, torch.tensor(LENGTHS, dtype=of_lengths), 4, within=Causal("bottom-right"))
    want = by_loops(query, key, value, TABLE, LENGTHS, Causal("bottom-right"))[0].float()
    torch.testing.assert_close(attention(query, key, value, bias), want)


def test_a_table_may_be_a_strided_view_and_head_dims_may_be_odd_or_strided():
    query, key, value = operands(dim=5, dim_v=7)
    wide = torch.tensor(TABLE).repeat_interleave(2, 1)
    key, value = (torch.stack([x, torch.full_like(x, NAN)], -1)[..., 0] for x in (key, value))
    assert key.stride(3) == 2
    bias = Paged(wide[:, ::2], LENGTHS, 4)
    want = by_loops(query, key, value, TABLE, LENGTHS)[0].float()
    for name in (None, "torch/flash", "torch/math"):
        if name == "torch/flash":  # one head_dim
            out = attention(query, key, torch.cat([value] * 2, 3)[..., :5], bias, kernel=name)
            torch.testing.assert_close(out, want[..., :5])
        else:
            torch.testing.assert_close(attention(query, key, value, bias, kernel=name), want)


@pytest.mark.parametrize("seqlen_q", [0, 1, 3])
@pytest.mark.parametrize(("batch", "max_pages", "num_pages"), [(2, 3, 0), (2, 0, 5), (0, 3, 5), (2, 0, 0)], ids=str)
def test_no_pages_no_room_and_no_sequences_are_legal(batch, max_pages, num_pages, seqlen_q):
    query = torch.randn(batch, seqlen_q, 4, 8, requires_grad=True)
    key, value = (torch.randn(num_pages, 4, 2, 8, requires_grad=True) for _ in range(2))
    table = torch.full((batch, max_pages), -1)
    bias = Paged(table, torch.zeros(batch, dtype=torch.int64), 4, within=Causal("bottom-right"))
    out, lse = attention(query, key, value, bias, return_lse=True)
    assert out.shape == (batch, seqlen_q, 4, 8)
    assert lse.shape == (batch, 4, seqlen_q)
    assert not out.any()
    assert (lse == -math.inf).all()
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert not any(grad.any() for grad in grads)


def test_half_precision_and_autocast_keep_their_meaning():
    query, key, value = operands()
    want = by_loops(query, key, value, TABLE, LENGTHS)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(query, key, value, paged())
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), want, atol=0.03, rtol=0.03)
    half = [tensor.half() for tensor in (query, key, value)]
    torch.testing.assert_close(attention(*half, paged()).double(), want, atol=4e-3, rtol=4e-3)


def test_the_reference_takes_pages_itself():
    query, key, value = operands(dtype=torch.float64)
    out, lse = reference_attention(query, key, value, paged(Causal("bottom-right")))
    want, want_lse = by_loops(query, key, value, TABLE, LENGTHS, Causal("bottom-right"))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


# Together with others


@pytest.mark.parametrize("name", [None, *TORCH])
def test_scores_are_added_on_top(name):
    query, key, value = operands()
    bias = paged(Causal("bottom-right")) + ALiBi(4, corner="top-left")
    assert isinstance(bias, Sum)
    if name is not None and explain(query, key, value, bias, kernel=name).chosen is None:
        pytest.skip(f"{name} does not take it here: {explain(query, key, value, bias, kernel=name)}")
    slopes = [2 ** (-8 * (h + 1) / 4) for h in range(4)]

    def added(b, h, q, k):
        return -slopes[h] * abs(k - q)

    want = by_loops(query, key, value, TABLE, LENGTHS, Causal("bottom-right"), added=added)[0].float()
    torch.testing.assert_close(attention(query, key, value, bias, kernel=name), want)


@pytest.mark.parametrize("name", [None, *TORCH])
def test_masks_and_tensors_count_keys_in_the_order_of_the_table(name):
    query, key, value = operands()
    added = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    for bias, number in (
        (paged() & Window(3, 2, "top-left"), lambda b, h, q, k: 0.0 if q - 3 <= k <= q + 2 else -math.inf),
        (paged() + TensorBias(added), lambda b, h, q, k: float(added[q, k])),
    ):
        if name is not None and explain(query, key, value, bias, kernel=name).chosen is None:
            pytest.skip(f"{name} does not take it here: {explain(query, key, value, bias, kernel=name)}")
        want = by_loops(query, key, value, TABLE, LENGTHS, added=number)[0].float()
        torch.testing.assert_close(attention(query, key, value, bias, kernel=name), want)


def test_keys_lie_in_the_pages_of_one_bias_alone():
    with pytest.raises(InputError, match="Intersection: keys lie in the pages of one Paged, got"):
        paged() & paged()


# A cache without pages


@pytest.mark.parametrize("within", WITHIN.values(), ids=WITHIN)
@pytest.mark.parametrize("name", TORCH)
def test_a_cache_in_one_piece_is_the_same_without_a_table(name, within):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 5, 4, 8, generator=generator)
    key, value = (poisoned(torch.randn(3, 9, 2, 8, generator=generator), [[0], [1], [2]], [7, 4, 0])[0] for _ in "kv")
    bias = Cached([7, 4, 0], within=within)
    if explain(query, key, value, bias, kernel=name).chosen is None:
        pytest.skip(f"{name} does not take it here: {explain(query, key, value, bias, kernel=name)}")
    want = by_loops(query, key, value, [[0], [1], [2]], [7, 4, 0], within)[0].float()
    out = attention(query, key, value, bias, kernel=name)
    torch.testing.assert_close(out, want)
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    torch.testing.assert_close(scaled_dot_product_attention(*heads_first, bias, enable_gqa=True).transpose(1, 2), want)


# A value


def test_they_are_values():
    for make in (lambda n: paged(Causal("bottom-right"), lengths=n), lambda n: Cached(n, within=Causal("top-left"))):
        bias = make([7, 13, 0])
        assert bias == make([7, 13, 0])
        assert bias != make([7, 12, 0])
        assert hash(bias) == hash(make([7, 13, 0]))
        assert bias.bind(5, 16) != bias
        for other in (pickle.loads(pickle.dumps(bias)), copy.deepcopy(bias), bias.to("cpu")):
            assert other == bias
            assert other is not bias
        with pytest.raises(AttributeError):
            bias.seqlens_kv = torch.zeros(3)
        assert all(tensor.is_meta for tensor in bias.without_data().held().values())
        assert bias.without_data().key != bias.key  # another device
    assert paged() != paged(table=[[6, 2, 0, 0], [6, 0, 5, 4], [0, 0, 0, 0]])
    assert repr(paged(Causal("bottom-right"))) == (
        'Paged(<3 x 4 pages of 4>, [7, 13, 0], within=Causal("bottom-right"))'
    )
    assert repr(Cached([7, 0], within=Window(1, 0, "top-left"))) == ('Cached([7, 0], within=Window(1, 0, "top-left"))')


# The choice


def seconds_of_gathering(name, query, max_pages):
    """What pages add to the estimate for the same keys in a row."""
    table, rows = torch.zeros(3, max_pages, dtype=torch.int64), torch.zeros(3, max_pages * 4, 2, 8)
    pages = torch.zeros(8, 4, 2, 8)
    gathered = explain(query, pages, pages, Paged(table, [7, 13, 0], 4), kernel=name)[name].seconds
    return gathered - explain(query, rows, rows, KeyPadding(LENGTHS), kernel=name)[name].seconds


def test_explain_and_record_show_the_gathering_and_the_estimate_counts_it():
    query, key, value = operands()
    for name in ("torch/flash", "torch/math"):
        assert explain(query, key, value, paged(), kernel=name)[name].adaptations[0] == "gather_pages"
        at_16, at_32, at_64 = (seconds_of_gathering(name, query, max_pages) for max_pages in (4, 8, 16))
        assert 0 < at_16 < at_32
        assert at_64 - at_16 == pytest.approx(3 * (at_32 - at_16))  # linear in what is copied
    with record() as calls:
        attention(query, key, value, paged())
    (row,) = calls
    assert row.adaptations[0] == "gather_pages"
    assert row.problem.in_pages
    assert row.problem.seqlen_kv == 16
    meta = [tensor.to("meta") for tensor in (query, key, value)]
    assert explain(*meta, Paged(torch.tensor(TABLE, device="meta"), LENGTHS, 4)).chosen is not None


def decisions(monkeypatch):
    """How often a call was decided anew, from now on."""
    made = []
    decide = dispatch.decide
    monkeypatch.setattr(dispatch, "decide", lambda *args: made.append(args) or decide(*args))
    return made


def test_decoding_steps_of_one_shape_hit_the_table_and_see_what_is_in_it_now(monkeypatch):
    query, key, value = operands(seqlen_q=1)
    made = decisions(monkeypatch)
    bias = paged(Causal("bottom-right"))
    tables = [TABLE, [[0, 5, 2, 1], [3, 6, 6, 1], [4, 4, 4, 4]], [[6, 2, 0, 5], [6, 0, 5, 3], [0, 0, 0, 0]]]
    key, value = torch.nan_to_num(key, 1.0, 1.0), torch.nan_to_num(value, 1.0, 1.0)
    for table, lengths in itertools.product(tables, ([7, 13, 0], [8, 13, 0], [1, 2, 0])):
        want = by_loops(query, key, value, table, lengths)[0].float()
        torch.testing.assert_close(attention(query, key, value, paged(bias.within, table, lengths)), want)
        bias.page_table.copy_(torch.tensor(table))  # in place as well
        bias.seqlens_kv.copy_(torch.tensor(lengths))
        torch.testing.assert_close(attention(query, key, value, bias), want)
    assert len(made) == 1


CHANGES = {
    "max_pages": lambda: paged(table=[[*row, 0] for row in TABLE]),
    "page_table.dtype": lambda: Paged(torch.tensor([[6, 2, 0, 0]] * 3, dtype=torch.int32), torch.tensor(LENGTHS), 4),
    "page_table.stride": lambda: Paged(torch.tensor(TABLE).repeat_interleave(2, 1)[:, ::2], torch.tensor(LENGTHS), 4),
    "seqlens_kv.dtype": lambda: Paged(torch.tensor(TABLE), torch.tensor(LENGTHS, dtype=torch.int32), 4),
    "within": lambda: paged(Causal("bottom-right")),
    "within.limit": lambda: paged(Window(3, 0, "bottom-right")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_kernel_may_depend_on_chooses_anew(change, monkeypatch):
    query, key, value = operands()
    attention(query, key, value, paged())
    made = decisions(monkeypatch)
    attention(query, key, value, paged())
    assert not made
    attention(query, key, value, change())
    assert len(made) == 1
    attention(query, key, value, change())
    assert len(made) == 1


def test_another_pool_of_pages_chooses_anew(monkeypatch):
    query, key, value = operands()
    attention(query, key, value, paged())
    made = decisions(monkeypatch)
    more = [torch.cat([x, x]) for x in (key, value)]
    want = attention(query, key, value, paged())
    assert not made
    torch.testing.assert_close(attention(query, *more, paged()), want)
    assert len(made) == 1


def test_what_a_later_call_holds_is_checked_as_the_first_was():
    query, key, value = operands()
    attention(query, key, value, paged())
    with pytest.raises(InputError, match=r"seqlens_kv must lie in \[0, 16\], got 17 for batch entry 1"):
        attention(query, key, value, paged(lengths=[7, 17, 0]))
    with pytest.raises(InputError, match=r"page_table\[0, 1\] is 8, which must lie in \[0, num_pages=8\)"):
        attention(query, key, value, paged(table=[[6, 8, 0, 0]] * 3))
    with pytest.raises(InputError, match=r"page_table\[1, 2\] is -1, .* as batch entry 1 has 13 keys, in pages of 4"):
        attention(query, key, value, paged(table=[[6, 2, -1, -1]] * 2 + [[-1] * 4], lengths=[8, 13, 0]))


def test_a_plan_is_given_other_tables_of_the_same_shape():
    query, key, value = operands()
    step = plan(query, key, value, paged())
    for table, lengths in ((TABLE, LENGTHS), ([[6, 2, 0, 0], [6, 0, 5, 3], [6, 0, 0, 0]], [5, 9, 4])):
        want = by_loops(query, key, value, table, lengths)[0].float()
        torch.testing.assert_close(step(query, key, value, paged(table=table, lengths=lengths)), want)
    with pytest.raises(PlanError, match="made for bias Paged"):
        step(query, key, value, paged(table=[[*row, 0] for row in TABLE]))


# A kernel that reads pages itself


def native(seen, backward=None):
    """A kernel that takes the pages as they lie, and keeps what it was given."""

    def run(query, key, value, *, bias=None, scale):
        seen.append((key, value, bias))
        table, lengths = bias.page_table.tolist(), bias.seqlens_kv.tolist()
        return by_loops(query, key, value, table, lengths, bias.within, scale)[0].to(query.dtype)

    capabilities = Capabilities(
        devices={"cpu"}, dtypes={torch.float32}, head_dims={8}, biases={Paged}, gqa=True, backward=backward
    )
    return Kernel(name="native/pages", run=run, capabilities=capabilities)


def test_a_kernel_that_names_paged_is_given_the_pages_and_each_calls_own_table():
    query, key, value = operands()
    seen = []
    with register(native(seen)):
        assert explain(query, key, value, paged(), kernel="native/pages")["native/pages"].adaptations == ()
        for lengths in (LENGTHS, [3, 5, 0]):
            bias = paged(Causal("bottom-right"), lengths=lengths)
            want = by_loops(query, key, value, TABLE, lengths, bias.within)[0].float()
            torch.testing.assert_close(attention(query, key, value, bias, kernel="native/pages"), want)
            given_key, given_value, given_bias = seen[-1]
            assert given_key is key
            assert given_value is value
            assert given_bias.page_table is bias.page_table
            assert given_bias.seqlens_kv is bias.seqlens_kv
        with pytest.raises(InputError, match=r"page_table\[0, 0\] is 8"):
            attention(query, key, value, paged(bias.within, table=[[8] * 4] * 3), kernel="native/pages")
    assert len(seen) == 2  # what is no page never reached it


def test_a_kernel_is_not_given_pages_in_its_forward_where_its_backward_takes_none():
    query, key, value = operands()
    query.requires_grad_()
    with register(native([], Backward(biases={Causal}))):
        verdict = explain(query, key, value, paged(), kernel="native/pages")["native/pages"]
        assert verdict.state == "refused"
        assert "backward.biases" in verdict.refused_fields


def test_a_pool_of_pages_is_not_rewritten_as_a_whole():
    query, key, value = operands(dim=6, dim_v=6)
    with register(native([])):
        assert explain(query, key, value, paged(), kernel="native/pages")["native/pages"].refused_fields == (
            "head_dim",
        )


@pytest.mark.parametrize(
    "bias",
    [paged(), paged() & Causal("top-left"), paged() + ALiBi(4, corner="top-left")],
    ids=["alone", "intersection", "sum"],
)
def test_a_kernel_that_does_not_name_paged_never_sees_a_page(bias):
    query, key, value = operands()
    seen = []

    def run(query, key, value, *, bias=None, scale):
        seen.append((key.shape, bias))
        return reference_attention(query, key, value, bias, scale=scale)[0].to(query.dtype)

    everything = Capabilities(
        devices={"cpu"},
        dtypes={torch.float32},
        head_dims={8},
        biases={AttnBias, Intersection, Sum, KeyPadding, Cached},
        gqa=True,
    )
    want = attention(query, key, value, bias, kernel="torch/reference")
    with register(Kernel(name="greedy/all", run=run, capabilities=everything)):
        torch.testing.assert_close(attention(query, key, value, bias, kernel="greedy/all"), want)
    ((shape, given),) = seen
    assert shape == (3, 16, 2, 8)
    assert given.paged is None


# In a graph


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("within", [None, Causal("bottom-right")], ids=["all", "causal"])
def test_it_is_traced_built_inside_or_passed_in(within, dynamic):
    torch._dynamo.reset()
    built = torch.compile(
        lambda q, k, v, t, n: attention(q, k, v, Paged(t, n, k.shape[1], within=within)),
        fullgraph=True,
        dynamic=dynamic,
        backend="eager",
    )
    passed = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="eager")
    for seqlen_q, seed in ((5, 0), (6, 1), (7, 2)):
        inputs = operands(seqlen_q, seed=seed)
        want = by_loops(*inputs, TABLE, LENGTHS, within)[0].float()
        table, lengths = torch.tensor(TABLE), torch.tensor(LENGTHS)
        torch.testing.assert_close(built(*inputs, table, lengths), want)
        torch.testing.assert_close(passed(*inputs, Paged(table, lengths, 4, within=within)), want)


def test_one_graph_takes_any_batch_any_table_and_any_pool():
    torch._dynamo.reset()
    graphs = []

    def counted(graph, example):
        graphs.append(graph)
        return graph.forward

    def step(q, k, v, t, n):
        return attention(q, k, v, Paged(t, n, 4, within=Causal("bottom-right")), kernel="torch/math")

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counted)
    generator = torch.Generator().manual_seed(0)
    for batch, max_pages, num_pages in ((3, 5, 7), (5, 4, 9), (6, 2, 12), (11, 8, 11)):  # no size is another's at first
        query = torch.randn(batch, 9, 4, 8, generator=generator)
        key, value = (torch.randn(num_pages, 4, 2, 8, generator=generator) for _ in range(2))
        table = torch.randint(0, num_pages, (batch, max_pages), generator=generator)
        lengths = torch.randint(0, max_pages * 4 + 1, (batch,), generator=generator)
        want = by_loops(query, key, value, table.tolist(), lengths.tolist(), Causal("bottom-right"))[0].float()
        torch.testing.assert_close(compiled(query, key, value, table, lengths), want)
    assert len(graphs) == 1


def test_gradients_reach_the_pages_through_a_graph():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    leaves = [tensor.requires_grad_() for tensor in operands()]
    want = torch.autograd.grad(attention(*leaves, paged()).square().sum(), leaves)
    got = torch.autograd.grad(compiled(*leaves, paged()).square().sum(), leaves)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


def test_it_is_exported():
    class Step(torch.nn.Module):
        def forward(self, q, k, v, t, n):
            return attention(q, k, v, Paged(t, n, 4, within=Causal("bottom-right")))

    inputs = (*operands(), torch.tensor(TABLE), torch.tensor(LENGTHS))
    exported = torch.export.export(Step(), inputs)
    want = by_loops(*inputs[:3], TABLE, LENGTHS, Causal("bottom-right"))[0].float()
    torch.testing.assert_close(exported.module()(*inputs), want)


# What is an error


def call(bias=None, heads_first=False, **shapes):
    query, key, value = operands()
    query, key, value = (
        torch.zeros(shapes.get(name, x.shape)) for name, x in (("query", query), ("key", key), ("value", value))
    )
    bias = paged() if bias is None else bias
    return (scaled_dot_product_attention if heads_first else attention)(query, key, value, bias)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: call(key=(8, 3, 2, 8), value=(8, 3, 2, 8)), InputError, r"key: page_size must be the bias's 4, got 3"),
        (lambda: call(value=(7, 4, 2, 8)), InputError, "value: num_pages must be key's 8, got 7"),
        (lambda: call(value=(8, 5, 2, 8)), InputError, "value: page_size must be key's 4, got 5"),
        (lambda: call(query=(2, 5, 4, 8)), InputError, "page_table must have query's batch=2, got 3 rows"),
        (lambda: call(paged(table=TABLE[:1], lengths=[7])), InputError, "must have query's batch=3, got 1 rows"),
        (lambda: call(heads_first=True), InputError, "attn_mask: with Paged, .* call attention, which is heads-last"),
        (lambda: call(paged(lengths=[7, 17, 0])), InputError, r"must lie in \[0, 16\], got 17 for batch entry 1"),
        (lambda: call(paged(lengths=[7, 3, -1])), InputError, r"must lie in \[0, 16\], got -1 for batch entry 2"),
        (lambda: call(paged(table=[[8] * 4] * 3)), InputError, r"page_table\[0, 0\] is 8.*num_pages=8"),
        (lambda: paged().bind(5, 12), InputError, r"has room for max_pages \* page_size = 16 keys, got seqlen_kv=12"),
        (lambda: call(paged().bind(5, 16).bind(4, 16)), InputError, "was made for seqlen_q=5"),
        (lambda: Paged([[0]], [1, 2], 4), InputError, "page_table has batch=1, seqlens_kv has batch=2"),
        (lambda: Paged([[0]], [1], 0), InputError, "page_size must be at least 1, got 0"),
        (lambda: Paged([[0]], [1], 4.0), InputTypeError, "page_size must be an int, got 4.0"),
        (lambda: Paged([[0.5]], [1], 4), InputTypeError, "page_table must be an integer tensor, or ints in sequences"),
        (lambda: Paged(torch.ones(1, 1), [1], 4), InputTypeError, "page_table must be an integer tensor, got torch.f"),
        (lambda: Paged([[0], [1, 2]], [1, 1], 4), InputError, r"page_table must have rows of one length, got \[1, 2\]"),
        (
            lambda: Paged(torch.zeros(3).long(), [1] * 3, 4),
            InputError,
            r"must be \[batch, max_pages\], got shape \[3\]",
        ),
        (lambda: Paged([[0]], torch.zeros(1, 1).long(), 4), InputError, r"seqlens_kv must be \[batch\], got shape"),
        (lambda: paged(Causal()), InputError, r'within=Causal\(\) has no corner.*"bottom-right".*"top-left"'),
        (lambda: paged(Causal("top-left").bind(1, 1)), InputError, "within must not be bound"),
        (lambda: paged(KeyPadding([1])), InputTypeError, "within takes Causal, Window or None, got KeyPadding"),
        (lambda: Cached([3], within=Window(1, 1)), InputError, r"Cached: within=Window\(1, 1\) has no corner"),
        (lambda: Cached(torch.ones(3)), InputTypeError, "seqlens_kv must be an integer tensor, got torch.float32"),
        (lambda: Cached([5]).bind(1, 4), InputError, r"Cached seqlens_kv must lie in \[0, 4\], got 5"),
        (
            lambda: call(Paged(torch.tensor(TABLE, device="meta"), LENGTHS, 4)),
            InputError,
            "bias: must be on query's device cpu, got meta",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_numbers(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_the_drop_in_says_where_pages_are_taken_also_in_a_plan_and_in_explain():
    query, key, value = operands()
    for asked in (plan, explain):
        with pytest.raises(InputError, match="call attention, which is heads-last"):
            asked(query, key, value, paged(), layout="heads-first")


def test_a_kernel_insisted_on_that_takes_no_mask_says_so():
    query, key, value = operands()
    no_mask = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8}, gqa=True)
    with (
        register(Kernel(name="plain/none", run=lambda query, key, value, *, scale: query, capabilities=no_mask)),
        pytest.raises(KernelRefusedError, match="bias: takes no bias, got Paged"),
    ):
        attention(query, key, value, paged(), kernel="plain/none")
