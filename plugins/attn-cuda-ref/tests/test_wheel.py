"""The wheel: any platform, any Python, and the text that runs is in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from attn_cuda_ref.launcher import TEXT

PACKAGE = Path(__file__).parents[1]
USED = """
from attn_cuda_ref.compiler import Asked
from attn_cuda_ref.launcher import TEXT
asked = Asked.of('#include "simple_forward.cuh"\\n', "simple_forward", {}, "sm_80", (13, 0))
print(TEXT, *(name for name, _ in asked.headers))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds it, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=PACKAGE, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


def test_it_is_for_every_platform_and_holds_text_alone(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    for path in TEXT.iterdir():
        assert packed[f"attn_cuda_ref/cuda/{path.name}"] == path.read_bytes()
    assert not [name for name, content in packed.items() if b"\0" in content]
    assert {"attn_cuda_ref/py.typed"} <= set(packed)
    assert {name.split("/")[0] for name in packed if ".dist-info" not in name} == {"attn_cuda_ref"}
    assert sum(map(len, packed.values())) < 200_000


def test_what_is_unpacked_finds_its_own_text(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", USED], env=environment, capture_output=True, text=True, check=True)
    where, *headers = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert set(headers) == {
        f"{name}.cuh" for name in ("simple_forward", "simple_tile", "masks", "scores", "primitives")
    }
