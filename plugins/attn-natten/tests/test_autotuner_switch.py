"""use_autotuner and what goes with it: what each call changes, and what it refuses."""

from __future__ import annotations

import logging

import attn_natten
import pytest
import torch
from attn_core.errors import InputError
from attn_natten import (
    disable_autotuner,
    is_autotuner_enabled,
    is_autotuner_enabled_for_backward,
    is_autotuner_enabled_for_forward,
    is_autotuner_thorough_for_backward,
    is_autotuner_thorough_for_forward,
    use_autotuner,
)
from attn_natten.autotuner import effects
from attn_natten.autotuner.settings import Settings, State
from attn_natten.errors import NonDeterministicError


@pytest.fixture(autouse=True)
def _as_at_first():
    State.settings = Settings()
    yield
    State.settings = Settings()


def state():
    """(forward, backward, thorough forward, thorough backward)"""
    return (
        is_autotuner_enabled_for_forward(),
        is_autotuner_enabled_for_backward(),
        is_autotuner_thorough_for_forward(),
        is_autotuner_thorough_for_backward(),
    )


def steps():
    settings = State.settings
    return (
        settings.warmup_steps_forward,
        settings.warmup_steps_backward,
        settings.steps_forward,
        settings.steps_backward,
    )


def test_at_first_it_is_off_with_five_runs_of_each_kind():
    assert state() == (False, False, False, False)
    assert steps() == (5, 5, 5, 5)
    assert not is_autotuner_enabled()


def test_each_call_changes_what_it_says_and_leaves_the_rest():
    use_autotuner(True)
    assert state() == (True, False, False, False)
    use_autotuner(False, True)
    assert state() == (False, True, False, False)
    use_autotuner(False, True, False, True)
    assert state() == (False, True, False, True)
    use_autotuner(False, False, False, True)
    assert state() == (False, False, False, True)
    use_autotuner(thorough_mode_backward=False)
    assert state() == (False, False, False, False)
    use_autotuner(thorough_mode_forward=True)
    assert state() == (False, False, True, False)
    use_autotuner(backward_pass=True)
    assert state() == (False, True, True, False)
    assert is_autotuner_enabled()
    use_autotuner(warmup_steps_forward=8, warmup_steps_backward=3, steps_forward=2, steps_backward=1)
    assert steps() == (8, 3, 2, 1)
    use_autotuner(steps_backward=17)
    use_autotuner(warmup_steps_backward=0)
    assert steps() == (8, 0, 2, 17)
    assert state() == (False, True, True, False)


def test_turning_both_off_changes_nothing_else():
    use_autotuner(True, True, True, False, steps_forward=2)
    use_autotuner(False, False, False, True, warmup_steps_forward=9, steps_forward=9)
    assert state() == (False, False, True, False)
    assert steps() == (5, 5, 2, 5)


def test_disable_takes_thorough_modes_with_it_and_leaves_the_steps():
    use_autotuner(True, True, True, True, 1, 2, 3, 4)
    disable_autotuner()
    assert state() == (False, False, False, False)
    assert steps() == (1, 2, 3, 4)


@pytest.mark.parametrize("name", ["forward_pass", "backward_pass", "thorough_mode_forward", "thorough_mode_backward"])
@pytest.mark.parametrize("value", [1, 0, "yes", (True,)], ids=repr)
def test_a_mode_that_is_no_bool_is_an_error_that_names_it_and_changes_nothing(name, value):
    use_autotuner(True, False, True, False)
    with pytest.raises(ValueError, match=rf"{name} takes True, False or None, got ") as caught:
        use_autotuner(**{"backward_pass": True, "steps_forward": 3, name: value})
    assert isinstance(caught.value, InputError)
    assert repr(value) in str(caught.value)
    assert state() == (True, False, True, False)
    assert steps() == (5, 5, 5, 5)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("warmup_steps_forward", -1, 0),
        ("warmup_steps_forward", True, 0),
        ("warmup_steps_backward", (False,), 0),
        ("steps_forward", "abc", 1),
        ("steps_forward", 0, 1),
        ("steps_backward", 2.0, 1),
    ],
)
def test_a_number_of_steps_out_of_range_is_an_error_that_names_it(name, value, least):
    with pytest.raises(ValueError, match=rf"{name} takes an int >= {least} or None, got ") as caught:
        use_autotuner(**{name: value})
    assert repr(value) in str(caught.value)
    assert steps() == (5, 5, 5, 5)


@pytest.mark.parametrize("asked", [(True,), (False, True), (None, True), (True, True)], ids=str)
def test_under_torchs_deterministic_mode_it_is_ignored_with_a_warning(asked, caplog):
    torch.use_deterministic_algorithms(True)
    with caplog.at_level(logging.WARNING, "attn_natten"):
        use_autotuner(*asked, thorough_mode_forward=True, steps_forward=2)
    assert state() == (False, False, False, False)
    assert steps() == (5, 5, 5, 5)
    (record,) = caplog.records
    assert "use_autotuner: ignored" in record.message
    assert "use_deterministic_algorithms" in record.message


def test_under_torchs_deterministic_mode_what_tunes_nothing_is_changed_as_ever():
    torch.use_deterministic_algorithms(True)
    use_autotuner(thorough_mode_backward=True, steps_forward=2)
    assert state() == (False, False, False, True)
    assert steps() == (5, 5, 2, 5)


@pytest.mark.parametrize("asked", [(True,), (False, True), (None, True)], ids=str)
def test_in_the_deterministic_mode_of_this_package_it_is_an_error(asked):
    attn_natten.use_deterministic_algorithms()
    with pytest.raises(NonDeterministicError, match="use_autotuner: .*_pass takes False or None") as caught:
        use_autotuner(*asked)
    assert isinstance(caught.value, RuntimeError)
    assert state() == (False, False, False, False)
    use_autotuner(False, False)
    use_autotuner(steps_forward=3)
    assert steps() == (5, 5, 3, 5)


def test_turning_it_on_logs_a_warning_and_one_more_for_the_backward(caplog):
    with caplog.at_level(logging.WARNING, "attn_natten"):
        use_autotuner(True)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        use_autotuner(backward_pass=True)
    assert len(caplog.records) == 2
    assert "not recommended in distributed training" in caplog.records[1].message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "attn_natten"):
        use_autotuner(False, False)
        use_autotuner(steps_forward=3)
        disable_autotuner()
    assert not caplog.records


def test_what_it_changes_can_be_asked():
    (effect,) = effects()
    assert str(effect) == "autotuner = False: kernels run in their own configuration"
    use_autotuner(True, True)
    (effect,) = effects()
    assert effect.value is True
    assert "forward and backward passes of new problems are timed" in effect.effect
    torch.use_deterministic_algorithms(True)
    (effect,) = effects()
    assert "deterministic mode" in effect.effect


def test_the_docstring_says_how_many_problems_are_kept():
    from attn_natten.autotuner.cache import KEPT

    assert f"kept for {KEPT} problems" in use_autotuner.__doc__
