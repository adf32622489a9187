"""The autotuner at work: what is timed and when, what is kept, where nothing is tuned, and what the caller sees."""

from __future__ import annotations

import logging
import math
import threading

import attn_core
import attn_natten
import pytest
import torch
from attn_core import Neighborhood
from attn_core.torch_kernels.tiling.chosen import OWN, Tiles, chosen
from attn_natten import autotuner, na1d, na2d, na3d, use_autotuner
from attn_natten.autotuner import families, search, timing
from attn_natten.autotuner.cache import BACKWARD, FORWARD, Cache
from attn_natten.autotuner.settings import Settings, State
from attn_natten.errors import ConstraintError
from attn_natten.fused import call as fused_call

EXTENTS = (14, 18)
WINDOW = {"kernel_size": 5}
KERNEL = "torch/tiled"


@pytest.fixture(autouse=True)
def _as_at_first():
    State.settings = Settings(warmup_steps_forward=0, warmup_steps_backward=0, steps_forward=1, steps_backward=1)
    autotuner.clear_autotuner_cache()
    torch.manual_seed(20261121)
    yield
    State.settings = Settings()
    autotuner.clear_autotuner_cache()


@pytest.fixture
def timed(monkeypatch):
    """The choices of tiles that were timed, in order: (tiles, direction). `timed.seconds` says what each takes."""

    class Timed(list):
        def __init__(self):
            super().__init__()
            self.seconds = lambda tiles: 1.0

    trials = Timed()

    def seconds(run, warmup_steps, steps, device):
        now = chosen()
        before = torch.is_grad_enabled()
        run()
        direction = "forward" if now is not None else "backward"
        tiles = now.forward if now is not None else trials.backward
        trials.append((tiles, direction))
        assert not before
        return trials.seconds(tiles)

    original = families.tiles.TILED.within

    def within(forward, backward):
        if backward is not None:
            trials.backward = backward
        return original(forward, backward)

    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(families.tiles.TILED, "within", within)
    return trials


def operands(*extents, heads=2, dim=8, batch=1, requires_grad=False, **options):
    made = (torch.randn(batch, *extents, heads, dim, **options) for _ in range(3))
    return [tensor.requires_grad_(requires_grad) for tensor in made]


def call(x, **parameters):
    return na2d(*x, **(WINDOW | parameters), backend=KERNEL)


# What is chosen


def test_the_first_call_of_a_problem_times_each_configuration_and_the_next_none(timed):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    call(x)
    tried = [tiles for tiles, direction in timed]
    assert tried[0] == OWN
    assert len(tried) == len(set(tried)) >= 5
    assert {direction for _, direction in timed} == {"forward"}
    timed.clear()
    call(x)
    call(operands(*EXTENTS))
    assert not timed


def test_the_least_total_wins_and_the_call_runs_in_it(timed, monkeypatch):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    call(x)
    wanted = timed[3][0]
    autotuner.clear_autotuner_cache()
    timed.seconds = lambda tiles: 0.5 if tiles == wanted else 1.0
    ran = []
    original = fused_call._attention

    def noting(*arguments, **options):
        ran.append(chosen())
        return original(*arguments, **options)

    monkeypatch.setattr(fused_call, "_attention", noting)
    call(x)
    assert [now.forward for now in ran] == [wanted]


def test_of_equal_totals_the_first_wins(timed):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    with attn_core.record():
        call(x)
    (found,) = FORWARD._found.values()
    assert found == timed[0][0] == OWN


def test_a_backward_is_tuned_where_gradients_are_wanted_and_only_there(timed):
    use_autotuner(backward_pass=True)
    call(operands(*EXTENTS))
    assert not timed
    x = operands(*EXTENTS, requires_grad=True)
    with torch.no_grad():
        call(x)
    assert not timed
    call(x)
    assert {direction for _, direction in timed} == {"backward"}
    assert (len(FORWARD), len(BACKWARD)) == (0, 1)
    timed.clear()
    use_autotuner(forward_pass=True)
    call(x)
    assert {direction for _, direction in timed} == {"forward"}
    assert (len(FORWARD), len(BACKWARD)) == (1, 1)


