"""The real xFormers 0.0.35: what its operators say is what the adapter says, and what the documents say.

None of its operators runs on a CPU. They can be asked all the same: of a device that is not there, with tensors that
have no data. `nox -s xformers` installs it, without its dependencies.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attn_core import Cached, Causal, KeyPadding, Problem, Segments, TensorBias, Window, no_cuda
from attn_core.bias import AttnBias
from attn_core.conformance import check_kernel
from attn_xformers import library
from attn_xformers.kernels import KERNELS, asked, limits, operands, reasons
from attn_xformers.kernels import forms as all_forms
from attn_xformers.kernels.operators import OPERATORS, Pair

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import operators_table
from a_gpu import a_gpu
from xformers_here import IS_REAL, registry_of_the_plugin

pytestmark = pytest.mark.skipif(not IS_REAL, reason="xFormers is not installed; nox -s xformers has it")

SEED = 20261121
BY_NAME = {kernel.name.partition("/")[2]: kernel for kernel in KERNELS}
OF_NAME = {operator.name: operator for operator in OPERATORS}
CAPABILITIES = ((6, 0), (7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))
DIMS = (4, 8, 12, 16, 20, 32, 40, 48, 64, 72, 96, 100, 128, 136, 160, 192, 224, 256, 257, 264, 512, 520, 1024)
DTYPES = (*[torch.float16] * 4, torch.bfloat16, torch.bfloat16, torch.float32, torch.float64)
#: Problems for each kernel, so that there are more than 20,000 in all.
EACH = 3000
CUDA = torch.device("cuda", 0)


def test_there_is_a_kernel_for_each_forward_operator_that_xformers_registers(fmha):
    from xformers.ops.common import OPERATORS_REGISTRY

    registered = {each for each in OPERATORS_REGISTRY if issubclass(each, fmha.AttentionFwOpBase)}
    assert registered - {operator.pair().forward for operator in OPERATORS} == set()
    assert len({operator.pair().forward for operator in OPERATORS}) == len(OPERATORS)


def test_forward_and_backward_operators_go_together(fmha):
    for operator in OPERATORS:
        pair = operator.pair()
        if pair.backward is not None:
            assert pair.backward.VARLEN_LSE_PACKED == pair.forward.VARLEN_LSE_PACKED, operator.name
            assert set(pair.backward.SUPPORTED_ATTN_BIAS_TYPES) <= set(pair.forward.SUPPORTED_ATTN_BIAS_TYPES)
            assert pair.backward.SUPPORTED_DTYPES == pair.forward.SUPPORTED_DTYPES, operator.name


def test_on_this_machine_without_cuda_each_kernel_says_why(fmha):
    if no_cuda() is None:
        pytest.skip("there is a CUDA device")
    registry = registry_of_the_plugin()
    for kernel in registry.kernels():
        condition = registry.condition(kernel)
        assert condition.state == "unavailable", kernel.name
        told = ("is not built", "cannot be loaded beside torch", no_cuda().reason)
        assert any(text in condition.reason for text in told), condition.reason


def test_a_flash_attn_without_its_extension_breaks_it_and_that_is_said(tmp_path):
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("from flash_attn import flash_attn_interface\n", encoding="utf-8")
    (package / "flash_attn_interface.py").write_text("import flash_attn_2_cuda as flash_attn_cuda\n", encoding="utf-8")
    asked_of_it = """
from attn_xformers.kernels import KERNELS
from attn_core.registry import registry
for kernel in KERNELS:
    condition = registry.condition(kernel)
    print(condition.state, "|", condition.reason)
