"""A bias written as text is parsed and never run: what is not understood is refused, and pointed at."""

import builtins
import contextlib
import os
import re
import subprocess

import attn_core
import pytest
import torch
from attn_core import (
    ALiBi,
    AttnBias,
    BlockMask,
    Cached,
    Causal,
    InputError,
    KeyPadding,
    Neighborhood,
    Paged,
    PrefixLM,
    RelPosTable,
    Segments,
    TensorBias,
    Window,
)
from attn_core.cli import expression
from attn_core.cli.expression import ExpressionError, accepted, kinds, parse
from hypothesis import given, settings
from hypothesis import strategies as st

corners = st.sampled_from([None, "top-left", "bottom-right"])
limits = st.none() | st.integers(0, 9)
bands = st.builds(Causal, corners) | st.builds(Window, limits, limits, corners)


@st.composite
def neighborhoods(draw):
    kernel = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dilation = [draw(st.integers(1, 3)) for _ in kernel]
    extents = [size * step + draw(st.integers(0, 4)) for size, step in zip(kernel, dilation)]
    strides = [draw(st.integers(1, size)) for size in kernel]
    causal = [draw(st.booleans()) for _ in kernel]
    return Neighborhood(tuple(extents), kernel_size=kernel, stride=strides, dilation=dilation, is_causal=causal)


@st.composite
def documents(draw):
    queries = draw(st.lists(st.integers(0, 9), max_size=8))
    keys = draw(st.none() | st.lists(st.integers(0, 9), min_size=len(queries), max_size=len(queries)))
    corner = st.sampled_from(["top-left", "bottom-right"])
    within = draw(st.none() | st.builds(Causal, corner) | st.builds(Window, limits, limits, corner))
    sizes = queries if keys is None else keys
    starts = None
    if draw(st.booleans()):
        starts, end = [], 0
        for size in sizes:
            starts.append(end + draw(st.integers(0, 3)))
            end = starts[-1] + size
    return Segments(queries, keys, within=within, starts_kv=starts)


masks = bands | neighborhoods() | documents() | st.builds(PrefixLM, st.integers(0, 9), corners)


@st.composite
def intersections(draw):
    first, *rest = draw(st.lists(masks, min_size=2, max_size=4))
    for mask in rest:
        first = first & mask
    return first


def sums(head, *parts):
    for part in parts:
        head = head + part
    return head


alibis = st.builds(ALiBi, st.integers(1, 9), corner=corners)
held = st.builds(KeyPadding, st.lists(st.integers(0, 9), min_size=1, max_size=4)) | st.builds(
    Cached,
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    within=st.none() | st.just(Window(3, 0, "bottom-right")),
)
data_free = (
    masks
    | intersections()
    | alibis
    | st.builds(sums, alibis, masks)
    | st.builds(lambda heads, mask, corner: ALiBi(heads) + ALiBi(heads, corner=corner) + mask, *(
        st.integers(1, 9), intersections(), corners))
)  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=300)
@given(data_free | held)
def test_repr_is_text_that_gives_the_bias_again(bias):
    assert parse(repr(bias)) == bias


@settings(derandomize=True, deadline=None, max_examples=100)
@given(masks | alibis, st.integers(0, 9), st.integers(0, 9))
def test_repr_of_a_bound_bias_gives_it_again(bias, seqlen_q, seqlen_kv):
    try:
        bound = bias.bind(seqlen_q, seqlen_kv)
    except InputError:
        with pytest.raises(ExpressionError):
            parse(f"{bias!r}.bind({seqlen_q}, {seqlen_kv})")
        return
    assert parse(repr(bound)) == bound
    assert parse(repr(bound)).lengths == (seqlen_q, seqlen_kv)


