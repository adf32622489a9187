"""The folder of compiled kernels: what it keeps, what it trusts, and that nothing wrong with it fails a call."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from attn_cuda_ref.cache import ABANDONED, FOLDER, SUFFIX, Cache, default_folder
from attn_cuda_ref.errors import CacheWarning

CUBIN = b"\x7fELF" + bytes(range(256)) * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kernels"


def test_what_was_kept_is_found_by_another_process_s_cache(folder: Path) -> None:
    Cache(folder).put("k", CUBIN)
    assert Cache(folder).get("k") == CUBIN
    assert Cache(folder).get("another") is None


def test_the_folder_is_made_for_its_owner_alone(folder: Path) -> None:
    Cache(folder).put("k", CUBIN)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_no_file_is_left_aside(folder: Path) -> None:
    Cache(folder).put("k", CUBIN)
    assert [path.name for path in folder.iterdir()] == [f"k{SUFFIX}"]


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="cut off"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-1] + bytes([content[-1] ^ 1]), id="one bit changed"),
        pytest.param(lambda content: CUBIN, id="a cubin without the hash"),
    ],
)
def test_a_corrupt_entry_is_not_there_and_is_written_anew(folder: Path, damaged: object) -> None:
    cache = Cache(folder)
    cache.put("k", CUBIN)
    path = folder / f"k{SUFFIX}"
    path.write_bytes(damaged(path.read_bytes()))  # type: ignore[operator]
    assert cache.get("k") is None
    cache.put("k", CUBIN)
    assert cache.get("k") == CUBIN


def test_a_folder_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(folder).put("k", CUBIN)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.warns(CacheWarning, match=f"belongs to user {folder.stat().st_uid}.*{FOLDER}"):
        assert Cache(folder).get("k") is None


def test_a_file_of_another_user_in_one_s_own_folder_is_not_read_and_is_written_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, status = Cache(folder), os.fstat
    cache.put("k", CUBIN)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", lambda file: SimpleNamespace(st_uid=status(file).st_uid + 1))
        with pytest.warns(CacheWarning, match=f"k{SUFFIX} belongs to user {os.getuid() + 1}"):
            assert cache.get("k") is None
    before = (folder / f"k{SUFFIX}").stat().st_ino
    cache.put("k", CUBIN)
    assert (folder / f"k{SUFFIX}").stat().st_ino != before
    assert cache.get("k") == CUBIN


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701], ids=oct)
def test_a_folder_that_is_open_to_others_is_neither_read_nor_written(folder: Path, mode: int) -> None:
    Cache(folder).put("k", CUBIN)
    folder.chmod(mode)
    cache = Cache(folder)
    with pytest.warns(CacheWarning, match=f"open to others .mode {mode:o}.; close it: chmod 700"):
        assert cache.get("k") is None
    cache.put("other", CUBIN)
    assert not (folder / f"other{SUFFIX}").exists()


def test_a_folder_that_cannot_be_made_costs_a_warning_and_is_said_once() -> None:
    cache = Cache(Path("/proc/attn/kernels"))  # nobody can make one there, not even root
    with pytest.warns(CacheWarning, match="cannot be written to"):
        cache.put("k", CUBIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put("k", CUBIN)
        assert cache.get("k") is None


def test_a_file_in_place_of_the_folder_costs_a_warning_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "kernels"
    file.write_text("mine")
    with pytest.warns(CacheWarning, match="kernels is a file, not a folder"):
        assert Cache(file).get("k") is None
    for folder in (file, file / "deeper"):
        with pytest.warns(CacheWarning, match="cannot be written to"):
            Cache(folder).put("k", CUBIN)
    assert file.read_text() == "mine"


def test_a_folder_that_cannot_be_reached_costs_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(folder).put("k", CUBIN)
    of_all = Path.stat

    def reached(path: Path, **options: bool) -> os.stat_result:
        if path == folder:
            raise PermissionError(13, "Permission denied")
        return of_all(path, **options)

    monkeypatch.setattr(Path, "stat", reached)
    cache = Cache(folder)
    with pytest.warns(CacheWarning, match="cannot be read: Permission denied"):
        assert cache.get("k") is None
    with pytest.warns(CacheWarning, match="cannot be written to: Permission denied"):
        cache.put("other", CUBIN)


@pytest.mark.skipif(os.getuid() == 0, reason="root writes into every folder")
def test_a_read_only_folder_is_read_and_not_written(folder: Path) -> None:
    Cache(folder).put("k", CUBIN)
    folder.chmod(0o500)
    cache = Cache(folder)
    assert cache.get("k") == CUBIN
    with pytest.warns(CacheWarning, match="cannot be written to"):
        cache.put("other", CUBIN)


def test_a_folder_on_a_read_only_disk_is_read_and_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(folder).put("k", CUBIN)

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    monkeypatch.setattr(os, "utime", refused)
    cache = Cache(folder)
    assert cache.get("k") == CUBIN
    with pytest.warns(CacheWarning, match="Read-only file system"):
        cache.put("other", CUBIN)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_a_full_disk_costs_a_warning_and_leaves_nothing_half_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.mkstemp

    def on_a_full_disk(**options: object) -> tuple[int, str]:
        handle, name = made(**options)  # type: ignore[call-overload]
        os.close(handle)
        return os.open("/dev/full", os.O_WRONLY), name

    monkeypatch.setattr(tempfile, "mkstemp", on_a_full_disk)
    cache = Cache(folder)
    with pytest.warns(CacheWarning, match="No space left on device"):
        cache.put("k", CUBIN)
    assert list(folder.iterdir()) == []
    assert cache.get("k") is None


def test_beyond_the_limit_the_files_go_that_were_not_read_for_longest(folder: Path) -> None:
    cache = Cache(folder, limit=3 * (len(CUBIN) + 64))
    for place, key in enumerate("abc"):
        cache.put(key, CUBIN)
        os.utime(folder / f"{key}{SUFFIX}", (1000 + place, 1000 + place))
    assert cache.get("a") == CUBIN  # now it was read last
    cache.put("d", CUBIN)
    assert {path.stem for path in folder.iterdir()} == {"a", "c", "d"}


def test_what_a_process_left_half_written_goes_when_it_is_old(folder: Path) -> None:
    cache = Cache(folder)
    cache.put("a", CUBIN)
    for name, age in (("new.part", 5), ("old.part", 2 * ABANDONED)):
        (folder / name).write_bytes(CUBIN)
        os.utime(folder / name, (time.time() - age,) * 2)
    cache.put("b", CUBIN)
    assert {path.name for path in folder.iterdir()} == {f"a{SUFFIX}", f"b{SUFFIX}", "new.part"}


WRITER = """
import sys
from pathlib import Path
from attn_cuda_ref.cache import Cache
cache, cubin = Cache(Path(sys.argv[1])), b"\\x7fELF" + bytes(range(256)) * 400
for _ in range(200):
    cache.put("k", cubin)
    assert cache.get("k") == cubin, "a file that is half written was read"
"""


def test_two_processes_that_write_the_same_key_never_read_half_of_it(folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(folder)]
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=100)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [path.name for path in folder.iterdir()] == [f"k{SUFFIX}"]


def test_the_folder_can_be_named_or_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "named"))
    assert default_folder() == tmp_path / "named"
    monkeypatch.setenv(FOLDER, "")
    assert default_folder() is None
    Cache(None).put("k", CUBIN)
    assert Cache(None).get("k") is None
    monkeypatch.setenv(FOLDER, "~nobody-of-this-name/kernels")
    assert default_folder() == Path("~nobody-of-this-name/kernels")
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "attn" / "cuda-ref"
