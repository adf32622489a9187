"""A kernel's declaration: its name, layout and signature are checked when it is made; nothing can vanish in a call."""

from dataclasses import fields, replace

import pytest
import torch
from attn_core import (
    Backward,
    Capabilities,
    Causal,
    Cost,
    DeclarationError,
    Kernel,
    Problem,
    Refusal,
    TensorBias,
    attention,
    explain,
    kernels,
    register,
)
from attn_core.declaration import FLAGS, FLAGS_OF_BACKWARD, check_declaration

CPU = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8})


def run(query, key, value, *, scale):
    return query


def kernel(**given):
    return Kernel(**{"name": "toy/a", "run": run, "capabilities": CPU, **given})


@pytest.mark.parametrize(
    "name", ["a", "a/", "/b", "", "a b/c", "a/*", "a/b?", "a/[b]", "a,b/c", "a/\tb", None, 3], ids=repr
)
def test_a_name_is_plugin_slash_kernel(name):
    with pytest.raises(DeclarationError, match="name must be '<plugin>/<kernel>', got"):
        kernel(name=name)


def test_the_plugin_is_what_comes_before_the_slash():
    assert kernel(name="natten/hopper-fna").plugin == "natten"
    assert kernel(name="a/b/c").plugin == "a"


@pytest.mark.parametrize("layout", ["bshd", "heads_last", "", None], ids=repr)
def test_a_layout_is_heads_last_or_heads_first(layout):
    with pytest.raises(DeclarationError, match='layout must be "heads-last" or "heads-first"'):
        kernel(layout=layout)


@pytest.mark.parametrize("given", [None, {}, (), [CPU], (CPU, "cuda"), Capabilities], ids=str)
def test_capabilities_are_a_record_or_a_tuple_of_them(given):
    with pytest.raises(DeclarationError, match="toy/a: capabilities must be Capabilities"):
        kernel(capabilities=given)


@pytest.mark.parametrize("given", [None, 3, "module.function", "a:b:c"], ids=repr)
def test_a_run_is_a_function_or_a_dotted_name(given):
    with pytest.raises(DeclarationError, match=r"run must be a function or 'package\.module:function'"):
        kernel(run=given)


# The signature of run

EVERYTHING = replace(CPU, biases={Causal}, softcap=True, dropout=True, return_lse=True)


def takes_all(query, key, value, *, bias=None, scale, softcap=None, dropout_p=0.0, return_lse=False):
    return query


def test_a_signature_that_takes_what_is_declared_is_fine():
    assert kernel(run=takes_all, capabilities=EVERYTHING).run is takes_all
    assert kernel(run=takes_all).run is takes_all  # it may take more


def catch_all(query, key, value, *, scale, **options):
    return query


def catch_all_positional(query, key, value, *rest, scale):
    return query


def catch_all_everything(*args, **kwargs):
    return args[0]


@pytest.mark.parametrize("function", [catch_all, catch_all_positional, catch_all_everything], ids=lambda f: f.__name__)
def test_a_catch_all_is_refused_since_something_could_vanish_in_it(function):
    with pytest.raises(DeclarationError, match="toy/a: run has a catch-all parameter"):
        kernel(run=function)


LACKING = {
    "scale": (lambda query, key, value: query, CPU),
    "bias": (run, replace(CPU, biases={Causal})),
    "softcap": (run, replace(CPU, softcap=True)),
    "dropout_p": (run, replace(CPU, dropout=True)),
    "return_lse": (run, replace(CPU, return_lse=True)),
}


@pytest.mark.parametrize(("keyword", "function", "declared"), [(k, *v) for k, v in LACKING.items()], ids=LACKING)
def test_a_keyword_that_is_declared_but_not_taken_is_refused(keyword, function, declared):
    with pytest.raises(DeclarationError, match=rf"its declaration needs run\(.*lacks {keyword}$"):
        kernel(run=function, capabilities=declared)


def test_all_missing_keywords_are_named_at_once():
    with pytest.raises(DeclarationError, match="lacks bias, softcap, return_lse, dropout_p"):
        kernel(capabilities=EVERYTHING)


def test_what_any_record_of_a_tuple_declares_must_be_taken():
    with pytest.raises(DeclarationError, match="lacks softcap"):
        kernel(capabilities=(CPU, replace(CPU, devices={"cuda"}, softcap=True)))


def bias_without_default(query, key, value, *, bias, scale):
    return query


def option_without_default(query, key, value, *, scale, block_size):
    return query


