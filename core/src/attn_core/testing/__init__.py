"""What the authors of plugins need to test them. Imported by nothing else of the core."""

from .distributions import HELLO, fake_distribution, importable
from .registries import registry_with

__all__ = ["HELLO", "fake_distribution", "importable", "registry_with"]
