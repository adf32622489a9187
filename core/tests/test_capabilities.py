"""Capabilities: every field accepts what it names, refuses the rest under its own name, and is closed by default."""

from dataclasses import fields, replace

import pytest
import torch
from attn_core import (
    ANY_DEVICE,
    ANY_DIM,
    AttnBias,
    Backward,
    Capabilities,
    Causal,
    DeclarationError,
    KeyPadding,
    Mask,
    Problem,
    Refusal,
    TensorBias,
    Window,
)
from attn_core.capabilities import covers

MINIMAL = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={64})
PLAIN = Problem(
    batch=2,
    seqlen_q=16,
    seqlen_kv=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    head_dim_v=64,
    dtype=torch.float32,
    device="cpu",
    scale=0.125,
)
MASK = TensorBias(torch.empty(16, 16, dtype=torch.bool, device="meta")).bind(16, 16)
TABLE = TensorBias(torch.empty(16, 16, device="meta").requires_grad_()).bind(16, 16)


def fields_refused(capabilities, **asked):
    return [refusal.field for refusal in capabilities.refusals(replace(PLAIN, **asked))]


def on_cuda(compute_capability, **asked):
    return {"device": "cuda", "compute_capability": compute_capability, **asked}


def declared(**given):
    return replace(MINIMAL, **given)


def backward(**given):
    """A kernel that does everything in the forward, and in the backward what is given."""
    return declared(
        devices={"cpu", "cuda"},
        dtypes={torch.float32, torch.float16},
        head_dims={64, 128},
        head_dims_v={32, 64, 128},
        biases={Causal, TensorBias},
        gqa=True,
        return_lse=True,
        deterministic=True,
        backward=Backward(**given),
    )


# Field of Capabilities -> (a declaration that covers the problem, one that does not, the problem, the field refused)
FIELDS = {
    "devices": (declared(devices={"cpu", "mps"}), MINIMAL, {"device": "mps"}, "device"),
    "dtypes": (declared(dtypes={torch.float64}), MINIMAL, {"dtype": torch.float64}, "dtype"),
    "head_dims": (declared(head_dims=range(8, 257, 8)), MINIMAL, {"head_dim": 72, "head_dim_v": 72}, "head_dim"),
    "head_dims_v": (declared(head_dims_v={32}), MINIMAL, {"head_dim_v": 32}, "head_dim_v"),
    "biases": (declared(biases={Causal}), MINIMAL, {"bias": Causal().bind(16, 16).normalize()}, "bias"),
    "backward": (declared(backward=True), MINIMAL, {"requires_grad": True}, "backward"),
    "gqa": (declared(gqa=True), MINIMAL, {"num_kv_heads": 2}, "num_kv_heads"),
    "softcap": (declared(softcap=True), MINIMAL, {"softcap": 30.0}, "softcap"),
    "dropout": (declared(dropout=True), MINIMAL, {"dropout_p": 0.1}, "dropout_p"),
    "return_lse": (declared(return_lse=True), MINIMAL, {"return_lse": True}, "return_lse"),
    "deterministic": (declared(deterministic=True), MINIMAL, {"deterministic": True}, "deterministic"),
    "forward_ad": (declared(forward_ad=True), MINIMAL, {"forward_ad": True}, "forward_ad"),
    "compile": (declared(compile=True), MINIMAL, {"compiling": True}, "compiling"),
    "strided_head_dim": (declared(strided_head_dim=True), MINIMAL, {"strided_head_dim": True}, "strided_head_dim"),
    "empty_lengths": (declared(empty_lengths=True), MINIMAL, {"seqlen_q": 0}, "empty_lengths"),
    "min_compute_capability": (
        declared(devices={"cuda"}, min_compute_capability=(8, 0)),
        declared(devices={"cuda"}, min_compute_capability=(9, 0)),
        on_cuda((8, 6)),
        "compute_capability",
    ),
    "max_compute_capability": (
        declared(devices={"cuda"}, max_compute_capability=(9, 0)),
        declared(devices={"cuda"}, max_compute_capability=(8, 9)),
        on_cuda((9, 0)),
        "compute_capability",
    ),
}

