"""A stranger's plugin, for real: made by `attn new` as the tutorial says, built, installed, chosen, broken.

Nothing of it is faked. Core and plugin are wheels in a virtual environment of their own, in which besides them there is
what the core depends on, and pytest. Each question is asked in a process of that environment.
"""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import importlib_metadata
import pytest
from attn_core.testing import fake_distribution
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial" / "your-first-kernel.md"
#: What its author claims: by far the fastest where there are few pairs, the slowest where there are many.
CLAIM = 'costs={"cpu": Cost(call=1e-7, pair=1e-8, source="the stranger")},'

#: What a program does that knows nothing of plugins: it calls, and asks what there is.
HOST = """
import json, sys, warnings
import torch, attn_core
from attn_core import Causal, KeyPadding, TensorBias, Window, attention, explain, record, reference_attention
from attn_core.cli import main

with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    attn_core.plugins()
torch.manual_seed(20261121)
answers = []
for size, bias, options in (
    (8, None, {}), (8, Causal(), {}), (9, Window(3, 0), {}), (8, KeyPadding([8, 5]), {}), (8, None, {"softcap": 5.0}),
    (8, TensorBias(torch.randn(8, 8)), {}), (8, Causal(), {"return_lse": True}), (600, Causal(), {}),
):
    query, key, value = torch.randn(3, 2, size, 2, 16)
    query.requires_grad_(size == 9)
    with record() as calls:
        out = attention(query, key, value, bias, **options)
    out = out[0] if options.get("return_lse") else out
    right = reference_attention(query, key, value, bias, softcap=options.get("softcap"))[0]
    if query.requires_grad:
        out.sum().backward()
        assert query.grad.isfinite().all()
    [by] = calls.kernels
    answers.append({"by": by, "right": torch.allclose(out.double(), right, atol=1e-5), "problem": str(bias), **options})
small, large = (torch.zeros(1, size, 1, 16) for size in (8, 600))
told = {
    "plugins": {plugin.name: vars(plugin) for plugin in attn_core.plugins()},
    "warnings": [str(each.message) for each in warned if each.category is attn_core.PluginWarning],
    "answers": answers,
    "small": [[v.kernel, v.state] for v in explain(small, small, small, Causal()).verdicts],
    "large": [[v.kernel, v.state] for v in explain(large, large, large, Causal()).verdicts],
    "imported": sorted(name for name in sys.modules if name.startswith("attn_hello")),
    "files": [attn_core.__file__, getattr(sys.modules.get("attn_hello"), "__file__", None)],
}
print("told", json.dumps(told))
main(["plugins"])
"""


