"""`attn bench-model`: a model is run in every way, compared with eager and timed; what cannot run has its reason."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib.util import find_spec

import pytest
import torch
from attn_core import Capabilities, Causal, Kernel, UnknownKernelError, register
from attn_core.bench_model import BuiltModel, bench_model
from attn_core.bench_model.bench import chosen_kernels
from attn_core.bench_model.memory import peak_bytes
from attn_core.bench_model.results import AGAIN, ATTN, EAGER, FORWARD, STOCK, TRAIN, Difference, Measured, Row
from attn_core.bench_model.steps import Outcome, gradient_difference, outcome, output_difference, prepare, step_of
from attn_core.bench_model.ways import way
from attn_core.cli import main
from attn_core.cli.bench_model import in_short
from attn_core.integrations.hosts import HOSTS
from click.testing import CliRunner
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'attn-core[demo]'"
)
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="pip install 'attn-core[show]'")

SEED = 20261121
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = ["llama", *(word for name, value in TINY.items() for word in ("--set", f"{name}={value}")), "--seqlen", "16"]
CPU = torch.device("cpu")


@pytest.fixture
def llama():
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(**TINY, attention_dropout=0.5)
    model = transformers.AutoModel.from_config(config).eval()
    return BuiltModel(
        name="tiny", host="transformers", model=model, inputs={"input_ids": torch.randint(0, 50, (2, 16))}
    )


@pytest.fixture(autouse=True)
def as_it_came():
    yield
    assert not any(host.enabled for host in HOSTS.values())


def made(name, run):
    """A kernel for causal problems, of that function."""
    capabilities = Capabilities(
        devices={"cpu"}, dtypes={torch.float32}, head_dims=range(1, 257), biases={Causal}, backward=True
    )
    return register(Kernel(name=name, run=run, capabilities=capabilities))


def twice(query, key, value, *, bias=None, scale):
    """Causal attention, and then the double of it."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return 2 * scaled_dot_product_attention(*heads_first, is_causal=bias is not None, scale=scale).transpose(1, 2)


def broken(query, key, value, *, bias=None, scale):
    raise RuntimeError("the launch failed")


def attn(*arguments, exit_code=0):
    result = CliRunner().invoke(main, ["bench-model", *arguments])
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    return result.output


# What is measured


def test_every_way_is_compared_with_eager_and_timed_by_stock(llama):
    measured = bench_model(llama, kernels=("torch/math",), rounds=2, memory=False)
    assert [row.by for row in measured.rows if row.step == TRAIN] == [EAGER, STOCK, ATTN, "torch/math", AGAIN]
    for row in measured.rows:
        assert row.state == "ran", row
        assert len(row.seconds) == 2
        assert row.seconds_median > 0
        assert row.of_stock > 0
        assert row.peak_bytes is None
        if row.by != AGAIN:
            assert row.outputs.value < 1e-5 < row.outputs.largest
            assert (row.gradients is None) == (row.step == FORWARD)
            assert row.gradients is None or row.gradients.value < 1e-4 < row.gradients.largest
    for step in (FORWARD, TRAIN):
        assert measured.row(STOCK, step).of_stock == 1.0
        assert measured.row(EAGER, step).outputs.value == 0.0  # a second run is the first, bit for bit
        assert measured.row("torch/math", step).calls == {"torch/math": 2}
        assert measured.row(STOCK, step).calls == {}
    assert measured.memory == "not measured: it was not asked for"


def test_a_kernel_that_does_not_take_the_calls_is_a_row_with_its_reasons(llama):
    measured = bench_model(llama, kernels=("torch/flex", "torch/cudnn"), steps=[TRAIN], rounds=1, memory=False)
    flex = measured.row("torch/flex", TRAIN)
    assert flex.state == "refused"
    assert in_short(flex.reason) == "backward: has no backward, and a gradient is needed"
    assert flex.seconds == []
    assert flex.outputs is None
    cudnn = measured.row("torch/cudnn", TRAIN)
    assert cudnn.state in ("unavailable", "refused")
    assert cudnn.reason
    assert measured.row(STOCK, TRAIN).of_stock == 1.0


def test_a_kernel_that_is_wrong_is_told_by_its_differences(llama):
    with made("test/twice", twice):
        measured = bench_model(llama, kernels=("test/twice", "torch/math"), rounds=0, memory=False)
    for step in (FORWARD, TRAIN):
        assert measured.row("test/twice", step).calls == {"test/twice": 2}
        assert measured.row("test/twice", step).outputs.value > 1e-2
        assert measured.row("torch/math", step).outputs.value < 1e-5
    assert measured.row("test/twice", TRAIN).gradients.value > 1e-2
    assert measured.row("test/twice").seconds_median is None  # no round, no time


