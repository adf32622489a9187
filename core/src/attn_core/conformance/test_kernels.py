"""What pytest runs of this package: every check on every case of the chosen kernels.

pytest -p attn_core.testing.plugin --pyargs attn_core.conformance --attn-plugin hello
"""

from __future__ import annotations

from .parametrize import Row


def test_kernel(attn_check: Row) -> None:
    attn_check()