MEANT = {
    "Window(3,0) & Segments([5,9,4])": Window(3, 0) & Segments([5, 9, 4]),
    " ( Causal( ) ) ": Causal(),
    "Window(left=3, right=None)": Window(3, None),
    "Window(+3, 0x10)": Window(3, 16),
    "Window(1,\n  0) & Causal()": Window(1, 0) & Causal(),
    "Segments.from_offsets([0, 5, 14])": Segments([5, 9]),
    "Segments((2, 3), within=Window(1, 0))": Segments([2, 3], within=Window(1, 0)),
    "ALiBi(4) + Causal() + Window(2, 0)": ALiBi(4) + (Causal() & Window(2, 0)),
    "ALiBi(4) + (Causal() & Window(2, 0))": ALiBi(4) + (Causal() & Window(2, 0)),
    "tensor([[True, False]])": TensorBias(torch.tensor([[True, False]])),
    "tensor([[0, 1.5], [-inf, 2]])": TensorBias(torch.tensor([[0, 1.5], [float("-inf"), 2]])),
    "tensor([[0.5], [1.0]]) + Causal()": TensorBias(torch.tensor([[0.5], [1.0]])) + Causal(),
    "ALiBi(2, slopes=tensor([0.5, 0.25]))": ALiBi(2, torch.tensor([0.5, 0.25])),
    "PrefixLM([2, 3], 'top-left')": PrefixLM([2, 3], "top-left"),
    "Paged([[2, 0], [2, 1]], [3, 4], 2)": Paged([[2, 0], [2, 1]], [3, 4], 2),
    "BlockMask(tensor([[True, False], [True, True]]), 2)": BlockMask(torch.tensor([[1, 0], [1, 1]]).bool(), 2),
    "BlockMask.from_mask(Causal(), 6, 6, 2)": BlockMask.from_mask(Causal(), 6, 6, 2),
    "Causal().bind(3, 3)": Causal().bind(3, 3),
    "(Causal() & Window(2, 0)).bind(3, 3)": (Causal() & Window(2, 0)).bind(3, 3),
}


@pytest.mark.parametrize("text", MEANT)
def test_text_means_what_it_means_in_python(text):
    assert parse(text) == MEANT[text]


def test_random_numbers_are_the_same_every_time_and_others_within_one_expression():
    text = "RelPosTable(random(4, 5, 5), (3, 3)) + RelPosTable(random(4, 5, 5), (3, 3))"
    first, second = parse(text), parse(text)
    assert first == second
    assert not torch.equal(first.parts[0].table, first.parts[1].table)
    generator = torch.Generator().manual_seed(expression.SEED)
    assert torch.equal(first.parts[0].table, torch.randn(4, 5, 5, generator=generator))


def test_a_tensor_may_require_a_gradient():
    assert parse("RelPosTable(random([4, 5], requires_grad=True), 3)").requires_grad
    assert parse("tensor([[0.5]], requires_grad=True)").requires_grad
    assert not parse("random(4, 5)").requires_grad


def test_many_masks_in_a_row_are_no_depth():
    assert parse(" & ".join(["Causal()"] * 300)) == attn_core.Intersection((Causal(),) * 300)


def test_every_public_kind_is_known_or_said_how_to_write():
    public = {
        name
        for name in attn_core.__all__
        if isinstance(getattr(attn_core, name), type) and issubclass(getattr(attn_core, name), AttnBias)
    }
    assert public == {*kinds(), *expression.ELSEWHERE}


# What is refused. Nothing of it may run: what could be called fails the test.

