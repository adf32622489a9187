"""Does it keep to the contract? What holds for every kernel, whatever its numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..testing.differences import by_reference, results_of, trained
from ..testing.problems import Inputs
from .cases import BATCH, Case
from .checks import a_few, check, once
from .results import CheckFailed, NotTestable
from .subject import SEED, Subject, deterministic

NAN = float("nan")
#: Cycles for which a stream is kept busy, some 30 ms: in that time work of another stream overtakes it.
SLEEP = 50_000_000


def _operands(inputs: Inputs) -> dict[str, Tensor]:
    held = {} if inputs.bias is None else inputs.bias.held()
    named = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "grad_out": inputs.grad_out}
    return named | {f"bias.{name}": tensor for name, tensor in held.items()}


@check("contract", a_few)
def leaves_its_operands_alone(subject: Subject, case: Case) -> None:
    """Operands, bias and incoming gradient hold the same numbers afterwards."""
    subject.must_take(case)
    inputs = case.inputs(SEED)
    before = {name: tensor.detach().clone() for name, tensor in _operands(inputs).items()}
    results_of(subject.call, case.problem, inputs)
    changed = [name for name, tensor in _operands(inputs).items() if not _same(tensor, before[name])]
    if changed:
        raise CheckFailed(f"it wrote into {', '.join(changed)}")


def _of_each_dtype(subject: Subject) -> list[Case]:
    return [*a_few(subject), *[case for case in subject.taken if case.label.startswith("dtype ")]]


@check("contract", _of_each_dtype, ("return_lse",))
def returns_what_was_asked_for(subject: Subject, case: Case) -> None:
    """Shape, dtype and device of out and LSE are those of the contract, and so are those of the gradients."""
    subject.must_take(case)
    problem = case.problem
    if subject.declared.return_lse and subject.takes(replace(problem, return_lse=True)):
        problem = replace(problem, return_lse=True)
    inputs = replace(case, problem=problem).inputs(SEED)
    p, wide = problem, torch.float64 if problem.dtype is torch.float64 else torch.float32
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "out": ((p.batch, p.seqlen_q, p.num_heads, p.head_dim_v), p.dtype),
        "lse": ((p.batch, p.num_heads, p.seqlen_q), wide),
        "dq": (tuple(inputs.query.shape), p.dtype),
        "dk": (tuple(inputs.key.shape), p.dtype),
        "dv": (tuple(inputs.value.shape), p.dtype),
    }
    expected |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in trained(inputs.bias).items()}
    results = results_of(subject.call, problem, inputs)
    if problem.return_lse and "lse" not in results:
        raise CheckFailed("it was asked for the LSE and returned none")
    for name, tensor in results.items():
        shape, dtype = expected[name]
        if (tuple(tensor.shape), tensor.dtype, tensor.device.type) != (shape, dtype, subject.device):
            got = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device.type}"
            raise CheckFailed(f"{name} must be {list(shape)} {dtype} on {subject.device}, got {got}")


@check("contract", a_few)
def reads_only_its_operands(subject: Subject, case: Case) -> None:
    """Operands that are cut out of storage full of NaN give the same result: nothing around them is read."""
    subject.must_take(case)
    inputs = case.inputs(SEED)
    cut = replace(inputs, query=_cut_out(inputs.query), key=_cut_out(inputs.key), value=_cut_out(inputs.value))
    wanted, got = (results_of(subject.call, case.problem, each) for each in (inputs, cut))
    for name, tensor in got.items():
        if bool(tensor.isnan().any()) and not bool(wanted[name].isnan().any()):
            raise CheckFailed(f"{name} is NaN where operands lie in storage full of NaN: it reads beside them")
        if not torch.allclose(tensor.double(), wanted[name].double(), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise CheckFailed(f"{name} differs where operands are slices of a wider storage: it mistakes their strides")


def _cut_out(tensor: Tensor) -> Tensor:
    """The same numbers within a storage of NaN, as wide again in every dimension but the last."""
    batch, seqlen, heads, dim = tensor.shape
    storage = torch.full((batch, seqlen + 6, heads + 2, dim + 16), NAN, dtype=tensor.dtype, device=tensor.device)
    with torch.no_grad():
        storage[:, 3:-3, 1:-1, 8:-8] = tensor
    return storage[:, 3:-3, 1:-1, 8:-8].detach().requires_grad_(tensor.requires_grad)


@check("contract", a_few, ("deterministic", "backward.deterministic"))
def repeats_itself(subject: Subject, case: Case) -> None:
    """Under deterministic algorithms, three runs are equal to the bit."""
    problem = replace(case.problem, deterministic=True)
    if not subject.declared.deterministic:
        raise NotTestable("it is not declared deterministic")
    if not subject.takes(problem):
        problem = replace(problem, requires_grad=False, bias_requires_grad=False)
    if not subject.takes(problem):
        raise NotTestable(f"its own limits refuse it: {'; '.join(map(str, subject.kernel.refusals(problem)))}")
    inputs = replace(case, problem=problem).inputs(SEED)
    with deterministic(True):
        first, *others = (results_of(subject.call, problem, inputs) for _ in range(3))
    for other in others:
        differing = [name for name in first if not _same(first[name], other[name])]
        if differing:
            raise CheckFailed(f"declared deterministic, but {', '.join(differing)} differ between runs")


@check("contract", a_few, ("batch_invariant",))
def entries_do_not_depend_on_each_other(subject: Subject, case: Case) -> None:
    """A batch entry by itself gives what it gives among others, to the bit."""
    if not subject.declared.batch_invariant:
        raise NotTestable("it is not declared batch invariant")
    subject.must_take(case)
    inputs = case.inputs(SEED)
    if inputs.bias is not None and inputs.bias.batch_and_heads[0] != 1:
        raise NotTestable("the bias has an entry for each of the batch")
    with torch.no_grad():
        whole = subject.out(inputs)
        for entry in range(BATCH):
            alone = {name: getattr(inputs, name)[entry : entry + 1] for name in ("query", "key", "value")}
            if not _same(subject.out(replace(inputs, **alone)), whole[entry : entry + 1]):
                raise CheckFailed(f"declared batch invariant, but entry {entry} differs when it is alone")


def _padded(subject: Subject) -> list[Case]:
    """Two for each kind of bias that has padding."""
    kinds: dict[object, list[Case]] = {}
    for case in subject.taken:
        if case.problem.bias is not None and case.problem.bias.has_padding:
            kinds.setdefault(type(case.problem.bias), []).append(case)
    return [case for cases in kinds.values() for case in cases[:2]]


@check("contract", _padded, ("biases",))
def never_reads_padding(subject: Subject, case: Case) -> None:
    """Keys and values behind the lengths may be NaN: it reaches neither results nor gradients."""
    inputs = case.inputs(SEED)
    exist = _keys_that_exist(inputs)
    if exist is None or bool(exist.all()):
        raise NotTestable("no key of this case is padding")
    gone = ~exist[:, :, None, None]
    poisoned = {
        name: getattr(inputs, name).detach().masked_fill(gone, NAN).requires_grad_(case.problem.requires_grad)
        for name in ("key", "value")
    }
    for name, tensor in results_of(subject.call, case.problem, replace(inputs, **poisoned)).items():
        read = tensor[~gone.expand_as(tensor)] if name in ("dk", "dv") else tensor
        if bool(read.isnan().any()):
            raise CheckFailed(f"{name} is NaN where padding is NaN")


def _keys_that_exist(inputs: Inputs) -> Tensor | None:
    """Over the first two dimensions of key: which rows are a key at all; in pages, of any sequence."""
    assert inputs.bias is not None
    valid, pages = inputs.bias.valid_keys(inputs.key.device), inputs.bias.paged
    if valid is None or pages is None:
        return valid
    table = pages.page_table.to(valid.device, torch.int64)
    rows = table[:, :, None] * pages.page_size + torch.arange(pages.page_size, device=valid.device)
    exist = torch.zeros(inputs.key.shape[:2], dtype=torch.bool, device=valid.device)
    exist.view(-1)[rows.reshape(valid.shape)[valid]] = True
    return exist


def _with_empty_rows(subject: Subject) -> list[Case]:
    """Two for each type of bias, declared kind and lengths."""
    kinds: dict[object, list[Case]] = {}
    for case in subject.taken:
        bias = case.problem.bias
        if bias is not None and case.label.startswith("bias ") and _may_mask_a_query(case):
            alike = case.proves, type(bias), case.problem.seqlen_q, case.problem.seqlen_kv
            kinds.setdefault(alike, []).append(case)
    return [case for cases in kinds.values() for case in cases[:2]]


def _may_mask_a_query(case: Case) -> bool:
    """Whether some query may see no key. Of a mask that is given it is seen; what is drawn is drawn so."""
    mask = None if case.bias is None else case.bias.mask
    return mask is None or not bool(mask.materialize().any(-1).all())


@check("contract", _with_empty_rows, ("biases", "return_lse"))
def a_query_without_keys_gets_zeros(subject: Subject, case: Case) -> None:
    """Output exactly 0, LSE -inf and gradient exactly 0 for a row in which nothing may be attended."""
    problem = case.problem
    if subject.takes(replace(problem, return_lse=True)):
        problem = replace(problem, return_lse=True)
    inputs = replace(case, problem=problem).inputs(SEED)
    _, lse = by_reference(replace(inputs, options={"scale": problem.scale}))
    empty = lse.isneginf()
    if not bool(empty.any()):
        raise NotTestable("every query of this case sees a key")
    results = results_of(subject.call, problem, inputs)
    of_query = empty.transpose(1, 2).unsqueeze(-1)
    for name in ("out", "dq"):
        if name in results:
            row = results[name].masked_select(of_query.expand_as(results[name]))
            if not bool((row == 0).all()):
                raise CheckFailed(f"{name} of a query without keys must be 0, got {row[row != 0][0].item():g}")
    if "lse" in results and not bool(results["lse"][empty].isneginf().all()):
        raise CheckFailed(f"LSE of a query without keys must be -inf, got {results['lse'][empty][0].item():g}")
    for name, tensor in results.items():
        if name != "lse" and not bool(torch.isfinite(tensor).all()):
            raise CheckFailed(f"{name} is not finite where a query sees no key")


def _trained_once(subject: Subject) -> list[Case]:
    """The plain problem, with a backward where the kernel takes it so."""
    trained = replace(subject.base, requires_grad=True)
    return [Case(label="", problem=trained if subject.takes(trained) else subject.base)]


def streams_of(device: str) -> Any:
    """What has `Stream`, `stream`, `synchronize` and `_sleep` for a type of device; None where it has no streams."""
    return torch.cuda if device == "cuda" else None


@check("contract", _trained_once)
def runs_in_the_current_stream(subject: Subject, case: Case) -> None:
    """On CUDA, its work is queued in the caller's stream, forward and backward."""
    streams = streams_of(subject.device)
    if streams is None:
        raise NotTestable(f"{subject.device} has no streams")
    inputs = case.inputs(SEED)
    wanted = results_of(subject.call, case.problem, inputs)
    late = {name: torch.zeros_like(getattr(inputs, name)) for name in ("query", "grad_out")}
    stream = streams.Stream()

    def written_late(name: str) -> Tensor:
        """The operand, in memory that holds zeros until the stream has slept; work of another stream overtakes that."""
        streams._sleep(SLEEP)
        with torch.no_grad():
            return late[name].copy_(getattr(inputs, name))

    streams.synchronize()
    with streams.stream(stream):
        query = written_late("query").requires_grad_(case.problem.requires_grad)
        result = subject.run(replace(inputs, query=query))
        out = result[0] if isinstance(result, tuple) else result
    streams.synchronize()  # the backward is judged by itself: its own operand is late, no other
    _must_agree("out", out, wanted["out"], "in another stream it reads its operands before they are written")
    if not case.problem.requires_grad:
        return
    operands = query, inputs.key, inputs.value
    with streams.stream(stream):
        gradients = torch.autograd.grad(out, operands, written_late("grad_out").to(out.dtype))
    streams.synchronize()
    for name, got in zip(("dq", "dk", "dv"), gradients):
        _must_agree(name, got, wanted[name], "in another stream its backward reads the gradient before it is written")


