"""Imports of what the core does not depend on: where it is missing, the error is the line to type."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ..errors import AttnError


class MissingPackageError(AttnError, ImportError):
    """An optional package is not installed, or cannot be imported; the message has the line to type."""


def need(module: str, purpose: str, fix: str) -> ModuleType:
    """The module of that name, imported.

    Raises MissingPackageError, which says for what it is needed and what to type.
    """
    try:
        return import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        what = f"{module} is not installed" if absent else f"{module} cannot be imported ({error})"
        raise MissingPackageError(f"{purpose} needs {module}: {what}.\nTo install it: {fix}") from error
