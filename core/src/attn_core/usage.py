"""How often each kind of bias is asked for, and at which door: counted in this process alone, and written to a file.

    with count_usage() as counts:
        model(x)
    print(counts)

Off unless asked for, by `count_usage` or by ATTN_USAGE; then it is a recorder like that of `record`, in a scope with a
table of choices of its own, so that nothing is paid by anybody else. Nothing leaves this machine. Calls in a compiled
graph are not seen, nor those of other threads within `count_usage`; ATTN_USAGE counts the calls of all threads.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .bias import AttnBias
from .errors import InputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

Counts = dict[str, dict[str, int]]


class Usage:
    """Calls by door and kind of bias: what `count_usage()` yields."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def add(self, door: str, bias: object) -> None:
        """Counts one call; `door` is the name of the function that was called, or "plan"."""
        key = door, kind_of(bias)
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + 1

    def to_dict(self) -> Counts:
        """Door -> kind -> calls, the most frequent first."""
        with self._lock:
            counts = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        found: Counts = {}
        for (door, kind), calls in counts:
            found.setdefault(door, {})[kind] = calls
        return found

    def save(self, path: str | Path) -> None:
        """Adds the counts to those in a JSON file, which is replaced as a whole.

        Raises InputError, and leaves the file as it is, where it is not one that was written here; OSError where it
        cannot be written.
        """
        merge_into(Path(path), self.to_dict())

    def __str__(self) -> str:
        lines = [f"{door} {kind}: {calls}" for door, kinds in self.to_dict().items() for kind, calls in kinds.items()]
        return "\n".join(lines) or "no calls"

    def forget(self) -> None:
        """Begins anew."""
        with self._lock:
            self._counts.clear()


def kind_of(bias: object) -> str:
    """ "none", "tensor", or the class of a bias: by its name alone where it is one of the core."""
    if bias is None:
        return "none"
    kind: Any = type(bias)
    if isinstance(bias, AttnBias):
        kind = getattr(bias, "made_by", None) or kind
        if kind.__module__.startswith("attn_core."):
            return str(kind.__name__)
    elif isinstance(bias, Tensor):
        return "tensor"
    return f"{kind.__module__}.{kind.__qualname__}"


@contextlib.contextmanager
def count_usage(path: str | Path | None = None) -> Iterator[Usage]:
    """Within it, every eager call of this task is counted by kind of bias; then the counts are added to `path`, if any.

    Raises what `Usage.save` raises, at the end.
    """
    from .scope import current, scope_for  # which knows who records

    usage = Usage()
    outer = current.get()
    token = current.set(scope_for(outer.settings, outer.recorders, (*outer.usages, usage)))
    try:
        yield usage
    finally:
        current.reset(token)
        if path is not None:
            usage.save(path)


def merge_into(path: Path, counts: Counts) -> None:
    """Adds `counts` to the file, under a lock beside it: several processes may end at once."""
    with _locked(path.with_name(path.name + ".lock")):
        total = _read(path)
        for door, kinds in counts.items():
            of_door = total.setdefault(door, {})
            for kind, calls in kinds.items():
                of_door[kind] = of_door.get(kind, 0) + calls
        handle, name = tempfile.mkstemp(dir=path.parent or ".", prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(total, file, indent=1)
                file.write("\n")
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def _read(path: Path) -> Counts:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = all(isinstance(n, int) for kinds in found.values() for n in kinds.values())
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path}: does not hold counts by door and kind of bias; give another file")
    return found  # type: ignore[no-any-return]


def is_file_of_counts(path: Path) -> bool:
    """Whether counts are kept in it, and nothing else."""
    try:
        return bool(_read(path))
    except (InputError, OSError):
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a+b") as file:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing gives it back


# ATTN_USAGE: one count for the whole process

_of_process: dict[str, Usage] = {}


def usage_of_process(path: str) -> Usage:
    """The count that is added to `path` when this process ends."""
    if path not in _of_process:
        usage = _of_process[path] = Usage()
        atexit.register(_save_at_exit, path)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=usage.forget)  # else a child would add its parent's calls, too
    return _of_process[path]


def _save_at_exit(path: str) -> None:
    usage = _of_process[path]
    if usage.to_dict():
        try:
            usage.save(path)
        except (InputError, OSError) as error:
            warnings.warn(f"ATTN_USAGE: nothing was counted: {error}", RuntimeWarning, stacklevel=1)
