"""`attn show` draws what an expression means, in the terminal and as a PNG that is whole or not there."""

import io
import os
import sys
from importlib.util import find_spec

import pytest
import torch
from attn_core import ALiBi, Causal, Neighborhood, Segments, TensorBias, Window
from attn_core.bias.drawing import cells
from attn_core.cli import main, picture
from attn_core.cli.expression import parse
from attn_core.cli.lengths import lengths_of
from attn_core.cli.picture import Panel, painted, png, read
from click.testing import CliRunner

INF = float("inf")
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="pip install 'attn-core[show]'")


def attn(*arguments, exit_code=0):
    result = CliRunner().invoke(main, ["show", *arguments])
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    return result.output


def words(text):
    return " ".join(text.split())


def pixels(data):
    """The middle of every cell of every panel: `[rows, columns, 3]` in [0, 1]."""
    return [drawn.colours for drawn in read(data)]


def same_colours(seen, wanted):
    torch.testing.assert_close(seen, torch.as_tensor(wanted, dtype=torch.float32), rtol=0, atol=1 / 255)


# The terminal


def test_the_matrix_is_that_of_draw():
    printed = attn("Window(3,0) & Segments([5,9,4])")
    title, matrix = printed.split("\n", 1)
    assert title == "Window(3,0) & Segments([5,9,4]), 18 queries x 18 keys"
    kept = cells((Window(3, 0) & Segments([5, 9, 4])).bind(18, 18), rows=18) == 0
    assert matrix.splitlines() == ["".join("█" if cell else "·" for cell in row) for row in kept.tolist()]


def test_what_is_added_comes_with_a_legend():
    printed = attn("Causal() + ALiBi(2)", "--seqlen", "4", "--head", "1")
    assert printed.startswith("Causal() + ALiBi(2), head 1, 4 queries x 4 keys\n█···\n")
    assert "░ -0.0117 to -0.00879" in printed
    assert "· masked" in printed


def test_batch_entry_and_head_are_chosen():
    assert "\n█··\n" in attn("KeyPadding([1, 3])", "--seqlen", "3")
    assert "\n███\n" in attn("KeyPadding([1, 3])", "--seqlen", "3", "--batch-entry", "1")
    assert "batch entry 1, 3 queries" in attn("KeyPadding([1, 3])", "--seqlen", "3", "--batch-entry", "1")


def test_lengths_may_differ():
    printed = attn("Causal('bottom-right')", "--seqlen-q", "2", "--seqlen-kv", "4")
    assert printed.endswith("2 queries x 4 keys\n███·\n████\n")
    assert attn("Causal('bottom-right')", "--seqlen", "2", "--seqlen-kv", "4") == printed


def test_a_large_matrix_is_cut_in_the_terminal():
    lines = attn("Causal()", "--seqlen", "1000").splitlines()
    assert len(lines) == 1 + 64 + 1
    assert lines[1].endswith("· …")


def test_several_are_drawn_one_after_the_other():
    printed = attn("Causal()", "Window(0, 1)", "--seqlen", "2")
    assert printed == "Causal(), 2 queries x 2 keys\n█·\n██\nWindow(0, 1), 2 queries x 2 keys\n██\n·█\n"


TOLD = {
    "Causal()": (None, None),
    "Segments([5, 9, 4])": (18, 18),
    "Segments([2, 2], [2, 1], starts_kv=[0, 3])": (4, 4),
    "Segments([])": (0, 0),
    "Neighborhood((4, 5), kernel_size=3)": (20, 20),
    "RelPosTable(random(4, 5, 5), (3, 3))": (9, 9),
    "random(2, 1, 6, 7)": (6, 7),
    "random(2, 1, 1, 7)": (None, 7),
    "random(7)": (None, 7),
    "KeyPadding([3, 5])": (None, 5),
    "Cached([3, 5], within=Causal('bottom-right'))": (None, 5),
    "Paged([[2, 0], [2, 1]], [3, 4], 2)": (None, 4),
    "BlockMask(tensor([[True, False], [True, True]]), (2, 3))": (4, 6),
    "BlockMask.from_mask(Causal(), 5, 5, 2)": (5, 5),
    "Window(3, 0) & Segments([5, 9, 4])": (18, 18),
    "ALiBi(4) + Segments([5, 9, 4])": (18, 18),
    "random(6, 1) + KeyPadding([3, 5])": (6, 5),
    "Causal().bind(3, 3)": (3, 3),
    "Window(1, 0).bind(3, 3) & Causal()": (3, 3),
}


