"""What a kernel takes is what its library does, and does right: asked of thousands of problems, one by one.

The library's own word is what comes of running it, past all that is declared and refused: an error, another result than
the reference, or the right one. The doubles check what the libraries check, and compute what their kernels compute,
where that is not what was asked for, too.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attn_core import (
    ALiBi,
    Cached,
    Causal,
    KeyPadding,
    Paged,
    Problem,
    Segments,
    TensorBias,
    Window,
    reference_attention,
)
from attn_core.kernel import resolve
from attn_flash import library

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import flash_real
from flash_doubled import BY_NAME, doubled

SEED = 20261121
CLOSE = 3e-2
BATCH, SCALE = 2, 0.3
LEFT, RIGHT = "top-left", "bottom-right"
#: (queries, keys)
LENGTHS = ((1, 1), (4, 4), (1, 4), (3, 5), (5, 3), (7, 2), (2, 7))
#: Of these, where ALiBi from another key is another: the same number beside all logits of a query changes nothing.
TELLING = ((4, 4), (3, 5))
#: Forms of a bias: functions of (queries, keys); None where there is none for these lengths.
MASKS = {
    "none": lambda q, k: None,
    "causal": lambda q, k: Causal(RIGHT),
    "causal from the top left": lambda q, k: Causal(LEFT),
    **{
        f"window {left} {right} {corner}": (lambda q, k, limits=(left, right, corner): Window(*limits))
        for left, right in ((0, 0), (1, 0), (None, 1), (1, None), (2, 3), (None, 3), (0, 5))
        for corner in (LEFT, RIGHT)
    },
    "a tensor": lambda q, k: TensorBias(torch.arange(k)[None] > 0) if k > 1 else None,
    "documents": lambda q, k: Segments(*halves(q, k)),
    "documents, causal": lambda q, k: Segments(*halves(q, k), within=Causal(RIGHT)),
    "documents, causal from the top left": lambda q, k: Segments(*halves(q, k), within=Causal(LEFT)),
    "documents, window": lambda q, k: Segments(*halves(q, k), within=Window(0, None, RIGHT)),
    "documents without keys": lambda q, k: Segments([q - 1, 1], [k, 0]) if q > 1 else None,
    "documents without queries": lambda q, k: Segments([0, q], [1, k - 1]) if k > 1 else None,
    "documents with gaps": lambda q, k: Segments([q], [k - 1], starts_kv=[1]) if k > 1 else None,
    "padding": lambda q, k: KeyPadding([k, k // 2]),
    "cache": lambda q, k: Cached([k, max(k - 1, 0)], within=Causal(RIGHT)),
    "cache from the top left": lambda q, k: Cached([k, max(k - 1, 0)], within=Causal(LEFT)),
    "cache, window": lambda q, k: Cached([k, max(k - 1, 0)], within=Window(1, None, RIGHT)),
    "ALiBi": lambda q, k: ALiBi(4, corner=RIGHT),
    "ALiBi from the top left": lambda q, k: ALiBi(4, corner=LEFT) if k > 1 else None,
    "ALiBi, causal": lambda q, k: ALiBi(4, corner=RIGHT) + Causal(RIGHT),
    "ALiBi, window": lambda q, k: ALiBi(4, corner=RIGHT) + Window(1, 1, RIGHT),
    "ALiBi twice": lambda q, k: ALiBi(4, corner=RIGHT) + ALiBi(4, corner=RIGHT) if k > 1 else None,
    "ALiBi, documents": lambda q, k: ALiBi(4, corner=RIGHT) + Segments(*halves(q, k)) if (q, k) in TELLING else None,
    "ALiBi, one document": lambda q, k: ALiBi(4, corner=RIGHT) + Segments([q], [k], within=Causal(RIGHT)),
    "ALiBi, padding": lambda q, k: ALiBi(4, corner=RIGHT) + KeyPadding([k, k // 2]) if (q, k) in TELLING else None,
}
OPTIONS = {
    "plain": {},
    "LSE": {"return_lse": True},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout_p": 0.5},
    "softcap and dropout": {"softcap": 1.5, "dropout_p": 0.5},
    "gradients": {"requires_grad": True},
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def halves(q, k):
    """Two documents, of a half each."""
    return [q - q // 2, q // 2], [k // 2, k - k // 2]


def pages(q, size, within=None):
    return Paged(torch.tensor([[1], [0]]), [size, size // 2], size, within=within)


def problems(dims, masks, options, dtypes=DTYPES, heads=((4, 2),)):
    """Every combination, of those that there are."""
    for (name, make), lengths, each, dtype, more, (num_heads, num_kv_heads) in itertools.product(
        masks.items(), LENGTHS, dims, dtypes, options, heads
    ):
        seqlen_q, seqlen_kv = lengths
        bias = make(*lengths)
        if bias is None and name != "none":
            continue
        if bias is not None:
            seqlen_kv = bias.seqlen_kv if isinstance(bias, Paged) else seqlen_kv
            bias = bias.bind(seqlen_q, seqlen_kv).normalize()
        yield Problem(
            batch=BATCH,
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=each[0],
            head_dim_v=each[1],
            dtype=dtype,
            device="cuda",
            compute_capability=CAPABILITY,
            bias=bias,
            scale=SCALE,
            **OPTIONS[more],
        )


#: What the libraries raise for what they do not do.
REFUSES = (RuntimeError, AssertionError, TypeError, NotImplementedError)
CAPABILITY = (9, 0)  #: which all generations are for
KEPT: dict[object, list[torch.Tensor]] = {}


def operands(problem):
    """Query, key and value of these sizes; behind the ends of sequences, key and value are NaN."""
    paged = None if problem.bias is None else problem.bias.paged
    keys = (BATCH, problem.seqlen_kv) if paged is None else (2, paged.page_size)
    shapes = (
        (BATCH, problem.seqlen_q, problem.num_heads, problem.head_dim),
        (*keys, problem.num_kv_heads, problem.head_dim),
        (*keys, problem.num_kv_heads, problem.head_dim_v),
    )
    made = KEPT.get((shapes, problem.dtype))
    if made is None:
        generator = torch.Generator().manual_seed(SEED)
        made = [torch.randn(shape, generator=generator).to(problem.dtype) for shape in shapes]
        KEPT[shapes, problem.dtype] = made
    valid = None if problem.bias is None or paged is not None else problem.bias.valid_keys("cpu")
    if valid is not None:
        gone = ~valid.expand(BATCH, -1)[:, :, None, None]
        made = [made[0], *(tensor.masked_fill(gone, float("nan")) for tensor in made[1:])]
    return [tensor.detach().requires_grad_(problem.requires_grad) for tensor in made]


class Library:
    """The library's own word, remembered: biases come normalized, so that many problems are the same."""

    def __init__(self, kernel):
        self.run, self.said = resolve(kernel), {}

    def does(self, problem):
        """Whether it runs it, past all refusals, and what comes out is what was asked for."""
        if problem not in self.said:
            self.said[problem] = self._does(problem)
        return self.said[problem]

    def _does(self, problem):
        given = operands(problem)
        options = {"bias": problem.bias, "softcap": problem.softcap, "dropout_p": problem.dropout_p}
        options = {name: value for name, value in options.items() if value}
        if problem.return_lse:
            options["return_lse"] = True
        try:
            result = self.run(*given, scale=SCALE, **options)
        except REFUSES:
            return False
        if problem.dropout_p:  # which weights are left is chance; without it, all of them must be right
            return takes_dropout(problem.bias) and self.does(replace(problem, dropout_p=0.0))
        out, lse = result if problem.return_lse else (result, None)
        right, right_lse = reference_attention(*given, problem.bias, scale=SCALE, softcap=problem.softcap)
        if not near(out, right) or (lse is not None and not near(lse, right_lse)):
            return False
        return not problem.requires_grad or self._gives_gradients(out, right, given)

    def _gives_gradients(self, out, right, given):
        if not out.requires_grad:
            return False
        ones = torch.ones_like(out)
        try:
            ours = torch.autograd.grad(out, given, ones, allow_unused=True)
        except REFUSES:
            return False
        theirs = torch.autograd.grad(right, given, ones.double(), allow_unused=True)
        return all(near(mine, torch.zeros_like(mine) if r is None else r) for mine, r in zip(ours, theirs))


