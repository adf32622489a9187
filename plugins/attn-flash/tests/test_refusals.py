"""What each kernel refuses: field, limit and value. Of problems on a CUDA device that need not be there."""

from __future__ import annotations

import sys
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
    explain_problem,
)

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from flash_doubled import BY_NAME, VERSIONS, doubled, registered

PLAIN = Problem(
    batch=2,
    seqlen_q=128,
    seqlen_kv=128,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    head_dim_v=64,
    dtype=torch.bfloat16,
    device="cuda",
    compute_capability=(9, 0),
    scale=0.125,
)
HOPPER, A100, RTX_3090, B200, THOR, RTX_5090, T4 = (9, 0), (8, 0), (8, 6), (10, 0), (11, 0), (12, 0), (7, 5)
UNEVEN = {"seqlen_q": 100, "seqlen_kv": 128}
TABLE = torch.tensor([[0, 1], [2, 3]])


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory):
    """All three, of the versions that the doubles are of."""
    with doubled(tmp_path_factory.mktemp("libraries"), *BY_NAME):
        yield


def asked(bias=None, **changes):
    problem = replace(PLAIN, **changes)
    if bias is None:
        return problem
    return replace(problem, bias=bias.bind(problem.seqlen_q, problem.seqlen_kv).normalize().without_data())


def refused(name, problem):
    """Field -> message of what a kernel refuses."""
    return {refusal.field: refusal.message for refusal in BY_NAME[name].refusals(problem)}


