"""A pair of xFormers' operators as a kernel of attn.

What a kernel declares is read before its library may be imported, and what these operators can do only they know. So a
kernel declares the widest at first; once it was weighed, and xFormers with it imported, what the classes say counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attn_core import AttnBias, Capabilities, Causal, Cost, Kernel, Problem, Refusal, Segments, Unusable, Window
from torch import Tensor

from . import asked, limits, read, reasons
from .forms import Form, forms
from .operators import Manners, Operator, Pair

#: Masks of which no operator but Triton's visits what they leave out.
SKIPPED: frozenset[type[AttnBias]] = frozenset({Causal, Window, Segments})


@dataclass(frozen=True, kw_only=True)
class OperatorKernel(Kernel):
    """A kernel whose declaration is what its operators say, as soon as these are there.

    Args:
        pair: its operators; None before xFormers was imported.
    """

    pair: Callable[[], Pair | None]

    @property
    def declarations(self) -> tuple[Capabilities, ...]:
        pair = self.pair()
        return super().declarations if pair is None else (read.capabilities(pair),)

    def declaration(self, problem: Problem) -> Capabilities:
        """What the operators can do with operands of this dtype, on this device."""
        pair = self.pair()
        if pair is None:
            return super().declaration(problem)
        return read.capabilities(pair, problem.dtype, problem.device, problem.compute_capability)


def of_operator(operator: Operator, costs: Mapping[str, Cost]) -> Kernel:
    """The kernel of an operator of the installed xFormers, which need not be imported."""
    return _kernel(
        f"xformers/{operator.name}",
        operator.pair,
        operator.pair_if_imported,
        operator.probe,
        read.widest(operator.backward is not None, operator.manners),
        costs,
        frozenset() if operator.module == "triton_splitk" else SKIPPED,
    )


def kernel_of(
    name: str,
    forward: Any,
    backward: Any = None,
    *,
    manners: Manners | None = None,
    costs: Mapping[str, Cost] | None = None,
) -> Kernel:
    """A kernel of any pair of xFormers' operators, your own too: `attn_core.register(kernel_of(...))`.

    Args:
        name: `<prefix>/<kernel>`, such as "mine/splitk-8".
        forward: a class derived from xFormers' `AttentionFwOpBase`. What the kernel can do is read from it.
        backward: one derived from `AttentionBwOpBase`, whose VARLEN_LSE_PACKED is the forward's; None: no gradients.
        manners: what the operators do at the edges; None: nothing is known, so that nothing is relied upon.
        costs: device type -> Cost; None: as if nothing were known of its speed.

    Raises DeclarationError for a name that is none, ValueError for operators that do not go together.
    """
    if backward is not None and backward.VARLEN_LSE_PACKED != forward.VARLEN_LSE_PACKED:
        raise ValueError(
            f"kernel_of: backward {backward.NAME} takes an LSE of documents that is"
            f" {'packed' if backward.VARLEN_LSE_PACKED else 'padded'}, and forward {forward.NAME} gives the other"
        )
    pair = Pair(forward, backward, manners or Manners())
    declared = read.capabilities(pair)
    return _kernel(name, lambda: pair, lambda: pair, None, declared, costs or {}, frozenset())


def _kernel(
    name: str,
    pair: Callable[[], Pair],
    pair_if_imported: Callable[[], Pair | None],
    probe: Callable[[], Unusable | None] | None,
    declared: Capabilities,
    costs: Mapping[str, Cost],
    skips: frozenset[type[AttnBias]],
) -> Kernel:
    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        bias: AttnBias | None = None,
        scale: float,
        dropout_p: float = 0.0,
        return_lse: bool = False,
    ) -> Any:
        from .run import run

        return run(pair(), query, key, value, bias, scale, dropout_p, return_lse)

    return OperatorKernel(
        name=name,
        run=run,
        capabilities=declared,
        pair=pair_if_imported,
        refuse=lambda problem: refusals(pair(), problem),
        probe=probe,
        costs=costs,
        skips=skips,
    )


def refusals(pair: Pair, problem: Problem) -> Iterator[Refusal]:
    """Why the operators do not take a problem that their declaration covers."""
    found = list(limits.refusals(problem, pair.manners))
    where = asked.device_of(problem.device, problem.compute_capability)
    yield from found
    if where is not None and not any(refusal.field == "bias" for refusal in found):
        yield from asked_of(pair, problem, where)


def asked_of(pair: Pair, problem: Problem, where: Any) -> Iterator[Refusal]:
    """What the operators themselves say, of the form of the bias of which they say least."""
    training = problem.needs_backward
    scale = asked.scale_of(problem.scale, problem.head_dim)
    candidates = forms(problem.bias, problem.batch, problem.seqlen_q, problem.seqlen_kv)
    possible = [form for form in candidates if asked.allowed(pair, form, training)]
    said: list[list[Refusal]] = []
    for form in possible:
        try:
            operands = asked.stand_ins(problem, form, where)
        except (ValueError, RuntimeError) as error:
            text = f"xFormers' {form.kind} takes no such lengths: {' '.join(str(error).split())}"
            said.append([Refusal("bias", text)])
            continue
        against = list(
            reasons.refusals(pair.forward.NAME, _reasons(pair.forward, operands, problem, scale), backward=False)
        )
        if training:
            own = _reasons(pair.backward, operands, problem, scale)
            against += reasons.refusals(pair.backward.NAME, own, backward=True)
        if not against:
            return
        said.append(against)
    if said:
        yield from min(said, key=len)
    else:
        yield _no_form(pair, problem, list(_all(problem)))


def _reasons(operator: Any, operands: Any, problem: Problem, scale: float | None) -> list[str]:
    return asked.reasons(operator, operands, problem.dropout_p, scale)


def _all(problem: Problem) -> Iterator[Form]:
    return forms(problem.bias, problem.batch, problem.seqlen_q, problem.seqlen_kv)


def _no_form(pair: Pair, problem: Problem, known: list[Form]) -> Refusal:
    """That no class says this bias, or none of those that the operators take."""
    if not known:
        return Refusal("bias", f"no bias object of xFormers says {problem.bias!r}")
    names = ", ".join(dict.fromkeys(form.kind for form in known))
    for_forward = any(asked.allowed(pair, form, False) for form in known)
    operator = pair.backward if for_forward else pair.forward
    field = "backward.biases" if for_forward else "bias"
    return Refusal(field, f"{operator.NAME} takes none of {names}, which say {problem.bias!r}")
