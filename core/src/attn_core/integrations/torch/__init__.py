"""torch: every call of F.scaled_dot_product_attention by attn, in a block, in the process, or in one model.

    from attn_core.integrations.torch import redirect_sdpa, swap

    with redirect_sdpa():                   # this task alone
        model(x)

    attn_core.enable("torch")               # the process; attn_core.disable("torch") puts torch's back

    with swap(model):                       # nothing of torch is replaced: the model's modules get other classes
        model(x)

nn.MultiheadAttention and nn.TransformerEncoderLayer go the same way, but for `need_weights=True`, which computes the
weights without SDPA.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from types import TracebackType

from ..hosts import HOSTS, check_version
from .installation import installation
from .redirection import Options, enter, leave, process
from .swap import Swap, is_swapped, swap

__all__ = ["TESTED", "Swap", "disable", "enable", "is_enabled", "is_swapped", "redirect_sdpa", "swap"]

#: Versions of torch that the tests are made for; those that they ran with are 2.13 and 2.15. Compiled functions follow
#: from 2.13 on; before, they may keep what they had.
TESTED = ">=2.9,<2.16"

_lock = threading.Lock()


class redirect_sdpa:  # noqa: N801  (reads as a verb: `with redirect_sdpa()`)
    """Within it, torch's attention is run by attn, for this task and the tasks begun within it; others see torch's.

        with redirect_sdpa(prefer="torch/math"):
            model(x)

    Reaches every call by way of `torch.nn.functional.scaled_dot_product_attention`, also as `F.…`; not a name bound to
    it before. While anybody is within, that attribute is a function that asks who calls, and afterwards it is the
    identical object that it was. Of redirections within each other, the innermost counts. A kernel that calls torch's
    attention itself gets torch's. Re-entrant; one may be shared by threads and tasks.

    Eager calls follow their task; compiled functions follow their thread, and stay full graphs. A backward that
    computes a forward again (checkpointing) does so in a thread of autograd's on CUDA, outside: use `enable` there.

    Args:
        prefer: patterns of kernel names, as in `attn_core.prefer`, for the calls that are redirected; one or several.
        strict: only kernels that match run, else KernelRefusedError.

    Raises what `attn_core.prefer` raises; RuntimeError where it is left in another task than it was entered in.
    """

    def __init__(self, *, prefer: Collection[str] | str = (), strict: bool = False) -> None:
        self._options = Options(prefer, strict)

    def __enter__(self) -> redirect_sdpa:
        installation.hold()
        enter(self, self._options)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        leave(self)
        installation.release()


def enable(*, prefer: Collection[str] | str = (), strict: bool = False) -> None:
    """Redirects torch's attention in the whole process. A second time, only the options change.

    Arguments as in `redirect_sdpa`. Raises what `attn_core.prefer` raises.
    """
    check_version(HOSTS["torch"])
    options = Options(prefer, strict)
    with _lock:
        if process.options is None:
            installation.hold()
        process.ask(options)


def disable() -> None:
    """Ends `enable`; nothing happens where there was none. Blocks of `redirect_sdpa` that are open go on."""
    with _lock:
        if process.options is not None:
            process.ask(None)
            installation.release()


def is_enabled() -> bool:
    """Whether the process redirects."""
    return process.options is not None