def _must_agree(name: str, got: Tensor, want: Tensor, otherwise: str) -> None:
    if not torch.allclose(got.double(), want.double(), rtol=1e-2, atol=1e-2):
        raise CheckFailed(f"{name}: {otherwise}")


@check("contract", once, ("forward_ad",))
def pushes_derivatives_forward(subject: Subject, case: Case) -> None:
    """`torch.func.jvp` gives the directional derivative of the reference."""
    if not subject.declared.forward_ad:
        raise NotTestable("it declares no forward-mode derivative")
    inputs = case.inputs(SEED)
    operands = tuple(tensor.detach() for tensor in (inputs.query, inputs.key, inputs.value))
    directions = tuple(tensor.flip(1) for tensor in operands)

    def ours(*given: Tensor) -> Tensor:
        return subject.out(replace(inputs, query=given[0], key=given[1], value=given[2]))

    def exact(*given: Tensor) -> Tensor:
        return by_reference(replace(inputs, query=given[0], key=given[1], value=given[2]))[0]  # type: ignore[no-any-return]

    got = torch.func.jvp(ours, operands, directions)[1]
    wide = tuple(tensor.double() for tensor in operands), tuple(tensor.double() for tensor in directions)
    _near("the derivative", got, torch.func.jvp(exact, *wide)[1])