BACKWARD_FIELDS = {
    "dtypes": (
        backward(),
        backward(dtypes={torch.float32}),
        {"dtype": torch.float16},
        "backward.dtypes",
    ),
    "head_dims": (
        backward(head_dims=range(8, 129)),
        backward(head_dims={64}),
        {"head_dim": 128, "head_dim_v": 128},
        "backward.head_dims",
    ),
    "head_dims_v": (
        backward(head_dims_v={32}),
        backward(head_dims_v={128}),
        {"head_dim_v": 32},
        "backward.head_dims_v",
    ),
    "biases": (
        backward(biases={Causal}),
        backward(biases=()),
        {"bias": Causal("top-left").bind(16, 16)},
        "backward.biases",
    ),
    "gqa": (backward(gqa=True), backward(gqa=False), {"num_kv_heads": 2}, "backward.gqa"),
    "bias_grad": (backward(bias_grad=True), backward(), {"bias": TABLE, "bias_requires_grad": True}, "bias_grad"),
    "lse_grad": (backward(lse_grad=True), backward(), {"return_lse": True}, "lse_grad"),
    "deterministic": (
        backward(deterministic=True),
        backward(),
        {"deterministic": True},
        "backward.deterministic",
    ),
    "min_compute_capability": (
        backward(min_compute_capability=(8, 0)),
        backward(min_compute_capability=(9, 0)),
        on_cuda((8, 6)),
        "backward.min_compute_capability",
    ),
}

#: Fields that no problem can ask for: they are told, and tested where a kernel is, not refused.
TOLD = {"batch_invariant"}
TOLD_OF_BACKWARD = {"double"}
#: Refused where kernels are weighed, since it depends on what the caller allows.
ELSEWHERE = {"numerics"}


@pytest.mark.parametrize(("covering", "lacking", "asked", "field"), FIELDS.values(), ids=FIELDS)
def test_a_field_accepts_what_it_names_and_refuses_the_rest_by_its_name(covering, lacking, asked, field):
    assert fields_refused(covering, **asked) == []
    assert fields_refused(lacking, **asked) == [field]


@pytest.mark.parametrize(
    ("covering", "lacking", "asked", "field"), BACKWARD_FIELDS.values(), ids=[f"backward.{f}" for f in BACKWARD_FIELDS]
)
def test_a_field_of_the_backward_counts_only_where_a_gradient_is_needed(covering, lacking, asked, field):
    assert fields_refused(lacking, **{**asked, "bias_requires_grad": False}) == []
    assert fields_refused(covering, **asked, requires_grad=True) == []
    assert fields_refused(lacking, **asked, requires_grad=True) == [field]


def test_every_field_has_a_case():
    assert {f.name for f in fields(Capabilities)} == set(FIELDS) | TOLD | ELSEWHERE
    assert {f.name for f in fields(Backward)} == set(BACKWARD_FIELDS) | TOLD_OF_BACKWARD


def test_what_is_not_declared_is_not_supported():
    for field in fields(Capabilities):
        if field.name not in ("devices", "dtypes", "head_dims", "numerics"):
            assert getattr(MINIMAL, field.name) in (None, False, ()), field.name
    assert MINIMAL.numerics == "exact"
    assert MINIMAL.refusals(PLAIN) == []


def test_all_reasons_are_listed_at_once_each_with_its_field_and_what_it_got():
    asked = {
        "device": "mps",
        "dtype": torch.float64,
        "head_dim": 72,
        "head_dim_v": 40,
        "bias": Window(4, 0).bind(16, 16),
        "num_kv_heads": 2,
        "softcap": 30.0,
        "dropout_p": 0.1,
        "return_lse": True,
        "deterministic": True,
        "forward_ad": True,
        "compiling": True,
        "strided_head_dim": True,
        "batch": 0,
        "requires_grad": True,
    }
    assert set(fields_refused(MINIMAL, **asked)) == {
        *("device", "dtype", "head_dim", "head_dim_v", "bias", "num_kv_heads", "softcap", "dropout_p", "return_lse"),
        *("deterministic", "forward_ad", "compiling", "strided_head_dim", "empty_lengths", "backward"),
    }
    told = {r.field: str(r) for r in MINIMAL.refusals(replace(PLAIN, **asked))}
    assert told["device"] == "device: takes cpu, got mps"
    assert told["dtype"] == "dtype: takes float32, got float64"
    assert told["head_dim"] == "head_dim: takes 64, got 72"
    assert told["bias"] == "bias: takes no bias, got Window(4, 0).bind(16, 16)"
    assert told["num_kv_heads"] == "num_kv_heads: takes num_kv_heads equal to num_heads=4, got 2"


