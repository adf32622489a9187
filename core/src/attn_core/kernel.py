"""Kernel: one runnable thing, its capabilities, and what it costs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from torch import Tensor

from .bias import AttnBias, TensorBias
from .capabilities import Capabilities, Refusal, covers
from .cost import UNDECLARED, Cost, Terms, Work, quantities
from .errors import DeclarationError
from .problem import Problem

Layout = Literal["heads-last", "heads-first"]
Run = Callable[..., Any]
Bound = Callable[[Tensor, Tensor, Tensor, Any], Any]


@dataclass(frozen=True)
class Unusable:
    """What a kernel's probe answers where the kernel cannot run at all, and what to do about it.

    `state` is "absent" (a library is not installed) or "unavailable" (not on this machine).
    """

    state: Literal["absent", "unavailable"]
    reason: str
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One runnable thing.

    Args:
        name: `<plugin>/<kernel>`; the prefix is the plugin's entry-point name.
        run: `run(query, key, value, *, scale, …) -> out`, or its dotted name "package.module:function" where importing
            it is dear. Operands and result are in `layout`. Of `bias`, `softcap`, `dropout_p` and `return_lse` it
            takes those that it declares, and is passed one only where the problem uses it; with `return_lse=True` it
            returns `(out, lse)`. No `**kwargs`: nothing may vanish in one.
        capabilities: what it can do; a tuple where that differs between devices, of which the first that names the
            problem's device (and compute capability) counts.
        layout: of its operands: "heads-last" `[batch, seqlen, num_heads, head_dim]`, or "heads-first"
            `[batch, num_heads, seqlen, head_dim]`.
        refuse: irregular limits that `capabilities` cannot say: yields refusals for a problem.
        probe: answers None where the kernel can run on this machine, else why not; called once, before the first call
            on a device that the kernel declares, or where somebody asks what there is.
        costs: device type -> Cost, "*" for every other; a device that is missing costs UNDECLARED.
        skips: kinds of bias whose masked pairs are not visited.
        work: says of a problem which pairs are visited and in how many parts, where that is neither all pairs nor,
            as `skips` says, those that the bias leaves; None: that. Asked once per choice; with stand-in lengths where
            those are symbolic.
        prepare: called once per choice with the problem as the kernel sees it; may answer a function
            `(query, key, value, bias)` that does for just this problem what `run` would do, its branches settled
            beforehand. None: `run` is called. A few microseconds of Python matter at small sizes.
        calls_sdpa: whether it may call torch's scaled_dot_product_attention, which is left to torch where such calls
            are redirected: it runs with a mark then, some 0.2 microseconds. False: neither `run` nor what `prepare`
            answers ever does.

    Raises DeclarationError where name, layout or the signature of `run` do not fit what is declared.
    """

    name: str
    run: Run | str
    capabilities: Capabilities | tuple[Capabilities, ...]
    layout: Layout = "heads-last"
    refuse: Callable[[Problem], Iterable[Refusal]] | None = None
    probe: Callable[[], Unusable | None] | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)
    skips: Collection[type[AttnBias]] = ()
    work: Callable[[Problem], Work | None] | None = None
    prepare: Callable[[Problem], Bound | None] | None = None
    calls_sdpa: bool = True

    def __post_init__(self) -> None:
        plugin, slash, rest = self.name.partition("/") if isinstance(self.name, str) else ("", "", "")
        if not (plugin and slash and rest) or any(c.isspace() or c in "*?[]," for c in self.name):
            raise DeclarationError(f"kernel: name must be '<plugin>/<kernel>', got {self.name!r}")
        if self.layout not in ("heads-last", "heads-first"):
            raise DeclarationError(f'{self.name}: layout must be "heads-last" or "heads-first", got {self.layout!r}')
        declared = self.declarations
        if not declared or not all(isinstance(each, Capabilities) for each in declared):
            raise DeclarationError(f"{self.name}: capabilities must be Capabilities, got {self.capabilities!r}")
        if callable(self.run):
            check_signature(self)
        elif not (isinstance(self.run, str) and self.run.count(":") == 1):
            raise DeclarationError(
                f"{self.name}: run must be a function or 'package.module:function', got {self.run!r}"
            )

    @property
    def plugin(self) -> str:
        return self.name.partition("/")[0]

    @property
    def declarations(self) -> tuple[Capabilities, ...]:
        """What it can do, one record per group of devices."""
        return self.capabilities if isinstance(self.capabilities, tuple) else (self.capabilities,)

    def is_for_device_of(self, problem: Problem) -> bool:
        """Whether it declares the type of device that `problem` is on."""
        return any(each.names_device(problem) for each in self.declarations)

    def declaration(self, problem: Problem) -> Capabilities:
        """The record that counts for `problem`: the first for its device and compute capability, else the nearest."""
        declared = self.declarations
        if len(declared) == 1:
            return declared[0]
        for_device = [each for each in declared if each.names_device(problem)] or list(declared)
        return next((each for each in for_device if each.fits_compute_capability(problem)), for_device[0])

    def refusals(self, problem: Problem, *, limits: bool = True) -> list[Refusal]:
        """Every reason why this kernel, as it is, does not take `problem`; `limits`: also those of `refuse`."""
        found = self.declaration(problem).refusals(problem)
        if limits and self.refuse is not None and not found:  # an irregular limit may rely on the regular ones
            found = self._own_refusals(problem)
        return found

    def _own_refusals(self, problem: Problem) -> list[Refusal]:
        """What `refuse` yields; a plugin's error there is a reason not to take its kernel, not to fail the call."""
        assert self.refuse is not None
        try:
            found = list(self.refuse(problem))
        except Exception as error:
            return [Refusal("refuse", f"its own limits raised {type(error).__name__}: {error}")]
        odd = [refusal for refusal in found if not isinstance(refusal, Refusal)]
        return [Refusal("refuse", f"its own limits must yield Refusal, got {odd[0]!r}")] if odd else found

    def cost(self, device: str) -> Cost:
        return self.costs.get(device) or self.costs.get("*", UNDECLARED)

    def terms(self, problem: Problem) -> Terms:
        """Estimated seconds for `problem`, as coefficients of its lengths."""
        return self.cost(problem.device).terms(problem, **self._visits(problem))

    def quantities(self, problem: Problem) -> dict[str, float]:
        """How often each constant of its Cost is taken for `problem`."""
        return {name: terms.seconds(problem) for name, terms in quantities(problem, **self._visits(problem)).items()}

    def _visits(self, problem: Problem) -> dict[str, Any]:
        bias = problem.bias
        skips = bias is not None and bias.mask is not None and covers(self.skips, bias.mask)
        dense = bias is not None and any(isinstance(part, TensorBias) for part in bias.scores)
        return {"skips": skips, "dense_bias": dense, "work": None if self.work is None else self.work(problem)}


