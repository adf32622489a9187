"""A pytest plugin, which runs tests on chosen kernels.

    pytest -p attn_core.testing.plugin --pyargs attn_core.conformance --attn-plugin hello

A test that takes `attn_check` becomes one test per check and case of the kit; one that takes `attn_kernel` one per
kernel. It is loaded where it is asked for and not by entry point, or every run of pytest would import torch.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest

from ..errors import InputError
from ..kernel import Kernel
from ..registry import registry


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attn")
    group.addoption("--attn-plugin", action="append", default=[], metavar="NAME", help="kernels of this plugin only")
    group.addoption("--attn-kernel", action="append", default=[], metavar="PATTERN", help="kernels of such names only")
    group.addoption("--attn-device", default="cpu", metavar="TYPE", help="device type to check on (cpu)")


def chosen(config: pytest.Config) -> list[Kernel]:
    """The kernels that the options name. Raises pytest.UsageError where they name none, or no device."""
    from ..conformance.subject import must_be_here

    try:
        must_be_here(config.getoption("--attn-device"))
    except InputError as error:
        raise pytest.UsageError(f"--attn-{error}") from error
    plugins, patterns = config.getoption("--attn-plugin"), config.getoption("--attn-kernel")
    found = [
        kernel
        for kernel in registry.kernels()
        if (not plugins or kernel.plugin in plugins)
        and (not patterns or any(fnmatchcase(kernel.name, pattern) for pattern in patterns))
    ]
    if not found:
        known = ", ".join(plugin.name for plugin in registry.plugins())
        raise pytest.UsageError(f"no kernel of plugin {plugins or '*'} is named {patterns or '*'}; plugins: {known}")
    return [kernel for kernel in found if registry.condition(kernel).state in ("ready", "failed")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "attn_check" in metafunc.fixturenames:
        from ..conformance.parametrize import rows

        found = list(rows(chosen(metafunc.config), metafunc.config.getoption("--attn-device")))
        metafunc.parametrize("attn_check", found, ids=[f"{row.subject.name} {row.name}" for row in found])
    elif "attn_kernel" in metafunc.fixturenames:
        kernels = chosen(metafunc.config)
        metafunc.parametrize("attn_kernel", kernels, ids=[kernel.name for kernel in kernels])


def pytest_report_header(config: Any) -> list[str]:
    kernels = chosen(config)
    return [
        f"attn: {len(kernels)} kernels on {config.getoption('--attn-device')}: {', '.join(k.name for k in kernels)}"
    ]
