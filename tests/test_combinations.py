"""Which plugins are tested together."""

from __future__ import annotations

import importlib.util
from itertools import combinations as every_pair
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def load(name):
    """A module beside this one; pytest imports tests without their folder on sys.path."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix = load("combinations")


def test_a_package_is_a_folder_with_a_pyproject(tmp_path):
    for name in ("attn-b", "attn-a", "notes"):
        (tmp_path / "plugins" / name).mkdir(parents=True)
    for name in ("attn-b", "attn-a"):
        (tmp_path / "plugins" / name / "pyproject.toml").touch()
    assert matrix.packages(tmp_path) == ["attn-a", "attn-b"]


def test_without_the_folder_there_are_no_packages(tmp_path):
    assert matrix.packages(tmp_path) == []
    assert matrix.combinations([]) == {"none": ()}


@pytest.mark.parametrize(
    ("plugins", "expected"),
    [
        ("a", ["none", "a"]),
        ("ab", ["none", "a", "b", "a+b"]),
        ("abc", ["none", "a", "b", "c", "a+b", "a+c", "b+c", "all"]),
    ],
)
def test_none_each_every_pair_and_all_are_tested_together(plugins, expected):
    found = matrix.combinations(list(plugins))
    assert list(found) == expected
    assert found.get("all", tuple(plugins)) == tuple(plugins)


@pytest.mark.parametrize("count", [6, 7, 12, 40])
def test_of_many_plugins_a_sample_of_pairs_is_tested_in_which_each_has_a_part(count):
    plugins = [f"attn-{i}" for i in range(count)]
    found = matrix.pairs(plugins)
    every = set(every_pair(plugins, 2))
    assert len(set(found)) == len(found)
    assert set(found) <= every
    assert {name for pair in found for name in pair} == set(plugins)
    assert matrix.is_sampled(plugins) == (count > 6)
    assert len(found) == 15 if count <= 12 else len(found) < len(every)


def test_a_sample_of_pairs_is_that_of_its_seed():
    plugins = [f"attn-{i}" for i in range(9)]
    assert matrix.pairs(plugins, 1) == matrix.pairs(plugins, 1)
    assert matrix.pairs(plugins, 1) != matrix.pairs(plugins, 2)
