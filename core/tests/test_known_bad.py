"""The table of known-bad kernels: each row disqualifies what it names and nothing beside, and can be overruled."""

import json
from dataclasses import replace

import attn_core
import pytest
import torch
from attn_core import (
    Capabilities,
    Causal,
    DeclarationError,
    Kernel,
    KernelRefusedError,
    TensorBias,
    allow,
    attention,
    explain,
    known_bad,
    prefer,
    refresh,
    register,
)
from attn_core.cli import main
from attn_core.cost import Cost
from attn_core.door import examine
from attn_core.testing import fake_distribution, importable
from click.testing import CliRunner

#: A call on a CUDA device, of which each example below changes something.
PLAIN = {"batch": 2, "seqlen_q": 256, "seqlen_kv": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64}
TORCH = {"torch": "2.13.0+cu130", "cuda": "13.0", "cudnn": "9.20.0", "natten": None, "flash-attn-4": None}
#: Betas of FlashAttention-4.
FA4_B11, FA4_B13, FA4_B18, FA4_B19, FA4_B27, FA4_B28, FA4_B36, FA4_LATER = (
    {"flash-attn-4": f"4.0.0b{number}"} for number in (11, 13, 18, 19, 27, 28, 36, 37)
)
H100, B200, B300, THOR, RTX_5090, A100 = (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (8, 0)
DENSE = "dense"
GRAD = {"requires_grad": True}


def problem(capability, bias=None, **changes):
    lengths = changes.get("seqlen_q", 256), changes.get("seqlen_kv", 256)
    if bias == DENSE:
        bias = TensorBias(torch.empty(1, 1, 1, 1, device="meta").expand(1, 1, *lengths))
    return attn_core.Problem(
        **{**PLAIN, "head_dim_v": changes.get("head_dim", 64), "dtype": torch.bfloat16, "device": "cuda", **changes},
        compute_capability=capability,
        bias=None if bias is None else bias.bind(*lengths),
    )


#: Number of a report -> (kernel, what it disqualifies, its neighbours); each a device, libraries, and what is asked.
EXAMPLES = {
    "193893": (
        "torch/cudnn",
        {
            "one query, B200, torch 2.13": (B200, {}, {"seqlen_q": 1}),
            "one query, B300": (B300, {}, {"seqlen_q": 1}),
            "one query, sm_110": (THOR, {}, {"seqlen_q": 1}),
            "the first cuDNN": (B200, {"cudnn": "9.19.0"}, {"seqlen_q": 1}),
            "the last cuDNN": (B200, {"cudnn": "9.25.0"}, {"seqlen_q": 1}),
        },
        {
            "two queries": (B200, {}, {"seqlen_q": 2}),
            "a GeForce": (RTX_5090, {}, {"seqlen_q": 1}),
            "H100": (H100, {}, {"seqlen_q": 1}),
            "a device that is not known": (None, {}, {"seqlen_q": 1}),
            "cuDNN before": (B200, {"cudnn": "9.18.1"}, {"seqlen_q": 1}),
            "cuDNN 9.24.1": (B200, {"cudnn": "9.24.1"}, {"seqlen_q": 1}),
            "cuDNN after": (B200, {"cudnn": "9.25.1"}, {"seqlen_q": 1}),
            "no cuDNN": (B200, {"cudnn": None}, {"seqlen_q": 1}),
        },
    ),
    "196678": (
        "torch/cudnn",
        {
            "704 keys": (H100, {}, {"seqlen_kv": 704, **GRAD}),
            "64 keys": (H100, {}, {"seqlen_kv": 64, **GRAD}),
            "with a mask": (H100, {}, {"seqlen_kv": 704, "bias": DENSE, **GRAD}),
            "the last cuDNN": (H100, {"cudnn": "9.25.1"}, {"seqlen_kv": 704, **GRAD}),
        },
        {
            "640 keys": (H100, {}, {"seqlen_kv": 640, **GRAD}),
            "700 keys": (H100, {}, {"seqlen_kv": 700, **GRAD}),
            "no gradient": (H100, {}, {"seqlen_kv": 704}),
            "causal": (H100, {}, {"seqlen_q": 704, "seqlen_kv": 704, "bias": Causal("top-left"), **GRAD}),
            "another device": (B200, {}, {"seqlen_kv": 704, **GRAD}),
            "cuDNN of torch 2.10": (H100, {"cudnn": "9.15.1"}, {"seqlen_kv": 704, **GRAD}),
            "cuDNN after": (H100, {"cudnn": "9.26.0"}, {"seqlen_kv": 704, **GRAD}),
        },
    ),
    "1072": (
        "torch/cudnn",
        {
            "one query, 128 keys": (H100, {"cudnn": "9.26.0"}, {"seqlen_q": 1, "seqlen_kv": 128, **GRAD}),
            "the first cuDNN": (H100, {"cudnn": "9.25.1"}, {"seqlen_q": 1, "seqlen_kv": 128, **GRAD}),
        },
        {
            "97 keys": (H100, {"cudnn": "9.26.0"}, {"seqlen_q": 1, "seqlen_kv": 97, **GRAD}),
            "two queries": (H100, {"cudnn": "9.26.0"}, {"seqlen_q": 2, "seqlen_kv": 128, **GRAD}),
            "no gradient": (H100, {"cudnn": "9.26.0"}, {"seqlen_q": 1, "seqlen_kv": 128}),
            "cuDNN before": (H100, {"cudnn": "9.25.0"}, {"seqlen_q": 1, "seqlen_kv": 128, **GRAD}),
            "cuDNN after": (H100, {"cudnn": "9.27.0"}, {"seqlen_q": 1, "seqlen_kv": 128, **GRAD}),
            "another device": (A100, {"cudnn": "9.26.0"}, {"seqlen_q": 1, "seqlen_kv": 128, **GRAD}),
        },
    ),
    "167101": (
        "torch/cudnn",
        {
            "261 queries, cuDNN of torch 2.9": (H100, {"cudnn": "9.10.2"}, {"seqlen_q": 261}),
            "the last cuDNN": (A100, {"cudnn": "9.15.0"}, {"seqlen_q": 261, **GRAD}),
        },
        {
            "256 queries": (H100, {"cudnn": "9.10.2"}, {"seqlen_q": 256}),
            "cuDNN after": (H100, {"cudnn": "9.15.1"}, {"seqlen_q": 261}),
        },
    ),
    "173953": (
        "torch/flash",
        {
            "head_dim 160": (B200, {"torch": "2.11.0.dev20260120+cu130"}, {"head_dim": 160, **GRAD}),
            "head_dim 136": (A100, {"torch": "2.11.0.dev20260120+cu130"}, {"head_dim": 136, **GRAD}),
        },
        {
            "head_dim 128": (B200, {"torch": "2.11.0.dev20260120+cu130"}, {"head_dim": 128, **GRAD}),
            "head_dim 168": (B200, {"torch": "2.11.0.dev20260120+cu130"}, {"head_dim": 168, **GRAD}),
            "no gradient": (B200, {"torch": "2.11.0.dev20260120+cu130"}, {"head_dim": 160}),
            "a later night": (B200, {"torch": "2.11.0.dev20260301+cu130"}, {"head_dim": 160, **GRAD}),
            "torch 2.10": (B200, {"torch": "2.10.0"}, {"head_dim": 160, **GRAD}),
            "torch 2.11": (B200, {"torch": "2.11.0+cu130"}, {"head_dim": 160, **GRAD}),
            "without CUDA": (B200, {"torch": "2.11.0.dev20260120", "cuda": None}, {"head_dim": 160, **GRAD}),
        },
    ),
    "187227": (
        "torch/efficient",
        {
            "65,537 tokens": (H100, {}, {"seqlen_q": 65537, "seqlen_kv": 65537, "bias": DENSE}),
            "rows that are filled up": (H100, {}, {"seqlen_q": 65540, "seqlen_kv": 65530, "bias": DENSE}),
        },
        {
            "65,536 tokens": (H100, {}, {"seqlen_q": 65536, "seqlen_kv": 65536, "bias": DENSE}),
            "causal": (H100, {}, {"seqlen_q": 65537, "seqlen_kv": 65537, "bias": Causal("top-left")}),
            "no bias": (H100, {}, {"seqlen_q": 65537, "seqlen_kv": 65537}),
            "torch 2.14": (H100, {"torch": "2.14.0"}, {"seqlen_q": 65537, "seqlen_kv": 65537, "bias": DENSE}),
        },
    ),
    "341": (
        "natten/cutlass-fna",
        {
            "the last release before": (A100, {"natten": "0.21.6+torch2110cu130"}, GRAD),
            "the first of its generation": (H100, {"natten": "0.21.0"}, GRAD),
        },
        {
            "the release with the repair": (A100, {"natten": "0.21.7"}, GRAD),
            "no gradient": (A100, {"natten": "0.21.6"}, {}),
            "an older GPU": ((7, 5), {"natten": "0.21.6"}, GRAD),
            "no natten": (A100, {}, GRAD),
        },
    ),
    "2896": (
        "flash/fa4",
        {
            "head_dim 72": (H100, FA4_B36, {"head_dim": 72, **GRAD}),
            "head_dim 104": (H100, FA4_B11, {"head_dim": 104, **GRAD}),
        },
        {
            "head_dim 96": (H100, FA4_B36, {"head_dim": 96, **GRAD}),
            "no gradient": (H100, FA4_B36, {"head_dim": 72}),
            "another device": ((10, 3), FA4_B28, {"head_dim": 72, **GRAD}),
            "a later beta": (H100, FA4_LATER, {"head_dim": 72, **GRAD}),
            "no FlashAttention-4": (H100, {}, {"head_dim": 72, **GRAD}),
        },
    ),
    "2698": (
        "flash/fa4",
        {
            "head_dim 72": (B200, FA4_B27, {"head_dim": 72, **GRAD}),
            "on sm_110": (THOR, FA4_B27, {"head_dim": 104, **GRAD}),
        },
        {
            "head_dim 96": (B200, FA4_B27, {"head_dim": 96, **GRAD}),
            "no gradient": (B200, FA4_B27, {"head_dim": 72}),
            "a later beta": (B200, FA4_B28, {"head_dim": 72, **GRAD}),
        },
    ),
    "2552": (
        "flash/fa4",
        {
            "128 with 96": (B200, FA4_B36, {"head_dim": 128, "head_dim_v": 96, **GRAD}),
            "128 with 16": (B300, FA4_B11, {"head_dim": 128, "head_dim_v": 16, **GRAD}),
        },
        {
            "128 with 64": (B200, FA4_B36, {"head_dim": 128, "head_dim_v": 64, **GRAD}),
            "128 with 128": (B200, FA4_B36, {"head_dim": 128, **GRAD}),
            "192 with 128": (B200, FA4_B36, {"head_dim": 192, "head_dim_v": 128, **GRAD}),
            "64 with 96": (B200, FA4_B36, {"head_dim": 64, "head_dim_v": 96, **GRAD}),
            "no gradient": (B200, FA4_B36, {"head_dim": 128, "head_dim_v": 96}),
            "Hopper": (H100, FA4_B36, {"head_dim": 128, "head_dim_v": 96, **GRAD}),
            "a later beta": (B200, FA4_LATER, {"head_dim": 128, "head_dim_v": 96, **GRAD}),
        },
    ),
    "2665": (
        "flash/fa4",
        {
            "head_dim 256": (B200, FA4_B18, {"head_dim": 256}),
            "with a gradient": (B300, FA4_B13, {"head_dim": 256, **GRAD}),
        },
        {
            "head_dim 128": (B200, FA4_B18, {"head_dim": 128}),
            "Hopper": (H100, FA4_B18, {"head_dim": 256}),
            "a later beta": (B200, FA4_B19, {"head_dim": 256}),
        },
    ),
}


def cases(place):
    return [
        pytest.param(report, EXAMPLES[report][0], *example, id=f"{report}: {name}")
        for report in EXAMPLES
        for name, example in EXAMPLES[report][place].items()
    ]


@pytest.fixture
def libraries(monkeypatch):
    """Sets the versions that are installed."""

    def use(**versions):
        monkeypatch.setattr(known_bad, "installed", {**TORCH, **versions}.__getitem__)
        known_bad.rows_for.cache_clear()

    yield use
    monkeypatch.undo()
    known_bad.rows_for.cache_clear()


def reports(kernel, asked):
    """Numbers of the reports by which the kernel is refused."""
    return [refusal.message.split(";")[1].rsplit("/", 1)[1] for refusal in known_bad.refusals(kernel, asked)]


def test_every_row_has_examples_here():
    assert {row.link.rsplit("/", 1)[1] for row in known_bad.table()} == set(EXAMPLES)


def test_what_is_known_of_an_op_counts_for_every_kernel_that_calls_it(libraries):
    libraries(torch="2.11.0.dev20260120+cu130")
    here = problem(H100, head_dim=160, **GRAD)
    for kernel in ("torch/flash", "torch/fa-window", "torch/varlen"):
        assert reports(kernel, here) == ["173953"]


@pytest.mark.parametrize(("report", "kernel", "capability", "versions", "asked"), cases(1))
def test_a_row_disqualifies_what_it_names(libraries, report, kernel, capability, versions, asked):
    libraries(**versions)
    assert reports(kernel, problem(capability, **asked)) == [report]


@pytest.mark.parametrize(("report", "kernel", "capability", "versions", "asked"), cases(2))
def test_a_row_does_not_disqualify_its_neighbours(libraries, report, kernel, capability, versions, asked):
    libraries(**versions)
    assert report not in reports(kernel, problem(capability, **asked))


@pytest.mark.parametrize("report", EXAMPLES)
def test_a_row_speaks_of_its_kernel_and_device_alone(libraries, report):
    kernel, named, _ = EXAMPLES[report]
    capability, versions, asked = next(iter(named.values()))
    libraries(**versions)
    here = problem(capability, **asked)
    others = {"torch/flash", "torch/efficient", "torch/cudnn", "torch/math", "flash/fa2"} - {kernel}
    assert not any(reports(other, here) for other in others)
    assert not reports(kernel, replace(here, device="cpu", compute_capability=None))


def test_where_lengths_are_symbolic_what_a_row_says_of_them_counts_as_met(libraries):
    libraries()
    long = problem(B200, seqlen_q=512)
    assert not known_bad.refusals("torch/cudnn", long)
    assert len(known_bad.refusals("torch/cudnn", long, lengths=False)) == 1
    assert not known_bad.refusals("torch/cudnn", problem(H100, seqlen_q=512), lengths=False)  # no gradient


@pytest.mark.parametrize(
    ("number", "version"), [(90100, "9.1.0"), (91002, "9.10.2"), (92401, "9.24.1"), (8902, "8.9.2")]
)
def test_the_version_of_cudnn_is_read_from_its_number(number, version):
    assert known_bad.version_of_cudnn(number) == version


def test_the_version_of_a_library_that_a_plugin_brings_is_that_of_its_distribution(tmp_path):
    fake_distribution(tmp_path, "natten", "0.21.6", {}, {}, ())
    with importable(tmp_path):
        assert known_bad.installed("natten") == "0.21.6"
    assert known_bad.version_of("a-library-of-tomorrow") is None


def test_nothing_is_known_to_be_bad_of_the_kernels_for_the_cpu():
    q = torch.empty(1, 8, 2, 16)
    asked, _ = examine(q, q, q, None, None, None, 0.0, False, 2)
    assert not any(known_bad.refusals(kernel.name, asked) for kernel in attn_core.kernels())


# In a choice

X = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))
ROW = {
    "kernel": "toy/b*",
    "device": "cpu",
    "compute_capability": None,
    "versions": {"torch": ">=2"},
    "problem": {"seqlen_q": {"from": 3}},
    "what": "wrong from 3 queries on",
    "link": "https://example.org/report",
}
REASON = (
    "known_bad: wrong from 3 queries on; https://example.org/report; to overrule: "
    '`with allow("known-bad")`, or ATTN_ALLOW_KNOWN_BAD with the name of the kernel'
)


