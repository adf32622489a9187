"""Plugins whose kernels are right, and which harm the process that they are in: what the checks of manners must catch.

Each does at import what real packages have done: imports its heavy library, starts CUDA, keeps what no fork survives,
puts a stub where another package looks for a module.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import attn_core
import torch
from attn_core.testing import HELLO, fake_distribution, importable

IMPORTS_MUCH = HELLO.replace("import torch\n", "import torch\nimport torch._dynamo\n", 1)
STARTS_CUDA = HELLO.replace("import torch\n", "import torch\n\ntorch.cuda.is_initialized = lambda: True\n", 1)
REFUSES_FORKS = HELLO.replace(
    "    logits =",
    '    if os.getpid() != STARTED_IN:\n        raise RuntimeError("cannot be used in a forked process")\n    logits =',
    1,
).replace("import torch\n", "import os\n\nimport torch\n\nSTARTED_IN = os.getpid()\n", 1)
#: As on a machine with a GPU, which torch.cuda.is_available() would start the driver of.
PROBES_BY_STARTING_CUDA = HELLO.replace(
    "@hookimpl",
    """
torch.cuda.device_count = lambda: 1


def probe():
    torch.cuda._is_in_bad_fork = lambda: True


@hookimpl""",
    1,
).replace("run=run,", "run=run, probe=probe,", 1)
REPLACES_A_MODULE = HELLO.replace(
    "import torch\n", 'import sys\nimport types\n\nimport torch\n\nsys.modules["wave"] = types.ModuleType("wave")\n', 1
)
#: Another's plugin, which needs the module that is replaced.
BYSTANDER = HELLO.replace("import torch\n", "from wave import open\n\nimport torch\n", 1).replace("hello/", "ways/")

#: In which plugin what is done; each has one kernel, rude/sdpa.
RUDE = {
    "library imported to declare": IMPORTS_MUCH,
    "CUDA started to declare": STARTS_CUDA,
    "of no use after a fork": REFUSES_FORKS,
    "CUDA started by its probe": PROBES_BY_STARTING_CUDA,
    "another plugin broken": REPLACES_A_MODULE,
}


@contextmanager
def rude_plugin(what: str) -> Iterator[None]:
    """Within it, the plugin `rude` is installed, for other processes, too; and one that is loaded after it."""
    wave = sys.modules.get("wave")
    source = RUDE[what].replace("hello/", "rude/")
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            importable(folder),
            mock.patch.object(torch.cuda, "is_initialized", torch.cuda.is_initialized),
            mock.patch.object(torch.cuda, "device_count", torch.cuda.device_count),
            mock.patch.object(torch.cuda, "_is_in_bad_fork", torch.cuda._is_in_bad_fork),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", attn_core.PluginWarning)
            fake_distribution(folder, "attn-rude", source=source, entry_points={"rude": "attn_rude"})
            fake_distribution(folder, "attn-ways", source=BYSTANDER, entry_points={"ways": "attn_ways"})
            attn_core.refresh()
            yield
    finally:
        sys.modules.pop("wave", None)
        if wave is not None:
            sys.modules["wave"] = wave
        attn_core.refresh()