def test_all_reasons_of_the_backward_are_listed_at_once():
    lacking = replace(
        backward(
            dtypes={torch.float16},
            head_dims={128},
            head_dims_v=(),
            biases={Causal},
            gqa=False,
            min_compute_capability=(9, 0),
        ),
        devices={"cuda"},
    )
    sizes = {"head_dim_v": 32, "num_kv_heads": 2}
    asked = on_cuda(
        (8, 0), bias=TABLE, bias_requires_grad=True, return_lse=True, deterministic=True, requires_grad=True, **sizes
    )
    assert set(fields_refused(lacking, **asked)) == {
        *("backward.dtypes", "backward.head_dims", "backward.head_dims_v", "backward.biases", "backward.gqa"),
        *("bias_grad", "lse_grad", "backward.deterministic", "backward.min_compute_capability"),
    }
    told = {r.field: r.message for r in lacking.refusals(replace(PLAIN, **asked))}
    assert told["backward.head_dims_v"] == "takes head_dim_v equal to head_dim=64 in the backward, got 32"
    assert told["backward.gqa"] == "takes num_kv_heads equal to num_heads=4 in the backward, got 2"


@pytest.mark.parametrize("sizes_v", [(), {32}, range(8, 33, 8)], ids=repr)
def test_a_head_dim_v_that_equals_head_dim_is_never_among_those_that_the_backward_lists(sizes_v):
    assert fields_refused(backward(head_dims_v=sizes_v), requires_grad=True) == []


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (range(8, 257, 8), "multiples of 8 up to 256"),
        (range(1, 129), "1 to 128"),
        (range(16, 257, 8), "16 to 256 in steps of 8"),
        (ANY_DIM[7:], "8 and more"),
        (range(8, 1 << 16, 8), "multiples of 8"),
        ({128, 64}, "64, 128"),
    ],
    ids=str,
)
def test_sizes_are_told_in_words(sizes, text):
    head_dim = 7 if 7 not in sizes else 4097
    [refusal] = declared(head_dims=sizes).refusals(replace(PLAIN, head_dim=head_dim, head_dim_v=head_dim))
    assert refusal == Refusal("head_dim", f"takes {text}, got {head_dim}")


# Devices and compute capability


def test_any_device_covers_every_device():
    for device in ("cpu", "cuda", "mps", "meta", "privateuseone"):
        assert fields_refused(declared(devices=ANY_DEVICE), device=device) == []


LIMITED = declared(devices={"cpu", "cuda"}, min_compute_capability=(8, 0), max_compute_capability=(9, 0))


@pytest.mark.parametrize(
    ("compute_capability", "reason"),
    [
        ((7, 5), "takes sm_80 or newer, got sm_75"),
        ((8, 0), None),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 0), "is known to work up to sm_90; sm_100 is newer than known"),
        (None, "has limits, and the device's compute capability is unknown here"),
    ],
    ids=str,
)
def test_compute_capability_has_a_lower_and_an_upper_limit(compute_capability, reason):
    found = LIMITED.refusals(replace(PLAIN, **on_cuda(compute_capability)))
    assert found == ([] if reason is None else [Refusal("compute_capability", reason)])


def test_limits_of_compute_capability_concern_cuda_alone():
    assert fields_refused(LIMITED, device="cpu") == []
    assert fields_refused(declared(devices={"cuda"}), **on_cuda(None)) == []  # no limit: unknown will do


def test_the_backward_s_limit_of_an_unknown_compute_capability_refuses():
    limited = backward(min_compute_capability=(8, 0))
    [refusal] = limited.refusals(replace(PLAIN, requires_grad=True, **on_cuda(None)))
    assert refusal.field == "backward.min_compute_capability"
    assert "got unknown" in refusal.message
    assert fields_refused(limited, requires_grad=True) == []


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_kv"])
def test_an_empty_length_is_refused_where_it_is_not_declared(empty):
    [refusal] = MINIMAL.refusals(replace(PLAIN, **{empty: 0}))
    assert refusal.field == "empty_lengths"
    assert f"{empty}=0" in refusal.message


# Backward


def test_backward_true_means_as_the_forward():
    assert declared(backward=True, deterministic=True).backward == Backward(deterministic=True)
    assert declared(backward=True).backward == Backward()
    assert declared(backward=False).backward is None


def test_a_gradient_to_the_bias_alone_needs_a_backward():
    assert fields_refused(declared(biases={TensorBias}), bias=TABLE, bias_requires_grad=True) == ["backward"]


