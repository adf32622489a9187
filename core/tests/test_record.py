"""record(): which kernel served every eager call, how often and how long, in bounded memory."""

import asyncio
import contextvars
import io
import json
import sys
import threading

import attn_core
import pytest
import torch
from attn_core import (
    Causal,
    InputTypeError,
    KeyPadding,
    Window,
    attention,
    plan,
    prefer,
    scaled_dot_product_attention,
)
from attn_core.record import OTHERS, STOCK, Recorder, record, recording

X = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))


def lengths(seqlen):
    return torch.randn(1, seqlen, 2, 8)


# Rows and counts


def test_a_row_is_one_problem_served_by_one_kernel():
    y = lengths(6)
    with record() as calls:
        for _ in range(3):
            attention(X, X, X, kernel="torch/math")
        attention(X, X, X, kernel="torch/reference")
        attention(y, y, y, kernel="torch/math")
    assert len(calls) == 3
    assert calls.kernels == {"torch/math": 4, "torch/reference": 1}
    counted = {(row.kernel, row.problem.seqlen_q): row.calls for row in calls}
    assert counted == {("torch/math", 4): 3, ("torch/reference", 4): 1, ("torch/math", 6): 1}
    for row in calls:
        assert row.seconds > 0.0
        assert not row.compiled
        assert (row.reason, row.adaptations) == ("", ())
    assert [row.seconds for row in calls] == sorted((row.seconds for row in calls), reverse=True)


def test_a_row_knows_the_problem_that_was_asked_not_the_adapted_one():
    query, kv = torch.randn(2, 4, 4, 10), torch.randn(2, 4, 2, 10)
    with record() as calls, prefer("torch/flash"):
        attention(query, kv, kv, KeyPadding([2, 3]))
    [row] = calls
    explained = attn_core.explain(query, kv, kv, KeyPadding([2, 3]))
    assert row.problem == explained.problem
    assert row.adaptations == explained[row.kernel].adaptations != ()
    assert set(row.adaptations) >= {"zero_padding", "materialize"}
    assert ", ".join(row.adaptations) in str(calls)


def test_the_drop_in_and_other_values_of_one_key_count_into_the_row_of_their_problem():
    heads_first = torch.randn(1, 2, 4, 8)
    with record() as calls:
        attention(X, X, X, torch.randn(4, 4), kernel="torch/math")
        attention(X, X, X, torch.randn(4, 4), kernel="torch/math")
        with prefer("torch/math"):
            scaled_dot_product_attention(heads_first, heads_first, heads_first, torch.randn(4, 4))
    [row] = calls
    assert row.calls == 3


def test_nothing_is_recorded_outside_the_block():
    with record() as calls:
        attention(X, X, X)
    before = calls.to_dict()
    attention(X, X, X)
    with prefer("torch/math"):
        attention(X, X, X)
    assert calls.to_dict() == before
    with record() as again:
        pass
    assert len(again) == 0
    assert str(again) == "no calls"


def test_what_was_chosen_before_the_block_is_counted_within_it():
    attention(X, X, X)
    with record() as calls:
        attention(X, X, X)
        attention(X, X, X)
    [row] = calls
    assert row.calls == 2


def test_nested_recorders_both_count():
    with record() as outer:
        attention(X, X, X)
        with record() as inner, prefer("torch/math"):
            attention(X, X, X, Window(1, 0))
            with prefer("torch/reference"):
                attention(X, X, X)
        attention(X, X, X)
    assert sum(inner.kernels.values()) == 2
    assert inner.kernels["torch/reference"] == 1
    assert sum(outer.kernels.values()) == 4
    assert outer.kernels["torch/reference"] == 1


def test_a_recorder_ends_with_an_error_and_keeps_what_it_has():
    recorders = []

    def in_the_block():
        with record() as calls:
            recorders.append(calls)
            attention(X, X, X)
            raise KeyError

    with pytest.raises(KeyError):
        in_the_block()
    attention(X, X, X)
    assert sum(recorders[0].kernels.values()) == 1


def test_a_call_that_raises_was_served_by_nobody():
    def run(query, key, value, *, scale):
        raise OSError("launch failed")

    cpu = attn_core.Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8})
    with (
        attn_core.register(attn_core.Kernel(name="toy/raises", run=run, capabilities=cpu)),
        record() as calls,
        pytest.raises(OSError, match="launch failed"),
    ):
        attention(X, X, X, kernel="toy/raises")
    assert calls.kernels == {"toy/raises": 0}


def test_a_plan_is_recorded_by_whoever_listens_when_it_is_called():
    before = plan(X, X, X, Causal(), kernel="torch/math")
    with record() as calls:
        before(X, X, X)
        within = plan(X, X, X, kernel="torch/reference")
        within(X, X, X)
    within(X, X, X)
    before(X, X, X)
    assert calls.kernels == {"torch/math": 1, "torch/reference": 1}


# Bounds


def test_rows_are_bounded_and_what_comes_after_is_counted_in_one(monkeypatch):
    monkeypatch.setattr(sys.modules["attn_core.record"], "ROWS", 5)
    with record() as calls:
        for seqlen in range(1, 21):
            y = lengths(seqlen)
            attention(y, y, y)
            attention(y, y, y)
    assert len(calls) == 6
    [others] = [row for row in calls if row.kernel == OTHERS]
    assert others.problem is None
    assert others.calls == 30
    assert others.seconds > 0.0
    assert sum(calls.kernels.values()) == 40
    json.dumps(calls.to_dict())