@pytest.fixture
def toy(monkeypatch):
    """A kernel that promises to be the fastest, and is known to be bad from 3 queries on."""

    def run(query, key, value, *, scale):
        return torch.zeros_like(query)

    rows = known_bad.parse(json.dumps([ROW]))
    monkeypatch.setattr(known_bad, "table", lambda: rows)
    known_bad.rows_for.cache_clear()
    cpu = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8}, compile=True)
    with register(Kernel(name="toy/bad", run=run, capabilities=cpu, costs={"cpu": Cost(call=0.0)})) as handle:
        yield handle.kernel
    monkeypatch.undo()
    known_bad.rows_for.cache_clear()
    refresh()


def chosen(x=X):
    return explain(x, x, x).chosen


def test_a_kernel_known_to_be_bad_is_not_chosen_and_its_neighbour_problems_are_its_own(toy):
    assert chosen() != "toy/bad"
    assert attention(X, X, X).abs().sum() > 0
    assert chosen(X[:, :2]) == "toy/bad"
    with prefer("toy/bad"):
        assert chosen() != "toy/bad"


def test_explain_tells_what_is_known_where_and_how_to_overrule_it(toy):
    verdict = explain(X, X, X)["toy/bad"]
    assert (verdict.state, verdict.refused_fields, verdict.reasons) == ("refused", ("known_bad",), (REASON,))


