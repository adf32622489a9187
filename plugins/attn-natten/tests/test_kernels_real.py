"""With a real NATTEN 0.21: its own answers beside ours, its kernels beside what is declared, its signatures.

It is no dependency: its sdist installs in seconds where there is no CUDA, as a package without its CUDA kernels. `nox
-s natten` does that and runs these tests; everywhere else they are skipped.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import random
import sys
from dataclasses import replace
from pathlib import Path

import attn_natten
import pytest
import torch
from attn_core import Neighborhood, Problem, Segments, attention, record, reference_attention
from attn_core.bias import Causal
from attn_core.conformance import check_kernel
from attn_core.registry import registry
from attn_natten import library
from attn_natten.kernels import fmha, fna

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from natten_doubled import DOUBLE

IS_THERE = importlib.util.find_spec("natten") is not None and library.NATTEN.is_supported(
    library.NATTEN.distributed() or ""
)
pytestmark = [
    pytest.mark.skipif(not IS_THERE, reason="NATTEN 0.21 is not installed: nox -s natten"),
    pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]

SEED = 20261121
PROBLEMS = 120  #: of each rank
CLOSE = {"atol": 1e-5, "rtol": 0.0}
each_rank = pytest.mark.parametrize("rank", [1, 2, 3], ids="{}-D".format)
with_the_seed = pytest.mark.parametrize("seed", [SEED], ids="seed {}".format)


@pytest.fixture(scope="module")
def natten():
    return library.NATTEN.module()


@pytest.fixture(autouse=True)
def without_tracing():
    """FlexAttention traces its own unfused form anew for each mask, which takes seconds; its numbers are the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def kernels_are_there():
    """Registers the kernels of the plugin, where it is on the path but not installed."""
    there = {kernel.name for kernel in registry.kernels("natten/*")}
    handles = [registry.register(kernel) for kernel in (*fna.KERNELS, *fmha.KERNELS) if kernel.name not in there]
    yield
    for handle in handles:
        handle.unregister()


