"""The command line, `attn`: one file per command, each loaded when it is called.

Plugins add commands of their own by entry points of group `attn.commands`.
"""

from .group import main

__all__ = ["main"]