@pytest.mark.parametrize(
    ("function", "name"), [(bias_without_default, "bias"), (option_without_default, "block_size")], ids=["bias", "own"]
)
def test_an_option_without_a_default_is_refused(function, name):
    with pytest.raises(DeclarationError, match=f"defaults for the options; without a default: {name}"):
        kernel(run=function, capabilities=replace(CPU, biases={Causal}) if name == "bias" else CPU)


def test_a_run_takes_three_operands():
    with pytest.raises(DeclarationError, match=r"run must be run\(query, key, value, \*, scale"):
        kernel(run=lambda query, scale: query)


def test_a_run_is_passed_a_keyword_only_where_the_problem_uses_it():
    passed, absent = [], object()

    def listed(query, key, value, *, bias=absent, scale, softcap=absent, dropout_p=absent, return_lse=absent):
        options = {"bias": bias, "softcap": softcap, "dropout_p": dropout_p, "return_lse": return_lse}
        passed.append({name for name, option in options.items() if option is not absent})
        return query if return_lse is absent else (query, query.new_zeros(1, 2, 4))

    x = torch.randn(1, 4, 2, 8)
    with register(kernel(run=listed, capabilities=EVERYTHING)):
        attention(x, x, x, kernel="toy/a")
        attention(x, x, x, Causal(), kernel="toy/a")
        attention(x, x, x, softcap=5.0, kernel="toy/a")
        attention(x, x, x, dropout_p=0.5, kernel="toy/a")
        attention(x, x, x, return_lse=True, kernel="toy/a")
    assert passed == [set(), {"bias"}, {"softcap"}, {"dropout_p"}, {"return_lse"}]


@pytest.mark.parametrize("layout", ["heads-last", "heads-first"])
def test_operands_come_and_the_result_leaves_in_the_kernel_s_layout(layout):
    seen = []

    def look(query, key, value, *, scale):
        seen.append((tuple(query.shape), tuple(key.shape)))
        return query

    query, key = torch.randn(3, 4, 2, 8), torch.randn(3, 5, 2, 8)
    with register(kernel(run=look, layout=layout)):
        assert torch.equal(attention(query, key, key, kernel="toy/a"), query)
    last = [((3, 4, 2, 8), (3, 5, 2, 8))]
    assert seen == (last if layout == "heads-last" else [((3, 2, 4, 8), (3, 2, 5, 8))])


# Records per device

PER_DEVICE = (
    Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8}),
    Capabilities(
        devices={"cuda"}, dtypes={torch.float16}, head_dims={64}, max_compute_capability=(8, 9), backward=True
    ),
    Capabilities(devices={"cuda"}, dtypes={torch.bfloat16}, head_dims={128}, min_compute_capability=(9, 0)),
)


def problem(**given):
    sizes = {"batch": 1, "seqlen_q": 4, "seqlen_kv": 4, "num_heads": 2, "num_kv_heads": 2}
    return Problem(**{**sizes, "head_dim": 8, "head_dim_v": 8, "dtype": torch.float32, "device": "cpu", **given})


@pytest.mark.parametrize(
    ("device", "compute_capability", "record"),
    [("cpu", None, 0), ("cuda", (8, 0), 1), ("cuda", (9, 0), 2), ("cuda", (10, 0), 2)],
    ids=str,
)
def test_of_several_records_the_first_for_the_device_and_its_compute_capability_counts(
    device, compute_capability, record
):
    several = kernel(capabilities=PER_DEVICE)
    asked = problem(device=device, compute_capability=compute_capability)
    assert several.declaration(asked) is PER_DEVICE[record]
    assert several.refusals(asked) == PER_DEVICE[record].refusals(asked)


def test_a_device_that_no_record_names_is_refused():
    fields = [refusal.field for refusal in kernel(capabilities=PER_DEVICE).refusals(problem(device="mps"))]
    assert fields == ["device"]


# Irregular limits, costs


def test_irregular_limits_are_asked_only_of_problems_that_the_regular_ones_cover():
    asked = []

    def refuse(problem):
        asked.append(problem.seqlen_q)
        if problem.seqlen_q % 4:
            yield Refusal("seqlen_q", f"takes multiples of 4, got {problem.seqlen_q}")

    picky = kernel(refuse=refuse)
    assert picky.refusals(problem()) == []
    assert picky.refusals(problem(seqlen_q=6)) == [Refusal("seqlen_q", "takes multiples of 4, got 6")]
    assert [r.field for r in picky.refusals(problem(seqlen_q=6, dtype=torch.float64))] == ["dtype"]
    assert asked == [4, 6]
    x = torch.randn(1, 6, 2, 8)
    with register(picky):
        verdict = explain(x, x, x)["toy/a"]
    assert (verdict.state, verdict.refused_fields) == ("refused", ("seqlen_q",))
    assert verdict.reasons == ("seqlen_q: takes multiples of 4, got 6",)


