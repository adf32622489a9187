"""Switches: what is on at first, what each changes, and what it says where it changes nothing."""

from __future__ import annotations

import inspect
import logging
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import attn_core
import attn_natten
import pytest
import torch
from attn_natten import NoEffectWarning, switches
from attn_natten.errors import NonDeterministicError
from attn_natten.switches import flex, kv_parallelism
from attn_natten.switches.effect import SPLITTING

GETTERS = {
    "is_fused_na_enabled": False,
    "is_fna_enabled": False,
    "is_kv_parallelism_in_fused_na_enabled": False,
    "are_deterministic_algorithms_enabled": False,
    "is_flex_attention_enabled": False,
    "is_flex_attention_forced": False,
    "is_flex_compile_allowed": False,
    "is_flex_compile_backprop_allowed": False,
    "are_strict_checks_enabled": False,
    "is_memory_usage_default": True,
    "is_memory_usage_strict": False,
    "is_memory_usage_unrestricted": False,
    "is_gemm_na_enabled": True,
    "is_tiled_na_enabled": True,
    "is_tf32_in_gemm_na_enabled": True,
}
DISPATCHER = {
    "use_gemm_na": "is_gemm_na_enabled",
    "use_tiled_na": "is_tiled_na_enabled",
    "use_tf32_in_gemm_na": "is_tf32_in_gemm_na_enabled",
}
OLD = {
    "enable_gemm_na": (True, "is_gemm_na_enabled"),
    "disable_gemm_na": (False, "is_gemm_na_enabled"),
    "enable_tiled_na": (True, "is_tiled_na_enabled"),
    "disable_tiled_na": (False, "is_tiled_na_enabled"),
    "enable_tf32": (True, "is_tf32_in_gemm_na_enabled"),
    "disable_tf32": (False, "is_tf32_in_gemm_na_enabled"),
}


def state():
    return {name: getattr(attn_natten, name)() for name in GETTERS}


def effect_of(name):
    return next(effect for effect in switches.effects() if effect.name == name)


@pytest.fixture
def splitting(monkeypatch):
    """A kernel that splits its backward pass is ready."""
    monkeypatch.setattr(attn_core, "is_available", lambda name: name == SPLITTING[0])


