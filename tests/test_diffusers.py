"""diffusers: models' results stay what they are when attn runs their attention, no argument vanishes, and it undoes."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import importlib_metadata
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("diffusers", reason='diffusers is not installed: pip install "diffusers>=0.36,<0.43"')

import attn_core
from attn_core import (
    Causal,
    InputError,
    KernelRefusedError,
    UnknownKernelError,
    Window,
    prefer,
    record,
    reference_attention,
)
from attn_core.integrations import diffusers as integration
from attn_core.integrations.diffusers import calls, disable, enable, is_enabled
from attn_core.integrations.diffusers.own_calls import OwnCalls
from attn_core.integrations.diffusers.reporting import NOT_ENABLED
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models import attention_dispatch as host
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from diffusers_models import MODELS, SEED, run

NAMES, REGISTRY = host.AttentionBackendName, host._AttentionBackendRegistry
BATCH, SEQLEN_Q, SEQLEN_KV, HEADS, DIM = 2, 5, 7, 4, 8
ATOL = 1e-5


def state_of_diffusers():
    """All that `enable` touches."""
    return {
        "members": dict(NAMES._member_map_),
        "names": list(NAMES._member_names_),
        "values": dict(NAMES._value2member_map_),
        "attributes": set(vars(NAMES)),
        "backends": dict(REGISTRY._backends),
        "constraints": dict(REGISTRY._constraints),
        "arguments": {name: set(names) for name, names in REGISTRY._supported_arg_names.items()},
        "parallel": set(REGISTRY._supports_context_parallel),
        "active": REGISTRY._active_backend,
        "checks": REGISTRY._checks_enabled,
        "finders": [finder for finder in sys.meta_path if isinstance(finder, OwnCalls)],
        "functional": attention_processor.F is torch.nn.functional,
    }


@pytest.fixture(autouse=True)
def stock():
    """Every test leaves diffusers as it was."""
    before = state_of_diffusers()
    yield
    disable()
    REGISTRY._checks_enabled = before["checks"]
    assert state_of_diffusers() == before


@pytest.fixture
def qkv():
    torch.manual_seed(SEED)
    query = torch.randn(BATCH, SEQLEN_Q, HEADS, DIM)
    return query, torch.randn(BATCH, SEQLEN_KV, HEADS, DIM), torch.randn(BATCH, SEQLEN_KV, HEADS, DIM)


@pytest.fixture(scope="module")
def another_process():
    """What one with DIFFUSERS_ATTN_BACKEND=attn saw: enabled before the first model, then disabled."""
    code = """
        import importlib, json, sys, torch
        from attn_core import record
        from attn_core.integrations import diffusers as integration

        saw = {"imported by the integration": "diffusers" in sys.modules}
        integration.enable()
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
        from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND

        saw["asked"] = DIFFUSERS_ATTN_BACKEND
        saw["active"] = _AttentionBackendRegistry.get_active_backend()[0].value
        x = torch.randn(1, 4, 2, 8)
        with record() as calls:
            dispatch_attention_fn(x, x, x)
        saw["calls"] = sum(calls.kernels.values())

        name = "diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15"
        assert name not in sys.modules
        module = importlib.import_module(name)
        with record() as calls:
            module.nn.functional.scaled_dot_product_attention(x, x, x)
        saw["calls of a model imported later"] = sum(calls.kernels.values())
        saw["its functional is torch's otherwise"] = module.F.relu is torch.nn.functional.relu
        saw["its loader is changed"] = "exec_module" in vars(module.__loader__)

        integration.disable()
        saw["its modules are torch's again"] = module.nn is torch.nn and module.F is torch.nn.functional
        saw["after disable"] = _AttentionBackendRegistry.get_active_backend()[0].value
        print(json.dumps(saw))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "DIFFUSERS_ATTN_BACKEND": "attn"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


class OfSomebodyElse:
    def __call__(self, attn, hidden_states):
        return torch.nn.functional.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)


