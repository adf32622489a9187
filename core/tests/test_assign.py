"""assign(): modules of a model prefer kernels by name, in eager calls and compiled ones, until it is taken back."""

import copy
import inspect
import pickle
import threading
import warnings

import pytest
import torch
from attn_core import (
    InputError,
    InputTypeError,
    KernelRefusedError,
    UnknownKernelError,
    assign,
    attention,
    prefer,
    record,
)
from attn_core.scope import current, mirror
from torch import nn


class Attn(nn.Module):
    def __init__(self, softcap=None):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.softcap = softcap

    def forward(self, x, scale: float | None = None):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return attention(query, key, value, scale=scale, softcap=self.softcap).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attn = Attn()

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Model(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.head = Attn()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


X = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
MATH, REFERENCE, FLASH = "torch/math", "torch/reference", "torch/flash"
STOCK = FLASH  # what is chosen here without a preference


def ran(model, x=X):
    """The kernel of each attention module, by order of their calls."""
    kernels = []

    def look(module, args, output):
        kernels.append(calls.kernels)

    modules = [each for each in model.modules() if isinstance(each, Attn)]
    hooks = [each.register_forward_hook(look) for each in modules]
    with record() as calls:
        model(x)
    for hook in hooks:
        hook.remove()
    names, before = [], {}
    for counts in kernels:
        [name] = [name for name in counts if counts[name] > before.get(name, 0)]
        names.append(name)
        before = counts
    return names


def untouched(model):
    return all("forward" not in module.__dict__ for module in model.modules())


# Which modules


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.1", [STOCK, MATH, STOCK, STOCK]),
        ("blocks.1.attn", [STOCK, MATH, STOCK, STOCK]),
        ("blocks.0-1.*", [MATH, MATH, STOCK, STOCK]),
        ("blocks.1-7", [STOCK, MATH, MATH, STOCK]),
        ("blocks.?.attn", [MATH, MATH, MATH, STOCK]),
        ("*.attn", [MATH, MATH, MATH, STOCK]),
        ("h*", [STOCK, STOCK, STOCK, MATH]),
        ("blocks", [MATH, MATH, MATH, STOCK]),  # a container that nobody calls
        ("*", [MATH] * 4),
        ("", [MATH] * 4),
    ],
)
def test_a_module_that_matches_runs_by_its_kernel_and_no_other(model, pattern, expected):
    with assign(model, {pattern: MATH}):
        assert ran(model) == expected
    assert ran(model) == [STOCK] * 4
    assert untouched(model)


def test_a_range_is_of_whole_numbers():
    model = Model(12)
    with assign(model, {"*.0-1": MATH}):
        assert ran(model) == [MATH] * 2 + [STOCK] * 11
    with assign(model, {"blocks.9-11": MATH}):
        assert ran(model) == [STOCK] * 9 + [MATH] * 3 + [STOCK]


def test_the_result_is_that_of_the_kernel(model):
    stock = model(X)
    with assign(model, {"*": REFERENCE}):
        assert torch.allclose(model(X), stock, atol=1e-5)
    assert model(X).equal(stock)


def test_what_was_assigned_is_told(model):
    given = assign(model, {"blocks.0-1": MATH, "blocks.1": (REFERENCE, "torch/fl*")})
    assert given.modules == {"blocks.0": (MATH,), "blocks.1": (REFERENCE, "torch/fl*", MATH)}
    assert str(given) == "blocks.0: torch/math\nblocks.1: torch/reference, torch/fl*, torch/math"


def test_several_kernels_are_preferred_in_their_order(model):
    with assign(model, {"blocks.0": ("torch/cudnn", MATH, REFERENCE)}):  # the first cannot run here
        assert ran(model)[0] == MATH


# Several


def test_the_innermost_module_wins_whatever_the_order(model):
    for choices in (
        {"blocks.1.attn": REFERENCE, "blocks.*": MATH, "*": FLASH},
        {"*": FLASH, "blocks.*": MATH, "blocks.1.attn": REFERENCE},
    ):
        with assign(model, choices):
            assert ran(model) == [MATH, REFERENCE, MATH, FLASH]


def test_a_wide_pattern_does_not_reach_into_a_module_with_a_choice_of_its_own(model):
    with assign(model, {"*": MATH, "blocks.0": REFERENCE}):
        assert ran(model) == [REFERENCE, MATH, MATH, MATH]


def test_of_two_choices_for_one_module_the_later_wins_and_the_other_is_next(model):
    with assign(model, {"blocks.0": MATH, "blocks.0-1": REFERENCE}):
        assert ran(model)[:2] == [REFERENCE, REFERENCE]
    with assign(model, {"blocks.0": MATH, "blocks.?": "torch/cudnn"}):
        assert ran(model)[0] == MATH