def test_the_backward_of_a_call_runs_in_the_tiles_that_won(timed, monkeypatch):
    from attn_core.torch_kernels.tiling import function

    use_autotuner(backward_pass=True)
    x = operands(*EXTENTS, requires_grad=True)
    call(x)
    wanted = timed[2][0]
    autotuner.clear_autotuner_cache()
    timed.seconds = lambda tiles: 0.5 if tiles == wanted else 1.0
    out = call(x)
    seen = []
    original = function.backward

    def noting(*arguments):
        seen.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(function, "backward", noting)
    out.sum().backward()
    assert seen == [wanted]


def test_thorough_mode_tries_more_and_searches_again(timed):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    call(x)
    standard = {tiles for tiles, _ in timed}
    timed.clear()
    use_autotuner(thorough_mode_forward=True)
    call(x)
    thorough = {tiles for tiles, _ in timed}
    assert len(thorough) > 3 * len(standard)
    assert any(tiles.batch_bytes is not None and tiles.box is not None for tiles in thorough)
    timed.clear()
    use_autotuner(thorough_mode_forward=False)
    call(x)
    assert not timed


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": 3},
        {"kernel_size": (5, 3)},
        {"dilation": 2},
        {"stride": 2},
        {"is_causal": (True, False)},
        {"extents": (16, 18)},
        {"heads": 4},
        {"dim": 16},
        {"batch": 2},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda change: ", ".join(map(str, change)),
)
def test_whatever_differs_is_another_problem(timed, change):
    use_autotuner(forward_pass=True)
    call(operands(*EXTENTS))
    timed.clear()
    parameters = {name: change[name] for name in ("kernel_size", "dilation", "stride", "is_causal") if name in change}
    of_operands = {name: value for name, value in change.items() if name not in (*parameters, "extents")}
    call(operands(*change.get("extents", EXTENTS), **of_operands), **parameters)
    assert timed
    assert len(FORWARD) == 2


def test_key_heads_and_the_width_of_values_are_part_of_the_problem(timed):
    use_autotuner(forward_pass=True)
    query, key, value = operands(*EXTENTS, heads=4)
    call((query, key, value))
    timed.clear()
    call((query, key[..., :2, :], value[..., :2, :]))
    assert timed


def test_autocast_makes_another_problem(timed):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    call(x)
    timed.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(x)
    assert timed
    assert out.dtype is torch.bfloat16


def test_inference_mode_is_tuned_and_training_after_it_works(timed):
    use_autotuner(True, True)
    x = operands(*EXTENTS, requires_grad=True)
    with torch.inference_mode():
        call([tensor.detach() for tensor in x])
    assert {direction for _, direction in timed} == {"forward"}
    timed.clear()
    call(x).sum().backward()
    assert {direction for _, direction in timed} == {"backward"}