class Softmax(torch.nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


def with_processor(processor):
    return attention_processor.Attention(query_dim=8, heads=2, dim_head=4, processor=processor)


def reference(query, key, value, bias=None, **options):
    return reference_attention(query, key, value, bias, **options)[0].to(query.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients_of_a_model_are_those_of_native(name):
    expected, expected_gradients = run(name)
    enable()
    with record() as ran:
        got, gradients = run(name)
    assert sum(ran.kernels.values()) >= 2
    assert all(kernel.startswith("torch/") for kernel in ran.kernels)
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], atol=ATOL, rtol=1e-4, msg=parameter)
    disable()
    again, again_gradients = run(name)
    assert torch.equal(again, expected)
    assert all(torch.equal(again_gradients[parameter], expected_gradients[parameter]) for parameter in gradients)


def of_the_dispatcher(x):
    x = x.unflatten(2, (HEADS, DIM))
    return dispatch_attention_fn(x, x, x)


def of_torch():
    torch.manual_seed(SEED)
    return attention_processor.Attention(query_dim=HEADS * DIM, heads=HEADS, dim_head=DIM)


@pytest.mark.parametrize("make", [lambda: of_the_dispatcher, of_torch], ids=["dispatcher", "its own call"])
def test_a_compiled_call_has_one_graph_and_goes_back_when_attn_is_disabled(make):
    call = make()
    torch.manual_seed(SEED)
    x = torch.randn(BATCH, SEQLEN_Q, HEADS * DIM)
    with torch.no_grad():
        expected = call(x)
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)
        enable(prefer="torch/math")
        with record() as ran:
            got = compiled(x)
        assert set(ran.kernels) == {"torch/math"}
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
        disable()
        with record() as ran:
            assert torch.equal(compiled(x), expected)
        assert not ran.kernels


class TestChoosing:
    """The four ways in which diffusers lets a backend be chosen."""

    def test_by_the_argument_of_the_dispatcher(self, qkv):
        enable()
        REGISTRY._active_backend = NAMES.NATIVE
        with record() as ran:
            dispatch_attention_fn(*qkv, backend="attn")
            dispatch_attention_fn(*qkv, backend=NAMES.ATTN)
            dispatch_attention_fn(*qkv)
        assert sum(ran.kernels.values()) == 2

    def test_by_the_context_manager(self, qkv):
        enable()
        REGISTRY._active_backend = NAMES.NATIVE
        with record() as ran:
            with attention_backend("attn"):
                dispatch_attention_fn(*qkv)
            dispatch_attention_fn(*qkv)
        assert sum(ran.kernels.values()) == 1
        assert REGISTRY._active_backend is NAMES.NATIVE

    def test_by_the_method_of_a_model_and_for_that_model_alone(self):
        enable()
        (ours, inputs), (theirs, _) = MODELS["flux"](), MODELS["flux"]()
        theirs.set_attention_backend("native")  # for the process, too, as diffusers does
        with record() as ran, torch.no_grad():
            ours(**inputs)
        assert not ran.kernels
        ours.set_attention_backend("attn")
        with record() as ran, torch.no_grad():
            theirs(**inputs)
        assert not ran.kernels
        with record() as ran, torch.no_grad():
            ours(**inputs)
        assert sum(ran.kernels.values()) == 2

    def test_by_the_variable_of_the_environment(self, another_process):
        assert another_process["asked"] == another_process["active"] == "attn"
        assert another_process["calls"] == 1
        assert another_process["after disable"] == "native"

    def test_that_of_models_which_call_torch_by_themselves_follows_the_active_backend(self):
        enable()
        model, inputs = MODELS["stable-diffusion-3"]()
        with record() as ran, torch.no_grad(), attention_backend("native"):
            model(**inputs)
        assert not ran.kernels
        with record() as ran, torch.no_grad():
            model(**inputs)
        assert sum(ran.kernels.values()) == 3

    def test_a_name_in_capitals_is_as_unknown_as_to_diffusers(self, qkv):
        enable()
        with pytest.raises(ValueError, match="'ATTN' is not a valid"):
            dispatch_attention_fn(*qkv, backend="ATTN")


