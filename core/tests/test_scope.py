"""Scopes: what prefer and allow say, where it holds, and that a scope entered again is warm."""

import asyncio
import contextvars
import threading
import warnings

import pytest
import torch
from attn_core import (
    Capabilities,
    Causal,
    Cost,
    InputError,
    Kernel,
    KernelRefusedError,
    Refusal,
    UnknownKernelError,
    allow,
    attention,
    explain,
    prefer,
    record,
    refresh,
    register,
)
from attn_core.registry import registry
from attn_core.scope import SCOPES_KEPT, TABLE_SIZE, Settings, current, mirror, scope_for

X = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))


def chosen(x=X, bias=None):
    return explain(x, x, x, bias).chosen


def ran(x=X):
    with record() as calls:
        attention(x, x, x)
    [kernel] = calls.kernels
    return kernel


def mirrored():
    return mirror.said.prefer, "approximate" in mirror.said.allow


# Order


def test_the_first_pattern_that_names_a_kernel_which_takes_the_problem_decides():
    with prefer("torch/reference", "torch/math"):
        assert chosen() == ran() == "torch/reference"
    with prefer("torch/math", "torch/reference"):
        assert chosen() == ran() == "torch/math"
    with prefer("torch/cudnn", "torch/math"):  # the first cannot run here
        assert chosen() == ran() == "torch/math"


def test_a_preferred_kernel_that_refuses_gives_way():
    with prefer("torch/flash"):
        assert chosen() == "torch/flash"
        assert chosen(bias=Causal()) == "torch/flash"
        strided = torch.randn(1, 2, 8, 4).transpose(2, 3)[:, :, :, ::2]
        with prefer("torch/math"), torch.no_grad():
            assert explain(strided, strided, strided).chosen == "torch/math"
        refusing = explain(X, X, X, softcap=3.0)
        assert refusing.chosen not in (None, "torch/flash")
        assert refusing["torch/flash"].state == "refused"


def test_among_kernels_of_one_pattern_the_estimate_decides():
    with prefer("torch/[mr]*"):
        assert chosen() == "torch/math"  # torch/reference matches, too, and is slower
    with prefer("torch/?????", "torch/*"):
        assert chosen() == "torch/flash"


def test_an_inner_scope_comes_before_the_outer_which_comes_back():
    before = chosen()
    with prefer("torch/math"):
        with prefer("torch/reference"):
            assert current.get().settings.prefer == ("torch/reference", "torch/math")
            assert chosen() == ran() == "torch/reference"
        assert chosen() == ran() == "torch/math"
    assert chosen() == ran() == before


def test_the_outer_preference_still_counts_where_the_inner_kernel_refuses():
    with prefer("torch/math"), prefer("torch/cudnn"):
        assert chosen() == "torch/math"


def test_a_scope_ends_with_an_error():
    before = chosen()

    def fails():
        with prefer("torch/reference"), allow("approximate"):
            assert mirrored() == (("torch/reference",), True)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert chosen() == before
    assert mirrored() == ((), False)


def test_one_object_may_be_entered_again_within_itself_and_afterwards():
    math = prefer("torch/math")
    for _ in range(2):
        with math:
            with math, prefer("torch/reference"):
                assert chosen() == "torch/reference"
            assert chosen() == "torch/math"
    assert mirrored() == ((), False)


def test_kernel_in_the_call_comes_before_the_scope():
    with prefer("torch/reference"), record() as calls:
        attention(X, X, X, kernel="torch/math")
        attention(X, X, X)
    assert calls.kernels == {"torch/math": 1, "torch/reference": 1}


# Names


def test_an_unknown_name_is_an_error_that_suggests_near_ones():
    with pytest.raises(UnknownKernelError, match=r"no kernel 'torch/mth'.*Did you mean 'torch/math'"):
        prefer("torch/mth")


def test_a_pattern_that_matches_nothing_warns_and_goes_on():
    with pytest.warns(UserWarning, match=r"prefer: no kernel matches 'flsh/\*'; `attn kernels` lists all") as caught:
        scope = prefer("flsh/*", "torch/math")
    assert caught[0].filename == __file__
    with scope:
        assert chosen() == "torch/math"


def test_a_pattern_that_matches_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prefer("torch/*", "*")


def test_allow_refuses_another_word():
    with pytest.raises(InputError, match="allow: takes approximate, known-bad; got 'approx'"):
        allow("approx")


# Threads and tasks

NAMES = ("torch/math", "torch/reference", "torch/flash", "torch/flex")


