"""The documents say what the code says: names, fields, states, signatures, and what their examples print."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
import typing
import zipfile
from dataclasses import fields, is_dataclass
from pathlib import Path

import attn_core
import pytest
import torch
from attn_core import adapt, bench_model, dispatch, environment, errors, known_bad, select
from attn_core.capabilities import Capabilities
from attn_core.cli.group import BUILT_IN, main
from attn_core.conformance import CheckResult
from attn_core.conformance.certificate import certificate
from attn_core.record import Row
from attn_core.registry import Plugin, State
from attn_core.testing import fake_distribution, importable
from click.testing import CliRunner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate, pictures = load("generate"), load("pictures")
PAGES = generate.documents()
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@pytest.fixture
def alone(monkeypatch):
    """The built-in plugin and no settings, before and after."""
    for name in environment.Environment.__dataclass_fields__:
        monkeypatch.delenv(f"ATTN_{name.upper()}", raising=False)
    monkeypatch.setenv("ATTN_COSTS", "")  # what was measured on this machine is in no document
    attn_core.refresh()
    with torch.random.fork_rng():
        torch.manual_seed(20261121)
        yield
    transformers = sys.modules.get("attn_core.integrations.transformers")
    if transformers is not None:
        transformers.disable()
    attn_core.refresh()


def text_of(page):
    return page.read_text(encoding="utf-8")


def reference(name):
    return text_of(REFERENCE / name)


def first_cells(text):
    """What stands in code in the first column of the tables of `text`, row by row."""
    return [re.findall(r"`([^`]+)`", cell) for cell in re.findall(r"^\| (.*?) \|", text, re.MULTILINE) if "`" in cell]


def blocks(text):
    """(what stands behind the opening fence, body) of every code block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(text, heading):
    """From a heading to the next one of any level."""
    return re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1].partition("\n#")[0]


def comparable(text):
    """Without seconds; and, where torch is built for CUDA, without what is told of kernels that then are there."""
    text = re.sub(r"~?[\d.]+(?:e-\d+)? (?:µs|ms|s)\b", "<time>", text)
    if torch.backends.cuda.is_built():
        text = re.sub(r"^torch/(?:cudnn|efficient) .*\n", "", text, flags=re.MULTILINE)
    return text


@each_page
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_examples_run_and_print_what_the_page_shows_and_tables_are_in_step(page, alone):
    text = text_of(page)
    if generate.missing(text):
        pytest.skip(f"the page uses {' and '.join(generate.missing(text))}, which is not installed")
    runs = [body for info, body in blocks(text) if info == "python run"]
    for library in ("transformers", "timm", "diffusers"):
        if any(f"integrations import {library}" in body or f"from {library} import" in body for body in runs):
            pytest.importorskip(library, reason=f"the page uses {library}, which is not installed")
    assert comparable(generate.written(text)) == comparable(text), "python docs/generate.py writes it anew"


def test_a_page_out_of_step_is_told_by_what_the_code_says(alone):
    page = "```python run\nprint(1 + 1)\n```\n\n```text output\n3\n```\n"
    assert generate.written(page) == page.replace("3", "2")
    assert comparable("torch/flash  chosen  8.2 µs\n") == comparable("torch/flash  chosen  ~910 ms\n")
    assert comparable("torch/flash  chosen  8.2 µs\n") != comparable("torch/flash  ready  8.2 µs\n")


# Names


@pytest.mark.parametrize("name", attn_core.__all__)
def test_every_public_name_is_in_the_reference(name):
    text = "".join(map(text_of, sorted(REFERENCE.glob("*.md"))))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    in_heading = any(name in re.split(r"\W+", heading) for heading in headings)
    assert in_heading or [name] in first_cells(text) or f"`{name}` (a " in text