HOSTILE = [
    "__import__('os').system('true')",
    "__import__('os')",
    "os.system('true')",
    "eval('1')",
    "exec('1')",
    "open('/etc/passwd')",
    "print(1)",
    "Causal().__class__.__mro__",
    "Causal.__init__.__globals__['os']",
    "Causal.__subclasses__()",
    "Causal.mro()",
    "Causal().key",
    "Causal().materialize()",
    "Causal().bind(3, 3).materialize()",
    "Causal().to('cuda')",
    "Window(3, 0).from_facts((), 1, 1, (1, 1))",
    "Window.from_facts((1, 2, None), 1, 1, (1, 1))",
    "Segments._set(b'', None, False, None)",
    "(lambda: Causal())()",
    "lambda b, h, q, k: q > k",
    "[Causal() for _ in range(3)][0]",
    "{Causal() for _ in range(3)}",
    "(x for x in ())",
    "{'a': 1}",
    "f'{open(1)}'",
    "f\"{__import__('os')}\"",
    "Causal(f'top-left')",
    "Window(*[3, 0])",
    "Window(**{'left': 3, 'right': 0})",
    "Window(2 ** 100, 0)",
    "Window(1 + 1, 0)",
    "Segments([1] * 10)",
    "Window(-(-True), 0)",
    "Window(~1, 0)",
    "Window(not 1, 0)",
    "Window(3, 0) | Causal()",
    "Window(3, 0) - Causal()",
    "Window(3, 0) and Causal()",
    "Window(3, 0) if True else Causal()",
    "Window(3, 0) < Causal()",
    "(x := Causal())",
    "await Causal()",
    "Causal; Window",
    "import os",
    "Causal()\nCausal()",
    "...",
    "b'x'",
    "1j",
    "",
    "   ",
    "(",
    "Causal(",
    "Causal()) ",
    "\x00",
    "Causal('\x00",
    "9" * 5000,
    "(" * 120 + "Causal()" + ")" * 120 + "[0]",
    "(" * 250 + "Causal()" + ")" * 250,
    "[" * 60 + "]" * 60,
    "-" * 9000 + "1",
    "not " * 2000 + "1",
    "a." * 4000 + "b",
    "Causal" + "()" * 3000,
    "Causal().bind" + "(1, 1).bind" * 500 + "(1, 1)",
    "x" * 20_000,
    "\ud800",
]


NEVER = [(os, "system"), (subprocess, "Popen"), *((builtins, name) for name in ("eval", "exec", "print"))]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: re.sub(r"[^\x20-\x7e]", "?", text[:40]) or "nothing")
def test_what_is_no_bias_is_refused_and_nothing_of_it_runs(text, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("was run")

    with monkeypatch.context() as patched:
        for module, name in NEVER:
            patched.setattr(module, name, never)
        with pytest.raises(ExpressionError) as caught:
            parse(text)
    assert accepted() in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 400


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.text(max_size=60) | st.text("WindowCausl(),[]&+.-=_'\"01 \n", max_size=40))
def test_any_text_is_a_bias_or_an_expression_error(text):
    with contextlib.suppress(ExpressionError):
        assert isinstance(parse(text), AttnBias)


def test_what_python_thinks_of_the_style_is_not_said(recwarn):
    with pytest.raises(ExpressionError, match="corner must be"):
        parse(r"Causal('\d')")
    with pytest.raises(ExpressionError, match="cannot be called"):
        parse("1()")
    assert not recwarn.list