class TestMasks:
    def as_native(self, qkv, mask, **options):
        expected = dispatch_attention_fn(*qkv, attn_mask=mask, backend="native", **options)
        got = dispatch_attention_fn(*qkv, attn_mask=mask, backend="attn", **options)
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
        assert not torch.allclose(got, dispatch_attention_fn(*qkv, backend="attn"), atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["boolean", "floating"])
    @pytest.mark.parametrize(
        "shape",
        [
            (SEQLEN_Q, SEQLEN_KV),
            (1, SEQLEN_KV),
            (BATCH, HEADS, SEQLEN_Q, SEQLEN_KV),
            (BATCH, 1, SEQLEN_Q, SEQLEN_KV),
            (1, HEADS, SEQLEN_Q, SEQLEN_KV),
            (BATCH, 1, 1, SEQLEN_KV),
            (1, SEQLEN_Q, SEQLEN_KV),
        ],
        ids=str,
    )
    def test_shapes_that_broadcast_mean_what_they_mean_to_native(self, qkv, shape, dtype):
        enable()
        mask = torch.randn(shape)
        mask[..., 0] = 1.0  # no query without a key
        self.as_native(qkv, mask > 0 if dtype is torch.bool else mask)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["boolean", "floating"])
    def test_two_dimensions_of_batch_and_keys_are_padding(self, qkv, dtype):
        enable()
        keys = torch.arange(SEQLEN_KV) < torch.tensor([[3], [6]])
        mask = keys if dtype is torch.bool else torch.where(keys, 0.0, float("-inf"))
        self.as_native(qkv, mask)
        got = dispatch_attention_fn(*qkv, attn_mask=mask, backend="attn")
        alone = dispatch_attention_fn(qkv[0][:1], qkv[1][:1, :3], qkv[2][:1, :3], backend="attn")
        torch.testing.assert_close(got[:1], alone, atol=ATOL, rtol=0)

    def test_two_dimensions_that_can_be_read_both_ways_are_padding_as_diffusers_has_it(self, qkv):
        enable()
        query = qkv[0][:, :BATCH]
        mask = torch.arange(SEQLEN_KV) < torch.tensor([[3], [6]])
        self.as_native((query, *qkv[1:]), mask)

    def test_three_dimensions_are_batch_queries_and_keys(self, qkv):
        enable()
        mask = torch.rand(BATCH, SEQLEN_Q, SEQLEN_KV) > 0.3
        mask[..., 0] = True
        got = dispatch_attention_fn(*qkv, attn_mask=mask, backend="attn")
        expected = dispatch_attention_fn(*qkv, attn_mask=mask[:, None], backend="native")
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)

    @pytest.mark.parametrize(("heads", "first"), [(BATCH, BATCH), (HEADS, HEADS)], ids=["batch or heads", "heads"])
    def test_three_dimensions_that_may_be_the_heads_are_an_error(self, qkv, heads, first):
        enable()
        query, key, value = (x[:, :, :heads] for x in qkv)
        with pytest.raises(InputError, match=r"attn_mask: three dimensions are \[batch, seqlen_q, seqlen_kv\].*four"):
            dispatch_attention_fn(query, key, value, attn_mask=torch.ones(first, SEQLEN_Q, SEQLEN_KV))

    def test_one_that_needs_a_gradient_gets_it(self, qkv):
        enable()
        gradients = []
        for backend in ("native", "attn"):
            table = torch.full((HEADS, SEQLEN_Q, SEQLEN_KV), 0.5, requires_grad=True)
            dispatch_attention_fn(*qkv, attn_mask=table[None], backend=backend).square().sum().backward()
            gradients.append(table.grad)
        torch.testing.assert_close(*gradients, atol=ATOL, rtol=0)
        assert gradients[0].abs().max() > 1e-3

    def test_a_bias_of_attn_may_be_one(self, qkv):
        enable()
        window = Window(1, 0, "top-left")
        got = dispatch_attention_fn(*qkv, attn_mask=window)
        torch.testing.assert_close(got, reference(*qkv, window), atol=ATOL, rtol=0)
        both = dispatch_attention_fn(*qkv, attn_mask=Window(2, None, "top-left"), is_causal=True)
        expected = reference(*qkv, Window(2, 0, "top-left"))
        torch.testing.assert_close(both, expected, atol=ATOL, rtol=0)

    def test_integers_are_refused(self, qkv):
        enable()
        with pytest.raises(TypeError, match="boolean"):
            dispatch_attention_fn(*qkv, attn_mask=torch.ones(SEQLEN_Q, SEQLEN_KV, dtype=torch.int64))


