"""The registry: what can be asked of it, kernels of this process, and the conditions that a kernel may be in."""

import sys
import threading
import types

import attn_core
import pytest
import torch
from attn_core import (
    Capabilities,
    Cost,
    DeclarationError,
    DuplicateKernelError,
    Kernel,
    KernelRefusedError,
    Registration,
    UnknownKernelError,
    Unusable,
    attention,
    explain,
    is_available,
    register,
)
from attn_core.registry import registry

X = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))


def ones(query, key, value, *, scale):
    return torch.ones_like(query)


def toy(name="toy/ones", run=ones, **given):
    """A kernel that would be chosen for every float32 problem on the CPU without a bias."""
    return Kernel(
        name=name,
        run=run,
        capabilities=Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8}),
        costs={"cpu": Cost(call=0.0, source="a promise")},
        **given,
    )


def ran(x=X):
    with attn_core.record() as calls:
        attention(x, x, x)
    [kernel] = calls.kernels
    return kernel


# What can be asked


def test_kernels_are_listed_by_name_and_filtered_by_pattern():
    names = [k.name for k in attn_core.kernels()]
    assert names == sorted(names)
    assert [k.name for k in attn_core.kernels("torch/fl*")] == ["torch/flash", "torch/flex"]
    assert [k.name for k in attn_core.kernels("torch/math")] == ["torch/math"]
    assert attn_core.kernels("none/*") == ()


def test_a_kernel_is_found_by_name_and_an_unknown_name_suggests_near_ones():
    assert attn_core.kernel("torch/math").name == "torch/math"
    with pytest.raises(UnknownKernelError, match=r"no kernel 'torch/flsh'\. Did you mean 'torch/flash'"):
        attn_core.kernel("torch/flsh")
    with pytest.raises(ValueError, match="`attn kernels` lists all"):
        attn_core.kernel("zzz")
    with pytest.raises(UnknownKernelError, match="Did you mean 'torch/flash'"):
        attention(X, X, X, kernel="torch/flsh")


def test_the_built_in_is_a_plugin_like_any_other():
    [torch_plugin] = [p for p in attn_core.plugins() if p.name == "torch"]
    assert torch_plugin.state == "ready"
    assert torch_plugin.entry_point == "attn_core.torch_kernels"
    assert set(torch_plugin.kernels) == {k.name for k in attn_core.kernels("torch/*")}


def test_is_available_says_whether_a_kernel_is_there_and_can_run():
    assert is_available("torch/math")
    assert not is_available("torch/none")
    assert not is_available("torch/*")
    with register(toy(probe=lambda: Unusable("absent", "no library"))):
        assert not is_available("toy/ones")
    with register(toy()):
        assert is_available("toy/ones")


# Kernels of this process


def test_a_registered_kernel_is_chosen_and_an_unregistered_one_is_not():
    before = ran()
    handle = register(toy())
    assert isinstance(handle, Registration)
    assert ran() == "toy/ones"
    torch.testing.assert_close(attention(X, X, X), torch.ones_like(X))
    handle.unregister()
    assert ran() == before
    handle.unregister()  # twice is once
    assert not attn_core.kernels("toy/*")


def test_choices_are_forgotten_when_kernels_come_and_go():
    attention(X, X, X)  # the choice is cached
    with register(toy()):
        torch.testing.assert_close(attention(X, X, X), torch.ones_like(X))
    assert not torch.equal(attention(X, X, X), torch.ones_like(X))


def test_the_handle_takes_the_kernel_out_when_the_block_ends_in_an_error():
    def in_the_block():
        with register(toy()) as handle:
            assert attn_core.kernel("toy/ones") is handle.kernel
            assert "toy/ones" in repr(handle)
            raise KeyError

    with pytest.raises(KeyError):
        in_the_block()
    assert not attn_core.kernels("toy/*")


def test_a_second_kernel_of_one_name_is_refused_and_the_first_stays():
    first = toy()
    with register(first):
        with pytest.raises(DuplicateKernelError, match="'toy/ones' is registered already"):
            register(toy())
        assert attn_core.kernel("toy/ones") is first
    with pytest.raises(ValueError, match="'torch/math' is registered already"):
        register(toy("torch/math"))


