"""Compiled kernels on disk, so that a kernel is compiled once and not once for each process.

A cubin is code that will run, so the folder must be the user's own and closed to everybody else, or it is not used. A
file is written aside and renamed, so that nobody reads half of one and two processes that write the same do no harm. It
begins with its own hash: a file that was cut off or changed is not there. Nothing here fails a call: without the folder
kernels are compiled anew, and a warning says why.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import time
import warnings
from pathlib import Path

from .errors import CacheWarning

#: The folder; empty: none is used. By default `attn/cuda-ref` in the user's folder of caches.
FOLDER = "CUDA_REF_CACHE"
#: Bytes that all files may have together; the ones that were not read for longest go first.
LIMIT = 256 << 20
SUFFIX = ".cubin"
#: Of a file that is being written; nobody writes one for that many seconds.
ASIDE, ABANDONED = ".part", 3600
MAGIC = b"attn-cuda-ref 1\n"


def default_folder() -> Path | None:
    """What `CUDA_REF_CACHE` says, or a folder in `XDG_CACHE_HOME` or ~/.cache; None where none is wanted."""
    said = os.environ.get(FOLDER)
    if said is not None:
        return Path(os.path.expanduser(said)) if said else None  # which leaves what is nobody's home as it is
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(caches or Path.home() / ".cache") / "attn" / "cuda-ref"
    except RuntimeError:  # no home
        return None


class Cache:
    """Cubins by their key, a hex string."""

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        self._said: set[str] = set()

    def get(self, key: str) -> bytes | None:
        """The cubin; None where there is none, or none that is whole."""
        if self.folder is None:
            return None
        path = self.folder / (key + SUFFIX)
        try:
            if not self._is_trusted():
                return None
            with path.open("rb") as file:
                owner, content = os.fstat(file.fileno()).st_uid, file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._say(f"{path} cannot be read: {error.strerror or error}")
            return None
        if not self._is_own(path, owner):  # of a time when the folder was open
            return None
        cubin = _whole(content)
        if cubin is not None:
            _touch(path)
        return cubin

    def put(self, key: str, cubin: bytes) -> None:
        """Keeps it, where that is possible."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_trusted():
                return
            self._write(key, MAGIC + hashlib.sha256(cubin).digest() + cubin)
            self._shrink()
        except OSError as error:
            self._say(f"{self.folder} cannot be written to: {error.strerror or error}")

    def _write(self, key: str, content: bytes) -> None:
        assert self.folder is not None
        handle, aside = tempfile.mkstemp(dir=self.folder, prefix=f"{key}.", suffix=ASIDE)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(aside, self.folder / (key + SUFFIX))
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise

    def _shrink(self) -> None:
        """Removes files until the rest is within the limit, those first that were not read for longest.

        So goes what a process left aside that was ended while it wrote.
        """
        assert self.folder is not None
        for path in self.folder.glob(f"*{ASIDE}"):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
            except FileNotFoundError:  # it is written to its end
                continue
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in found) - self.limit
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _is_trusted(self) -> bool:
        """Whether it is a folder, this user's and closed to others; where it is not, a warning says so.

        Raises OSError where there is none, or none that can be reached.
        """
        assert self.folder is not None
        status = self.folder.stat()
        if not stat.S_ISDIR(status.st_mode):
            self._say(f"{self.folder} is a file, not a folder")
            return False
        if not self._is_own(self.folder, status.st_uid):
            return False
        mode = stat.S_IMODE(status.st_mode)
        if hasattr(os, "getuid") and mode & 0o077:
            self._say(f"{self.folder} is open to others (mode {mode:o}); close it: chmod 700 {self.folder}")
            return False
        return True

    def _is_own(self, path: Path, owner: int) -> bool:
        """Whether a file or folder with this owner is this user's; always where there are no owners."""
        if not hasattr(os, "getuid") or owner == os.getuid():
            return True
        self._say(f"{path} belongs to user {owner}, and you are {os.getuid()}")
        return False

    def _say(self, reason: str) -> None:
        if reason in self._said:
            return
        self._said.add(reason)
        text = f"cuda-ref: compiled kernels are not kept: {reason}. {FOLDER} names another folder, or none"
        warnings.warn(text, CacheWarning, stacklevel=2)


def _whole(content: bytes) -> bytes | None:
    """The cubin of a file's content; None where it is not what was written."""
    start = len(MAGIC)
    digest, cubin = content[start : start + 32], content[start + 32 :]
    return cubin if content[:start] == MAGIC and hashlib.sha256(cubin).digest() == digest else None


def _touch(path: Path) -> None:
    """Notes that a file was read."""
    try:
        os.utime(path)
    except OSError:  # of a read-only folder
        return