@pytest.mark.parametrize("text", TOLD)
def test_lengths_that_an_expression_tells_are_the_default(text):
    seqlen_q, seqlen_kv = TOLD[text]
    assert lengths_of(parse(text)) == (seqlen_q, seqlen_kv)
    if seqlen_q is seqlen_kv is None:
        assert "say --seqlen N" in attn(text, exit_code=2)
        return
    wanted = f"{seqlen_kv if seqlen_q is None else seqlen_q} queries x {seqlen_kv} keys"
    assert wanted in attn(text).splitlines()[0]


# The picture


@pytest.mark.parametrize(
    ("text", "flags", "bias"),
    [
        ("Window(3,0) & Segments([5,9,4])", [], (Window(3, 0) & Segments([5, 9, 4])).bind(18, 18)),
        ("Neighborhood((4, 5), kernel_size=3)", [], Neighborhood((4, 5), kernel_size=3).bind(20, 20)),
        ("Causal()", ["--seqlen", "500"], Causal().bind(500, 500)),
        ("Causal() + ALiBi(2)", ["--seqlen", "9"], (Causal() + ALiBi(2)).bind(9, 9)),
        ("tensor([[0.5, -inf, inf, 2.0]])", ["--seqlen", "4"], TensorBias(torch.tensor([[0.5, -INF, INF, 2]]))),
    ],
    ids=["intersection", "neighborhood", "large", "scores", "not finite"],
)
@needs_matplotlib
def test_every_cell_of_the_matrix_is_in_the_picture(text, flags, bias, tmp_path):
    out = tmp_path / "mask.png"
    printed = attn(text, *flags, "--out", str(out))
    assert printed.endswith(f"written to {out}\n")
    values = cells(bias if bias.lengths else bias.bind(4, 4), rows=500, columns=500)
    (seen,) = pixels(out.read_bytes())
    same_colours(seen, painted(values)[0])
    assert len(seen.reshape(-1, 3).unique(dim=0)) == len(values[~values.isnan()].unique())


@needs_matplotlib
def test_several_share_one_picture(tmp_path):
    out = tmp_path / "grid.png"
    texts = ["Causal()", "Window(2, 0)", "KeyPadding([2, 9])", "ALiBi(4)"]
    attn(*texts, "--seqlen", "9", "--out", str(out))
    seen = pixels(out.read_bytes())
    assert len(seen) == len(texts)
    for text, panel in zip(texts, seen):
        same_colours(panel, painted(cells(parse(text).bind(9, 9)))[0])
    titles = [panel.title for panel in read(out.read_bytes())]
    assert titles == ["Causal()", "Window(2, 0)", "KeyPadding([2, 9]), batch entry 0", "ALiBi(4), head 0"]


@needs_matplotlib
def test_the_chosen_head_and_batch_entry_are_in_the_picture(tmp_path):
    out = tmp_path / "a.png"
    attn("ALiBi(2)", "--seqlen", "4", "--head", "1", "--out", str(out))
    same_colours(pixels(out.read_bytes())[0], painted(cells(ALiBi(2).bind(4, 4), head=1))[0])


@needs_matplotlib
def test_what_is_read_from_a_picture_is_in_its_pixels():
    import matplotlib.image
    from matplotlib.colors import to_rgb

    data = png([Panel(title="one cell", cells=torch.zeros(1, 1, dtype=torch.float64))])
    image = torch.from_numpy(matplotlib.image.imread(io.BytesIO(data)).copy())[..., :3]
    kept = torch.tensor(to_rgb(picture.KEPT))
    is_kept = ((image - kept).abs() < 0.005).all(-1)
    rows, columns = is_kept.any(1).sum().item(), is_kept.any(0).sum().item()
    assert (rows, columns, is_kept.sum().item()) == (picture.MAX_CELL, picture.MAX_CELL, picture.MAX_CELL**2)
    same_colours(read(data)[0].colours, kept.expand(1, 1, 3))


