"""What the authors of plugins need to test them. Imported by nothing else of the core."""

from .distributions import HELLO, fake_distribution, importable

__all__ = ["HELLO", "fake_distribution", "importable"]
