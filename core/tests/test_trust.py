"""What runs and what does not: a blocked plugin is not imported, nothing is fetched, no configuration names code."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import attn_core
import pytest
from attn_core.environment import Environment
from attn_core.origin import file_of
from attn_core.testing import HELLO, fake_distribution

#: Modules by which a program reaches the network.
NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "telnetlib", "xmlrpc", "asyncio", "socketserver"}
NETWORK |= {"requests", "httpx", "urllib3", "aiohttp", "huggingface_hub", "kernels", "fsspec"}
PACKAGE = Path(attn_core.__file__).parent


def ended(code, folder, **environment):
    """A process with `folder` on its path; what it prints."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("ATTN_")}
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**variables, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )


def answer(code, folder, **environment):
    process = ended(code, folder, **environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


LISTED = """
    import json, sys
    import torch, attn_core
    from attn_core.cli import main
    from click.testing import CliRunner

    x = torch.ones(1, 4, 2, 8)
    attn_core.attention(x, x, x)
    plugins = json.loads(CliRunner().invoke(main, ["plugins", "--json"]).stdout)
    for command in (["doctor"], ["explain"], ["kernels"]):
        CliRunner().invoke(main, command)
    hello = next(plugin for plugin in plugins if plugin["name"] == "hello")
    print(json.dumps([hello, [name for name in sys.modules if name.partition(".")[0] == "attn_hello"]]))
"""


@pytest.mark.parametrize("variables", [{"ATTN_BLOCK": "hello"}, {"ATTN_PLUGINS": ""}], ids=["blocked", "not listed"])
@pytest.mark.parametrize("module", ["attn_hello", "attn_hello.inner"], ids=["a module", "a module in a package"])
def test_a_plugin_that_is_switched_off_is_listed_with_its_file_and_not_imported(tmp_path, variables, module):
    fake_distribution(tmp_path, source=HELLO, entry_points={"hello": "attn_hello"})
    file = tmp_path / "attn_hello.py"
    if module != "attn_hello":
        file = tmp_path / "attn_hello" / "inner.py"
        file.parent.mkdir()
        (tmp_path / "attn_hello.py").rename(file)
        (file.parent / "__init__.py").write_text("raise SystemExit('imported')\n")
        [points] = tmp_path.glob("*.dist-info/entry_points.txt")
        points.write_text(points.read_text().replace("attn_hello", module))
    hello, imported = answer(LISTED, tmp_path, **variables)
    assert imported == []
    assert hello["state"] == "unavailable"
    assert (hello["distribution"], hello["version"], hello["entry_point"]) == ("attn-hello", "1.0", module)
    assert hello["file"] == str(file)


def test_the_same_plugin_is_imported_where_nobody_switched_it_off(tmp_path):
    fake_distribution(tmp_path, source=HELLO, entry_points={"hello": "attn_hello"})
    hello, imported = answer(LISTED, tmp_path)
    assert (hello["state"], imported) == ("ready", ["attn_hello"])


@pytest.mark.parametrize(
    ("entry_point", "end"),
    [
        ("attn_core.torch_kernels", "attn_core/torch_kernels/__init__.py"),
        ("attn_core.torch_kernels.flash:KERNEL", "attn_core/torch_kernels/flash.py"),
        ("json", "json/__init__.py"),
        ("attn_core.no_such_module", ""),
        ("no_such_package.inner", ""),
        ("entry_points.txt", ""),
        ("", ""),
    ],
)
def test_the_file_of_an_entry_point_is_found_by_its_value(entry_point, end):
    found = file_of(entry_point).replace(os.sep, "/")
    assert found.endswith(end)
    assert bool(found) is bool(end)


def test_a_module_put_in_place_by_hand_has_no_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "by_hand", type(sys)("by_hand"))
    assert file_of("by_hand") == ""


# Nothing is downloaded


def imported_by(file):
    """Top-level names of the modules that a file's import statements name, wherever they stand."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def test_no_file_of_the_core_imports_what_reaches_the_network():
    files = [file for file in PACKAGE.rglob("*.py") if "template" not in file.relative_to(PACKAGE).parts]
    assert len(files) > 50
    found = {str(file): sorted(NETWORK.intersection(imported_by(file))) for file in files}
    assert {file: names for file, names in found.items() if names} == {}


def test_importing_calls_and_commands_open_no_connection(tmp_path):
    events = """
        import json, sys
        import torch

        seen = []
        names = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind",
                 "urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect")
        sys.addaudithook(lambda event, arguments: seen.append(event) if event in names else None)
        import attn_core
        from attn_core.cli import main
        from click.testing import CliRunner

        x = torch.ones(1, 4, 2, 8)
        attn_core.attention(x, x, x, attn_core.Causal())
        attn_core.scaled_dot_product_attention(x, x, x)
        for command in (["doctor"], ["plugins"], ["kernels"], ["explain"], ["cache"]):
            assert CliRunner().invoke(main, command).exit_code == 0, command
        mine = list(seen)
        import socket
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # the hook sees what there is to see
            probe.bind(("127.0.0.1", 0))
        print(json.dumps([mine, seen]))
    """
    mine, with_a_probe = answer(events, tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert mine == []
    assert with_a_probe == ["socket.bind"]


# No configuration names code


def test_no_variable_makes_a_module_of_its_value_run(tmp_path):
    (tmp_path / "payload.py").write_text("print('the payload ran')\n")
    code = """
        import json, os, sys, warnings
        import torch, attn_core

        x = torch.ones(1, 4, 2, 8)
        told = []
        for variable, value in json.loads(os.environ["CASES"]):
            os.environ[variable] = value
            try:
                attn_core.refresh()
                attn_core.attention(x, x, x)
                attn_core.scaled_dot_product_attention(x, x, x, torch.ones(2, 2).bool())
            except attn_core.AttnError as error:
                told.append(variable)
            assert "payload" not in sys.modules, (variable, value)
            del os.environ[variable]
        print(json.dumps(sorted(set(told))))
    """
    variables = [f"ATTN_{field.name.upper()}" for field in fields(Environment)]
    values = ["payload", "payload:run", str(tmp_path / "payload.py")]
    cases = [(variable, value) for variable in variables for value in values]
    process = ended(code, tmp_path, CASES=json.dumps(cases))
    assert process.returncode == 0, process.stderr
    assert "the payload ran" not in process.stdout
    assert json.loads(process.stdout.splitlines()[-1]) == ["ATTN_ALLOW", "ATTN_TENSOR_MASK"]  # words of a fixed list