@check("contract", once, ("backward.double",))
def is_differentiable_twice(subject: Subject, case: Case) -> None:
    """The gradient of the gradient is the reference's."""
    if subject.backward is None or not subject.backward.double:
        raise NotTestable("it declares no double backward")
    inputs = replace(case, problem=replace(case.problem, requires_grad=True)).inputs(SEED)

    def twice(call: Any, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        query, key, value = operands
        result = call(replace(inputs, query=query, key=key, value=value))
        out = result[0] if isinstance(result, tuple) else result
        first = torch.autograd.grad((out * inputs.grad_out).sum(), operands, create_graph=True)
        return torch.autograd.grad(torch.stack([grad.square().sum() for grad in first]).sum(), operands)

    operands = inputs.query, inputs.key, inputs.value
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in operands)
    for name, got, want in zip(("query", "key", "value"), twice(subject.call, operands), twice(by_reference, wide)):
        _near(f"the second derivative to {name}", got, want)


def _to_trace(subject: Subject) -> list[Case]:
    """One without a bias, and of each declared kind of bias one that holds tensors and one that holds none.

    Tracing takes a second or more; biases that reach a kernel by one declaration differ for the core, not for it.
    """
    plain = a_few(subject)[0]
    with_lse = replace(plain, problem=replace(plain.problem, return_lse=True))
    biased = [case for case in subject.taken if case.label.startswith("bias ")]
    kinds: dict[object, Case] = {}
    for case in sorted(biased, key=lambda case: not subject.takes(replace(case.problem, compiling=True))):
        assert case.problem.bias is not None
        kinds.setdefault((case.proves, bool(case.problem.bias.held())), case)
    return [with_lse if subject.takes(with_lse.problem) else plain, *kinds.values()]


