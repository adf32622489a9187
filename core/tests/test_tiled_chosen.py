"""Tiles that a caller chooses: other tiles, the same results, and nothing that is left of them behind the scope."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from attn_core import InputError, Neighborhood, Problem, RelPosTable, Window, attention, explain
from attn_core.testing.differences import by_kernel, differences
from attn_core.testing.problems import build
from attn_core.torch_kernels.tiling import dense
from attn_core.torch_kernels.tiling.chosen import Tiles, choose_tiles, chosen
from attn_core.torch_kernels.tiling.tables import TABLES

NAME = "torch/tiled"
PLANE = Neighborhood((20, 24), kernel_size=(5, 7))
MASKS = {
    "line": Neighborhood(90, kernel_size=9),
    "line-strided-causal": Neighborhood(90, kernel_size=9, stride=4, is_causal=True),
    "line-dilated": Neighborhood(90, kernel_size=9, dilation=3),
    "plane": PLANE,
    "plane-all-at-once": Neighborhood(
        (20, 24), kernel_size=(5, 6), stride=(2, 3), dilation=(2, 1), is_causal=(False, True)
    ),
    "space": Neighborhood((6, 7, 9), kernel_size=3),
}
SMALL = {1: (4,), 2: (1, 3), 3: (1, 1, 2)}
LARGE = {1: (64,), 2: (8, 100), 3: (4, 8, 4)}
CHOICES = {
    "small boxes": lambda rank: Tiles(box=SMALL[rank]),
    "large boxes": lambda rank: Tiles(box=LARGE[rank]),
    "a tile at a time": lambda rank: Tiles(batch_bytes=1),
    "a strip and a head at a time": lambda rank: Tiles(strip_bytes=1),
    "everything at once": lambda rank: Tiles(box=SMALL[rank], batch_bytes=1 << 40, strip_bytes=1 << 40),
}


def problem_of(mask, **changes):
    size = torch.Size(mask.extents).numel()
    bound = mask.bind(size, size).normalize()
    problem = Problem(
        batch=2,
        seqlen_q=size,
        seqlen_kv=size,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        head_dim_v=8,
        dtype=torch.float32,
        device="cpu",
        bias=bound,
        scale=0.4,
        return_lse=True,
        requires_grad=True,
    )
    return replace(problem, **changes), bound


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", MASKS)
def test_any_choice_lies_within_the_budget(name, choice):
    problem, bound = problem_of(MASKS[name])
    tiles = CHOICES[choice](len(bound.extents))
    with choose_tiles(forward=tiles, backward=tiles):
        (results,) = differences(problem, build(problem, seed=1, bias=bound), by_kernel(NAME))
    assert [result.name for result in results] == ["out", "lse", "dq", "dk", "dv"]
    assert all(results), "\n".join(map(str, results))


def test_what_is_added_to_the_logits_is_in_the_chosen_tiles_as_well():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 480, 2, 8, generator=generator)
    table = torch.randn(2, 9, 13, generator=generator, requires_grad=True)

    def results():
        bias = PLANE + RelPosTable(table, PLANE.extents)
        out = attention(x, x, x, bias, kernel=NAME)
        return out, torch.autograd.grad(out.square().sum(), table)[0]

    want = results()
    tiles = Tiles(box=(4, 6))
    with choose_tiles(forward=tiles, backward=tiles):
        torch.testing.assert_close(results(), want)


@pytest.fixture
def seen(monkeypatch):
    """(direction, tiles, queries of a tile) of each dense problem that is run."""
    problems = []
    for direction, place in (("forward", 0), ("backward", 1)):
        original = getattr(dense, direction)

        def noting(*operands, original=original, direction=direction, place=place):
            problems.append((direction, operands[place].shape[0], operands[place].shape[2]))
            return original(*operands)

        monkeypatch.setattr(dense, direction, noting)
    return problems


def operands(seed=3, tokens=480, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, 2, 8, generator=generator).requires_grad_(requires_grad) for _ in range(3)]


def largest(seen, direction):
    return max(rows for which, _, rows in seen if which == direction)


def test_the_boxes_are_those_that_were_chosen(seen):
    with choose_tiles(forward=Tiles(box=(5, 6))):
        attention(*operands(), PLANE, kernel=NAME)
    assert {rows for _, _, rows in seen} == {30}


def test_with_a_stride_boxes_begin_where_windows_do(seen):
    mask = Neighborhood((20, 24), kernel_size=(4, 6), stride=(4, 6))
    with choose_tiles(forward=Tiles(box=(5, 7))):
        attention(*operands(), mask, kernel=NAME)
    assert {rows for _, _, rows in seen} == {4 * 6}


def test_a_backward_has_the_tiles_that_were_chosen_for_its_forward(seen):
    x = operands(requires_grad=True)
    with choose_tiles(forward=Tiles(box=(2, 3)), backward=Tiles(box=(5, 12))):
        out = attention(*x, PLANE, kernel=NAME)
    with choose_tiles(backward=Tiles(box=(4, 4))):
        out.sum().backward()
    assert largest(seen, "forward") == 6
    assert largest(seen, "backward") == 60


def test_a_batch_has_as_many_tiles_as_fit(seen):
    x = operands()
    attention(*x, PLANE, kernel=NAME)
    own = [tiles for _, tiles, _ in seen]
    seen.clear()
    with choose_tiles(forward=Tiles(batch_bytes=1)):
        attention(*x, PLANE, kernel=NAME)
    assert max(own) > 1
    assert {tiles for _, tiles, _ in seen} == {1}
    assert len(seen) >= sum(own)


def test_fewer_bytes_of_strips_are_more_copies(seen):
    x = operands()
    attention(*x, PLANE, kernel=NAME)
    at_once = len(seen)
    seen.clear()
    with choose_tiles(forward=Tiles(strip_bytes=1)):
        attention(*x, PLANE, kernel=NAME)
    assert len(seen) >= 2 * at_once


def test_nothing_of_a_choice_is_left_behind_its_scope(seen):
    x = operands()
    outs, problems = [], []
    for box in (None, (5, 6), (4, 4), (5, 6), None):
        seen.clear()
        with choose_tiles(forward=Tiles(box=box)):
            outs.append(attention(*x, PLANE, kernel=NAME))
        problems.append(list(seen))
    seen.clear()
    attention(*x, PLANE, kernel=NAME)
    assert chosen() is None
    assert problems[0] == problems[4] == seen
    assert problems[1] == problems[3] != problems[2] != problems[0]
    assert torch.equal(outs[0], outs[4])
    assert torch.equal(outs[1], outs[3])


def test_the_tables_of_each_choice_are_kept():
    TABLES.clear()
    x = operands()
    attention(*x, PLANE, kernel=NAME)
    one = TABLES.nbytes
    for _ in range(3):
        with choose_tiles(forward=Tiles(box=(5, 6))):
            attention(*x, PLANE, kernel=NAME)
    two = TABLES.nbytes
    for tiles in (Tiles(box=(5, 6)), Tiles(), None):
        with choose_tiles(forward=tiles):
            attention(*x, PLANE, kernel=NAME)
    assert 0 < one < two == TABLES.nbytes


def test_the_innermost_scope_counts_and_the_outer_one_comes_back(seen):
    x = operands()
    with choose_tiles(forward=Tiles(box=(5, 6))):
        with choose_tiles(forward=Tiles(box=(4, 4))):
            attention(*x, PLANE, kernel=NAME)
        assert largest(seen, "forward") == 16
        seen.clear()
        attention(*x, PLANE, kernel=NAME)
        assert largest(seen, "forward") == 30


def test_another_thread_chooses_for_itself(seen):
    with choose_tiles(forward=Tiles(box=(5, 6))):
        thread = threading.Thread(target=lambda: attention(*operands(), PLANE, kernel=NAME))
        thread.start()
        thread.join()
    assert 30 not in {rows for _, _, rows in seen}


@pytest.mark.parametrize(
    ("mask", "tokens"), [(Window(9, 9), 480), (Neighborhood(480, kernel_size=9), 480)], ids=["window", "line"]
)
def test_what_is_no_neighborhood_of_that_many_axes_is_cut_as_ever(seen, mask, tokens):
    x = operands(tokens=tokens)
    attention(*x, mask, kernel=NAME)
    own = list(seen)
    seen.clear()
    with choose_tiles(forward=Tiles(box=(5, 6))):
        attention(*x, mask, kernel=NAME)
    assert own == seen


def test_an_axis_of_one_point_has_no_place_in_a_box(seen):
    with choose_tiles(forward=Tiles(box=(5, 6))):
        attention(*operands(), Neighborhood((20, 1, 24), kernel_size=(5, 1, 7)), kernel=NAME)
    assert {rows for _, _, rows in seen} == {30}


def test_no_choice_of_tiles_changes_the_choice_of_a_kernel():
    x = operands()
    outside = explain(*x, PLANE)
    with choose_tiles(forward=Tiles(box=(1, 1), batch_bytes=1)):
        assert explain(*x, PLANE).to_dict() == outside.to_dict()


def test_samples_of_vmap_have_the_chosen_tiles(seen):
    x = [tensor.expand(3, *tensor.shape).clone() for tensor in operands()]

    def loss(query, key, value):
        return attention(query, key, value, PLANE, kernel=NAME).square().sum()

    with choose_tiles(forward=Tiles(box=(5, 6)), backward=Tiles(box=(5, 4))):
        torch.func.vmap(torch.func.grad(loss))(*x)
    assert (largest(seen, "forward"), largest(seen, "backward")) == (30, 20)


def test_a_graph_keeps_the_tiles_of_the_kernel(seen):
    x = operands()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query, key, value):
        with choose_tiles(forward=Tiles(box=(5, 6))):
            return attention(query, key, value, PLANE, kernel=NAME)

    with choose_tiles(forward=Tiles(box=(5, 6))):
        out = compiled(*x)
    assert 30 not in {rows for _, _, rows in seen}
    torch.testing.assert_close(out, attention(*x, PLANE, kernel=NAME))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"box": 8}, "box must be a tuple of 1 to 3 ints, got 8"),
        ({"box": ()}, r"box must be a tuple of 1 to 3 ints, got \(\)"),
        ({"box": (1, 2, 3, 4)}, "box must be a tuple of 1 to 3 ints, got"),
        ({"box": (4, 0)}, r"box must be of ints >= 1, got \(4, 0\)"),
        ({"box": (4, 2.0)}, r"box must be of ints >= 1, got \(4, 2.0\)"),
        ({"batch_bytes": 0}, "batch_bytes must be of ints >= 1, got 0"),
        ({"strip_bytes": True}, "strip_bytes must be of ints >= 1, got True"),
    ],
    ids=str,
)
def test_what_tiles_cannot_be_is_refused_by_name(arguments, message):
    with pytest.raises(InputError, match=message):
        Tiles(**arguments)


def test_a_choice_of_another_type_is_refused_by_name():
    with pytest.raises(InputError, match=r"backward must be Tiles, got \(8, 8\)"), choose_tiles(backward=(8, 8)):
        pass
