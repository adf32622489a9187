"""The ATTN_* variables: what each takes, and what an unknown word says."""

import subprocess
import sys

import pytest
from attn_core import InputError
from attn_core.environment import Environment, read_environment


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("ATTN_PLUGINS", "ATTN_BLOCK", "ATTN_PREFER", "ATTN_ALLOW", "ATTN_COSTS"):
        monkeypatch.delenv(name, raising=False)


def test_without_variables_every_plugin_loads_and_nothing_is_preferred():
    assert read_environment() == Environment(plugins=None, block=(), prefer=(), allow=frozenset())


@pytest.mark.parametrize(
    ("text", "names"),
    [("", ()), (" ", ()), (",", ()), ("hello", ("hello",)), (" a , b,,c ", ("a", "b", "c"))],
    ids=["empty", "blank", "comma", "one", "blanks and empty places"],
)
def test_lists_are_separated_by_commas(monkeypatch, text, names):
    for name in ("ATTN_PLUGINS", "ATTN_BLOCK", "ATTN_PREFER"):
        monkeypatch.setenv(name, text)
    assert read_environment() == Environment(plugins=names, block=names, prefer=names)


def test_preferences_keep_their_order(monkeypatch):
    monkeypatch.setenv("ATTN_PREFER", "b/*,a/x,b/y")
    assert read_environment().prefer == ("b/*", "a/x", "b/y")


def test_allow_takes_approximate(monkeypatch):
    monkeypatch.setenv("ATTN_ALLOW", "approximate")
    assert read_environment().allow == {"approximate"}


def test_allow_refuses_another_word_by_name(monkeypatch):
    monkeypatch.setenv("ATTN_ALLOW", "approximate,fast, inexact")
    with pytest.raises(InputError, match="ATTN_ALLOW: takes approximate, known-bad; got 'fast', 'inexact'"):
        read_environment()


def test_a_word_that_allow_does_not_know_fails_the_first_call_and_not_the_import():
    code = """
import os

os.environ["ATTN_ALLOW"] = "fast"
import attn_core, torch

print("imported")
attn_core.attention(*(torch.ones(1, 2, 1, 4) for _ in range(3)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout == "imported\n"
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("InputError: ATTN_ALLOW: takes approximate, known-bad; got 'fast'")
