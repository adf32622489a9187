"""`attn cache`: lists what attn wrote on this machine, and removes that and nothing else."""

import json

import pytest
import torch
from attn_core import Causal, attention, count_usage, refresh
from attn_core.cli import main
from attn_core.cost import Cost
from attn_core.costs_file import Calibration, device_name, write_costs
from attn_core.environment import path_of_costs, read_environment
from click.testing import CliRunner

X = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's cache of its own, and no ATTN_* variable."""
    for name in ("ATTN_COSTS", "ATTN_USAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    monkeypatch.undo()
    refresh()


def attn(*arguments, exit_code=0, answer=None):
    result = CliRunner().invoke(main, ["cache", *arguments], input=answer)
    assert result.exit_code == exit_code, result.output
    return result.stdout


def measured():
    """The file that `attn calibrate` would write here."""
    path = path_of_costs(read_environment())
    costs = {"torch/math": Cost(call=1e-6)}
    write_costs(path, Calibration(device="cpu", name=device_name(), torch=torch.__version__, threads=1, costs=costs))
    return path


def counted(path):
    with count_usage(path):
        attention(X, X, X, Causal())
    return path


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_where_nothing_was_written_it_says_so_and_clear_asks_nothing(home):
    assert "attn has written nothing" in attn()
    assert "removed 0 files" in attn("clear")
    assert json.loads(attn("--json")) == []


def test_it_lists_the_measured_costs_with_their_size_and_clears_them_and_their_folder(home):
    path = measured()
    assert str(path) in attn("show")
    [row] = json.loads(attn("--json"))
    size = path.stat().st_size
    assert row == {"file": str(path), "kind": "measured costs", "bytes": size, "ours": True}
    assert "removed 1 file" in attn("clear", "--yes")
    assert files(home) == []
    assert path.parent.parent.is_dir()  # the user's cache itself
    assert not path.parent.exists()


def test_it_lists_and_clears_the_counts_with_what_was_left_over(home, monkeypatch):
    path = counted(home / "usage.json")
    (home / "usage.jsonab12_xyz.tmp").write_text("{")
    monkeypatch.setenv("ATTN_USAGE", str(path))
    kinds = {row["file"].rpartition("/")[2]: row["kind"] for row in json.loads(attn("--json"))}
    assert kinds == {
        "usage.json": "counts of calls",
        "usage.json.lock": "left over",
        "usage.jsonab12_xyz.tmp": "left over",
    }
    assert "removed 3 files" in attn("clear", "--yes")
    assert files(home) == []


def test_an_interrupted_write_of_costs_is_cleared(home):
    path = measured()
    path.with_name(".costs.json.ab12_xyz").write_text("{")
    assert len(json.loads(attn("--json"))) == 2
    attn("clear", "--yes")
    assert files(home) == []


def test_files_of_others_beside_them_stay_and_so_does_the_folder(home):
    path = measured()
    kept = ["costs.json.bak", ".costs.json.swp", "notes.txt", "mine.tmp"]
    for name in kept:
        path.with_name(name).write_text("mine")
    attn("clear", "--yes")
    assert [name.rpartition("/")[2] for name in files(home)] == sorted(kept)


@pytest.mark.parametrize("variable", ["ATTN_COSTS", "ATTN_USAGE"])
@pytest.mark.parametrize("content", ["", "my diary", '{"mine": 1}', "[]", '{"a": {"b": "c"}}'])
def test_a_file_that_a_variable_names_and_attn_did_not_write_stays(home, monkeypatch, variable, content):
    path = home / "file.json"
    path.write_text(content)
    monkeypatch.setenv(variable, str(path))
    [row] = json.loads(attn("--json"))
    assert row["ours"] is False
    assert "it stays" in attn()
    assert "removed 0 files" in attn("clear", "--yes")
    assert path.read_text() == content


@pytest.mark.parametrize("answer", ["n\n", "\n", ""], ids=["no", "enter", "nobody there"])
def test_without_yes_it_asks_and_removes_nothing_unless_told(home, answer):
    path = measured()
    attn("clear", exit_code=1, answer=answer)
    assert path.exists()


def test_told_yes_it_removes(home):
    path = measured()
    attn("clear", answer="y\n")
    assert not path.exists()


def test_costs_of_another_torch_are_attns_too(home):
    path = measured()
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    attn("clear", "--yes")
    assert not path.exists()


def test_a_file_that_cannot_be_removed_is_a_message(home, monkeypatch):
    measured()

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    result = CliRunner().invoke(main, ["cache", "clear", "--yes"])
    assert result.exit_code == 2
    assert "cannot be removed: [Errno 13] Permission denied" in result.stderr
