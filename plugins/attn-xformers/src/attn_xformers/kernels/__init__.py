"""xFormers' operators, each a kernel.

`operators` names them; `read` and `asked` say what they can do, by their class attributes and their own answers;
`forms` says each bias in xFormers' terms; `operands` and `lse` translate the tensors; `limits` refuses what an operator
would do wrong without saying so; `run` calls xFormers, and only what is imported when a kernel is weighed imports it.
"""

from __future__ import annotations

from .kernel import kernel_of, of_operator
from .operators import OPERATORS, Manners
from .priors import COSTS

KERNELS = tuple(of_operator(operator, COSTS[operator.name]) for operator in OPERATORS)

__all__ = ["KERNELS", "Manners", "kernel_of"]
