"""What does a whole model pay for being redirected?

ViT-S (patches of 16, 197 tokens, 12 blocks of 6 heads, width 384) on one image, by torch's attention as it comes and by
attn, told to run the same kernel; in one process on one core. Times are those of the processor: a neighbour on the core
is not counted, though one elsewhere on the machine slows caches and memory down, for tens of milliseconds at a time.

Forward, without gradients: the blocks of each forward are in turns redirected and stock, and a redirected one is
compared with the mean of the stock ones before and after it, so that what is slow for all three does not count. What is
slow for one does, so of the differences a quarter at either end is left out of the mean. Each forward draws its way of
redirecting. Of the differences as a share of a stock block, 95 % of bootstrap samples (of forwards) give a mean within
the interval. Patches, the last norm and the head have no attention; they are left out, which makes the share larger.

Training step: a round has one by each way, each compared with stock in its own round; mean and interval likewise.

Stock takes part twice: what its copy differs by is noise. The first call of a scope, in which the kernel is chosen, is
left out: a model is redirected once and then run. A limit holds where the upper end of the interval is below it.
Interrupted (Ctrl-C), the forward is reported with what was taken until then.

    nox -s bench -- redirected [--only "forward"|"training step"] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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
ROUNDS = {"forward": 1200, "training step": 100}
STOCK = "stock"
TORCHS = F.scaled_dot_product_attention
#: Of the differences, left out at either end.
TRIMMED = 0.25
SAMPLES = 1000
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


#: Name -> a scope to run a module in.
WAYS: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    STOCK: lambda module: nullcontext(),
    'attn_core.enable("torch")': lambda module: enabled(),
    "with redirect_sdpa()": lambda module: redirect_sdpa(prefer=KERNEL),
    "swap(model)": swapped,
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


class Turns:
    """The blocks of a model, every second of them redirected, with the seconds that each took.

    The scope is that of the whole forward. Before each block, what it finds is put in its place: torch's function or
    the one that stands in for it, and the class of its attention. That is the same work before either kind of block,
    and not in its time.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda module, args, number=number: self._begin(number))
            block.register_forward_hook(lambda *call: self._end())

    def take(self, first: int) -> None:
        """From now on, until `put_back`, every second block from `first` on is redirected as the whole model is now."""
        self._first, self.seconds = first, list[float]()
        self._redirected = F.scaled_dot_product_attention, type(self._blocks[0].attn)

    def put_back(self) -> None:
        """Leaves everything as `take` found it."""
        for block in self._blocks:
            self._put(block, *self._redirected)

    def _put(self, block: Block, function: Callable[..., Tensor], kind: type[nn.Module]) -> None:
        F.scaled_dot_product_attention, block.attn.__class__ = function, kind

    def _begin(self, number: int) -> None:
        redirected = (number - self._first) % 2 == 0
        self._put(self._blocks[number], *(self._redirected if redirected else (TORCHS, Attention)))
        self._start = time.process_time()

    def _end(self) -> None:
        self.seconds.append(time.process_time() - self._start)