def raises(problem):
    raise KeyError("no such table")


OWN_LIMITS = {
    "raises": (raises, "refuse: its own limits raised KeyError: 'no such table'"),
    "answers None": (
        lambda problem: None,
        "refuse: its own limits raised TypeError: 'NoneType' object is not iterable",
    ),
    "yields a string": (lambda problem: ["too long"], "refuse: its own limits must yield Refusal, got 'too long'"),
}


@pytest.mark.parametrize(("refuse", "reason"), OWN_LIMITS.values(), ids=OWN_LIMITS)
def test_limits_that_fail_are_a_reason_against_their_kernel_and_cost_no_call(refuse, reason):
    x = torch.randn(1, 4, 2, 8)
    with register(kernel(refuse=refuse, costs={"cpu": Cost(call=0.0)})):
        explained = explain(x, x, x)
        assert explained.chosen not in (None, "toy/a")
        assert explained["toy/a"].reasons == (reason,)
        torch.testing.assert_close(attention(x, x, x), attention(x, x, x, kernel="torch/math"))


def test_a_kernel_that_says_nothing_of_its_speed_changes_no_choice():
    x = torch.randn(1, 256, 2, 8)
    before = explain(x, x, x).chosen
    with register(kernel()):
        explained = explain(x, x, x)
    assert explained.chosen == before
    assert explained["toy/a"].state == "ready"
    assert explained["toy/a"].source == "undeclared"


def test_a_declared_cost_is_the_estimate():
    x = torch.randn(1, 4, 2, 8)
    with register(kernel(costs={"cpu": Cost(call=2.0, source="a stopwatch")})):
        verdict = explain(x, x, x)["toy/a"]
    assert verdict.seconds == pytest.approx(2.0)
    assert verdict.source == "a stopwatch"


def test_a_backward_costs_more():
    x = torch.randn(1, 4, 2, 8)
    capabilities = replace(CPU, backward=Backward())
    with register(kernel(capabilities=capabilities, costs={"cpu": Cost(call=2.0, backward=3.0)})):
        forward = explain(x, x, x)["toy/a"].seconds
        x.requires_grad_()
        assert explain(x, x, x)["toy/a"].seconds == pytest.approx(4.0 * forward)


def test_a_kernel_takes_keywords_only_and_cannot_be_changed():
    with pytest.raises(TypeError):
        Kernel("toy/a", run, CPU)
    with pytest.raises(AttributeError):
        kernel().run = takes_all


def test_a_tensor_bias_is_handed_over_bound_and_with_its_data():
    seen = []

    def look(query, key, value, *, bias=None, scale):
        seen.append(bias)
        return query

    x, table = torch.randn(1, 4, 2, 8), torch.randn(4, 4)
    with register(kernel(run=look, capabilities=replace(CPU, biases={TensorBias}))):
        attention(x, x, x, table, kernel="toy/a")
        attention(x, x, x, 2 * table, kernel="toy/a")
    assert [bias.bound_lengths() for bias in seen] == [(4, 4), (4, 4)]
    assert torch.equal(seen[0].tensor, table)
    assert torch.equal(seen[1].tensor, 2 * table)


# What is checked when a kernel is registered

