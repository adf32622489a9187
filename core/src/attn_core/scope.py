"""Scopes: `with prefer(...)`, `with allow(...)`, and the tables of choices that belong to them.

Forced by two facts:
- Eager calls must see the scope of their task (ContextVar). A traced graph cannot read a ContextVar, but it can read an
  attribute of a thread-local, by guard; so entering a scope sets both, and tracing reads the thread-local mirror. A
  compiled function therefore follows the scope of its *thread* at call time.
- The lookup of a cached choice must not pay for the scope. So the scope is itself the table: one per settings, found
  again (warm) when the same settings are entered again.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, MutableMapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from .environment import ALLOWABLE, check_allowed, read_environment
from .errors import InputError, InputTypeError
from .registry import registry
from .tensor_mask import forget as forget_places

if TYPE_CHECKING:
    from .record import Recorder
    from .usage import Usage

#: Choices kept per scope; the oldest goes when a new one comes.
TABLE_SIZE = 4096
#: Choices kept at one place of a table: calls alike in what it is found by, and different in dtype, device or strides.
ALIKE = 8
#: Different things asked (options and bias) whose latest choice is at hand.
LATEST = 64
#: Names that rows of `record` have and no kernel: patterns may name them, for strict scopes.
PAST_KERNELS = ("torch (stock)", "bias/*")
#: Settings whose tables are kept warm.
SCOPES_KEPT = 64


class Said(NamedTuple):
    """What scopes derive from each other, as plain values: each as in Settings."""

    prefer: tuple[str, ...]
    only: tuple[str, ...]
    allow: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a scope says."""

    prefer: tuple[str, ...] = ()  #: kernel name patterns, the most preferred first
    only: tuple[str, ...] = ()  #: patterns of the innermost strict scope: nothing else may run; empty: no limit
    allow: frozenset[str] = frozenset()
    allow_known_bad: tuple[str, ...] = ()  #: kernel name patterns, by the environment alone

    @cached_property
    def said(self) -> Said:
        """For those who derive others from it, and for graphs."""
        return Said(self.prefer, self.only, in_order(self.allow))


#: (whether it is for these operands, the dtype that autocast casts them to, the function that runs the call)
Choice = tuple[Callable[..., bool], "torch.dtype | None", Callable[..., Any]]


class Scope(dict[Any, tuple[Choice, ...]]):
    """Settings, and the choices made under them: place of a call -> choices, the newest first.

    `latest` holds one choice more cheaply found: that of the latest call that asked the same, whatever its shapes. It
    is written without a lock. So whoever takes a choice from the table to put it there reads `latest` before the
    table: where kernels came or went in between, what is written goes into a dict that nobody reads any more.
    """

    def __init__(
        self, settings: Settings | None, recorders: tuple[Recorder, ...] = (), usages: tuple[Usage, ...] = ()
    ) -> None:
        super().__init__()
        self._settings = settings
        self.recorders = recorders
        self.usages = usages
        self.watched = bool(recorders or usages)
        self.latest: dict[Any, Choice] = {}
        #: The scopes entered from here, by what entered them: deriving settings is paid once. Those that are watched
        #: are nobody else's; the others are kept where every scope of their settings is found.
        self.within: MutableMapping[Any, Scope] = {} if self.watched else WeakValueDictionary()
        #: The latest of them with what entered it, for whoever enters at every call.
        self.latest_within: tuple[Any, Scope | None] = (None, None)
        with _lock:
            _alive[id(self)] = self

    @property
    def settings(self) -> Settings:
        """What the scope says. The outermost asks the environment, at first use: a bad variable fails no import."""
        if self._settings is None:
            environment = read_environment()
            self._settings = Settings(
                prefer=environment.prefer, allow=environment.allow, allow_known_bad=environment.allow_known_bad
            )
            if environment.usage is not None:
                from .usage import usage_of_process  # of no use to anybody else

                self.usages = (usage_of_process(environment.usage),)
                self.watched = True
        return self._settings

    def forget_settings(self) -> None:
        """Asks the environment again, at next use."""
        self._settings, self.usages, self.watched = None, (), False
        self.within.clear()
        self.latest_within = (None, None)

    def keep(self, asked: Any, place: Any, choice: Choice, generation: int) -> None:
        """Stores a choice made at that generation of the registry, dropping the oldest where the table is full.

        Kernels may have come or gone while it was made: then it is for this call alone.
        """
        with _lock:
            if generation != registry.generation:
                return
            while len(self) >= TABLE_SIZE:
                del self[next(iter(self))]
            self[place] = (choice, *self.get(place, ()))[:ALIKE]
            if len(self.latest) >= LATEST:
                self.latest = {}
            self.latest[asked] = choice

    def forget(self) -> None:
        """Empties it: kernels came, went or broke."""
        self.clear()
        self.latest = {}  # after the table, and another one