def test_insisting_on_it_is_not_enough(toy):
    with pytest.raises(KernelRefusedError, match="wrong from 3 queries on"):
        attention(X, X, X, kernel="toy/bad")
    with allow("known-bad"):
        assert not attention(X, X, X, kernel="toy/bad").any()


def test_allow_overrules_within_the_block_alone_and_is_told(toy):
    attention(X, X, X)  # a cached choice must not hide it
    with allow("known-bad"):
        assert chosen() == "toy/bad"
        assert not attention(X, X, X).any()
        assert f"note: toy/bad is allowed, although {REASON}" in str(explain(X, X, X))
    with allow("approximate"):
        assert chosen() != "toy/bad"
    assert chosen() != "toy/bad"


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("ATTN_ALLOW", "known-bad", True),
        ("ATTN_ALLOW_KNOWN_BAD", "toy/bad", True),
        ("ATTN_ALLOW_KNOWN_BAD", "torch/*, toy/*", True),
        ("ATTN_ALLOW_KNOWN_BAD", "*", True),
        ("ATTN_ALLOW_KNOWN_BAD", "torch/*", False),
        ("ATTN_ALLOW_KNOWN_BAD", "", False),
    ],
)
def test_the_environment_overrules(toy, monkeypatch, variable, value, allowed):
    with monkeypatch.context() as patch:
        patch.setenv(variable, value)
        refresh()  # which forgets the kernels of this process
        with register(toy):
            assert (chosen() == "toy/bad") is allowed
            with prefer("torch/math"):  # an inner scope keeps it
                assert (explain(X, X, X, kernel="toy/bad").chosen is not None) is allowed
    refresh()


