"""The stand-in for FlashAttention-4 beside the real one, by its source: what it imports is 260 MB, and is not needed.

pip install --no-deps --target FOLDER flash-attn-4==4.0.0b36
PYTHONPATH=FOLDER pytest …
"""

from __future__ import annotations

import ast
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from flash_doubled import DOUBLE, VERSIONS

INTERFACE = "flash_attn/cute/interface.py"
REAL = next((found for found in distributions(name="flash-attn-4") if found.version == VERSIONS["fa4"]), None)

pytestmark = pytest.mark.skipif(REAL is None, reason=f"flash-attn-4 {VERSIONS['fa4']} is not installed")


def parameters(path: Path, function: str) -> list[tuple[str, str | None]]:
    """Names and defaults, as they are written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [found] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    given = found.args
    assert not given.kwonlyargs
    assert not given.posonlyargs
    defaults = [None] * (len(given.args) - len(given.defaults)) + [ast.unparse(each) for each in given.defaults]
    return [(each.arg, default) for each, default in zip(given.args, defaults)]


@pytest.mark.parametrize("function", ["flash_attn_func", "flash_attn_varlen_func"])
def test_the_stand_in_has_the_signature_of_the_real_one(function):
    real = Path(str(REAL.locate_file(INTERFACE)))
    assert parameters(DOUBLE / "fa4" / INTERFACE, function) == parameters(real, function)