class TestArguments:
    @pytest.mark.parametrize("checks", [False, True], ids=["", "checks"])
    def test_causal_beside_a_mask_is_a_value_error(self, qkv, checks):
        enable()
        REGISTRY._checks_enabled = checks
        with pytest.raises(ValueError, match="is_causal.*cannot be True"):
            dispatch_attention_fn(*qkv, attn_mask=torch.ones(SEQLEN_Q, SEQLEN_KV, dtype=torch.bool), is_causal=True)

    def test_causal_has_the_corner_of_native(self, qkv):
        enable()
        got = dispatch_attention_fn(*qkv, is_causal=True)
        torch.testing.assert_close(
            got, dispatch_attention_fn(*qkv, is_causal=True, backend="native"), atol=ATOL, rtol=0
        )

    @pytest.mark.parametrize("scale", [0.0, 1.0, 0.3])
    def test_scale_is_that_of_native(self, qkv, scale):
        enable()
        got = dispatch_attention_fn(*qkv, scale=scale)
        torch.testing.assert_close(got, dispatch_attention_fn(*qkv, scale=scale, backend="native"), atol=ATOL, rtol=0)

    def test_grouped_heads_need_enable_gqa_as_native_does(self, qkv):
        enable()
        query, key, value = qkv[0], qkv[1][:, :, :2], qkv[2][:, :, :2]
        got = dispatch_attention_fn(query, key, value, enable_gqa=True)
        expected = dispatch_attention_fn(query, key, value, enable_gqa=True, backend="native")
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
        with pytest.raises(InputError, match="enable_gqa=True"):
            dispatch_attention_fn(query, key, value)

    def test_operands_of_one_batch_entry_or_head_broadcast_as_in_native(self, qkv):
        enable()
        query, key, value = qkv[0], qkv[1][:1, :, :1], qkv[2][:1, :, :1]
        got = dispatch_attention_fn(query, key, value)
        expected = dispatch_attention_fn(query, key, value, backend="native")
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
        with pytest.raises(InputError, match="return_lse, softcap: not for operands that broadcast"):
            dispatch_attention_fn(query, key, value, attention_kwargs={"return_lse": True})

    def test_dropout_drops_and_zero_does_not(self, qkv):
        enable()
        query = torch.zeros(1, 400, 4, 8)
        value = torch.ones(1, 400, 4, 8)
        torch.manual_seed(SEED)
        with prefer("torch/math"):
            dropped = dispatch_attention_fn(query, query, value, dropout_p=0.5)
        assert 0.01 < dropped.std() < 0.2
        assert abs(dropped.mean() - 1) < 0.02
        torch.testing.assert_close(dispatch_attention_fn(query, query, value), value)

    def test_the_log_sum_exp_is_batch_heads_queries(self, qkv):
        enable()
        out, lse = dispatch_attention_fn(*qkv, attention_kwargs={"return_lse": True})
        logits = torch.einsum("bqhd,bkhd->bhqk", *qkv[:2]) * DIM**-0.5
        torch.testing.assert_close(lse, logits.logsumexp(-1), atol=ATOL, rtol=0)
        torch.testing.assert_close(out, dispatch_attention_fn(*qkv, backend="native"), atol=ATOL, rtol=0)

    def test_window_and_softcap_of_the_flash_backends_are_honoured(self, qkv):
        enable()
        got = dispatch_attention_fn(*qkv, attention_kwargs={"window_size": (1, 0), "softcap": 0.5})
        expected = reference(*qkv, Window(1, 0, "bottom-right"), softcap=0.5)
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
        wide = dispatch_attention_fn(*qkv, attention_kwargs={"window_size": (-1, -1), "softcap": 0.0})
        torch.testing.assert_close(wide, reference(*qkv), atol=ATOL, rtol=0)

    def test_a_window_joins_a_mask(self, qkv):
        enable()
        mask = torch.rand(BATCH, 1, SEQLEN_Q, SEQLEN_KV) > 0.3
        got = dispatch_attention_fn(*qkv, attn_mask=mask, attention_kwargs={"window_size": (2, 1)})
        distance = torch.arange(SEQLEN_KV) - torch.arange(SEQLEN_Q)[:, None] - (SEQLEN_KV - SEQLEN_Q)
        expected = reference(*qkv, mask & (distance >= -2) & (distance <= 1))
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)

    @pytest.mark.parametrize(
        ("kwargs", "said"),
        [
            ({"learnable_sink": 1.0}, "learnable_sink: attn does not know this argument"),
            ({"deterministic": True}, "deterministic: .*use_deterministic_algorithms"),
            ({"return_attn_probs": True}, "return_attn_probs: .*return_lse=True"),
        ],
        ids=["unknown", "deterministic", "return_attn_probs"],
    )
    @pytest.mark.parametrize("checks", [False, True], ids=["", "checks"])
    def test_none_vanishes(self, qkv, kwargs, said, checks):
        enable()
        REGISTRY._checks_enabled = checks
        with pytest.raises(InputError, match=said):
            dispatch_attention_fn(*qkv, attention_kwargs=kwargs)

    def test_those_that_say_nothing_are_no_error(self, qkv):
        enable()
        dispatch_attention_fn(*qkv, attention_kwargs={"learnable_sink": None, "deterministic": False})

    def test_operands_of_three_dimensions_are_an_error_that_says_the_layout(self, qkv):
        enable()
        with pytest.raises(InputError, match=r"query: must be \[batch, seqlen, num_heads, head_dim\]"):
            dispatch_attention_fn(*(x[0] for x in qkv))