"""
    paths = [str(tmp_path), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [sys.executable, "-W", "ignore", "-c", asked_of_it]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(KERNELS)
    for line in lines:
        assert line.startswith("broken | ")
        assert "raises ModuleNotFoundError: No module named 'flash_attn_2_cuda'" in line
        assert "flash-attn is installed and broken" in line


def test_the_documented_tables_are_what_the_class_attributes_say(fmha):
    text = operators_table.PAGE.read_text(encoding="utf-8")
    command = "python plugins/attn-xformers/tests/operators_table.py"
    assert operators_table.written(text) == text, f"docs/reference/xformers.md is out of step: run `{command}`"


@pytest.mark.parametrize(
    ("name", "capability", "told"),
    [
        ("cutlass", (12, 0), "compute_capability: is known to work up to sm_90; sm_120 is newer than known"),
        ("flash", (7, 5), "compute_capability: takes sm_80 or newer, got sm_75"),
        ("cutlass-blackwell", (9, 0), "compute_capability: takes sm_100 or newer, got sm_90"),
    ],
)
def test_a_gpu_that_is_too_old_or_newer_than_known_is_refused_with_both_numbers(fmha, name, capability, told):
    problem = Problem(
        batch=1, seqlen_q=64, seqlen_kv=64, num_heads=2, num_kv_heads=2, head_dim=64, head_dim_v=64, device="cuda",
        dtype=torch.float16, scale=0.125, compute_capability=capability,
    )  # fmt: skip
    with a_gpu(capability):
        assert [str(refusal) for refusal in BY_NAME[name].refusals(problem)] == [told]


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_declared_for_a_gpu_is_taken_there_and_the_rest_refused_by_its_field(fmha, name):
    """The conformance kit's questions to the real operators; no call is made."""
    low = max((8, 0), tuple(OF_NAME[name].pair().forward.CUDA_MINIMUM_COMPUTE_CAPABILITY))
    with a_gpu(low):
        for check in ("takes_what_it_claims", "refuses_what_it_does_not_claim", "its_reasons_can_be_read"):
            [result] = check_kernel(BY_NAME[name], device="cuda", only=check)
            if name == "ck-splitk" and check == "takes_what_it_claims":  # both with one query alone, which is not tried
                assert len(result.reason.splitlines()) == 2
                assert "gqa is declared" in result.reason
                assert 'biases: Causal("bottom-right") is declared' in result.reason
            else:
                assert result.status == "passed", str(result)


# The sweep


def drawn_bias(rng: random.Random, p: Problem, pair: Pair) -> AttnBias | None:
    """A bound bias, normalized and without data, as a kernel sees it."""
    corner = rng.choice(("top-left", "bottom-right"))
    sides = rng.choice(((3, 0), (0, 0), (2, 1), (None, 2), (5, None), (200, 0)))
    kind = rng.choice(
        ("none", "none", "causal", "window", "padding", "cached", "documents", "documents", "tensor", "sum")
    )
    sizes = (1, p.seqlen_q, p.seqlen_kv), (p.batch, 1, 1, p.seqlen_kv), (p.batch, p.num_heads, p.seqlen_q, p.seqlen_kv)
    tensor = torch.empty(rng.choice(sizes), dtype=rng.choice((torch.bool, p.dtype)), device="meta")
    made: AttnBias | None = None
    if kind == "causal":
        made = Causal(corner)
    elif kind == "window":
        made = Window(*sides, corner)
    elif kind == "padding":
        made = KeyPadding(torch.empty(p.batch, dtype=torch.int32, device="meta"))
    elif kind == "cached":
        within = Causal("bottom-right") if rng.random() < 0.5 else Window(*sides, "bottom-right")
        made = Cached(torch.empty(p.batch, dtype=torch.int32, device="meta"), within=within)
    elif kind == "documents":
        made = documents(rng, p, corner)
    elif kind == "tensor":
        trained = p.requires_grad and tensor.dtype is not torch.bool and rng.random() < 0.5
        made = TensorBias(tensor.requires_grad_(trained))
    elif kind == "sum":
        made = TensorBias(torch.empty(sizes[0], dtype=p.dtype, device="meta")) + Causal("top-left")
    bound = None if made is None else made.bind(p.seqlen_q, p.seqlen_kv).normalize()
    if bound is not None and bound.has_padding and not pair.manners.never_reads_padding:
        bound = bound.without_padding()
    return bound


def documents(rng: random.Random, p: Problem, corner: str) -> Segments:
    def parts(total: int, number: int) -> list[int]:
        cuts = sorted(rng.randint(0, total) for _ in range(number - 1))
        return [end - start for start, end in zip([0, *cuts], [*cuts, total])]

    number = rng.randint(1, 3)
    within = rng.choice((None, Causal(corner), Window(rng.randint(0, 6), 0, corner)))
    of_q = parts(p.seqlen_q, number)
    if p.seqlen_q == p.seqlen_kv and rng.random() < 0.5:
        return Segments(of_q, within=within)
    of_kv = parts(p.seqlen_kv, number)
    if rng.random() < 0.3 and of_kv[-1]:
        starts = [sum(of_kv[:i]) for i in range(number)]
        return Segments(of_q, [*of_kv[:-1], of_kv[-1] - 1], within=within, starts_kv=starts)
    return Segments(of_q, of_kv, within=within)