@pytest.mark.parametrize("name", [n for n in attn_core.__all__ if inspect.isfunction(getattr(attn_core, n))])
def test_every_public_function_has_its_signature_in_the_reference(name):
    if name == "hookimpl":
        pytest.skip("pluggy's marker; used without arguments")
    assert f"```python signature {name}\n" in reference("api.md")


def test_the_hook_has_its_signature_in_the_reference():
    assert "```python signature attn_kernels\nattn_kernels() -> Iterable[Kernel]\n```" in reference("plugins.md")


@pytest.mark.parametrize("name", attn_core.testing.__all__)
def test_every_name_for_tests_of_plugins_is_in_the_reference(name):
    assert f"`{name}" in reference("testing.md")


@pytest.mark.parametrize("name", attn_core.conformance.__all__)
def test_every_name_of_the_conformance_kit_is_in_the_reference(name):
    text = reference("testing.md").partition("\n## attn_core.conformance\n")[2]
    assert f"```python signature {name}\n" in text or f"`{name}`" in text


def test_every_option_of_the_pytest_plugin_is_documented():
    from attn_core.testing import plugin

    options = re.findall(r"addoption\(\"(--[\w-]+)\"", inspect.getsource(plugin))
    assert options
    assert [
        cells[0].split()[0] for cells in first_cells(section(reference("testing.md"), "The pytest plugin"))
    ] == options


def test_every_key_of_a_certificate_is_documented_in_order():
    kernel = attn_core.kernel("torch/math")
    data = certificate(kernel, "cpu", []).as_data()
    assert [cells[0] for cells in first_cells(section(reference("testing.md"), "Certificates"))] == list(data)


def test_every_field_of_a_result_of_the_kit_is_documented():
    text = section(reference("testing.md"), "check_kernel")
    assert {field.name for field in fields(CheckResult)} <= keys_in(text)


def test_the_tutorial_shows_the_files_that_make_a_plugin():
    page = text_of(ROOT / "docs" / "tutorial" / "your-first-kernel.md")
    shown = [info.split()[-1] for info, _ in blocks(page) if " file " in info]
    assert set(shown) >= {"pyproject.toml", "src/attn_hello/__init__.py", "src/attn_hello/attend.py"}
    assert "attn new attn-hello" in commands_in(page)


def test_every_argument_that_the_integration_of_transformers_refuses_is_documented():
    from attn_core.integrations import transformers

    page = text_of(ROOT / "docs" / "how-to" / "use-with-transformers.md")
    documented = {name for cells in first_cells(page) for name in cells}
    assert {*transformers.UNSUPPORTED, *transformers.PACKED} <= documented


def records():
    """Public dataclasses but biases, whose fields are the arguments that their own sections describe."""
    public = {name: getattr(attn_core, name) for name in attn_core.__all__}
    return [
        name
        for name, value in public.items()
        if is_dataclass(value) and not (isinstance(value, type) and issubclass(value, attn_core.AttnBias))
    ]


@pytest.mark.parametrize("name", records())
def test_every_field_of_a_record_is_documented(name):
    pages = [text for text in map(text_of, REFERENCE.glob("*.md")) if f"<!-- generated: fields-of {name} -->" in text]
    assert len(pages) == 1
    table = pages[0].partition(f"<!-- generated: fields-of {name} -->")[2].partition("<!-- end -->")[0]
    assert first_cells(table) == [[field.name] for field in fields(getattr(attn_core, name))]


@pytest.mark.parametrize("name", [*records(), "Work"])
def test_the_type_of_a_field_is_that_of_its_source(name):
    [cls] = ast.parse(inspect.getsource(getattr(attn_core, name))).body
    nodes = [node for node in cls.body if isinstance(node, ast.AnnAssign)]
    written = {ast.unparse(node.target): ast.unparse(node.annotation) for node in nodes}
    assert {row[0].strip("`"): row[1].strip("`") for row in generate.fields_of(name)[1:]} == written


