"""NATTEN's kernels through the core, with a double of NATTEN in plain torch: what it is told, and what is refused.

The double runs on the CPU, so each kernel is declared there as it is declared for CUDA. What it is told is compared
with the core's own reference; what the real NATTEN makes of the same is compared in `test_kernels_real.py`.
"""

from __future__ import annotations

import inspect
import random
import sys
from dataclasses import replace
from pathlib import Path

import attn_natten
import pytest
import torch
from attn_core import (
    Causal,
    KernelRefusedError,
    Neighborhood,
    Problem,
    RelPosTable,
    Segments,
    Window,
    attention,
    explain,
    reference_attention,
)
from attn_core.conformance import check_kernel
from attn_natten.kernels import fmha, fna

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from natten_doubled import BY_NAME, doubled, on_the_cpu, registered

SEED = 20261121
OF_CUDA = (fna.CUTLASS, fna.HOPPER, fna.BLACKWELL, fmha.CUTLASS, fmha.HOPPER, fmha.BLACKWELL)
FNA = [kernel.name for kernel in fna.KERNELS]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
HALF_CLOSE = {"atol": 2e-2, "rtol": 2e-2}


@pytest.fixture
def natten(tmp_path):
    """The double, in place of NATTEN, with the kernels declared for the CPU."""
    with doubled(tmp_path), registered() as double:
        yield double


