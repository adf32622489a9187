"""`attn_core.integrations.flex`: for those who call FlexAttention themselves, every bias in its forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attn_core import (
    ALiBi,
    BlockMask,
    Causal,
    InputError,
    InputTypeError,
    KeyPadding,
    Neighborhood,
    RelPosTable,
    Segments,
    TensorBias,
    UnboundBiasError,
    Window,
    attention,
    explain,
    explain_problem,
    mask_mod,
    reference_attention,
    score_mod,
)
from attn_core.integrations.flex import flex_block_mask, flex_score_mod
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

SEED = 3
HEADS = 2
GENERATOR = torch.Generator().manual_seed(SEED)

#: (bias, seqlen_q, seqlen_kv), longer than a block of 128 and cut off.
MASKS = {
    "causal": (Causal(), 300, 300),
    "causal-bottom-right": (Causal("bottom-right"), 150, 400),
    "window": (Window(40, 3, "top-left"), 300, 300),
    "padding": (KeyPadding([0, 131, 260]), 130, 260),
    "neighborhood": (Neighborhood((18, 16), kernel_size=5, dilation=(2, 1)), 288, 288),
    "segments": (Segments([100, 130, 70], within=Causal()), 300, 300),
    "both": (Causal() & KeyPadding([300, 20, 129]), 300, 300),
    "blocks": (BlockMask(torch.rand(HEADS, 3, 3, generator=GENERATOR) < 0.6, 128), 300, 300),
    "small-blocks": (BlockMask(torch.rand(30, 20, generator=GENERATOR) < 0.6, (10, 15), within=Causal()), 300, 300),
    "function": (mask_mod(lambda b, h, q, k: (q // 50 + h) % 2 == k // 90, num_heads=HEADS), 300, 290),
}
SCORES = {
    "alibi": (ALiBi(HEADS), 300, 300),
    "table": (RelPosTable(torch.randn(HEADS, 7, 5, generator=GENERATOR), (18, 16)), 288, 288),
    "tensor": (TensorBias(torch.randn(HEADS, 1, 300, generator=GENERATOR)), 290, 300),
    "boolean-tensor": (TensorBias(torch.rand(3, 1, 290, 300, generator=GENERATOR) < 0.7), 290, 300),
    "score-function": (score_mod(lambda s, b, h, q, k: s * (h + 1) - (q - k).abs() / 8), 290, 300),
    "sum": (ALiBi(HEADS) + score_mod(lambda s, b, h, q, k: 2 * s) + (Causal() & Window(60, 60)), 300, 300),
}


def operands(seqlen_q, seqlen_kv):
    generator = torch.Generator().manual_seed(SEED)
    shapes = ((3, HEADS, seqlen_q, 16), (3, HEADS, seqlen_kv, 16), (3, HEADS, seqlen_kv, 16))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", [*MASKS, *SCORES])
def test_flex_attention_with_the_forms_of_a_bias_is_attention_with_it(name):
    bias, *lengths = (MASKS | SCORES)[name]
    inputs = operands(*lengths)
    bound = bias.bind(*lengths)
    block_mask, changed = flex_block_mask(bound), flex_score_mod(bound)
    assert (changed is None) == (name in MASKS)
    out = flex_attention(*inputs, score_mod=changed, block_mask=block_mask).transpose(1, 2)
    heads_last = [tensor.transpose(1, 2) for tensor in inputs]
    torch.testing.assert_close(out, reference_attention(*heads_last, bias)[0].float())
    torch.testing.assert_close(out, attention(*heads_last, bias))


@pytest.mark.parametrize("name", [name for name in MASKS if name != "blocks"])
def test_the_blocks_found_without_a_dense_form_are_those_of_create_block_mask(name):
    bias, *lengths = MASKS[name]
    bound = bias.bind(*lengths)
    batch, heads = (None if size == 1 else size for size in bound.batch_and_heads)
    want = create_block_mask(bound.rule("cpu"), batch, heads, *lengths, device="cpu")
    got = flex_block_mask(bound)
    assert got.shape == want.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(got, f"{kind}_num_blocks")
        assert torch.equal(counts, getattr(want, f"{kind}_num_blocks")), kind
        listed = torch.arange(getattr(got, f"{kind}_indices").shape[-1]) < counts[..., None]
        indices = [getattr(mask, f"{kind}_indices").masked_fill(~listed, -1) for mask in (got, want)]
        assert torch.equal(*indices), kind


def test_the_blocks_of_a_block_mask_are_its_own():
    generator = torch.Generator().manual_seed(SEED)
    blocks, full = (torch.rand(HEADS, 3, 2, generator=generator) < 0.6 for _ in range(2))
    mask = BlockMask(blocks, (128, 256), full=full, within=Causal("top-left")).bind(384, 400)
    flex = flex_block_mask(mask)
    assert flex.BLOCK_SIZE == (128, 256)
    ragged = torch.tensor([True, False])  # the last column is cut off, and flex wants that asked
    assert flex.full_kv_num_blocks.tolist() == [(blocks & full & ragged).sum(-1).tolist()]
    assert flex.kv_num_blocks.tolist() == [(blocks & ~(full & ragged)).sum(-1).tolist()]


def test_a_long_sequence_is_cut_without_its_dense_form():
    evaluated = []

    class Counted(Window):
        def keep(self, b, h, q, k):
            evaluated.append(torch.broadcast_shapes(q.shape, k.shape).numel())
            return super().keep(b, h, q, k)

    seqlen = 1 << 15
    flex = flex_block_mask(Counted(200, 0, "top-left").bind(seqlen, seqlen))
    assert sum(evaluated) < 4 * seqlen * 128
    counts = flex.kv_num_blocks + flex.full_kv_num_blocks
    assert counts[0, 0, :3].tolist() == [1, 2, 3]
    assert set(counts[0, 0, 3:].tolist()) == {3}


def test_nothing_has_no_forms():
    assert flex_block_mask(None) is None
    assert flex_score_mod(None) is None
    every_key = Window(None, None, "top-left").bind(4, 4)
    assert flex_block_mask(every_key) is None
    assert flex_score_mod(every_key) is None
    assert flex_block_mask(ALiBi(2).bind(4, 4)) is None
    assert flex_score_mod(Causal().bind(4, 4)) is None


@pytest.mark.parametrize("form", [flex_block_mask, flex_score_mod], ids=lambda form: form.__name__)
def test_what_has_no_lengths_or_is_no_bias_is_an_error(form):
    with pytest.raises(UnboundBiasError, match="does not know its lengths"):
        form(Causal())
    with pytest.raises(InputError, match=r"TensorBias\(tensor\)\.bind"):
        form(torch.ones(4, 4))
    with pytest.raises(InputTypeError, match="bias: takes"):
        form("causal")


@pytest.mark.parametrize(
    ("bias", "takes"),
    [
        (Causal(), True),
        (Window(3, 2) + ALiBi(2, torch.ones(2)), True),
        (TensorBias(torch.zeros(64, 64)), True),
        (TensorBias(torch.ones(64, 64, dtype=torch.bool)), False),
        (KeyPadding([64]), False),
        (Causal() & KeyPadding([64]), False),
        (Segments([30, 34]), False),
        (BlockMask(torch.eye(2, dtype=torch.bool), 32, within=Causal()), True),
        (BlockMask(torch.eye(2, dtype=torch.bool), 32, within=Causal() & Segments([30, 34])), False),
    ],
    ids=str,
)
def test_on_the_cpu_a_graph_takes_masks_by_arithmetic_alone(bias, takes):
    # torch 2.13's inductor raises for a mask_mod that reads a tensor; outside of graphs nothing is lowered.
    query = torch.ones(1, 64, 2, 16)
    problem = explain(query, query, query, bias).problem
    eager, traced = (explain_problem(replace(problem, compiling=c))["torch/flex"] for c in (False, True))
    padded = problem.bias is not None and problem.bias.has_padding
    assert eager.state == "ready" or padded
    assert (traced.state == "ready") is takes
    if not takes and not padded:
        assert traced.refused_fields == ("bias",)


@pytest.mark.parametrize("bias", [None, ALiBi(HEADS), Causal()], ids=["none", "alibi", "causal"])
def test_the_kernel_takes_one_softcap_after_another(bias):
    """Each in a process that has traced the ones before it."""
    query, key, value = (4 * tensor.transpose(1, 2) for tensor in operands(70, 70))
    for softcap in (0.5, 2.0, 3, 30.0):
        out, lse = attention(query, key, value, bias, softcap=softcap, return_lse=True, kernel="torch/flex")
        expected, expected_lse = reference_attention(query, key, value, bias, softcap=softcap)
        torch.testing.assert_close(out.double(), expected.double(), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse.double(), atol=1e-5, rtol=1e-5)
