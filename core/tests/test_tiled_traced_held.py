"""torch/tiled in graphs, with biases whose tensors say what is masked: these are operands of the op, and read in it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from attn_core import (
    ALiBi,
    BlockMask,
    Cached,
    Causal,
    KeyPadding,
    Mask,
    MaskMod,
    Paged,
    PrefixLM,
    Problem,
    RelPosTable,
    Score,
    ScoreMod,
    attention,
    explain,
    kernel,
)
from attn_core.errors import InputError
from attn_core.testing.differences import differences
from attn_core.testing.problems import build
from attn_core.torch_kernels.tiling.written import kinds, put_together, read, taken_apart, written

NAME = "torch/tiled"
HEADS, BLOCK = 4, 16


@dataclass(frozen=True)
class Table(Mask):
    """A stranger's: looked up in a tensor that the mask holds."""

    table: torch.Tensor
    lengths: tuple[int, int] | None = None

    def keep(self, b, h, q, k):
        return self.table.to(q.device)[q % 7, k % 5]


@dataclass(frozen=True)
class ByKey(Score):
    """A stranger's: a trained number for some of the keys."""

    numbers: torch.Tensor
    sign: float = 1.0
    lengths: tuple[int, int] | None = None

    def added(self, b, h, q, k, dtype):
        return self.sign * self.numbers.to(dtype)[k % self.numbers.shape[0]]


def documents(b, h, q, k, number):
    return number[b, q] == number[b, k]


def band(b, h, q, k, width=3):
    return (q - k).abs() <= width


def random(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def lengths_of(seed, seqlen):
    """One for each of two batch entries, the first of which has no key."""
    return torch.tensor([0 if seed == 1 else 5 * seed, seqlen - seed])


def blocks(seed, seqlen):
    number = -(-seqlen // BLOCK)
    return random(seed, 2, 1, number, number) > 0.4


def numbers(seed, seqlen):
    return torch.arange(2 * seqlen).view(2, seqlen) // (3 + seed)


def slopes(seed, batch=1):
    return random(seed, *((batch, HEADS) if batch > 1 else (HEADS,))).requires_grad_()


#: name -> (what makes a bias of tensors, what makes these of a seed and a length)
KINDS: dict[str, tuple[Callable[..., Any], Callable[[int, int], tuple[torch.Tensor, ...]]]] = {
    "padding": (KeyPadding, lambda s, n: (lengths_of(s, n),)),
    "padding-and-causal": (lambda held: Causal() & KeyPadding(held), lambda s, n: (lengths_of(s, n),)),
    "cached": (lambda held: Cached(held, within=Causal("bottom-right")), lambda s, n: (lengths_of(s, n),)),
    "prefix": (lambda held: PrefixLM(held), lambda s, n: (lengths_of(s, n),)),
    "blocks": (lambda held: BlockMask(held, BLOCK), lambda s, n: (blocks(s, n),)),
    "blocks-within": (
        lambda seen, full: BlockMask(seen, BLOCK, full=full, within=Causal()),
        lambda s, n: (blocks(s, n), blocks(s + 9, n)),
    ),
    "blocks-of-padding": (
        lambda seen, held: BlockMask(seen, BLOCK, within=KeyPadding(held)),
        lambda s, n: (blocks(s, n), lengths_of(s, n)),
    ),
    "function": (lambda held: MaskMod(documents, (held,), batch=2), lambda s, n: (numbers(s, n),)),
    "function-without-tensors": (lambda: MaskMod(band), lambda s, n: ()),
    "stranger": (Table, lambda s, n: (random(s, 7, 5) > 0.5,)),
    "padding-and-slopes": (
        lambda held, by: KeyPadding(held) + ALiBi(HEADS, by),
        lambda s, n: (lengths_of(s, n), slopes(s)),
    ),
    "prefix-and-slopes-of-entries": (
        lambda held, by: PrefixLM(held) + ALiBi(HEADS, by),
        lambda s, n: (lengths_of(s, n), slopes(s, 2)),
    ),
    "two-scores-and-blocks": (
        lambda by, table, seen: ALiBi(HEADS, by) + RelPosTable(table, 70) + BlockMask(seen, BLOCK),
        lambda s, n: (slopes(s), random(s, HEADS, 9).requires_grad_(), blocks(s, n)),
    ),
    "strangers-score": (
        lambda held, by: KeyPadding(held) + ByKey(by, -2.0),
        lambda s, n: (lengths_of(s, n), random(s, 6).requires_grad_()),
    ),
}
#: Those that were made for one length.
FIXED = {"two-scores-and-blocks"}


def operands(seqlen, requires_grad=True):
    generator = torch.Generator().manual_seed(seqlen)
    return [torch.randn(2, seqlen, n, 8, generator=generator).requires_grad_(requires_grad) for n in (HEADS, 2, 2)]


class Graphs:
    """A backend that keeps the names of the ops of each graph."""

    def __init__(self):
        self.ops = []

    def __call__(self, graph, inputs):
        self.ops.append([str(node.target) for node in graph.graph.nodes if "attn_core" in str(node.target)])
        return graph


def problem_of(bias, seqlen):
    return Problem(
        batch=2,
        seqlen_q=seqlen,
        seqlen_kv=seqlen,
        num_heads=HEADS,
        num_kv_heads=2,
        head_dim=8,
        head_dim_v=8,
        dtype=torch.float32,
        device="cpu",
        bias=bias.bind(seqlen, seqlen).without_data(),
        scale=0.4,
        bias_requires_grad=bias.requires_grad,
    )


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


@pytest.mark.parametrize(
    ("name", "built"),
    [
        *((name, "inside") for name in KINDS),
        *((name, "argument") for name in ("blocks-of-padding", "function", "padding-and-slopes", "strangers-score")),
    ],
)
def test_one_graph_serves_other_values_and_lengths_within_the_budget_with_every_gradient(name, built):
    make, hold = KINDS[name]

    def inside(held, query, key, value):
        return attention(query, key, value, make(*held), kernel=NAME, scale=0.4, return_lse=True)

    def given(bias, query, key, value):
        return attention(query, key, value, bias, kernel=NAME, scale=0.4, return_lse=True)

    graphs = Graphs()
    run = compiled(inside if built == "inside" else given, dynamic=True, backend=graphs)

    def call(x):
        return run(held if built == "inside" else x.bias, x.query, x.key, x.value)

    for seed, seqlen in ((1, 70), (2, 70), (3, 70 if name in FIXED else 50)):
        held = hold(seed, seqlen)
        problem = replace(problem_of(make(*held), seqlen), requires_grad=True, return_lse=True)
        (results,) = differences(problem, build(problem, seed=seed, bias=make(*held)), call)
        assert [result.name for result in results[:5]] == ["out", "lse", "dq", "dk", "dv"]
        assert len(results) == 5 + sum(tensor.requires_grad for tensor in held)
        assert all(results), "\n".join(map(str, results))
    assert graphs.ops == [["attn_core.tiled"]]


@pytest.mark.parametrize("name", ["blocks-within", "padding-and-slopes"])
def test_it_is_compiled_with_its_backward(name):
    make, hold = KINDS[name]
    held, inputs = hold(1, 70), operands(70)

    def call(held, *inputs):
        return attention(*inputs, make(*held), kernel=NAME).square()

    got, want = compiled(call, backend="aot_eager")(held, *inputs), call(held, *inputs)
    wanted = [*inputs, *(tensor for tensor in held if tensor.requires_grad)]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), wanted) for out in (got, want)))