def drawn(rank, rng):
    """(extents, arguments) of a problem that NATTEN takes on the CPU: stride, dilation and causal on each axis.

    A causal window over a whole line is dense causal attention to NATTEN, which it does not have there.
    """
    extents, arguments = [], {"kernel_size": [], "stride": [], "dilation": [], "is_causal": []}
    for _ in range(rank):
        extent = rng.randint(2, (40, 12, 7)[rank - 1])
        dilation = rng.randint(1, max(1, extent // 2))
        kernel = rng.randint(2, extent // dilation)
        values = (kernel, rng.randint(1, kernel), dilation, rng.random() < 0.35)
        extents.append(extent)
        for name, value in zip(arguments, values):
            arguments[name].append(value)
    if rank == 1 and arguments["kernel_size"] == extents:
        arguments["is_causal"] = [False]
    return tuple(extents), {name: tuple(values) for name, values in arguments.items()}


def operands(extents, rng, generator, tokens=None):
    """query, key, value, and additional keys and values of so many tokens; heads-last."""
    batch, kv_heads, dim = rng.randint(1, 2), rng.randint(1, 2), rng.choice((8, 16, 32))
    heads = kv_heads * rng.randint(1, 3)
    shapes = [(*extents, heads), (*extents, kv_heads), (*extents, kv_heads)]
    shapes += [(tokens, kv_heads)] * 2 if tokens else []
    return [torch.randn(batch, *shape, dim, generator=generator) for shape in shapes]


# The front end, beside NATTEN's own


@each_rank
@with_the_seed
def test_fused_calls_give_what_natten_gives(natten, rank, seed):
    rng, generator = random.Random(seed + rank), torch.Generator().manual_seed(seed + rank)
    ours, theirs = getattr(attn_natten, f"na{rank}d"), getattr(natten, f"na{rank}d")
    for number in range(PROBLEMS):
        extents, arguments = drawn(rank, rng)
        tokens = rng.choice((None, None, 1, 5, 17))
        query, key, value, *more = operands(extents, rng, generator, tokens)
        if more:
            arguments |= {"additional_keys": more[0], "additional_values": more[1]}
        scale = rng.choice((None, 0.3, 1.0))
        expected = theirs(query, key, value, **arguments, scale=scale, backend="flex-fna")
        got = ours(query, key, value, **arguments, scale=scale)
        told = {name: given for name, given in arguments.items() if not name.startswith("additional")}
        about = f"problem {number} of seed {seed}: {extents}, {told}, {tokens} additional tokens"
        torch.testing.assert_close(got, expected, **CLOSE, msg=lambda text, about=about: f"{about}: {text}")


@each_rank
@with_the_seed
def test_their_lse_is_that_of_natten(natten, rank, seed):
    rng, generator = random.Random(seed + rank), torch.Generator().manual_seed(seed + rank)
    for _ in range(20):
        extents, arguments = drawn(rank, rng)
        query, key, value = operands(extents, rng, generator)
        theirs = getattr(natten, f"na{rank}d")(query, key, value, **arguments, backend="flex-fna", return_lse=True)
        ours = getattr(attn_natten, f"na{rank}d")(query, key, value, **arguments, return_lse=True)
        for got, expected in zip(ours, theirs):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            torch.testing.assert_close(got, expected, **CLOSE)


@with_the_seed
def test_plain_attention_and_merging_give_what_natten_gives(natten, seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(20):
        parts = []
        query, *_ = operands((rng.randint(1, 20),), rng, generator)
        for _ in range(rng.randint(2, 3)):
            key, value = (torch.randn(query.shape[0], rng.randint(1, 9), *query.shape[2:], generator=generator),) * 2
            theirs = natten.attention(query, key, value, return_lse=True)
            ours = attn_natten.attention(query, key, value, return_lse=True)
            for got, expected in zip(ours, theirs):
                torch.testing.assert_close(got, expected, **CLOSE)
            parts.append(theirs)
        outs, lses = map(list, zip(*parts))
        merged = natten.merge_attentions(outs, lses, torch_compile=False)
        for got, expected in zip(attn_natten.merge_attentions(outs, lses), merged):
            torch.testing.assert_close(got, expected, **CLOSE)


# Its kernels, through the core


def test_the_installed_natten_has_what_is_declared_ready_or_says_why_not(natten):
    for kernel in (*fna.KERNELS, *fmha.KERNELS):
        condition = registry.condition(kernel)
        needed = "flex" in kernel.name or natten.HAS_LIBNATTEN
        assert condition.state == ("ready" if needed else "unavailable"), f"{kernel.name}: {condition}"
        assert needed or "libnatten" in condition.reason


@pytest.mark.parametrize("stance", ["default", "force_eager"])
def test_the_core_runs_it_by_name_and_says_so(stance):
    query, key, value = (torch.randn(1, 20, 2, 16) for _ in range(3))
    bias = Neighborhood((4, 5), kernel_size=3)
    with record() as calls, torch.compiler.set_stance(stance):
        out = attention(query, key, value, bias, kernel="natten/flex-fna")
    assert calls.kernels == {"natten/flex-fna": 1}
    torch.testing.assert_close(out.double(), reference_attention(query, key, value, bias)[0], **CLOSE)


@pytest.mark.parametrize("name", ["natten/flex-fna", "natten/flex-fmha"])
def test_flex_keeps_what_is_declared_of_it(name):
    results = check_kernel(name)
    failed = [str(result) for result in results if not result]
    assert not failed, "\n".join(failed)
    assert sum(result.status == "passed" for result in results) > 50


# What is declared, beside NATTEN's own predicates


PREDICATES = {
    "natten/cutlass-fna": "can_run_cutlass_fna",
    "natten/hopper-fna": "can_run_cutlass_hopper_fna",
    "natten/blackwell-fna": "can_run_cutlass_blackwell_fna",
    "natten/cutlass-fmha": "can_run_cutlass_fmha",
    "natten/hopper-fmha": "can_run_cutlass_hopper_fmha",
    "natten/blackwell-fmha": "can_run_cutlass_blackwell_fmha",
    "natten/flex-fna": "can_run_flex_attention",
    "natten/flex-fmha": "can_run_flex_attention",
}
CAPABILITIES = [(5, 2), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DIMS = [4, 8, 12, 16, 24, 32, 40, 48, 64, 96, 128, 136, 256, 264, 512, 1024]


@pytest.mark.parametrize("name", PREDICATES)
def test_declarations_say_what_the_predicates_of_natten_say(natten, name, monkeypatch):
    """Over a grid of GPUs, dtypes, sizes, heads, masks and derivatives; NATTEN is told of a GPU that is not there."""
    kernel = next(kernel for kernel in (*fna.KERNELS, *fmha.KERNELS) if kernel.name == name)
    checks = sys.modules["natten.backends.configs.checks"]
    monkeypatch.setattr(checks, "HAS_LIBNATTEN", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    biases = (
        (Neighborhood((3, 4), kernel_size=2).bind(12, 12),)
        if name.endswith("fna")
        else (None, Causal("top-left").bind(12, 12), Segments([6, 6]).bind(12, 12))
    )
    differing, taken = [], 0
    for capability, dtype, dim in itertools.product(CAPABILITIES, DTYPES, DIMS):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, said=capability: said)
        for bias, more in itertools.product(biases, changes(dim)):
            if "flex" in name and "deterministic" in more:  # of which NATTEN says nothing
                continue
            problem = Problem(
                batch=1,
                seqlen_q=12,
                seqlen_kv=12,
                num_heads=4,
                dtype=dtype,
                device="cuda",
                compute_capability=capability,
                head_dim=dim,
                bias=bias,
                **{"num_kv_heads": 4, "head_dim_v": dim} | more,
            )
            torch.use_deterministic_algorithms(problem.deterministic)
            try:
                says = ask(natten, kernel, problem)
            finally:
                torch.use_deterministic_algorithms(False)
            declared = not kernel.declaration(problem).refusals(problem)
            taken += declared
            if declared != says:
                differing.append(f"declared {declared}, NATTEN {says}: {problem}")
    assert taken > 20
    assert not differing, f"{len(differing)} differ:\n" + "\n".join(differing[:20])


def changes(dim):
    yield {}
    yield {"num_kv_heads": 2}
    yield {"head_dim_v": 2 * dim}
    yield {"requires_grad": True}
    yield {"deterministic": True}
    yield {"requires_grad": True, "deterministic": True}


def ask(natten, kernel, problem):
    """NATTEN's own answer, by the tensors that the adapter shows it."""
    from attn_natten.kernels import asked, windows

    masks = {"causal": isinstance(problem.bias, Causal), "varlen": isinstance(problem.bias, Segments)}
    rank = windows.rank_of(problem.bias) if kernel.name.endswith("fna") else 1
    return not list(asked.refusals(problem, PREDICATES[kernel.name], rank, **masks))


@pytest.mark.parametrize("name", PREDICATES)
def test_what_the_limits_of_a_kernel_leave_is_taken_by_natten(natten, name, monkeypatch):
    """A GPU between two that NATTEN names is refused by its word, though the declaration has a range."""
    monkeypatch.setattr(sys.modules["natten.backends.configs.checks"], "HAS_LIBNATTEN", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 1))
    kernel = next(kernel for kernel in (*fna.KERNELS, *fmha.KERNELS) if kernel.name == name)
    problem = Problem(
        batch=1,
        seqlen_q=12,
        seqlen_kv=12,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        head_dim_v=64,
        dtype=torch.float16,
        device="cuda",
        compute_capability=(10, 1),
        scale=0.1,
    )
    refused = " ".join(map(str, kernel.refusals(problem)))
    if "blackwell" in name:
        assert "NATTEN says" in refused
        assert "101" in refused
    elif "hopper" in name:
        assert "newer than known" in refused
    else:
        assert refused == ""
        assert kernel.refusals(replace(problem, head_dim=20, head_dim_v=20))


# The double


@pytest.mark.parametrize("function", ["na1d", "na2d", "na3d", "attention"])
def test_the_double_has_the_signatures_of_natten(natten, function):
    assert parameters(getattr(natten, function)) == parameters(getattr(double(), function))


@pytest.mark.parametrize("predicate", sorted(set(PREDICATES.values())))
def test_the_double_has_the_predicates_of_natten(natten, predicate):
    assert parameters(getattr(natten.backends, predicate)) == parameters(getattr(double().backends, predicate))


@each_rank
@with_the_seed
def test_the_double_computes_what_natten_computes(natten, rank, seed):
    rng, generator = random.Random(seed + rank), torch.Generator().manual_seed(seed + rank)
    for _ in range(30):
        extents, arguments = drawn(rank, rng)
        query, key, value = operands(extents, rng, generator)
        theirs = getattr(natten, f"na{rank}d")(query, key, value, **arguments, backend="flex-fna", return_lse=True)
        ours = getattr(double(), f"na{rank}d")(query, key, value, **arguments, return_lse=True)
        for got, expected in zip(ours, theirs):
            torch.testing.assert_close(got, expected, **CLOSE)


def parameters(function):
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def double():
    """The double, imported beside the real one under another name."""
    name = "double_of_natten"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, DOUBLE / "__init__.py", submodule_search_locations=[str(DOUBLE)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