#: What is refused: (kernels, problem, field, what the message says).
REFUSED = {
    "a compute capability that is too old": (
        {"fa2": T4, "fa3": A100, "fa4": A100},
        asked(),
        "compute_capability",
        "takes sm_{min} or newer, got sm_{got}",
    ),
    "one that is newer than known": (
        {"fa2": (12, 2), "fa3": B200, "fa4": RTX_5090},
        asked(),
        "compute_capability",
        "newer than known",
    ),
    "one that no release is built for": ({"fa2": THOR}, asked(), "compute_capability", "got sm_110"),
    "one that is not known": (
        {"fa2": None, "fa3": None, "fa4": None},
        asked(),
        "compute_capability",
        "is unknown here",
    ),
    "the CPU": (("fa2", "fa3", "fa4"), asked(device="cpu", compute_capability=None), "device", "takes cuda, got cpu"),
    "float32": (
        ("fa2", "fa3", "fa4"),
        asked(dtype=torch.float32),
        "dtype",
        "takes bfloat16, float16, got float32",
    ),
    "a head_dim over the limit": (("fa2",), asked(head_dim=264, head_dim_v=264), "head_dim", "1 to 256, got 264"),
    "a head_dim over the limit of the others": (
        ("fa3", "fa4"),
        asked(head_dim=264, head_dim_v=264),
        "head_dim",
        "multiples of 8 up to 256, got 264",
    ),
    "values of another head_dim": (("fa2",), asked(head_dim_v=32), "head_dim_v", "equal to head_dim=64, got 32"),
    "values of a head_dim that goes with another": (
        ("fa3",),
        asked(head_dim=128, head_dim_v=64),
        "head_dim_v",
        "got 128 with 64",
    ),
    "values of a long head_dim": (
        ("fa3",),
        asked(head_dim_v=520),
        "head_dim_v",
        "takes multiples of 8 up to 512, got 520",
    ),
    "values of a long head_dim beside one that is not short": (
        ("fa3",),
        asked(head_dim=72, head_dim_v=512),
        "head_dim_v",
        "head_dim up to 64, or from 136 to 192 with head_dim_v from 104 to 128, got 72 with 512",
    ),
    "values of a long head_dim in the backward": (
        ("fa3",),
        asked(head_dim_v=512, requires_grad=True),
        "backward.head_dims_v",
        "takes multiples of 8 up to 256 in the backward, got 512",
    ),
    "head_dims that Blackwell has not together": (
        {"fa4": B200},
        asked(head_dim=192, head_dim_v=192),
        "head_dim_v",
        "or 192 with 128, or 256 with 256, got 192 with 192",
    ),
    "a softcap with the longest head_dim of Blackwell": (
        {"fa4": B200},
        asked(head_dim=256, head_dim_v=256, softcap=30.0),
        "softcap",
        "takes no softcap with head_dim 256, got 30",
    ),
    "a cache with the longest head_dim of Blackwell": (
        {"fa4": B200},
        asked(KeyPadding([100, 128]), head_dim=256, head_dim_v=256),
        "bias",
        "with head_dim 256, got KeyPadding",
    ),
    "documents with gaps with the longest head_dim of Blackwell": (
        {"fa4": B200},
        asked(Segments([64, 64], [60, 60], starts_kv=[0, 64]), head_dim=256, head_dim_v=256),
        "bias",
        "padding or gaps with head_dim 256, got Segments",
    ),
    "a gradient through the LSE with the longest head_dim of Blackwell": (
        {"fa4": B200},
        asked(head_dim=256, head_dim_v=256, return_lse=True, requires_grad=True),
        "lse_grad",
        "with head_dim 256",
    ),
    "a window with the longest head_dim of Blackwell in the backward": (
        {"fa4": B200},
        asked(Window(9, 3, "bottom-right"), head_dim=256, head_dim_v=256, requires_grad=True),
        "backward.biases",
        "takes no window with head_dim 256 in the backward, got Window(9, 3",
    ),
    "documents with a window with the longest head_dim of Blackwell in the backward": (
        {"fa4": B200},
        asked(
            Segments([64, 64], within=Window(9, 0, "bottom-right")), head_dim=256, head_dim_v=256, requires_grad=True
        ),
        "backward.biases",
        "takes no window with head_dim 256 in the backward, got Segments",
    ),
    "shared keys with values of another head_dim in the backward": (
        {"fa4": HOPPER},
        asked(head_dim_v=128, requires_grad=True),
        "backward.gqa",
        "where head_dim_v is another than head_dim, got 2 with 64 and 128",
    ),
    "values that are much longer than keys": (
        {"fa4": HOPPER},
        asked(head_dim=96, head_dim_v=200),
        "head_dim_v",
        "takes multiples of 8 up to 192, got 200",
    ),
    "values of an odd head_dim in the backward": (
        {"fa4": HOPPER},
        asked(num_kv_heads=8, head_dim=128, head_dim_v=160, requires_grad=True),
        "backward.head_dims_v",
        "takes 64, 128, 192 in the backward, got 160",
    ),
    "pages of an odd head_dim": (
        {"fa4": HOPPER},
        asked(Paged(TABLE, [100, 128], 64), head_dim=72, head_dim_v=72),
        "bias",
        "takes pages with multiples of 16 for head_dim and head_dim_v, got 72 with 72",
    ),
    "pages of an odd head_dim on Blackwell": (
        {"fa4": B200},
        asked(Paged(TABLE, [100, 128], 64), head_dim_v=40),
        "bias",
        "takes pages with multiples of 16 for head_dim and head_dim_v, got 64 with 40",
    ),
    "dropout": (("fa3", "fa4"), asked(dropout_p=0.1), "dropout_p", "takes no dropout, got 0.1"),
    "dropout beside a softcap": (
        ("fa2",),
        asked(dropout_p=0.1, softcap=30.0),
        "dropout_p",
        "takes no dropout beside softcap, got 0.1",
    ),
    "dropout with a cache": (
        ("fa2",),
        asked(KeyPadding([100, 128]), dropout_p=0.1),
        "dropout_p",
        "takes no dropout with a cache or padding, got 0.1",
    ),
    "dropout and the LSE": (("fa2",), asked(dropout_p=0.1, return_lse=True), "return_lse", "with all weights"),
    "dropout in the backward of long head_dims where there is little shared memory": (
        {"fa2": RTX_3090},
        asked(head_dim=256, head_dim_v=256, dropout_p=0.1, requires_grad=True),
        "backward.head_dims",
        "up to 192 in the backward on sm_86, got 256",
    ),
    "a gradient to slopes": (
        ("fa2",),
        asked(ALiBi(8, torch.ones(8, requires_grad=True)), bias_requires_grad=True),
        "bias_grad",
        "gives no gradient to the bias",
    ),
    "ALiBi": (("fa3", "fa4"), asked(ALiBi(8)), "bias", "got ALiBi(8)"),
    "a dense bias": (
        ("fa2", "fa3", "fa4"),
        asked(TensorBias(torch.zeros(128, 128))),
        "bias",
        "got TensorBias",
    ),
    "a causal mask from the top left": (
        ("fa2", "fa3", "fa4"),
        asked(Causal("top-left"), **UNEVEN),
        "bias",
        'Causal("bottom-right")',
    ),
    "a window from the top left": (
        ("fa2", "fa3", "fa4"),
        asked(Window(9, 3, "top-left"), **UNEVEN),
        "bias",
        'takes windows from the bottom right, got Window(9, 3, "top-left")',
    ),
    "a mask in a cache from the top left": (
        ("fa2", "fa3", "fa4"),
        asked(Cached([100, 128], within=Causal("top-left")), seqlen_q=9),
        "bias",
        'got within=Causal("top-left")',
    ),
    "a mask in uneven documents from the top left": (
        ("fa2", "fa3", "fa4"),
        asked(Segments([50, 50], [60, 68], within=Causal("top-left")), **UNEVEN),
        "bias",
        "from the bottom right",
    ),
    "a window that FlashAttention-2 would take for none": (
        ("fa2",),
        asked(Window(None, 60, "bottom-right"), seqlen_q=128, seqlen_kv=50),
        "bias",
        "where seqlen_q=128 and seqlen_kv=50, got Window(",
    ),
    "a window without a limit that FlashAttention-2 would take for one": (
        ("fa2",),
        asked(Window(9, None, "bottom-right"), seqlen_q=128, seqlen_kv=50),
        "bias",
        "where seqlen_q=128 and seqlen_kv=50, got Window(",
    ),
    "documents with gaps": (
        ("fa2",),
        asked(Segments([64, 64], [60, 60], starts_kv=[0, 64])),
        "bias",
        "takes documents whose keys follow each other, got Segments",
    ),
    "documents with gaps, in the backward": (
        ("fa3", "fa4"),
        asked(Segments([64, 64], [60, 60], starts_kv=[0, 64]), requires_grad=True),
        "backward.biases",
        "takes documents whose keys follow each other in the backward, got Segments",
    ),
    "ALiBi from the top left": (
        ("fa2",),
        asked(ALiBi(8, corner="top-left"), **UNEVEN),
        "bias",
        "takes ALiBi from the bottom right, got ALiBi",
    ),
    "two ALiBi": (("fa2",), asked(ALiBi(8) + ALiBi(8)), "bias", "takes one ALiBi, got"),
    "ALiBi with padding": (("fa2",), asked(ALiBi(8) + KeyPadding([100, 128])), "bias", "without a cache or padding"),
    "ALiBi with documents off its diagonal": (
        ("fa2",),
        asked(ALiBi(8, corner="bottom-right") + Segments([50, 50], [60, 68]), **UNEVEN),
        "bias",
        "on its diagonal",
    ),
    "pages of another size": (
        ("fa2",),
        asked(Paged(TABLE, [100, 128], 64), seqlen_q=1),
        "bias",
        "takes pages of a multiple of 256 keys, got page_size=64",
    ),
    "padding, in the backward": (
        ("fa2", "fa3", "fa4"),
        asked(KeyPadding([100, 128]), requires_grad=True),
        "backward.biases",
        "in the backward, got KeyPadding",
    ),
    "a scale of 0": (("fa2", "fa3", "fa4"), asked(scale=0.0), "scale", "takes a scale above 0, got 0.0"),
    "a negative scale": (("fa2", "fa3", "fa4"), asked(scale=-1.0), "scale", "takes a scale above 0, got -1.0"),
    "a gradient through the LSE": (
        ("fa2", "fa3"),
        asked(return_lse=True, requires_grad=True),
        "lse_grad",
        "does not differentiate through the LSE",
    ),
    "a backward that is not bit-equal": (
        ("fa3",),
        asked(requires_grad=True, deterministic=True),
        "backward.deterministic",
        "is not deterministic",
    ),
    "a graph": (("fa3", "fa4"), asked(compiling=True), "compiling", "cannot be traced"),
    "a cache in a graph": (
        ("fa2",),
        asked(KeyPadding([100, 128]), compiling=True),
        "compiling",
        "takes KeyPadding outside of graphs only",
    ),
    "forward-mode differentiation": (("fa2", "fa3", "fa4"), asked(forward_ad=True), "forward_ad", "forward-mode"),
    "no keys": (("fa2", "fa3", "fa4"), asked(seqlen_kv=0), "empty_lengths", "got batch=2, seqlen_q=128, seqlen_kv=0"),
    "gradients longer than 32 bits": (
        ("fa2",),
        asked(seqlen_q=2**18, num_heads=64, head_dim=128, head_dim_v=128, requires_grad=True),
        "seqlen_q",
        f"got {2**31}",
    ),
}