def test_meanings_are_given_for_fields_that_exist():
    known = {f"{name}.{field.name}" for name in records() for field in fields(getattr(attn_core, name))}
    assert set(generate.MEANINGS) <= known


# Words that the code uses


def test_every_variable_that_is_read_is_documented():
    tree = ast.parse(inspect.getsource(environment))
    read = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.get"
    }
    ours = {name for name in read if name.startswith("ATTN_")}
    assert ours == {f"ATTN_{field.name.upper()}" for field in fields(environment.Environment)}
    assert {cells[0] for cells in first_cells(reference("environment.md"))} == ours
    assert all(name in reference("environment.md") for name in read)


def test_the_environment_is_read_in_one_place():
    source = ROOT / "core" / "src" / "attn_core"
    readers = [p.name for p in source.rglob("*.py") if re.search(r"os\.environ\.get|os\.getenv", text_of(p))]
    assert readers == ["environment.py"]


def test_every_state_is_documented():
    rows = re.findall(r"^\| \*(\w+)\* \|", reference("states.md"), re.MULTILINE)
    assert sorted(rows) == sorted(typing.get_args(State))


def test_every_field_that_the_core_refuses_by_is_documented():
    source = inspect.getsource(Capabilities) + inspect.getsource(select) + inspect.getsource(known_bad)
    used = set(re.findall(r"(?:Refusal|refuse)\(\s*\"([\w.]+)\"", source))
    assert len(used) > 15
    documented = {cells[0] for cells in first_cells(section(reference("declarations.md"), "Refusal"))}
    assert documented - {"field", "message"} == used


def test_every_adaptation_is_documented_with_the_fields_that_it_answers():
    text = section(reference("adaptations-and-cache.md"), "Adaptations")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE)
    assert [(name, sorted(re.findall(r"`([\w.]+)`", answers))) for name, answers in rows] == [
        (adaptation.name, sorted(adaptation.fields)) for adaptation in adapt.ADAPTATIONS
    ]


def test_everything_by_which_a_choice_is_found_is_documented_in_order():
    [asked] = elements_of("asked", dispatch.call)
    [place] = elements_of("place", dispatch.choose_anew)
    assert place[0] == "asked"
    text = section(reference("adaptations-and-cache.md"), "How a choice is found again")
    documented = [cells[0].strip("`") for cells in first_cells(text)]
    assert documented == [*asked, *place[1:]]


def elements_of(name, function):
    """What the tuples that `function` assigns to `name` are made of, without the details of how it is asked."""
    tree = ast.parse(inspect.getsource(function))
    return [
        [re.sub(r"^_is_|^forward_ad\._current_|\(\)$", "", ast.unparse(element)) for element in node.value.elts]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and isinstance(node.value, ast.Tuple)
        and ast.unparse(getattr(node, "target", None) or node.targets[0]) == name
    ]


def test_every_error_is_documented_with_what_it_derives_from():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", reference("errors.md"), re.MULTILINE)
    defined = {
        name: [base.__name__ for base in value.__bases__]
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.AttnError)
    }
    assert {name: re.findall(r"`(\w+)`", bases) for name, bases in rows} == defined
    assert set(defined) <= set(attn_core.__all__)


# JSON and the command line


def keys_in(text):
    return set(re.findall(r"`(\w+)`", text))


def test_every_key_of_the_json_of_explain_and_record_is_documented(alone):
    query = torch.zeros(1, 4, 1, 8)
    text = reference("record-and-explain.md")
    explained = attn_core.explain(query, query, query).to_dict()
    table = section(text, "JSON of explain")
    assert [cells[0] for cells in first_cells(table)] == list(explained)
    assert set(explained["verdicts"][0]) <= keys_in(table)
    with attn_core.record() as calls:
        attn_core.attention(query, query, query)
    assert list(calls.to_dict()[0]) == [field.name for field in fields(Row)]