class TestChecks:
    """DIFFUSERS_ATTN_CHECKS: the constraints of a backend, and a word on what it does not take."""

    def test_what_is_right_passes_without_a_word(self, qkv, monkeypatch):
        enable()
        REGISTRY._checks_enabled = True
        said = []
        monkeypatch.setattr(host.logger, "warning", said.append)
        dispatch_attention_fn(*qkv, attn_mask=torch.ones(SEQLEN_Q, SEQLEN_KV, dtype=torch.bool))
        dispatch_attention_fn(*qkv, attn_mask=Window(1, 1, "top-left"))
        dispatch_attention_fn(*qkv, attention_kwargs={"window_size": (1, 1)})
        assert said == []

    def test_what_is_wrong_is_an_error_of_diffusers(self, qkv):
        enable()
        REGISTRY._checks_enabled = True
        with pytest.raises(ValueError, match="must match the key's sequence length"):
            dispatch_attention_fn(*qkv, attn_mask=torch.ones(SEQLEN_Q, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match="same dtype"):
            dispatch_attention_fn(qkv[0].half(), *qkv[1:])


class TestLeftToDiffusers:
    def split(self, monkeypatch, wrong=None):
        """What diffusers' native backend hands to its own way of splitting."""
        seen = []

        def template(query, key, value, *args, _parallel_config, **kwargs):
            seen.append((args, _parallel_config))
            return value[:, : query.shape[1]]

        monkeypatch.setattr(host, "_templated_context_parallel_attention", template)
        return seen

    def test_a_call_that_is_split_over_devices_goes_to_the_backend_that_was_active(self, qkv, monkeypatch):
        seen = self.split(monkeypatch)
        parallel = SimpleNamespace(context_parallel_config=None)
        enable()
        with record() as ran:
            out = dispatch_attention_fn(*qkv, scale=0.3, parallel_config=parallel)
        assert torch.equal(out, qkv[2][:, :SEQLEN_Q])
        assert seen[0][1] is parallel
        assert 0.3 in seen[0][0]
        (row,) = ran
        assert row.kernel == "torch (stock)"
        assert "context parallelism is diffusers' own" in row.reason

    def test_a_strict_scope_refuses_it(self, qkv, monkeypatch):
        self.split(monkeypatch)
        enable(prefer="torch/*", strict=True)
        with pytest.raises(KernelRefusedError, match=r"torch \(stock\).*context parallelism"):
            dispatch_attention_fn(*qkv, parallel_config=SimpleNamespace())

    @pytest.mark.parametrize(
        ("kwargs", "said"),
        [
            ({"attention_kwargs": {"softcap": 2.0}}, "'native', which was active before attn, takes no softcap"),
            ({"attn_mask": Causal("top-left")}, "takes no attn_mask that is a bias"),
        ],
        ids=["softcap", "bias"],
    )
    def test_what_that_backend_cannot_say_is_an_error(self, qkv, monkeypatch, kwargs, said):
        self.split(monkeypatch)
        enable()
        with pytest.raises(InputError, match=said):
            dispatch_attention_fn(*qkv, parallel_config=SimpleNamespace(), **kwargs)

    def test_a_backend_that_does_not_split_is_an_error(self, qkv):
        with attention_backend("flex"):
            enable()
            with pytest.raises(InputError, match="'flex', which was active before attn, does not split calls"):
                dispatch_attention_fn(*qkv, parallel_config=SimpleNamespace())
            disable()

    def test_diffusers_lets_a_model_that_runs_by_attn_be_split(self):
        enable()
        assert REGISTRY._is_context_parallel_available(NAMES.ATTN)

    def test_scores_that_diffusers_skips_are_skipped(self, qkv):
        enable()
        key, value = qkv[1][:, :SEQLEN_Q], qkv[2][:, :SEQLEN_Q]
        with record() as ran, AttentionScoreSkipFunctionMode():
            out = dispatch_attention_fn(qkv[0], key, value)
        assert torch.equal(out, value)
        assert [(row.kernel, "skips the scores" in row.reason) for row in ran] == [("torch (stock)", True)]

    def test_scores_of_models_that_call_torch_by_themselves_are_skipped_too(self, qkv):
        enable()
        query, key, value = (x.transpose(1, 2) for x in (qkv[0], qkv[1][:, :SEQLEN_Q], qkv[2][:, :SEQLEN_Q]))
        with record() as ran, AttentionScoreSkipFunctionMode():
            out = attention_processor.F.scaled_dot_product_attention(query, key, value)
        assert torch.equal(out, value)
        assert [row.kernel for row in ran] == ["torch (stock)"]

    def test_another_function_mode_changes_nothing(self, qkv):
        enable()
        with record() as ran, torch.device("cpu"):
            dispatch_attention_fn(*qkv)
        assert "torch (stock)" not in ran.kernels


class TestModelsThatCallTorchThemselves:
    def test_one_that_is_imported_while_enabled_is_redirected_and_put_back(self, another_process):
        assert another_process["calls of a model imported later"] == 1
        assert another_process["its functional is torch's otherwise"]
        assert another_process["its modules are torch's again"]
        assert not another_process["its loader is changed"]

    def test_nobody_elses_functional_changes(self):
        stock = torch.nn.functional.scaled_dot_product_attention
        enable()
        assert torch.nn.functional.scaled_dot_product_attention is stock
        assert host.F is torch.nn.functional

    def test_a_replacement_by_somebody_else_is_left_alone(self, monkeypatch):
        enable()
        theirs = SimpleNamespace()
        with monkeypatch.context() as patch:
            patch.setattr(attention_processor, "F", theirs)
            disable()
            assert attention_processor.F is theirs
        attention_processor.F = torch.nn.functional  # what the patch brings back is the stand-in of then

    def test_masks_of_theirs_are_no_occasion_for_a_warning(self, qkv, recwarn):
        enable()
        query, key, value = (x.transpose(1, 2) for x in qkv)
        sdpa = attention_processor.F.scaled_dot_product_attention
        mask = torch.ones(SEQLEN_Q, SEQLEN_KV, dtype=torch.bool)
        mask[:, 3:] = False
        torch.testing.assert_close(
            sdpa(query, key, value, attn_mask=mask),
            torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask),
            atol=ATOL,
            rtol=0,
        )
        assert not [str(warning.message) for warning in recwarn]
        with pytest.raises(InputError, match="is_causal=True"):
            sdpa(query, key, value, attn_mask=mask, is_causal=True)