WRONG = {
    "devices is empty": ({"devices": []}, "devices: must be a set of device types"),
    "devices holds a torch.device": ({"devices": {torch.device("cpu")}}, "devices: must hold device types"),
    "dtypes holds a name": ({"dtypes": {"float32"}}, "dtypes: must hold dtypes"),
    "head_dims holds a string": ({"head_dims": {"8"}}, "head_dims: must hold sizes of 1 and more, got '8'"),
    "head_dims holds 0": ({"head_dims": range(0, 65, 8)}, "head_dims: must hold sizes of 1 and more, got 0"),
    "head_dims is an empty range": ({"head_dims": range(8, 8)}, "head_dims: must be a range or a set of sizes"),
    "head_dims_v is a number": ({"head_dims_v": 8}, "head_dims_v: must be a range or a set of sizes, got 8"),
    "a bias without a corner": ({"biases": {Causal()}}, "biases: a value must be one at every length"),
    "a bias with lengths": ({"biases": {Causal("top-left").bind(4, 4)}}, "without lengths and data"),
    "a bias with data": ({"biases": [TensorBias(torch.zeros(4, 4))]}, "without lengths and data"),
    "backward is a word": ({"backward": "yes"}, "backward: must be Backward, True, False or None, got 'yes'"),
    "gqa is a number": ({"gqa": 1}, "gqa: must be True or False, got 1"),
    "compile is a word": ({"compile": "yes"}, "compile: must be True or False, got 'yes'"),
    "min is a number": ({"min_compute_capability": 8}, r"min_compute_capability: must be two numbers.* got 8"),
    "max is a string": ({"max_compute_capability": "9.0"}, "max_compute_capability: must be two numbers"),
    "min above max": (
        {"min_compute_capability": (9, 0), "max_compute_capability": (8, 0)},
        r"must not lie below min_compute_capability \(9, 0\), got \(8, 0\)",
    ),
    "backward.dtypes": ({"backward": Backward(dtypes=torch.float32)}, "backward.dtypes: must be a set"),
    "backward.head_dims": ({"backward": Backward(head_dims=64)}, "backward.head_dims: must be a range or a set"),
    "backward.head_dims_v": ({"backward": Backward(head_dims_v={0})}, "backward.head_dims_v: must hold sizes of 1"),
    "backward.head_dims_v is a size": (
        {"backward": Backward(head_dims_v=64)},
        "backward.head_dims_v: must be a range or a set of sizes, got 64",
    ),
    "backward.gqa": ({"backward": Backward(gqa=1)}, "backward.gqa: must be True, False or None, got 1"),
    "backward.biases": ({"backward": Backward(biases={int})}, "backward.biases: must hold kinds or values"),
    "backward.bias_grad": ({"backward": Backward(bias_grad="yes")}, "backward.bias_grad: must be True or False"),
    "backward.min": ({"backward": Backward(min_compute_capability=8)}, "backward.min_compute_capability: must be two"),
}
WRONG_IN_KERNEL = {
    "costs holds seconds": ({"costs": {"cpu": 1.0}}, "costs: must be device type -> Cost"),
    "costs is a cost": ({"costs": Cost(call=1.0)}, "costs: must be device type -> Cost"),
    "skips holds a value": ({"skips": {Causal("top-left")}}, "skips: must hold kinds of AttnBias"),
    "skips is a word": ({"skips": "Causal"}, "skips: must hold kinds of AttnBias, got 'Causal'"),
    "refuse is a list": ({"refuse": []}, r"refuse: must be a function or None, got \[\]"),
    "calls_sdpa is a word": ({"calls_sdpa": "no"}, "calls_sdpa: must be True or False, got 'no'"),
    "probe is a word": ({"probe": "flash_attn"}, "probe: must be a function or None, got 'flash_attn'"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_a_field_that_does_not_hold_what_it_must_is_an_error_at_registration(given, message):
    with pytest.raises(DeclarationError, match=message) as error:
        register(kernel(run=takes_all, capabilities=replace(CPU, **given)))
    assert str(error.value).startswith("kernel 'toy/a' declares what cannot be:")
    assert not kernels("toy/*")


@pytest.mark.parametrize(("given", "message"), WRONG_IN_KERNEL.values(), ids=WRONG_IN_KERNEL)
def test_a_part_of_a_kernel_that_is_not_what_it_must_be_is_an_error_at_registration(given, message):
    with pytest.raises(DeclarationError, match=message):
        register(kernel(**given))
    assert not kernels("toy/*")


def test_all_wrong_fields_are_told_at_once():
    with pytest.raises(DeclarationError) as error:
        register(kernel(capabilities=replace(CPU, gqa=1, head_dims_v=8), costs={"cpu": 1.0}))
    lines = [line.strip().partition(":")[0] for line in str(error.value).splitlines()[1:]]
    assert lines == ["head_dims_v", "gqa", "costs"]


def test_every_flag_is_checked():
    assert set(FLAGS) == {f.name for f in fields(Capabilities) if f.type == "bool"}
    assert set(FLAGS_OF_BACKWARD) == {f.name for f in fields(Backward) if f.type == "bool"}


def test_what_torch_s_own_kernels_declare_can_be():
    for each in kernels("torch/*"):
        check_declaration(each)
