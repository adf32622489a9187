"""Writes into the documents what the code itself says: signatures, tables, printed results.

    python docs/generate.py            rewrites README.md and docs/**/*.md in place
    python docs/generate.py --check    changes nothing; names the documents that are out of step, exit code 1

What is generated is marked in the documents:

- a code block "python run" is run, all those of one page in one namespace;
- a code block "text output" is what the block run before it printed;
- a code block "python signature NAME" is the signature of that public name, "PACKAGE.NAME" that of a plugin's;
- a code block "toml file PATH", or of another language, is that file of the project that `attn new attn-hello` writes;
- what lies between `<!-- generated: NAME -->` and `<!-- end -->` is the table of that name.

Only the built-in plugin takes part, and those whose packages a document uses. A document is left as it is where one of
them is not installed, and that is said.

The tests compare the documents with what this would write, but for seconds, and for the rows of kernels that depend on
how torch was built.
"""

from __future__ import annotations

import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, ForwardRef

import attn_core
import click
import torch
from attn_core import AttnBias, Backward, Capabilities, Cost, Kernel, conformance, hookspecs
from attn_core.cli.declared import listed, sizes
from attn_core.cli.group import BUILT_IN
from attn_core.cli.new import Names, project
from attn_core.torch_kernels import attn_kernels

DOCS = Path(__file__).parent
ROOT = DOCS.parent

FENCE = re.compile(
    r"^```(?P<language>\w+) (?P<what>run|output|signature|file)(?: (?P<name>[\w./]+))?\n(?P<body>.*?)^```$", re.M | re.S
)
REGION = re.compile(r"(?P<head><!-- generated: (?P<name>[\w ./-]+) -->\n).*?(?=^<!-- end -->$)", re.M | re.S)

YES, NO = "yes", "·"
#: Of torch, while code blocks are run.
THREADS = 2


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]


# Plugins


@cache
def packages() -> dict[str, str]:
    """Package -> distribution, of the plugins of this repository, installed or not."""
    return {path.parent.name: path.parts[-4] for path in ROOT.glob("plugins/*/src/*/__init__.py")}


def needed(text: str) -> list[str]:
    """The packages of plugins that what is generated in `text` needs."""
    generated = "".join(match[0] for match in FENCE.finditer(text)) + str(re.findall(r"<!-- generated: (.+) -->", text))
    return sorted(name for name in packages() if re.search(rf"\b{name}\b", generated))


def missing(text: str) -> list[str]:
    """The distributions among those that `needed` names that are not installed."""
    return [packages()[name] for name in needed(text) if not is_installed(packages()[name])]


def is_installed(distribution: str) -> bool:
    """Whether there is one, so that its entry points are found; a folder on the path alone has none."""
    return any(True for _ in metadata.distributions(name=distribution))


@contextmanager
def alone_with(names: list[str]) -> Iterator[None]:
    """The built-in plugin, and those of these packages."""
    wanted = {point.name for name in names for point in metadata.distribution(packages()[name]).entry_points}
    others = {point.name for point in metadata.entry_points(group="attn.plugins")} - wanted - {"torch"}
    before = os.environ.get("ATTN_BLOCK")
    os.environ["ATTN_BLOCK"] = ",".join(sorted(others))  # no list of those allowed: a document may bring a plugin
    attn_core.refresh()
    try:
        yield
    finally:
        if before is None:
            del os.environ["ATTN_BLOCK"]
        else:
            os.environ["ATTN_BLOCK"] = before
        attn_core.refresh()


# Documents


