"""A registry of one's own, for tests of a hook that need no installed distribution."""

from __future__ import annotations

from dataclasses import dataclass

from ..discovery import BUILT_IN_MODULE, installed_entry_points
from ..registry import Registry


def registry_with(**plugins: object) -> Registry:
    """A registry of the built-in kernels and these plugins, and of nothing that is installed here.

        found = registry_with(hello=my_plugin, gone=ImportError("libfast.so.2: cannot open shared object file"))
        found.kernels("hello/*")
        found.plugins()     # "gone" is broken, and says why

    It loads them as the registry of the process loads installed ones: one that is broken costs itself and a
    PluginWarning, and ATTN_PLUGINS and ATTN_BLOCK hold. Calls are answered by the registry of the process all the
    same; to have a kernel called, `attn_core.register` it.

    Args:
        plugins: name of the entry point -> what it loads: a module or object with the hook, or an exception to raise.
    """
    built_in = [entry_point for entry_point in installed_entry_points() if entry_point.value == BUILT_IN_MODULE]
    given = [_Loaded(name, plugin) for name, plugin in plugins.items()]
    return Registry(lambda: [*built_in, *given])


@dataclass(frozen=True)
class _Loaded:
    """Stands for the entry point of something that is imported already, and belongs to no distribution."""

    name: str
    plugin: object
    value: str = "of this process"
    dist: None = None

    def load(self) -> object:
        if isinstance(self.plugin, BaseException):
            raise self.plugin
        return self.plugin
