"""A registry of given plugins behaves as that of the process does with installed ones."""

from __future__ import annotations

import types

import attn_core
import pytest
from attn_core import PluginWarning, UnknownKernelError
from attn_core.testing import HELLO, registry_with


@pytest.fixture
def hello():
    module = types.ModuleType("hello")
    exec(HELLO, module.__dict__)
    return module


def states(registry):
    return {plugin.name: plugin.state for plugin in registry.plugins()}


def test_it_has_the_given_plugins_and_the_built_in_one_alone(hello):
    found = registry_with(hello=hello)
    assert states(found) == {"torch": "ready", "hello": "ready"}
    assert [kernel.name for kernel in found.kernels("hello/*")] == ["hello/sdpa"]
    assert {kernel.name for kernel in found.kernels("torch/*")} == {k.name for k in attn_core.kernels("torch/*")}
    assert states(registry_with()) == {"torch": "ready"}
    assert not attn_core.kernels("hello/*"), "that of the process is another"


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        pytest.param(OSError("libfast.so.2: undefined symbol"), "libfast.so.2: undefined symbol", id="does not load"),
        pytest.param(SystemExit("no"), "SystemExit: no", id="leaves"),
        pytest.param(types.ModuleType("empty"), "it has no hook attn_kernels", id="has no hook"),
    ],
)
def test_one_that_is_broken_costs_itself(hello, plugin, reason):
    found = registry_with(hello=hello, broken=plugin)
    with pytest.warns(PluginWarning, match="plugin 'broken' is left out"):
        assert states(found) == {"torch": "ready", "hello": "ready", "broken": "broken"}
    assert reason in next(plugin.reason for plugin in found.plugins() if plugin.name == "broken")


def test_a_name_that_is_not_the_entry_points_breaks_it(hello):
    with pytest.warns(PluginWarning, match="must be named 'hi/…'"):
        assert states(registry_with(hi=hello))["hi"] == "broken"


def test_it_may_be_blocked(hello, monkeypatch):
    monkeypatch.setenv("ATTN_BLOCK", "hello")
    found = registry_with(hello=hello)
    assert states(found)["hello"] == "unavailable"
    with pytest.raises(UnknownKernelError, match="its plugin is unavailable: blocked by ATTN_BLOCK"):
        found.kernel("hello/sdpa")
