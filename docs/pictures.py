"""Draws the pictures of the documents: each docs/pictures/NAME.png by the line `attn show … --out NAME.png` of a page.

    python docs/pictures.py            draws those whose matrices are not what the line says
    python docs/pictures.py --check    changes nothing; names them, exit code 1

Compared is every cell, not the file: another version of matplotlib sets the letters around it differently.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from attn_core.cli import main as attn
from attn_core.cli.picture import read

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"


def lines() -> dict[str, str]:
    """Name of a picture -> the line that draws it."""
    found = {}
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for line, name in re.findall(r"^(attn show .* --out ([\w-]+\.png))$", text, re.M):
            if f"../pictures/{name})" in text:
                found[name] = line
    return found


def drawn(name: str, line: str, folder: Path) -> Path:
    """Runs the line; the picture that it makes."""
    words = shlex.split(line)
    assert words[-1] == name, line
    with redirect_stdout(io.StringIO()):
        attn.main([*words[1:-1], str(folder / name)], standalone_mode=False)
    return folder / name


def same(one: Path, other: Path) -> bool:
    """Whether two pictures have the same titles and cells."""
    if not one.exists():
        return False
    first, second = read(one.read_bytes()), read(other.read_bytes())
    return [panel.title for panel in first] == [panel.title for panel in second] and all(
        a.colours.shape == b.colours.shape and bool(((a.colours - b.colours).abs() < 0.005).all())
        for a, b in zip(first, second)
    )


def main(arguments: list[str]) -> int:
    stale = []
    with TemporaryDirectory() as folder:
        for name, line in lines().items():
            new = drawn(name, line, Path(folder))
            if not same(PICTURES / name, new):
                stale.append(name)
                if "--check" not in arguments:
                    (PICTURES / name).write_bytes(new.read_bytes())
    sys.stdout.write("".join(f"{name}\n" for name in stale))
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
