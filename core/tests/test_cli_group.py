"""`attn` finds its commands and those of plugins; a broken one costs itself; errors are messages, not tracebacks."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from attn_core import refresh
from attn_core.cli import main
from attn_core.cli.group import BUILT_IN, broken_commands
from attn_core.testing import fake_distribution, importable
from attn_core.versions import core_version
from click.testing import CliRunner

GROUP = "attn.commands"
HELLO = """\
import click
from attn_core import InputError

@click.command()
@click.option("--bad", is_flag=True)
def hello(bad):
    "Greet the kernels."
    if bad:
        raise InputError("hello: that was bad")
    click.echo("hello, kernels")
"""
SECOND = "import click\n\n@click.command()\ndef hello():\n    click.echo('the other')\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on `sys.path`; afterwards the registry is as it was."""
    for name in ("ATTN_PLUGINS", "ATTN_BLOCK", "ATTN_PREFER", "ATTN_ALLOW"):
        monkeypatch.delenv(name, raising=False)
    with importable(tmp_path) as folder:
        yield folder
    monkeypatch.undo()
    refresh()


def command(folder, name, source, value=None, distribution=None):
    """Installs a distribution with one command."""
    module = f"attn_{name}_{len(list(folder.iterdir()))}"
    entry = {name: value.format(module) if value else f"{module}:{name}"}
    fake_distribution(folder, distribution or f"attn-{name}", source=source, entry_points=entry, group=GROUP)


def attn(*arguments):
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("name", ["", *BUILT_IN])
def test_help_of_every_command_teaches_by_an_example(name):
    result = attn(*name.split(), "--help")
    assert result.exit_code == 0
    assert f"attn {name}" in result.output.partition("Example")[2]


def test_help_lists_every_command():
    listed = attn("--help").output.partition("Commands:")[2]
    assert all(f"\n  {name} " in listed for name in BUILT_IN)


def test_version_is_that_of_the_distribution():
    assert attn("--version").output.startswith(f"attn {core_version()} (torch ")


def test_the_installed_command_runs():
    script = Path(sys.executable).with_name("attn")
    done = subprocess.run([script, "explain", "--kernel", "torch/math"], capture_output=True, text=True, check=True)
    assert "torch/math" in done.stdout
    assert done.stderr == ""


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "attn_core", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("attn ")


def test_an_unknown_command_is_a_short_error():
    result = attn("explian")
    assert result.exit_code == 2
    assert "explian" in result.output
    assert "Traceback" not in result.output


def test_a_plugin_adds_a_command(site):
    command(site, "hello", HELLO)
    assert "Greet the kernels." in attn("--help").output
    result = attn("hello")
    assert (result.exit_code, result.output) == (0, "hello, kernels\n")


def test_an_error_of_attn_in_a_plugins_command_is_a_message(site):
    command(site, "hello", HELLO)
    result = attn("hello", "--bad")
    assert (result.exit_code, result.output) == (2, "Error: hello: that was bad\n")


BROKEN = {
    "import fails": ("import a_library_that_is_not_there", None, "ModuleNotFoundError: No module named"),
    "import exits": ("raise SystemExit('no')", None, "SystemExit: no"),
    "name is missing": ("", None, "AttributeError"),
    "no command": ("def hello(): pass", None, "must be a click command, got function"),
    "the module itself": ("", "{}", "must be a click command, got module"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_command_is_listed_with_its_reason_and_the_rest_work(site, case):
    source, value, reason = BROKEN[case]
    command(site, "hello", source, value)
    listing = " ".join(attn("--help").output.split())
    assert "hello (broken)" in listing
    assert reason in listing
    called = attn("hello", "--any", "thing")
    assert called.exit_code == 2
    assert "command 'hello' is broken" in called.output
    assert reason in called.output
    assert attn("kernels").exit_code == 0
    assert list(broken_commands()) == ["hello"]


def test_a_command_that_two_distributions_offer_is_broken_and_names_both(site):
    command(site, "hello", HELLO)
    command(site, "hello", SECOND, distribution="attn-other")
    result = attn("hello")
    assert result.exit_code == 2
    assert "attn-hello and attn-other both offer it" in result.output


def test_a_command_of_attn_itself_cannot_be_taken_over(site):
    command(site, "kernels", "import click\n\n@click.command()\ndef kernels():\n    click.echo('mine now')\n")
    assert "torch/flash" in attn("kernels").output
    assert "claims the name" in broken_commands()["kernels"]


def test_a_command_is_not_imported_before_it_is_called(site):
    command(site, "hello", "raise AssertionError('imported')")
    result = attn("explain")
    assert result.exit_code == 0, result.output


def test_a_broken_plugin_is_one_line_on_standard_error(site):
    fake_distribution(site, "attn-bad", source="import a_library_that_is_not_there", entry_points={"bad": "attn_bad"})
    refresh()
    result = attn("kernels")
    assert result.exit_code == 0
    (line,) = (line for line in result.output.splitlines() if line.startswith("warning: "))
    assert line.startswith("warning: plugin 'bad' is left out: ModuleNotFoundError")


def test_usage_errors_of_click_are_left_alone():
    with pytest.raises(click.UsageError):
        main(["explain", "--batch", "many"], standalone_mode=False)