def test_a_million_calls_of_one_problem_are_one_row():
    recorder = Recorder()
    run = recording(lambda query, key, value, bias: query, (recorder,), "toy/none", None)
    for _ in range(1_000_000):
        run(X, X, X, None)
    assert len(recorder) == 1
    [row] = recorder
    assert row.calls == 1_000_000
    assert row.seconds > 0.0


# Threads and tasks


def test_calls_of_other_threads_are_not_recorded_unless_they_are_given_the_context():
    with record() as calls:
        stranger = threading.Thread(target=attention, args=(X, X, X))
        stranger.start()
        stranger.join()
        assert len(calls) == 0
        threads = [
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(lambda: [attention(X, X, X, kernel="torch/math") for _ in range(200)],),
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            str(calls)  # reading while others count
        for thread in threads:
            thread.join()
    [row] = calls
    assert row.calls == 1600


def test_tasks_record_their_own_calls():
    async def work(name):
        with record() as calls:
            for _ in range(3):
                attention(X, X, X, kernel=name)
                await asyncio.sleep(0)
        return calls.kernels

    async def main():
        return await asyncio.gather(work("torch/math"), work("torch/reference"))

    assert asyncio.run(main()) == [{"torch/math": 3}, {"torch/reference": 3}]


# What the core does not model


class Subclass(torch.Tensor):
    """May mean anything."""


def nested():
    return torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)])


def jagged():
    entries = [torch.randn(3, 2, 8), torch.randn(5, 2, 8)]
    return torch.nested.nested_tensor(entries, layout=torch.jagged).transpose(1, 2)


FOREIGN = {
    "jagged": jagged,
    "nested": nested,
    "subclass": lambda: torch.randn(1, 2, 4, 8).as_subclass(Subclass),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_the_core_does_not_model_goes_to_torch_unchanged_and_the_record_says_so(make):
    x = make()
    expected = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    with record() as calls:
        out = scaled_dot_product_attention(x, x, x)
        scaled_dot_product_attention(x, x, x, scale=0.5)
    assert type(out) is type(expected)
    torch.testing.assert_close(dense(out), dense(expected))
    [row] = calls
    assert (row.kernel, row.problem, row.calls) == (STOCK, None, 2)
    assert row.reason in str(calls)
    assert calls.kernels == {STOCK: 2}
    with pytest.raises(InputTypeError, match=f"query: attention takes plain tensors, got {row.reason}"):
        attention(x, x, x)


def dense(tensor):
    return torch.cat([t.flatten() for t in tensor.unbind()]) if tensor.is_nested else torch.Tensor(tensor)


def test_what_went_to_torch_has_a_row_per_reason():
    jagged, subclass = FOREIGN["jagged"](), FOREIGN["subclass"]()
    with record() as calls:
        scaled_dot_product_attention(jagged, jagged, jagged)
        scaled_dot_product_attention(subclass, subclass, subclass)
    assert len({row.reason for row in calls}) == 2
    assert calls.kernels == {STOCK: 2}


def test_a_bias_that_torch_does_not_know_is_refused_for_what_goes_to_torch():
    x = FOREIGN["subclass"]()
    with pytest.raises(InputTypeError, match=r"attn_mask: Window\(1, 0\) is not for a Subclass"):
        scaled_dot_product_attention(x, x, x, Window(1, 0))


# Printing and saving


def test_rows_are_plain_data_for_json():
    with record() as calls:
        attention(X, X, X, Causal(), kernel="torch/math")
        x = FOREIGN["subclass"]()
        scaled_dot_product_attention(x, x, x)
    plain = json.loads(json.dumps(calls.to_dict()))
    assert {row["kernel"] for row in plain} == {"torch/math", STOCK}
    [row] = [row for row in plain if row["kernel"] == "torch/math"]
    assert row["problem"] == str(next(r for r in calls if r.kernel == "torch/math").problem)
    assert 'Causal("top-left")' in row["problem"]
    assert set(row) == {"kernel", "problem", "adaptations", "reason", "compiled", "calls", "seconds", "module"}
    assert (row["calls"], row["adaptations"], row["compiled"]) == (1, [], False)


def test_a_record_prints_a_line_per_row():
    with record() as calls:
        attention(X, X, X, kernel="torch/math")
        attention(X, X, X, kernel="torch/math")
        attention(X, X, X, kernel="torch/reference")
    lines = str(calls).splitlines()
    assert len(lines) == 2
    [line] = [line for line in lines if line.startswith("torch/math")]
    assert "2 calls, " in line
    assert " ms: batch 1, seqlen 4, heads 2, head_dim 8, float32, cpu" in line


def test_rich_prints_a_table():
    from rich.console import Console

    with record() as calls:
        attention(X, X, X, kernel="torch/math")
    calls.note_traced("torch/flash", (), "attention in a graph")
    out = io.StringIO()
    Console(file=out, width=200).print(calls)
    assert "torch/math" in out.getvalue()
    assert "traced" in out.getvalue()
    assert "attention in a graph" in out.getvalue()


def test_a_traced_choice_has_neither_count_nor_time_and_comes_last():
    recorder = Recorder()
    recorder.note_traced("torch/flash", ("expand_kv",), "a call")
    recorder.note_traced("torch/flash", ("expand_kv",), "a call")
    recorder.count(recorder.row("torch/math", None), 1.0)
    counted, traced = recorder.rows()
    assert counted.kernel == "torch/math"
    assert (traced.kernel, traced.compiled, traced.calls, traced.seconds) == ("torch/flash", True, None, None)
    assert traced.adaptations == ("expand_kv",)
    assert recorder.kernels == {"torch/flash": 0, "torch/math": 1}
    assert "torch/flash [expand_kv]: traced: " in str(recorder)
    json.dumps(recorder.to_dict())