class TestSwitching:
    def test_enable_twice_is_enable_once_with_the_later_options(self, qkv):
        enable(prefer="torch/math")
        enable(prefer=("torch/reference",))
        with record() as ran:
            dispatch_attention_fn(*qkv)
            model, inputs = MODELS["stable-diffusion-3"]()
            with torch.no_grad():
                model(**inputs)
        assert set(ran.kernels) == {"torch/reference"}

    def test_a_second_enable_makes_it_active_again_and_disable_brings_back_the_latest_other(self):
        enable()
        REGISTRY._active_backend = NAMES._NATIVE_MATH
        enable()
        assert REGISTRY._active_backend is NAMES.ATTN
        disable()
        assert REGISTRY._active_backend is NAMES._NATIVE_MATH
        REGISTRY._active_backend = NAMES.NATIVE

    def test_a_backend_that_somebody_made_active_meanwhile_stays(self):
        enable()
        REGISTRY._active_backend = NAMES._NATIVE_MATH
        disable()
        assert REGISTRY._active_backend is NAMES._NATIVE_MATH
        REGISTRY._active_backend = NAMES.NATIVE

    def test_disable_without_enable_does_nothing(self):
        assert not is_enabled()
        disable()
        assert not is_enabled()
        enable()
        assert is_enabled()

    def test_a_model_that_is_still_set_to_it_says_so_and_works_after_the_next_enable(self):
        enable()
        model, inputs = MODELS["flux"]()
        model.set_attention_backend("attn")
        disable()
        with pytest.raises(KeyError, match="attn"):
            model(**inputs)
        enable()
        with record() as ran, torch.no_grad():
            model(**inputs)
        assert sum(ran.kernels.values()) == 2
        model.reset_attention_backend()
        disable()
        model(**inputs)

    def test_the_name_is_unknown_again_afterwards(self, qkv):
        enable()
        disable()
        with pytest.raises(ValueError, match="'attn' is not a valid AttentionBackendName"):
            dispatch_attention_fn(*qkv, backend="attn")
        with pytest.raises(ValueError, match="not registered"), attention_backend("attn"):
            pass

    def test_the_new_member_is_one_like_the_others(self):
        enable()
        assert NAMES("attn") is NAMES["ATTN"] is NAMES.ATTN is list(NAMES)[-1]
        assert NAMES.ATTN == "attn"
        assert str(NAMES.ATTN.value) == "attn"
        assert pickle.loads(pickle.dumps(NAMES.ATTN)) is NAMES.ATTN
        assert "attn" in REGISTRY.list_backends()

    def test_a_backend_of_that_name_that_is_not_ours_is_left_alone(self, monkeypatch):
        monkeypatch.setitem(NAMES._value2member_map_, "attn", NAMES.NATIVE)
        with pytest.raises(InputError, match="diffusers has a backend 'attn' already"):
            enable()
        assert not is_enabled()

    def test_strict_runs_what_matches_or_says_why_not(self, qkv):
        enable(prefer="torch/cudnn", strict=True)
        with pytest.raises(KernelRefusedError, match="torch/cudnn"):
            dispatch_attention_fn(*qkv)
        model, inputs = MODELS["stable-diffusion-3"]()
        with pytest.raises(KernelRefusedError, match="torch/cudnn"):
            model(**inputs)

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"strict": True}, InputError, "strict needs a pattern"),
            ({"prefer": "torch/flahs"}, UnknownKernelError, "torch/flash"),
        ],
        ids=["strict without a pattern", "unknown kernel"],
    )
    def test_options_that_cannot_be_change_nothing(self, options, error, said):
        with pytest.raises(error, match=said):
            enable(**options)
        assert not is_enabled()

    def test_prefer_is_for_calls_of_diffusers_alone(self, qkv):
        from attn_core import attention

        enable(prefer="torch/reference")
        with record() as ran:
            attention(*qkv)
        assert "torch/reference" not in ran.kernels

    def test_eight_threads_each_with_its_own_kernel(self, qkv):
        from concurrent.futures import ThreadPoolExecutor

        enable()
        expected = dispatch_attention_fn(*qkv, backend="native")
        kernels = ["torch/math", "torch/reference", "torch/flash", "torch/tiled"] * 2

        def work(kernel):
            with prefer(kernel), record() as ran:
                outs = [dispatch_attention_fn(*qkv) for _ in range(10)]
            return ran.kernels, outs

        with ThreadPoolExecutor(8) as pool:
            for kernel, (ran, outs) in zip(kernels, pool.map(work, kernels)):
                assert ran == {kernel: 10}
                for out in outs:
                    torch.testing.assert_close(out, expected, atol=ATOL, rtol=0)

    def test_without_diffusers_the_error_is_the_line_to_type(self, monkeypatch):
        from attn_core.integrations.missing import MissingPackageError

        monkeypatch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(MissingPackageError, match="pip install"):
            enable()

    def test_a_diffusers_without_such_a_registry_is_an_error_that_says_which_one_has_it(self, monkeypatch):
        from attn_core.integrations.missing import MissingPackageError

        monkeypatch.delattr(REGISTRY, "_supports_context_parallel")
        with pytest.raises(MissingPackageError, match=r"diffusers>=0\.36"):
            enable()

    def test_importing_the_integration_imports_no_diffusers(self, another_process):
        assert not another_process["imported by the integration"]