@needs_matplotlib
def test_a_mask_has_two_colours_and_scores_have_shades_between_the_least_and_the_most():
    rgb, scale = painted(torch.tensor([[0.0, -INF]], dtype=torch.float64))
    assert scale is None
    assert rgb[0, 0].tolist() != rgb[0, 1].tolist()
    rgb, scale = painted(torch.tensor([[-3.0, 1.0, -1.0]], dtype=torch.float64))
    assert scale == (-3.0, 1.0)
    ends = painted(torch.tensor([[-30.0, 10.0, -10.0]], dtype=torch.float64))[0]
    assert rgb.tolist() == ends.tolist()


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1), (1, 2048)], ids=str)
@needs_matplotlib
def test_a_matrix_of_any_shape_makes_a_picture(shape):
    data = png([Panel(title="a title " * 30, cells=torch.zeros(shape, dtype=torch.float64))])
    assert [seen.shape for seen in pixels(data)] == [(*shape, 3)]


@needs_matplotlib
def test_a_picture_takes_the_place_of_the_one_before(tmp_path):
    out = tmp_path / "mask.PNG"
    out.write_bytes(b"before")
    attn("Causal()", "--seqlen", "3", "--out", str(out))
    assert read(out.read_bytes())[0].title == "Causal()"
    assert list(tmp_path.iterdir()) == [out]


# Nothing half


def test_without_matplotlib_the_line_to_type_is_said_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = words(attn("Causal()", "--seqlen", "3", "--out", str(tmp_path / "mask.png"), exit_code=2))
    assert 'matplotlib is not installed. To install it: pip install "attn-core[show]"' in said
    assert "█" not in said
    assert list(tmp_path.iterdir()) == []
    assert "█" in attn("Causal()", "--seqlen", "3")


@needs_matplotlib
def test_a_picture_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "mask.png"
    out.write_bytes(b"before")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "replace", full)
    said = words(attn("Causal()", "--seqlen", "3", "--out", str(out), exit_code=2))
    assert "cannot be written: No space left on device" in said
    assert out.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [out]


@needs_matplotlib
def test_a_picture_that_cannot_be_drawn_leaves_nothing(tmp_path, monkeypatch):
    def fail(panels):
        raise RuntimeError("drawing failed")

    monkeypatch.setattr(picture, "png", fail)
    result = CliRunner().invoke(main, ["show", "Causal()", "--seqlen", "3", "--out", str(tmp_path / "mask.png")])
    assert isinstance(result.exception, RuntimeError)
    assert list(tmp_path.iterdir()) == []


USER_ERRORS = {
    "no expression": ([], "Missing argument 'EXPRESSION...'"),
    "an expression that is none": (["Widow(3, 0)"], "Did you mean 'Window'?"),
    "one of several that is none": (["Causal()", "Widow(3, 0)", "--seqlen", "3"], "Did you mean 'Window'?"),
    "other lengths": (["Segments([5, 9, 4])", "--seqlen", "17"], "have seqlen_q=18 together, got seqlen_q=17"),
    "no corner": (["Causal()", "--seqlen-q", "3", "--seqlen-kv", "5"], "differs from seqlen_kv=5"),
    "a negative length": (["Causal()", "--seqlen", "-1"], "-1 is not in the range"),
    "a length beyond all": (["Causal()", "--seqlen", "1048577"], "lengths are at most 1048576, got 1048577"),
    "a batch entry beyond": (["KeyPadding([1, 3])", "--batch-entry", "2"], "has batch entry 0 to 1, got 2"),
    "a head beyond": (["ALiBi(4)", "--seqlen", "3", "--head", "4"], "has head 0 to 3, got 4"),
    "no picture": (["Causal()", "--seqlen", "3", "--out", "mask.jpg"], "--out writes a .png, got 'mask.jpg'"),
    "no folder": (["Causal()", "--seqlen", "3", "--out", "no/mask.png"], "there is no folder 'no'"),
    "a picture of too many cells": (
        ["Causal()", "--seqlen", "2049", "--out", "mask.png"],
        "a picture has at most 2048 cells a side; Causal() has 2049 queries x 2049 keys",
    ),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_users_error_is_a_message_and_nothing_is_drawn(case, tmp_path, monkeypatch):
    if case == "a picture of too many cells":  # that there is no matplotlib is said first
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    flags, message = USER_ERRORS[case]
    said = words(attn(*flags, exit_code=2))
    assert message in said
    assert "█" not in said
    assert os.listdir(tmp_path) == []
