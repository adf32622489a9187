"""Plugins that are installed together: each is found, and none changes what another answers.

These look at what is installed, so they say the same of the bare core, of one plugin, and of all.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import importlib_metadata
import pytest
import torch
from attn_core import (
    ALiBi,
    Causal,
    KeyPadding,
    Neighborhood,
    Segments,
    Window,
    attention,
    explain_problem,
    plugins,
    reference_attention,
)
from attn_core.testing.recorded import evenly, recorded_problems

BUILT_IN = "torch"
INSTALLED = {point.name: point.dist.name for point in importlib_metadata.entry_points(group="attn.plugins")}
KERNELS = {kernel: plugin.name for plugin in plugins() for kernel in plugin.kernels}

#: Prints what is chosen for each recorded problem.
CHOICES = """
import json
from attn_core import explain_problem
from attn_core.testing.recorded import recorded_problems
print(json.dumps([explain_problem(each.problem).chosen for each in recorded_problems()]))
"""


def run(*arguments, **environment):
    """What a Python of its own prints, without a word on stderr."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ATTN_")}
    done = subprocess.run(
        [sys.executable, "-W", "error::attn_core.PluginWarning", *arguments],
        capture_output=True,
        text=True,
        env=kept | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_plugin_that_is_installed_is_ready():
    found = {plugin.name: plugin for plugin in plugins()}
    assert set(found) == set(INSTALLED)
    for name, plugin in found.items():
        assert (plugin.state, plugin.reason) == ("ready", "")
        assert plugin.distribution == INSTALLED[name]
        assert plugin.kernels, f"{name} brings no kernel"


def test_no_kernel_is_brought_twice_and_each_bears_its_plugins_name():
    assert Counter(kernel for plugin in plugins() for kernel in plugin.kernels).most_common(1)[0][1] == 1
    for plugin in plugins():
        assert {kernel.partition("/")[0] for kernel in plugin.kernels} <= {plugin.name, BUILT_IN}


@pytest.mark.parametrize("recorded", evenly(recorded_problems(), 24), ids=lambda each: f"{each.library}-{each.model}")
def test_every_kernel_is_asked_and_says_why_it_is_not_chosen(recorded):
    explanation = explain_problem(recorded.problem)
    assert {verdict.kernel for verdict in explanation} == set(KERNELS)
    assert explanation.chosen is not None
    for verdict in explanation:
        if verdict.state in ("chosen", "ready"):
            assert verdict.seconds is not None
        else:
            assert all(verdict.reasons), verdict.kernel


def test_what_cannot_run_here_changes_no_choice():
    chosen = [explain_problem(each.problem).chosen for each in recorded_problems()]
    alone = json.loads(run("-c", CHOICES, ATTN_PLUGINS=BUILT_IN))
    differing = [(one, other) for one, other in zip(chosen, alone) if one != other]
    assert [one for one, _ in differing if KERNELS[one] == BUILT_IN] == []
    assert len(chosen) == len(alone) >= 200
    if not torch.cuda.is_available():
        assert differing == [], "no kernel of ours outside of the core is faster on a CPU"


@pytest.mark.parametrize(
    ("bias", "options"),
    [
        (None, {}),
        (Causal(), {}),
        (Window(5, 0), {"softcap": 4.0}),
        (KeyPadding([36, 20]), {}),
        (Segments([20, 16], within=Causal()), {}),
        (ALiBi(4) + Causal(), {}),
        (Neighborhood((6, 6), kernel_size=3), {}),
    ],
    ids=str,
)
def test_calls_are_answered_right(bias, options):
    generator = torch.Generator().manual_seed(20261121)
    operands = [torch.randn(2, 36, 4, 16, generator=generator).requires_grad_() for _ in range(3)]
    grad = torch.randn(2, 36, 4, 16, generator=generator)
    out = attention(*operands, bias, **options)
    right = reference_attention(*(x.double() for x in operands), bias, **options)[0]
    torch.testing.assert_close(out.double(), right, rtol=0, atol=1e-5)
    wanted = torch.autograd.grad(right, operands, grad.double())
    for found, expected in zip(torch.autograd.grad(out, operands, grad), wanted):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("command", ["plugins", "kernels", "doctor"])
def test_the_command_names_every_plugin(command):
    told = run("-m", "attn_core", command)
    for name in INSTALLED:
        assert name in told


def test_finding_the_plugins_imports_no_library_of_kernels():
    script = (
        "import sys, torch, attn_core; attn_core.plugins(); "
        "print(sorted({'flash_attn', 'natten', 'xformers', 'triton', 'cuda'} & set(sys.modules)), "
        "torch.cuda.is_initialized())"
    )
    assert run("-c", script) == "[] False\n"