def test_what_the_forward_function_says_it_takes_is_what_diffusers_passes(qkv):
    enable()
    names = set(REGISTRY._supported_arg_names[NAMES.ATTN])
    native = REGISTRY._supported_arg_names[NAMES.NATIVE]
    assert native <= names
    assert calls.attention_forward is integration.attention_forward


class TestReport:
    def test_modules_that_choose_a_backend_go_by_the_one_that_they_chose_or_else_the_active_one(self):
        model, _ = MODELS["flux"]()
        assert [row.reason for row in integration.report(model)] == [NOT_ENABLED] * 2
        enable()
        assert len(integration.report(model).redirected) == 2
        model.transformer_blocks[0].attn.processor._attention_backend = NAMES.NATIVE
        told = integration.report(model)
        assert not told["transformer_blocks.0.attn"].redirected
        assert "set to the backend 'native'" in told["transformer_blocks.0.attn"].reason
        assert told["single_transformer_blocks.0.attn"].redirected
        REGISTRY._active_backend = NAMES.NATIVE
        told = integration.report(model)["single_transformer_blocks.0.attn"]
        assert not told.redirected
        assert "the active one is 'native'" in told.reason

    def test_modules_that_call_torch_by_themselves_go_by_attn_while_it_is_active(self):
        model, _ = MODELS["autoencoder"]()
        assert len(integration.report(model).left_alone) == 2
        enable()
        reasons = [row.reason for row in integration.report(model).redirected]
        assert reasons == ["by its own call of torch's attention"] * 2
        REGISTRY._active_backend = NAMES.NATIVE
        assert len(integration.report(model).left_alone) == 2

    @pytest.mark.parametrize(
        ("module", "said"),
        [
            (lambda: torch.nn.MultiheadAttention(8, 2), r"torch's own module.*enable\(.torch.\)"),
            (lambda: with_processor(attention_processor.AttnProcessor()), "AttnProcessor computes by itself"),
            (lambda: with_processor(OfSomebodyElse()), r"code that is not diffusers'.*enable\(.torch.\)"),
            (Softmax, "takes the softmax by itself"),
        ],
        ids=["torch's", "weights by itself", "not of diffusers", "softmax"],
    )
    def test_what_is_left_alone_has_its_reason(self, module, said):
        enable()
        (row,) = integration.report(torch.nn.ModuleDict({"it": module()}))
        assert not row.redirected
        assert row.module == "it"
        assert re.search(said, row.reason)

    def test_modules_without_attention_are_not_in_it(self):
        enable()
        assert len(integration.report(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Softmax(-1)))) == 0


class TestByTheNameOfTheHost:
    def test_enable_and_disable_of_the_package_are_those_of_the_integration(self, qkv):
        attn_core.enable("diffusers", prefer=("torch/math",))
        assert is_enabled()
        with record() as ran:
            dispatch_attention_fn(*qkv)
        assert ran.kernels == {"torch/math": 1}
        attn_core.disable()
        assert not is_enabled()

    def test_a_version_that_is_not_tested_is_a_warning_that_names_those_that_are(self, monkeypatch):
        monkeypatch.setattr(importlib_metadata, "version", lambda package: "0.99.0")
        with pytest.warns(attn_core.errors.IntegrationWarning, match=r"diffusers 0\.99\.0.*>=0\.36,<0\.43"):
            attn_core.enable("diffusers")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attn_core.enable("diffusers")

    def test_together_with_torch_each_call_is_counted_once(self, qkv):
        attn_core.enable("torch", "diffusers")
        try:
            model, inputs = MODELS["stable-diffusion-3"]()
            with record() as ran, torch.no_grad():
                dispatch_attention_fn(*qkv)
                model(**inputs)
            assert sum(ran.kernels.values()) == 4
        finally:
            attn_core.disable("torch")