def by_blocks(rounds: int) -> list[Finding]:
    """What each way costs over stock in a forward, in percent of a stock block's time."""
    model, image = made()
    turns, chance = Turns(list(model.blocks)), random.Random(SEED)
    all_ways = WAYS | {COPY: WAYS[STOCK]}
    del all_ways[STOCK]
    #: way -> for each of its forwards, what its redirected blocks took longer than those beside them
    longer: dict[str, list[list[float]]] = {name: [] for name in all_ways}
    stock: list[float] = []
    drawn = [name for _ in range(-(-rounds // len(all_ways))) for name in all_ways][:rounds]
    chance.shuffle(drawn)
    for name, way in all_ways.items():
        with attn_core.record() as calls, way(model):
            turns.take(0)
            forward(model, image)
            turns.put_back()
        assert calls.kernels == ({} if name == COPY else {KERNEL: len(model.blocks) // 2}), (name, calls.kernels)
    warm = len(all_ways) * 2
    gc.collect()
    gc.disable()
    try:
        for number, name in enumerate([*all_ways, *all_ways, *drawn]):
            first = chance.randrange(2)
            with begun(all_ways[name](model), model, with_grad=False):
                turns.take(first)
                forward(model, image)
                turns.put_back()
            if number < warm:
                continue
            took = turns.seconds
            redirected = range(2 - first, len(took) - 1, 2)
            longer[name].append([took[i] - (took[i - 1] + took[i + 1]) / 2 for i in redirected])
            stock += took[1 - first :: 2]
    except KeyboardInterrupt:
        print("interrupted: what was taken until now")
    finally:
        gc.enable()
    block = statistics.median(stock)
    found = [Finding(name=STOCK, value=1e3 * block, unit="ms", note="a block, by torch's attention")]
    for name, forwards in longer.items():
        found.append(over_stock(name, [[100 * seconds / block for seconds in each] for each in forwards]))
    return found


def by_turns(kind: str, rounds: int) -> list[Finding]:
    """What each way costs over stock, in percent of stock's time for the whole model."""
    model, image = made()
    step = STEPS[kind]
    contenders = [
        Contender(
            name=name,
            call=lambda: step(model, image),
            within=lambda way=way: begun(way(model), model, with_grad=step is training_step),
        )
        for name, way in WAYS.items()
    ]
    taken = take_turns(contenders, rounds=rounds, calls=1, clock=time.process_time)
    milliseconds = statistics.median(taken[STOCK]) / 1e3
    found = [Finding(name=STOCK, value=milliseconds, unit="ms", note="the model, by torch's attention")]
    for name, times in taken.items():
        if name != STOCK:
            found.append(over_stock(name, [[100 * (one / other - 1)] for one, other in zip(times, taken[STOCK])]))
    return found


def over_stock(name: str, differences: Sequence[Sequence[float]]) -> Finding:
    """The mean of the differences, in percent, and its interval; those that are taken together are drawn together."""
    chance = random.Random(SEED)
    middle = trimmed_mean([each for together in differences for each in together])
    sampled = sorted(
        trimmed_mean([each for together in chance.choices(differences, k=len(differences)) for each in together])
        for _ in range(SAMPLES)
    )
    low, high = sampled[round(0.025 * SAMPLES)], sampled[round(0.975 * SAMPLES) - 1]
    limit = None if name == COPY else LIMIT
    note = f"95 %: {low:.2f} to {high:.2f}, {sum(map(len, differences))} differences"
    if limit is None:
        return Finding(name=name, value=middle, unit="% over stock", note=note)
    return Finding(name=name, value=high, unit="% over stock at most", limit=limit, note=f"{middle:.2f}; {note}")


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean of what is left where the smallest and the largest are left out."""
    out = int(TRIMMED * len(values))
    return statistics.fmean(sorted(values)[out : len(values) - out])


def made() -> tuple[ViT, Tensor]:
    """A model, by which each way has been checked, and an image."""
    torch.manual_seed(SEED)
    model, image = ViT(12).eval(), torch.randn(1, 3, PIXELS, PIXELS)
    check(model, image)
    return model, image


def check(model: ViT, image: Tensor) -> None:
    """Each way runs every attention of the model by that kernel, and gives what stock gives. Raises AssertionError."""
    with torch.no_grad():
        expected = model(image)
        for name, way in WAYS.items():
            with attn_core.record() as calls, way(model):
                out = model(image)
            assert calls.kernels == ({} if name == STOCK else {KERNEL: len(model.blocks)}), (name, calls.kernels)
            assert torch.allclose(out, expected, atol=1e-5), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    parser.add_argument("--only", choices=ROUNDS, help="one of the two steps")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    on_one_core()
    print("  ".join(f"{key} {value}" for key, value in environment().items()))
    chosen = [(kind, options.rounds or rounds) for kind, rounds in ROUNDS.items() if options.only in (None, kind)]
    sections = {
        f"{kind} of ViT-S, batch 1": (by_blocks(rounds) if kind == "forward" else by_turns(kind, rounds))
        for kind, rounds in chosen
    }
    report(sections, options.json)


if __name__ == "__main__":
    main()
