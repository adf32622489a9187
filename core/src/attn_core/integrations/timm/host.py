"""timm itself, imported when it is needed."""

from __future__ import annotations

from types import ModuleType

from ..missing import MissingPackageError, need

#: Versions that the tests run.
TESTED = ">=1.0.31,<1.1"
FIX = f'pip install "timm{TESTED}"'


def host(module: str) -> ModuleType:
    """A module of timm. Raises MissingPackageError, with the line to type, where it cannot be imported."""
    purpose = "attn_core.integrations.timm"
    try:
        return need(module, purpose, FIX)
    except RuntimeError as error:  # of torchvision, which looks for operators that another torch has
        raise MissingPackageError(
            f"{purpose} needs {module}, which cannot be imported: {error}.\n"
            "To install a torchvision for this torch: pip install --upgrade torch torchvision"
        ) from error
