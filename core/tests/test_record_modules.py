"""record(model): which module called which kernel; seconds of a device; ranges of a profiler; tables."""

import contextvars
import io
import json
import threading

import pytest
import torch
from attn_core import (
    Capabilities,
    InputTypeError,
    Kernel,
    assign,
    attention,
    plan,
    prefer,
    record,
    register,
    scaled_dot_product_attention,
)
from attn_core import device_time as module_of_times
from attn_core.calling_module import ModuleNames
from attn_core.device_time import DeviceTimes, events_for
from attn_core.record import Recorder
from torch import nn


class Attn(nn.Module):
    def forward(self, x):
        return attention(x, x, x)


class Stock(nn.Module):
    """Calls with what the core does not model."""

    def forward(self, x):
        scaled_dot_product_attention(*[x.transpose(1, 2).as_subclass(Subclass)] * 3)
        return x


class Subclass(torch.Tensor):
    pass


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = inner

    def forward(self, x):
        return self.attn(self.norm(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(Attn()), Block(Attn()), Block(Stock())])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x + attention(x, x, x, kernel="torch/reference")


X = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))
FLASH, MATH, REFERENCE, STOCK = "torch/flash", "torch/math", "torch/reference", "torch (stock)"


@pytest.fixture
def model():
    return Model()


# Modules


def test_a_row_has_the_innermost_module_that_called(model):
    with record(model) as calls:
        model(X)
        model(X)
        attention(X, X, X)
    assert calls.by_module == {
        "": {FLASH: 1, REFERENCE: 2},  # the model's own call has its name, which is empty
        "blocks.0.attn": {FLASH: 2},
        "blocks.1.attn": {FLASH: 2},
        "blocks.2.attn": {STOCK: 2},
    }
    assert calls.kernels == {FLASH: 5, REFERENCE: 2, STOCK: 2}
    [stock] = [row for row in calls if row.kernel == STOCK]
    assert (stock.module, "Subclass" in stock.reason) == ("blocks.2.attn", True)
    assert all(row.seconds > 0.0 for row in calls)


def test_one_problem_from_two_modules_is_two_rows_and_without_a_model_one(model):
    with record() as plain, record(model) as calls:
        model(X)
    assert len([row for row in calls if row.kernel == FLASH]) == 2
    [row] = [row for row in plain if row.kernel == FLASH]
    assert (row.calls, row.module) == (2, "")
    assert plain.by_module == {}


def test_what_was_chosen_before_is_recorded_with_its_module(model):
    model(X)
    made = plan(X, X, X, kernel=MATH)
    with record(model) as calls:
        model(X)
        made(X, X, X)
    assert calls.by_module["blocks.0.attn"] == {FLASH: 1}
    assert calls.by_module[""][MATH] == 1


def test_an_assigned_model_is_recorded_as_it_runs(model):
    with assign(model, {"blocks.0": MATH}), record(model) as calls, prefer(REFERENCE):
        model(X)
    assert calls.by_module["blocks.0.attn"] == {MATH: 1}
    assert calls.by_module["blocks.1.attn"] == {REFERENCE: 1}


def test_two_recorders_name_modules_after_their_own_model(model):
    with record(model) as outer, record(model.blocks[0]) as inner:
        model(X)
    assert inner.by_module["attn"] == {FLASH: 1}
    assert inner.by_module[""] == {FLASH: 1, STOCK: 1, REFERENCE: 1}  # from outside of that block
    assert outer.by_module["blocks.0.attn"] == {FLASH: 1}


def test_one_object_may_be_entered_again(model):
    recording = record(model)
    for _ in range(2):
        with recording as calls, recording as again:
            model(X)
        assert calls.by_module == again.by_module
        assert calls.by_module["blocks.0.attn"] == {FLASH: 1}


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_there_within_the_block_alone_and_on_no_layer_of_torch(model):
    with record(model):
        assert hooks(model) > 0
        assert not model.blocks[0].norm._forward_hooks
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raises_or_is_interrupted_leaves_no_module_behind(model, kind):
    def raises(*args):
        raise kind

    handle = model.blocks[1].norm.register_forward_pre_hook(raises)
    with record(model) as calls:
        with pytest.raises(kind):
            model(X)
        if kind is ValueError:  # torch calls no hook for the other
            attention(X, X, X, kernel=MATH)
            assert calls.by_module[""] == {MATH: 1}
        handle.remove()
        model(X)
    assert calls.by_module["blocks.1.attn"] == {FLASH: 1}
    with record(model) as after:
        attention(X, X, X, kernel=MATH)
    assert after.by_module == {"": {MATH: 1}}
    assert hooks(model) == 0