def cases():
    for label, (kernels, problem, field, text) in REFUSED.items():
        for name in kernels:
            capability = kernels[name] if isinstance(kernels, dict) else problem.compute_capability
            yield pytest.param(
                name, replace(problem, compute_capability=capability), field, text, id=f"{name}: {label}"
            )


@pytest.mark.parametrize(("name", "problem", "field", "text"), list(cases()))
def test_what_cannot_be_done_is_refused_by_field_limit_and_value(name, problem, field, text):
    found = refused(name, problem)
    assert field in found, found
    got = problem.compute_capability
    lowest = BY_NAME[name].declarations[0].min_compute_capability
    text = text.replace("{min}", "".join(map(str, lowest))).replace("{got}", "".join(map(str, got or ())))
    assert text in found[field]


@pytest.mark.parametrize("name", BY_NAME)
def test_the_plain_problem_is_taken_by_all_of_them(name):
    assert not refused(name, PLAIN)
    assert not refused(name, replace(PLAIN, requires_grad=True))


#: What lies beside a refusal, and is taken.
TAKEN = {
    "the oldest device": ({"fa2": A100, "fa3": HOPPER, "fa4": HOPPER}, asked()),
    "the newest device": ({"fa2": (12, 1), "fa3": HOPPER, "fa4": THOR}, asked()),
    "the longest head_dim": (("fa2", "fa3", "fa4"), asked(head_dim=256, head_dim_v=256, requires_grad=True)),
    "the longest head_dim of values": (("fa3",), asked(head_dim_v=256, requires_grad=True)),
    "the longest head_dim of values, for heads of their own": (
        ("fa4",),
        asked(num_kv_heads=8, head_dim_v=192, requires_grad=True),
    ),
    "values that are longer than keys, by less": (("fa4",), asked(head_dim_v=192)),
    "values of an odd head_dim, without gradients": (("fa4",), asked(head_dim=128, head_dim_v=160)),
    "shared keys with values of another head_dim": (("fa3", "fa4"), asked(head_dim_v=128)),
    "shared keys with values of another head_dim in the backward of Blackwell": (
        {"fa4": B200},
        asked(head_dim_v=128, requires_grad=True),
    ),
    "causal, with the longest head_dim of Blackwell in the backward": (
        {"fa4": B200},
        asked(Causal("bottom-right"), head_dim=256, head_dim_v=256, requires_grad=True),
    ),
    "a window with the longest head_dim of Blackwell": (
        {"fa4": B200},
        asked(Window(9, 3, "bottom-right"), head_dim=256, head_dim_v=256),
    ),
    "the longest head_dim of values, without gradients": (("fa3",), asked(head_dim_v=512)),
    "head_dims of DeepSeek": ({"fa3": HOPPER, "fa4": B200}, asked(head_dim=192, head_dim_v=128, requires_grad=True)),
    "dropout": (("fa2",), asked(dropout_p=0.1, requires_grad=True)),
    "dropout with long head_dims, where there is memory": (
        {"fa2": A100},
        asked(head_dim=256, head_dim_v=256, dropout_p=0.1, requires_grad=True),
    ),
    "long head_dims without dropout, where there is little": (
        {"fa2": RTX_3090},
        asked(head_dim=256, head_dim_v=256, requires_grad=True),
    ),
    "a causal mask, where both corners are one": (("fa2", "fa3", "fa4"), asked(Causal("top-left"))),
    "a causal mask from the bottom right": (("fa2", "fa3", "fa4"), asked(Causal("bottom-right"), **UNEVEN)),
    "a window, where both corners are one": (("fa2", "fa3", "fa4"), asked(Window(9, 3, "top-left"))),
    "a window without a limit, of few more queries": (
        ("fa2",),
        asked(Window(9, None, "bottom-right"), seqlen_q=51, seqlen_kv=50),
    ),
    "a window without a limit, where there is no trap": (
        ("fa3", "fa4"),
        asked(Window(9, None, "bottom-right"), seqlen_q=128, seqlen_kv=50),
    ),
    "even documents from the top left": (
        ("fa2", "fa3", "fa4"),
        asked(Segments([60, 68], within=Causal("top-left")), requires_grad=True),
    ),
    "documents in a graph": (("fa2",), asked(Segments([60, 68]), compiling=True, requires_grad=True)),
    "ALiBi with causal documents": (
        ("fa2",),
        asked(ALiBi(8) + Segments([60, 68], within=Causal()), requires_grad=True),
    ),
    "small pages": (("fa3", "fa4"), asked(Paged(TABLE, [100, 128], 64), seqlen_q=1)),
    "large pages": (("fa2",), asked(Paged(TABLE, [100, 512], 256), seqlen_q=1, seqlen_kv=512)),
    "a bit-equal backward": (("fa2", "fa4"), asked(requires_grad=True, deterministic=True)),
    "the LSE": (("fa2", "fa3", "fa4"), asked(return_lse=True)),
    "the LSE of causal ALiBi": (("fa2",), asked(ALiBi(8) + Causal(), return_lse=True)),
}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        pytest.param(
            name,
            replace(
                problem, compute_capability=kernels[name] if isinstance(kernels, dict) else problem.compute_capability
            ),
            id=f"{name}: {label}",
        )
        for label, (kernels, problem) in TAKEN.items()
        for name in kernels
    ],
)
def test_what_lies_beside_a_refusal_is_taken(name, problem):
    assert not refused(name, problem)


