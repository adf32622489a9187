"""Plugins are found through real metadata on `sys.path`; a bad one costs itself and one warning, never the host."""

import base64
import hashlib
import sys
import textwrap
import threading
import warnings

import attn_core
import importlib_metadata
import pytest
import torch
from attn_core import (
    Causal,
    PluginWarning,
    UnknownKernelError,
    attention,
    explain,
    prefer,
    reference_attention,
    refresh,
)
from attn_core.registry import Registry
from attn_core.testing import HELLO, fake_distribution, importable
from torch._subclasses.fake_tensor import FakeTensorMode

BUILT_IN = {
    "torch/cudnn",
    "torch/efficient",
    "torch/fa-window",
    "torch/flash",
    "torch/flex",
    "torch/math",
    "torch/reference",
    "torch/tiled",
    "torch/varlen",
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on `sys.path`; afterwards the registry is as it was."""
    for name in ("ATTN_PLUGINS", "ATTN_BLOCK", "ATTN_PREFER", "ATTN_ALLOW"):
        monkeypatch.delenv(name, raising=False)
    with importable(tmp_path) as folder:
        yield folder
    monkeypatch.undo()
    refresh()


def look_again():
    """Finds plugins anew. Returns the texts of the PluginWarnings."""
    refresh()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attn_core.plugins()
        attn_core.plugins()  # what is said once is not said again
    return [str(w.message) for w in caught if issubclass(w.category, PluginWarning)]


def plugin(name):
    return next(p for p in attn_core.plugins() if p.name == name)


def check_the_host_answers():
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 6, 2, 16, generator=generator).unbind(0)
    expected = reference_attention(query, key, value, Causal())[0].float()
    torch.testing.assert_close(attention(query, key, value, Causal()), expected)
    assert {k.name for k in attn_core.kernels("torch/*")} == BUILT_IN


# A good plugin


def test_a_plugin_is_found_ranked_and_chosen_where_it_is_preferred(site):
    fake_distribution(site, requires=("attn-core>=0.1,<0.2", "numpy"))
    assert look_again() == []
    hello = plugin("hello")
    assert (hello.state, hello.distribution, hello.version) == ("ready", "attn-hello", "1.0")
    assert (hello.entry_point, hello.kernels) == ("attn_hello", ("hello/sdpa",))
    x = torch.randn(1, 5, 2, 16)
    explained = explain(x, x, x, Causal())
    assert explained.chosen != "hello/sdpa"  # it says that it takes a second
    assert explained["hello/sdpa"].state == "ready"
    assert explained["hello/sdpa"].seconds == pytest.approx(1.0)
    with prefer("hello/*"):
        assert explain(x, x, x, Causal()).chosen == "hello/sdpa"
        with attn_core.record() as calls:
            out = attention(x, x, x, Causal())
    assert calls.kernels == {"hello/sdpa": 1}
    torch.testing.assert_close(out, reference_attention(x, x, x, Causal())[0].float())
    check_the_host_answers()


def test_a_fake_distribution_is_what_pip_would_have_unpacked(site):
    info = fake_distribution(site, version="1.2", requires=("attn-core>=0.1", "numpy; extra == 'fast'"))
    assert info.name == "attn_hello-1.2.dist-info"
    distribution = importlib_metadata.distribution("attn-hello")
    assert distribution.version == "1.2"
    assert distribution.requires == ["attn-core>=0.1", "numpy; extra == 'fast'"]
    assert [(e.group, e.name, e.value) for e in distribution.entry_points] == [("attn.plugins", "hello", "attn_hello")]
    for file in distribution.files:
        data = file.locate().read_bytes()
        if file.name != "RECORD":  # which cannot tell its own digest
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (file.hash.mode, file.hash.value, file.size) == ("sha256", digest, len(data))
    assert {file.name for file in distribution.files} >= {"METADATA", "RECORD", "entry_points.txt", "attn_hello.py"}


def test_a_plugin_may_be_an_object_in_a_module(site):
    source = HELLO.replace("@hookimpl", "class Plugin:\n    @staticmethod\n    @hookimpl").replace(
        "\ndef attn_kernels():\n    yield", "\n    def attn_kernels():\n        yield"
    )
    fake_distribution(site, source=source, entry_points={"hello": "attn_hello:Plugin"})
    assert look_again() == []
    assert plugin("hello").kernels == ("hello/sdpa",)


def test_one_distribution_may_hold_several_plugins(site):
    sources = {f"attn_{name}": HELLO.replace("hello/", f"{name}/") for name in ("one", "two")}
    fake_distribution(site, source=sources, entry_points={"one": "attn_one", "two": "attn_two"})
    assert look_again() == []
    assert [k.name for k in attn_core.kernels("*/sdpa")] == ["one/sdpa", "two/sdpa"]


def test_the_source_of_a_single_module_needs_a_single_module(tmp_path):
    with pytest.raises(ValueError, match="name the modules"):
        fake_distribution(tmp_path, source=HELLO, entry_points={"one": "attn_one", "two": "attn_two"})


def test_what_lies_in_the_folder_is_forgotten_on_leaving_it(tmp_path):
    fake_distribution(tmp_path)
    with importable(tmp_path) as folder:
        assert Registry().kernels("hello/*")
        assert "attn_hello" in sys.modules
        assert str(folder) in sys.path
    assert "attn_hello" not in sys.modules
    assert str(folder) not in sys.path
    assert not Registry().kernels("hello/*")


def test_refresh_finds_what_was_installed_since_and_forgets_what_is_gone(site):
    assert look_again() == []
    assert not attn_core.kernels("hello/*")
    fake_distribution(site)
    assert not attn_core.kernels("hello/*")  # found once, until asked again
    refresh()
    assert [k.name for k in attn_core.kernels("hello/*")] == ["hello/sdpa"]
    (site / "attn_hello-1.0.dist-info" / "entry_points.txt").unlink()
    refresh()
    assert not attn_core.kernels("hello/*")


# Bad plugins

HEAD = "from attn_core import hookimpl\n"

BAD = {
    "import raises ImportError": ("import a_library_that_is_not_there", "ModuleNotFoundError"),
    "import raises OSError": ("raise OSError('libfast.so: undefined symbol: _ZN3c104cuda')", "OSError: libfast.so"),
    "import raises RuntimeError": ("raise RuntimeError('driver too old')", "RuntimeError: driver too old"),
    "import exits": ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
    "syntax error": ("def", "SyntaxError"),
    "hook raises": (HEAD + "@hookimpl\ndef attn_kernels():\n    raise KeyError('x')", "KeyError: 'x'"),
    "generator raises half-way": (
        HELLO.replace("hello/", "bad/") + "    raise OSError('half-way')\n",
        "OSError: half-way",
    ),
    "hook returns None": (HEAD + "@hookimpl\ndef attn_kernels():\n    pass", "TypeError"),
    "wrong type": (HEAD + "@hookimpl\ndef attn_kernels():\n    yield 'bad/sdpa'", "must yield Kernel, got 'bad/sdpa'"),
    "misspelt hook": (HEAD + "@hookimpl\ndef attn_kernel():\n    yield", "unknown hook 'attn_kernel'"),
    "misspelt hook beside a good one": (
        HELLO.replace("hello/", "bad/") + "\n\n@hookimpl\ndef attn_kernel():\n    yield\n",
        "unknown hook 'attn_kernel'",
    ),
    "hook without hookimpl": (HELLO.replace("@hookimpl\n", ""), "no hook attn_kernels"),
    "no hook": ("", "no hook attn_kernels"),
    "hook with an argument": (HEAD + "@hookimpl\ndef attn_kernels(device):\n    yield", "device"),
    "repeats a name": (
        HELLO.replace("hello/", "bad/") + "    yield Kernel(name='bad/sdpa', run=run, capabilities=Capabilities(\n"
        "        devices={'cpu'}, dtypes={torch.float32}, head_dims={8}))\n",
        "two kernels named 'bad/sdpa'",
    ),
    "another's prefix": (HELLO.replace("hello/", "torch/"), "'torch/sdpa' must be named 'bad/…'"),
    "a declaration of the wrong type": (
        HELLO.replace("hello/", "bad/").replace('biases={Causal("top-left")}', "gqa=1"),
        "gqa: must be True or False, got 1",
    ),
    "a declaration that cannot be": (HELLO.replace("hello/", "bad/").replace('{"cpu"}', '"cpu"'), "DeclarationError"),
}


@pytest.mark.parametrize(("source", "reason"), BAD.values(), ids=BAD)
def test_a_bad_plugin_costs_itself_and_one_warning(site, source, reason):
    fake_distribution(site)
    fake_distribution(site, name="attn-bad", source=source, entry_points={"bad": "attn_bad"})
    [warning] = look_again()
    assert warning.startswith("plugin 'bad' is left out: ")
    assert reason in warning
    bad = plugin("bad")
    assert (bad.state, bad.distribution, bad.kernels) == ("broken", "attn-bad", ())
    assert reason in bad.reason
    assert not attn_core.kernels("bad/*")
    assert [k.name for k in attn_core.kernels("hello/*")] == ["hello/sdpa"]
    with pytest.raises(UnknownKernelError, match="its plugin is broken: "):
        attn_core.kernel("bad/sdpa")
    check_the_host_answers()


def test_an_entry_point_that_names_nothing_is_broken(site):
    fake_distribution(site, name="attn-bad", source={}, entry_points={"bad": "attn_nowhere:thing"})
    [warning] = look_again()
    assert "attn_nowhere" in warning
    check_the_host_answers()


def test_an_unreadable_entry_points_file_costs_its_own_distribution(site):
    fake_distribution(site)
    info = fake_distribution(site, name="attn-bad", source="", entry_points={"bad": "attn_bad"})
    (info / "entry_points.txt").write_text("[attn.plugins]\nbad\n")
    [warning] = look_again()
    assert warning.startswith("plugin 'attn-bad' is left out: ")
    assert plugin("hello").state == "ready"
    check_the_host_answers()


def test_an_unreadable_entry_points_file_that_is_not_ours_is_not_our_affair(site):
    fake_distribution(site)
    info = fake_distribution(site, name="other", source="", entry_points={"x": "other"}, group="console_scripts")
    (info / "entry_points.txt").write_text("[console_scripts]\nx\n")
    assert look_again() == []
    assert plugin("hello").state == "ready"
    check_the_host_answers()


def test_a_distribution_without_metadata_is_broken(site):
    info = fake_distribution(site)
    (info / "METADATA").unlink()
    [warning] = look_again()
    assert warning.startswith("plugin 'hello' is left out: ")
    assert plugin("hello").distribution == "attn_hello"
    check_the_host_answers()


def test_where_warnings_are_errors_the_other_plugins_are_there_all_the_same(site):
    fake_distribution(site)
    fake_distribution(site, name="attn-bad", source="1 / 0", entry_points={"bad": "attn_bad"})
    refresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PluginWarning)
        with pytest.raises(PluginWarning, match="ZeroDivisionError"):
            attn_core.plugins()
        states = {p.name: p.state for p in attn_core.plugins()}
        assert [states[name] for name in ("bad", "hello", "torch")] == ["broken", "ready", "ready"]
        check_the_host_answers()


# Names


def test_two_distributions_with_one_plugin_name_load_neither(site):
    fake_distribution(site, name="attn-one", source={"attn_one": HELLO}, entry_points={"hello": "attn_one"})
    fake_distribution(site, name="attn-two", source={"attn_two": HELLO}, entry_points={"hello": "attn_two"})
    [warning] = look_again()
    assert "attn-one and attn-two both offer a plugin 'hello'; uninstall one of them" in warning
    assert plugin("hello").state == "broken"
    assert not {"attn_one", "attn_two"} & set(sys.modules)
    assert not attn_core.kernels("hello/*")
    check_the_host_answers()


def test_the_built_in_wins_over_a_stranger_of_its_name(site):
    fake_distribution(
        site, name="attn-fake", source=HELLO.replace("hello/", "torch/"), entry_points={"torch": "attn_fake"}
    )
    [warning] = look_again()
    assert warning == "plugin 'torch' of attn-fake is left out: the built-in has that name"
    assert plugin("torch").state == "ready"
    assert "attn_fake" not in sys.modules
    check_the_host_answers()


# Versions


def test_a_plugin_for_another_core_is_broken_before_it_is_imported(site):
    fake_distribution(site, requires=("numpy", "Attn_Core >=9,<10"))
    [warning] = look_again()
    hello = plugin("hello")
    assert hello.state == "broken"
    assert "attn_hello" not in sys.modules
    assert f"attn-hello 1.0 needs attn-core<10,>=9, found {importlib_metadata.version('attn-core')}" in hello.reason
    assert hello.fix == 'pip install -U attn-hello "attn-core<10,>=9"'
    assert hello.fix in warning
    check_the_host_answers()


def test_a_requirement_that_cannot_be_read_is_broken_before_import(site):
    fake_distribution(site, requires=("attn-core at least 0.1",))
    [warning] = look_again()
    assert "invalid requirement 'attn-core at least 0.1'" in warning
    assert plugin("hello").fix == "pip install -U attn-hello"
    assert "attn_hello" not in sys.modules
    check_the_host_answers()


@pytest.mark.parametrize(
    "requires",
    [
        (),
        ("attn-core",),
        ("attn-core>=9; python_version<'3'",),
        ("attn-core>=9; extra=='future'",),
        ("attn-core-x>=9",),
    ],
    ids=["none", "any version", "marker for another Python", "of an extra", "another distribution"],
)
def test_a_requirement_that_holds_or_does_not_concern_the_core_is_no_obstacle(site, requires):
    fake_distribution(site, requires=requires)
    assert look_again() == []
    assert plugin("hello").state == "ready"


# The environment


def test_attn_plugins_lists_what_may_load(site, monkeypatch):
    fake_distribution(site)
    fake_distribution(site, name="attn-bad", source="1 / 0", entry_points={"bad": "attn_bad"})
    monkeypatch.setenv("ATTN_PLUGINS", " hello , other")
    assert look_again() == []  # what is not listed is not even imported
    assert (plugin("hello").state, plugin("bad").state) == ("ready", "unavailable")
    assert plugin("bad").reason == "not listed in ATTN_PLUGINS"
    assert "attn_bad" not in sys.modules
    check_the_host_answers()


def test_attn_plugins_set_but_empty_means_the_built_in_alone(site, monkeypatch):
    fake_distribution(site)
    monkeypatch.setenv("ATTN_PLUGINS", "")
    assert look_again() == []
    assert {k.name for k in attn_core.kernels()} == BUILT_IN
    assert "attn_hello" not in sys.modules
    check_the_host_answers()


def test_attn_block_keeps_a_plugin_from_being_imported(site, monkeypatch):
    fake_distribution(site)
    monkeypatch.setenv("ATTN_BLOCK", "hello,torch")
    assert look_again() == []
    assert (plugin("hello").state, plugin("hello").reason) == ("unavailable", "blocked by ATTN_BLOCK")
    assert "attn_hello" not in sys.modules
    with pytest.raises(UnknownKernelError, match="its plugin is unavailable: blocked by ATTN_BLOCK"):
        attn_core.kernel("hello/sdpa")
    check_the_host_answers()  # the built-in cannot be blocked: there is always an answer


def test_attn_prefer_orders_the_kernels(site, monkeypatch):
    fake_distribution(site)
    monkeypatch.setenv("ATTN_PREFER", "hello/*,torch/math")
    refresh()
    x = torch.randn(1, 5, 2, 16)
    assert explain(x, x, x).chosen == "hello/sdpa"
    assert explain(x.double(), x.double(), x.double()).chosen == "torch/math"
    with prefer("torch/reference"):  # a scope comes first
        assert explain(x, x, x).chosen == "torch/reference"


# Loading


def test_a_plugin_that_asks_for_kernels_while_it_is_loaded_sees_those_before_it(site):
    source = "import attn_core\nSEEN = [k.name for k in attn_core.kernels()]\n" + HELLO
    fake_distribution(site, source=source)
    assert look_again() == []
    seen = set(sys.modules["attn_hello"].SEEN)
    assert seen >= BUILT_IN  # and those of other plugins that are installed, by their names
    assert "hello/sdpa" not in seen


MODES = {
    "fake tensors": FakeTensorMode,
    "another default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_what_a_module_makes_at_its_import_is_no_part_of_the_mode_in_which_it_is_first_asked_for(site, mode):
    made = "\nMADE = torch.zeros(2)\n"
    hook = HELLO.partition("def run")[0] + textwrap.dedent("""
        from attn_core import Unusable


        def probe():
            global PROBED
            PROBED = torch.zeros(2)


        @hookimpl
        def attn_kernels():
            able = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims=range(1, 65), compile=True)
            yield Kernel(name="hello/sdpa", run="attn_hello_run:run", probe=probe, capabilities=able)
    """)
    run = "import torch\n\ndef run(query, key, value, *, scale):\n    return query\n"
    fake_distribution(site, source={"attn_hello": hook + made, "attn_hello_run": run + made})
    refresh()
    with mode():
        x = torch.ones(1, 4, 2, 8, device="cpu")
        attention(x, x, x, kernel="hello/sdpa")
    hello = sys.modules["attn_hello"]
    for tensor in (hello.MADE, hello.PROBED, sys.modules["attn_hello_run"].MADE):
        assert type(tensor) is torch.Tensor
        assert tensor.device.type == "cpu"
        assert not tensor.is_inference()


def test_threads_that_ask_while_plugins_load_wait_until_all_are_there(site):
    fake_distribution(site, source="import time\ntime.sleep(0.1)\n" + HELLO)
    registry = Registry()
    barrier = threading.Barrier(8)
    seen = []

    def ask():
        barrier.wait()
        seen.append(tuple(k.name for k in registry.kernels()))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1
    assert {*BUILT_IN, "hello/sdpa"} <= set(seen[0])