def takes_dropout(bias):
    """Whether the function for such a mask has the argument at all."""
    name = "flash_attn_with_kvcache" if bias is not None and bias.has_padding else "flash_attn_func"
    return library.FA2.takes(name, "dropout_p")


def near(ours, right):
    """Rounding errors grow with what is summed up; of another mask, differences are as large as the numbers."""
    largest = max(1.0, right.nan_to_num(0.0, 0.0, 0.0).abs().max().item()) if right.numel() else 1.0
    return ours.shape == right.shape and torch.allclose(ours.double(), right.double(), atol=CLOSE * largest, rtol=CLOSE)


def sweep(kernel, cases):
    """How many problems were asked about, and how often each field was a reason; fails where a verdict is another."""
    its_library, fields, wrong = Library(kernel), Counter(), []
    distinct = list(dict.fromkeys(cases))
    for problem in distinct:
        refusals = kernel.refusals(problem)
        fields.update({refusal.field for refusal in refusals} or {"taken"})
        if (not refusals) is not its_library.does(problem):
            wrong.append(f"{list(map(str, refusals)) if refusals else 'takes'}: {problem}")
    assert not wrong, f"{len(wrong)} of {len(distinct)} verdicts differ:\n" + "\n".join(wrong[:20])
    return len(distinct), fields


