"""The commands that the documents tell people to type are commands that there are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = "python -m pip install nox && nox -s demo"
TESTS = "python -m pip install nox && nox -s tests"


def sessions() -> dict[str, str | None]:
    """Name and docstring of every session of noxfile.py, which the environment of the tests need not be able to run."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    return {
        node.name: ast.get_docstring(node)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("nox.session" in ast.unparse(d) for d in node.decorator_list)
    }


def sessions_named_in(file: str) -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(r"\bnox (?:-R )?-s \"?([a-z_0-9]+)", text)


def test_the_readme_has_the_two_commands_that_do_everything():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert DEMO in lines
    assert TESTS in lines


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_every_session_that_a_document_names_exists(file):
    named = sessions_named_in(file)
    assert named, f"{file} names no session"
    assert set(named) <= set(sessions())


def test_every_session_says_what_it_does():
    found = sessions()
    assert set(found) >= {"demo", "tests", "lint", "types", "build", "bench", "core", "combo", "newest", "gpu"}
    assert [name for name, text in found.items() if not text] == []


def test_the_page_for_contributors_names_every_session():
    assert set(sessions()) <= {*sessions_named_in("CONTRIBUTING.md"), "demo"}, "the README has the demo"


def test_continuous_integration_ends_with_the_tests_as_the_readme_runs_them():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [line for line in script.splitlines() if line and not line.lstrip().startswith("#")]
    install, tests = TESTS.split(" && ")
    assert any(line.endswith(install) for line in commands)
    runs = [re.search(r"nox -s [a-z]+(?= 2>| --|$)", line) for line in commands]
    before = ["nox -s lint", "nox -s types", "nox -s core", "nox -s together", "nox -s timm"]
    assert [run[0] for run in runs if run] == [*before, tests]


def test_the_constraints_name_one_torch_by_its_plain_version():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    named = [line for line in lines if line.startswith("torch")]
    assert len(named) == 1
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", named[0]), "without a local part such as +cpu, so that any build fits"