_lock = threading.RLock()
#: Every scope that somebody is in, or may enter again: all that must forget their choices when kernels come or go.
_alive: WeakValueDictionary[int, Scope] = WeakValueDictionary()
#: Outside every `with`: what ATTN_PREFER and ATTN_ALLOW say.
_base = Scope(None)
_warm: dict[Settings, Scope] = {}

current: ContextVar[Scope] = ContextVar("attn_scope", default=_base)


def in_order(allowed: Collection[str]) -> tuple[str, ...]:
    """What is allowed, in one order whoever says so: a graph guards on it."""
    made: tuple[str, ...] = ()
    if not allowed:
        return made
    for word in ALLOWABLE:
        if word in allowed:
            made += (word,)
    return made


class Mirror(threading.local):
    """The settings of this thread, as plain values that a traced graph can guard on."""

    def __init__(self) -> None:
        try:
            settings = _base.settings
        except InputError:  # a bad variable: the first call says so
            settings = Settings()
        self.said = settings.said


mirror = Mirror()


def reflect(scope: Scope) -> None:
    """Shows a scope to what is traced in this thread."""
    mirror.said = scope.settings.said


def scope_for(
    settings: Settings, recorders: tuple[Recorder, ...] = (), usages: tuple[Usage, ...] | None = None
) -> Scope:
    """The scope of these settings, with the choices made before under the same; `usages` None: those of the process."""
    if usages is None:
        usages = _base.usages
    if recorders or usages != _base.usages:  # what it keeps counts into these, so its table is its own
        return Scope(settings, recorders, usages)
    if settings == _base.settings:
        return _base
    with _lock:
        found = _warm.pop(settings, None)
        if found is None:  # an empty one is falsy, and as good
            found = Scope(settings, (), usages)
        _warm[settings] = found  # moved to the end: the one left alone for longest goes first
        while len(_warm) > SCOPES_KEPT:
            del _warm[next(iter(_warm))]
    return found


def forget_choices() -> None:
    """Empties every table: kernels came, went or broke."""
    with _lock:
        for scope in list(_alive.values()):
            scope.forget()


def refresh() -> None:
    """Reads the ATTN_* variables again and looks for plugins anew, as after a `pip install` in a running process.

    Kernels registered in this process are forgotten. Scopes that are open keep their settings.
    """
    _base.forget_settings()
    with _lock:
        _warm.clear()  # they count where the variables said
    forget_places()
    reflect(current.get())
    registry.reload()


registry.on_change(forget_choices)


#: The `with` blocks that this task is in, each with the way back.
_entered: ContextVar[tuple[tuple[_ScopeContext, Token[Scope]], ...]] = ContextVar("attn_entered", default=())