def of_flash_attention_2():
    """More than 20,000, no two of them the same."""
    dims = ((8, 8), (12, 12), (16, 8), (8, 16), (24, 8), (264, 264), (512, 512))
    options = ("plain", "LSE", "softcap", "dropout", "softcap and dropout", "gradients")
    plain = {name: MASKS[name] for name in ("none", "causal")}
    ends = ((1, 1), (64, 64), (256, 256), (257, 257))
    in_pages = {
        f"pages of {size}, {within}": (lambda q, k, size=size, within=within: pages(q, size, within))
        for size in (16, 128, 256)
        for within in (None, Causal(RIGHT), Causal(LEFT), Window(3, 0, RIGHT))
    }
    return itertools.chain(
        problems(dims, MASKS, options),
        problems(ends, plain, ("plain", "gradients"), heads=((4, 4), (4, 1))),
        problems(((8, 8),), in_pages, ("plain", "LSE", "dropout", "gradients"), (torch.float16,)),
    )


def check_flash_attention_2():
    asked, fields = sweep(BY_NAME["fa2"], of_flash_attention_2())
    assert asked >= 20_000
    assert fields["taken"] > 2_000
    assert set(fields) >= {"dtype", "head_dim", "head_dim_v", "bias", "dropout_p", "backward.biases"}


def test_flash_attention_2_and_its_declaration_agree_on_20_000_problems(tmp_path):
    with doubled(tmp_path, "fa2"):
        check_flash_attention_2()


@pytest.mark.skipif(flash_real.folder() is None, reason="flash-attn is not installed; nox -s flash has it")
def test_so_does_the_real_package_over_the_double_of_its_extension():
    with flash_real.over_the_double():
        check_flash_attention_2()


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("fa3", ((8, 8), (12, 12), (64, 256), (64, 512), (64, 520), (72, 64), (192, 128), (192, 64), (264, 264))),
        ("fa4", ((8, 8), (12, 12), (16, 64), (264, 264))),
    ],
    ids=["fa3", "fa4"],
)
def test_the_later_generations_and_their_declarations_agree(tmp_path, name, dims):
    masks = {label: make for label, make in MASKS.items() if "ALiBi" not in label and "tensor" not in label}
    with doubled(tmp_path, name):
        dtypes = (torch.float16, torch.float32)
        asked, fields = sweep(BY_NAME[name], problems(dims, masks, ("plain", "LSE", "gradients"), dtypes))
    assert asked > 1_500
    assert fields["taken"] > 200