def test_of_two_assignments_the_later_wins_and_either_may_go_first(model):
    first, second = assign(model, {"blocks.*": MATH}), assign(model, {"blocks.0": REFERENCE})
    assert ran(model) == [REFERENCE, MATH, MATH, STOCK]
    first.remove()
    assert ran(model) == [REFERENCE, STOCK, STOCK, STOCK]
    third = assign(model, {"blocks.0": MATH})
    assert ran(model)[0] == MATH
    third.remove()
    assert ran(model)[0] == REFERENCE
    second.remove()
    second.remove()
    assert ran(model) == [STOCK] * 4
    assert untouched(model)


def test_it_is_within_the_scope_around_the_model(model):
    with prefer(REFERENCE), assign(model, {"blocks.0": MATH}):
        assert ran(model) == [MATH, REFERENCE, REFERENCE, REFERENCE]
    with prefer(REFERENCE), assign(model, {"blocks.0": "torch/cudnn"}):
        assert ran(model)[0] == REFERENCE


def test_a_shared_module_has_the_choices_of_all_its_names_once(model):
    model.tail = model.head
    given = assign(model, {"head": MATH, "tail": REFERENCE})
    assert ran(model)[-1] == REFERENCE
    assert len(model.head.forward.entries) == 2
    given.remove()
    with assign(model, {"*": MATH, "tail": REFERENCE}):
        assert ran(model)[-1] == REFERENCE


# What is wrong


def test_a_pattern_that_matches_no_module_is_an_error_with_near_names_and_changes_nothing(model):
    with pytest.raises(InputError, match=r"assign: no module matches 'blocks.1.atn'.*Did you mean 'blocks.1.attn'"):
        assign(model, {"blocks.0": MATH, "blocks.1.atn": MATH})
    assert untouched(model)


def test_a_pattern_of_modules_that_run_no_attention_is_an_error(model):
    told = r"assign: '\*\.qkv' matches only modules that run no attention: blocks\.0\.attn\.qkv \(Linear\), "
    with pytest.raises(InputError, match=told):
        assign(model, {"*.qkv": MATH})


def test_an_unknown_kernel_is_an_error_that_suggests_near_ones(model):
    with pytest.raises(UnknownKernelError, match="Did you mean 'torch/math'"):
        assign(model, {"*": "torch/mth"})
    assert untouched(model)


@pytest.mark.parametrize(
    ("choices", "error", "told"),
    [
        ({}, InputError, "takes {module pattern: kernel pattern}, got {}"),
        ([("blocks.0", MATH)], InputError, "takes {module pattern: kernel pattern}"),
        ({"blocks.0": ()}, InputError, "'blocks.0' has no kernel pattern"),
        ({"blocks.3-1": MATH}, InputError, "'blocks.3-1' has a range that goes down: 3-1"),
        ({0: MATH}, InputTypeError, "a module pattern is text, got 0"),
        ({"blocks.0": (MATH, 3)}, InputTypeError, "takes kernel name patterns, got 3"),
    ],
)
def test_what_is_no_choice_is_an_error(model, choices, error, told):
    with pytest.raises(error) as caught:
        assign(model, choices)
    assert told in str(caught.value)
    assert untouched(model)


def test_what_is_no_module_is_an_error(model):
    with pytest.raises(InputTypeError, match="assign: takes a module, got function"):
        assign(ran, {"*": MATH})
    with pytest.raises(InputError, match="DistributedDataParallel"):
        assign(nn.DataParallel(model), {"*": MATH})


# Errors in a forward


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_the_scope_ends_where_a_forward_raises_or_is_interrupted(model, kind):
    def raises(*args):
        assert current.get().settings.prefer == mirror.said.prefer == (MATH,)
        raise kind

    model.blocks[1].attn.qkv.register_forward_pre_hook(raises)
    with assign(model, {"blocks.*": MATH}), pytest.raises(kind):
        model(X)
    assert current.get().settings.prefer == mirror.said.prefer == ()


def test_strict_raises_at_once_with_the_innermost_module_s_name(model):
    model.blocks[1].attn.softcap = 3.0  # flash refuses it
    choices = {"blocks.*": FLASH, "*.attn": FLASH}
    with assign(model, choices, strict=True), pytest.raises(KernelRefusedError) as caught:
        model(X)
    assert str(caught.value).startswith("blocks.1.attn (")
    assert "prefer('torch/flash', strict=True): none of these takes" in str(caught.value).splitlines()[0]
    assert "softcap" in str(caught.value)
    assert current.get().settings.only == ()
    with assign(model, {"blocks.*": FLASH}):  # not strict: another takes it
        assert ran(model)[1] not in (FLASH, STOCK)


