"""The logger of this package, "attn_natten".

NATTEN_LOG_LEVEL is its level, as it is NATTEN's: debug, info, warning, error or critical; without it, info. Whoever
sets the variable wants to see what is logged, so it is written to stderr then, unless the program has set up logging
itself.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

VARIABLE = "NATTEN_LOG_LEVEL"
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
DEFAULT = "info"
FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"


class WhereNobodyListens(logging.Handler):
    """Writes to stderr what no handler of the root logger would take."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            sys.stderr.write(self.format(record) + "\n")


def level_asked_for() -> int:
    """The level that NATTEN_LOG_LEVEL names, in any case; for another word it warns, and is info."""
    word = os.environ.get(VARIABLE, "").strip().lower() or DEFAULT
    if word not in LEVELS:
        warnings.warn(f"{VARIABLE}: takes {', '.join(LEVELS)}, got {word!r}; it is {DEFAULT}", stacklevel=2)
        word = DEFAULT
    return LEVELS[word]


def made() -> logging.Logger:
    """The logger, with the level and the handler that the variable asks for now."""
    logger = logging.getLogger("attn_natten")
    logger.setLevel(level_asked_for())
    for handler in [handler for handler in logger.handlers if isinstance(handler, WhereNobodyListens)]:
        logger.removeHandler(handler)
    if os.environ.get(VARIABLE):
        handler = WhereNobodyListens()
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
    return logger


logger = made()
