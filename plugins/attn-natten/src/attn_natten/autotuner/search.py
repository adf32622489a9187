"""The search: which problem a call is, whether it may be tuned, and which configuration it runs in.

What is tuned is the kernel that the core chooses for the call. Trials run on operands of their own, without recording
gradients or counting in anybody's record; they choose nothing but how that kernel runs, so results differ from untuned
ones by their rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from threading import RLock
from typing import Any, NamedTuple

import attn_core
import torch
from attn_core import AttnError, Neighborhood, Problem
from attn_core.dispatch import autocast_dtype
from attn_core.registry import registry
from attn_core.scope import current
from attn_core.tracing import constant
from torch import Tensor

from ..errors import ConstraintError
from ..log import logger
from ..switches.deterministic import must_be_deterministic
from .cache import BACKWARD, FORWARD, Cache
from .families import Family, family_of
from .settings import Settings, State
from .timing import fastest

_is_compiling = torch.compiler.is_dynamo_compiling
_modes_of_dispatch = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack

#: What is tuned; NATTEN's kernels took no other.
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
#: Where nothing is tuned.
UNTUNED: AbstractContextManager[None] = nullcontext()
#: Whose trials run: at the same time, two searches would measure each other.
_searching = RLock()
#: The kernel that the core chooses, and the problem as that kernel sees it.
_chosen = Cache()


class Asked(NamedTuple):
    """A problem of the autotuner: what its timings depend on."""

    shape: torch.Size  #: of the query, `[batch, *spatial, num_heads, head_dim]`
    num_kv_heads: int
    head_dim_v: int
    device: torch.device
    dtype: torch.dtype
    cast_to: torch.dtype | None  #: by autocast
    neighborhood: tuple[object, ...]  #: its key: extents, kernel_size, stride, dilation and is_causal
    threads: int


def described(
    shape: torch.Size,
    num_kv_heads: int,
    head_dim_v: int,
    device: torch.device,
    dtype: torch.dtype,
    neighborhood: Neighborhood,
) -> Asked:
    """The problem, here and now."""
    castable = dtype is not torch.float64 and torch.amp.is_autocast_available(device.type)
    cast_to = autocast_dtype(device.type) if castable else None
    parameters = neighborhood.key[:-1]  # without its lengths, which follow from them
    return Asked(shape, num_kv_heads, head_dim_v, device, dtype, cast_to, parameters, torch.get_num_threads())


def tuned_for(
    query: Tensor,
    neighborhood: Neighborhood,
    needs_backward: bool,
    *,
    num_kv_heads: int | None = None,
    head_dim_v: int | None = None,
    kernel: str | None = None,
) -> AbstractContextManager[None]:
    """The scope in which a fused call runs in its best configuration; one that changes nothing where it is not tuned.

    Where the problem is new, and the autotuner on, this searches: it takes as long as all the trials.

    Args:
        query: `[batch, *spatial, num_heads, head_dim]`.
        neighborhood: what the call asks for.
        needs_backward: whether gradients are wanted; else no backward is tuned.
        num_kv_heads, head_dim_v: of key and value; default: those of the query.
        kernel: the one that the call insists on, by name.

    Nothing is tuned, and the log says so, while a graph is compiled or captured, in a torch.func transform, and within
    a mode of dispatch, such as one that counts FLOPs. Nothing is tuned in a deterministic mode either.

    Raises ConstraintError, which is a RuntimeError, for a dtype other than float32, float16 and bfloat16.
    """
    if _is_compiling():
        say_not_in_a_graph()
        return nullcontext()
    settings = State.settings
    if not settings.on or must_be_deterministic():
        return UNTUNED
    why = why_not(query)
    if why is not None:
        logger.log(*why)
        return UNTUNED
    if query.dtype not in DTYPES:
        raise ConstraintError(
            f"autotuner: takes {', '.join(map(str, DTYPES))}, got {query.dtype}; turn it off by disable_autotuner()"
        )
    asked = described(
        query.shape,
        query.shape[-2] if num_kv_heads is None else num_kv_heads,
        query.shape[-1] if head_dim_v is None else head_dim_v,
        query.device,
        query.dtype,
        neighborhood,
    )
    try:
        found = _choice(asked, neighborhood, needs_backward, kernel)
    except AttnError:  # the call itself says it better
        return UNTUNED
    name, problem = found
    family = family_of(name, problem)
    if family is None:
        return UNTUNED
    search = Search(asked, neighborhood, name, problem, family, settings)
    forward = search.best(backward=False) if settings.forward_pass else None
    backward = search.best(backward=True) if settings.backward_pass and needs_backward else None
    return UNTUNED if forward is backward is None else family.within(forward, backward)


def clear_autotuner_cache() -> None:
    """Forgets what was found: the next call of each problem searches again."""
    for cache in (FORWARD, BACKWARD, _chosen):
        cache.clear()


def why_not(query: Tensor) -> tuple[int, str, str] | None:
    """Why such a call cannot be tuned, as arguments of `logger.log`; None where it can."""
    text = "autotuner: skipped %s"
    if type(query) not in (Tensor, torch.nn.Parameter):
        return 10, text, f"for {type(query).__name__} operands"
    if query.device.type == "meta":
        return 10, text, "for operands without data"
    if _modes_of_dispatch():
        return 10, text, "within a mode of dispatch, in which kernels keep their own configuration"
    if _transform() is not None:
        return 10, text, "within a torch.func transform"
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        return 30, text, "while a CUDA graph is captured: kernels keep their own configuration in it"
    return None


@constant
def say_not_in_a_graph() -> None:
    """Logs it while a graph is traced, where the autotuner is on."""
    if State.settings.on:
        logger.warning("autotuner: skipped in a compiled graph, where kernels keep their own configuration")


def _choice(asked: Asked, neighborhood: Neighborhood, needs_backward: bool, kernel: str | None) -> tuple[str, Problem]:
    """The kernel that runs such a call here and now, and the problem as the core puts it. Raises what a call would."""
    place = asked, needs_backward, kernel, current.get().settings, registry.generation
    found: tuple[str, Problem] | None = _chosen.get(place)
    if found is None:
        with torch.set_grad_enabled(needs_backward):
            plan = attn_core.plan(*operands(asked, needs_backward), neighborhood, kernel=kernel)
        assert isinstance(plan, attn_core.Plan)
        found = plan.kernel, plan.problem
        _chosen.put(place, found)
    return found


def operands(asked: Asked, requires_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh ones, of one axis of tokens; the caller's random numbers stay as they are."""
    batch, *spatial, num_heads, head_dim = asked.shape
    tokens = prod(spatial)
    generator = torch.Generator(asked.device).manual_seed(0)

    def fresh(heads: int, dim: int) -> Tensor:
        made = torch.empty(batch, tokens, heads, dim, device=asked.device, dtype=asked.dtype)
        return made.uniform_(-1, 1, generator=generator).requires_grad_(requires_grad)

    kv_heads = asked.num_kv_heads
    return fresh(num_heads, head_dim), fresh(kv_heads, head_dim), fresh(kv_heads, asked.head_dim_v)


