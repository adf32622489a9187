"""`attn explain` turns flags into the problem that a call would pose, and tells who would run it."""

import io
import json

import attn_core
import pytest
import torch
from attn_core import Capabilities, Causal, Kernel, KeyPadding, TensorBias, Unusable, Window, explain_problem, register
from attn_core.cli import main
from attn_core.cli.explain import DTYPES, problem_of
from attn_core.cli.expression import parse
from click.testing import CliRunner
from rich.console import Console


def attn(*arguments, exit_code=0):
    result = CliRunner().invoke(main, ["explain", *arguments])
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    return result.output


def explained(*arguments, exit_code=0):
    return json.loads(attn(*arguments, "--json", exit_code=exit_code))


def asked(*arguments):
    """The problem behind these flags."""
    command = main.get_command(None, "explain")
    flags = command.make_context("explain", list(arguments)).params
    return problem_of(**{k: v for k, v in flags.items() if k not in ("kernel", "preferred", "allowed", "as_json")})


SHAPE = ["--batch", "2", "--seqlen", "6", "--heads", "4", "--head-dim", "8"]
OPERANDS = [(2, 6, 4, 8)] * 3
#: flags -> (shapes of query, key, value; bias; keywords)
SAME_CALLS = {
    "plain": ([], OPERANDS, None, {}),
    "gqa": (["--kv-heads", "2"], [(2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8)], None, {}),
    "lengths": (["--seqlen-q", "3", "--seqlen-kv", "9"], [(2, 3, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8)], None, {}),
    "head_dim_v": (["--head-dim-v", "16"], [(2, 6, 4, 8), (2, 6, 4, 8), (2, 6, 4, 16)], None, {}),
    "causal": (["--causal", "top-left"], OPERANDS, Causal("top-left"), {}),
    "bottom-right": (
        ["--causal", "bottom-right", "--seqlen-q", "3"],
        [(2, 3, 4, 8), (2, 6, 4, 8), (2, 6, 4, 8)],
        Causal("bottom-right"),
        {},
    ),
    "window": (["--window", "2,1"], OPERANDS, Window(2, 1), {}),
    "window-corner": (
        ["--window", "2,inf,bottom-right", "--seqlen-q", "3"],
        [(2, 3, 4, 8), (2, 6, 4, 8), (2, 6, 4, 8)],
        Window(2, None, "bottom-right"),
        {},
    ),
    "key-padding": (["--key-padding"], OPERANDS, KeyPadding(torch.empty(2, dtype=torch.int64, device="meta")), {}),
    "bias-bool": (["--bias", "bool"], OPERANDS, TensorBias(torch.ones(1, 1, 6, 6, dtype=torch.bool)), {}),
    "bias-float": (["--bias", "float"], OPERANDS, TensorBias(torch.zeros(1, 1, 6, 6)), {}),
    "bias-grad": (["--bias", "float-grad"], OPERANDS, TensorBias(torch.zeros(1, 1, 6, 6, requires_grad=True)), {}),
    "options": (
        ["--softcap", "30", "--scale", "0.5", "--dropout", "0.1", "--lse"],
        OPERANDS,
        None,
        {"softcap": 30.0, "scale": 0.5, "dropout_p": 0.1, "return_lse": True},
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", SAME_CALLS)
def test_flags_pose_the_problem_that_the_call_poses(case, dtype, grad):
    flags, shapes, bias, options = SAME_CALLS[case]
    if isinstance(bias, TensorBias) and bias.tensor.is_floating_point():
        tensor = bias.tensor.detach().to(getattr(torch, dtype)).requires_grad_(bias.tensor.requires_grad)
        bias = TensorBias(tensor)
    query, key, value = (torch.zeros(s, dtype=getattr(torch, dtype), requires_grad=grad) for s in shapes)
    expected = attn_core.explain(query, key, value, bias, **options)
    got = asked(*SHAPE, *flags, "--dtype", dtype, *(["--grad"] if grad else []))
    assert got == expected.problem


#: an expression -> shapes of query, key, value where no flag says others
WRITTEN = {
    "Window(3, 0) & Segments([5, 9, 4])": [(1, 18, 8, 8)] * 3,
    "Causal()": [(1, 1024, 8, 8)] * 3,
    "Neighborhood((4, 5), kernel_size=(4, 5))": [(1, 20, 8, 8)] * 3,
    "KeyPadding([3, 5, 4])": [(3, 5, 8, 8)] * 3,
    "KeyPadding([5]) & Causal()": [(1, 5, 8, 8)] * 3,
    "Causal() + ALiBi(4)": [(1, 1024, 4, 8)] * 3,
    "ALiBi(4, slopes=random(3, 4)) + Segments([2, 3])": [(3, 5, 4, 8)] * 3,
    "RelPosTable(random(4, 5, 5, requires_grad=True), (3, 3))": [(1, 9, 4, 8)] * 3,
    "random(2, 4, 6, 6, requires_grad=True)": [(2, 6, 4, 8)] * 3,
    "tensor([[True, True], [False, True]])": [(1, 2, 8, 8)] * 3,
    "BlockMask(tensor([[True, False], [True, True]]), 16)": [(1, 32, 8, 8)] * 3,
    "Paged([[2, 0], [2, 1]], [3, 4], 2)": [(2, 4, 8, 8), (3, 2, 8, 8), (3, 2, 8, 8)],
}


@pytest.mark.parametrize("text", WRITTEN)
def test_an_expression_poses_the_problem_of_its_bias(text):
    query, key, value = (torch.zeros(shape) for shape in WRITTEN[text])
    expected = attn_core.explain(query, key, value, parse(text))
    assert asked("--head-dim", "8", "--bias", text) == expected.problem


def test_flags_come_before_what_an_expression_tells():
    query, key = torch.zeros(2, 3, 6, 8), torch.zeros(2, 9, 6, 8)
    expected = attn_core.explain(query, key, key, parse("KeyPadding([5, 9])"))
    sizes = ["--seqlen-q", "3", "--seqlen-kv", "9", "--heads", "6", "--batch", "2", "--head-dim", "8"]
    assert asked(*sizes, "--bias", "KeyPadding([5, 9])") == expected.problem


def test_the_choice_is_that_of_the_call():
    query = torch.zeros(2, 6, 4, 8)
    expected = attn_core.explain(query, query, query, Causal())
    assert explained(*SHAPE, "--causal", "top-left") == expected.to_dict()


def test_the_table_has_every_kernel():
    output = attn()
    for kernel in attn_core.kernels():
        assert kernel.name in output


def test_deterministic_is_part_of_the_problem():
    assert asked("--deterministic").deterministic
    assert not asked().deterministic


def test_a_device_need_not_be_there():
    problem = asked("--device", "cuda", "--compute-capability", "9.0", "--dtype", "float16")
    assert (problem.device, problem.compute_capability) == ("cuda", (9, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_floating_dtype_gets_an_answer(dtype):
    result = CliRunner().invoke(main, ["explain", "--dtype", dtype, "--json"])
    assert result.exit_code in (0, 1), result.output
    assert (json.loads(result.output)["chosen"] is None) == (result.exit_code == 1)


def test_a_kernel_can_be_insisted_on():
    assert explained("--kernel", "torch/math")["chosen"] == "torch/math"


def test_a_preferred_kernel_comes_first():
    answer = explained("--prefer", "torch/math", "--prefer", "torch/*")
    assert answer["chosen"] == "torch/math"
    assert answer["prefer"] == ["torch/math", "torch/*"]


def test_approximate_kernels_take_part_where_allowed():
    def run(query, key, value, *, scale):
        raise AssertionError("explain runs nothing")

    capabilities = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={64}, numerics="approximate")
    with register(Kernel(name="mine/int8", run=run, capabilities=capabilities)):
        refused = explained("--kernel", "mine/int8", exit_code=1)
        assert refused["verdicts"][0]["refused_fields"] == ["numerics"]
        assert explained("--kernel", "mine/int8", "--allow", "approximate")["chosen"] == "mine/int8"


def test_brackets_of_an_extra_are_shown_by_any_console():
    def run(query, key, value, *, scale):
        raise AssertionError("explain runs nothing")

    missing = Unusable("absent", "needs attn-x[fa2]", "pip install attn-x[fa2]")
    capabilities = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={64})
    with register(Kernel(name="mine/absent", run=run, capabilities=capabilities, probe=lambda: missing)):
        printed = Console(file=io.StringIO(), width=200)
        printed.print(explain_problem(asked()))
        for text in (printed.file.getvalue(), attn(), str(explain_problem(asked()))):
            assert "needs attn-x[fa2]" in text
            assert "to type: pip install attn-x[fa2]" in text


def test_exit_code_1_when_nothing_takes_it():
    output = attn("--kernel", "torch/flash", "--softcap", "30", exit_code=1)
    assert "softcap" in output


USER_ERRORS = {
    "unknown kernel": (["--kernel", "torch/flsh"], "Did you mean 'torch/flash'"),
    "unknown preferred kernel": (["--prefer", "torch/flsh"], "Did you mean 'torch/flash'"),
    "heads do not divide": (["--heads", "8", "--kv-heads", "3"], "must divide query's num_heads=8"),
    "negative length": (["--seqlen", "-1"], "--seqlen-q must not be negative"),
    "head_dim 0": (["--head-dim", "0"], "head_dim must be at least 1"),
    "dropout 1": (["--dropout", "1"], "dropout_p: must lie in [0, 1)"),
    "scale nan": (["--scale", "nan"], "scale: must be finite"),
    "softcap 0": (["--softcap", "0"], "softcap: must be finite and above 0"),
    "window": (["--window", "2"], "'2' is not LEFT,RIGHT[,CORNER]"),
    "window corner": (["--window", "2,3,left"], "is not LEFT,RIGHT[,CORNER]"),
    "window without corner": (["--window", "2,3", "--seqlen-q", "3"], "top-left"),
    "an expression": (["--bias", "Casual()"], "Did you mean 'Causal'?"),
    "an expression of other lengths": (
        ["--bias", "Segments([5, 9, 4])", "--seqlen", "17"],
        "have seqlen_q=18 together, got seqlen_q=17",
    ),
    "an expression for another batch": (
        ["--bias", "KeyPadding([3, 5])", "--batch", "3"],
        "made for batch=2, got batch=3",
    ),
    "an expression for other heads": (["--bias", "ALiBi(4)", "--heads", "8"], "made for num_heads=4, got num_heads=8"),
    "a mask and an expression": (["--window", "2,3", "--bias", "Causal()"], "--window and --bias: one at a time"),
    "two masks": (["--causal", "top-left", "--bias", "bool"], "--causal and --bias: one at a time"),
    "device": (["--device", "gpu0"], "torch knows no device 'gpu0'"),
    "compute capability": (["--device", "cuda", "--compute-capability", "90"], "is not MAJOR.MINOR"),
    "compute capability of a CPU": (["--compute-capability", "9.0"], "is for --device cuda"),
    "dtype": (["--dtype", "int8"], "'int8' is not one of"),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_users_error_is_a_message_and_exit_code_2(case):
    flags, message = USER_ERRORS[case]
    assert message in " ".join(attn(*flags, exit_code=2).split())
