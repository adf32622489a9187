"""`attn new`: a whole project that works at once; or a refusal that says what is accepted, and nothing."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import attn_core
import pytest
from attn_core.cli import main
from attn_core.cli.new import MAX_NAME, PLACEHOLDERS, TEMPLATE, Names, create, project
from attn_core.conformance import check_kernel
from attn_core.testing import fake_distribution, importable
from click.testing import CliRunner
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CORE = Path(__file__).parents[1]
HELLO = Names("attn-hello")


def new(*arguments):
    return CliRunner().invoke(main, ["new", *map(str, arguments)])


def everything_in(folder):
    """Each path in `folder`, and what it holds."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def made(tmp_path):
    done = new("attn-hello", "--into", tmp_path)
    assert done.exit_code == 0, done.output
    return tmp_path / "attn-hello"


def test_a_project_has_all_that_a_package_needs(made):
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert files == {
        ".github/workflows/tests.yml",
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "noxfile.py",
        "pyproject.toml",
        "src/attn_hello/__init__.py",
        "src/attn_hello/attend.py",
        "src/attn_hello/py.typed",
        "tests/test_kernels.py",
    }
    assert [path.name for path in made.parent.iterdir()] == ["attn-hello"], "nothing is left beside it"


def test_it_is_said_what_was_made_and_what_to_type_next(tmp_path):
    output = new("attn-hello", "--into", tmp_path).output
    assert f"made {tmp_path / 'attn-hello'}\n" in output
    assert "plugin hello, with the kernel hello/attend, in src/attn_hello/attend.py" in output
    assert 'pip install -e ".[test]"' in output
    assert "attn check hello" in output


def test_the_project_is_called_as_was_asked_throughout(made):
    data = tomllib.loads((made / "pyproject.toml").read_text(encoding="utf-8"))
    assert data["project"]["name"] == "attn-hello"
    assert data["project"]["entry-points"]["attn.plugins"] == {"hello": "attn_hello"}
    assert data["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/attn_hello"]
    assert "hello/attend" in (made / "tests" / "test_kernels.py").read_text(encoding="utf-8")
    for path, text in project(HELLO).items():
        assert not re.search("example.kernel|\0", path + text), path


def test_a_name_without_attn_before_it_is_the_plugins_too():
    assert (Names("my-kernel").package, Names("my-kernel").plugin) == ("my_kernel", "my-kernel")
    assert 'my-kernel = "my_kernel"' in project(Names("my-kernel"))["pyproject.toml"]


@pytest.mark.parametrize("name", ["attn-example-kernel", "example-kernel", "attn-attn-example-kernel", "plugin"])
def test_names_that_hold_those_of_the_template_are_as_good_as_others(name):
    text = project(Names(name))["pyproject.toml"]
    data = tomllib.loads(text)
    assert data["project"]["name"] == name
    assert data["project"]["entry-points"]["attn.plugins"] == {Names(name).plugin: Names(name).package}


