"""Arguments that count something: what Python takes for an index is an int, and is held as a plain one."""

from __future__ import annotations

from enum import IntEnum
from importlib.util import find_spec

import pytest
import torch
from attn_core import (
    ALiBi,
    AttnBias,
    AttnError,
    BlockMask,
    Cached,
    Causal,
    KeyPadding,
    Neighborhood,
    Paged,
    PrefixLM,
    RelPosTable,
    Segments,
    Window,
    attention,
    mask_mod,
)
from attn_core.bias.torch_names import causal_lower_right


class Index:
    """A number of another library, as Python sees it."""

    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number

    def __repr__(self):
        return f"Index({self.number})"


class Choice(IntEnum):
    one = 1
    two = 2
    three = 3
    four = 4
    six = 6


INTEGERS = {"an object with an index": Index, "IntEnum": Choice}
NO_INTEGERS = {
    "True": True,
    "float": 2.0,
    "str": "2",
    "tensor": torch.tensor(2),
    "index that fails": type("Failing", (), {"__index__": lambda self: (_ for _ in ()).throw(TypeError("none"))})(),
}
if find_spec("numpy") is not None:
    import numpy

    INTEGERS |= {name: getattr(numpy, name) for name in ("int64", "int8", "uint8")}
    NO_INTEGERS |= {
        "numpy.float64": numpy.float64(2),
        "numpy.bool": numpy.bool_(True),
        "numpy array of two": numpy.array([1, 2]),
    }

#: Every place where a bias takes an int, given by `n`.
BIASES = {
    "Window": lambda n: Window(n(2), n(1), "top-left"),
    "Window within": lambda n: Segments([4, 2], within=Window(n(2), n(1))),
    "ALiBi": lambda n: ALiBi(n(2)),
    "KeyPadding": lambda n: KeyPadding([n(4), n(6)]),
    "Segments": lambda n: Segments([n(2), n(4)], [n(1), n(3)], starts_kv=[n(1), n(2)]),
    "Segments from offsets": lambda n: Segments.from_offsets([Index(0), n(2), n(6)]),
    "PrefixLM": lambda n: PrefixLM(n(3)),
    "PrefixLM of each batch entry": lambda n: PrefixLM([n(3), n(4)]),
    "Cached": lambda n: Cached([n(3), n(4)]),
    "Paged": lambda n: Paged([[n(1), n(2)], [n(3), n(4)]], [n(3), n(4)], n(3)),
    "Neighborhood": lambda n: Neighborhood((n(2), n(3)), kernel_size=(n(1), n(3)), stride=n(1), dilation=n(1)),
    "Neighborhood of one axis": lambda n: Neighborhood(n(6), kernel_size=n(3), stride=n(2), dilation=n(2)),
    "RelPosTable": lambda n: RelPosTable(torch.ones(2, 3, 3), (n(2), n(3)), n(1)),
    "RelPosTable from Swin": lambda n: RelPosTable.from_swin(torch.ones(15, 2), (n(2), n(3))),
    "BlockMask": lambda n: BlockMask(torch.eye(3).bool(), n(2)),
    "BlockMask of two sizes": lambda n: BlockMask(torch.ones(3, 2).bool(), (n(2), n(3))),
    "mask_mod": lambda n: mask_mod(at_least, batch=n(2), num_heads=n(2)),
    "causal_lower_right": lambda n: causal_lower_right(n(4), n(6)),
}


def at_least(b, h, q, k):
    return q >= k + b - h


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", BIASES)
def test_an_integer_of_another_library_is_the_plain_int(name, kind):
    bias, plain = BIASES[name](INTEGERS[kind]), BIASES[name](int)
    assert bias == plain
    assert repr(bias) == repr(plain)
    assert {type(number) for number in numbers(bias)} <= {int}


def numbers(held):
    """All that is a number in a bias, at any depth."""
    if isinstance(held, AttnBias):
        held = tuple(vars(held).values())
    if isinstance(held, tuple):
        return [number for part in held for number in numbers(part)]
    return [] if isinstance(held, bool) or not hasattr(held, "__index__") or isinstance(held, torch.Tensor) else [held]


def test_no_number_wraps_around_as_small_ones_of_numpy_do():
    kernel = INTEGERS.get("int8", Index)
    assert Neighborhood(300, kernel_size=kernel(100), dilation=kernel(3)).bind(300, 300).pairs() == 300 * 100
    with pytest.raises(AttnError, match=r"kernel_size=100 \* dilation=3 = 300 > 299"):
        Neighborhood(299, kernel_size=kernel(100), dilation=kernel(3))


@pytest.mark.parametrize("kind", NO_INTEGERS)
@pytest.mark.parametrize("name", BIASES)
def test_what_is_no_integer_stays_refused(name, kind):
    with pytest.raises(AttnError, match=r"\bints?\b|integer|must be \[batch\]"):
        BIASES[name](lambda number: NO_INTEGERS[kind])


def test_a_number_below_what_is_accepted_is_told_as_a_plain_one():
    with pytest.raises(AttnError, match=r"left .* got -1$"):
        Window(Index(-1), 0)


def test_a_symbolic_window_stays_symbolic_where_a_graph_is_traced():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def masked(x, reach):
        return Window(reach, 0).bind(len(x), len(x)).keep(None, None, x[:, None], x)

    for reach in (3, 4, 5):
        assert torch.equal(masked(torch.arange(8), reach), Window(reach, 0).bind(8, 8).materialize())
    assert len(graphs) == 1


def test_a_bias_of_such_numbers_is_made_in_a_graph():
    x = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0))
    reach = Index(2)
    got = torch.compile(lambda x: attention(x, x, x, Window(reach, 0)), fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(got, attention(x, x, x, Window(2, 0)))
    assert Causal() != Window(reach, 0)