# Kinds and values of biases


class Diagonal(Mask):
    """A stranger's kind: each query sees its own key."""

    key = ()

    def __init__(self, lengths=None):
        self.lengths = lengths

    def bind(self, seqlen_q, seqlen_kv):
        return Diagonal((seqlen_q, seqlen_kv))

    def at(self, lengths):
        return Diagonal(lengths)

    def facts(self):
        return ()

    @classmethod
    def from_facts(cls, facts, batch, num_heads, lengths):
        return cls(lengths)

    def keep(self, b, h, q, k):
        return q == k


class StrictCausal(Causal):
    """A subclass means something else."""


TOP_LEFT, BOTTOM_RIGHT = Causal("top-left"), Causal("bottom-right")

COVERED = {
    "kind covers the top-left corner": ({Causal}, TOP_LEFT.bind(4, 6), True),
    "kind covers the bottom-right corner": ({Causal}, BOTTOM_RIGHT.bind(4, 6), True),
    "kind does not cover another kind": ({Causal}, Window(1, 1, "top-left").bind(4, 6), False),
    "kind does not cover its subclass": ({Causal}, StrictCausal("top-left", (4, 6)), False),
    "value covers itself": ({BOTTOM_RIGHT}, BOTTOM_RIGHT.bind(4, 6), True),
    "value does not cover the other corner": ({BOTTOM_RIGHT}, TOP_LEFT.bind(4, 6), False),
    "bottom-right covers Causal() at equal lengths": ({BOTTOM_RIGHT}, Causal().bind(6, 6).normalize(), True),
    "bottom-right covers top-left at equal lengths": ({BOTTOM_RIGHT}, TOP_LEFT.bind(6, 6).normalize(), True),
    "Causal() covers bottom-right at equal lengths": ({Causal()}, BOTTOM_RIGHT.bind(6, 6).normalize(), True),
    "top-left covers bottom-right at equal lengths": ({TOP_LEFT}, BOTTOM_RIGHT.bind(6, 6).normalize(), True),
    "window value covers itself": ({Window(2, 0)}, Window(2, 0).bind(6, 6).normalize(), True),
    "window value does not cover a wider one": ({Window(2, 0)}, Window(3, 0).bind(6, 6).normalize(), False),
    "Mask covers Causal": ({Mask}, TOP_LEFT.bind(4, 6), True),
    "Mask covers a stranger's kind": ({Mask}, Diagonal((4, 6)), True),
    "Mask does not cover a dense bias": ({Mask}, MASK, False),
    "AttnBias covers a dense bias": ({AttnBias}, MASK, True),
    "AttnBias covers a stranger's kind": ({AttnBias}, Diagonal((4, 6)), True),
    "Mask does not cover padding": ({Mask}, KeyPadding([2, 3]).bind(4, 6), False),
    "AttnBias does not cover padding": ({AttnBias}, KeyPadding([2, 3]).bind(4, 6), False),
    "KeyPadding covers padding": ({KeyPadding}, KeyPadding([2, 3]).bind(4, 6), True),
    "nothing covers nothing": ((), TOP_LEFT.bind(4, 6), False),
}


@pytest.mark.parametrize(("biases", "bias", "expected"), COVERED.values(), ids=COVERED)
def test_a_declared_bias_covers(biases, bias, expected):
    assert covers(biases, bias) is expected


# What cannot be a declaration

WRONG = {
    "devices is a string": ({"devices": "cuda"}, "devices must be a set"),
    "dtypes is one dtype": ({"dtypes": torch.float32}, "dtypes must be a set"),
    "head_dims is one size": ({"head_dims": 64}, "head_dims must be a set"),
    "biases holds another class": ({"biases": {torch.Tensor}}, "biases holds kinds or values of AttnBias"),
    "biases holds an object": ({"biases": [object()]}, "biases holds kinds or values of AttnBias"),
    "biases is a string": ({"biases": "Causal"}, "biases holds kinds or values of AttnBias"),
    "numerics is another word": ({"numerics": "fast"}, '"exact" or "approximate", got \'fast\''),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_a_declaration_is_an_error(given, message):
    with pytest.raises(DeclarationError, match=message):
        declared(**given)


def test_capabilities_take_keywords_only_and_cannot_be_changed():
    with pytest.raises(TypeError):
        Capabilities({"cpu"}, {torch.float32}, {64})
    with pytest.raises(AttributeError):
        MINIMAL.gqa = True
