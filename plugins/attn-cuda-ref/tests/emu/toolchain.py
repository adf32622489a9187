"""Builds a kernel's text for the emulator with g++: four builds, each kept by what went into it.

- plain: fast; finds deadlocks, divergence, overruns of shared arrays, and memory that is not there
- checked: watches every access: races, out of bounds (elements of strided tensors), unwritten shared memory
- tsan, asan: ThreadSanitizer's and AddressSanitizer's opinion, in a process of its own
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from attn_cuda_ref.errors import CompileError
from attn_cuda_ref.launcher import TEXT, Constants

HERE = Path(__file__).parent
RUNTIME = ("blocks.cpp", "schedule.cpp", "meetings.cpp", "exchange.cpp", "memory.cpp", "faults.cpp")
#: Version of g++.
OLDEST = 12
#: How many lines of the compiler's log an error shows.
LOG_LINES = 20


@dataclass(frozen=True)
class Build:
    """How the kernel, and the runtime beside it, are compiled."""

    kernel: tuple[str, ...]
    runtime: tuple[str, ...]
    sources: tuple[str, ...] = RUNTIME
    #: A process of its own, and with what it is linked.
    program: tuple[str, ...] = ()


#: No -ffast-math, and nothing contracted to fused operations that the text does not ask for: results do not depend on
#: the machine. Frame pointers go, and so does what C++ needs for exceptions.
COMMON = ("-std=c++17", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fno-gnu-unique", "-w")
ALIKE = ("-O2", "-fno-exceptions")
BUILDS = {
    "plain": Build(kernel=(*ALIKE, "-g1"), runtime=(*ALIKE, "-g1")),
    "checked": Build(
        kernel=("-O1", "-g", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
        runtime=(*ALIKE, "-g1", "-DEMU_CHECKED"),
        sources=(*RUNTIME, "checks.cpp"),
    ),
    "tsan": Build(
        kernel=("-O1", "-g", "-fsanitize=thread"),
        runtime=(*ALIKE, "-g1", "-DEMU_TSAN"),
        sources=(*RUNTIME, "main.cpp"),
        program=("-fsanitize=thread",),
    ),
    "asan": Build(
        kernel=("-O1", "-g", "-fsanitize=address", "-DEMU_ASAN"),
        runtime=("-O1", "-g", "-fsanitize=address", "-DEMU_ASAN"),
        sources=(*RUNTIME, "main.cpp"),
        program=("-fsanitize=address",),
    ),
}


@cache
def missing_tool(build: str = "plain") -> str | None:
    """What a build needs and this machine lacks, or None."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"it runs on Linux, on x86_64 and aarch64, and this is {platform.system()} on {platform.machine()}"
    if not shutil.which("g++"):
        return "there is no g++"
    version = asked("g++", "-dumpversion").partition(".")[0]
    if int(version) < OLDEST:
        return f"g++ is {version}, and {OLDEST} is the first that has 16-bit numbers"
    for flag in BUILDS[build].program:
        library = f"lib{build}.so"
        if flag.startswith("-fsanitize") and not Path(asked("g++", f"-print-file-name={library}")).is_absolute():
            return f"g++ has no {library}"
    return None


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Toolchain:
    """Builds into one folder, which may be shared by processes: what is there is whole, and never changed.

    Args:
        build: one of `BUILDS`.
        folder: where to, and where to look first.
        texts: where a kernel's includes are.
    """

    def __init__(self, build: str, folder: Path, texts: Path = TEXT) -> None:
        if build not in BUILDS:
            raise ValueError(f"build={build!r}: there are {', '.join(BUILDS)}")
        self.build = BUILDS[build]
        self.name = build
        self.folder, self.texts = folder, texts
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def kernel(self, source: str, entry: str, constants: Constants, runtime: list[Path]) -> Path:
        """The library, or the program, of a kernel's text, linked with what `runtime` gave.

        Raises CompileError with the compiler's words.
        """
        text = f"{source}\nEMU_ENTRY({entry})\n"
        macros = [f"-D{name}={value}" for name, value in constants.items()]
        flags = [*COMMON, *processor(), *self.build.kernel, "-include", str(HERE / "cuda_on_cpu.h"), f"-I{self.texts}"]
        flags += macros
        key = digest(contents(self.texts, ".cuh"), contents(HERE, ".h"), text, *flags, *map(str, runtime))
        ending, how = ("", [*self.build.program, "-pthread"]) if self.build.program else (".so", ["-shared"])
        # Compiled and linked apart: what is compiled for a sanitizer is linked with this runtime instead of its own.
        return self._made(
            f"{entry}-{self.name}-{key}{ending}",
            lambda folder: [
                [
                    "g++",
                    *flags,
                    "-c",
                    "-x",
                    "c++",
                    written(folder / f"{entry}.cu", text),
                    "-o",
                    str(folder / "kernel.o"),
                ],
                ["g++", *how, str(folder / "kernel.o"), *map(str, runtime), "-o", str(folder / "made")],
            ],
        )

    def runtime(self) -> list[Path]:
        """The runtime of this build: a library, or objects for a program."""
        flags = [*COMMON, *processor(), *self.build.runtime]
        sources = [HERE / source for source in self.build.sources]
        key = digest(contents(HERE, ".h"), *(path.read_text() for path in sources), *flags)
        if self.build.program:
            return [
                self._made(
                    f"{self.name}-{key}-{source.stem}.o",
                    lambda folder, source=source: [["g++", *flags, "-c", str(source), "-o", str(folder / "made")]],
                )
                for source in sources
            ]
        command = ["g++", *flags, "-shared", "-Wl,-Bsymbolic", *map(str, sources)]
        return [self._made(f"{self.name}-{key}.so", lambda folder: [[*command, "-o", str(folder / "made")]])]

    def _made(self, name: str, commands: Callable[[Path], list[list[str]]]) -> Path:
        """The file of this name, made by the commands if it is not there: aside, then moved to its place."""
        path = self.folder / name
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for command in commands(Path(folder)):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    log = "\n".join(done.stderr.splitlines()[:LOG_LINES])
                    raise CompileError(f"g++ does not compile {name}:\n{log}")
            os.replace(Path(folder) / "made", path)
        return path


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@cache
def contents(folder: Path, ending: str) -> str:
    """The text of all files of a folder, one after the other: any of them may be included."""
    return "\n".join(f"{path.name}\n{path.read_text()}" for path in sorted(folder.glob(f"*{ending}")))


@cache
def processor() -> tuple[str, ...]:
    """Flags for this machine's processor: its conversions of 16-bit numbers are instructions, where it has them."""
    return ("-march=native",) if platform.machine() == "x86_64" else ()


@cache
def compiler() -> str:
    """Which g++, for which processor: -march=native means what this says."""
    answer = subprocess.run(
        ["g++", "-v", *processor(), "-Q", "--help=target"], capture_output=True, text=True, check=True
    )
    return answer.stdout + answer.stderr


def digest(*parts: str) -> str:
    """A name for what goes into a build, the compiler included."""
    return hashlib.sha256("\0".join([compiler(), *parts]).encode()).hexdigest()[:24]
