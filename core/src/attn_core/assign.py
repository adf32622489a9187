"""assign(): which kernels the modules of a model prefer, by their names.

Forced by these facts:
- A compiled graph does not notice hooks that are added to a module after it was traced (dynamo leaves these guards
  out), but it does notice that `forward` of an instance changes. And a hook is not called where a forward is
  interrupted from the keyboard, which would leave its scope open. So an assigned module has a `forward` of its own, a
  `with` around that of its class.
- A deep copy or a pickle of a model copies what lies on its modules. So that function is an object that knows its
  module: copied together, the copy runs itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .calling_module import as_written, runs_no_attention
from .errors import InputError, InputTypeError, suggestion
from .scope import prefer

#: Of a module's own, where `assign` puts its function.
FORWARD = "forward"

_RANGE = re.compile(r"(?<!\d)(\d+)-(\d+)(?!\d)")
_tokens = itertools.count()


def assign(model: nn.Module, choices: Mapping[str, str | tuple[str, ...]], strict: bool = False) -> Assignment:
    """Makes modules of `model` run their attention by the kernels that they are assigned.

        assign(model, {"blocks.0-3.*": "torch/math", "blocks.11": ("flash/*", "torch/flash")})

    Args:
        model: any module; one that is compiled notices, and so does one that is compiled later.
        choices: pattern of dotted module names -> kernel name pattern, or several, the most preferred first. In a
            pattern of modules, `*` is any text (dots, too), `?` one character, `0-3` a number from 0 to 3; an exact
            name is itself. A module without a `forward` (ModuleList) stands for those in it.
        strict: as in `prefer`: nothing else may run in these modules.

    Returns:
        An Assignment: `remove()`, or leaving its `with` block, takes it back.

    What a module calls runs as it does, unless it has a choice of its own: the innermost module wins, of choices for
    one module the later, be it of this call or of a later one. The others stay, as less preferred.

    Raises:
        InputError: a pattern that matches no module (with near names), or none that could run attention.
        UnknownKernelError: a kernel name that nobody registered; a pattern that matches none is a warning.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"assign: takes a module, got {type(model).__name__}")
    if not isinstance(choices, Mapping) or not choices:
        raise InputError(f"assign: takes {{module pattern: kernel pattern}}, got {choices!r}")
    if isinstance(model, nn.DataParallel):
        raise InputError("assign: replicas of DataParallel would run its first; use DistributedDataParallel")
    names = [(as_written(name), module) for name, module in model.named_modules(remove_duplicate=False)]
    found: list[tuple[str, nn.Module, prefer]] = []
    for pattern, kernels in choices.items():
        scope = prefer(*((kernels,) if isinstance(kernels, str) else tuple(kernels)), strict=strict)
        if not scope.patterns:
            raise InputError(f"assign: {pattern!r} has no kernel pattern")
        found += [(name, module, scope) for name, module in _outermost(names, pattern)]
    token = next(_tokens)
    assigned: dict[str, tuple[str, ...]] = {}
    forwards: list[AssignedForward] = []
    given: set[tuple[int, int]] = set()
    for name, module, scope in found:  # only now: a choice that is wrong changes nothing
        if (id(module), id(scope)) not in given:  # a shared module has several names
            given.add((id(module), id(scope)))
            forwards.append(_own_forward(module))
            forwards[-1].add(token, scope)
        assigned[name] = scope.patterns + assigned.get(name, ())
    return Assignment(token, forwards, assigned)


class Assignment:
    """What `assign` did. `modules` has the names of the modules and the patterns that each of them was given."""

    def __init__(self, token: int, forwards: list[AssignedForward], modules: dict[str, tuple[str, ...]]) -> None:
        self._token = token
        self._forwards = forwards  # which somebody may have wrapped since
        self.modules = modules

    def remove(self, model: nn.Module | None = None) -> None:
        """Takes it back; twice is once. `model`: a deep copy to take it back from, which has it by itself."""
        forwards = self._forwards if model is None else [each.__dict__.get(FORWARD) for each in model.modules()]
        for forward in forwards:
            if isinstance(forward, AssignedForward):
                forward.drop(self._token)

    def __enter__(self) -> Assignment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def __repr__(self) -> str:
        return "\n".join([f"{name or '(the model)'}: {', '.join(each)}" for name, each in self.modules.items()])