def test_threads_do_not_see_each_other_s_scope():
    barrier, seen, outside = threading.Barrier(len(NAMES)), {}, ran()

    def work(name):
        first = ran()
        with prefer(name):
            barrier.wait()
            seen[name] = (first, {ran() for _ in range(20)}, mirror.said.prefer)
            barrier.wait()

    with prefer("torch/reference"):
        threads = [threading.Thread(target=work, args=(name,)) for name in NAMES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ran() == "torch/reference"
    assert seen == {name: (outside, {name}, (name,)) for name in NAMES}


def test_a_thread_that_is_given_a_context_has_its_scope():
    with prefer("torch/reference"):
        context = contextvars.copy_context()
    seen = []
    thread = threading.Thread(target=context.run, args=(lambda: seen.append(ran()),))
    thread.start()
    thread.join()
    assert seen == ["torch/reference"]


def test_one_object_may_be_shared_by_threads():
    shared, barrier, seen = prefer("torch/reference"), threading.Barrier(8), []

    def work():
        for _ in range(20):
            barrier.wait()
            with shared:
                seen.append(chosen())
            seen.append(current.get().settings.prefer)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.count("torch/reference") == seen.count(()) == 160


def test_tasks_do_not_see_each_other_s_scope_though_their_awaits_interleave():
    async def work(name, turns):
        with prefer(name):
            for _ in range(turns):
                await asyncio.sleep(0)
                assert ran() == chosen() == name
        await asyncio.sleep(0)
        return ran()

    async def main():
        before = ran()
        # The first to enter is the last to leave, and the other way round.
        turns = zip(NAMES, (5, 2, 4, 1))
        return before, await asyncio.gather(*(work(name, n) for name, n in turns))

    before, after = asyncio.run(main())
    assert after == [before] * len(NAMES)


def test_interleaved_tasks_leave_nothing_behind_in_the_mirror_of_their_thread():
    async def work(name, turns):
        with prefer(name), allow("approximate"):
            for _ in range(turns):
                await asyncio.sleep(0)

    async def main():
        await asyncio.gather(work("torch/math", 1), work("torch/reference", 3))

    asyncio.run(main())
    assert mirrored() == ((), False)
    assert chosen() not in ("torch/math", "torch/reference")


def test_one_object_may_be_shared_by_tasks():
    shared = prefer("torch/reference")

    async def work(turns):
        with shared:
            for _ in range(turns):
                await asyncio.sleep(0)
                assert chosen() == "torch/reference"
        return chosen()

    async def main():
        return await asyncio.gather(*(work(turns) for turns in (1, 4, 2, 3)))

    assert asyncio.run(main()) == [chosen()] * 4


def test_a_scope_is_left_where_it_was_entered():
    scope = prefer("torch/reference")
    contextvars.copy_context().run(scope.__enter__)
    with pytest.raises(RuntimeError, match="prefer: left in another task or thread than it was entered in"):
        scope.__exit__(None, None, None)
    refresh()  # the mirror of this thread is where the entering left it


# The table of choices


@pytest.fixture
def counter():
    """A kernel that refuses everything, and counts how often a choice was made."""
    counted = []

    def run(query, key, value, *, scale):
        raise AssertionError

    def refuse(problem):
        counted.append(problem)
        yield Refusal("seqlen_q", "counts only")

    cpu = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8})
    with register(Kernel(name="toy/counter", run=run, capabilities=cpu, refuse=refuse)):
        yield counted


def test_a_call_like_an_earlier_one_makes_no_new_choice(counter):
    attention(X, X.clone(), X.clone())
    first = len(counter)
    assert first > 0
    for _ in range(5):
        attention(X, X.clone(), X.clone())
    assert len(counter) == first


def test_a_scope_entered_again_finds_its_table_warm(counter):
    def once():
        with prefer("torch/math"):
            attention(X, X, X)
        with prefer("torch/reference"), prefer("torch/math"):
            attention(X, X, X)

    once()
    first = len(counter)
    for _ in range(5):
        once()
    assert len(counter) == first
    assert scope_for(Settings(prefer=("torch/math",))) is scope_for(Settings(prefer=("torch/math",)))


def test_a_scope_that_says_nothing_new_shares_the_table_of_the_one_around_it(counter):
    attention(X, X, X)
    first = len(counter)
    with prefer():
        attention(X, X, X)
    assert len(counter) == first


def test_a_table_is_bounded_and_the_oldest_choice_goes_first():
    scope = scope_for(Settings(prefer=("torch/math", "of this test")))
    for i in range(TABLE_SIZE + 10):
        scope.keep(i, i, len, registry.generation)
    assert len(scope) == TABLE_SIZE
    assert 9 not in scope
    assert 10 in scope
    assert TABLE_SIZE + 9 in scope
    scope.clear()


def test_warm_tables_are_bounded_and_the_one_left_alone_for_longest_goes_first():
    def settings(i):
        return Settings(prefer=(f"of this test/{i}",))

    kept, left_alone = scope_for(settings(0)), scope_for(settings(1))
    for i in range(2, SCOPES_KEPT + 1):
        scope_for(settings(i))
        scope_for(settings(0))
    assert scope_for(settings(0)) is kept
    assert scope_for(settings(1)) is not left_alone


def always(name):
    """A kernel that answers ones, at no cost."""
    cpu = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8})

    def run(query, key, value, *, scale):
        return torch.ones_like(query)

    return Kernel(name=name, run=run, capabilities=cpu, costs={"cpu": Cost(call=0.0)})