def test_the_project_pins_the_core_of_this_version():
    version = tomllib.loads((CORE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    [needed] = tomllib.loads(project(HELLO)["pyproject.toml"])["project"]["dependencies"]
    assert Requirement(needed).name == "attn-core"
    assert Requirement(needed).specifier.contains(version)
    major, minor = map(int, version.split(".")[:2])
    assert not Requirement(needed).specifier.contains(f"{major}.{minor + 1}.0")


def test_the_project_has_the_licence_that_it_names():
    assert (TEMPLATE / "LICENSE").read_bytes() == (CORE / "LICENSE").read_bytes()


def test_code_is_no_wider_than_its_own_settings_allow_with_the_longest_name():
    for path, text in project(Names("x" * MAX_NAME)).items():
        if path.endswith(".py"):
            ast.parse(text)
            assert max(map(len, text.splitlines()), default=0) <= 120, path


def test_its_tests_have_five_lines():
    text = project(HELLO)["tests/test_kernels.py"]
    assert len([line for line in text.splitlines() if line]) <= 5


def test_the_kernel_is_found_chosen_and_right(made, tmp_path):
    sources = {
        f"attn_hello.{path.stem}": path.read_text(encoding="utf-8") for path in made.rglob("src/attn_hello/*.py")
    }
    with importable(tmp_path / "site"):
        fake_distribution(tmp_path / "site", "attn-hello", "0.1.0", sources, {"hello": "attn_hello"})
        attn_core.refresh()
        try:
            [kernel] = attn_core.kernels("hello/*")
            for check in ("takes_what_it_claims", "refuses_what_it_does_not_claim", "a_query_without_keys_gets_zeros"):
                results = check_kernel("hello/attend", only=check)
                assert all(results), "\n".join(map(str, results))
                assert any(result.status == "passed" for result in results)
        finally:
            attn_core.refresh()
    assert kernel.name == "hello/attend"


# What is refused


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "a name is small letters"),
        ("My_Kernel", "'my-kernel' would do"),
        ("fast kernel", "'fast-kernel' would do"),
        ("1st", "'st' would do"),
        ("a--b", "'a-b' would do"),
        ("a-", "'a' would do"),
        ("../a", "a name is small letters"),
        ("noyau-é", "a name is small letters"),
        ("a\n", "a name is small letters"),
        ("x" * (MAX_NAME + 1), f"{MAX_NAME} characters at most"),
        ("class", "is a keyword of Python"),
        ("torch", "which attn-core"),
        ("attn-torch", "the plugin 'torch'"),
        ("attn-core", "distribution attn-core is installed"),
        ("select", "a module 'select' is installed"),
        ("attn-example-kernel/../x", "a name is small letters"),
    ],
)
def test_a_name_that_cannot_be_is_refused_with_what_is_accepted(name, text, tmp_path):
    done = new(name, "--into", tmp_path)
    assert done.exit_code == 2, done.output
    assert text in done.output
    assert everything_in(tmp_path) == {}


def test_the_name_of_an_installed_plugin_is_refused_and_whose_it_is_said(tmp_path):
    with importable(tmp_path / "site"):
        fake_distribution(tmp_path / "site")
        attn_core.refresh()
        done = new("hello", "--into", tmp_path)
    attn_core.refresh()
    assert done.exit_code == 2
    assert "'hello' would be the plugin 'hello', which attn-hello 1.0 is already" in done.output


def folder_with_a_file(path):
    path.mkdir()
    (path / "mine.txt").write_text("years of work")


def plain_file(path):
    path.write_text("years of work")


def link_to_nowhere(path):
    path.symlink_to(path.with_name("nowhere"))


def link_to_an_empty_folder(path):
    path.with_name("empty").mkdir()
    path.symlink_to(path.with_name("empty"))


@pytest.mark.parametrize("there", [folder_with_a_file, plain_file, link_to_nowhere, link_to_an_empty_folder])
def test_what_exists_is_never_touched(there, tmp_path):
    there(tmp_path / "attn-hello")
    before = everything_in(tmp_path)
    done = new("attn-hello", "--into", tmp_path)
    assert done.exit_code == 2
    assert "is there already, and nothing is overwritten" in done.output
    assert everything_in(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "attn-hello").mkdir()
    assert new("attn-hello", "--into", tmp_path).exit_code == 0
    assert (tmp_path / "attn-hello" / "pyproject.toml").exists()


def test_what_appears_there_meanwhile_is_not_touched_either(tmp_path, monkeypatch):
    rename = Path.rename

    def late(self, target):
        folder_with_a_file(Path(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    done = new("attn-hello", "--into", tmp_path)
    assert done.exit_code == 2
    assert "nothing was written" in done.output
    assert [path.name for path in tmp_path.rglob("*")] == ["attn-hello", "mine.txt"]


def test_nothing_is_left_where_the_disk_is_full_half_way(tmp_path, monkeypatch):
    write, written = Path.write_text, []

    def full(self, *arguments, **options):
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(self)
        return write(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(attn_core.AttnError, match="No space left on device; nothing was written"):
        create(HELLO, tmp_path)
    assert len(written) == 5
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("into", ["nowhere", "file"])
def test_what_is_no_folder_cannot_hold_it(into, tmp_path):
    (tmp_path / "file").write_text("")
    done = new("attn-hello", "--into", tmp_path / into)
    assert done.exit_code == 2
    assert f"{tmp_path / into} is not a folder" in done.output


def test_what_tools_leave_in_the_template_is_not_copied(tmp_path, monkeypatch):
    files = project(PLACEHOLDERS)
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    for folder in ("__pycache__", "src/attn_example_kernel/__pycache__", ".ruff_cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "left").write_bytes(b"\xff\0")
    monkeypatch.setattr("attn_core.cli.new.TEMPLATE", tmp_path)
    assert project(PLACEHOLDERS) == files
