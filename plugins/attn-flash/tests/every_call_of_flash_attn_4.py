"""Each call that flash/fa4 makes, by the real FlashAttention-4: whether it takes it, and compiles it for a GPU.

Of some thousand problems, its own checks say what `flash/fa4` says of them; of some, the kernels are compiled, which is
what a GPU would run. Minutes; `nox -s flash_4` installs what that needs.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attn_core import Cached, Causal, KeyPadding, Paged, Problem, Segments, Window

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import flash_compiler_4
from flash_doubled import BY_NAME

pytestmark = pytest.mark.skipif(
    not flash_compiler_4.is_there(), reason="flash-attn-4 is not installed with the compiler of its kernels"
)

CORNER = "bottom-right"
CAPABILITIES = ((9, 0), (10, 0), (11, 0))
LENGTHS = ((128, 128), (5, 64))
DIMS = (
    *((dim, dim) for dim in (8, 12, 64, 72, 128, 192, 248, 256, 264)),
    *((192, 128), (64, 128), (128, 64), (64, 40), (256, 128), (64, 512)),
)
OPTIONS = {
    "plain": {},
    "LSE": {"return_lse": True},
    "softcap": {"softcap": 2.0},
    "gradients": {"requires_grad": True},
    "gradients, softcap": {"requires_grad": True, "softcap": 2.0},
    "gradients, LSE": {"requires_grad": True, "return_lse": True},
    "gradients, bit-equal": {"requires_grad": True, "deterministic": True},
}
MASKS = {
    "no mask": lambda q, k: None,
    "causal": lambda q, k: Causal(CORNER),
    "window": lambda q, k: Window(3, 1, CORNER),
    "window without a right limit": lambda q, k: Window(9, None, CORNER),
    "documents": lambda q, k: Segments(*halves(q, k)),
    "documents, causal": lambda q, k: Segments(*halves(q, k), within=Causal(CORNER)),
    "documents, window": lambda q, k: Segments(*halves(q, k), within=Window(5, 0, CORNER)),
    "documents with gaps": lambda q, k: Segments([q], [k - 8], starts_kv=[8]),
    "padding": lambda q, k: KeyPadding([k, k // 2]),
    "cache": lambda q, k: Cached([k, k - 1], within=Causal(CORNER)),
    "cache, window": lambda q, k: Cached([k, k - 1], within=Window(5, 0, CORNER)),
    "pages of 16": lambda q, k: pages(16),
    "pages of 128": lambda q, k: pages(128),
}
#: Fields by which flash/fa4 refuses what the checks of FlashAttention-4 let through, and where it may.
OWN_WORD = {
    # The gradient of what lies between sequences is not written.
    "backward.biases": lambda p: p.bias is not None and p.bias.has_padding,
    # With head_dim 256, betas since 34 take these on Blackwell; they are not declared.
    "bias": lambda p: p.head_dim == 256 and p.compute_capability >= (10, 0),
    "softcap": lambda p: p.head_dim == 256 and p.compute_capability >= (10, 0),
    "lse_grad": lambda p: p.head_dim == 256 and p.compute_capability >= (10, 0),
    # On sm_90, some of them cannot be compiled.
    "head_dim_v": lambda p: p.compute_capability == (9, 0) and 192 < p.head_dim_v <= 256,
    "backward.head_dims_v": lambda p: p.compute_capability == (9, 0) and p.head_dim_v not in (64, 128, 192),
}
#: Pages as large as a tile go by another way, on which an odd head_dim is taken.
ODD_PAGES = "takes pages with multiples of 16"


def halves(q, k):
    return [q // 2, q - q // 2], [k // 2, k - k // 2]


def pages(size):
    return Paged(torch.tensor([[0, 1], [2, 3]]), [2 * size, size], size, within=Causal(CORNER))


def problem_of(capability, lengths, dims, options, mask, heads):
    seqlen_q, seqlen_kv = lengths
    bias = MASKS[mask](*lengths)
    if isinstance(bias, Paged):
        seqlen_kv = bias.seqlen_kv
    return Problem(
        batch=2,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=dims[0],
        head_dim_v=dims[1],
        dtype=torch.bfloat16,
        device="cuda",
        compute_capability=capability,
        bias=None if bias is None else bias.bind(seqlen_q, seqlen_kv).normalize(),
        scale=0.3,
        **OPTIONS[options],
    )


def problems(capability):
    """Every combination; of lengths and heads, each in turn."""
    turns = itertools.cycle(((LENGTHS[0], (4, 4)), (LENGTHS[0], (4, 2)), (LENGTHS[1], (4, 4)), (LENGTHS[1], (4, 2))))
    for dims, options, mask in itertools.product(DIMS, OPTIONS, MASKS):
        lengths, heads = next(turns)
        yield problem_of(capability, lengths, dims, options, mask, heads)
    plain = problem_of(capability, LENGTHS[0], (64, 64), "plain", "no mask", (4, 4))
    for dtype in (torch.float16, torch.float32, torch.float64):
        yield replace(plain, dtype=dtype)


@pytest.fixture(scope="module")
def interface(tmp_path_factory):
    with flash_compiler_4.whole(tmp_path_factory.mktemp("flash-attn-4")) as found:
        yield found


@pytest.fixture
def library(interface, monkeypatch):
    return lambda capability: flash_compiler_4.Library(interface, 10 * capability[0] + capability[1], monkeypatch)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_what_flash_fa4_takes_is_what_flash_attention_4_takes(library, capability):
    kernel, its_library, counted, wrong = BY_NAME["fa4"], library(capability), Counter(), []
    for problem in problems(capability):
        refusals = kernel.refusals(problem)
        against = its_library.against(problem)
        own = [r for r in refusals if ODD_PAGES in r.message or OWN_WORD.get(r.field, lambda p: False)(problem)]
        counted["taken" if not refusals else "refused by both" if against else "refused here alone"] += 1
        if (against is not None and not refusals) or (against is None and len(own) < len(refusals)):
            wrong.append(f"{list(map(str, refusals)) or 'takes'}, {against}: {problem}")
    print(dict(counted))  # noqa: T201
    assert not wrong, f"{len(wrong)} of {counted.total()} verdicts differ:\n" + "\n".join(wrong[:20])
    assert counted.total() > 1_300
    assert counted["taken"] > 400
    assert counted["refused by both"] > 100


#: (compute capability, dims, options, mask, heads) of the calls whose kernels are compiled, some seconds each. Of those
#: of sm_100, some ask the driver of a GPU, which need not be here, and are not among them.
COMPILED = (
    ((9, 0), (64, 64), "LSE", "no mask", (4, 4)),
    ((9, 0), (64, 64), "gradients, softcap", "window", (4, 2)),
    ((9, 0), (64, 64), "gradients, LSE", "documents, window", (4, 4)),
    ((9, 0), (64, 64), "LSE", "documents with gaps", (4, 2)),
    ((9, 0), (64, 64), "plain", "cache, window", (4, 2)),
    ((9, 0), (64, 64), "plain", "pages of 16", (4, 2)),
    ((9, 0), (128, 128), "softcap", "pages of 128", (4, 2)),
    ((9, 0), (192, 128), "gradients", "documents, causal", (4, 4)),
    ((9, 0), (8, 192), "plain", "window", (4, 4)),
    ((9, 0), (256, 256), "gradients", "no mask", (4, 2)),
    ((10, 0), (64, 64), "gradients, softcap", "window", (4, 2)),
    ((10, 0), (64, 64), "plain", "pages of 16", (4, 2)),
    ((10, 0), (192, 128), "gradients, softcap", "causal", (4, 2)),
)


@pytest.mark.parametrize(
    ("capability", "dims", "options", "mask", "heads"),
    [
        pytest.param(*case, id=f"sm_{case[0][0]}{case[0][1]}, {case[2]}, {case[3]}, {case[1][0]} and {case[1][1]}")
        for case in COMPILED
    ],
)
def test_what_flash_fa4_takes_can_be_compiled(library, capability, dims, options, mask, heads):
    problem = problem_of(capability, LENGTHS[0], dims, options, mask, heads)
    assert not BY_NAME["fa4"].refusals(problem)
    assert library(capability).compile(problem) == 1 + problem.requires_grad


@pytest.mark.parametrize(("dims", "options"), [((64, 224), "plain"), ((128, 160), "gradients")], ids=str)
def test_what_cannot_be_compiled_is_refused_though_the_checks_let_it_through(library, dims, options):
    problem = problem_of((9, 0), LENGTHS[0], dims, options, "no mask", (4, 4))
    assert library((9, 0)).against(problem) is None
    assert {refusal.field for refusal in BY_NAME["fa4"].refusals(problem)} <= {"head_dim_v", "backward.head_dims_v"}
    assert BY_NAME["fa4"].refusals(problem)
    with pytest.raises(Exception, match=r"PTX assembly failed|Operation creation failed"):
        library((9, 0)).compile(problem)
