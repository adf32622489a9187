"""The plugin interface: one hook.

A plugin is an installed distribution with an entry point in group `attn.plugins`, whose value is a module (or object)
with this hook. The entry point's name is the prefix of its kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from .kernel import Kernel

PROJECT = "attn"
GROUP = "attn.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def attn_kernels() -> Iterable[Kernel]:  # type: ignore[empty-body]
    """The kernels of this plugin.

    Importing the module and calling the hook must be light: no kernel library, no CUDA context. Name what is heavy in
    `Kernel.run` as "package.module:function", and ask for it in `Kernel.probe`.

        @hookimpl
        def attn_kernels():
            yield Kernel(name="hello/sdpa", run=run, capabilities=Capabilities(
                devices={"cpu"}, dtypes={torch.float32}, head_dims=range(8, 257, 8), biases={Causal}))
    """
