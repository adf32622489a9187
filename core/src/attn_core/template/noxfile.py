"""The commands of this project: `nox` runs lint, types and tests, `nox -l` lists all."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True

PLUGIN = "example-kernel"


@nox.session
def tests(session: nox.Session) -> None:
    """Hold the kernels to what they declare; arguments go to pytest."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff; `nox -s lint -- --fix` mends what ruff can mend."""
    session.install("ruff")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types with mypy, in its strict mode."""
    session.install("-e", ".", "mypy")
    session.run("mypy", "src")


@nox.session
def build(session: nox.Session) -> None:
    """Build wheel and sdist into dist/, which is emptied before, and check their metadata."""
    shutil.rmtree("dist", ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, sorted(Path("dist").iterdir())))


@nox.session
def certificate(session: nox.Session) -> None:
    """Check every kernel in a process of its own, and write certificates into certificates/."""
    session.install("-e", ".")
    session.run("attn", "check", PLUGIN, "--out", "certificates", *session.posargs)