def test_other_values_are_no_other_graph_where_nothing_is_forced():
    graphs = Graphs()
    run = compiled(lambda bias, *x: attention(*x, bias), backend=graphs)
    for seed in (1, 2, 3):
        inputs, bias = operands(70), Causal() & KeyPadding(lengths_of(seed, 70))
        torch.testing.assert_close(run(bias, *inputs), attention(*inputs, bias))
    assert len(graphs.ops) == 1


def test_padding_that_is_nan_does_not_leak():
    query, key, value = operands(70, False)
    want = attention(query, key, value, KeyPadding([30, 70]), kernel="torch/reference")
    key[0, 30:] = value[0, 30:] = float("nan")
    run = compiled(lambda seqlens, *x: attention(*x, KeyPadding(seqlens), kernel=NAME), backend="aot_eager")
    torch.testing.assert_close(run(torch.tensor([30, 70]), query, key, value), want)


def test_pages_are_gathered_and_their_lengths_read_in_the_op():
    graphs = Graphs()
    pool = torch.randn(6, 8, 2, 8, generator=torch.Generator().manual_seed(0))
    query = torch.randn(2, 3, HEADS, 8, generator=torch.Generator().manual_seed(1))

    def call(table, seqlens):
        return attention(query, pool, pool, Paged(table, seqlens, 8, within=Causal("bottom-right")), kernel=NAME)

    run = compiled(call, dynamic=True, backend=graphs)
    for table, seqlens in (([[0, 1, 2], [3, 4, 5]], [20, 3]), ([[5, 1, 0], [3, 1, 2]], [4, 24])):
        given = torch.tensor(table), torch.tensor(seqlens)
        torch.testing.assert_close(run(*given), call(*given))
    assert graphs.ops == [["attn_core.tiled"]]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", ["cached", "blocks-within", "padding-and-slopes"])
def test_a_module_is_exported_with_the_tensors_as_inputs(name, strict):
    make, hold = KINDS[name]

    class Layer(torch.nn.Module):
        def forward(self, held, query, key, value):
            return attention(query, key, value, make(*held), kernel=NAME)

    def of(seed, seqlen):
        return tuple(tensor.detach() for tensor in hold(seed, seqlen)), *operands(seqlen, False)

    auto = torch.export.Dim.AUTO
    example = of(1, 70)
    sizes = tuple(dict.fromkeys((-2, -1), auto) if "blocks" in name else {} for _ in example[0])
    sizes = tuple({x.ndim + axis: auto for axis in s} for x, s in zip(example[0], sizes))
    program = torch.export.export(Layer(), example, dynamic_shapes=(sizes, *({1: auto},) * 3), strict=strict)
    ops = [str(node.target) for node in program.graph.nodes if "attn_core" in str(node.target)]
    assert ops == ["attn_core.tiled.default"]
    for seed, seqlen in ((2, 70), (3, 180)):
        inputs = of(seed, seqlen)
        torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))