def test_an_open_scope_forgets_its_choices_too_though_its_table_is_no_longer_kept_warm():
    with prefer("torch/mat?"):
        attention(X, X, X)
        for i in range(SCOPES_KEPT + 1):
            scope_for(Settings(prefer=(f"of this test/{i}",)))
        with prefer("torch/reference"):
            attention(X, X, X)
        handle = register(always("torch/mats"))
        try:
            assert torch.equal(attention(X, X, X), torch.ones_like(X))
        finally:
            handle.unregister()
        assert not torch.equal(attention(X, X, X), torch.ones_like(X))


def test_a_choice_that_was_overtaken_by_a_change_is_not_kept():
    handles = []

    def refuse(problem):
        if not handles:  # a better kernel comes while the choice is made
            handles.append(register(always("toy/late")))
        return [Refusal("seqlen_q", "never")]

    def run(query, key, value, *, scale):
        raise AssertionError

    overtaken = torch.randn(1, 7, 2, 8)
    cpu = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8})
    with register(Kernel(name="toy/slow", run=run, capabilities=cpu, refuse=refuse)):
        attention(overtaken, overtaken, overtaken)
        with handles[0]:
            assert torch.equal(attention(overtaken, overtaken, overtaken), torch.ones_like(overtaken))


def test_two_threads_in_scopes_of_the_same_settings_share_one_table():
    """Else one of them would go on with kernels that are gone."""
    barrier, seen = threading.Barrier(2), []

    def work():
        with prefer("torch/[m]*"):
            seen.append(current.get())
            barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] is seen[1]


# Approximate kernels


@pytest.fixture
def rough():
    """An approximate kernel that promises to be the fastest of all."""

    def run(query, key, value, *, scale):
        return torch.zeros_like(query)

    cpu = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8}, numerics="approximate")
    with register(Kernel(name="toy/rough", run=run, capabilities=cpu, costs={"cpu": Cost(call=0.0)})) as handle:
        yield handle


REASON = 'numerics: is approximate; allowed within `with allow("approximate")` or by ATTN_ALLOW=approximate'


def test_an_approximate_kernel_is_never_chosen_though_it_be_the_fastest(rough):
    assert chosen() == ran() != "toy/rough"
    with prefer("toy/rough"):
        assert chosen() == ran() != "toy/rough"


def test_explain_names_the_approximate_kernel_left_out_and_how_to_allow_it(rough):
    verdict = explain(X, X, X)["toy/rough"]
    assert (verdict.state, verdict.refused_fields, verdict.reasons) == ("refused", ("numerics",), (REASON,))
    assert REASON in str(explain(X, X, X))


def test_an_approximate_kernel_forced_by_name_is_refused_where_it_is_not_allowed(rough):
    with pytest.raises(KernelRefusedError) as error:
        attention(X, X, X, kernel="toy/rough")
    assert REASON in str(error.value)
    with allow("approximate"):
        assert torch.equal(attention(X, X, X, kernel="toy/rough"), torch.zeros_like(X))


def test_allow_lets_it_be_chosen_within_the_block_alone(rough):
    attention(X, X, X)  # a cached choice must not hide it
    with allow("approximate"):
        assert chosen() == ran() == "toy/rough"
        with prefer("torch/math"):
            assert chosen() == ran() == "torch/math"
        with prefer("toy/rough"):
            assert chosen() == "toy/rough"
    assert chosen() == ran() != "toy/rough"


def test_allow_within_prefer_keeps_the_preference(rough):
    with prefer("torch/math"), allow("approximate"):
        assert chosen() == "torch/math"


def test_attn_allow_lets_it_be_chosen_everywhere(rough, monkeypatch):
    monkeypatch.setenv("ATTN_ALLOW", "approximate")
    refresh()  # which forgets the kernels of this process
    try:
        with register(rough.kernel):
            assert chosen() == ran() == "toy/rough"
            assert mirrored() == ((), True)
    finally:
        monkeypatch.undo()
        refresh()
    assert mirrored() == ((), False)


def test_a_scope_that_was_entered_before_follows_the_variables_after_refresh(monkeypatch):
    again = prefer("torch/math")
    with again:
        assert mirror.said.prefer == ("torch/math",)
    monkeypatch.setenv("ATTN_PREFER", "torch/reference")
    refresh()
    with again:
        assert mirror.said.prefer == ("torch/math", "torch/reference")
    monkeypatch.undo()
    refresh()
    with again:
        assert mirror.said.prefer == ("torch/math",)


def test_scopes_entered_in_turn_from_one_and_one_from_several_are_each_their_own():
    one, other = prefer("torch/math"), prefer("torch/reference")
    for _ in range(2):
        for scope, name in ((one, "torch/math"), (other, "torch/reference")):
            with scope:
                assert chosen() == ran() == name
        with prefer("torch/flash"):
            for scope, name in ((one, "torch/math"), (other, "torch/reference")):
                with scope:
                    assert mirror.said.prefer == (name, "torch/flash")


def test_refresh_leaves_open_scopes_as_they_are(monkeypatch):
    with prefer("torch/reference"):
        monkeypatch.setenv("ATTN_PREFER", "torch/math")
        refresh()
        assert chosen() == "torch/reference"
        assert mirror.said.prefer == ("torch/reference",)
    assert chosen() == "torch/math"
    monkeypatch.undo()
    refresh()
    assert chosen() != "torch/math"
