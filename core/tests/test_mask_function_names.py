"""torch/tiled in graphs, with masks that are functions: the name of one is text, what it reads beside is operands."""

from __future__ import annotations

import functools

import pytest
import torch
from attn_core import MaskMod, attention, explain, mask_mod, record
from attn_core.bias.function_names import function_of, name_for_graphs
from attn_core.errors import InputError

NAME = "torch/tiled"


def documents(b, h, q, k, number):
    return number[b, q] == number[b, k]


def band(b, h, q, k, width=3):
    return (q - k).abs() <= width


@mask_mod
def even(b, h, q, k):
    return (q + k) % 2 == 0


def numbers(seqlen):
    return torch.arange(2 * seqlen).view(2, seqlen) // 7


def operands(seqlen):
    generator = torch.Generator().manual_seed(seqlen)
    return [torch.randn(2, seqlen, n, 8, generator=generator) for n in (4, 2, 2)]


class Graphs:
    """A backend that counts graphs."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def test_functions_that_do_the_same_have_one_name_and_others_another():
    def made(width):
        return lambda b, h, q, k, width=width: q - k <= width

    names = [name_for_graphs(made(width)) for width in (1, 1, 2, 1.0, True)]
    assert names[0] == names[1]
    assert len({*names}) == 4
    assert MaskMod(made(1)).graph_name == names[0]
    assert MaskMod(made(1)).bind(4, 4).without_data().graph_name == names[0]
    assert even.graph_name == mask_mod(even.function).graph_name


def _closure(width):
    return lambda b, h, q, k: q - k <= width


class _Callable:
    def __call__(self, b, h, q, k):
        return q >= k


@pytest.mark.parametrize(
    "function",
    [
        _closure(3),
        functools.partial(band, width=3),
        _Callable(),
        lambda b, h, q, k, table=torch.ones(3): q >= k,  # noqa: B008
    ],
    ids=["closure", "partial", "object", "tensor-as-default"],
)
def test_a_function_that_captures_has_no_name_and_is_refused_in_a_graph(function):
    assert name_for_graphs(function) is None
    inputs, bias = operands(8), MaskMod(function)
    assert explain(*inputs, bias)[NAME].seconds is not None
    with record() as calls:
        got = compiled(lambda *x: attention(*x, bias), backend="eager")(*inputs)
    torch.testing.assert_close(got, attention(*inputs, bias, kernel=NAME))
    assert NAME not in [row.kernel for row in calls if row.compiled]
    with pytest.raises(Exception, match="this function captures what it reads"):
        compiled(lambda *x: attention(*x, bias, kernel=NAME), backend="eager")(*inputs)


def test_a_function_made_within_the_graph_goes_to_another_kernel():
    def call(shift, *x):
        return attention(*x, MaskMod(lambda b, h, q, k: q + shift >= k))

    inputs, shift = operands(8), torch.tensor(2)
    torch.testing.assert_close(compiled(call, backend="eager")(shift, *inputs), call(shift, *inputs))


def test_a_graph_follows_the_defaults_of_its_function():
    graphs, inputs = Graphs(), operands(40)
    run = compiled(lambda bias, *x: attention(*x, bias, kernel=NAME), backend=graphs)
    for width, made in ((1, 1), (1, 1), (5, 2)):
        bias = MaskMod(lambda b, h, q, k, width=width: (q - k).abs() <= width)
        torch.testing.assert_close(run(bias, *inputs), attention(*inputs, bias, kernel=NAME))
        assert graphs.count == made


def test_a_mask_that_varies_by_what_it_ignores_is_an_error_in_the_graph_too():
    bias = MaskMod(documents, (numbers(40),))
    with pytest.raises(InputError, match="varies by batch entry"):
        compiled(lambda *x: attention(*x, bias, kernel=NAME), backend="eager")(*operands(40))


def test_a_graph_that_was_made_in_another_process_says_which_function_it_lacks():
    with pytest.raises(InputError, match=r"the function tests:mask#12345 is not known here"):
        function_of("tests:mask#12345")