def written(text: str) -> str:
    """`text` with everything generated anew. What its code blocks raise is raised.

    Estimates depend on the threads of torch, so it has as many as documents are written with.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with alone_with(needed(text)):
            return _written(text)
    finally:
        torch.set_num_threads(threads)


def _written(text: str) -> str:
    namespace: dict[str, Any] = {"__name__": "document"}
    printed = ""

    def fill(match: re.Match[str]) -> str:
        nonlocal printed
        head = f"```{match['language']} {match['what']}" + (f" {match['name']}" if match["name"] else "")
        if match["what"] == "run":
            out = io.StringIO()
            with redirect_stdout(out):
                exec(compile(match["body"], "<document>", "exec", dont_inherit=True), namespace)
            printed = "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
            return match[0]
        if match["what"] == "file":
            return f"{head}\n{new_project()[match['name']]}```"
        body = printed if match["what"] == "output" else signature(match["name"])
        return f"{head}\n{body}```"

    text = FENCE.sub(fill, text)
    return REGION.sub(lambda match: match["head"] + table(match["name"]), text)


# Signatures


def signature(name: str) -> str:
    """The signature of a public name, "Class.method", or "package.name" of a plugin, as it is in a source file."""
    owner, _, member = name.partition(".")
    homes: list[Any] = [attn_core, hookspecs, conformance]
    if owner in packages():
        homes, name = [import_module(owner)], member
        owner, _, member = name.partition(".")
    target: Any = getattr(next(home for home in homes if hasattr(home, owner)), owner)
    if member:
        target = getattr(target, member)
    signed = inspect.signature(target)
    parameters = [p for p in signed.parameters.values() if p.name != "self"]
    texts, star = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            texts.append("*")
            star = True
        prefix = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        star = star or prefix == "*"
        default = "" if parameter.default is parameter.empty else f" = {shown(parameter.default)}"
        texts.append(f"{prefix}{parameter.name}: {annotation(parameter.annotation)}{default}")
    gives = (
        ""
        if signed.return_annotation in (signed.empty, None, "None")
        else f" -> {annotation(signed.return_annotation)}"
    )
    line = f"{name}({', '.join(texts)}){gives}"
    if len(line) <= 100:
        return f"{line}\n"
    return "\n".join([f"{name}(", *(f"    {text}," for text in texts), f"){gives}"]) + "\n"


def annotation(given: Any) -> str:
    """As it is written in the source; typing wraps what stands in quotes, as all annotations of a NamedTuple do."""
    if isinstance(given, ForwardRef):
        given = given.__forward_arg__
    return given if isinstance(given, str) else getattr(given, "__name__", str(given))


def shown(value: Any) -> str:
    """A default value, in words."""
    if value == attn_core.ANY_DIM:
        return "ANY_DIM"
    return repr(value).replace("'", '"')


# Tables


def table(name: str) -> str:
    kind, _, argument = name.partition(" ")
    rows = TABLES[kind](*([argument] if argument else []))
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def kernels() -> list[Kernel]:
    return sorted(attn_kernels(), key=lambda kernel: kernel.name)


def kernels_in_short(plugin: str = "") -> list[list[str]]:
    """One row per kernel of a plugin, by default the built-in one, and group of devices."""
    rows = [["kernel", "device", "dtypes", "biases", "also", "gradients"]]
    options = {"gqa": "GQA", "softcap": "softcap", "dropout": "dropout", "return_lse": "LSE"}
    for kernel in attn_core.kernels(f"{plugin}/*") if plugin else kernels():
        for declared in kernel.declarations:
            backward = declared.backward
            gradients = []
            if isinstance(backward, Backward):
                given = {"bias": backward.bias_grad, "LSE": backward.lse_grad}
                gradients = ["q, k, v", *(name for name, does in given.items() if does)]
            row = [
                f"`{kernel.name}`",
                "any" if "*" in declared.devices else listed(declared.devices),
                listed(declared.dtypes),
                "any" if AttnBias in declared.biases else listed(declared.biases),
                ", ".join(word for field, word in options.items() if getattr(declared, field)),
                ", ".join(gradients),
            ]
            rows.append([cell or NO for cell in row])
    return rows


def kernels_on(device: str) -> list[list[str]]:
    """Fields by kernels, for one type of device."""
    found = [
        (kernel, declared)
        for kernel in kernels()
        for declared in kernel.declarations
        if device in declared.devices or "*" in declared.devices
    ]
    rows = [["", *(f"`{kernel.name}`" for kernel, _ in found)]]
    for field in fields(Capabilities):
        if field.name not in ("devices", "backward"):
            rows.append(
                [f"`{field.name}`", *(cell(field.name, getattr(declared, field.name)) for _, declared in found)]
            )
    rows.append(["`backward`", *(cell("backward", declared.backward is not None) for _, declared in found)])
    for field in fields(Backward):
        row = [getattr(declared.backward, field.name) if declared.backward else False for _, declared in found]
        cells = ["as forward" if v is None and "min" not in field.name else cell(field.name, v) for v in row]
        rows.append([f"`backward.{field.name}`", *cells])
    rows.append(["`layout`", *(kernel.layout for kernel, _ in found)])
    rows.append(["`refuse` (see below)", *(cell("", kernel.refuse is not None) for kernel, _ in found)])
    rows.append(["`skips`", *(listed(kernel.skips) or NO for kernel, _ in found)])
    costs = [kernel.cost(device) for kernel, _ in found]
    both = [cost.with_backward for cost in costs]
    rows += [[f"`cost.{name}`", *(constant(getattr(cost, name)) for cost in costs)] for name in constants()]
    if any(both):
        rows += [
            [f"`cost.with_backward.{name}`", *(constant(cost and getattr(cost, name)) for cost in both)]
            for name in constants()
            if name not in ("backward", "threads", "source")
        ]
    return rows


def constants() -> list[str]:
    """Fields of a Cost, but for that which is one itself."""
    return [field.name for field in fields(Cost) if field.name != "with_backward"]


def constant(value: float | str | None) -> str:
    return NO if value is None else value if isinstance(value, str) else f"{value:g}"


def cell(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return YES if value else NO
    if value is None:
        return "equal" if name == "head_dims_v" else NO
    if name.startswith("head_dims"):
        return sizes(value)
    if name.endswith("compute_capability"):
        return f"sm_{value[0]}{value[1]}"
    return value if isinstance(value, str) else listed(value) or NO


def fields_of(name: str) -> list[list[str]]:
    """Fields of a record with their types and defaults; meanings are read from the comments beside the fields."""
    cls = getattr(attn_core, name)
    meanings = comments(cls)
    rows = [["field", "type", "default", "meaning"]]
    if not is_dataclass(cls):
        named: Any = cls
        for name, kind in named.__annotations__.items():
            default = f"`{shown(named._field_defaults[name])}`" if name in named._field_defaults else "required"
            rows.append([f"`{name}`", f"`{annotation(kind)}`", default, meanings[name]])
        return rows
    for field in fields(cls):
        default = "required"
        if field.default is not MISSING:
            default = f"`{shown(field.default)}`"
        elif field.default_factory is not MISSING:
            default = f"`{shown(field.default_factory())}`"
        rows.append([f"`{field.name}`", f"`{field.type}`", default, meanings[field.name]])
    return rows


def names_in(module: str) -> list[list[str]]:
    """The public names of a plugin's package that are defined in one of its modules, as they are called."""
    package: Any = import_module(module.partition(".")[0])
    rows = [["name", "what it is"]]
    for name in package.__all__:
        value = getattr(package, name)
        home = getattr(value, "__module__", package.__name__) or ""
        if f"{home}.".startswith(f"{module}."):
            summary, _, _ = (inspect.getdoc(value) or "").partition("\n\n")
            rows.append([f"`{name}{_called(value)}`", " ".join(summary.split()).rstrip(".")])
    return rows