def drawn(rng: random.Random, pair: Pair, capability: tuple[int, int], deterministic: bool) -> Problem:
    seqlen_q, seqlen_kv = rng.choice(((64, 64), (64, 64), (128, 128), (1, 96), (5, 40), (17, 64), (40, 24), (9, 13)))
    heads, kv_heads = rng.choice(((4, 4), (4, 4), (4, 2), (6, 1), (1, 1)))
    dim = rng.choice((64, 128) if rng.random() < 0.6 else DIMS)
    problem = Problem(
        batch=rng.choice((1, 2, 3)),
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        head_dim_v=dim if rng.random() < 0.9 else rng.choice(DIMS),
        dtype=rng.choice(DTYPES),
        device="cuda",
        compute_capability=capability,
        scale=float(dim**-0.5) if rng.random() < 0.9 else rng.choice((0.3, 1.0, 0.0)),
        dropout_p=0.1 if rng.random() < 0.1 else 0.0,
        requires_grad=pair.backward is not None and rng.random() < 0.5,
        deterministic=deterministic,
    )
    bias = drawn_bias(rng, problem, pair)
    return replace(problem, bias=bias, bias_requires_grad=bias is not None and bias.requires_grad)


def against(operator, inputs) -> list[str]:
    """What an operator has against these operands; cutlass looks up how wide a dtype is, and raises for float64."""
    try:
        return operator.not_supported_reasons(inputs)
    except KeyError as error:
        return [f"KeyError: {error}"]


def said_by_operators(pair: Pair, problem: Problem) -> dict[str, list[str]]:
    """The operators' own word: what they have against each form of the bias; they take what they have nothing against.

    The operands are those of a call, in all but data: made by the code that makes them for one, of tensors without
    data, and checked by xFormers as in one; then they are said to lie on a GPU.
    """
    p, said = problem, {}
    shapes = (p.seqlen_q, p.num_heads, p.head_dim), (p.seqlen_kv, p.num_kv_heads, p.head_dim)
    shapes = (*shapes, (p.seqlen_kv, p.num_kv_heads, p.head_dim_v))
    query, key, value = (torch.empty(p.batch, *shape, dtype=p.dtype, device="meta") for shape in shapes)
    scale = asked.scale_of(p.scale, p.head_dim)
    for form in all_forms.forms(p.bias, p.batch, p.seqlen_q, p.seqlen_kv):
        if form.kind == all_forms.NO_BIAS and pair.manners.needs_lengths:
            continue  # it says yes, and raises
        if form.instead_of_tensor and torch.Tensor in pair.forward.SUPPORTED_ATTN_BIAS_TYPES:
            continue  # it gets a tensor
        try:
            form.made(query.device)
        except (ValueError, RuntimeError):
            continue  # xFormers has no such object
        sent = operands.sent(query, key, value, form)
        on_gpu = [asked.StandIn(tuple(x.shape), x.dtype, CUDA, x.stride()) for x in (sent.query, sent.key, sent.value)]
        inputs = library.XFORMERS.module().Inputs(*on_gpu, asked.on(CUDA, sent.attn_bias), p.dropout_p, scale)
        inputs.validate_inputs()
        asked_of = (pair.forward, pair.backward) if p.needs_backward else (pair.forward,)
        said[form.kind] = [reason for operator in asked_of for reason in against(operator, inputs)]
    return said


@pytest.mark.parametrize("seed", [SEED], ids="seed {}".format)
@pytest.mark.parametrize("name", BY_NAME)
def test_the_adapter_takes_what_the_operators_take_and_refuses_what_they_refuse(fmha, name, seed):
    rng, kernel, verdicts = random.Random(f"{seed} {name}"), BY_NAME[name], Counter()
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            for capability in CAPABILITIES:
                with a_gpu(capability) as pairs:
                    pair = pairs[name]
                    for _ in range(EACH // (2 * len(CAPABILITIES)) + 1):
                        problem = drawn(rng, pair, capability, deterministic)
                        found = kernel.refusals(problem)
                        own = list(limits.refusals(problem, pair.manners))
                        said = said_by_operators(pair, problem)
                        yes = any(not each for each in said.values())
                        told = "\n".join([f"seed {seed}: {problem}", *map(str, found), f"operators: {said}"])
                        assert (not found) == (yes and not own), told
                        assert reasons.UNKNOWN not in {refusal.field for refusal in found}, told
                        assert "refuse" not in {refusal.field for refusal in found}, told
                        verdicts["taken" if not found else "own limits" if yes else "refused"] += 1
    finally:
        torch.use_deterministic_algorithms(before)
    print(f"{name}: {dict(verdicts)}")  # noqa: T201
    assert sum(verdicts.values()) >= EACH
    assert verdicts["taken"] > 20