def test_threads_that_share_a_model_are_each_in_their_own_module(model):
    with record(model) as calls:
        threads = [threading.Thread(target=contextvars.copy_context().run, args=(model, X)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert calls.by_module["blocks.0.attn"] == calls.by_module["blocks.1.attn"] == {FLASH: 8}


def test_what_is_no_module_is_an_error():
    with pytest.raises(InputTypeError, match="record: takes a module, got int"):
        record(3)


def test_rows_stay_bounded_over_modules(monkeypatch, model):
    import sys

    monkeypatch.setattr(sys.modules["attn_core.record"], "ROWS", 2)
    with record(model) as calls:
        for _ in range(3):
            model(X)
    assert len(calls) == 3
    assert sum(calls.kernels.values()) == 12


# Compile


def test_a_choice_traced_within_has_its_module_and_a_graph_from_before_is_not_traced_again(model):
    torch._dynamo.reset()
    model.blocks = model.blocks[:2]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(X)
    with record(model) as calls:
        compiled(X)
    assert len(graphs) == 1
    assert len(calls) == 0
    torch._dynamo.reset()
    with record(compiled) as calls:
        compiled(X)
    assert {row.module: row.kernel for row in calls} == {
        "blocks.0.attn": FLASH,
        "blocks.1.attn": FLASH,
        "": REFERENCE,
    }
    assert all(row.compiled for row in calls)
    torch._dynamo.reset()


# Seconds of a device


class Event:
    """A device's event of which we say when it was reached."""

    waited = 0

    def __init__(self, at):
        self.at = at

    def synchronize(self):
        Event.waited += 1

    def elapsed_time(self, other):
        return other.at - self.at


def test_the_seconds_of_a_device_are_read_when_the_rows_are(monkeypatch):
    Event.waited = 0
    recorder = Recorder()
    row = recorder.row("flash/fa3", None)
    for start in (0.0, 10.0):
        recorder.count_on_device(row, Event(start), Event(start + 3.0))
    assert (row.calls, row.seconds, Event.waited) == (2, 0.0, 0)
    assert recorder.to_dict()[0]["seconds"] == pytest.approx(6e-3)
    assert Event.waited == 2
    str(recorder)
    assert Event.waited == 2


def test_events_that_are_not_read_yet_are_bounded(monkeypatch):
    monkeypatch.setattr(module_of_times, "OPEN", 10)
    times, told = DeviceTimes(), []
    for _ in range(1000):
        times.add(Event(0.0), Event(1.0), told.append)
        assert len(times._open) <= 10
    times.settle()
    assert told == [1e-3] * 1000


def test_the_cpu_has_no_events():
    assert events_for(torch.device("cpu")) is None
    assert events_for(torch.device("meta")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_seconds_on_cuda_are_those_of_the_kernel_not_of_its_launch():
    x = torch.randn(4, 4096, 16, 64, device="cuda", dtype=torch.bfloat16)
    attention(x, x, x)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with record() as calls:
        start.record()
        for _ in range(20):
            attention(x, x, x)
        end.record()
    [row] = calls
    whole = start.elapsed_time(end) * 1e-3
    assert row.calls == 20
    assert 0.5 * whole < row.seconds <= 1.01 * whole


# Profiler


def test_a_profile_names_the_kernel_where_it_is_recorded_and_only_there(model):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(X, X, X, kernel=REFERENCE)
        with record():
            attention(X, X, X, kernel=MATH)
    names = {event.key: event.count for event in profile.key_averages()}
    assert names[MATH] == 1
    assert REFERENCE not in names


# Tables


def test_a_table_has_the_module_and_the_reason_where_there_is_one(model):
    from rich.console import Console

    with record(model) as calls:
        model(X)
    out = io.StringIO()
    Console(file=out, width=300).print(calls)
    text = out.getvalue()
    for expected in ("module", "blocks.2.attn", STOCK, "Subclass", "why"):
        assert expected in text
    [line] = [line for line in str(calls).splitlines() if line.startswith("blocks.0.attn: ")]
    assert line.startswith("blocks.0.attn: torch/flash: 1 calls, ")
    plain = json.loads(json.dumps(calls.to_dict()))
    assert {row["module"] for row in plain} == {"", "blocks.0.attn", "blocks.1.attn", "blocks.2.attn"}
    with record() as calls:
        attention(X, X, X)
    Console(file=(out := io.StringIO()), width=300).print(calls)
    assert "module" not in out.getvalue()


def test_html_is_one_table_that_needs_nothing_and_is_escaped():
    def run(query, key, value, *, scale):
        return query

    cpu = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8})
    with register(Kernel(name="toy/<b>&", run=run, capabilities=cpu)), record() as calls:
        attention(X, X, X, kernel="toy/<b>&")
        attention(X, X, X)
    html = calls._repr_html_()
    assert "toy/&lt;b&gt;&amp;" in html
    assert "<b>" not in html
    assert html.startswith("<table")
    assert html.count("<tr>") == 3
    assert not any(word in html for word in ("http", "<script", "<link", "class="))
    with record() as nothing:
        pass
    assert nothing._repr_html_() == "<p>no calls</p>"


def test_names_are_those_of_the_model_without_what_compile_adds(model):
    names = ModuleNames(torch.compile(model))
    assert "blocks.0.attn" in names._names.values()
    assert not any("_orig_mod" in name for name in names._names.values())