def test_a_release_without_kernels_for_blackwell_says_which_has_them(tmp_path):
    with doubled(tmp_path / "old", "fa2", versions={"fa2": "2.7.2"}):
        found = refused("fa2", asked(compute_capability=B200))
        assert not refused("fa2", asked())
    assert "flash-attn 2.7.2 was released before" in found["compute_capability"]
    assert "they came with 2.7.3" in found["compute_capability"]


def test_a_later_release_has_gradients_of_any_length(tmp_path):
    long = REFUSED["gradients longer than 32 bits"][1]
    with doubled(tmp_path / "new", "fa2", versions={"fa2": "2.9.0"}):
        assert not refused("fa2", long)


LONGEST = {"head_dim": 256, "head_dim_v": 256}
#: (problem, field, what an older beta of FlashAttention-4 is said to lack).
LATER_IN_FA4 = {
    "a window with the longest head_dim of Blackwell": (
        asked(Window(9, 3, "bottom-right"), **LONGEST, compute_capability=B200),
        "bias",
        "takes no window with head_dim 256 in flash-attn-4 4.0.0b30; 4.0.0b34 does; got Window(9, 3",
    ),
    "a bit-equal backward with the longest head_dim of Blackwell": (
        asked(**LONGEST, compute_capability=B200, requires_grad=True, deterministic=True),
        "backward.deterministic",
        "has no deterministic backward with head_dim 256 in flash-attn-4 4.0.0b30",
    ),
    "a backward of the longest head_dim of Hopper": (
        asked(**LONGEST, requires_grad=True),
        "backward.head_dims",
        "takes no head_dim or head_dim_v above 192 in the backward of sm_90 in flash-attn-4 4.0.0b30",
    ),
}