def test_a_kernel_that_raises_costs_its_row_alone(llama):
    with made("test/broken", broken):
        measured = bench_model(llama, kernels=("test/broken", "torch/math"), steps=[FORWARD], rounds=1, memory=False)
    assert measured.row("test/broken").state == "failed"
    assert "the launch failed" in measured.row("test/broken").reason
    assert measured.row("torch/math").of_stock > 0


def test_a_model_that_cannot_be_run_at_all_is_an_error(llama):
    odd = BuiltModel(name="odd", host="transformers", model=llama.model, inputs={"input_ids": torch.tensor([[99]])})
    with pytest.raises(ValueError, match=r"odd cannot be run on input_ids \[1, 1\]: IndexError"):
        bench_model(odd, kernels=("torch/math",), rounds=0, memory=False)


def test_progress_goes_from_nothing_to_all(llama):
    told = []
    bench_model(
        llama, kernels=("torch/math",), rounds=1, memory=False, tell=lambda what, share: told.append((what, share))
    )
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert any("train: round 1 of 1, torch/math" in what for what, _ in told)


def test_kernels_by_default_are_those_of_the_device_without_the_oracle():
    names = [kernel.name for kernel in chosen_kernels((), CPU)]
    assert "torch/math" in names
    assert not {"torch/reference", "torch/cudnn", "torch/efficient"} & set(names)
    assert [kernel.name for kernel in chosen_kernels(("torch/ref*",), CPU)] == ["torch/reference"]
    with pytest.raises(UnknownKernelError, match="torch/flash"):
        chosen_kernels(("torch/flas",), CPU)


# Steps


def test_memory_is_the_most_that_was_held_at_once():
    def step():
        first = torch.ones(1_000_000)
        second = first * 2
        del first
        return second[:1000].clone()

    assert peak_bytes(step, CPU) == pytest.approx(2 * 4_000_000, rel=1e-3)
    assert peak_bytes(step, torch.device("meta")) is None


def test_a_prepared_model_has_no_chance_in_it_and_nothing_hides_behind_a_scale_of_nothing(llama):
    prepare(llama.model)
    first, second = (outcome(llama, step_of(llama, TRAIN)) for _ in range(2))
    assert all(map(torch.equal, first.outputs, second.outputs))
    assert first.gradients.keys() == dict(llama.model.named_parameters()).keys()
    assert llama.model.layers[0].self_attn.attention_dropout == 0.0
    assert llama.model.config.use_cache is False

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.gamma = nn.Parameter(torch.zeros(9)), nn.Parameter(torch.full((4,), 1e-5))
            self.norm = nn.LayerNorm(4)
            self.drop_prob = 0.3

    scaled = Scaled()
    prepare(scaled)
    assert 0 < scaled.table.detach().abs().max() < 0.2
    assert scaled.gamma.tolist() == [0.5] * 4
    assert scaled.norm.weight.tolist() == [1.0] * 4
    assert scaled.drop_prob == 0.0


def test_the_difference_of_gradients_names_the_parameter():
    eager = Outcome(outputs=[torch.tensor([1.0, -4.0])], gradients={"a": torch.zeros(2), "b": torch.tensor([8.0])})
    ours = Outcome(
        outputs=[torch.tensor([1.0, -4.5])], gradients={"a": torch.tensor([0.0, 0.25]), "b": torch.tensor([8.125])}
    )
    assert output_difference(ours, eager) == Difference(value=0.5, largest=4.0)
    assert gradient_difference(ours, eager) == Difference(value=0.25, largest=8.0, where="a")
    assert output_difference(Outcome(outputs=[], gradients={}), eager).value == math.inf


def test_what_is_not_a_number_is_said_also_in_json():
    eager = Outcome(outputs=[torch.ones(2)], gradients={})
    ours = Outcome(outputs=[torch.tensor([1.0, math.nan])], gradients={})
    found = output_difference(ours, eager)
    assert math.isnan(found.value)
    row = Row(by="x", step=FORWARD, outputs=found)
    data = Measured(
        model="m", host="timm", host_version="1", inputs="", parameters=0, dtype="", device="", seed=0, rows=[row]
    ).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False))["rows"][0]["outputs"]["value"] == "nan"


# Ways


def test_eager_is_the_librarys_own_and_leaves_the_model_as_it_was(llama):
    with way(EAGER, llama):
        assert llama.model.config._attn_implementation == "eager"
    assert llama.model.config._attn_implementation == "sdpa"

    class Block(nn.Module):
        fused_attn = True

    plain, unfused = Block(), Block()
    unfused.fused_attn = False
    model = nn.Sequential(plain, unfused, nn.Linear(1, 1))
    with way(EAGER, BuiltModel(name="m", host="timm", model=model, inputs={})):
        assert (plain.fused_attn, unfused.fused_attn) == (False, False)
    assert (plain.fused_attn, unfused.fused_attn) == (True, False)


