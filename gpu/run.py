"""Checks and measures the kernels on a CUDA device, from this source tree, with nothing installed and no network.

    python3 gpu/run.py --wheels wheels --out results

Steps, each of which writes a JSON file of its own into the folder of --out:

    probes       each primitive of attn-cuda-ref's texts against its definition, by pytest, where that can be imported
    conformance  every ready kernel that declares cuda is held to what it declares, in a process of its own;
                 certificates lie in certificates/
    sanitizer    a few small problems of each, forward and backward, under compute-sanitizer, where that is installed
    figures      what a call costs beside the kernel, and what each kind of bias takes, against torch's own op

Python 3.10+ with torch and pluggy is needed. What else the core imports may come in wheels; fill their folder where
there is a network, for the Python of the machine (all of them are pure Python, so any platform will do). The last
three are for the probes:

    pip download --only-binary=:all: --no-deps -d wheels importlib-metadata zipp packaging pluggy \\
        pytest iniconfig pygments

A summary with device, driver and versions is written last, to summary.json. Exit codes: 0 all is well, 1 something
failed, 2 the arguments or what is installed will not do, 3 no CUDA device. With 2 and 3, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import sources

STEPS = ("probes", "conformance", "sanitizer", "figures")
FAILED, UNFIT, NO_DEVICE = 1, 2, 3
#: The form of the files; one more where a field changes its meaning.
FORM = 1


def main(arguments: list[str] | None = None) -> int:
    """Runs the steps; returns the exit code."""
    options = parser().parse_args(arguments)
    if options.wheels is not None and not options.wheels.is_dir():
        return say(f"--wheels: there is no folder {options.wheels}", UNFIT)
    with tempfile.TemporaryDirectory(prefix="attn-gpu-") as folder:
        try:
            carried = sources.make_importable(Path(folder), options.wheels)
        except ValueError as error:
            return say(f"--wheels: {error}", UNFIT)
        missing = [*(["torch"] if sources.find_spec("torch") is None else []), *sources.missing()]
        if missing:
            return say(f"{', '.join(missing)} cannot be imported; --help says how to carry wheels", UNFIT)
        reason = no_device()
        if reason:
            return say(f"no CUDA device, so nothing was run: {reason}", NO_DEVICE)
        try:
            must_be_writable(options.out)
        except OSError as error:
            return say(f"--out: cannot write into {options.out}: {error.strerror}", UNFIT)
        return run_steps(options, carried)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gpu/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of what is not installed")
    made.add_argument("--out", type=Path, metavar="FOLDER", default=Path("gpu-results"), help="default: gpu-results")
    made.add_argument("--only", choices=STEPS, action="append", help="this step alone; may be given more than once")
    made.add_argument("--kernels", metavar="PATTERN", default="*", help="such as 'torch/*'; default: all")
    made.add_argument("--limit", type=positive, default=120.0, metavar="SECONDS", help="for one check of one problem")
    made.add_argument("--rounds", type=int, default=41, help="of each measurement; default: 41")
    return made


def positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def no_device() -> str:
    """Why there is no CUDA device to use; empty where there is one."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and finds no device or no driver"
    return ""


def must_be_writable(folder: Path) -> None:
    """Before minutes of work. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def run_steps(options: argparse.Namespace, carried: list[str]) -> int:
    """Runs the chosen steps in order; one that raises has failed, and the next runs all the same."""
    import conformance
    import figures
    import probes
    import sanitizer

    steps: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "probes": probes.run,
        "conformance": conformance.run,
        "sanitizer": sanitizer.run,
        "figures": figures.run,
    }
    about = {"form": FORM, "machine": machine(), "wheels": carried}
    outcomes = {}
    for name in [step for step in STEPS if step in (options.only or STEPS)]:
        say(f"{name} …")
        try:
            result = steps[name](options)
        except Exception as error:
            result = {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
        write_json(options.out / f"{name}.json", about | result)
        outcomes[name] = {key: result[key] for key in ("outcome", "reason") if key in result}
        say(f"{name}: {' – '.join(outcomes[name].values())}")
    write_json(options.out / "summary.json", about | {"steps": outcomes})
    return FAILED if any(step["outcome"] == "failed" for step in outcomes.values()) else 0


def machine() -> dict[str, str]:
    """What the results depend on."""
    import torch
    from attn_core.versions import core_version

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "driver": told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "torch": torch.__version__,
        "attn-core": str(core_version()),
        "commit": told("git", "-C", str(sources.ROOT), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def told(*command: str) -> str:
    """The first line that a command prints, or why there is none."""
    if shutil.which(command[0]) is None:
        return f"unknown: there is no {command[0]}"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else f"unknown: {command[0]} ended with {done.returncode}"


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def say(text: str, code: int = 0) -> int:
    """Prints a line, to stderr where it comes with an exit code, which is returned."""
    print(text, file=sys.stderr if code else sys.stdout, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