@pytest.mark.parametrize(("problem", "field", "text"), LATER_IN_FA4.values(), ids=LATER_IN_FA4)
def test_what_came_with_a_later_beta_is_refused_of_an_older_one(tmp_path, problem, field, text):
    with doubled(tmp_path / "old", "fa4", versions={"fa4": "4.0.0b30"}):
        assert text in refused("fa4", problem)[field]
    with doubled(tmp_path / "new", "fa4", versions={"fa4": "4.0.0b34"}):
        assert not refused("fa4", problem)


@pytest.mark.parametrize("version", [VERSIONS["fa4"], "4.0.0b13"])
def test_what_is_publicly_known_to_be_wrong_of_flash_attention_4_is_refused_by_name(tmp_path, monkeypatch, version):
    from attn_core import known_bad

    monkeypatch.setattr(known_bad, "installed", lambda library: version if library == "flash-attn-4" else None)
    known_bad.rows_for.cache_clear()
    try:
        with registered():
            found = explain_problem(asked(head_dim=72, head_dim_v=72, requires_grad=True))
        verdict = next(each for each in found.verdicts if each.kernel == "flash/fa4")
        assert verdict.refused_fields == ("known_bad",)
        assert "https://github.com/Dao-AILab/flash-attention/pull/2896" in verdict.reasons[0]
    finally:
        known_bad.rows_for.cache_clear()
