"""timm: models compute the same by attn, whenever and however they were made, and stock comes back bit for bit.

timm is not among the test requirements. `nox -s timm` installs it, and runs every model; here are a few.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import re
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attn_core
import pytest
import torch
from attn_core import (
    Capabilities,
    InputError,
    InputTypeError,
    Kernel,
    KernelRefusedError,
    TensorBias,
    UnknownKernelError,
    attention,
    prefer,
    record,
    register,
)
from attn_core.integrations import timm as attn_timm
from attn_core.integrations.torch import redirection, swap
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
import timm_checks
from timm_checks import OUTPUT_TOLERANCE, bitwise, check, enabled, output_difference, run
from timm_models import BIAS, FAST, SEED, WINDOWS, Arch, small

timm_checks.define_torchvision_ops()
timm = pytest.importorskip("timm", reason="timm is not installed; nox -s timm has it", exc_type=ImportError)
from timm.layers import set_fused_attn  # noqa: E402
from timm.models import eva, maxxvit, swin_transformer, xcit  # noqa: E402

VIT = Arch("vit_tiny_patch16_224", "", **small(32, depth=2))
SWIN = Arch("swin_tiny_patch4_window7_224", "", **small(56, depths=(1, 1), embed_dim=32, num_heads=(2, 4)))


@pytest.fixture(autouse=True)
def as_it_came():
    """Each test begins and ends with timm as it is installed."""
    assert not attn_timm.is_enabled()
    redirection._said.clear()
    yield
    attn_timm.disable()
    set_fused_attn(True)


@pytest.fixture
def no_bias_gradient():
    """A kernel that is right, fast on paper, and gives no gradient to a bias: as most are."""

    def kernel(query, key, value, *, bias=None, scale):
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
        if bias is not None:
            weights = weights + bias.materialize(query.device)
        return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), value)

    capabilities = Capabilities(
        devices={"cpu"}, dtypes={torch.float32}, head_dims=range(1, 257), biases={TensorBias}, backward=True
    )
    with register(Kernel(name="test/no-bias-gradient", run=kernel, capabilities=capabilities)):
        yield "test/no-bias-gradient"


# The same results.


@pytest.mark.parametrize("arch", FAST, ids=str)
def test_a_model_computes_the_same_by_attn_its_report_is_complete_and_disable_is_bitwise_stock(arch):
    check(arch, arch.build(), arch.images())


@pytest.mark.parametrize("arch", [arch for arch in FAST if arch.name.startswith(("vit", "beit", "xcit"))], ids=str)
def test_the_same_holds_for_a_model_with_fused_attention_off(arch):
    set_fused_attn(False)
    model = arch.build()
    assert not any(getattr(module, "fused_attn", False) for module in model.modules())
    check(arch, model, arch.images())


def test_padding_by_the_lowest_finite_number_means_what_it_does_in_timm():
    torch.manual_seed(SEED)
    model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=64, num_heads=2).eval()
    patches = torch.randn(2, 6, 16 * 16 * 3)
    where = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"), -1).view(1, 6, 2)
    inputs = {
        "patches": patches,
        "patch_coord": where.expand(2, -1, -1).clone(),
        "patch_valid": torch.arange(6) < torch.tensor([[6], [4]]),
    }
    stock = run(model, inputs)
    with enabled(), record() as calls:
        ours = run(model, inputs)
    assert any("TensorBias" in str(row.problem) for row in calls)
    assert output_difference(ours, stock) <= timm_checks.OUTPUT_TOLERANCE


def test_relative_positions_that_use_the_shared_bias_are_not_lost_where_fused_attention_is_off():
    class Adding(nn.Module):
        """Adds its own and the shared bias to the logits: what `get_bias` gives is half of it."""

        def __init__(self, num_heads, **_):
            super().__init__()
            self.own = nn.Parameter(torch.randn(1, num_heads, 4, 4))

        def get_bias(self):
            return self.own

        def forward(self, attn, shared_rel_pos=None):
            return attn + self.own + shared_rel_pos

    torch.manual_seed(SEED)
    x, shared = torch.randn(2, 2, 2, 64), torch.randn(1, 2, 4, 4)
    for fused_attn in (False, True):
        set_fused_attn(fused_attn)
        module = maxxvit.AttentionCl(64, 64, dim_head=32, rel_pos_cls=Adding)
        module.forward = (lambda forward: lambda x: forward(x.flatten(1, 2), shared).view_as(x))(module.forward)
        stock = run(module, x)
        with enabled():
            assert output_difference(run(module, x), stock) <= timm_checks.OUTPUT_TOLERANCE
            (row,) = attn_timm.report(module)
        assert row.redirected is fused_attn
        assert fused_attn or "Adding" in row.reason


@pytest.mark.parametrize("name", ["RelPosBias", "RelPosMlp", "RelPosBiasTf"])
def test_timms_own_relative_positions_compute_the_same_where_fused_attention_is_off(name):
    from timm import layers

    set_fused_attn(False)
    torch.manual_seed(SEED)
    make = getattr(layers, name)
    module = maxxvit.AttentionCl(64, 64, dim_head=32, rel_pos_cls=lambda **known: make(window_size=(2, 2), **known))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    module.eval()  # RelPosMlp has dropout of its own
    x = torch.randn(3, 4, 64)
    stock = run(module, x)
    with enabled(), record() as calls:
        ours = run(module, x)
    assert sum(calls.kernels.values()) == 1
    assert output_difference(ours, stock) <= timm_checks.OUTPUT_TOLERANCE
    vanishing = timm_checks.vanishing_gradients(module, x)  # that of a constant added to all logits
    assert timm_checks.gradient_difference(ours, stock, vanishing)[0] <= timm_checks.GRADIENT_TOLERANCE


@pytest.mark.parametrize("arch", [arch for arch in FAST if arch.row in (BIAS, WINDOWS)], ids=str)
def test_a_step_of_training_moves_every_parameter_as_it_does_in_timm(arch):
    def step():
        model = arch.build().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = model(arch.images()).square().sum()
        loss.backward()
        optimizer.step()
        return model.state_dict()

    start, stock = arch.build().state_dict(), step()
    with enabled():
        ours = step()
    tables = [
        name for name in stock if "relative_position_bias_table" in name or "shared_rel_pos.mlp.fc2.weight" in name
    ]
    assert tables
    assert all(not torch.equal(stock[name], start[name]) for name in tables)
    for name in stock:
        assert (ours[name] - stock[name]).abs().max() <= 1e-5 * stock[name].abs().max().clamp(min=1.0), name


# Dropout.


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_asked_for_in_training_alone(training):
    model = Arch(VIT.name, "", size=32, kwargs={**VIT.kwargs, "attn_drop_rate": 0.25}).build().train(training)
    with enabled(), record() as calls:
        model(VIT.images())
    assert {row.problem.dropout_p for row in calls} == {0.25 if training else 0.0}


def test_a_module_whose_dropout_would_be_lost_keeps_its_own_way_in_training():
    model = xcit.XCA(32, num_heads=2, attn_drop=0.5)
    x = torch.randn(2, 5, 32)
    torch.manual_seed(SEED)
    stock = model(x)
    with enabled():
        torch.manual_seed(SEED)
        assert torch.equal(model(x), stock)
        (row,) = attn_timm.report(model)
        assert not row.redirected
        assert "dropout" in row.reason
        assert attn_timm.report(model.eval())[""].redirected


# Enable and disable.


def calls_of(model, images):
    with torch.no_grad(), record() as calls:
        model(images)
    return sum(calls.kernels.values())


def test_models_made_before_during_and_after_follow():
    before = SWIN.build()
    attn_timm.enable()
    during = SWIN.build()
    assert [calls_of(model, SWIN.images()) for model in (before, during)] == [2, 2]
    attn_timm.disable()
    after = SWIN.build()
    assert [calls_of(model, SWIN.images()) for model in (before, during, after)] == [0, 0, 0]
    outcomes = [run(model, SWIN.images()) for model in (before, during, after)]
    assert bitwise(outcomes[0], outcomes[1])
    assert bitwise(outcomes[0], outcomes[2])


def test_every_function_of_timm_that_calls_torchs_attention_is_found():
    folder = Path(timm.__file__).parent
    written = set()
    for path in folder.rglob("*.py"):
        module = ".".join(("timm", *path.relative_to(folder).with_suffix("").parts))
        source = path.read_text(encoding="utf-8")
        for owner in ast.parse(source).body if attn_timm.sites.SDPA in source else ():
            if isinstance(owner, ast.ClassDef):
                for function in owner.body:
                    if any(
                        isinstance(node, ast.Call) and ast.unparse(node.func).endswith(attn_timm.sites.SDPA)
                        for node in ast.walk(function)
                    ):
                        written.add(f"{module}.{owner.name}.{function.name}")
    assert {site.name for site in attn_timm.sites.sites()} == written
    assert len(written) >= 39


def test_disable_gives_every_function_its_own_code_back():
    found = attn_timm.sites.sites()
    attn_timm.enable()
    assert all(site.function.__code__ is not site.stock for site in found)
    attn_timm.disable()
    assert all(site.function.__code__ is site.stock for site in found)


def test_what_somebody_else_changed_meanwhile_is_left_to_them():
    forward = swin_transformer.WindowAttention.forward
    stock = forward.__code__
    attn_timm.enable()
    theirs = forward.__code__.replace(co_name="theirs")
    forward.__code__ = theirs
    try:
        with pytest.warns(UserWarning, match=r"WindowAttention\.forward was changed by somebody else"):
            attn_timm.disable()
        assert forward.__code__ is theirs
    finally:
        forward.__code__ = stock


def test_enable_twice_changes_the_options_only_and_disable_without_enable_nothing():
    attn_timm.disable()
    model, images = VIT.build(), VIT.images()
    for options, kernel in (((), "torch/flash"), (("torch/math",), "torch/math"), ((), "torch/flash")):
        attn_timm.enable(prefer=options)
        with torch.no_grad(), record() as calls:
            model(images)
        assert calls.kernels == {kernel: 2}
    attn_timm.disable()
    assert not attn_timm.is_enabled()


def test_attn_core_enable_and_disable_do_the_same():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the installed version is one of those that are tested
        attn_core.enable("timm", prefer="torch/math")
    with torch.no_grad(), record() as calls:
        VIT.build()(VIT.images())
    assert calls.kernels == {"torch/math": 2}
    attn_core.disable()
    assert not attn_timm.is_enabled()


def test_assign_and_record_name_the_modules_of_a_timm_model():
    model = VIT.build()
    with enabled(), torch.no_grad(), attn_core.assign(model, {"blocks.1.*": "torch/math"}), record(model) as calls:
        model(VIT.images())
    assert {row.module: row.kernel for row in calls} == {
        "blocks.0.attn": "torch/flash",
        "blocks.1.attn": "torch/math",
    }


def test_timm_and_torch_can_both_be_enabled():
    model, images = VIT.build(), VIT.images()
    attn_core.enable("torch", "timm", prefer="torch/math")
    try:
        with torch.no_grad(), record() as calls:
            model(images)
        assert calls.kernels == {"torch/math": 2}
    finally:
        attn_core.disable()


def test_an_unknown_kernel_is_an_error_and_changes_nothing():
    with pytest.raises(UnknownKernelError, match="torch/flsh"):
        attn_timm.enable(prefer=("torch/flsh",))
    assert not attn_timm.is_enabled()


def test_calls_of_others_are_not_touched():
    stock = torch.nn.functional.scaled_dot_product_attention
    x = torch.randn(1, 2, 3, 8)
    with enabled(prefer=("torch/math",)):
        assert torch.nn.functional.scaled_dot_product_attention is stock
        with record() as calls:
            stock(x, x, x)
        assert not calls.kernels
        with record() as calls:
            attention(x, x, x)
        assert calls.kernels == {"torch/flash": 1}


def test_threads_follow_their_own_scopes_while_others_enable():
    model, images = VIT.build(), VIT.images()
    with torch.no_grad():
        stock = model(images)
    names = ["torch/math", "torch/reference", "torch/flash"]
    started = threading.Barrier(len(names))

    def go(name):
        started.wait()
        seen = set()
        for _ in range(5):
            attn_timm.enable()
            with torch.no_grad(), prefer(name), record() as calls:
                assert (model(images) - stock).abs().max() <= 1e-5
            seen |= set(calls.kernels)
        return seen

    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(go, names)) == [{name} for name in names]


# Which kernel.


def test_a_kernel_without_gradient_to_the_bias_is_passed_over_with_one_warning_that_names_the_module(no_bias_gradient):
    model, images = SWIN.build(), SWIN.images()
    stock = run(model, images)
    with enabled(prefer=(no_bias_gradient,)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ours = run(model, images)
            run(model, images)
        (warning,) = (str(each.message) for each in said)
        assert warning.startswith("layers.0.blocks.0.attn (timm.models.swin_transformer.WindowAttention): ")
        assert f"{no_bias_gradient} is refused: " in warning
        tables = [name for name in stock.gradients if name.endswith("relative_position_bias_table")]
        assert len(tables) == 2
        for name in tables:
            difference = (ours.gradients[name] - stock.gradients[name]).abs().max()
            assert difference <= 1e-4 * stock.gradients[name].abs().max()
        with warnings.catch_warnings(), torch.no_grad(), record() as calls:
            warnings.simplefilter("error")
            model(images)
        assert calls.kernels == {no_bias_gradient: 2}


def test_strict_raises_at_once_and_names_the_module(no_bias_gradient):
    model, images = SWIN.build(), SWIN.images()
    with (
        enabled(prefer=(no_bias_gradient,), strict=True),
        pytest.raises(KernelRefusedError, match=r"^layers\.0\.blocks\.0\.attn \(timm\..*\): prefer\((.|\n)*bias"),
    ):
        model(images)


def test_strict_names_the_module_of_a_compiled_model_too(no_bias_gradient):
    model, images = SWIN.build(), SWIN.images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with (
        enabled(prefer=(no_bias_gradient,), strict=True),
        pytest.raises(Exception, match=r"layers\.0\.blocks\.0\.attn \(timm\.models\.swin_transformer\.Window"),
    ):
        compiled(images)
    torch.compiler.reset()


# Beside a swap.


@pytest.mark.parametrize("arch", [VIT, SWIN], ids=str)
def test_a_model_can_be_swapped_while_timm_is_enabled_and_stays_attns_when_it_is_no_more(arch):
    model, images = arch.build(), arch.images()
    stock = run(model, images)
    attn_timm.enable()
    with swap(model) as handle:
        assert len(handle.swapped) == 2
        assert handle.left == {}
        for enabled_still in (True, False):
            assert attn_timm.is_enabled() == enabled_still
            with record(model) as calls:
                ours = run(model, images)
            assert set(calls.by_module) == set(handle.swapped)
            assert output_difference(ours, stock) <= OUTPUT_TOLERANCE
            assert {row.module for row in attn_timm.report(model).redirected} == set(handle.swapped)
            attn_timm.disable()
    assert bitwise(stock, run(model, images))


def test_a_model_that_was_swapped_before_keeps_its_way_while_timm_is_enabled():
    model, images = VIT.build(), VIT.images()
    with swap(model), torch.no_grad():
        with enabled(prefer=("torch/math",)), record() as calls:
            model(images)
            report = attn_timm.report(model)
        assert calls.kernels == {"torch/flash": 2}  # that is for timm's own classes
        assert [row.reason for row in report] == ["swapped by attn_core.integrations.torch"] * 2
    off = SWIN.build()  # timm leaves its flag off
    with swap(off), torch.no_grad(), record() as calls:
        off(SWIN.images())
        assert [row.reason for row in attn_timm.report(off).left_alone] == [
            "fused_attn is off, which a class that was swapped heeds"
        ] * 2
    assert calls.kernels == {}


def test_a_swap_says_of_a_class_that_was_made_for_attn_that_it_calls_attn_already():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, attn_layer=attn_timm.Attention)
    with pytest.raises(InputError, match=r"blocks\.0\.attn: left: its class calls attn already"):
        swap(vit)


def test_a_mask_beside_is_causal_is_an_error():
    module = timm.layers.Attention(32, num_heads=2)
    with enabled(), pytest.raises(InputError, match="is_causal"):
        module(torch.randn(1, 3, 32), attn_mask=torch.zeros(3, 3), is_causal=True)


# torch.compile, export, scripting, fx.


@pytest.mark.parametrize("arch", [VIT, SWIN], ids=str)
def test_a_compiled_model_is_one_graph_and_follows_enable_and_disable(arch):
    model, images = arch.build(), arch.images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        stock = compiled(images)
        with enabled(prefer=("torch/math",)):
            with record() as calls:
                ours = compiled(images)
            assert {(row.kernel, row.compiled) for row in calls} == {("torch/math", True)}
            assert (ours - stock).abs().max() <= 1e-5
        with record() as calls:
            assert torch.equal(compiled(images), stock)
        assert not len(calls)
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_keeps_torchs_attention_and_says_so_once(strict):
    model, images = SWIN.build(), SWIN.images()
    stock = torch.export.export(model, (images,), strict=strict)
    with enabled(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = torch.export.export(model, (images,), strict=strict)
    assert [str(node.target) for node in ours.graph.nodes] == [str(node.target) for node in stock.graph.nodes]
    assert sum("not redirected under torch.export" in str(each.message) for each in said) == 1


def test_a_traced_model_keeps_torchs_attention_and_says_so():
    model, images = VIT.build(), VIT.images()
    with enabled(), record() as calls, pytest.warns(UserWarning, match=r"not redirected under torch\.jit\.trace"):
        traced = torch.jit.trace(model, images, check_trace=False)  # which would run the model
    assert not calls.kernels
    assert "scaled_dot_product_attention" in str(traced.inlined_graph)


@pytest.mark.parametrize("on", [False, True])
def test_scripting_works_and_the_report_says_that_it_is_not_redirected(on):
    model, images = VIT.build(), VIT.images()
    with torch.no_grad():
        stock = model(images)
        if on:
            attn_timm.enable()
        scripted = torch.jit.script(model)
        assert (scripted(images) - stock).abs().max() <= 1e-5
    report = attn_timm.report(scripted)
    assert not report.redirected
    assert {row.reason for row in report.left_alone} == {"TorchScript, which runs without Python"}


@pytest.mark.parametrize("on", [False, True])
def test_feature_extraction_by_fx_works_and_the_report_says_that_it_is_not_redirected(on):
    model, images = VIT.build(), VIT.images()
    with torch.no_grad():
        stock = model(images)
        if on:
            attn_timm.enable()
        graph = torch.fx.symbolic_trace(model)
        assert (graph(images) - stock).abs().max() <= 1e-5
    (row,) = attn_timm.report(graph)
    assert not row.redirected
    assert "torch.fx" in row.reason


# Classes of layers.


@pytest.mark.parametrize("on", [False, True], ids=["timm as it came", "timm enabled"])
def test_attn_layer_makes_one_model_compute_by_attn(on):
    if on:
        attn_timm.enable()
    stock, ours = VIT.build(), VIT.build(attn_layer=attn_timm.Attention)
    attn_timm.disable()
    ours.load_state_dict(stock.state_dict())
    with record() as calls:
        outcome = run(ours, VIT.images())
    assert sum(calls.kernels.values()) == 2
    assert output_difference(outcome, run(stock, VIT.images())) <= timm_checks.OUTPUT_TOLERANCE
    assert {row.reason for row in attn_timm.report(ours).redirected} == {"by its class"}
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied.blocks[0].attn) is attn_timm.Attention
        assert bitwise(run(copied, VIT.images()), outcome)


LAYERS = [("Attention", {}), ("AttentionRope", {}), ("DiffAttention", {}), ("EvaAttention", {"scale_norm": False})]


@pytest.mark.parametrize(("name", "options"), LAYERS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("fused_attn", [True, False])
def test_each_layer_computes_what_timms_does(name, options, fused_attn):
    set_fused_attn(fused_attn)
    ours = getattr(attn_timm, name)
    (theirs,) = ours.__bases__
    assert theirs is getattr(eva if name == "EvaAttention" else timm.layers, name)
    torch.manual_seed(SEED)
    stock = theirs(32, num_heads=2, **options).eval()
    layer = ours(32, num_heads=2, **options).eval()
    layer.load_state_dict(stock.state_dict())
    x = torch.randn(2, 5, 32)
    for call in ({}, {"attn_mask": torch.randn(1, 1, 5, 5)}, {"is_causal": True}):
        with record() as calls:
            out = layer(x, **call)
        assert calls.kernels
        assert (out - stock(x, **call)).abs().max() <= 1e-5


def test_a_layer_of_ones_own_is_made_of_any_class_that_calls_torchs_attention():
    ours = attn_timm.attn_layer(swin_transformer.WindowAttention)
    assert ours is attn_timm.attn_layer(swin_transformer.WindowAttention)
    assert issubclass(ours, swin_transformer.WindowAttention)
    with pytest.raises(InputTypeError, match=r"Mlp never calls scaled_dot_product_attention"):
        attn_timm.attn_layer(timm.layers.Mlp)


def test_a_layer_can_be_scripted_and_compiled():
    model = VIT.build(attn_layer=attn_timm.Attention)
    with torch.no_grad():
        out = model(VIT.images())
        assert (torch.jit.script(model)(VIT.images()) - out).abs().max() <= 1e-5
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert (compiled(VIT.images()) - out).abs().max() <= 1e-5
    torch.compiler.reset()


def test_the_docstring_of_the_package_names_what_there_is():
    for name in attn_timm.layers.CLASSES:
        assert inspect.isclass(getattr(attn_timm, name))
        assert name in dir(attn_timm)
    with pytest.raises(AttributeError, match="Attenton"):
        attn_timm.Attenton  # noqa: B018


# The report.


class OwnAttention(nn.Module):
    """Somebody's own, in a timm model."""

    def __init__(self, dim, **_):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_the_report_says_why_each_module_is_left_alone():
    model = VIT.build()
    assert {row.reason for row in attn_timm.report(model)} == {
        "attn is not enabled for timm; attn_core.integrations.timm.enable() does that"
    }
    model.blocks[1].attn = OwnAttention(192)
    model.extra = nn.MultiheadAttention(8, 2)
    model.cosine = timm.models.swin_transformer_v2.WindowAttention(32, (2, 2), 2)
    model.einsum = timm.layers.MultiQueryAttention2d(32, num_heads=2)
    model.einsum.einsum = True
    with enabled():
        report = attn_timm.report(model)
    assert [row.module for row in report.redirected] == ["blocks.0.attn"]
    reasons = {row.module: row.reason for row in report.left_alone}
    assert set(reasons) == {"blocks.1.attn", "extra", "cosine", "einsum"}
    assert "code that is not timm's" in reasons["blocks.1.attn"]
    assert "torch's own module" in reasons["extra"]
    assert "cosine attention" in reasons["cosine"]
    assert "einsum=True" in reasons["einsum"]
    text = str(report)
    assert "1 modules by attn, 4 left alone" in text
    assert all(name in text for name in reasons)
    assert [row["redirected"] for row in report.to_dict()].count(True) == 1
    with pytest.raises(KeyError):
        report["nothing"]
    attn_core.enable("torch")
    with enabled():
        assert {row.module for row in attn_timm.report(model).left_alone} == {"cosine", "einsum"}
    attn_core.disable("torch")