def _called(value: Any) -> str:
    """The arguments of a function, with their defaults, without types."""
    if not inspect.isroutine(value):
        return ""
    given = inspect.signature(value)
    bare = [parameter.replace(annotation=parameter.empty) for parameter in given.parameters.values()]
    return str(given.replace(parameters=bare, return_annotation=given.empty)).replace("'", '"')


#: What the source leaves to be understood.
MEANINGS = {
    "Problem.batch": "batch entries; 0 is legal",
    "Problem.seqlen_q": "queries; 0 is legal",
    "Problem.seqlen_kv": "keys; 0 is legal",
    "Problem.num_heads": "of query",
    "Problem.num_kv_heads": "of key and value; divides `num_heads`",
    "Problem.head_dim": "last dimension of query and key",
    "Problem.head_dim_v": "last dimension of value, and of the result",
    "Problem.dtype": "of query, key and value; under autocast, the one that they are cast to",
    "Problem.softcap": "None: none",
    "Problem.dropout_p": "in [0, 1)",
    "Problem.return_lse": "the LSE is asked for, too",
    "Problem.bias_requires_grad": "a gradient to the bias is needed",
    "Backward.dtypes": "that the backward takes",
    "Backward.head_dims": "that the backward takes",
    "Backward.gqa": "the backward takes fewer heads of key and value, too",
    "Backward.biases": "that the backward takes",
    "Backward.deterministic": "two runs of the backward are bit-equal",
    "Backward.min_compute_capability": "of CUDA devices, inclusive; None: as the forward",
    "Refusal.field": "the field that it concerns, as in the table of refusals",
    "Refusal.message": "what is accepted, and what was asked",
    "Unusable.state": "see [states.md](states.md)",
    "Unusable.reason": "one line",
    "Unusable.fix": "what to type",
    "Plugin.name": "the name of its entry point",
    "Plugin.state": '"ready", "broken" or "unavailable"',
    "Plugin.reason": "of another state than ready",
    "Plugin.fix": "what to type",
    "Plugin.distribution": "that it belongs to",
    "Plugin.version": "of the distribution",
    "Plugin.entry_point": "its value",
    "Plugin.kernels": "names of what it offers",
    "Verdict.kernel": "its name",
    "Verdict.state": '"chosen", "ready" (takes it; another was better), or a state of [states.md](states.md)',
    "Verdict.reasons": "why it does not take the problem, or that it failed before; a line each",
    "Verdict.refused_fields": "the fields of the refusals among them",
    "Verdict.adaptations": "rewrites that it needs, in order",
    "Verdict.fix": "what to type, where the kernel's probe knows it",
    "Explanation.problem": "what was asked",
    "Explanation.prefer": "patterns in force",
    "Explanation.notes": "what to know of the estimates and the device",
    "Explanation.strict": "patterns of the strict scope in force; empty: every kernel may run",
    "Row.kernel": 'its name, "torch (stock)" for a call handed to torch unchanged, or "(others)"',
    "Row.problem": "what was asked; None for a stock call, a traced choice and the sum of others",
    "Row.adaptations": "rewrites that the kernel needs",
    "Row.compiled": "a choice made while a graph was traced, not a call",
    "Row.calls": "so far; None for a traced choice",
    "Row.seconds": "wall time around the kernel, in all (on CUDA, that of the device); None for a traced choice",
}