def test_threads_that_call_at_once_search_once(timed):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    threads = [threading.Thread(target=call, args=(x,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tried = [tiles for tiles, _ in timed]
    assert tried
    assert len(tried) == len(set(tried))


def test_what_is_kept_is_bounded_and_the_least_used_goes_first():
    cache = Cache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c"), len(cache)) == (1, None, 3, 2)
    assert FORWARD.size == BACKWARD.size == 256


def test_a_kernel_without_configurations_is_not_timed(timed):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    out = na2d(*x, **WINDOW, backend="torch/math")
    assert not timed
    assert len(FORWARD) == 0
    torch.testing.assert_close(out, call(x))


def test_a_window_over_everything_is_no_neighborhood_and_not_timed(timed):
    use_autotuner(forward_pass=True)
    na2d(*operands(5, 5), kernel_size=5)
    assert not timed


def test_the_kernel_that_the_scope_prefers_is_the_one_that_is_tuned(timed):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    with attn_core.prefer("torch/math"):
        na2d(*x, **WINDOW)
    assert not timed
    with attn_core.prefer(KERNEL):
        na2d(*x, **WINDOW)
    assert timed


# Where nothing is tuned


def test_off_or_in_a_deterministic_mode_nothing_is_timed_and_nothing_kept(timed):
    x = operands(*EXTENTS)
    call(x)
    use_autotuner(forward_pass=True, backward_pass=True)
    torch.use_deterministic_algorithms(True)
    call(x)
    torch.use_deterministic_algorithms(False)
    attn_natten.use_deterministic_algorithms(True)
    call(x)
    attn_natten.use_deterministic_algorithms(False)
    assert not timed
    assert (len(FORWARD), len(BACKWARD)) == (0, 0)
    call(x)
    assert timed


def test_what_was_found_is_left_out_in_a_deterministic_mode(timed):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    want = call(x)
    autotuner.clear_autotuner_cache()
    timed.seconds = lambda tiles: 0.5 if tiles.box == timed[-1][0].box else 1.0
    call(x)
    torch.use_deterministic_algorithms(True)
    assert autotuner.tuned_for(x[0], Neighborhood(EXTENTS, **WINDOW), False) is search.UNTUNED
    torch.testing.assert_close(call(x), want)


def test_float64_is_refused_by_name():
    use_autotuner(forward_pass=True)
    with pytest.raises(RuntimeError, match=r"autotuner: takes .*float32.*, got torch.float64") as caught:
        call(operands(*EXTENTS, dtype=torch.float64))
    assert isinstance(caught.value, ConstraintError)
    attn_natten.disable_autotuner()
    call(operands(*EXTENTS, dtype=torch.float64))


def test_in_a_compiled_graph_it_is_skipped_and_the_log_says_so(timed, caplog):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: na2d(*x, **WINDOW), fullgraph=True, backend="aot_eager")
    with caplog.at_level(logging.WARNING, "attn_natten"):
        out = compiled(*x)
    assert not timed
    assert "autotuner: skipped in a compiled graph" in caplog.text
    torch.testing.assert_close(out, call(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_in_a_transform_of_torch_func_it_is_skipped_and_the_log_says_so(timed, caplog):
    use_autotuner(forward_pass=True)
    x = [tensor.expand(3, *tensor.shape) for tensor in operands(*EXTENTS)]
    with caplog.at_level(logging.DEBUG, "attn_natten"):
        out = torch.func.vmap(lambda *x: na2d(*x, **WINDOW))(*x)
    assert out.shape == (3, 1, *EXTENTS, 2, 8)
    assert not timed
    assert "autotuner: skipped within a torch.func transform" in caplog.text


def test_a_search_is_not_counted_by_those_who_count_flops(timed):
    from torch.utils.flop_counter import FlopCounterMode

    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    with FlopCounterMode(display=False) as counter:
        call(x)
    assert timed
    assert counter.get_total_flops() == 2 * 2 * 2 * math.prod(EXTENTS) * 25 * 8


def test_in_a_mode_of_dispatch_it_is_skipped_and_the_log_says_so(timed, caplog):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Through(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            return op(*args, **(kwargs or {}))

    use_autotuner(forward_pass=True)
    with Through(), caplog.at_level(logging.DEBUG, "attn_natten"):
        call(operands(*EXTENTS))
    assert not timed
    assert "autotuner: skipped within a mode of dispatch" in caplog.text


# What the caller sees


CALLS = {
    "line": (na1d, (50,), {"kernel_size": 7, "dilation": 2}),
    "plane": (na2d, EXTENTS, {"kernel_size": (5, 4), "is_causal": (False, True)}),
    "plane strided": (na2d, EXTENTS, {"kernel_size": (5, 4), "stride": (2, 3)}),
    "space": (na3d, (5, 6, 9), {"kernel_size": 3}),
}


@pytest.mark.parametrize(
    ("name", "thorough"), [*((name, False) for name in CALLS), ("line", True)], ids=lambda value: str(value)
)
def test_results_and_gradients_are_those_of_an_untuned_call(name, thorough):
    function, extents, parameters = CALLS[name]
    x = operands(*extents, requires_grad=True)

    def results():
        out, lse = function(*x, **parameters, backend=KERNEL, return_lse=True)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), x)

    want = results()
    use_autotuner(True, True, thorough, thorough)
    for _ in range(2):
        torch.testing.assert_close(results(), want)
    assert (len(FORWARD), len(BACKWARD)) == (1, 1)


def test_every_configuration_gives_the_same_result(timed):
    use_autotuner(True, True, True, True)
    x = operands(*EXTENTS, requires_grad=True)
    want = call(x)
    grads = torch.autograd.grad(want.square().sum(), x)
    for tiles in list(dict.fromkeys(tiles for tiles, _ in timed))[::5]:
        with families.tiles.TILED.within(tiles, tiles):
            out = attn_core.attention(
                *(t.flatten(1, 2) for t in x), Neighborhood(EXTENTS, **WINDOW), kernel=KERNEL
            ).view(want.shape)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x), grads)


def test_additional_keys_and_a_relative_bias_are_taken_as_ever():
    x = operands(*EXTENTS)
    more = [torch.randn(1, 3, 2, 8) for _ in range(2)]
    rpb = torch.randn(2, 9, 9)
    options = {"additional_keys": more[0], "additional_values": more[1], "rpb": rpb}
    want = na2d(*x, **WINDOW, **options)
    use_autotuner(forward_pass=True)
    torch.testing.assert_close(na2d(*x, **WINDOW, **options), want)


def test_the_callers_random_numbers_and_records_know_nothing_of_it():
    use_autotuner(True, True)
    x = operands(*EXTENTS, requires_grad=True)
    state = torch.get_rng_state()
    with attn_core.record() as calls, attn_core.count_usage() as usage:
        call(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(row.calls for row in calls) == 1
    assert usage.to_dict() == {"attention": {"Neighborhood": 1}}
    assert all(tensor.grad is None for tensor in x)


def test_an_error_of_the_call_is_the_calls_own():
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)
    with pytest.raises(attn_core.UnknownKernelError, match="torch/nothing"):
        na2d(*x, **WINDOW, backend="torch/nothing")


def test_a_configuration_that_cannot_run_is_logged_and_never_chosen(timed, caplog):
    use_autotuner(forward_pass=True)
    x = operands(*EXTENTS)

    def fails_but_for_one(tiles):
        if tiles.box is None:
            raise torch.OutOfMemoryError("no memory for that")
        return 1.0

    timed.seconds = fails_but_for_one
    with caplog.at_level(logging.WARNING, "attn_natten"):
        call(x)
    (found,) = FORWARD._found.values()
    assert found.box is not None
    assert "cannot run: no memory for that" in caplog.text


def test_each_tuned_problem_is_one_line_in_the_debug_log(caplog):
    use_autotuner(True, True)
    with caplog.at_level(logging.DEBUG, "attn_natten"):
        call(operands(*EXTENTS, requires_grad=True))
    forward, backward = (record.getMessage() for record in caplog.records if record.levelname == "DEBUG")
    (found,) = FORWARD._found.values()
    for text in ("standard forward of torch/tiled", "fp32", "(1, 14, 18, 2, 8)", "cpu", "kernel_size=5", str(found)):
        assert text in forward
    assert "standard backward of torch/tiled" in backward
    assert "configurations, chosen: Tiles(" in backward


def test_runs_are_counted_as_they_were_asked_for():
    device = torch.device("cpu")
    runs = []
    total = timing.seconds(lambda: runs.append(None), 3, 4, device)
    assert len(runs) == 7
    assert total > 0
    runs.clear()
    timing.seconds(lambda: runs.append(None), 0, 1, device)
    assert len(runs) == 1


def test_steps_of_either_direction_are_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(
        timing, "seconds", lambda run, warmup_steps, steps, device: seen.append((warmup_steps, steps)) or 1.0
    )
    use_autotuner(True, True, None, None, 1, 2, 3, 4)
    call(operands(*EXTENTS, requires_grad=True))
    assert set(seen) == {(1, 3), (2, 4)}


# Configurations


@pytest.mark.parametrize("thorough", [False, True], ids=["standard", "thorough"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CALLS)
def test_no_two_configurations_are_the_same_and_none_is_larger_than_the_axes(name, backward, thorough):
    _, extents, parameters = CALLS[name]
    bias = Neighborhood(extents, **parameters)
    size = math.prod(extents)
    x = torch.empty(1, size, 2, 8, device="meta")
    problem = attn_core.explain(x, x, x, bias).problem
    found = families.tiles.TILED.configurations(problem, backward=backward, thorough=thorough)
    assert found[0] == OWN
    assert len(found) == len(set(found)) >= 2
    for tiles in found:
        if tiles.box is not None:
            assert all(size <= extent for size, extent in zip(tiles.box, extents))


def test_a_configuration_is_written_and_read():
    family = families.tiles.TILED
    for tiles in (OWN, Tiles(box=(4, 8)), Tiles(box=(4,), batch_bytes=1 << 20, strip_bytes=5)):
        assert family.read(family.written(tiles)) == tiles
    assert family.written(OWN) == {}
    with pytest.raises(ValueError, match="tiles of torch/tiled: takes batch_bytes, box, strip_bytes, got 'boxes'"):
        family.read({"boxes": [1]})