def quiet(*command, cwd, **more):
    """Runs a command that must succeed; what it prints."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, check=False, **more)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def needed_by(*roots):
    """The distributions that these need, themselves too, as they are installed here."""
    found, left = {}, [Requirement(root) for root in roots]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = importlib_metadata.distribution(name)
        left += map(Requirement, found[name].requires or ())
    return found


def lend(distributions, folder):
    """Links what these distributions installed here into another site-packages."""
    for distribution in distributions:
        tops = {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}
        for top in tops:
            there, here = folder / top, Path(distribution.locate_file(top))
            if here.exists() and not there.exists():
                there.symlink_to(here.resolve())


def kernel_of_the_tutorial():
    """The file that the tutorial tells to put in, with the claim of this stranger."""
    text = TUTORIAL.read_text(encoding="utf-8")
    [source] = [body for body in re.findall(r"^```python run\n(.*?)^```$", text, re.M | re.S) if "KERNEL = " in body]
    source, times = re.subn(r"^    costs=.*$", f"    {CLAIM}", source, flags=re.M)
    assert times == 1
    return source


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A virtual environment with the wheels of core and plugin, and the project that the plugin was built from."""
    outside = tmp_path_factory.mktemp("stranger")
    home, wheels = outside / "environment", outside / "wheels"
    venv.create(home, symlinks=True)
    bin_ = home / ("Scripts" if os.name == "nt" else "bin")
    python = bin_ / "python"
    site = Path(quiet(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=outside).strip())
    lend([d for name, d in needed_by("attn-core", "pytest").items() if name != "attn-core"], site)
    ours = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")
    environment = {
        name: v for name, v in os.environ.items() if not name.startswith(("ATTN_", "PYTEST_")) and name not in ours
    }
    environment |= {"ATTN_COSTS": "", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    pip = (sys.executable, "-m", "pip", "--quiet")

    def build_and_install(project):
        """As a user would, but without the network and with the build backend that is here."""
        quiet(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, project, cwd=outside)
        name = project.name if project.name != "core" else "attn-core"
        install = (*pip, "--python", python, "install", "--no-deps", "--no-index", "--find-links", wheels)
        quiet(*install, "--force-reinstall", name, cwd=outside, env=environment)

    build_and_install(ROOT / "core")
    quiet(bin_ / "attn", "new", "attn-hello", "--into", outside, cwd=outside, env=environment)
    project = outside / "attn-hello"
    (project / "src" / "attn_hello" / "attend.py").write_text(kernel_of_the_tutorial(), encoding="utf-8")
    build_and_install(project)

    def attn(*arguments, **more):
        command = [str(bin_ / "attn"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=outside, env=environment | more, check=False)

    def host(**more):
        """What the host tells; under "listed", what `attn plugins` prints there."""
        printed = quiet(python, "-c", HOST, cwd=outside, env=environment | more)
        told, _, listed = printed.partition("\n")
        return json.loads(told.removeprefix("told ")) | {"listed": listed}

    return SimpleNamespace(
        python=python, site=site, project=project, outside=outside, environment=environment, attn=attn, host=host
    )


@pytest.fixture(scope="module")
def whole(stranger):
    """What the host tells while nothing is broken."""
    return stranger.host()


def test_the_plugin_is_found_in_its_wheel_and_said_whose_it_is(stranger, whole):
    assert [path for path in whole["files"] if not Path(path).is_relative_to(stranger.site)] == []
    plugin = whole["plugins"]["hello"]
    assert (plugin["state"], plugin["distribution"], plugin["version"]) == ("ready", "attn-hello", "0.1.0")
    assert (plugin["entry_point"], plugin["kernels"]) == ("attn_hello", ["hello/attend"])
    assert whole["warnings"] == []
    [line] = [line for line in whole["listed"].splitlines() if "hello" in line]
    assert "ready" in line
    assert "attn-hello 0.1.0" in line


def test_it_is_ranked_first_just_where_it_says_that_it_is_fastest(whole):
    assert whole["small"][0] == ["hello/attend", "chosen"]
    order = [kernel for kernel, _ in whole["large"]]
    assert dict(whole["large"])["hello/attend"] == "ready"
    assert order.index("hello/attend") > order.index("torch/flash")


def test_it_is_chosen_for_what_it_declares_and_every_answer_is_right(whole):
    assert all(answer["right"] for answer in whole["answers"])
    by = [answer["by"] for answer in whole["answers"]]
    assert by[:4] == ["hello/attend"] * 4
    assert {kernel.partition("/")[0] for kernel in by[4:]} == {"torch"}, (
        "softcap, tensors, LSE: not declared; many pairs"
    )


def test_it_is_certified_by_the_command_and_the_certificate_holds_there(stranger):
    done = stranger.attn("check", "hello", "--out", "certificates")
    assert done.returncode == 0, done.stdout + done.stderr
    path = stranger.outside / "certificates" / "hello-attend.cpu.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    assert (data["granted"], data["failures"]) == (True, [])
    assert (data["distribution"], data["version"]) == ("attn-hello", "0.1.0")
    assert {"dtypes: float32", "biases: Mask", "head_dims: 64", "backward"} <= set(data["claims"])
    assert set(data["claims"].values()) == {"proven"}
    assert "attn-hello 0.1.0 holds what it declares, on cpu" in path.with_suffix(".md").read_text(encoding="utf-8")
    read = stranger.attn("check", "--read", path)
    assert read.returncode == 0, read.stdout + read.stderr


def test_its_own_tests_pass(stranger):
    chosen = "agrees and bias or returns or reads or repeats"
    command = (stranger.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen)
    last = quiet(*command, cwd=stranger.project, env=stranger.environment).strip().splitlines()[-1]
    assert int(re.search(r"(\d+) passed", last)[1]) > 30
    assert "failed" not in last


def test_a_blocked_plugin_is_not_imported(stranger, whole):
    assert whole["imported"] == ["attn_hello", "attn_hello.attend"], "else the next lines would prove nothing"
    told = stranger.host(ATTN_BLOCK="hello")
    assert told["imported"] == []
    plugin = told["plugins"]["hello"]
    assert (plugin["state"], plugin["reason"]) == ("unavailable", "blocked by ATTN_BLOCK")
    assert {answer["by"].partition("/")[0] for answer in told["answers"]} == {"torch"}
    assert told["warnings"] == [], "switched off is not broken"


# Broken, as happens to installed packages


def import_error(site):
    attend = site / "attn_hello" / "attend.py"
    text = attend.read_text(encoding="utf-8")
    attend.write_text(text.replace("import torch\n", "import a_library_that_is_not_there\n", 1), encoding="utf-8")


def abi_error(site):
    """A library that was built for another torch: the loader finds a symbol missing."""
    library = site / "attn_hello" / "_kernels.so"
    library.write_bytes(b"\x7fELF, but not really")
    package = site / "attn_hello" / "__init__.py"
    load = f"import ctypes\nctypes.CDLL({str(library)!r})\n"
    text = package.read_text(encoding="utf-8")
    package.write_text(text.replace("from .attend", f"{load}from .attend"), encoding="utf-8")


def hook_replaced(body):
    def replace(site):
        package = site / "attn_hello" / "__init__.py"
        text, times = re.subn(r"^    yield KERNEL$", body, package.read_text(encoding="utf-8"), flags=re.M)
        assert times == 1
        package.write_text(text, encoding="utf-8")

    return replace


def other_core(site):
    [metadata] = site.glob("attn_hello-*.dist-info/METADATA")
    text, times = re.subn(r"^(Requires-Dist: attn-core).*$", r"\1<0.9,>=0.8", metadata.read_text(), flags=re.M)
    assert times == 1
    metadata.write_text(text)


def two_distributions(site):
    fake_distribution(site, "attn-salut", "2.0", "", {"hello": "attn_salut"})


BREAKAGES = {
    "import error": (import_error, "ModuleNotFoundError: No module named 'a_library_that_is_not_there'"),
    "ABI error": (abi_error, "OSError: "),
    "hook raises": (hook_replaced('    yield KERNEL\n    raise KeyError("arch")'), "KeyError: 'arch'"),
    "wrong type": (
        hook_replaced('    yield {"name": "hello/attend"}'),
        "DeclarationError: attn_kernels must yield Kernel, got {'name': 'hello/attend'}",
    ),
    "duplicate name": (hook_replaced("    yield KERNEL\n    yield KERNEL"), "'hello/attend'"),
    "other core": (other_core, "attn-hello 0.1.0 needs attn-core<0.9,>=0.8, found 0.1.0"),
    "two distributions": (two_distributions, "attn-hello and attn-salut both offer a plugin 'hello'"),
}


@pytest.fixture
def restored(stranger):
    """site-packages, and afterwards the plugin in it as it was."""
    mine = [path for top in stranger.site.glob("attn_hello*") for path in top.rglob("*") if path.suffix != ".pyc"]
    kept = {path: path.read_bytes() for path in mine if path.is_file()}
    there = {path.name for path in stranger.site.iterdir()}
    yield stranger.site
    for path in [p for top in stranger.site.iterdir() if top.name not in there for p in (*top.rglob("*"), top)]:
        path.unlink() if path.is_file() else path.rmdir()
    for path in stranger.site.glob("attn_hello*/**/*"):
        if path.is_file() and path not in kept:
            path.unlink()  # byte code, too: a file is changed twice within a second here
    for path, data in kept.items():
        path.write_bytes(data)


@pytest.mark.parametrize("how", BREAKAGES)
def test_however_it_breaks_every_call_is_answered_and_the_reason_told(how, stranger, restored):
    breaks, reason = BREAKAGES[how]
    breaks(restored)
    told = stranger.host()
    plugin = told["plugins"]["hello"]
    assert (plugin["state"], plugin["kernels"]) == ("broken", [])
    assert reason in plugin["reason"]
    [line] = [line for line in told["listed"].splitlines() if reason in line]
    assert "hello" in line
    [warning] = told["warnings"]
    assert warning.startswith("plugin 'hello' is left out: ")
    assert reason in warning
    assert all(answer["right"] for answer in told["answers"])
    assert {answer["by"].partition("/")[0] for answer in told["answers"]} == {"torch"}
    if how in ("other core", "two distributions"):
        assert told["imported"] == [], "nothing of it is imported where its metadata says that it does not fit"