def comments(cls: type) -> dict[str, str]:
    """Field -> meaning: from a `#:` comment in the class, else from the "Args:" of its docstring."""
    found = dict(re.findall(r"^ {4}(\w+): [^\n]*?#: ?([^\n]*)$", inspect.getsource(cls), re.M))
    arguments = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\n\n")[0]
    for names, text in re.findall(r"^ {4}([\w, ]+): (.*?)(?=^ {4}\w|\Z)", arguments, re.M | re.S):
        for each in names.split(", "):
            found.setdefault(each, " ".join(text.split()))
    names = [field.name for field in fields(cls)] if is_dataclass(cls) else list(cls.__annotations__)
    return {name: found.get(name) or MEANINGS[f"{cls.__name__}.{name}"] for name in names}


def options_of(command: str) -> list[list[str]]:
    """Options of a command of the command line, a plugin's too."""
    home = BUILT_IN.get(command) or metadata.entry_points(group="attn.commands")[command].value
    module, _, attribute = home.partition(":")
    found: click.Command = getattr(__import__(module, fromlist=[attribute]), attribute)
    rows = [["option", "meaning"]]
    for option in found.params:
        if isinstance(option, click.Argument):
            name = option.metavar or (option.name or "").upper()
            default = f"; default `{option.default}`" if isinstance(option.default, str) else ""
            rows.append([f"`{name}`", "required" if option.required else f"optional{default}"])
        elif isinstance(option, click.Option):
            values = ""
            if not option.is_flag:
                choices = getattr(option.type, "choices", None) if option.metavar is None else None
                values = " " + (option.metavar or ("|".join(choices) if choices else option.type.name.upper()))
            usual = option.show_default if isinstance(option.show_default, str) else option.default
            default = f" Default: {usual}." if option.show_default else ""
            rows.append([f"`{', '.join(option.opts)}{values}`", f"{option.help or ''}{default}".strip()])
    return rows