class Search(NamedTuple):
    """One problem, for one kernel."""

    asked: Asked
    neighborhood: Neighborhood
    kernel: str
    problem: Problem
    family: Family
    settings: Settings

    def best(self, *, backward: bool) -> Any:
        """The best configuration of a direction: what was found before, or is now."""
        settings = self.settings
        cache = BACKWARD if backward else FORWARD
        thorough = settings.thorough_mode_backward if backward else settings.thorough_mode_forward
        place = self.asked, self.kernel, thorough
        found = cache.get(place)
        if found is not None:
            return found
        with _searching:
            found = cache.get(place)  # another thread may have searched
            if found is None:
                found = self.searched(backward=backward, thorough=thorough)
                cache.put(place, found)
        return found

    def searched(self, *, backward: bool, thorough: bool) -> Any:
        settings = self.settings
        configurations = self.family.configurations(self.problem, backward=backward, thorough=thorough)
        steps = (settings.warmup_steps_forward, settings.steps_forward)
        if backward:
            steps = (settings.warmup_steps_backward, settings.steps_backward)
        with torch.no_grad():
            within = trials(self.asked, self.neighborhood, self.kernel, self.family, backward=backward)
            found = fastest(configurations, within, *steps, self.asked.device)
        logger.debug(
            "autotuner: %s %s of %s, %s input of size %s on %s with %s: %d configurations, chosen: %s",
            "thorough" if thorough else "standard",
            "backward" if backward else "forward",
            self.kernel,
            DTYPES[self.asked.dtype],
            tuple(self.asked.shape),
            self.asked.device,
            self.neighborhood,
            len(configurations),
            found,
        )
        return found


Within = Callable[[Any], AbstractContextManager[Callable[[], object]]]


def trials(asked: Asked, bias: Neighborhood, kernel: str, family: Family, *, backward: bool) -> Within:
    """For a configuration, the scope that gives what is run: a forward of that kernel, or a backward."""
    query, key, value = operands(asked, backward)
    # A bare plan: what it runs is nobody's call, so no record and no count of usage has it.
    with torch.set_grad_enabled(backward):
        run: Any = attn_core.plan(query, key, value, bias, kernel=kernel, unchecked=True)
    if not backward:

        @contextmanager
        def of_forward(configuration: Any) -> Iterator[Callable[[], object]]:
            with family.within(configuration, None):
                yield lambda: run(query, key, value, bias)

        return of_forward

    @contextmanager
    def of_backward(configuration: Any) -> Iterator[Callable[[], object]]:
        with torch.enable_grad(), family.within(None, configuration):
            out = run(query, key, value, bias)
        grad = torch.ones_like(out)
        yield lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True)

    return of_backward