@pytest.mark.parametrize("by", [EAGER, STOCK, ATTN, "torch/math"])
def test_a_way_that_is_interrupted_leaves_nothing_enabled(llama, by):
    with pytest.raises(KeyboardInterrupt), way(by, llama):
        raise KeyboardInterrupt
    assert not any(host.enabled for host in HOSTS.values())
    assert llama.model.config._attn_implementation == "sdpa"


# The command


@needs_matplotlib
def test_the_command_prints_tables_and_writes_json_and_a_picture(tmp_path):
    figures, picture = tmp_path / "llama.json", tmp_path / "llama.png"
    kernels = ["--kernel", "torch/math", "--kernel", "torch/flex"]
    printed = attn(*LLAMA, *kernels, "--rounds", "1", "--train", "--json", str(figures), "--plot", str(picture))
    for words in ("llama of transformers", "torch/math x2", "refused: backward: has no backward", "written to"):
        assert words in printed
    data = json.loads(figures.read_text())
    assert data["format"] == 1
    rows = {row["by"]: row for row in data["models"][0]["rows"]}
    assert rows.keys() == {EAGER, STOCK, ATTN, "torch/math", "torch/flex", AGAIN}
    assert {row["step"] for row in rows.values()} == {TRAIN}
    assert rows["torch/math"]["peak_bytes"] > 0
    assert rows["torch/math"]["gradients"]["value"] < 1e-4
    assert rows["torch/flex"]["state"] == "refused"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [figures, picture]


def test_json_alone_is_for_programs():
    printed = attn(*LLAMA, "--kernel", "torch/math", "--rounds", "0", "--forward", "--no-memory", "--json", "-")
    data = json.loads(printed[printed.index("{") :])
    assert [row["by"] for row in data["models"][0]["rows"]] == [EAGER, STOCK, ATTN, "torch/math"]


# Bad input


def test_a_model_that_cannot_be_run_costs_no_figures_of_the_others(tmp_path):
    figures = tmp_path / "figures.json"
    settings = [word for name, value in TINY.items() if "key" not in name for word in ("--set", f"{name}={value}")]
    short = [*settings, "--set", "max_position_embeddings=8", "--seqlen", "16"]  # which llama has no table of
    quick = ["--kernel", "torch/math", "--rounds", "0", "--forward", "--no-memory", "--json", str(figures)]
    printed = attn("llama", "bert", *short, *quick, exit_code=2)
    assert "bert cannot be run on input_ids [1, 16]" in printed
    assert "torch/math x2" in printed
    assert [each["model"] for each in json.loads(figures.read_text())["models"]] == ["llama"]
    figures.unlink()
    attn("bert", *short, *quick, exit_code=2)
    assert not figures.exists()


def test_a_setting_that_the_model_does_not_know_is_no_setting():
    assert "'num_hidden_layers'" in attn("llama", "--set", "num_hiden_layers=1", exit_code=2)


@pytest.fixture
def nothing_is_built(monkeypatch):
    def built(*_):
        raise AssertionError("what was asked is wrong, and should have been said before anything is built")

    monkeypatch.setattr("attn_core.cli.report_models.build", built)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["lama"], "'llama'", id="unknown model"),
        pytest.param([*LLAMA, "lama"], "'llama'", id="unknown second model"),
        pytest.param(["llama", "--kernel", "torch/flas"], "'torch/flash'", id="unknown kernel"),
        pytest.param(["llama", "--device", "cudda"], "--device cudda", id="unknown device"),
        pytest.param(["llama", "--device", "meta"], "nothing runs there", id="device that runs nothing"),
        pytest.param(["llama", "--set", "layers"], "NAME=VALUE", id="setting without a value"),
        pytest.param(["llama", "--dtype", "float7"], "--dtype", id="unknown dtype"),
        pytest.param(["llama", "--json", "no/such/figures.json"], "there is no folder 'no/such'", id="json"),
        pytest.param(["llama", "--plot", "figure.svg"], "writes a .png", id="picture", marks=needs_matplotlib),
        pytest.param([], "MODEL", id="no model"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_built(arguments, said):
    assert said in attn(*arguments, exit_code=2)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_that_cannot_be_written_is_said_before_anything_is_built(tmp_path):
    file = tmp_path / "figures.json"
    file.touch()
    file.chmod(0o400)
    assert "cannot be written" in attn("llama", "--json", str(file), exit_code=2)


@pytest.mark.usefixtures("nothing_is_built")
def test_without_matplotlib_the_line_to_type_is_said_before_anything_is_built(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "attn-core[show]"' in attn("llama", "--plot", str(tmp_path / "figure.png"), exit_code=2)


@pytest.mark.usefixtures("nothing_is_built")
def test_without_the_library_of_a_model_the_line_to_type_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert 'pip install "timm' in attn("vit_base_patch16_224", exit_code=2)