def new_project() -> dict[str, str]:
    """The files that `attn new attn-hello` writes."""
    return project(Names("attn-hello"))


#: What the files of a new project are for, in the order in which they are met.
FILES = {
    "pyproject.toml": "name, version, what is needed, the entry point by which attn finds it, settings of tools",
    "src/attn_hello/__init__.py": "the hook: attn asks it for kernels",
    "src/attn_hello/attend.py": "the kernel: a function, what it can do, what it costs",
    "src/attn_hello/py.typed": "empty: type checkers may read the package",
    "tests/test_kernels.py": "the conformance kit, on that kernel",
    "README.md": "what the package index and the repository show first",
    "CHANGELOG.md": "a heading per version",
    "LICENSE": "Apache-2.0, as attn's own; with another, change `license` in pyproject.toml",
    "noxfile.py": "`nox` runs lint, types and tests; `nox -s build` and `nox -s certificate` are for a release",
    ".github/workflows/tests.yml": "runs `nox` for every change, on GitHub",
    ".gitignore": "what tools leave behind",
}


def files_of_a_new_project() -> list[list[str]]:
    """Each file and what it is for."""
    if set(FILES) != set(new_project()):
        raise ValueError(f"FILES: a new project has other files: {sorted(set(FILES) ^ set(new_project()))}")
    return [["file", "for"], *([f"`{path}`", text] for path, text in FILES.items())]


def checks() -> list[list[str]]:
    """The checks of the conformance kit, by group."""
    groups = list(dict.fromkeys(check.group for check in conformance.CHECKS.values()))
    return [
        ["group", "check", "what must hold"],
        *([group, f"`{c.name}`", c.about] for group in groups for c in conformance.CHECKS.values() if c.group == group),
    ]


TABLES: dict[str, Callable[..., list[list[str]]]] = {
    "kernels-in-short": kernels_in_short,
    "kernels-on": kernels_on,
    "fields-of": fields_of,
    "options-of": options_of,
    "names-in": names_in,
    "files-of-a-new-project": files_of_a_new_project,
    "checks": checks,
}


def main(arguments: list[str]) -> int:
    stale = []
    for path in documents():
        before = path.read_text(encoding="utf-8")
        if missing(before):
            sys.stderr.write(f"{path.relative_to(ROOT)}: left as it is: needs {', '.join(missing(before))}\n")
            continue
        try:
            after = written(before)
        except Exception as error:
            raise SystemExit(f"{path.relative_to(ROOT)}: {type(error).__name__}: {error}") from error
        if after != before:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in arguments:
                path.write_text(after, encoding="utf-8")
    sys.stdout.write("".join(f"{name}\n" for name in stale))
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
