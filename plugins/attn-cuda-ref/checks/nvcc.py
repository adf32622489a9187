"""nvcc, where there is one: a second compiler for the same texts.

What runs is what NVRTC makes. But nvcc includes the headers of CUDA and of C++ before any text, so a name that is taken
there is found here alone; and a toolkit is often of another version than the NVRTC beside torch.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from attn_cuda_ref.compiler import LINES, Asked
from attn_cuda_ref.errors import CompileError

#: Variables that name the folder of a toolkit, and where toolkits are installed by default.
VARIABLES = ("CUDA_HOME", "CUDA_PATH")
PLACES = ("/usr/local/cuda", "/opt/cuda")


class Nvcc:
    """The compiler at a path. Raises CompileError where it does not say its version."""

    def __init__(self, program: Path) -> None:
        self.program = program
        said = self._run("--version")
        found = re.search(r"release (\d+)\.(\d+)", said.stdout)
        if found is None:
            raise CompileError(f"{program} --version does not name a release: {said.stdout}{said.stderr}")
        self.version = int(found[1]), int(found[2])

    def architectures(self) -> frozenset[int]:
        """Those that it compiles for, as 10 * major + minor."""
        return frozenset(int(number) for number in re.findall(r"\bsm_(\d+)", self._run("--list-gpu-code").stdout))

    def compile(self, asked: Asked) -> bytes:
        """The cubin. Raises CompileError with the log's first lines."""
        # Its option for macros takes a list, and would cut types at their commas.
        macros = [option[2:].split("=", 1) for option in asked.options if option.startswith("-D")]
        options = [option for option in asked.options if not option.startswith("-D")]
        defined = "".join(f"#define {name} {value}\n" for name, value in macros)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for name, text in asked.headers:
                (folder / name).write_text(text, encoding="utf-8")
            source, cubin = folder / f"{asked.entry}.cu", folder / f"{asked.entry}.cubin"
            source.write_text(f"{defined}#line 1\n{asked.source}", encoding="utf-8")
            done = self._run(*options, "--cubin", "--output-file", str(cubin), str(source))
            if done.returncode:
                raise CompileError(self._told(asked, done))
            return cubin.read_bytes()

    def _told(self, asked: Asked, done: subprocess.CompletedProcess[str]) -> str:
        lines = (done.stderr + done.stdout).strip().splitlines()
        quoted = "".join(f"\n  {line}" for line in lines[:LINES])
        version = ".".join(map(str, self.version))
        return f"nvcc {version} does not compile {asked.entry}\n  with {' '.join(asked.options)}{quoted}"

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self.program), *arguments], capture_output=True, text=True, check=False)


def find() -> Path | None:
    """The nvcc of PATH, of the toolkit that a variable names, of a default place, or of a package beside NVRTC."""
    folders = [os.environ[name] for name in VARIABLES if os.environ.get(name)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in (*folders, *PLACES))])
    program = shutil.which("nvcc", path=path)
    if program:
        return Path(program)
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        for found in sorted(Path(folder).glob("*/bin/nvcc")):
            if os.access(found, os.X_OK):
                return found
    return None
