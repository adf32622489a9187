"""Calls are counted by door and kind of bias where somebody asks for it, and added to a file without losing any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import attn_core
import pytest
import torch
import torch.nn.functional as F
from attn_core import (
    ALiBi,
    AttnBias,
    Causal,
    InputError,
    TensorBias,
    attention,
    count_usage,
    plan,
    prefer,
    record,
    scaled_dot_product_attention,
)
from attn_core.scope import current

QUERY = torch.randn(3, 1, 4, 4, 8, generator=torch.Generator().manual_seed(20261121))
TABLE = torch.zeros(4, 4)


class Mine(AttnBias):
    def __init__(self, materializes):
        self.materializes = materializes

    def materialize(self, device=None):
        return TABLE

    def needs_materialization(self):
        return self.materializes

    @staticmethod
    def dispatch(query, key, value, attn_bias, causal, scale, dropout_p):
        return F.scaled_dot_product_attention(query, key, value)


class Other(Mine):
    pass


NAME = f"{Mine.__module__}.{{}}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_calls_are_counted_by_door_and_kind_as_the_caller_gave_it():
    with count_usage() as counts:
        for _ in range(3):
            attention(*QUERY)
        for bias in (TABLE, TensorBias(TABLE), Causal(), Causal("top-left"), ALiBi(4), Causal() + ALiBi(4)):
            attention(*QUERY, bias)
        for bias in (None, torch.nn.Parameter(TABLE), Mine(True), Mine(True), Mine(False), Other(True)):
            scaled_dot_product_attention(*QUERY, bias)
        scaled_dot_product_attention(*QUERY, is_causal=True)
        scaled_dot_product_attention(*QUERY, Other(False), is_causal=True)
    assert counts.to_dict() == {
        "attention": {"none": 3, "Causal": 2, "tensor": 1, "TensorBias": 1, "ALiBi": 1, "Sum": 1},
        "scaled_dot_product_attention": {
            "none": 1,
            "tensor": 1,
            "Causal": 1,
            NAME.format("Mine"): 3,
            NAME.format("Other"): 2,
        },
    }
    assert "attention none: 3" in str(counts).splitlines()


def test_plans_are_counted_too():
    planned = plan(*QUERY, Causal())
    with count_usage() as counts:
        for _ in range(2):
            planned(*QUERY)
    assert counts.to_dict() == {"plan": {"Causal": 2}}


def test_a_call_that_raises_is_not_counted():
    with count_usage() as counts, pytest.raises(InputError):
        attention(*QUERY, dropout_p=2.0)
    assert counts.to_dict() == {}
    assert str(counts) == "no calls"


def test_any_leading_dimensions_and_what_goes_to_torch_are_counted_as_given():
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)], layout=torch.strided)
    with count_usage() as counts:
        scaled_dot_product_attention(*QUERY[:, 0], TensorBias(TABLE))
        with torch.no_grad():
            scaled_dot_product_attention(nested, nested, nested)
    assert counts.to_dict() == {"scaled_dot_product_attention": {"TensorBias": 1, "none": 1}}


def test_within_other_scopes_and_around_them_all_count():
    with count_usage() as outer, record() as calls, prefer("torch/math"), count_usage() as inner:
        attention(*QUERY)
    attention(*QUERY)
    assert outer.to_dict() == inner.to_dict() == {"attention": {"none": 1}}
    assert calls.kernels == {"torch/math": 1}


def test_nothing_is_left_behind_where_nobody_counts():
    scope = current.get()
    attention(*QUERY)
    kept = dict(scope)
    with count_usage():
        attention(*QUERY)
    assert current.get() is scope
    assert dict(scope) == kept
    assert not scope.watched


def test_counts_are_added_to_a_file(tmp_path):
    path = tmp_path / "usage.json"
    for _ in range(2):
        with count_usage(path):
            attention(*QUERY)
            attention(*QUERY, Causal())
    assert json.loads(path.read_text(encoding="utf-8")) == {"attention": {"none": 2, "Causal": 2}}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["usage.json", "usage.json.lock"]


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '{"attention": 3}', '{"attention": {"none": "many"}}'])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"mine\.txt: does not hold counts"), count_usage(path):
        attention(*QUERY)
    assert path.read_text(encoding="utf-8") == text


def test_a_folder_that_is_missing_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError), count_usage(tmp_path / "nowhere" / "usage.json"):
        attention(*QUERY)


ADD_MANY = """
import sys
from pathlib import Path
from attn_core.usage import merge_into
for _ in range(25):
    merge_into(Path(sys.argv[1]), {"attention": {"none": 1}})
"""


def test_many_processes_that_write_at_once_lose_no_count(tmp_path):
    path = tmp_path / "usage.json"
    processes = [subprocess.Popen([sys.executable, "-c", ADD_MANY, str(path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert json.loads(path.read_text(encoding="utf-8")) == {"attention": {"none": 75}}


SCRIPT = """
import os, threading, torch
import attn_core
query = torch.randn(1, 4, 2, 8)
attn_core.attention(query, query, query)
thread = threading.Thread(target=lambda: attn_core.attention(query, query, query, attn_core.Causal()))
thread.start(); thread.join()
with attn_core.prefer("torch/math"):
    attn_core.attention(query, query, query)
if hasattr(os, "fork") and os.fork() == 0:
    attn_core.attention(query, query, query, attn_core.ALiBi(2))
    raise SystemExit
elif hasattr(os, "fork"):
    os.wait()
"""


def run_with(path):
    # One thread: torch's own pool of threads does not survive a fork.
    environment = {**os.environ, "ATTN_USAGE": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)


def test_the_variable_counts_for_a_whole_process_its_threads_scopes_and_forks(tmp_path):
    path = tmp_path / "usage.json"
    for times in (1, 2):
        run_with(path)
        counts = json.loads(path.read_text(encoding="utf-8"))["attention"]
        forked = {"ALiBi": times} if hasattr(os, "fork") else {}
        assert counts == {"none": 2 * times, "Causal": times, **forked}


def test_a_process_that_cannot_write_its_counts_ends_well_and_warns(tmp_path):
    done = run_with(tmp_path / "nowhere" / "usage.json")
    assert "ATTN_USAGE: nothing was counted" in done.stderr


def test_counting_is_safe_from_threads():
    counts = attn_core.Usage()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: [counts.add("attention", None) for _ in range(1000)], range(4)))
    assert counts.to_dict() == {"attention": {"none": 4000}}