@check("contract", _to_trace, ("compile",))
def can_be_traced(subject: Subject, case: Case) -> None:
    """torch.compile takes it whole, and the graph gives what the call gives, gradients too."""
    if not subject.declared.compile:
        raise NotTestable("it does not declare that it can be traced")
    problem = replace(case.problem, compiling=True)
    if not subject.takes(problem):
        raise NotTestable(f"its own limits refuse it: {'; '.join(map(str, subject.kernel.refusals(problem)))}")
    subject.must_take(case)
    inputs = case.inputs(SEED)
    torch._dynamo.reset()

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Any:
        return subject.run(replace(inputs, query=query, key=key, value=value, bias=bias))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    wanted = results_of(subject.call, case.problem, inputs)
    got = results_of(lambda x: compiled(x.query, x.key, x.value, x.bias), case.problem, inputs)
    for name, want in wanted.items():
        _near(f"{name} of the graph", got[name], want)


def _near(name: str, got: Tensor, want: Tensor) -> None:
    """Within a thousandth of the largest number, in half precision within a twentieth: there is no naive run beside."""
    got, want = got.detach(), want.detach()
    size = float(want.abs().max()) if want.numel() else 0.0
    part = 1e-3 if got.dtype in (torch.float32, torch.float64) else 5e-2
    error = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
    if not error <= part * size + 1e-6:
        raise CheckFailed(f"{name} is off by {error:.3g}, the largest number is {size:.3g}")


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return torch.equal(one.detach().nan_to_num(nan=12345.0), other.detach().nan_to_num(nan=12345.0))
