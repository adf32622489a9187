"""Does it behave among others? What a plugin does to a process before its first call; each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from ..registry import registry
from .cases import Case
from .checks import check, once
from .results import CheckFailed, NotTestable
from .subject import Subject

#: Seconds that a fresh process may take: it imports torch, and runs one small call.
PATIENCE = 120

LISTING = """
import sys, json
import attn_core
before = set(sys.modules)
kernels = [kernel.name for kernel in attn_core.kernels()]
new = set(sys.modules) - before
import torch
print(json.dumps({"kernels": kernels, "cuda": torch.cuda.is_initialized(), "new": sorted(new)}))
"""

#: A child that a fork has shut out of CUDA says so; where torch itself shuts it out, nothing can be learned of kernels.
FORKING = """
import os, sys
import torch, attn_core
from attn_core.registry import registry

def in_a_child(function):
    child = os.fork()
    if child == 0:
        os._exit(function() or 0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)

def shut_out_of_cuda():
    return bool(torch.cuda.device_count() and torch.cuda._is_in_bad_fork())

def call():
    from attn_core.conformance.subject import Subject
    from attn_core.conformance.cases import Case
    torch.set_num_threads(1)
    subject = Subject(kernel, "cpu")
    subject.out(Case(label="", problem=subject.base).inputs(0))

torch.cuda.device_count()
shut_out_before = in_a_child(shut_out_of_cuda)
kernel = attn_core.kernel(sys.argv[1])
registry.condition(kernel)
if not shut_out_before and in_a_child(shut_out_of_cuda):
    sys.exit("its probe starts CUDA, and no forked process may use it then; `attn_core.no_cuda` asks without")
sys.exit(in_a_child(call))
"""

#: What costs a process seconds, so that nobody may import it just to say what a kernel can do.
HEAVY = ("torch._dynamo", "torch._inductor", "transformers", "triton.compiler", "flash_attn", "xformers.ops", "natten")


def in_a_fresh_process(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with what this process finds. Raises CheckFailed where it does not end."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"a fresh process did not end within {PATIENCE} s") from error


def _needs_a_plugin(subject: Subject) -> None:
    if all(subject.name not in plugin.kernels for plugin in registry.plugins()):
        raise NotTestable("it is registered in this process alone; a plugin's kernel is found by others, too")


@check("manners", once)
def is_declared_without_its_library(subject: Subject, case: Case) -> None:
    """Listing the kernels imports no kernel library and starts no CUDA context."""
    _needs_a_plugin(subject)
    done = in_a_fresh_process(LISTING)
    if done.returncode:
        raise CheckFailed(f"listing the kernels fails in a fresh process: {done.stderr[-800:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    if subject.name not in told["kernels"]:
        raise CheckFailed(f"a fresh process does not find it among {', '.join(told['kernels'])}")
    if told["cuda"]:
        raise CheckFailed("listing the kernels starts a CUDA context")
    heavy = sorted({name for name in HEAVY for module in told["new"] if f"{module}.".startswith(f"{name}.")})
    if heavy:
        raise CheckFailed(f"listing the kernels imports {', '.join(heavy)}; give `run` by its dotted name")


@check("manners", once)
def survives_a_fork(subject: Subject, case: Case) -> None:
    """A process that has weighed the kernel may fork: the child may call it, and may use CUDA."""
    _needs_a_plugin(subject)
    if not hasattr(os, "fork") or subject.device != "cpu":
        raise NotTestable("only on the CPU, where there is os.fork")
    done = in_a_fresh_process(FORKING, subject.name)
    if done.returncode:
        raise CheckFailed(f"in a forked process it ends with {done.returncode}: {done.stderr[-800:]}")


@check("manners", once)
def leaves_the_others_alone(subject: Subject, case: Case) -> None:
    """Every other plugin is as it is where this one is blocked."""
    _needs_a_plugin(subject)
    if subject.kernel.plugin == "torch":
        raise NotTestable("the built-in plugin cannot be blocked")
    program = LISTING.replace(
        "import sys, json", f"import sys, json, os; os.environ['ATTN_BLOCK'] = {subject.kernel.plugin!r}"
    )
    alone, together = (in_a_fresh_process(each) for each in (program, LISTING))
    if alone.returncode or together.returncode:
        raise CheckFailed(f"listing the kernels fails in a fresh process: {(alone.stderr + together.stderr)[-800:]}")
    without, within = (set(json.loads(done.stdout.splitlines()[-1])["kernels"]) for done in (alone, together))
    if without - within:
        raise CheckFailed(f"beside it there is no {', '.join(sorted(without - within))}")