def test_an_exported_program_is_saved_and_loaded():
    class Layer(torch.nn.Module):
        def forward(self, seqlens, query, key, value):
            return attention(query, key, value, Causal() & KeyPadding(seqlens), kernel=NAME)

    inputs = lengths_of(1, 40), *operands(40, False)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Layer(), inputs), file)
    file.seek(0)
    again = lengths_of(2, 40), *inputs[1:]
    torch.testing.assert_close(torch.export.load(file).module()(*again), Layer()(*again))


@pytest.mark.parametrize("name", KINDS)
def test_the_op_declares_what_it_does(name):
    """Shapes, strides and dtypes of the fake, the registration of its gradient, and that it alters no operand."""
    make, hold = KINDS[name]
    bias = make(*hold(2, 70)).bind(70, 70).without_padding()
    inputs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in operands(70)]
    text, held = taken_apart(bias)
    found = torch.library.opcheck(torch.ops.attn_core.tiled.default, (*inputs, held, text, 0.3))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", KINDS)
def test_a_bias_is_put_together_as_it_was_taken_apart(name):
    make, hold = KINDS[name]
    for bias in (make(*hold(1, 70)).bind(70, 70), make(*hold(1, 70)).bind(70, 70).without_padding()):
        text, held = taken_apart(bias)
        again = put_together(text, held, 2, HEADS, (70, 70))
        assert again == bias
        assert list(map(id, again.held().values())) == list(map(id, bias.held().values()))
        assert again.batch_and_heads == bias.batch_and_heads


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -2.5,
        float("inf"),
        float("-inf"),
        "a'b",
        b"\x00\xff",
        torch.float16,
        (1, (2.0, "x")),
        [1, []],
        Causal,
    ],
    ids=repr,
)
def test_every_plain_value_is_read_as_it_was_written(value):
    facts = (Table, (("field", (None, value)),), False, True)
    assert read(written(facts)) == facts


def test_a_strangers_local_class_is_known_for_as_long_as_it_lives():
    @dataclass(frozen=True)
    class Odd(Mask):
        lengths: tuple[int, int] | None = None

        def keep(self, b, h, q, k):
            return (q + k) % 2 == 0

    inputs = operands(40)
    got = compiled(lambda *x: attention(*x, Odd(), kernel=NAME), backend="eager")(*inputs)
    torch.testing.assert_close(got, attention(*inputs, Odd(), kernel=NAME))
    assert kinds.name_of(Odd) == kinds.name_of(Odd)
    assert kinds.found(kinds.name_of(Odd)) is Odd
    with pytest.raises(InputError, match="nowhere:Odd, which is not known here: import nowhere"):
        kinds.found("nowhere:Odd")


def test_a_strangers_mask_that_holds_what_is_no_value_is_refused_by_what_it_holds():
    @dataclass(frozen=True)
    class Listed(Mask):
        places: frozenset[int] = frozenset({1, 2})
        lengths: tuple[int, int] | None = None

        def keep(self, b, h, q, k):
            return torch.isin(k, torch.tensor(sorted(self.places)))

    assert explain(*operands(8, False), Listed())[NAME].seconds is not None
    asked = replace(problem_of(Listed(), 8), compiling=True)
    (refusal,) = kernel(NAME).refuse(asked)
    assert refusal.field == "compiling"
    assert "this Listed holds a frozenset, which is neither a plain value nor a tensor" in refusal.message


def test_a_mask_of_a_stranger_has_no_gradient_whatever_it_holds():
    table = random(0, 7, 5).requires_grad_()

    @dataclass(frozen=True)
    class Above(Mask):
        table: torch.Tensor
        lengths: tuple[int, int] | None = None

        def keep(self, b, h, q, k):
            return self.table[q % 7, k % 5] > 0.3

    inputs, by = operands(40), slopes(0)

    def call(by, *x):
        return attention(*x, Above(table) + ALiBi(HEADS, by), kernel=NAME).square().sum()

    got, want = (
        torch.autograd.grad(f(by, *inputs), [by, *inputs]) for f in (compiled(call, backend="aot_eager"), call)
    )
    torch.testing.assert_close(got, want)


def test_a_function_of_the_logit_is_refused_in_a_graph_as_it_is_outside():
    asked = problem_of(Causal() + ScoreMod(lambda score, b, h, q, k: score * 2), 8)
    for compiling in (False, True):
        refusals = kernel(NAME).capabilities.refusals(replace(asked, compiling=compiling))
        assert [refusal.field for refusal in refusals] == ["bias"]
