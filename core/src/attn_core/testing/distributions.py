"""Distributions made of a few lines, for tests of real discovery.

A test that replaces the finder of entry points proves nothing of what users do. What is written here is what pip would
have unpacked: a `*.dist-info` folder and the modules, found by importlib_metadata like any other once its folder is on
`sys.path`, in this process or, by PYTHONPATH, in another.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..hookspecs import GROUP

#: The module of a plugin `hello` with one kernel, `hello/sdpa`, which takes float32 on the CPU and causal masks.
HELLO = """\
import torch

from attn_core import Capabilities, Causal, Cost, Kernel, hookimpl


def run(query, key, value, *, bias=None, scale):
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    if bias is not None:
        logits = logits.masked_fill(~bias.materialize(query.device), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)


@hookimpl
def attn_kernels():
    yield Kernel(
        name="hello/sdpa",
        run=run,
        capabilities=Capabilities(
            devices={"cpu"}, dtypes={torch.float32}, head_dims=range(8, 257, 8), biases={Causal("top-left")}
        ),
        costs={"cpu": Cost(call=1.0, source="a guess")},
    )
"""


def fake_distribution(
    folder: str | Path,
    name: str = "attn-hello",
    version: str = "1.0",
    source: str | Mapping[str, str] = HELLO,
    entry_points: Mapping[str, str] | None = None,
    requires: Sequence[str] = ("attn-core>=0.1,<0.2",),
    *,
    group: str = GROUP,
) -> Path:
    """Writes a distribution into `folder` as pip would have unpacked it.

        fake_distribution(tmp_path, name="attn-broken", source="import a_library_that_is_not_there",
                          entry_points={"broken": "attn_broken"})
        with importable(tmp_path):
            ...

    Args:
        folder: made where it is missing; to be found, it must be on `sys.path`.
        name: of the distribution.
        version: of the distribution.
        source: the text of the module, or module name -> text for several.
        entry_points: entry-point name -> "module" or "module:object"; default `{"hello": "attn_hello"}`.
        requires: lines of `Requires-Dist`, as they stand.
        group: of the entry points; "attn.plugins" unless told.

    Returns:
        The `*.dist-info` folder.

    Raises ValueError where a single `source` is given and the entry points name several modules, or none.
    """
    entry_points = {"hello": "attn_hello"} if entry_points is None else entry_points
    folder = Path(folder)
    modules = sorted({value.partition(":")[0].strip() for value in entry_points.values()})
    if isinstance(source, str):
        if len(modules) != 1:
            raise ValueError(f"source: name the modules, {{module: text}}; the entry points name {modules}")
        source = {modules[0]: source}
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    files = {f"{module.replace('.', '/')}.py": text for module, text in source.items()}
    files[f"{info.name}/METADATA"] = _metadata(name, version, requires)
    files[f"{info.name}/entry_points.txt"] = _entry_points(group, entry_points)
    files[f"{info.name}/INSTALLER"] = "attn_core.testing\n"
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    record = [f"{path},{_digest(text)},{len(text.encode())}" for path, text in files.items()]
    (info / "RECORD").write_text("\n".join([*record, f"{info.name}/RECORD,,\n"]), encoding="utf-8")
    importlib.invalidate_caches()
    return info


@contextmanager
def importable(folder: str | Path) -> Iterator[Path]:
    """Within it, `folder` is the first on `sys.path`; afterwards the modules that came from there are forgotten.

    `attn_core.refresh()` makes the registry look again, on entering and after leaving.
    """
    folder = Path(folder).resolve()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        importlib.invalidate_caches()
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and Path(file).is_relative_to(folder):
                del sys.modules[name]


def _metadata(name: str, version: str, requires: Sequence[str]) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    return "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n"


def _entry_points(group: str, entry_points: Mapping[str, str]) -> str:
    return "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entry_points.items())]) + "\n"


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