def operands(batch, seqlen, heads, kv_heads, dim, dim_v=None, dtype=torch.float32, seqlen_kv=None, seed=SEED):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((seqlen, heads, dim), (seqlen_kv or seqlen, kv_heads, dim), (seqlen_kv or seqlen, kv_heads, dim_v or dim))
    return [torch.randn(batch, *shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def drawn(rank, rng):
    """Extents and a neighborhood with something of everything, which NATTEN takes: no window of one key."""
    extents, kernel, stride, dilation, causal = [], [], [], [], []
    for _ in range(rank):
        extents.append(rng.randint(4, (24, 9, 6)[rank - 1]))
        dilation.append(rng.randint(1, extents[-1] // 2))
        kernel.append(rng.randint(2, extents[-1] // dilation[-1]))
        stride.append(rng.randint(1, kernel[-1]))
        causal.append(rng.random() < 0.4)
    return tuple(extents), Neighborhood(extents, kernel_size=kernel, stride=stride, dilation=dilation, is_causal=causal)


# What it is told


@pytest.mark.parametrize("seed", [SEED], ids="seed {}".format)
@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)
def test_neighborhoods_arrive_with_every_parameter_on_its_axis(natten, rank, seed):
    rng = random.Random(seed + rank)
    for number in range(15):
        extents, bias = drawn(rank, rng)
        kv_heads, dim_v = rng.choice((1, 2, 4)), rng.choice((8, 16))
        query, key, value = operands(2, torch.Size(extents).numel(), 4, kv_heads, 8, dim_v, seed=seed + number)
        out = attention(query, key, value, bias, kernel="natten/cutlass-fna")
        expected, _ = reference_attention(query, key, value, bias)
        torch.testing.assert_close(out.double(), expected, **CLOSE, msg=lambda text: f"{bias!r}: {text}")  # noqa: B023
        grad = torch.randn_like(out)
        ours = torch.autograd.grad(out, (query, key, value), grad)
        theirs = torch.autograd.grad(expected, (query, key, value), grad.double())
        for mine, right in zip(ours, theirs):
            torch.testing.assert_close(mine, right, **CLOSE)
    assert {call[1] for call in natten.calls} <= {"cutlass-fna", "cutlass-fmha"}


@pytest.mark.parametrize("name", FNA)
def test_each_kernel_asks_natten_for_the_backend_of_its_name(natten, name):
    dtype = torch.float32 if torch.float32 in BY_NAME[name].declarations[0].dtypes else torch.float16
    query, key, value = operands(1, 30, 2, 2, 32, dtype=dtype)
    bias = Neighborhood((5, 6), kernel_size=3, stride=(2, 1), dilation=(1, 2), is_causal=(True, False))
    with torch.no_grad():
        out = attention(query, key, value, bias, kernel=name)
    told = [(5, 3, 2, 1, True), (6, 3, 1, 2, False)]
    assert natten.calls == [("na2d", name.partition("/")[2], {"axes": told})]
    expected, _ = reference_attention(query, key, value, bias)
    torch.testing.assert_close(out.double(), expected, **(CLOSE if dtype is torch.float32 else HALF_CLOSE))


@pytest.mark.parametrize("kernel", [1, 7], ids=["window", "whole"])
@pytest.mark.parametrize("family", ["cutlass", "hopper", "blackwell"])
def test_a_causal_neighborhood_of_one_axis_is_one_for_natten_too(natten, family, kernel):
    query, key, value = operands(2, 7, 2, 2, 32, dtype=torch.bfloat16)
    bias = Neighborhood(7, kernel_size=7 if kernel == 7 else 3, is_causal=True)
    with torch.no_grad():
        out = attention(query, key, value, bias, kernel=f"natten/{family}-fna")
    function, backend, options = natten.calls[-1]
    if kernel == 7:
        assert (function, backend, options) == ("attention", f"{family}-fmha", {"is_causal": True, "varlen": False})
    else:
        assert (function, backend, options) == ("na1d", f"{family}-fna", {"axes": [(7, 3, 1, 1, True)]})
    torch.testing.assert_close(out.double(), reference_attention(query, key, value, bias)[0], **HALF_CLOSE)


@pytest.mark.parametrize("name", ["natten/cutlass-fna", "natten/flex-fna"])
def test_a_window_over_the_whole_grid_is_dense_attention_of_the_same_family(natten, name):
    query, key, value = operands(2, 12, 2, 2, 16)
    with torch.no_grad():
        out, lse = attention(query, key, value, Neighborhood((3, 4), kernel_size=(3, 4)), return_lse=True, kernel=name)
    assert [call[:2] for call in natten.calls] == [("attention", name.partition("/")[2].replace("fna", "fmha"))]
    expected, expected_lse = reference_attention(query, key, value)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    torch.testing.assert_close(lse.double(), expected_lse, **CLOSE)


@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)
def test_the_lse_comes_heads_first_in_float32(natten, rank):
    extents = ((9,), (4, 5), (3, 4, 2))[rank - 1]
    query, key, value = operands(2, torch.Size(extents).numel(), 4, 2, 8)
    bias = Neighborhood(extents, kernel_size=2)
    with torch.no_grad():
        out, lse = attention(query, key, value, bias, return_lse=True, kernel="natten/cutlass-fna")
    assert (lse.shape, lse.dtype) == ((2, 4, query.shape[1]), torch.float32)
    expected, expected_lse = reference_attention(query, key, value, bias)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    torch.testing.assert_close(lse.double(), expected_lse, **CLOSE)


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (6, 6)], ids="{0[0]} x {0[1]}".format)
def test_causal_attention_starts_at_the_top_left(natten, lengths):
    query, key, value = operands(2, lengths[0], 4, 2, 8, 16, seqlen_kv=lengths[1])
    with torch.no_grad():
        out, lse = attention(query, key, value, Causal("top-left"), return_lse=True, kernel="natten/cutlass-fmha")
    assert natten.calls == [("attention", "cutlass-fmha", {"is_causal": True, "varlen": False})]
    expected, expected_lse = reference_attention(query, key, value, Causal("top-left"))
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    torch.testing.assert_close(lse.double(), expected_lse, **CLOSE)


@pytest.mark.parametrize("within", [None, Causal("top-left")], ids=["whole", "causal"])
@pytest.mark.parametrize("batch", [1, 3])
def test_documents_are_packed_into_one_batch_entry(natten, batch, within):
    bias = Segments([3, 1, 5], [2, 4, 5], within=within)
    query, key, value = operands(batch, 9, 4, 2, 8, seqlen_kv=11)
    out = attention(query, key, value, bias, kernel="natten/cutlass-fmha")
    assert natten.calls == [("attention", "cutlass-fmha", {"is_causal": within is not None, "varlen": True})]
    expected, expected_lse = reference_attention(query, key, value, bias)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    grad = torch.randn_like(out)
    for mine, right in zip(
        torch.autograd.grad(out, (query, key, value), grad),
        torch.autograd.grad(expected, (query, key, value), grad.double()),
    ):
        torch.testing.assert_close(mine, right, **CLOSE)
    with torch.no_grad():
        _, lse = attention(query, key, value, bias, return_lse=True, kernel="natten/cutlass-fmha")
    torch.testing.assert_close(lse.double(), expected_lse, **CLOSE)


def test_documents_first_seen_in_inference_mode_can_be_trained_on_later(natten):
    bias = Segments([3, 4])
    query, key, value = operands(1, 7, 2, 2, 8)
    with torch.inference_mode():
        attention(query, key, value, bias, kernel="natten/cutlass-fmha")
    attention(query, key, value, bias, kernel="natten/cutlass-fmha").sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("name", ["natten/cutlass-fna", "natten/cutlass-fmha"])
def test_it_can_be_part_of_a_graph_whatever_the_lengths(natten, name):
    def call(query, key, value):
        return attention(query, key, value, Causal("top-left"), kernel=name)

    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    for seqlen in (6, 9):
        query, key, value = operands(2, seqlen, 2, 1, 8)
        torch.testing.assert_close(compiled(query, key, value), call(query, key, value))


def test_a_neighborhood_can_be_part_of_a_graph(natten):
    bias = Neighborhood((4, 5), kernel_size=(3, 2), is_causal=(False, True))
    compiled = torch.compile(
        lambda *x: attention(*x, bias, kernel="natten/cutlass-fna"), fullgraph=True, backend="eager"
    )
    query, key, value = operands(2, 20, 2, 2, 8)
    expected, _ = reference_attention(query, key, value, bias)
    torch.testing.assert_close(compiled(query, key, value).double(), expected, **CLOSE)


# The front end, over them


@pytest.mark.parametrize("kernel_size", [3, (4, 5)], ids=["window", "whole"])
def test_the_front_end_hands_a_backend_of_natten_to_its_kernel(natten, kernel_size):
    query, key, value = (torch.randn(2, 4, 5, 4, 8) for _ in range(3))
    out, lse = attn_natten.na2d(query, key, value, kernel_size, backend="cutlass-fna", return_lse=True)
    assert [call[1] for call in natten.calls] == ["cutlass-fna" if kernel_size == 3 else "cutlass-fmha"]
    expected, expected_lse = attn_natten.na2d(query, key, value, kernel_size, backend="torch/tiled", return_lse=True)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)


def test_the_front_end_adds_keys_by_natten_too(natten):
    query, key, value = (torch.randn(2, 4, 5, 4, 8) for _ in range(3))
    more = dict(zip(("additional_keys", "additional_values"), torch.randn(2, 2, 7, 4, 8)))
    options = {"backend": "cutlass-fna", "attention_kwargs": {"backend": "cutlass-fmha"}}
    out = attn_natten.na2d(query, key, value, 3, **more, **options)
    assert [call[1] for call in natten.calls] == ["cutlass-fna", "cutlass-fmha"]
    torch.testing.assert_close(out, attn_natten.na2d(query, key, value, 3, **more), **CLOSE)


def test_the_front_end_raises_the_reasons_of_a_kernel_that_refuses(natten):
    query, key, value = (torch.randn(2, 4, 5, 4, 8, requires_grad=True) for _ in range(3))
    more = dict(zip(("additional_keys", "additional_values"), torch.randn(2, 2, 7, 4, 8)))
    with pytest.raises(KernelRefusedError, match="lse_grad: does not differentiate through the LSE"):
        attn_natten.na2d(query, key, value, 3, **more, backend="cutlass-fna")
    with pytest.raises(KernelRefusedError, match="backward: has no backward, and a gradient is needed"):
        attn_natten.na2d(query, key, value, 3, backend="flex-fna")


# What is refused


def problem(**changes):
    """A problem that natten/cutlass-fna and -fmha take on the CPU, changed."""
    plain = {
        "batch": 1,
        "seqlen_q": 12,
        "seqlen_kv": 12,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 32,
        "head_dim_v": 32,
        "dtype": torch.float16,
        "device": "cpu",
        "scale": 0.1,
    }
    made = Problem(**(plain | changes))
    if made.bias is not None:
        made = replace(made, bias=made.bias.bind(made.seqlen_q, made.seqlen_kv).normalize())
    return made


def reasons(name, **changes):
    """The refusals of that kernel, declared for the CPU."""
    return {each.field: each.message for each in on_the_cpu(BY_NAME[name]).refusals(problem(**changes))}


@pytest.mark.parametrize("name", [kernel.name for kernel in OF_CUDA])
def test_the_plain_problem_is_taken(natten, name):
    assert reasons(name) == {}


NEAR = Neighborhood((3, 4), kernel_size=3)


@pytest.mark.parametrize(
    ("name", "field", "changes"),
    [
        ("natten/cutlass-fna", "bias", {"bias": Neighborhood((3, 4), kernel_size=(1, 3))}),
        ("natten/cutlass-fna", "bias", {"bias": Window(3, 2)}),
        ("natten/cutlass-fna", "bias", {"bias": Window(0, 0)}),
        ("natten/cutlass-fna", "bias", {"bias": Window(None, 2)}),
        ("natten/cutlass-fna", "bias", {"bias": Segments([6, 6])}),
        ("natten/cutlass-fna", "bias", {"bias": NEAR + RelPosTable(torch.zeros(4, 5, 5), (3, 4))}),
        ("natten/cutlass-fna", "seqlen_kv", {"seqlen_kv": 11}),
        ("natten/cutlass-fna", "seqlen_kv", {"seqlen_q": 9, "bias": Causal("top-left")}),
        ("natten/cutlass-fna", "seqlen_kv", {"seqlen_q": 1, "seqlen_kv": 1}),
        ("natten/flex-fna", "bias", {"bias": Causal("top-left")}),
        ("natten/cutlass-fna", "scale", {"scale": 0.0}),
        ("natten/cutlass-fna", "scale", {"scale": -0.1}),
        ("natten/flex-fna", "scale", {"scale": 0.0}),
        ("natten/cutlass-fmha", "bias", {"bias": NEAR}),
        ("natten/cutlass-fmha", "bias", {"bias": Window(3, 0)}),
        ("natten/cutlass-fmha", "bias", {"seqlen_kv": 13, "bias": Causal("bottom-right")}),
        ("natten/cutlass-fmha", "bias", {"bias": Segments([6, 6], [5, 5], starts_kv=[0, 7])}),
        ("natten/cutlass-fmha", "bias", {"bias": Segments([5, 7], [12, 0])}),
        ("natten/cutlass-fmha", "bias", {"bias": Segments([12, 0], [5, 7])}),
        ("natten/cutlass-fmha", "bias", {"bias": Segments([6, 6], within=Window(2, 0))}),
        ("natten/cutlass-fmha", "bias", {"bias": Segments([5, 7], [6, 6], within=Causal("bottom-right"))}),
        ("natten/cutlass-fmha", "compiling", {"bias": Segments([6, 6]), "compiling": True}),
        ("natten/flex-fmha", "bias", {"bias": Causal("top-left")}),
        ("natten/flex-fna", "compiling", {"compiling": True}),
        ("natten/cutlass-fna", "lse_grad", {"requires_grad": True, "return_lse": True}),
        ("natten/hopper-fna", "backward.head_dims", {"requires_grad": True, "head_dim": 256, "head_dim_v": 256}),
        ("natten/hopper-fna", "backward.deterministic", {"requires_grad": True, "deterministic": True}),
        ("natten/hopper-fmha", "backward.deterministic", {"requires_grad": True, "deterministic": True}),
        ("natten/blackwell-fna", "backward.deterministic", {"requires_grad": True, "deterministic": True}),
        ("natten/hopper-fna", "head_dim_v", {"head_dim_v": 64}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_what_natten_has_no_words_for_is_refused_by_field(natten, name, field, changes):
    found = reasons(name, **changes)
    assert field in found
    assert found[field].strip()


@pytest.mark.parametrize("name", ["natten/cutlass-fna", "natten/cutlass-fmha", "natten/blackwell-fmha"])
def test_a_deterministic_backward_is_taken_where_natten_has_one(natten, name):
    assert reasons(name, requires_grad=True, deterministic=True) == {}


def test_documents_that_end_where_they_begin_alike_are_causal_from_either_corner(natten):
    bias = Segments([5, 7], within=Causal("bottom-right"))
    assert reasons("natten/cutlass-fmha", bias=bias) == {}


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)], ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("name", ["natten/cutlass-fna", "natten/cutlass-fmha"])
def test_bfloat16_is_refused_before_sm_80(natten, name, capability):
    asked = problem(device="cuda", compute_capability=capability, dtype=torch.bfloat16)
    assert [each.field for each in BY_NAME[name].refusals(asked)] == ["dtype"]
    assert BY_NAME[name].refusals(replace(asked, dtype=torch.float16)) == []
    assert BY_NAME[name].refusals(replace(asked, compute_capability=(8, 0))) == []


@pytest.mark.parametrize(
    ("name", "taken", "older", "newer"),
    [
        ("natten/cutlass-fna", [(6, 0), (8, 9), (9, 0), (12, 1)], [(5, 2)], [(13, 0)]),
        ("natten/hopper-fna", [(9, 0)], [(8, 9)], [(10, 0), (12, 0)]),
        ("natten/blackwell-fmha", [(10, 0), (10, 3)], [(9, 0)], [(11, 0), (12, 0)]),
    ],
    ids=["cutlass", "hopper", "blackwell"],
)
def test_each_has_the_gpus_that_it_is_built_for(natten, name, taken, older, newer):
    def told(capability):
        refused = BY_NAME[name].refusals(problem(device="cuda", compute_capability=capability))
        return " ".join(map(str, refused))

    assert [told(capability) for capability in taken] == [""] * len(taken)
    assert all("or newer, got sm_" in told(capability) for capability in older)
    assert all("newer than known" in told(capability) for capability in newer)


def test_an_error_names_the_kernel_and_what_it_takes(natten):
    query, key, value = operands(1, 12, 2, 2, 8)
    bias = Neighborhood((3, 4), kernel_size=(1, 3))
    with pytest.raises(KernelRefusedError, match=r"'natten/cutlass-fna' refuses.*\n.*2 and more keys on every axis"):
        attention(query, key, value, bias, kernel="natten/cutlass-fna")


# NATTEN's own word


SAYS = {
    "num_kv_heads": ({"num_kv_heads": 2}, lambda q, k, v, o: "no GQA" if q.shape[-2] != k.shape[-2] else None),
    "head_dim_v": ({"head_dim_v": 64}, lambda q, k, v, o: "one dim" if q.shape[-1] != v.shape[-1] else None),
    "backward": ({"requires_grad": True}, lambda q, k, v, o: "no training" if q.requires_grad else None),
    "dtype": ({"dtype": torch.bfloat16}, lambda q, k, v, o: "no bf16" if q.dtype is torch.bfloat16 else None),
    "head_dim": ({"head_dim": 40, "head_dim_v": 40}, lambda q, k, v, o: "odd" if q.shape[-1] == 40 else None),
    "natten": ({}, lambda q, k, v, o: "not today"),
}


@pytest.mark.parametrize("field", SAYS)
def test_a_no_of_natten_is_a_refusal_by_the_field_that_it_is_about(natten, field):
    changes, says = SAYS[field]
    natten.backends.REFUSES["can_run_cutlass_fna"] = says
    found = reasons("natten/cutlass-fna", bias=NEAR, **changes)
    assert list(found) == [field]
    assert found[field].startswith("NATTEN says: ")
    if field != "natten":
        assert reasons("natten/cutlass-fna", bias=NEAR) == {}


@pytest.mark.parametrize(
    ("bias", "option"),
    [(Causal("top-left"), "is_causal"), (Segments([6, 6]), "is_varlen")],
    ids=["causal", "documents"],
)
def test_a_no_to_a_mask_is_about_the_bias(natten, bias, option):
    natten.backends.REFUSES["can_run_cutlass_hopper_fmha"] = lambda q, k, v, o: "no mask" if o[option] else None
    assert reasons("natten/hopper-fmha", bias=bias) == {"bias": "NATTEN says: no mask"}
    assert reasons("natten/hopper-fmha") == {}


def test_a_window_over_the_whole_sequence_asks_for_the_dense_kernel_that_runs_it(natten):
    natten.backends.REFUSES["can_run_cutlass_hopper_fmha"] = lambda q, k, v, o: "no mask" if o["is_causal"] else None
    assert list(reasons("natten/hopper-fna", bias=Neighborhood(12, kernel_size=12, is_causal=True))) == ["bias"]
    assert reasons("natten/hopper-fna", bias=Neighborhood(12, kernel_size=11, is_causal=True)) == {}


def test_predicates_see_the_rank_and_the_sizes_of_the_problem(natten):
    seen = []
    natten.backends.REFUSES["can_run_cutlass_fna"] = lambda q, k, v, o: seen.append(
        (q.dim(), q.shape[-2:], k.shape[-2:], v.shape[-2:], q.dtype, q.device.type, q.requires_grad, q.is_nested)
    )
    bias = Neighborhood((2, 3, 2), kernel_size=2)
    reasons("natten/cutlass-fna", bias=bias, num_kv_heads=2, head_dim_v=48, requires_grad=True)
    assert seen == [(6, (4, 32), (2, 32), (2, 48), torch.float16, "cpu", True, False)]


def test_a_problem_of_another_machine_is_judged_by_the_declaration_alone(natten):
    natten.backends.REFUSES["can_run_cutlass_fna"] = lambda q, k, v, o: "not on this machine"
    asked = problem(device="cuda", compute_capability=(8, 0), bias=NEAR)
    if not torch.cuda.is_available():
        assert BY_NAME["natten/cutlass-fna"].refusals(asked) == []


def test_where_natten_repeats_no_heads_the_core_does(natten):
    natten.backends.REFUSES["can_run_cutlass_fna"] = SAYS["num_kv_heads"][1]
    query, key, value = operands(1, 12, 4, 2, 8)
    out = attention(query, key, value, NEAR, kernel="natten/cutlass-fna")
    torch.testing.assert_close(out.double(), reference_attention(query, key, value, NEAR)[0], **CLOSE)


def without(function, parameter):
    """Gives a function the signature of an older one, which lacks that parameter."""
    signature = inspect.signature(function)
    function.__signature__ = signature.replace(
        parameters=[each for each in signature.parameters.values() if each.name != parameter]
    )


@pytest.mark.parametrize(
    ("name", "asked", "field"),
    [
        ("natten/cutlass-fna", {"return_lse": True}, "return_lse"),
        ("natten/cutlass-fna", {"requires_grad": True, "deterministic": True}, "backward.deterministic"),
        ("natten/cutlass-fmha", {"bias": Causal("top-left")}, "bias"),
        ("natten/cutlass-fmha", {"bias": Segments([6, 6])}, "bias"),
    ],
    ids=["no lse", "no deterministic backward", "no causal", "no documents"],
)
def test_older_releases_of_0_21_say_what_they_lack(tmp_path, name, asked, field):
    with doubled(tmp_path, version="0.21.1"), registered() as natten:
        without(natten.na2d, "return_lse")
        natten.backends.can_run_cutlass_fmha = lambda query, key, value, raise_error=False: True
        plain = {"bias": NEAR} if name.endswith("fna") else {}
        assert reasons(name, **plain) == {}
        found = reasons(name, **plain | asked)
        assert list(found) == [field]
        assert "natten 0.21.1" in found[field]


def test_kernels_that_are_no_ops_of_torch_are_not_for_graphs(natten):
    from natten.utils import environment

    assert reasons("natten/cutlass-fna", compiling=True) == {}
    environment.DISABLE_TORCH_OPS = True
    assert list(reasons("natten/cutlass-fna", compiling=True)) == ["compiling"]


# What it costs


def test_a_window_costs_the_tiles_that_it_meets():
    def visited(bias, seqlen=4096):
        asked = problem(device="cuda", compute_capability=(9, 0), seqlen_q=seqlen, seqlen_kv=seqlen, bias=bias)
        return fna.HOPPER.work(asked).pairs / seqlen

    assert visited(None) == 4096
    assert visited(Neighborhood(4096, kernel_size=9)) == 9 + 2 * 64 - 2
    assert visited(Neighborhood((64, 64), kernel_size=9)) == (9 + 2 * 8 - 2) ** 2
    assert visited(Neighborhood((16, 16, 16), kernel_size=3)) == (3 + 2 * 4 - 2) ** 3
    assert visited(Neighborhood((64, 64), kernel_size=(63, 9))) == 64 * 23  # no more than there are
    assert visited(Neighborhood((64, 64), kernel_size=9, dilation=2)) == 23**2
    assert visited(Neighborhood(4096, kernel_size=9, is_causal=True)) == 9 + 2 * 64 - 2


def test_flex_takes_longer_on_the_cpu_than_what_it_calls(natten):
    query, key, value = operands(1, 1024, 2, 2, 32)
    with torch.no_grad():
        verdicts = explain(query, key, value, Neighborhood((32, 32), kernel_size=7)).verdicts
    seconds = {each.kernel: each.seconds for each in verdicts}
    assert seconds["torch/tiled"] < seconds["torch/flex"] < seconds["natten/flex-fna"]


# The conformance kit, on the double; all of it is run by `every_check_on_the_double.py`


@pytest.mark.parametrize("name", BY_NAME)
def test_declarations_are_honest(natten, name):
    for check in ("takes_what_it_claims", "refuses_what_it_does_not_claim", "its_reasons_can_be_read"):
        assert_passes(name, check)


@pytest.mark.parametrize("name", ["natten/cutlass-fna", "natten/hopper-fna", "natten/cutlass-fmha", "natten/flex-fna"])
def test_results_are_those_of_the_contract_whatever_the_strides(natten, name):
    for check in ("returns_what_was_asked_for", "reads_only_its_operands"):
        assert_passes(name, check)


def assert_passes(name, check):
    results = check_kernel(name, only=check)
    failed = [str(result) for result in results if not result]
    assert not failed, "\n".join(failed)
    assert any(result.status == "passed" for result in results)