def test_strict_holds_within_its_modules_alone(model):
    model.head.softcap = 3.0
    with assign(model, {"blocks.*": FLASH}, strict=True):
        assert ran(model)[:3] == [FLASH] * 3


# What else a model goes through


def test_a_deep_copy_keeps_it_apart_from_the_model(model):
    given = assign(model, {"blocks.0": MATH})
    twin = copy.deepcopy(model)
    twin.blocks[0].attn.qkv.weight.data.zero_()
    assert not twin(X).equal(model(X))  # it runs itself, not the model
    given.remove()
    assert ran(model)[0] == STOCK
    assert ran(twin)[0] == MATH
    given.remove(twin)
    assert ran(twin)[0] == STOCK
    assert untouched(twin)


def test_a_copy_of_one_block_does_not_copy_the_model(model):
    assign(model, {"blocks.0": MATH})
    block = copy.deepcopy(model.blocks[0])
    assert block.forward.module is block
    assert set(vars(block.forward)) == {"module", "before", "entries", "scopes"}


def test_a_model_is_pickled_with_it(model):
    assign(model, {"blocks.0": MATH})
    again = pickle.loads(pickle.dumps(model))
    assert ran(again) == [MATH, STOCK, STOCK, STOCK]


def test_parameters_hooks_and_the_signature_are_those_of_the_module(model):
    state, seen = set(model.state_dict()), []
    model.head.register_forward_hook(lambda *args: seen.append(1))
    signature = inspect.signature(model.head.forward)
    with assign(model, {"*": MATH, "head": REFERENCE}):
        assert set(model.state_dict()) == state
        assert inspect.signature(model.head.forward) == signature
        assert model.head(X, scale=0.5).shape == X.shape
        model(X)
    assert seen == [1, 1]


def test_a_forward_that_someone_put_on_the_module_before_or_after_is_kept(model):
    stock, counted = model.head.forward, []

    def theirs(x):
        counted.append(1)
        return stock(x)

    model.head.forward = theirs
    given = assign(model, {"head": MATH})
    assert ran(model)[-1] == MATH
    assert counted == [1]
    ours = model.head.forward
    model.head.forward = lambda x: ours(x)
    after = model.head.forward
    given.remove()
    assert model.head.forward is after
    assert ran(model)[-1] == STOCK
    assert counted == [1, 1]


def test_gradients_are_those_of_stock(model):
    model(X).square().sum().backward()
    stock = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with assign(model, {"blocks.*": MATH}):
        model(X).square().sum().backward()
    for got, want in zip((p.grad for p in model.parameters()), stock):
        torch.testing.assert_close(got, want)


def test_threads_that_run_one_model_at_once_run_it_alike(model):
    seen, barrier = [], threading.Barrier(4)

    def work():
        with record() as calls:
            for _ in range(10):
                barrier.wait()
                model(X)
        seen.append(calls.kernels)

    with assign(model, {"blocks.0-1": MATH}):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [{MATH: 20, STOCK: 20}] * 4


def test_nothing_warns(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with assign(model, {"*": "torch/*"}):
            model(X)


# Compile


@pytest.fixture
def compiled(model):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    yield torch.compile(model, backend=backend, fullgraph=True), graphs
    torch._dynamo.reset()


def traced(compiled):
    with record() as calls:
        compiled(X)
    return {row.kernel for row in calls}


def test_a_compiled_model_is_one_graph_and_notices_what_is_assigned_and_taken_back(model, compiled):
    run, graphs = compiled
    stock = run(X)
    given = assign(model, {"blocks.0-1": MATH})
    assert traced(run) == {MATH, STOCK}
    assert torch.allclose(run(X), stock, atol=1e-5)
    assert len(graphs) == 2
    given.remove()
    with prefer(REFERENCE):
        assert traced(run) == {REFERENCE}
    run(X)
    assert len(graphs) == 3
    assert mirror.said.prefer == ()


def test_a_model_that_was_assigned_before_compiles_and_the_compiled_one_may_be_assigned(model, compiled):
    run, _graphs = compiled
    with assign(run, {"blocks.*": MATH, "blocks.1": REFERENCE}):
        assert traced(run) == {MATH, REFERENCE, STOCK}


def test_strict_raises_in_a_compiled_model_too(model, compiled):
    run, _graphs = compiled
    model.head.softcap = 3.0
    with (
        assign(model, {"head": FLASH}, strict=True),
        pytest.raises(Exception, match="none of these takes this problem"),
    ):
        run(X)
    assert mirror.said.only == ()