class _ScopeContext:
    """Enters a scope whose settings derive from those around it. Re-entrant, and may be shared by threads and tasks.

    An eager `with` keeps what it found in a ContextVar: on the object, tasks that share it would take each other's. A
    traced one cannot, and keeps it on the object.
    """

    def __init__(self, key: Any) -> None:
        self._key = key  # of what it says: equal ones derive alike
        self._traced: list[Said] = []

    def _derive(self, said: Said) -> Said:
        raise NotImplementedError

    def __enter__(self) -> _ScopeContext:
        if torch.compiler.is_dynamo_compiling():
            self._traced.append(mirror.said)
            mirror.said = self._derive(mirror.said)
            return self
        scope = self.scope_within(current.get())
        _entered.set((*_entered.get(), (self, current.set(scope))))
        reflect(scope)
        return self

    def scope_within(self, outer: Scope) -> Scope:
        """The scope that entering this from `outer` leads to."""
        key, scope = outer.latest_within
        if scope is not None and key is self._key:
            return scope
        scope = outer.within.get(self._key)
        if scope is None:  # an empty one is falsy
            scope = self._made_within(outer)
        outer.latest_within = self._key, scope
        return scope

    def _made_within(self, outer: Scope) -> Scope:
        said = self._derive(outer.settings.said)
        settings = replace(outer.settings, prefer=said.prefer, only=said.only, allow=frozenset(said.allow))
        scope = scope_for(settings, outer.recorders, outer.usages)
        if len(outer.within) >= SCOPES_KEPT:
            outer.within.clear()
        outer.within[self._key] = scope
        return scope

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._traced:
            mirror.said = self._traced.pop()
            return
        entered = _entered.get()
        last = len(entered) - 1
        while last >= 0 and entered[last][0] is not self:
            last -= 1
        if last < 0:
            raise RuntimeError(f"{type(self).__name__}: left in another task or thread than it was entered in")
        _entered.set(entered[:last] + entered[last + 1 :])
        current.reset(entered[last][1])
        # Not what the mirror showed on entering: another task of this thread may have entered or left since.
        reflect(current.get())


class prefer(_ScopeContext):  # noqa: N801  (reads as a verb: `with prefer("flash/*")`)
    """Within it, kernels whose name matches an earlier pattern come first, where they take the problem.

        with prefer("flash/fa3", "torch/*"):
            model(x)

    Patterns are those of the shell (`*`, `?`, `[…]`). An inner scope's come before the outer's. A name without
    wildcards that nobody registered raises UnknownKernelError; a pattern that matches nothing warns.

    With `strict`, nothing runs but kernels that match: where none of these takes a problem, KernelRefusedError has the
    reasons of each. `kernel=` in a call is held to it, too, and so is what goes past the kernels ("torch (stock)", a
    bias's own dispatch). Of strict scopes within each other, the innermost counts. Raises InputError for `strict`
    without a pattern.

    Eager calls follow the scope of their task; compiled functions that of their thread.
    """

    def __init__(self, *patterns: str, strict: bool = False) -> None:
        super().__init__(("prefer", patterns, strict))
        self.patterns = patterns
        self.strict = strict
        if not torch.compiler.is_dynamo_compiling():
            check_patterns(patterns, strict)

    def _derive(self, said: Said) -> Said:
        return Said(self.patterns + said.prefer, self.patterns if self.strict else said.only, said.allow)


class allow(_ScopeContext):  # noqa: N801
    """Within it, what is left out by default may be chosen.

        with allow("approximate"):
            model(x)

    "approximate": kernels in int8, fp8 and the like. "known-bad": kernels of which it is publicly known that they are
    wrong for the problem, here. Raises InputError for another word.
    """

    def __init__(self, *what: str) -> None:
        super().__init__(("allow", what))
        self.what = what
        check_allowed(what, "allow")

    def _derive(self, said: Said) -> Said:
        return Said(said.prefer, said.only, in_order(said.allow + self.what))


def check_patterns(patterns: tuple[str, ...], strict: bool = False) -> None:
    """Raises UnknownKernelError for a plain name that is unknown; warns of a pattern that matches no kernel.

    Raises InputTypeError for what is no text, InputError for `strict` without a pattern.
    """
    odd = next((pattern for pattern in patterns if not isinstance(pattern, str)), None)
    if odd is not None:
        raise InputTypeError(f"prefer: takes kernel name patterns, got {odd!r}")
    if strict and not patterns:
        raise InputError("prefer: strict needs a pattern; without one, nothing could run")
    for pattern in patterns:
        if any(fnmatchcase(pattern, name) for name in PAST_KERNELS):
            continue
        if not any(c in pattern for c in "*?["):
            registry.kernel(pattern)
        elif not any(fnmatchcase(kernel.name, pattern) for kernel in registry.kernels()):
            warnings.warn(f"prefer: no kernel matches {pattern!r}; `attn kernels` lists all", stacklevel=3)