def resolve(kernel: Kernel) -> Run:
    """The function behind `kernel.run`, imported where it was given by name.

    Raises DeclarationError where the name leads nowhere or the function's signature does not fit.
    """
    if callable(kernel.run):
        return kernel.run
    module, _, function = kernel.run.partition(":")
    try:
        run = getattr(import_module(module), function)
    except (ImportError, OSError, AttributeError) as error:
        raise DeclarationError(f"{kernel.name}: run {kernel.run!r} cannot be loaded: {error}") from error
    check_signature(kernel, run)
    return run  # type: ignore[no-any-return]


def check_signature(kernel: Kernel, run: Run | None = None) -> None:
    """Raises DeclarationError unless `run` can take every keyword that the declaration makes the core pass."""
    name = kernel.name
    run = run or kernel.run  # type: ignore[assignment]
    assert callable(run)

    def declares(field: str) -> bool:
        return any(getattr(capabilities, field) for capabilities in kernel.declarations)

    parameters = inspect.signature(run).parameters
    kinds = [p.kind for p in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        raise DeclarationError(f"{name}: run has a catch-all parameter; name what it takes, so that nothing can vanish")
    needed = ["scale"]
    needed += ["bias"] if declares("biases") else []
    needed += [option for option in ("softcap", "return_lse") if declares(option)]
    needed += ["dropout_p"] if declares("dropout") else []
    missing = [option for option in needed if option not in parameters]
    if missing:
        raise DeclarationError(
            f"{name}: its declaration needs run(query, key, value, *, {', '.join(needed)}),"
            f" but run{inspect.signature(run)} lacks {', '.join(missing)}"
        )
    required = [
        p.name for p in list(parameters.values())[3:] if p.default is inspect.Parameter.empty and p.name != "scale"
    ]
    if len(parameters) < 4 or required:
        lacking = f"; without a default: {', '.join(required)}" if required else ""
        raise DeclarationError(
            f"{name}: run must be run(query, key, value, *, scale, …) with defaults for the options{lacking}"
        )