def test_a_graph_is_traced_anew_where_allow_is_entered_or_left(toy):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: attention(x, x, x), backend="eager", fullgraph=True)
    assert compiled(X).any()
    with allow("known-bad"):
        assert not compiled(X).any()
    assert compiled(X).any()


def test_allow_works_inside_a_graph(toy):
    torch.compiler.reset()

    def both(x):
        with allow("known-bad"):
            first = attention(x, x, x)
        return first, attention(x, x, x)

    first, second = torch.compile(both, backend="eager", fullgraph=True)(X)
    assert not first.any()
    assert second.any()


def test_a_graph_for_every_length_leaves_it_out_at_all_lengths(toy):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: attention(x, x, x), backend="eager", fullgraph=True, dynamic=True)
    assert compiled(X).any()
    assert compiled(X[:, :2]).any()


def test_the_doctor_lists_what_applies_here_and_whether_it_is_overruled(toy, monkeypatch):
    def findings():
        report = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
        return [found for found in report["findings"] if found["what"] == "known-bad"]

    [found] = findings()
    assert (found["name"], found["state"]) == ("toy/bad", "known-bad")
    text = "with torch >=2: seqlen_q from 3: wrong from 3 queries on; https://example.org/report"
    assert found["reason"] == text
    assert found["fix"] == "ATTN_ALLOW_KNOWN_BAD=toy/bad"
    with allow("known-bad"):
        [found] = findings()
    assert (found["state"], found["fix"]) == ("allowed", None)