@pytest.fixture
def quiet():
    """Warnings of switches without effect are of no concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        yield


def test_at_first_fused_attention_and_all_that_belongs_to_it_is_off():
    assert state() == GETTERS


# Fused


def test_fused_attention_goes_on_with_kv_parallelism_and_off_with_it():
    attn_natten.use_fused_na()
    assert state() == GETTERS | {
        "is_fused_na_enabled": True,
        "is_fna_enabled": True,
        "is_kv_parallelism_in_fused_na_enabled": True,
    }
    attn_natten.use_fused_na(False)
    assert state() == GETTERS


def test_fused_attention_goes_on_without_kv_parallelism_where_told():
    attn_natten.use_fused_na(kv_parallel=False)
    assert attn_natten.is_fused_na_enabled()
    assert not attn_natten.is_kv_parallelism_in_fused_na_enabled()


def test_that_fused_attention_goes_on_is_logged_with_what_kv_parallelism_costs(caplog):
    caplog.set_level(logging.INFO, "attn_natten")
    attn_natten.use_fused_na(kv_parallel=False)
    assert caplog.messages == ["modules run fused neighborhood attention from now on"]
    attn_natten.use_fused_na()
    assert caplog.messages[-1].endswith("a kernel that splits its backward pass over keys is not deterministic")


def test_off_is_off_whatever_the_other_arguments_say():
    attn_natten.use_fused_na(False, kv_parallel=True, use_flex_attention=True, force_flex_attention=True)
    assert state() == GETTERS


def test_the_short_names_are_the_same():
    assert attn_natten.use_fna is attn_natten.use_fused_na
    assert attn_natten.is_fna_enabled is attn_natten.is_fused_na_enabled


def test_signatures_are_those_of_natten():
    assert str(inspect.signature(attn_natten.use_fused_na)) == (
        "(mode: 'bool' = True, kv_parallel: 'bool' = True, use_flex_attention: 'bool' = False,"
        " force_flex_attention: 'bool' = False) -> 'None'"
    )


@pytest.mark.parametrize("name", ["mode", "kv_parallel", "use_flex_attention", "force_flex_attention"])
def test_a_fused_switch_that_is_not_a_bool_is_refused_and_changes_nothing(name):
    with pytest.raises(ValueError, match=f"^use_fused_na: {name} takes True or False, got 1$"):
        attn_natten.use_fused_na(**{name: 1})
    assert state() == GETTERS


@pytest.mark.parametrize(
    "function",
    [
        "use_kv_parallelism_in_fused_na",
        "use_deterministic_algorithms",
        "use_gemm_na",
        "use_tiled_na",
        "use_tf32_in_gemm_na",
        "use_strict_checks",
        "allow_flex_compile",
        "allow_flex_compile_backprop",
    ],
)
def test_a_mode_is_a_bool(function):
    with pytest.raises(ValueError, match=f"^{function}: mode takes True or False, got 'on'$"):
        getattr(attn_natten, function)("on")
    assert state() == GETTERS


# KV parallelism


def test_kv_parallelism_is_said_to_be_faster_and_not_deterministic_where_a_kernel_splits(splitting, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_natten.use_kv_parallelism_in_fused_na(True)
    assert attn_natten.is_kv_parallelism_in_fused_na_enabled()
    assert "takes more memory, and is not deterministic" in caplog.text
    assert effect_of("kv_parallelism").works
    assert "natten/cutlass-fna" in effect_of("kv_parallelism").effect


def test_kv_parallelism_warns_once_where_no_kernel_splits(monkeypatch):
    monkeypatch.setattr(attn_core, "is_available", lambda name: False)
    with pytest.warns(NoEffectWarning, match="^use_kv_parallelism_in_fused_na: this switch has no effect") as caught:
        attn_natten.use_kv_parallelism_in_fused_na()
    assert caught[0].filename == __file__
    assert attn_natten.is_kv_parallelism_in_fused_na_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_natten.use_kv_parallelism_in_fused_na(False)
    assert not attn_natten.is_kv_parallelism_in_fused_na_enabled()
    assert not effect_of("kv_parallelism").works


def test_under_torchs_deterministic_mode_kv_parallelism_stays_off_with_a_warning(caplog):
    torch.use_deterministic_algorithms(True)
    attn_natten.use_kv_parallelism_in_fused_na()
    assert not attn_natten.is_kv_parallelism_in_fused_na_enabled()
    assert "use_kv_parallelism_in_fused_na: ignored" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_under_torchs_deterministic_mode_fused_attention_goes_on_alone(caplog):
    torch.use_deterministic_algorithms(True)
    attn_natten.use_fused_na()
    assert attn_natten.is_fused_na_enabled()
    assert not attn_natten.is_kv_parallelism_in_fused_na_enabled()
    assert "use_fused_na: kv_parallel: ignored" in caplog.text


def test_under_torchs_deterministic_mode_kv_parallelism_can_be_turned_off(quiet):
    attn_natten.use_kv_parallelism_in_fused_na()
    torch.use_deterministic_algorithms(True)
    attn_natten.use_kv_parallelism_in_fused_na(False)
    assert not attn_natten.is_kv_parallelism_in_fused_na_enabled()


def test_in_the_deterministic_mode_of_this_package_kv_parallelism_is_an_error(caplog):
    attn_natten.use_deterministic_algorithms()
    assert attn_natten.are_deterministic_algorithms_enabled()
    assert "deterministic mode: without the autotuner and KV parallelism" in caplog.text
    for switch in (attn_natten.use_kv_parallelism_in_fused_na, attn_natten.use_fused_na):
        with pytest.raises(RuntimeError, match=f"^{switch.__name__}.*is not deterministic; takes False.*got True$"):
            switch()
    with pytest.raises(NonDeterministicError):
        attn_natten.use_fused_na(True, True)
    assert state() == GETTERS | {"are_deterministic_algorithms_enabled": True}


def test_in_the_deterministic_mode_of_this_package_fused_attention_goes_on_without_kv_parallelism():
    attn_natten.use_deterministic_algorithms()
    attn_natten.use_fused_na(kv_parallel=False)
    assert attn_natten.is_fused_na_enabled()


def test_the_deterministic_mode_ends(quiet):
    attn_natten.use_deterministic_algorithms()
    attn_natten.use_deterministic_algorithms(False)
    attn_natten.use_kv_parallelism_in_fused_na()
    assert attn_natten.is_kv_parallelism_in_fused_na_enabled()


def test_it_is_known_whether_anybody_asked(quiet):
    assert not kv_parallelism.is_kv_parallelism_asked_about()
    attn_natten.use_kv_parallelism_in_fused_na(False)
    assert kv_parallelism.is_kv_parallelism_asked_about()


# Memory


@pytest.mark.parametrize("word", ["default", "strict", "unrestricted"])
def test_a_memory_preference_is_one_of_three_words(word, splitting):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_natten.set_memory_usage_preference(word)
    preference = attn_natten.get_memory_usage_preference()
    assert isinstance(preference, attn_natten.MemoryUsagePreference)
    assert preference.name == word.capitalize()
    assert {
        other: getattr(attn_natten, f"is_memory_usage_{other}")() for other in ("default", "strict", "unrestricted")
    } == {other: other == word for other in ("default", "strict", "unrestricted")}
    assert effect_of("memory_usage_preference").works


@pytest.mark.parametrize("word", ["Strict", "", "none", 1, None, ["strict"]], ids=repr)
def test_another_memory_preference_is_refused_and_changes_nothing(word):
    with pytest.raises(
        ValueError, match="^set_memory_usage_preference: pref takes 'default', 'strict', 'unrestricted'"
    ):
        attn_natten.set_memory_usage_preference(word)
    assert attn_natten.is_memory_usage_default()


def test_members_of_the_memory_preference_are_nattens():
    assert [(each.name, each.value) for each in attn_natten.MemoryUsagePreference] == [
        ("Default", 0),
        ("Strict", 1),
        ("Unrestricted", 2),
    ]


def test_a_memory_preference_warns_once_where_no_kernel_splits(monkeypatch):
    monkeypatch.setattr(attn_core, "is_available", lambda name: False)
    with pytest.warns(NoEffectWarning, match="^set_memory_usage_preference: this switch has no effect"):
        attn_natten.set_memory_usage_preference("strict")
    assert attn_natten.is_memory_usage_strict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_natten.set_memory_usage_preference("default")


# The dispatcher


@pytest.mark.parametrize(("function", "getter"), DISPATCHER.items())
def test_a_dispatcher_switch_keeps_its_state_and_warns_once_that_it_has_no_effect(function, getter):
    switch, is_on = getattr(attn_natten, function), getattr(attn_natten, getter)
    with pytest.warns(NoEffectWarning, match=f"^{function}: this switch has no effect here: there are no ") as caught:
        assert switch(False) is None
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert is_on() is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switch()
    assert is_on() is True


@pytest.mark.parametrize(("function", "mode", "getter"), [(name, *rest) for name, rest in OLD.items()])
def test_the_old_dispatcher_switches_return_the_new_state_and_warn_that_they_are_old(function, mode, getter, quiet):
    with pytest.warns(DeprecationWarning, match=f"^{function} is deprecated; use use_.*\\({mode}\\)$") as caught:
        assert getattr(attn_natten, function)() is mode
    assert caught[0].filename == __file__
    assert getattr(attn_natten, getter)() is mode


def test_an_old_dispatcher_switch_says_that_it_has_no_effect():
    with (
        pytest.warns(DeprecationWarning, match="^disable_gemm_na is deprecated"),
        pytest.warns(NoEffectWarning, match="^disable_gemm_na: this switch") as caught,
    ):
        attn_natten.disable_gemm_na()
    assert {warning.filename for warning in caught} == {__file__}


def test_every_dispatcher_switch_is_reported_without_effect():
    for name in ("gemm_na", "tiled_na", "tf32_in_gemm_na"):
        assert not effect_of(name).works
        assert str(effect_of(name)).startswith(f"{name} = True: no effect here: there are no ")


# FlexAttention


def flex_calls(query):
    """The kernel of a neighborhood call made in the scope that the switches ask for."""
    with flex.scope():
        return attn_core.explain(query, query, query, attn_core.Neighborhood(8, kernel_size=3)).chosen


def test_flex_attention_is_preferred_where_it_takes_the_call():
    query = torch.zeros(1, 8, 2, 16)
    assert not flex_calls(query).endswith("flex")
    attn_natten.use_flex_attention()
    assert attn_natten.is_fused_na_enabled()
    assert attn_natten.is_flex_attention_enabled()
    assert not attn_natten.is_flex_attention_forced()
    assert "/flex" in flex_calls(query)
    assert "/flex" not in flex_calls(query.requires_grad_())  # on the CPU it has no backward
    attn_natten.use_fused_na()
    assert not attn_natten.is_flex_attention_enabled()


def test_forced_flex_attention_runs_or_the_call_is_refused():
    attn_natten.force_flex_attention()
    assert attn_natten.is_flex_attention_enabled()
    assert attn_natten.is_flex_attention_forced()
    query = torch.zeros(1, 8, 2, 16)
    assert "/flex" in flex_calls(query)
    query.requires_grad_()
    with flex.scope(), pytest.raises(attn_core.KernelRefusedError):
        attn_core.attention(query, query, query, attn_core.Neighborhood(8, kernel_size=3))
    attn_natten.use_fused_na(False)
    assert state() == GETTERS


def test_compiling_flex_attention_is_allowed_and_forbidden():
    with pytest.warns(NoEffectWarning, match="^allow_flex_compile: this switch has no effect here"):
        attn_natten.allow_flex_compile()
    assert (attn_natten.is_flex_compile_allowed(), attn_natten.is_flex_compile_backprop_allowed()) == (True, False)


def test_forbidding_to_compile_flex_attention_forbids_it(quiet):
    attn_natten.allow_flex_compile(True, backprop=True)
    assert (attn_natten.is_flex_compile_allowed(), attn_natten.is_flex_compile_backprop_allowed()) == (True, True)
    attn_natten.disable_flex_compile_backprop()
    assert (attn_natten.is_flex_compile_allowed(), attn_natten.is_flex_compile_backprop_allowed()) == (True, False)
    attn_natten.allow_flex_compile_backprop()
    assert attn_natten.is_flex_compile_backprop_allowed()
    attn_natten.disable_flex_compile()
    assert (attn_natten.is_flex_compile_allowed(), attn_natten.is_flex_compile_backprop_allowed()) == (False, False)
    attn_natten.allow_flex_compile(False, backprop=True)
    assert (attn_natten.is_flex_compile_allowed(), attn_natten.is_flex_compile_backprop_allowed()) == (False, False)


def test_compiling_the_backward_is_allowed_only_where_compiling_is(quiet):
    attn_natten.allow_flex_compile_backprop()
    assert (attn_natten.is_flex_compile_allowed(), attn_natten.is_flex_compile_backprop_allowed()) == (False, False)


# Effects


def test_every_switch_is_reported_with_its_value(quiet):
    attn_natten.use_fused_na(use_flex_attention=True)
    attn_natten.use_gemm_na(False)
    attn_natten.use_strict_checks()
    assert {effect.name: effect.value for effect in switches.effects()} == {
        "fused_na": True,
        "flex_attention": True,
        "flex_attention_forced": False,
        "flex_compile": False,
        "flex_compile_backprop": False,
        "kv_parallelism": True,
        "memory_usage_preference": attn_natten.MemoryUsagePreference.Default,
        "deterministic_algorithms": False,
        "autotuner": False,
        "strict_checks": True,
        "gemm_na": False,
        "tiled_na": True,
        "tf32_in_gemm_na": True,
    }


def test_effects_print_what_runs_differently():
    assert str(effect_of("fused_na")) == "fused_na = False: modules run qk, softmax and av, one after another"
    attn_natten.use_fused_na()
    assert str(effect_of("fused_na")) == "fused_na = True: modules run one fused call"
    attn_natten.use_deterministic_algorithms()
    assert "the autotuner and KV parallelism stay off" in str(effect_of("deterministic_algorithms"))


# Threads


def test_switches_thrown_at_once_leave_the_state_that_one_of_them_asked_for(monkeypatch):
    """One thread is held up between two of the flags that it sets; another sets all of them meanwhile, or waits."""
    turn, in_between = flex.turn, threading.Event()

    def slow_turn(wanted, forced):
        if wanted:
            in_between.set()
            time.sleep(0.2)
        turn(wanted, forced)

    monkeypatch.setattr(flex, "turn", slow_turn)
    with ThreadPoolExecutor(2) as pool:
        on = pool.submit(attn_natten.use_fused_na, True, True, True, True)
        assert in_between.wait(5)
        off = pool.submit(attn_natten.use_fused_na, False)
        on.result()
        off.result()
    assert len(set(all_of_fused())) == 1


def all_of_fused():
    return (
        attn_natten.is_fused_na_enabled(),
        attn_natten.is_kv_parallelism_in_fused_na_enabled(),
        flex.WANTED.value,
        flex.FORCED.value,
    )


def test_a_switch_without_effect_says_so_once_to_many_threads():
    barrier = threading.Barrier(4)

    def throw(_):
        barrier.wait()
        attn_natten.use_gemm_na(False)

    with pytest.warns(NoEffectWarning) as caught, ThreadPoolExecutor(4) as pool:
        list(pool.map(throw, range(4)))
    assert len(caught) == 1


def test_a_compiled_function_follows_a_switch():
    def fused(x):
        return x + 1 if attn_natten.switches.fused.is_fused_na_enabled() else x

    traced = torch.compile(fused, fullgraph=True, backend="eager")
    assert traced(torch.zeros(1)).item() == 0
    attn_natten.use_fused_na()
    assert traced(torch.zeros(1)).item() == 1