POINTED = {
    "an unknown name": ("Window(3, 0) & Casual()", "Casual", "'Casual' is no kind of bias. Did you mean 'Causal'?"),
    "an argument too few": (
        "Causal() & Window(3)",
        "Window(3)",
        "missing a required argument: 'right'; it is Window(left, right, corner=None)",
    ),
    "an argument by another name": (
        "Neighborhood(7, kernel=3)",
        "Neighborhood(7, kernel=3)",
        "it is Neighborhood(extents, *, kernel_size, stride=1, dilation=1, is_causal=False)",
    ),
    "a bad value": ("Causal() & Window(-1, 0)", "Window(-1, 0)", "must be an int >= 0, or None for no limit; got -1"),
    "a value of no sense": ("Window('a', 0)", "Window('a', 0)", "must be an int >= 0, or None for no limit; got 'a'"),
    "a tensor of ragged rows": ("tensor([[1], [1, 2]])", "tensor([[1], [1, 2]])", "expected sequence of length 1"),
    "a tensor that is too large": ("random(99999, 99999)", "random(99999, 99999)", "makes at most 16777216 numbers"),
    "a flag that is none": ("random(3, requires_grad=1)", "random(3, requires_grad=1)", "is True or False, got 1"),
    "& of a score": ("ALiBi(4) & Causal()", "ALiBi(4)", "& takes masks, and ALiBi is none: write a + b"),
    "& of a sum": (
        "ALiBi(4) + Causal() & Window(2, 0)",
        "ALiBi(4) + Causal()",
        "+ binds before &, so put the masks in parentheses",
    ),
    "& of a number": ("Causal() & 3", "3", "a bias is wanted, got 3"),
    "masks of other lengths": (
        "Causal().bind(3, 3) & Window(1, 0).bind(4, 4)",
        "Window(1, 0).bind(4, 4)",
        "was made for other lengths",
    ),
    "|": ("Causal() | Window(1, 0)", "Causal() | Window(1, 0)", "joined by & and +"),
    "and": ("Causal() and Window(1, 0)", "Causal() and Window(1, 0)", "and/or (& joins masks) is not understood"),
    "a comprehension": ("Segments([n for n in x])", "[n for n in x]", "a comprehension is not understood"),
    "a lambda": ("Causal() & (lambda q: q)", "lambda q: q", "a function is not understood"),
    "a kind that is not called": ("Window(3, 0) & Causal", "Causal", "Causal is to be called: Causal(...)"),
    "an intersection by name": ("Intersection((Causal(),))", "Intersection", "write a & b"),
    "a user's function": ("MaskMod(3)", "MaskMod", "written in Python"),
    "another way that is none": (
        "Segments.from_offset([0])",
        "Segments.from_offset",
        "it has from_offsets. Did you mean 'from_offsets'?",
    ),
    "a method": ("Causal().draw()", "Causal().draw", "a bias has .bind(seqlen_q, seqlen_kv)"),
    "lengths": ("Causal(lengths=(3, 4))", "Causal(lengths=(3, 4))", "lengths are given by .bind"),
    "lengths by place": ("Causal(None, (3, 4))", "Causal(None, (3, 4))", "lengths are given by .bind"),
    "an argument twice": ("Window(3, right=0, right=1)", "1", "right is given twice"),
    "a number too large": ("Window(3, 99999999999)", "99999999999", "a whole number is at most 2147483648"),
    "None": ("None", "None", "a bias is wanted, got None"),
    "behind letters of more than a byte": ("Causal('ä¼') & Widow(1, 0)", "Causal('ä¼')", "corner must be"),
    "on a later line": ("Causal() &\n Widow(1, 0)", "Widow", "Did you mean 'Window'"),
}


@pytest.mark.parametrize("case", POINTED)
def test_the_error_points_at_what_is_wrong(case):
    text, part, message = POINTED[case]
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    said, line, marks, *rest = str(caught.value).splitlines()
    assert message in said
    assert line.removeprefix("  ") == " ".join(text.split())
    assert line[marks.index("^") : marks.rindex("^") + 1] == part
    assert "\n".join(rest) == accepted()


def test_what_is_accepted_is_said():
    for name in kinds():
        assert name in accepted().splitlines()[0]
    assert "MaskMod" not in accepted()


def test_a_long_line_is_shown_around_what_is_wrong():
    text = " & ".join(["Causal()"] * 100 + ["Widow(1, 0)"] + ["Causal()"] * 100)
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    line, marks = str(caught.value).splitlines()[1:3]
    assert len(line) <= 102
    assert line[marks.index("^") : marks.rindex("^") + 1] == "Widow"


def test_tensors_are_float32_whatever_the_default_is():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert parse("random(2, 2)").tensor.dtype is torch.float32
        assert parse("tensor([[0.5]])").tensor.dtype is torch.float32
    finally:
        torch.set_default_dtype(before)


def test_a_table_is_made_for_its_grid():
    bias = parse("RelPosTable(random(4, 5, 5), (3, 3))")
    assert isinstance(bias, RelPosTable)
    assert bias.batch_and_heads == (1, 4)