def test_the_command_explain_overrules_with_a_flag(toy):
    arguments = ["explain", "--seqlen", "4", "--heads", "2", "--head-dim", "8", "--kernel", "toy/bad"]
    assert "wrong from 3 queries on" in CliRunner().invoke(main, arguments).stdout
    assert CliRunner().invoke(main, arguments).exit_code == 1
    assert CliRunner().invoke(main, [*arguments, "--allow", "known-bad"]).exit_code == 0


# Malformed data


def without(key):
    return {name: value for name, value in ROW.items() if name != key}


WRONG = {
    "no JSON": ("[", "known-bad table: no JSON"),
    "no list": ("{}", "must be a list of rows, got dict"),
    "a row that is no object": ([1], "row 0: must have just kernel"),
    "a key too few": ([without("link")], "row 0: must have just kernel"),
    "a key too many": ([{**ROW, "note": "x"}], "row 0: must have just kernel"),
    "the second row": ([ROW, {**ROW, "what": ""}], "row 1: what must be text, got ''"),
    "a link that is none": ([{**ROW, "link": "report 7"}], "link must begin with https://, got 'report 7'"),
    "a range the wrong way round": (
        [{**ROW, "compute_capability": [[9, 0], [8, 0]]}],
        "compute_capability must be null or",
    ),
    "one compute capability": ([{**ROW, "compute_capability": [9, 0]}], "compute_capability must be null or"),
    "no library": ([{**ROW, "versions": {}}], "versions must name a library, got {}"),
    "a library nobody asks": (
        [{**ROW, "versions": {"triton": ">=3"}}],
        "versions: knows torch, cuda, cudnn, natten, flash-attn, flash-attn-3, flash-attn-4, got 'triton'",
    ),
    "a version that is no specifier": ([{**ROW, "versions": {"torch": "2.9"}}], "torch must be specifiers"),
    "an empty specifier": ([{**ROW, "versions": {"torch": ""}}], "torch must be specifiers"),
    "an unknown field": ([{**ROW, "problem": {"seqlen": {"is": 1}}}], "problem: knows seqlen_q, .*got 'seqlen'"),
    "a bare number": ([{**ROW, "problem": {"seqlen_q": 1}}], "seqlen_q takes is, from, .* got 1"),
    "an unknown way": ([{**ROW, "problem": {"seqlen_q": {"above": 1}}}], "seqlen_q takes is, from"),
    "a multiple of nothing": ([{**ROW, "problem": {"seqlen_q": {"multiple_of": 0}}}], "seqlen_q takes is, from"),
    "plus alone": ([{**ROW, "problem": {"seqlen_q": {"plus": 64}}}], "seqlen_q takes is, from"),
    "a word for a flag": ([{**ROW, "problem": {"backward": "yes"}}], "backward takes true or false, got 'yes'"),
    "a word for a list": ([{**ROW, "problem": {"bias": "none"}}], "bias takes a list of names, got 'none'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_table_says_which_row_and_what_is_wrong(name):
    given, message = WRONG[name]
    with pytest.raises(DeclarationError, match=message):
        known_bad.parse(given if isinstance(given, str) else json.dumps(given))


def test_the_kinds_and_dtypes_that_the_table_names_exist():
    for row in known_bad.table():
        for kind in set(row.problem.get("bias", ())) - {"none"}:
            assert isinstance(getattr(attn_core, kind), type), (row.link, kind)
        for dtype in row.problem.get("dtype", ()):
            assert isinstance(getattr(torch, dtype), torch.dtype), (row.link, dtype)
