"""attn_core.enable, disable and ATTN_ENABLE: libraries by name, all or none, and torch as it was afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import warnings

import attn_core
import importlib_metadata
import pytest
import torch
import torch.nn.functional as F
from attn_core import InputError, IntegrationWarning, UnknownKernelError, record
from attn_core.integrations import hosts
from attn_core.integrations import torch as torch_host
from attn_core.integrations.missing import MissingPackageError
from packaging.specifiers import SpecifierSet

STOCK = torch._C._nn.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setattr(hosts, "_said", set())
    yield
    monkeypatch.undo()
    attn_core.disable()
    assert F.scaled_dot_product_attention is STOCK


def kernels():
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(20261121))
    with record() as calls:
        F.scaled_dot_product_attention(x, x, x)
    return calls.kernels


@pytest.fixture
def installed(monkeypatch):
    """installed(package=version or None): makes it look so."""
    real = importlib_metadata.version
    versions = {}

    def version(name):
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise importlib_metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib_metadata, "version", version)
    return versions.update


# By name


def test_enable_is_the_hosts_own_enable_and_disable_puts_torch_back():
    attn_core.enable("torch", prefer="torch/math")
    assert torch_host.is_enabled()
    assert kernels() == {"torch/math": 1}
    attn_core.disable("torch")
    assert not torch_host.is_enabled()
    assert F.scaled_dot_product_attention is STOCK
    assert kernels() == {}


def test_a_second_time_only_the_options_change_and_one_disable_undoes_both():
    attn_core.enable("torch", prefer=("torch/math",))
    attn_core.enable("torch", prefer=("torch/flash",), strict=True)
    assert kernels() == {"torch/flash": 1}
    attn_core.disable()
    assert F.scaled_dot_product_attention is STOCK


def test_disable_of_what_is_not_enabled_does_nothing_and_imports_nothing():
    modules = set(sys.modules)
    attn_core.disable()
    attn_core.disable("torch", "timm")
    assert {name for name in set(sys.modules) - modules if "timm" in name} == set()


@pytest.mark.parametrize("function", [attn_core.enable, attn_core.disable])
def test_an_unknown_name_is_an_error_with_the_nearest_and_all(function):
    with pytest.raises(InputError, match=r"'transfomers'. Did you mean 'transformers'.*torch, timm, transformers"):
        function("torch", "transfomers")
    assert not torch_host.is_enabled()


def test_enable_without_a_name_is_an_error_with_all_of_them():
    with pytest.raises(InputError, match="takes one or more of torch, timm"):
        attn_core.enable()


def test_a_kernel_that_nobody_registered_is_an_error_and_nothing_is_enabled():
    with pytest.raises(UnknownKernelError, match="torch/flsh"):
        attn_core.enable("torch", prefer="torch/flsh")
    assert not torch_host.is_enabled()


# Libraries that are missing, or of another version


def test_a_library_that_is_not_installed_is_an_error_with_the_line_to_type(installed):
    installed({"timm": None})
    with pytest.raises(MissingPackageError, match=r'pip install "timm>='):
        attn_core.enable("torch", "timm")
    assert not torch_host.is_enabled()


@pytest.mark.parametrize("name", ["timm", "transformers", "diffusers"])
@pytest.mark.parametrize("own", [True, False], ids=["its own enable", "attn_core.enable"])
def test_so_it_is_for_each_library_and_nothing_is_enabled(installed, name, own):
    installed({name: None})
    enable = hosts.HOSTS[name].integration.enable if own else lambda: attn_core.enable(name)
    told = rf'enable: {name} is not installed.\nTo install it: pip install "{name}>='
    with pytest.raises(MissingPackageError, match=told):
        enable()
    assert not hosts.HOSTS[name].enabled
    attn_core.disable(name)  # of what is not enabled: nothing


def test_where_one_cannot_be_enabled_those_before_it_are_disabled_again(installed, monkeypatch):
    installed({"timm": "1.0.31"})
    timm = hosts.HOSTS["timm"].integration

    def fails(**options):
        raise ImportError("no module of that library")

    monkeypatch.setattr(timm, "enable", fails)
    with pytest.raises(ImportError, match="of that library"):
        attn_core.enable("torch", "timm")
    assert not torch_host.is_enabled()
    attn_core.enable("torch")
    with pytest.raises(ImportError, match="of that library"):
        attn_core.enable("torch", "timm")
    assert torch_host.is_enabled()  # it was, before that call


def test_a_version_outside_of_the_tested_range_warns_once_and_names_the_range(installed):
    installed({"torch": "99.0"})
    with pytest.warns(IntegrationWarning, match=r"torch 99.0 is outside .* >=2.9,<") as heard:
        attn_core.enable("torch")
    assert heard[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_core.enable("torch")
    assert kernels()


@pytest.mark.parametrize("name", hosts.HOSTS)
@pytest.mark.parametrize("version", ["0.0.1", "99.0"])
def test_so_it_is_for_each_library_older_or_newer(installed, name, version):
    installed({name: version})
    tested = hosts.HOSTS[name].tested
    told = f"{name} {version} is outside of the versions that attn is tested with, {tested}: compare"
    with pytest.warns(IntegrationWarning, match=re.escape(told)):
        hosts.check_version(hosts.HOSTS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosts.check_version(hosts.HOSTS[name])


def test_a_librarys_own_enable_says_it_too_and_to_whom_calls_it(installed):
    installed({"torch": "99.0"})
    with pytest.warns(IntegrationWarning, match=r"torch 99.0 is outside") as heard:
        torch_host.enable()
    assert [each.filename for each in heard] == [__file__]


def test_the_installed_torch_is_within_the_tested_range():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_core.enable("torch")


def test_every_integration_can_be_imported_without_its_library_and_says_what_it_is_tested_with():
    told, errors = in_another_process("""
        import json, sys
        from attn_core.integrations.hosts import HOSTS
        tested = {name: host.tested for name, host in HOSTS.items()}
        enabled = [name for name, host in HOSTS.items() if host.enabled]
        print(json.dumps([tested, enabled, sorted(HOSTS.keys() & sys.modules.keys())]))
    """)
    tested, enabled, loaded = json.loads(told)
    assert list(tested) == list(hosts.HOSTS)
    assert all(SpecifierSet(versions) for versions in tested.values())
    assert enabled == []
    assert loaded == ["torch"]
    assert errors == ""


# ATTN_ENABLE


def in_another_process(code, **environment):
    """(what it printed last, what it said on stderr)."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("ATTN_")}
    ended = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code)],
        env={**variables, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()[-1], ended.stderr


TELL = """
    import json, sys
    import attn_core
    import torch
    from attn_core.integrations.hosts import HOSTS
    enabled = [name for name, host in HOSTS.items() if host.enabled]
    attn_core.disable()
    stock = torch.nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    print(json.dumps([enabled, stock]))
"""


def test_attn_enable_is_applied_at_the_import_whatever_another_variable_says():
    told, errors = in_another_process(TELL, ATTN_ENABLE="torch", ATTN_ALLOW="nonsense")
    assert json.loads(told) == [["torch"], True]
    assert errors == ""


def test_what_attn_enable_cannot_enable_is_one_warning_each_and_the_others_are_enabled():
    hidden = """
        import importlib_metadata
        real = importlib_metadata.version
        def version(name):
            if name == "timm":
                raise importlib_metadata.PackageNotFoundError(name)
            return real(name)
        importlib_metadata.version = version
    """
    code = textwrap.dedent(hidden) + textwrap.dedent(TELL)
    told, errors = in_another_process(code, ATTN_ENABLE=" tensorflow , timm,torch,")
    assert json.loads(told) == [["torch"], True]
    assert errors.count("IntegrationWarning") == 2
    assert "ATTN_ENABLE: tensorflow was not enabled" in errors
    assert 'pip install "timm>=' in errors
