"""What does a whole model pay for being redirected?

ViT-S (patches of 16, 197 tokens, 12 blocks of 6 heads, width 384) on one image, its forward without gradients and its
training step, by torch's attention as it comes and by attn, told to run the same kernel. All ways take turns in one
process on one core; each is compared with stock in its own round, and the median of those ratios counts. Stock takes
part twice: what its copy differs by is noise. Times are those of the processor: a neighbour on the core is not counted.
Nor is the first call of a scope, in which the kernel is chosen: a model is redirected once and then run. With --blocks
1, a round takes a tenth of the time, so that many more of them make the median steadier; a block pays the same.

    nox -s bench -- redirected [--only "forward"|"training step"] [--blocks N] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import attn_core
import torch
import torch.nn.functional as F
from attn_core.integrations.torch import redirect_sdpa, swap
from timing import COPY, SEED, Contender, Finding, environment, on_one_core, report, take_turns
from torch import Tensor, nn

KERNEL = "torch/flash"
#: Of stock's time.
LIMIT = 1.0
ROUNDS = {"forward": 300, "training step": 100}
STOCK = "stock"
WIDTH, HEADS, PATCH, PIXELS, CLASSES = 384, 6, 16, 224, 1000


class Attention(nn.Module):
    """Self-attention of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    """Attention, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A small vision transformer, in torch alone."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, (PIXELS // PATCH) ** 2 + 1, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


@contextmanager
def enabled() -> Iterator[None]:
    """The whole process redirected."""
    attn_core.enable("torch", prefer=KERNEL)
    try:
        yield
    finally:
        attn_core.disable("torch")


@contextmanager
def swapped(model: nn.Module) -> Iterator[None]:
    """One model, nothing of torch replaced; the scope chooses the kernel."""
    with swap(model), attn_core.prefer(KERNEL):
        yield


def ways(model: nn.Module) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Name -> a scope to run the model in."""
    return {
        STOCK: nullcontext,
        'attn_core.enable("torch")': enabled,
        "with redirect_sdpa()": lambda: redirect_sdpa(prefer=KERNEL),
        "swap(model)": lambda: swapped(model),
    }


@contextmanager
def begun(scope: AbstractContextManager[object], model: ViT, *, with_grad: bool) -> Iterator[None]:
    """The scope, in which an attention of the model has been called."""
    tokens = torch.zeros(1, (PIXELS // PATCH) ** 2 + 1, WIDTH)
    with scope:
        with torch.set_grad_enabled(with_grad):
            model.blocks[0].attn(tokens)
        yield


def forward(model: nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        model(image)


def training_step(model: nn.Module, image: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(image).sum().backward()


STEPS: dict[str, Callable[[nn.Module, Tensor], None]] = {"forward": forward, "training step": training_step}


def measured(kind: str, blocks: int, rounds: int) -> list[Finding]:
    """What each way costs over stock, in percent of stock's time."""
    torch.manual_seed(SEED)
    model, image = ViT(blocks).eval(), torch.randn(1, 3, PIXELS, PIXELS)
    step = STEPS[kind]
    check(model, image)

    contenders = [
        Contender(
            name=name,
            call=lambda: step(model, image),
            within=lambda scope=scope: begun(scope(), model, with_grad=step is training_step),
        )
        for name, scope in ways(model).items()
    ]
    taken = take_turns(contenders, rounds=rounds, calls=1, clock=time.process_time)
    milliseconds = statistics.median(taken[STOCK]) / 1e3
    found = [Finding(name=STOCK, value=milliseconds, unit="ms", note="by torch's attention")]
    for name, times in taken.items():
        if name == STOCK:
            continue
        ratios = [100 * (one / other - 1) for one, other in zip(times, taken[STOCK])]
        low, median, high = statistics.quantiles(ratios, n=4)
        limit = None if name == COPY else LIMIT
        found.append(
            Finding(name=name, value=median, unit="% over stock", spread=(high - low) / 2, limit=limit, note=KERNEL)
        )
    return found


def check(model: ViT, image: Tensor) -> None:
    """Each way runs every attention of the model by that kernel, and gives what stock gives. Raises AssertionError."""
    with torch.no_grad():
        expected = model(image)
        for name, scope in ways(model).items():
            with attn_core.record() as calls, scope():
                out = model(image)
            assert calls.kernels == ({} if name == STOCK else {KERNEL: len(model.blocks)}), (name, calls.kernels)
            assert torch.allclose(out, expected, atol=1e-5), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    parser.add_argument("--blocks", type=int, default=12, help="of the model, default: 12")
    parser.add_argument("--only", choices=ROUNDS, help="one of the two steps")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    on_one_core()
    print("  ".join(f"{key} {value}" for key, value in environment().items()))
    sections = {
        f"{kind} of ViT-S, {options.blocks} of its 12 blocks, batch 1, {rounds} rounds": measured(
            kind, options.blocks, rounds
        )
        for kind, rounds in ((kind, options.rounds or rounds) for kind, rounds in ROUNDS.items())
        if options.only in (None, kind)
    }
    report(sections, options.json)


if __name__ == "__main__":
    main()
