"""What is checked of each timm model: the same results by attn, the way back, and a report that is complete."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from attn_core import record
from attn_core.integrations import timm as attn_timm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def define_torchvision_ops() -> None:
    """Gives two operators of torchvision a schema, where it was built for another torch: else it cannot be imported.

    timm imports it for what it does with pictures, which the tests do not use.
    """
    if importlib.util.find_spec("torchvision") is None:
        return  # nor is timm there
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        _TORCHVISION.define("nms(Tensor dets, Tensor scores, float t) -> Tensor")
        _TORCHVISION.define("qnms(Tensor d, Tensor s, float t) -> Tensor")


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a model's output."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values if value is not None for tensor in tensors_of(value)]


@dataclass
class Outcome:
    """Outputs of one pass, and the gradient of every parameter that has one."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def run(model: nn.Module, *inputs: Any) -> Outcome:
    """Forward and backward; the loss weighs every output differently, so that no gradient cancels."""
    model.zero_grad(set_to_none=True)
    forget_kept_bias(model)
    outputs = [out for out in tensors_of(model(*inputs)) if out.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    loss = sum(((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs), torch.zeros(()))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Outcome([out.detach().clone() for out in outputs], gradients)


def forget_kept_bias(model: nn.Module) -> None:
    """Some modules keep their bias while they are in eval mode, with a graph that can be used only once."""
    if not model.training:
        model.train()
        model.eval()


def output_difference(ours: Outcome, stock: Outcome) -> float:
    """The largest difference of outputs, in units of the largest output where that is above 1."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
        for a, b in zip(ours.outputs, stock.outputs, strict=True)
    )


def gradient_difference(ours: Outcome, stock: Outcome, vanishing: set[str]) -> tuple[float, str]:
    """The largest difference of a gradient relative to stock's largest entry in the same parameter, and which it is.

    A `vanishing` gradient is 0 but for rounding (that of a bias of keys, for one), and has no size of its own: it is
    compared with the largest one in the model.
    """
    assert ours.gradients.keys() == stock.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in stock.gradients.values())
    worst = (0.0, "")
    for name, gradient in stock.gradients.items():
        difference = float((ours.gradients[name] - gradient).abs().max())
        size = largest if name in vanishing else float(gradient.abs().max())
        if difference > 0.0:
            worst = max(worst, (difference / size if size else float("inf"), name))
    return worst


def vanishing_gradients(model: nn.Module, *inputs: Any) -> set[str]:
    """Parameters whose gradient is 0 in float64, to a billionth of the largest one in the model."""
    forget_kept_bias(model)
    exact = run(copy.deepcopy(model).double(), *(x.double() for x in inputs))
    sizes = {name: float(gradient.abs().max()) for name, gradient in exact.gradients.items()}
    return {name for name, size in sizes.items() if size < 1e-9 * max(sizes.values())}


def bitwise(a: Outcome, b: Outcome) -> bool:
    return (
        all(map(torch.equal, a.outputs, b.outputs))
        and a.gradients.keys() == b.gradients.keys()
        and all(torch.equal(a.gradients[name], b.gradients[name]) for name in a.gradients)
    )


@contextmanager
def enabled(**options: Any) -> Iterator[None]:
    attn_timm.enable(**options)
    try:
        yield
    finally:
        attn_timm.disable()


class Softmaxes(TorchFunctionMode):
    """Notes which modules take a softmax or call torch's attention, each call by the innermost module it is in."""

    CALLS = ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.within: list[nn.Module] = []
        self.found: set[str] = set()

    def note(self) -> None:
        own = [
            module for module in self.within if not type(module).__module__.startswith("torch.nn.modules.activation")
        ]
        self.found.add(self.names[own[-1]])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.CALLS:
            self.note()
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator[None]:
        def enter(module: nn.Module, _: Any) -> None:
            self.within.append(module)

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            assert self.within.pop() is module

        hooks = torch.nn.modules.module
        handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def attending(model: nn.Module, *inputs: Any) -> set[str]:
    """Names of the modules that take a softmax or call torch's attention when the model runs."""
    seen = Softmaxes(model)
    with torch.no_grad(), seen.watching():
        model(*inputs)
    return seen.found


def redirected(model: nn.Module, *inputs: Any) -> set[str]:
    """Names of the modules from which attn is called when the model runs; timm is enabled meanwhile."""
    seen = Softmaxes(model)
    name = attn_timm.sites.RENAMED[attn_timm.sites.SDPA]
    ours: Callable[..., Tensor] = getattr(torch.nn.functional, name)

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        seen.note()
        return ours(*args, **kwargs)

    setattr(torch.nn.functional, name, noting)
    seen.CALLS = ()
    try:
        with torch.no_grad(), seen.watching():
            model(*inputs)
    finally:
        setattr(torch.nn.functional, name, ours)
    return seen.found


@dataclass
class Checked:
    """What was measured of one model."""

    name: str
    modules: int
    output: float
    gradient: float
    parameter: str
    kernels: dict[str, int] = field(default_factory=dict)


def check(arch: Any, model: nn.Module, images: Any) -> Checked:
    """Holds a model to all that is promised; raises AssertionError where something is not kept."""
    stock = run(model, images)
    again = run(model, images)
    assert bitwise(stock, again), "this model is not the same twice, so nothing can be said of it"
    vanishing = vanishing_gradients(model, images)
    attend = attending(model, images)

    with enabled():
        with record() as calls:
            ours = run(model, images)
        report = attn_timm.report(model)
        through_attn = redirected(model, images)

    assert attend <= {row.module for row in report}, "the report lacks modules"
    assert {row.module for row in report.redirected} & attend == through_attn, "the report is wrong"
    assert through_attn <= {row.module for row in report.redirected}
    assert all(row.reason for row in report.left_alone)
    assert bool(through_attn) == arch.redirected

    output = output_difference(ours, stock)
    gradient, parameter = gradient_difference(ours, stock, vanishing)
    assert output <= OUTPUT_TOLERANCE
    assert gradient <= GRADIENT_TOLERANCE, parameter

    assert bitwise(stock, run(model, images)), "disable() left something behind"
    return Checked(str(arch), len(through_attn), output, gradient, parameter, calls.kernels)