@pytest.mark.parametrize("command", sorted(BUILT_IN))
def test_every_command_and_its_options_are_documented(command):
    text = section(reference("cli.md"), f"attn {command}")
    shown = CliRunner().invoke(main, [command, "--help"]).output
    options = set(re.findall(r"^ +(--[\w-]+)", shown, re.MULTILINE)) - {"--help"}
    assert options == set(re.findall(r"^\| `(--[\w-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("command", ["doctor", "kernels", "plugins"])
def test_every_key_that_a_command_prints_as_json_is_documented(command, alone):
    printed = json.loads(CliRunner().invoke(main, [command, "--json"]).output)
    text = section(reference("cli.md"), f"attn {command}")
    if command == "plugins":
        assert [list(each) for each in printed] == [[*(field.name for field in fields(Plugin)), "file"]] * len(printed)
        assert "the fields of [Plugin]" in text
        assert "`file`" in text
        return
    keys = set(printed) if isinstance(printed, dict) else {key for each in printed for key in each}
    assert keys <= keys_in(text)
    if command == "doctor":
        assert {key for finding in printed["findings"] for key in finding} <= keys_in(text)


def test_every_key_of_the_json_of_bench_model_is_documented():
    keys = {
        field.name
        for record in (bench_model.Measured, bench_model.Row, bench_model.Difference)
        for field in fields(record)
    }
    assert keys <= keys_in(section(reference("cli.md"), "attn bench-model"))


def commands_in(text):
    return [line for info, body in blocks(text) if not info for line in body.splitlines() if line.startswith("attn ")]


def packages_in(line):
    """The packages of the plugins whose kernels a command names."""
    command = line.split("#")[0]
    return [package for package, name in generate.packages().items() if f"{name.removeprefix('attn-')}/" in command]


def test_command_lines_in_the_documents_work(alone, tmp_path, monkeypatch):
    texts = [text for text in map(text_of, PAGES) if not generate.missing(text)]
    lines = [line for text in texts for line in commands_in(text)]
    assert lines
    monkeypatch.chdir(tmp_path)  # some write a file
    for line in lines:
        packages = packages_in(line)
        if all(generate.is_installed(generate.packages()[package]) for package in packages):
            with generate.alone_with(packages):
                result = CliRunner().invoke(main, shlex.split(line)[1:])
            assert result.exit_code == 0, f"{line}: {result.output}"


# Plugins


PLUGIN_NAMES = [
    pytest.param(package, name, id=f"{package}.{name}")
    for package, distribution in generate.packages().items()
    if importlib.util.find_spec(package)
    for name in getattr(importlib.import_module(package), "__all__", ())
    if not name.startswith("__")
]


@pytest.mark.parametrize(("package", "name"), PLUGIN_NAMES)
def test_every_public_name_of_a_plugin_is_in_its_reference(package, name):
    text = reference(f"{package.removeprefix('attn_')}.md")
    assert re.search(rf"`{name}[`(]", text) or f"```python signature {package}.{name}\n" in text


def test_a_page_tells_which_plugins_it_needs():
    package, *_ = generate.packages()
    page = "```python run\n{}\n```\n"
    assert generate.needed(page.format(f"import {package}")) == [package]
    assert generate.needed(page.format("import attn_core") + package) == []
    assert generate.needed(f"```python signature {package}.name\n```\n") == [package]
    assert generate.missing(page.format("import attn_core")) == []


def test_only_the_plugins_that_a_page_needs_take_part(tmp_path, alone):
    source = "import attn_core\n\n\n@attn_core.hookimpl\ndef attn_kernels():\n    return []\n"
    fake_distribution(tmp_path, "attn-other", "0.1.0", source, {"other": "attn_other"})
    page = "```python run\nimport attn_core\nprint([p.name for p in attn_core.plugins() if p.state == 'ready'])\n```\n"
    page += "\n```text output\n```\n"
    with importable(tmp_path):
        attn_core.refresh()
        assert "other" in [plugin.name for plugin in attn_core.plugins()]
        assert "['torch']" in generate.written(page)


# Pictures


def test_every_picture_shows_what_the_line_below_it_draws(tmp_path):
    lines = pictures.lines()
    assert sorted(lines) == sorted(path.name for path in pictures.PICTURES.iterdir())
    for name, line in lines.items():
        assert pictures.same(pictures.PICTURES / name, pictures.drawn(name, line, tmp_path)), "python docs/pictures.py"


def test_a_picture_of_another_matrix_or_title_is_not_the_same(tmp_path):
    one, other, titled = (tmp_path / f"{name}.png" for name in ("one", "other", "titled"))
    line = "attn show 'Causal()' --seqlen 4 --out {}.png"
    pictures.drawn("one.png", line.format("one"), tmp_path)
    pictures.drawn("other.png", line.format("other").replace("Causal()", "Window(3, 1)"), tmp_path)
    pictures.drawn("titled.png", line.format("titled").replace("Causal()", "Causal(None)"), tmp_path)
    assert pictures.same(one, one)
    assert not pictures.same(one, other)
    assert not pictures.same(one, titled)
    assert not pictures.same(tmp_path / "absent.png", one)


def test_pictures_are_small():
    assert all(path.stat().st_size < 30_000 for path in pictures.PICTURES.iterdir())


# Links


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+", link), link
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(text_of(target)), link


def test_every_page_is_in_the_list_of_documents():
    listed = set(re.findall(r"\]\(([^)#\s]+)\)", text_of(ROOT / "docs" / "README.md")))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert pages == listed


# The README's plugin


def plugin_of_the_readme():
    """The text of attn_hello.py and of pyproject.toml, as the README shows them."""
    shown = [body for _, body in blocks(text_of(ROOT / "README.md"))]
    (source,) = [body for body in shown if "def attn_kernels" in body]
    (project,) = [body for body in shown if "[build-system]" in body]
    return source, project


def test_the_plugin_of_the_readme_has_fifteen_lines_at_most():
    lines = [line for line in plugin_of_the_readme()[0].splitlines() if line]  # without those that ruff sets between
    assert len(lines) <= 15


def test_the_plugin_of_the_readme_is_found_chosen_and_right(tmp_path, alone):
    source, text = plugin_of_the_readme()
    project = tomllib.loads(text)["project"]
    points = project["entry-points"]["attn.plugins"]
    fake_distribution(tmp_path, project["name"], project["version"], source, points, requires=project["dependencies"])
    torch.manual_seed(20261121)
    query, key, value = torch.randn(3, 2, 16, 4, 32)
    with importable(tmp_path):
        attn_core.refresh()
        (plugin,) = [plugin for plugin in attn_core.plugins() if plugin.name == "hello"]
        assert (plugin.state, plugin.distribution, plugin.kernels) == ("ready", "attn-hello", ("hello/sdpa",))
        for bias in (None, attn_core.Causal()):
            assert attn_core.explain(query, key, value, bias).chosen != "hello/sdpa"
            with attn_core.prefer("hello/*"):
                assert attn_core.explain(query, key, value, bias).chosen == "hello/sdpa"
                out = attn_core.attention(query, key, value, bias)
            expected, _ = attn_core.reference_attention(query, key, value, bias)
            torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
        refused = attn_core.explain(query.requires_grad_(), key, value)["hello/sdpa"]
        assert refused.refused_fields == ("backward",)


def test_the_plugin_of_the_readme_can_be_built_from_its_two_files(tmp_path):
    source, project = plugin_of_the_readme()
    (tmp_path / "attn_hello.py").write_text(source, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(project, encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=tmp_path, check=True, capture_output=True
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "attn_hello.py" in archive.namelist()
        (points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert archive.read(points).decode().split() == ["[attn.plugins]", "hello", "=", "attn_hello"]
