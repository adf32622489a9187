"""Finds plugins, keeps their kernels, and remembers why the others are not there.

A stale extension module is a normal day in this field, so plugins are loaded and asked one at a time: one that raises
on import or in its hook, or yields something wrong, costs itself and one warning, never the host. (pluggy's own
loader would let the first broken plugin take everything down.)
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from . import hookspecs
from .declaration import check_declaration
from .discovery import BUILT_IN, BUILT_IN_MODULE, CORE, installed_entry_points, owner
from .environment import Environment, path_of_costs, read_environment
from .errors import (
    CalibrationWarning,
    DeclarationError,
    DuplicateKernelError,
    InputTypeError,
    PluginWarning,
    UnknownKernelError,
    suggestion,
)
from .kernel import Kernel, Run, Unusable, resolve
from .rates import Rates, shipped_rates
from .tracing import without_modes

if TYPE_CHECKING:
    from .costs_file import Calibration

State = Literal["ready", "absent", "broken", "unavailable", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What is known of one plugin.

    `state` is "ready", or why it offers nothing: "broken" (import or hook failed, or it does not fit this core) or
    "unavailable" (switched off by ATTN_PLUGINS or ATTN_BLOCK).
    """

    name: str
    state: State
    reason: str = ""
    fix: str | None = None
    distribution: str = ""
    version: str = ""
    entry_point: str = ""
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Whether a kernel can run at all here: its state, and for every state but "ready" the reason."""

    state: State
    reason: str = ""
    fix: str | None = None


READY = Condition(state="ready")


class Registration:
    """The handle of a kernel registered in this process; `unregister()` or leaving its `with` block takes it out."""

    def __init__(self, registry: Registry, kernel: Kernel) -> None:
        self._registry = registry
        self.kernel = kernel

    def unregister(self) -> None:
        """Takes the kernel out; calls that would have chosen it choose again. Twice is once."""
        self._registry.unregister(self.kernel)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.unregister()

    def __repr__(self) -> str:
        return f"<Registration of {self.kernel.name}>"


class Traceable:
    """Functions as attributes, by kernel name.

    No dict: dynamo reads one whole when it first sees it, and would miss what a later choice for the same graph adds.
    """


class Registry:
    """All kernels of this process. Reading is free of locks: every change replaces the table."""

    def __init__(self, entry_points: Callable[[], Iterable[Any]] | None = None) -> None:
        self._find_entry_points = entry_points or installed_entry_points
        self._lock = threading.RLock()
        self._probing = threading.RLock()  # apart: a probe may import at length, and registering need not wait for it
        self._loaded = False
        self._loading = False
        self._plugins: dict[str, Plugin] = {}
        self._kernels: Mapping[str, Kernel] = MappingProxyType({})
        self._declared: dict[str, Kernel] = {}  # as they came, with the costs that they were given
        #: The constants measured on this machine that are in use; None: those that kernels ship.
        self.calibration: Calibration | None = None
        #: Why a file of such constants is ignored; None where none is.
        self.ignored_costs: tuple[str, str] | None = None
        self._conditions: dict[str, Condition] = {}
        self._runs: dict[str, Run] = {}
        self._on_change: list[Callable[[], None]] = []
        #: What ATTN_PREFER says, until it was looked at whether there are such kernels.
        self._wishes: tuple[str, ...] = ()
        #: What a traced graph reads: functions by kernel name, and their own limits.
        self.traceable = Traceable()
        self.refusers = Traceable()
        #: Grows with every change; a traced choice is guarded by it.
        self.generation = 0

    # What there is

    def kernels(self, pattern: str = "*") -> tuple[Kernel, ...]:
        """The kernels whose name matches `pattern`, by name. Raises InputTypeError for what is no text."""
        self.load()
        if not isinstance(pattern, str):
            raise InputTypeError(f"kernels: takes a pattern of names, got {pattern!r}")
        table = self._kernels
        return tuple(table[name] for name in sorted(table) if fnmatchcase(name, pattern))

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name. Raises UnknownKernelError, with near names; InputTypeError for what is no text."""
        self.load()
        if not isinstance(name, str):
            raise InputTypeError(f"kernel: takes the name of a kernel, got {name!r}")
        found = self._kernels.get(name)
        if found is None:
            pattern = f" A pattern is for prefer: `with prefer({name!r}):`." if any(c in name for c in "*?[") else ""
            raise UnknownKernelError(self._unknown(name) + pattern)
        return found

    def plugins(self) -> tuple[Plugin, ...]:
        """Every plugin found, by name, also those that are broken or switched off."""
        self.load()
        return tuple(self._plugins[name] for name in sorted(self._plugins))

    def condition(self, kernel: Kernel) -> Condition:
        """Whether `kernel` can run here at all: asks its probe once, and keeps the answer."""
        condition = self._conditions.get(kernel.name)
        if condition is None:
            with self._probing:
                condition = self._conditions.get(kernel.name)
                if condition is None:
                    with without_modes():
                        condition = self._conditions[kernel.name] = _probe(kernel)
        return condition

    def run(self, kernel: Kernel) -> Run:
        """The function of `kernel`, imported at first use. Where that fails it is broken; raises DeclarationError."""
        run = self._runs.get(kernel.name)
        if run is None:
            try:
                with without_modes():
                    run = resolve(kernel)
            except (Exception, SystemExit) as error:  # importing a stale library raises anything
                told = error if isinstance(error, DeclarationError) else None
                text = str(error) if told else f"{kernel.name}: run {kernel.run!r} cannot be loaded: {_told(error)}"
                self._conditions[kernel.name] = Condition(state="broken", reason=text)
                self._changed()
                raise told or DeclarationError(text) from error
            self._runs[kernel.name] = run
        return run

    def make_traceable(self, kernel: Kernel) -> None:
        """Puts the kernel where a traced graph can read it."""
        setattr(self.traceable, kernel.name, self.run(kernel))
        if kernel.refuse is not None:
            setattr(self.refusers, kernel.name, kernel.refuse)

    def note_failure(self, kernel: Kernel, error: BaseException) -> None:
        """Remembers that a run raised, to be shown; the kernel goes on being chosen, and raising."""
        text = f"last run raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._conditions[kernel.name] = Condition(state="failed", reason=text)

    def rates(self, device: str) -> Rates:
        """What adaptations take on this type of device."""
        measured = self.calibration
        if measured is not None and measured.device == device and measured.rates is not None:
            return measured.rates
        return shipped_rates(device)

    def say_what_is_missing(self) -> None:
        """Warns, once, of what ATTN_PREFER names and nobody has; asked when one is chosen: by then all are there."""
        wishes, self._wishes = self._wishes, ()
        for pattern in wishes:
            if not any(fnmatchcase(name, pattern) for name in self._kernels):
                warnings.warn(f"ATTN_PREFER: {self._unknown(pattern)}", stacklevel=2)

    # Changes

    def use_costs(self, calibration: Calibration | None) -> None:
        """Estimates by these constants from now on; None: by those that kernels ship. Choices are made anew."""
        self.load()
        with self._lock:
            self.calibration = calibration
            self._kernels = MappingProxyType({name: self._as_measured(k) for name, k in self._declared.items()})
            self._changed()

    def _as_measured(self, kernel: Kernel) -> Kernel:
        """The kernel with the constants measured here in place of those that it ships."""
        measured = self.calibration
        if measured is None or kernel.name not in measured.costs:
            return kernel
        return replace(kernel, costs={**kernel.costs, measured.device: measured.costs[kernel.name]})

    def register(self, kernel: Kernel) -> Registration:
        """Adds a kernel of this process.

        Raises DeclarationError where its declaration cannot be one, DuplicateKernelError for a name that is taken.
        """
        if not isinstance(kernel, Kernel):
            raise DeclarationError(f"register takes a Kernel, got {type(kernel).__name__}")
        check_declaration(kernel)
        self.load()
        with self._lock:
            self._add([kernel])
        return Registration(self, kernel)

    def unregister(self, kernel: Kernel) -> None:
        with self._lock:
            if any(table.get(kernel.name) is kernel for table in (self._declared, self._kernels)):
                del self._declared[kernel.name]
                self._kernels = MappingProxyType({n: k for n, k in self._kernels.items() if n != kernel.name})
                self._forget(kernel)
                self._changed()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls `callback` after every change: caches of choices are emptied there."""
        self._on_change.append(callback)

    def reload(self) -> None:
        """Looks for plugins again, with the environment as it is now; kernels of this process are forgotten."""
        with self._lock:
            self._loaded = False
            self._plugins = {}
            self._kernels = MappingProxyType({})
            self._declared = {}
            self._conditions.clear()
            self._runs.clear()
            self._changed()

    def load(self) -> None:
        """Finds and asks the plugins, once. A plugin that calls back in while it is loaded sees those before it."""
        if self._loaded:
            return
        with self._lock:  # another thread waits here until all are there; the loading one comes through
            if self._loaded or self._loading:
                return
            self._loading = True
            try:
                environment = read_environment()
                ignored = self._read_costs(environment)
                with without_modes():
                    left_out = self._load_all(environment)
            finally:
                self._loading = False
            self._wishes = environment.prefer
            self._loaded = True
            self._changed()
        for text in left_out:  # at the end: where warnings are errors, the others are there all the same
            warnings.warn(text, PluginWarning, stacklevel=3)
        if ignored:
            warnings.warn(ignored, CalibrationWarning, stacklevel=3)

    def _read_costs(self, environment: Environment) -> str | None:
        """Takes up the constants measured on this machine. Returns what to warn of."""
        from .costs_file import UnusableFileError, read_costs

        self.calibration, self.ignored_costs = None, None
        path = path_of_costs(environment)
        try:
            self.calibration = None if path is None else read_costs(path)
        except UnusableFileError as error:
            self.ignored_costs = str(path), str(error)
            return f"the measured costs in {path} are ignored: {error}; `attn calibrate` measures anew"
        return None

    def _load_all(self, environment: Environment) -> list[str]:
        """Fills the tables. Returns what to warn of."""
        left_out: list[str] = []
        by_name: dict[str, list[Any]] = {}
        for entry_point in self._find_entry_points():
            by_name.setdefault(entry_point.name, []).append(entry_point)
        # Built-in first: it is there even when another distribution claims its name.
        for name in sorted(by_name, key=lambda name: (name != BUILT_IN, name)):
            plugin, found = self._load_one(name, by_name[name], environment)
            try:
                self._add(found)
            except DuplicateKernelError as error:
                plugin = _broken(plugin, str(error))
            self._plugins[name] = plugin
            if plugin.state == "broken":
                fix = f"; {plugin.fix}" if plugin.fix else ""
                left_out.append(f"plugin {name!r} is left out: {plugin.reason}{fix}")
            if name == BUILT_IN:
                strangers = {owner(e)[0] for e in by_name[name]} - {"", CORE}
                left_out += [f"plugin {name!r} of {who} is left out: the built-in has that name" for who in strangers]
        return sorted(left_out)

    def _load_one(self, name: str, entry_points: list[Any], environment: Environment) -> tuple[Plugin, list[Kernel]]:
        if name == BUILT_IN:
            entry_points = [e for e in entry_points if e.value == BUILT_IN_MODULE][:1] or entry_points
        entry_point = entry_points[0]
        who, version = owner(entry_point)
        plugin = Plugin(name=name, state="ready", distribution=who, version=version, entry_point=entry_point.value)
        if len(entry_points) > 1:
            owners = " and ".join(sorted(owner(e)[0] for e in entry_points))
            return _broken(plugin, f"{owners} both offer a plugin {name!r}; uninstall one of them"), []
        if name != BUILT_IN:
            if name in environment.block:
                return _off(plugin, "blocked by ATTN_BLOCK"), []
            if environment.plugins is not None and name not in environment.plugins:
                return _off(plugin, "not listed in ATTN_PLUGINS"), []
        try:
            if name != BUILT_IN:
                from .versions import misfit  # `packaging` is only needed where a stranger is installed

                reason = misfit(entry_point.dist)
                if reason is not None:
                    return _broken(plugin, *reason), []
            kernels = ask(name, entry_point.load())
        except (Exception, SystemExit) as error:
            return _broken(plugin, _told(error)), []
        return replace(plugin, kernels=tuple(sorted(k.name for k in kernels))), kernels

    def _add(self, kernels: list[Kernel]) -> None:
        table = dict(self._kernels)
        for kernel in kernels:
            if kernel.name in table:
                raise DuplicateKernelError(f"a kernel {kernel.name!r} is registered already")
            table[kernel.name] = self._as_measured(kernel)
        for kernel in kernels:
            self._declared[kernel.name] = kernel
            self._forget(kernel)
        self._kernels = MappingProxyType(table)
        self._changed()

    def _forget(self, kernel: Kernel) -> None:
        self._conditions.pop(kernel.name, None)
        self._runs.pop(kernel.name, None)

    def _changed(self) -> None:
        self.generation += 1
        for callback in self._on_change:
            callback()

    def _unknown(self, name: str) -> str:
        plugin = self._plugins.get(str(name).partition("/")[0])
        if plugin is not None and plugin.state != "ready":
            return f"kernel {name!r}: its plugin is {plugin.state}: {plugin.reason}"
        return f"no kernel {name!r}.{suggestion(str(name), self._kernels)} `attn kernels` lists all"


def ask(name: str, module: Any) -> list[Kernel]:
    """The kernels that a plugin object yields. Raises DeclarationError, or whatever the plugin raises."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(module, name=name)
    manager.check_pending()  # else a misspelt hook is silently no hook
    implementations = manager.hook.attn_kernels.get_hookimpls()
    if not implementations:
        raise DeclarationError("it has no hook attn_kernels (is it marked with @hookimpl?)")
    kernels: list[Kernel] = []
    for implementation in implementations:
        offered: Any = implementation.function()
        for kernel in offered:  # a generator may raise half-way: then none of it counts
            if not isinstance(kernel, Kernel):
                raise DeclarationError(f"attn_kernels must yield Kernel, got {kernel!r}")
            if kernel.plugin != name:
                raise DeclarationError(
                    f"kernel {kernel.name!r} must be named '{name}/…', after the plugin's entry point"
                )
            if any(kernel.name == other.name for other in kernels):
                raise DeclarationError(f"it yields two kernels named {kernel.name!r}")
            check_declaration(kernel)
            kernels.append(kernel)
    return kernels


def _probe(kernel: Kernel) -> Condition:
    if kernel.probe is None:
        return READY
    try:
        answer: Any = kernel.probe()
    except (Exception, SystemExit) as error:
        return Condition(state="broken", reason=f"its probe raised {_told(error)}")
    if answer is None:
        return READY
    if not isinstance(answer, Unusable):
        return Condition(state="broken", reason=f"its probe must answer None or Unusable, got {answer!r}")
    return Condition(state=answer.state, reason=answer.reason, fix=answer.fix)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _broken(plugin: Plugin, reason: str, fix: str | None = None) -> Plugin:
    return replace(plugin, state="broken", reason=reason, fix=fix, kernels=())


def _off(plugin: Plugin, reason: str) -> Plugin:
    return replace(plugin, state="unavailable", reason=reason)


#: The one registry of this process.
registry = Registry()
