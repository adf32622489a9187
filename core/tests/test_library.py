"""A library that kernels come from: absent, of another release, in want of a package, broken; imported late, once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from attn_core import BrokenLibraryError, Library, Unusable
from attn_core.testing import fake_distribution, importable

INSTALL, REBUILD = "pip install 'attn-hello[fastlib]'", "pip install --force-reinstall fastlib"


def library(**changes) -> Library:
    given = {
        "name": "FastLib",
        "distribution": "fastlib",
        "supported": ">=1.2,<2",
        "modules": ("fastlib.attention",),
        "install": INSTALL,
    }
    return Library(**(given | changes))


@contextmanager
def installed(
    folder: Path, source: str = "", version: str | None = "1.2.3", module: str = "fastlib/attention.py", init: str = ""
) -> Iterator[None]:
    """Within it, a fastlib is installed whose module is `source`."""
    path = folder / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    (folder / "fastlib").mkdir(exist_ok=True)
    (folder / "fastlib" / "__init__.py").write_text(init, encoding="utf-8")
    if version is not None:
        fake_distribution(folder, "fastlib", version, {}, {}, ())
    with importable(folder):
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastlib"]:
        del sys.modules[name]


def test_a_library_that_is_whole_is_usable_and_its_module_is_given(tmp_path):
    one = library()
    with installed(tmp_path, "answer = 42"):
        assert one.unusable() is None
        assert one.module().answer == 42
        assert (one.installed(), str(one)) == ("1.2.3", "fastlib 1.2.3")


def test_nothing_is_imported_before_it_is_asked_for(tmp_path):
    one = library()
    with installed(tmp_path, "raise SystemExit('it was imported')", init="raise SystemExit('it was imported')"):
        assert (one.located(), one.unfit(), one.installed()) == ("fastlib.attention", None, "1.2.3")
        assert not one.is_imported()


def test_it_is_imported_once_and_again_after_it_was_forgotten(tmp_path):
    one, tries = library(), tmp_path / "tries"
    with installed(tmp_path, f"open({str(tries)!r}, 'a').write('+')\nraise OSError('libcudart.so.12')"):
        for _ in range(2):
            with pytest.raises(BrokenLibraryError):
                one.unusable()
        assert tries.read_text() == "+"
        one.forget()
        (tmp_path / "fastlib" / "attention.py").write_text("answer = 'a whole one'", encoding="utf-8")
        assert one.unusable() is None
        assert one.is_imported()


def test_one_that_is_not_installed_is_absent_with_the_line_to_type():
    assert library(modules=("a_library_that_nobody_has",)).unusable() == Unusable(
        "absent", "FastLib is not installed", INSTALL
    )


def test_a_folder_that_other_packages_share_is_not_the_library(tmp_path):
    (tmp_path / "fastlib" / "ops").mkdir(parents=True)
    with importable(tmp_path):
        found = library().unusable()
    assert found.state == "absent"
    assert found.reason == (
        "FastLib is not installed: fastlib is there (a namespace of other packages), without fastlib.attention"
    )


@pytest.mark.parametrize(
    ("told_by_distribution", "state"), [(True, "absent"), (False, None)], ids=["counts", "does not count"]
)
def test_a_module_without_its_distribution(tmp_path, told_by_distribution, state):
    one = library(told_by_distribution=told_by_distribution)
    with installed(tmp_path, version=None):
        found = one.unusable()
        assert str(one) == "FastLib (of unknown version)"
    assert (found and found.state) == state
    assert found is None or "this fastlib.attention came without fastlib" in found.reason


@pytest.mark.parametrize("version", ["1.1", "2.0", "2.0rc1", "not a version"])
def test_another_release_is_named_with_the_range_and_never_imported(tmp_path, version):
    with installed(tmp_path, "raise SystemExit('it was imported')", version=version):
        found = library().unusable()
    assert found == Unusable(
        "unavailable", f"fastlib {version} is installed; this plugin speaks to fastlib>=1.2,<2", INSTALL
    )


def test_a_version_that_the_module_tells_is_believed_rather_than_the_distribution(tmp_path):
    one = library(version_in="fastlib")
    with installed(tmp_path, init="__version__ = '1.0'"):
        assert one.installed() == "1.2.3"
        assert one.unusable().reason == "fastlib 1.0 is installed; this plugin speaks to fastlib>=1.2,<2"
        assert one.is_older("1.2")


@pytest.mark.parametrize("than", ["1.2.3", "1.2.4.dev1", "1.10"])
def test_whether_it_is_older(tmp_path, than):
    with installed(tmp_path):
        assert library().is_older(than) is (than != "1.2.3")
    assert not library().is_older(than)  # not installed: nothing is known


@pytest.mark.parametrize("raised", ["OSError('libcudart.so.12: cannot open')", "SystemExit(1)", "ImportError('x')"])
def test_one_whose_import_raises_is_broken_with_the_cause_and_the_advice(tmp_path, raised):
    one = library(rebuild=REBUILD)
    with installed(tmp_path, f"raise {raised}"), pytest.raises(BrokenLibraryError) as error:
        one.unusable()
    kind, _, text = raised.partition("(")
    cause = text[:-1].strip("'")
    assert str(error.value) == (
        f"importing fastlib 1.2.3 beside torch {torch.__version__} raises {kind}: {cause}; "
        f"where it was built for another torch: {REBUILD}"
    )
    assert type(error.value.__cause__).__name__ == kind
    assert isinstance(error.value, ImportError)


def test_one_that_wants_another_package_is_absent_and_names_it(tmp_path):
    with installed(tmp_path, "import a_package_that_nobody_has.part"):
        found = library().unusable()
    assert found == Unusable("absent", "fastlib 1.2.3 needs a_package_that_nobody_has, which is not installed", INSTALL)


def test_one_that_wants_a_part_of_itself_is_broken(tmp_path):
    with installed(tmp_path, "import fastlib.gone"), pytest.raises(BrokenLibraryError, match=r"'fastlib\.gone'"):
        library().unusable()


@pytest.mark.parametrize(
    ("function", "parameter", "answer"), [("run", "causal", True), ("run", "window", False), ("walk", "causal", False)]
)
def test_whether_a_function_takes_a_parameter(tmp_path, function, parameter, answer):
    with installed(tmp_path, "def run(query, *, causal): ..."):
        assert library().takes(function, parameter) is answer


def test_what_is_asked_of_it_in_a_graph_is_a_constant_there(tmp_path):
    one = library()

    @torch.compile(fullgraph=True, backend="eager")
    def choose(x):
        return x + 1 if one.is_older("1.3") and one.takes("run", "causal") and one.installed() == "1.2.3" else x

    with installed(tmp_path, "def run(query, *, causal): ..."):
        assert choose(torch.zeros(1)) == 1


def test_two_libraries_do_not_share_what_was_found(tmp_path):
    with installed(tmp_path):
        one, other = library(), library(name="SlowLib", modules=("fastlib.gone", "fastlib.attention"))
        assert one.unusable() is None
        assert not other.is_imported()
        assert other.located() == "fastlib.attention"
