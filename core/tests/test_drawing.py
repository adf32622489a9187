"""Every kind of bias draws itself: masks in two marks, what is added in shades that the last line explains."""

import html

import pytest
import torch
from attn_core import (
    ALiBi,
    AttnBias,
    Causal,
    InputError,
    KeyPadding,
    Neighborhood,
    PrefixLM,
    RelPosTable,
    Segments,
    TensorBias,
    UnboundBiasError,
    Window,
    mask_mod,
    score_mod,
)
from attn_core.bias.drawing import cells

INF = float("inf")
SEED = 20261121


def table(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


#: Each kind, and sums, on 6 x 6.
BIASES = [
    Causal(),
    Window(2, 1),
    KeyPadding([6, 2]),
    Segments([2, 4], within=Causal()),
    Neighborhood((2, 3), kernel_size=(1, 2)),
    PrefixLM([0, 4]),
    mask_mod(lambda b, h, q, k: (q - k) % (2 + b) == h, batch=2, num_heads=3),
    Causal() & KeyPadding([6, 2]),
    ALiBi(3),
    ALiBi(2, table(2, 2).exp()),
    RelPosTable(table(3, 3, 5), (2, 3)),
    TensorBias(table(2, 1, 6, 6)),
    TensorBias(table(6) > 0),
    Causal() + ALiBi(3),
    ALiBi(3) + RelPosTable(table(3, 3, 5), (2, 3)) + KeyPadding([6, 2]),
]


@pytest.mark.parametrize("bias", BIASES, ids=repr)
def test_cells_are_the_dense_form_of_each_batch_entry_and_head(bias):
    bound = bias.bind(6, 6)
    batch, heads = bound.batch_and_heads
    dense = bound.dense("cpu", torch.float64)
    if dense.dtype is torch.bool:
        dense = torch.zeros(dense.shape, dtype=torch.float64).masked_fill(~dense, -INF)
    dense = dense.double().expand(batch, heads, 6, 6)
    for b in range(batch):
        for h in range(heads):
            torch.testing.assert_close(cells(bound, b, h), dense[b, h], rtol=0, atol=1e-12)
            torch.testing.assert_close(cells(bound, b, h, 4, 3), dense[b, h, :4, :3], rtol=0, atol=1e-12)


def test_a_mask_is_drawn_in_two_marks():
    assert Window(2, 1).bind(5, 5).draw() == "██···\n███··\n████·\n·████\n··███"


def test_a_boolean_tensor_is_drawn_as_a_mask():
    assert TensorBias(torch.tensor([[True, False], [True, True]])).bind(2, 2).draw() == "█·\n██"


def test_the_batch_entry_can_be_chosen():
    bound = KeyPadding([1, 3]).bind(2, 3)
    assert bound.draw() == bound.draw(batch_entry=0) == "█··\n█··"
    assert bound.draw(batch_entry=1) == "███\n███"


def test_the_head_can_be_chosen():
    tensor = torch.ones(2, 2, 2, dtype=torch.bool)
    tensor[1, 0, 1] = False
    bound = TensorBias(tensor).bind(2, 2)
    assert (bound.draw(), bound.draw(head=1)) == ("██\n██", "█·\n██")


def test_what_is_added_is_drawn_in_shades_from_the_least_to_the_most():
    added = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.7, 1.5, 2.9, -INF]])
    assert TensorBias(added).bind(2, 4).draw() == (
        "░▒▓█\n░▓█·\n░ 0 to 0.75  ▒ 0.75 to 1.5  ▓ 1.5 to 2.25  █ 2.25 to 3  · masked"
    )


def test_one_number_everywhere_is_one_shade():
    assert TensorBias(torch.tensor([[0.5, -INF]])).bind(1, 2).draw() == "█·\n█ 0.5  · masked"


def test_numbers_that_are_not_finite_are_marked():
    added = torch.tensor([[float("nan"), INF, -INF, 1.0]])
    assert TensorBias(added).bind(1, 4).draw() == "??·█\n█ 1  · masked  ? not finite"


def test_shades_hold_for_the_largest_finite_numbers():
    most = torch.finfo(torch.float64).max
    assert TensorBias(torch.tensor([[-most, most]], dtype=torch.float64)).bind(1, 2).draw().startswith("░█\n")


def test_a_trained_bias_is_drawn_without_a_graph():
    drawn = RelPosTable(table(1, 3).requires_grad_(), 2).bind(2, 2)
    assert not cells(drawn).requires_grad
    assert drawn.draw()


def test_a_function_of_the_logit_is_drawn_by_what_becomes_of_0():
    distance = score_mod(lambda score, b, h, q, k: score - (q - k).abs() * (h + 1))
    bound = (distance + Causal()).bind(3, 3)
    wanted = torch.tensor([[0.0, -INF, -INF], [-1, 0, -INF], [-2, -1, 0]], dtype=torch.float64)
    assert torch.equal(cells(bound), wanted)
    assert bound.draw() == "█··\n▓█·\n░▓█\n" + bound.draw().splitlines()[-1]


def test_a_large_matrix_is_cut_and_says_so():
    drawn = Causal().bind(100, 100).draw().splitlines()
    assert len(drawn) == 17
    assert drawn[0] == "█" + "·" * 63 + " …"
    assert drawn[-1] == "⋮"
    assert Causal().bind(16, 16).draw().splitlines()[-1] == "█" * 16


@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (3, 0)], ids=str)
def test_lengths_of_0_draw_nothing(lengths):
    assert Causal("top-left").bind(*lengths).draw().strip() == ""
    assert ALiBi(2, corner="top-left").bind(*lengths).draw().strip() == ""


@pytest.mark.parametrize("bias", BIASES, ids=repr)
def test_an_unbound_bias_names_bind(bias):
    with pytest.raises(UnboundBiasError, match=r"bind\(seqlen_q, seqlen_kv\)"):
        bias.draw()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"batch_entry": 2}, "has batch entry 0 to 1, got 2"),
        ({"batch_entry": -1}, "has batch entry 0 to 1, got -1"),
        ({"head": -1}, "has head 0 to 0, got -1"),
        ({"head": "0"}, "has head 0 to 0, got '0'"),
    ],
)
def test_a_place_that_the_bias_does_not_have_is_an_error(place, message):
    with pytest.raises(InputError, match=message):
        KeyPadding([1, 3]).bind(2, 3).draw(**place)


def test_where_all_heads_are_the_same_any_may_be_drawn():
    assert Causal().bind(3, 3).draw(batch_entry=7, head=5) == Causal().bind(3, 3).draw()


def test_a_bias_without_data_says_so():
    with pytest.raises(InputError, match="have no data"):
        KeyPadding([1, 3]).bind(2, 3).without_data().draw()


def test_a_bias_of_a_strangers_kind_is_drawn_by_its_dense_form():
    class Mine(AttnBias):
        batch_and_heads = (1, 2)

        def materialize(self, device=None):
            return torch.tensor([[[True, False]], [[False, True]]], device=device)

        def needs_materialization(self):
            return True

        dispatch = staticmethod(lambda *operands: None)

    assert Mine().bind(1, 2).draw(head=1) == "·█"


def test_notebooks_show_the_matrix_once_it_is_known():
    bound = Window(2, 1).bind(5, 5)
    shown = html.unescape(bound._repr_html_())
    assert f"{bound!r}\n{bound.draw()}" in shown
    assert "Causal(&quot;top-left&quot;)</pre>" in Causal("top-left")._repr_html_()