def test_an_old_handle_does_not_take_out_a_newer_kernel_of_its_name():
    old = register(toy())
    old.unregister()
    with register(toy()) as new:
        old.unregister()
        assert attn_core.kernel("toy/ones") is new.kernel


def test_only_kernels_can_be_registered():
    with pytest.raises(DeclarationError, match="register takes a Kernel, got function"):
        register(ones)


def test_threads_that_register_at_once_all_succeed():
    barrier, handles = threading.Barrier(8), []

    def add(i):
        barrier.wait()
        handles.append(register(toy(f"toy/{i}")))

    threads = [threading.Thread(target=add, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [k.name for k in attn_core.kernels("toy/*")] == [f"toy/{i}" for i in range(8)]
    for handle in handles:
        handle.unregister()
    assert not attn_core.kernels("toy/*")


# Conditions: probes


def raising(error):
    def probe():
        raise error

    return probe


PROBES = {
    "ready": (lambda: None, "chosen", "", None),
    "absent": (
        lambda: Unusable("absent", "no fastlib", "pip install fastlib"),
        "absent",
        "no fastlib",
        "pip install fastlib",
    ),
    "unavailable": (lambda: Unusable("unavailable", "needs a GPU"), "unavailable", "needs a GPU", None),
    "raises ImportError": (raising(ImportError("stale")), "broken", "its probe raised ImportError: stale", None),
    "raises RuntimeError": (raising(RuntimeError("old driver")), "broken", "RuntimeError: old driver", None),
    "exits": (raising(SystemExit("no licence")), "broken", "SystemExit: no licence", None),
    "answers False": (lambda: False, "broken", "its probe must answer None or Unusable, got False", None),
    "answers a string": (lambda: "no", "broken", "its probe must answer None or Unusable, got 'no'", None),
}


@pytest.mark.parametrize(("probe", "state", "reason", "fix"), PROBES.values(), ids=PROBES)
def test_the_answer_of_a_probe_is_the_state_of_the_kernel(probe, state, reason, fix):
    with register(toy(probe=probe)):
        verdict = explain(X, X, X)["toy/ones"]
        assert verdict.state == state
        assert verdict.fix == fix
        assert (ran() == "toy/ones") == (state == "chosen")
        if state == "chosen":
            return
        assert reason in verdict.reasons[0]
        with pytest.raises(KernelRefusedError) as error:
            attention(X, X, X, kernel="toy/ones")
        assert f"kernel 'toy/ones' is {state}: " in str(error.value)
        assert reason in str(error.value)
        assert fix is None or fix in str(error.value)


def test_a_probe_is_asked_once_also_by_many_threads():
    asked, barrier = [], threading.Barrier(8)

    def probe():
        asked.append(1)
        threading.Event().wait(0.02)

    def choose():
        barrier.wait()
        attention(X, X, X)

    with register(toy(probe=probe)):
        assert asked == []  # not before somebody needs to know
        threads = [threading.Thread(target=choose) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        explain(X, X, X)
    assert asked == [1]


# Conditions: run given by name


def test_a_run_given_by_name_is_imported_at_its_first_use_only(monkeypatch):
    module = types.ModuleType("attn_toy_runs")
    module.run = ones
    monkeypatch.setitem(sys.modules, "attn_toy_runs", None)  # importing it now would raise
    with register(toy(run="attn_toy_runs:run")):
        assert explain(X, X, X).chosen == "toy/ones"
        monkeypatch.setitem(sys.modules, "attn_toy_runs", module)
        torch.testing.assert_close(attention(X, X, X), torch.ones_like(X))


def no_options(query, key, value):
    return query


def swallows(query, key, value, **options):
    return query


NAMES = {
    "no such module": ("attn_no_such_module:run", "No module named"),
    "no such function": ("attn_toy_runs:nothing", "nothing"),
    "import raises OSError": ("attn_toy_stale:run", "undefined symbol"),
    "import raises RuntimeError": ("attn_toy_driver:run", "driver too old"),
    "lacks what is declared": ("attn_toy_runs:no_options", "lacks scale"),
    "catch-all": ("attn_toy_runs:swallows", "catch-all"),
}


@pytest.mark.parametrize(("name", "reason"), NAMES.values(), ids=NAMES)
def test_a_run_that_cannot_be_loaded_is_a_clear_error_once_and_then_another_kernel_serves(
    tmp_path, monkeypatch, name, reason
):
    module = types.ModuleType("attn_toy_runs")
    module.no_options, module.swallows = no_options, swallows
    monkeypatch.setitem(sys.modules, "attn_toy_runs", module)
    (tmp_path / "attn_toy_stale.py").write_text("raise OSError('libfast.so: undefined symbol: _ZN3c10')")
    (tmp_path / "attn_toy_driver.py").write_text("raise RuntimeError('driver too old')")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = ran()
    with register(toy(run=name)):
        with pytest.raises(DeclarationError) as error:
            attention(X, X, X)
        assert "toy/ones" in str(error.value)
        assert reason in str(error.value)
        verdict = explain(X, X, X)["toy/ones"]
        assert verdict.state == "broken"
        assert reason in verdict.reasons[0]
        assert ran() == before
        with pytest.raises(KernelRefusedError, match="'toy/ones' is broken"):
            attention(X, X, X, kernel="toy/ones")
        assert not is_available("toy/ones")


# Conditions: a run that raises


class OutOfLuckError(Exception):
    """An error of the kernel's own."""


def test_an_error_in_a_run_keeps_its_type_and_names_kernel_and_problem():
    calls = []

    def run(query, key, value, *, scale):
        calls.append(1)
        raise OutOfLuckError("launch failed\nwith details")

    with register(toy(run=run)):
        for attempt in (1, 2):  # it is never retried by another kernel, the second time neither
            with pytest.raises(OutOfLuckError, match="launch failed") as error:
                attention(X, X, X)
            told = "\n".join(getattr(error.value, "__notes__", map(str, error.value.args)))
            assert "raised by kernel 'toy/ones' on: batch 1, seqlen 4, heads 2, head_dim 8, float32, cpu" in told
            assert len(calls) == attempt
        verdict = explain(X, X, X)["toy/ones"]
        assert verdict.state == "chosen"
        assert verdict.reasons == ("failed: last run raised OutOfLuckError: launch failed",)
        assert registry.condition(attn_core.kernel("toy/ones")).state == "failed"
        assert is_available("toy/ones")
        with attn_core.prefer("torch/math"):
            assert explain(X, X, X)["toy/ones"].state == "failed"
            attention(X, X, X)
            assert len(calls) == 2
    assert ran() != "toy/ones"


def test_a_kernel_registered_anew_has_no_past():
    def run(query, key, value, *, scale):
        raise OutOfLuckError

    with register(toy(run=run)):
        with pytest.raises(OutOfLuckError):
            attention(X, X, X)
        assert registry.condition(attn_core.kernel("toy/ones")).state == "failed"
    with register(toy()):
        assert explain(X, X, X)["toy/ones"].reasons == ()
        assert ran() == "toy/ones"


def test_a_kernel_that_fails_after_it_was_taken_out_leaves_nothing_to_the_next_of_its_name():
    def run(query, key, value, *, scale):
        handle.unregister()
        raise OutOfLuckError

    handle = register(toy(run=run))
    with pytest.raises(OutOfLuckError):
        attention(X, X, X)
    with register(toy()):
        assert explain(X, X, X)["toy/ones"].reasons == ()
        assert ran() == "toy/ones"


def test_an_error_in_one_call_does_not_stop_a_later_one():
    luck = [OutOfLuckError("first"), None]

    def run(query, key, value, *, scale):
        error = luck.pop(0)
        if error is not None:
            raise error
        return torch.ones_like(query)

    with register(toy(run=run)):
        with pytest.raises(OutOfLuckError):
            attention(X, X, X)
        torch.testing.assert_close(attention(X, X, X), torch.ones_like(X))