def test_the_report_shows_as_a_table():
    from rich.console import Console

    with enabled():
        report = attn_timm.report(VIT.build())
    console = Console(width=200)
    with console.capture() as shown:
        console.print(report)
    assert "blocks.0.attn, blocks.1.attn" in shown.get()


def test_a_subclass_that_calls_its_base_is_redirected_and_one_that_does_not_is_not():
    class Calling(timm.layers.Attention):
        def forward(self, x):
            return super().forward(x)

    class Other(timm.layers.Attention):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    with enabled():
        model = nn.ModuleDict({"calling": Calling(8, num_heads=1), "other": Other(8, num_heads=1)})
        assert [(row.module, row.redirected) for row in attn_timm.report(model)] == [
            ("calling", True),
            ("other", False),
        ]
        with record() as calls:
            model["calling"](torch.randn(1, 3, 8))
        assert sum(calls.kernels.values()) == 1


# The document.

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "use-with-timm.md"


def test_the_examples_of_the_how_to_print_what_it_shows(capsys):
    text = PAGE.read_text(encoding="utf-8")
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        exec(compile(code, str(PAGE), "exec"), names)
    shown = re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert capsys.readouterr().out == "".join(shown)


def test_the_how_to_names_every_class_that_is_left_alone_with_its_reason():
    text = PAGE.read_text(encoding="utf-8")
    reasons = attn_timm.reasons.OWN_ATTENTION | attn_timm.reasons.OTHER_SOFTMAX
    for name, what in reasons.items():
        assert f"| `{name}` | {what} |" in text
        module, _, cls = name.rpartition(".")
        assert inspect.isclass(getattr(importlib.import_module(f"timm.{module}"), cls))