class AssignedForward:
    """The `forward` of a module that has choices: that which it had, within their scopes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = module.__dict__.get(FORWARD)  # someone else's; None: that of its class
        #: (whose, patterns, strict), the innermost last.
        self.entries: tuple[tuple[int, tuple[str, ...], bool], ...] = ()
        self.scopes: tuple[prefer, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._traced(self.entries, args, kwargs)
        return self._within(self.scopes, args, kwargs)

    @property
    def __wrapped__(self) -> Any:
        """For `inspect.signature`."""
        return getattr(type(self.module), FORWARD).__get__(self.module) if self.before is None else self.before

    def add(self, token: int, scope: prefer) -> None:
        self.entries = (*self.entries, (token, scope.patterns, scope.strict))
        self.scopes = (*self.scopes, scope)

    def drop(self, token: int) -> None:
        """Forgets the choices of one assignment; after the last, gives the module its own `forward` back."""
        kept = [pair for pair in zip(self.entries, self.scopes, strict=True) if pair[0][0] != token]
        self.entries, self.scopes = tuple(entry for entry, _ in kept), tuple(scope for _, scope in kept)
        # One that someone else wrapped stays, as theirs calls it.
        if not self.entries and self.module.__dict__.get(FORWARD) is self:
            del self.module.__dict__[FORWARD]
            if self.before is not None:
                self.module.__dict__[FORWARD] = self.before

    def _stock(self, args: Any, kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _within(self, scopes: tuple[prefer, ...], args: Any, kwargs: Any) -> Any:
        if not scopes:
            return self._stock(args, kwargs)
        with scopes[0]:
            return self._within(scopes[1:], args, kwargs)

    def _traced(self, entries: tuple[tuple[int, tuple[str, ...], bool], ...], args: Any, kwargs: Any) -> Any:
        """The same in a graph, which can enter no scope that was made outside of it."""
        if not entries:
            return self._stock(args, kwargs)
        with prefer(*entries[0][1], strict=entries[0][2]):
            return self._traced(entries[1:], args, kwargs)


def _own_forward(module: nn.Module) -> AssignedForward:
    own = module.__dict__.get(FORWARD)
    if not isinstance(own, AssignedForward):
        own = module.__dict__[FORWARD] = AssignedForward(module)
    return own


def _outermost(names: list[tuple[str, nn.Module]], pattern: str) -> list[tuple[str, nn.Module]]:
    """The modules that the pattern names, without those within one of them. Raises InputError where there is none."""
    matches = _matcher(pattern)
    named = [(name, module) for name, module in names if matches(name)]
    if not named:
        raise InputError(
            f"assign: no module matches {pattern!r}.{suggestion(pattern, [name for name, _ in names if name])}"
            " model.named_modules() lists all"
        )
    outermost: list[tuple[str, nn.Module]] = []
    for name, module in named:
        for each in _with_forward(name, module):
            if not runs_no_attention(each[1]) and not any(_is_within(each[0], other) for other, _ in outermost):
                outermost.append(each)
    if not outermost:
        raise InputError(
            f"assign: {pattern!r} matches only modules that run no attention:"
            f" {', '.join(f'{name} ({type(module).__name__})' for name, module in named[:5])}"
        )
    return outermost


def _with_forward(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The module; where it is a mere container, which nobody calls, those in it."""
    if type(module).forward is not nn.Module.forward:
        return [(name, module)]
    children = [(f"{name}.{child}" if name else child, each) for child, each in module.named_children()]
    return [found for child in children for found in _with_forward(*child)]


def _is_within(name: str, other: str) -> bool:
    return name == other or not other or name.startswith(f"{other}.")


def _matcher(pattern: object) -> Any:
    """Says of a name whether the pattern matches it. Raises InputError for a range that goes down."""
    if not isinstance(pattern, str):
        raise InputTypeError(f"assign: a module pattern is text, got {pattern!r}")
    parts, ranges, end = [], [], 0
    for found in _RANGE.finditer(pattern):
        low, high = int(found[1]), int(found[2])
        if low > high:
            raise InputError(f"assign: {pattern!r} has a range that goes down: {found[0]}")
        parts += [_wild(pattern[end : found.start()]), r"(?<!\d)(\d+)(?!\d)"]
        ranges.append(range(low, high + 1))
        end = found.end()
    whole = re.compile("".join([*parts, _wild(pattern[end:])]), re.DOTALL)

    def matches(name: str) -> bool:
        if name == pattern:
            return True
        match = whole.fullmatch(name)
        return match is not None and all(int(number) in each for number, each in zip(match.groups(), ranges))

    return matches


def _wild(text: str) -> str:
    return "".join({"*": ".*", "?": "."}.get(c) or re.escape(c) for c in text)
