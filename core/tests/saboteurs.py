"""A kernel that is right, and the same kernel made wrong in one place: what the conformance kit must catch.

Each saboteur is a mistake that real kernels and real adapters have made. A kit that misses one is broken.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from attn_core import (
    ANY_DIM,
    Backward,
    BlockMask,
    Capabilities,
    Causal,
    Kernel,
    KeyPadding,
    Paged,
    PrefixLM,
    Problem,
    Refusal,
    TensorBias,
    Window,
    refresh,
)
from attn_core.conformance import CheckResult, check_kernel, contract
from attn_core.testing import fake_distribution, importable
from rude_plugins import rude_plugin
from streams_doubled import doubled_streams
from torch import Tensor

MASKED = float("-inf")
TILE = 16


def attend(query, key, value, *, bias=None, scale, softcap=None, dropout_p=0.0, return_lse=False, wrong=""):
    """Attention written out, heads-last, each line right unless `wrong` names it."""
    if wrong == "stream ignored":
        with _in_the_default_stream(query.device.type):
            options = {"softcap": softcap, "dropout_p": dropout_p, "return_lse": return_lse}
            return attend(query, key, value, bias=bias, scale=scale, **options)
    if wrong == "SDPA called":
        F.scaled_dot_product_attention(query, query, query)
    dtype, head_dim = query.dtype, query.shape[-1]
    seqlen_kv = key.shape[1]
    if wrong == "scale dropped":
        scale = 1.0
    if wrong == "scale of the padded head_dim":
        scale = scale * math.sqrt(head_dim / (-(-head_dim // 8) * 8))
    if wrong == "scale 0 taken for none":
        scale = scale or head_dim**-0.5
    if wrong == "strides mistaken":
        key = key.as_strided(key.shape, torch.empty(key.shape, device="meta").stride())
    if bias is not None and bias.paged is not None:
        key, value, bias = _in_a_row(key, value, bias, wrong)
        seqlen_kv = key.shape[1]
    padding_read = wrong in ("padding read", "tails of pages read")
    padding_read = padding_read or (wrong == "padding within blocks read" and isinstance(bias, BlockMask))
    if bias is not None and not padding_read:
        valid = bias.valid_keys(key.device)
        if valid is not None:
            key, value = (torch.where(valid[:, :, None, None], x, 0) for x in (key, value))
    q, k, v = (x.transpose(1, 2).to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    group = q.shape[1] // k.shape[1]
    if wrong == "heads in tile order":
        k, v = (x.repeat(1, group, 1, 1) for x in (k, v))
    else:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    if wrong == "batch entries coupled":
        k = k + (k.sum(0, keepdim=True) - k) * 1e-7
    logits = scale * (q @ k.mT)
    if softcap is not None and wrong not in ("softcap dropped", "softcap after the bias"):
        logits = softcap * torch.tanh(logits / softcap)
    logits = _biased(logits, bias, wrong)
    if softcap is not None and wrong == "softcap after the bias":
        capped = softcap * torch.tanh(logits / softcap)
        logits = torch.where(logits == MASKED, MASKED, capped)
    if wrong == "tail tile unmasked" and seqlen_kv % TILE:
        logits = torch.nn.functional.pad(logits, (0, TILE - seqlen_kv % TILE))
        v = torch.nn.functional.pad(v, (0, 0, 0, TILE - seqlen_kv % TILE))
    if wrong == "rows beyond 65,535 left out":
        logits = torch.cat([logits[:, :, :65_535], logits[:, :, 65_535:] * 0], 2)
    empty = (logits == MASKED).all(-1, keepdim=True)
    lse = torch.logsumexp(torch.where(empty, 0.0, logits), -1)
    weights = torch.softmax(torch.where(empty, 0.0, logits), -1)
    if wrong != "a row without keys gets the mean":
        weights = weights * ~empty
    if dropout_p and wrong != "dropout dropped":
        weights = torch.dropout(weights, dropout_p, True)
    if wrong == "not deterministic" and torch.rand(()) < 0.9:
        weights = weights * (1 + torch.rand(()) * 1e-6)
    if wrong == "gradient to value missing" or (wrong == "gradient lost in graphs" and torch.compiler.is_compiling()):
        v = v.detach()
    if wrong == "derivative of value not pushed":
        v = v.detach()
    product = _DifferentiableOnce.apply if wrong == "gradient of the gradient missing" else torch.matmul
    out = product(weights, v).transpose(1, 2)
    if wrong == "output not written without keys" and not seqlen_kv:
        out = out + math.nan
    if wrong == "shape of a model mistaken" and query.shape[1] == 197:
        out = out * 1.5
    if wrong == "stream ignored by the backward":
        out = _BackwardElsewhere.apply(out)
    out = out if wrong == "dtype quietly raised" else out.to(dtype)
    if wrong == "operand overwritten":
        with torch.no_grad():
            query.mul_(scale)
    if wrong == "graph broken":
        torch._dynamo.graph_break()
    if not return_lse:
        return out
    if wrong == "LSE base 2":
        lse = lse / math.log(2)
    if wrong == "gradient of the LSE missing":
        lse = lse.detach()
    of_empty = {"LSE 0 of a row without keys": 0.0, "LSE +inf of a row without keys": math.inf}.get(wrong, MASKED)
    return out, torch.where(empty.squeeze(-1), of_empty, lse)


def _in_the_default_stream(device: str) -> AbstractContextManager[object]:
    streams = contract.streams_of(device)
    return streams.stream(streams.default_stream()) if streams is not None else nullcontext()


class _DifferentiableOnce(torch.autograd.Function):
    """A product with a backward written by hand, as of kernels: to autograd, its gradients are constants."""

    @staticmethod
    def forward(ctx: object, one: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(one, other)
        return one @ other

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        one, other = (tensor.detach() for tensor in ctx.saved_tensors)
        return grad @ other.mT, one.mT @ grad


class _BackwardElsewhere(torch.autograd.Function):
    """Hands its operand on; and the gradient back, by work in the default stream."""

    @staticmethod
    def forward(ctx: object, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: object, grad_out: Tensor) -> Tensor:
        with _in_the_default_stream(grad_out.device.type):
            return grad_out.clone()


def _in_a_row(key: Tensor, value: Tensor, bias: Paged, wrong: str) -> tuple[Tensor, Tensor, object]:
    """What the pages hold, each sequence in a row."""
    pages = bias
    if wrong == "page table not read":
        in_order = torch.arange(bias.page_table.numel()).reshape(bias.page_table.shape) % key.shape[0]
        pages = Paged(in_order, bias.seqlens_kv, bias.page_size).bind(*bias.lengths)
    if wrong == "pages of one size only" and bias.page_size > 64:
        pages = Paged(bias.page_table[:, :1].repeat(1, bias.page_table.shape[1]), bias.seqlens_kv, bias.page_size)
        pages = pages.bind(*bias.lengths)
    gathered = bias.gathered()
    if wrong == "lengths of pages, not of sequences":
        whole = -(-bias.seqlens_kv // bias.page_size) * bias.page_size
        gathered = bias.with_held({"seqlens_kv": whole}).gathered()
    return (*pages.gather(key, value), gathered)


def _biased(logits: Tensor, bias: object, wrong: str) -> Tensor:
    if bias is None:
        return logits
    if wrong == "causal in the other corner" and isinstance(bias, Causal):
        other = "top-left" if bias.corner == "bottom-right" else "bottom-right"
        bias = Causal(other).bind(*bias.lengths)
    if isinstance(bias, Window):
        if wrong == "window one key short on the left" and bias.left:
            bias = replace(bias, left=bias.left - 1)
        if wrong == "window one key more on the right" and bias.right is not None:
            bias = replace(bias, right=bias.right + 1)
    if wrong == "prefix not seen" and isinstance(bias, PrefixLM):
        bias = Causal(bias.corner).bind(*bias.lengths)
    if wrong == "within asked in full blocks" and isinstance(bias, BlockMask) and bias.full is not None:
        bias = BlockMask(bias.blocks, bias.block_size, within=bias.within, lengths=bias.lengths)
    dense = bias.materialize(logits.device)  # type: ignore[attr-defined]
    if wrong == "bias transposed" and dense.shape[-1] == dense.shape[-2] and isinstance(bias, TensorBias):
        dense = dense.mT
    if wrong == "gradient to the bias missing":
        dense = dense.detach()
    if dense.dtype is torch.bool:
        return logits.masked_fill(~dense, MASKED)
    if wrong == "bias added before the scale":
        return logits + dense * 0.5
    return logits + dense.to(logits.dtype)


CLAIMS = Capabilities(
    devices={"cpu"},
    dtypes={torch.float32, torch.bfloat16},
    head_dims=ANY_DIM,
    head_dims_v=ANY_DIM,
    biases={Causal, Window, KeyPadding, TensorBias},
    backward=Backward(bias_grad=True, lse_grad=True, deterministic=True),
    gqa=True,
    softcap=True,
    dropout=True,
    return_lse=True,
    deterministic=True,
    strided_head_dim=True,
)
GOOD = Kernel(name="good/attend", run=attend, capabilities=CLAIMS, calls_sdpa=False)
#: Of kinds that few kernels take, and of one dtype and size, since these are not what it is about.
RARE = replace(
    CLAIMS,
    dtypes={torch.float32},
    head_dims={16},
    head_dims_v=None,
    biases={Paged, PrefixLM, BlockMask},
    dropout=False,
    strided_head_dim=False,
)
GOOD_RARE = Kernel(name="good/rare", run=attend, capabilities=RARE)


def _refuse_everything(problem):
    if problem.softcap is not None:
        yield Refusal("softcap", "is out of order today")


def _refuse_silently(problem):
    if problem.seqlen_q == 1:
        yield Refusal("seqlen_q", " ")


def _refuse_by_raising(problem):
    raise KeyError("arch")


class Mislabelled(Kernel):
    """Refuses all that it should, and blames the same field each time."""

    def refusals(self, problem, **given):
        return [replace(refusal, field="problem") for refusal in super().refusals(problem, **given)]


class Inconstant(Kernel):
    """Refuses a problem while its refusals are looked at, twice, and takes it in the call after."""

    asked: ClassVar[Counter[Problem]] = Counter()

    def refusals(self, problem, **given):
        found = super().refusals(problem, **given)
        self.asked[problem] += bool(found)
        return found if self.asked[problem] <= 2 else []


@contextmanager
def asked_nothing_yet() -> Iterator[None]:
    Inconstant.asked.clear()
    yield


@dataclass(frozen=True)
class Saboteur:
    """A wrong kernel, and the check that must catch it."""

    kernel: Kernel | str  #: by its name where it is a plugin's
    caught_by: str
    device: str = "cpu"
    #: In which it is checked: what the machine lacks is doubled there.
    within: Callable[[], AbstractContextManager[object]] = nullcontext

    def finds(self, check: str) -> list[CheckResult]:
        """What that check says of it, up to its first failure."""
        with self.within():
            return check_kernel(self.kernel, device=self.device, only=check, stop_at_failure=True)


def _wrong(name: str, kind: type[Kernel] = Kernel, **claims: object) -> Kernel:
    slug = name.replace(" ", "-").replace(",", "")
    run = functools.partial(attend, wrong=name)
    return kind(name=f"sabotage/{slug}", run=run, capabilities=replace(CLAIMS, **claims))  # type: ignore[arg-type]


SABOTEURS = {
    name: Saboteur(_wrong(name), check)
    for name, check in {
        "scale dropped": "agrees",
        "scale of the padded head_dim": "agrees",
        "scale 0 taken for none": "agrees",
        "causal in the other corner": "agrees",
        "window one key short on the left": "agrees",
        "window one key more on the right": "agrees",
        "LSE base 2": "agrees",
        "LSE 0 of a row without keys": "a_query_without_keys_gets_zeros",
        "LSE +inf of a row without keys": "a_query_without_keys_gets_zeros",
        "a row without keys gets the mean": "a_query_without_keys_gets_zeros",
        "heads in tile order": "agrees",
        "tail tile unmasked": "agrees",
        "rows beyond 65,535 left out": "agrees",
        "bias transposed": "agrees",
        "bias added before the scale": "agrees",
        "gradient to the bias missing": "agrees",
        "gradient to value missing": "agrees",
        "gradient of the LSE missing": "agrees",
        "shape of a model mistaken": "agrees_on_recorded_problems",
        "softcap after the bias": "agrees",
        "softcap dropped": "agrees",
        "dropout dropped": "drops_weights",
        "operand overwritten": "leaves_its_operands_alone",
        "dtype quietly raised": "returns_what_was_asked_for",
        "not deterministic": "repeats_itself",
        "padding read": "never_reads_padding",
        "strides mistaken": "reads_only_its_operands",
    }.items()
}
SABOTEURS |= {
    name: Saboteur(replace(_wrong(name), capabilities=RARE), check)
    for name, check in {
        "page table not read": "agrees",
        "pages of one size only": "agrees",
        "lengths of pages, not of sequences": "agrees",
        "tails of pages read": "never_reads_padding",
        "prefix not seen": "agrees",
        "within asked in full blocks": "agrees",
        "padding within blocks read": "never_reads_padding",
    }.items()
}
#: Where there is no CUDA device, with a double of its streams.
_STREAMS = ("cuda", nullcontext) if torch.cuda.is_available() else ("cpu", doubled_streams)
SABOTEURS |= {
    name: Saboteur(_wrong(name, devices={_STREAMS[0]}), "runs_in_the_current_stream", *_STREAMS)
    for name in ("stream ignored", "stream ignored by the backward")
}
SABOTEURS |= {
    "batch entries coupled": Saboteur(
        _wrong("batch entries coupled", batch_invariant=True), "entries_do_not_depend_on_each_other"
    ),
    "derivative of value not pushed": Saboteur(
        _wrong("derivative of value not pushed", forward_ad=True), "pushes_derivatives_forward"
    ),
    "gradient of the gradient missing": Saboteur(
        _wrong("gradient of the gradient missing", backward=replace(CLAIMS.backward, double=True)),
        "is_differentiable_twice",
    ),
    "output not written without keys": Saboteur(
        _wrong("output not written without keys", empty_lengths=True, head_dims={16}, head_dims_v=None), "agrees"
    ),
    "graph broken": Saboteur(_wrong("graph broken", compile=True), "can_be_traced"),
    "gradient lost in graphs": Saboteur(_wrong("gradient lost in graphs", compile=True), "can_be_traced"),
    "refuses by the wrong field": Saboteur(
        _wrong("refuses by the wrong field", Mislabelled), "refuses_what_it_does_not_claim"
    ),
    "takes what it refused": Saboteur(
        _wrong("takes what it refused", Inconstant), "a_call_that_it_refuses_raises", within=asked_nothing_yet
    ),
    "refuses what it claims": Saboteur(
        replace(GOOD, name="sabotage/refuses", refuse=_refuse_everything), "takes_what_it_claims"
    ),
    "refuses without a word": Saboteur(
        replace(GOOD, name="sabotage/silent", refuse=_refuse_silently), "its_reasons_can_be_read"
    ),
    "calls SDPA and denies it": Saboteur(
        replace(_wrong("SDPA called"), calls_sdpa=False), "never_calls_sdpa_where_it_says_so"
    ),
    "its limits raise": Saboteur(
        replace(GOOD, name="sabotage/raises", refuse=_refuse_by_raising), "its_reasons_can_be_read"
    ),
}
SABOTEURS |= {
    what: Saboteur("rude/sdpa", check, within=functools.partial(rude_plugin, what))
    for what, check in {
        "library imported to declare": "is_declared_without_its_library",
        "CUDA started to declare": "is_declared_without_its_library",
        "of no use after a fork": "survives_a_fork",
        "CUDA started by its probe": "survives_a_fork",
        "another plugin broken": "leaves_the_others_alone",
    }.items()
}


#: These take the process with them, so they are of a plugin that another process can find.
DEADLY_PLUGIN = """
import os, sys, time
import torch
from attn_core import Capabilities, Kernel, hookimpl

def crashes(query, key, value, *, scale):
    os.abort()

def exits(query, key, value, *, scale):
    sys.exit(3)

def hangs(query, key, value, *, scale):
    time.sleep(10_000)

def faults(query, key, value, *, scale):
    torch.cpu.synchronize = synchronize_after_a_fault  # as a GPU's raises from then on, whatever runs
    torch.cpu.synchronize()

def synchronize_after_a_fault(device=None):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@hookimpl
def attn_kernels():
    claims = Capabilities(devices={"cpu"}, dtypes={torch.float32}, head_dims={8})
    for run in (crashes, exits, hangs, faults):
        yield Kernel(name=f"deadly/{run.__name__}", run=run, capabilities=claims)
"""
DEADLY = ("crashes", "exits", "hangs", "faults")


@contextmanager
def deadly_plugin(folder: Path) -> Iterator[None]:
    """Within it, the plugin is installed in the folder."""
    with importable(folder):
        fake_distribution(folder, "attn-deadly", source=DEADLY_PLUGIN, entry_points={"deadly": "attn_deadly"})
        refresh()
        yield
    refresh()
