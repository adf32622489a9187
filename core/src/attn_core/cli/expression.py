"""Biases written as text, as on a command line: `Window(3, 0) & Segments([5, 9, 4])`.

The text is parsed and never evaluated: Python's grammar gives a tree, and of the tree only what is listed here is
understood. A name stands for a kind of bias, and for nothing else; there are no attributes but a kind's own ways to
make one, and `bind`. Whatever else is there is an error that points at it.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import bias as kinds_module
from ..bias import AttnBias, Mask, as_bias
from ..bias.joint import Joint
from ..errors import AttnError, InputError, suggestion
from .written_tensors import TENSORS, shown

MAX_CHARACTERS = 10_000
MAX_DEPTH = 50
MAX_INT = 2**31
SEED = 0
SHOWN = 100  #: characters of a line around what is wrong

#: Kinds that are written in another way, or cannot be written.
ELSEWHERE = {
    "Intersection": "write a & b",
    "Sum": "write a + b",
    "AttnBias": "it is the base of all kinds",
    "Mask": "it is the base of masks",
    "MaskMod": "it takes a function, which is written in Python: print(mask_mod(...).bind(...).draw())",
    "Score": "it is the base of what adds",
    "ScoreMod": "it takes a function, which is written in Python: print(score_mod(...).bind(...).draw())",
}


class ExpressionError(InputError):
    """Text that is no bias; the message has the text with a caret under the part in question."""


def parse(text: str) -> AttnBias:
    """The bias that `text` stands for.

    Understood are the public kinds of bias with their arguments, `&`, `+`, parentheses, numbers (`inf` too), strings,
    True, False, None, tuples and lists, a kind's other ways to make one (`Segments.from_offsets([0, 5, 14])`),
    `.bind(seqlen_q, seqlen_kv)`, and for what a bias holds: `tensor(values)` and `random(*shape)`, numbers from the
    standard normal distribution with seed 0; both take `requires_grad=True`.

    Raises ExpressionError for anything else, and for arguments that the kind does not take.
    """
    return _Reader(text).bias()


def kinds() -> dict[str, type[AttnBias]]:
    """The kinds that can be written, by name."""
    public = {name: getattr(kinds_module, name) for name in kinds_module.__all__}
    return {
        name: value
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, AttnBias) and name not in ELSEWHERE
    }


def accepted() -> str:
    """What can be written, for people."""
    return (
        f"kinds: {', '.join(sorted(kinds()))}\n"
        "joined by: a & b (masks), a + b (scores, and masks last); parentheses\n"
        "arguments: numbers, inf, strings, True, False, None, tuples, lists, other biases,"
        " tensor([...]), random(*shape)"
    )


class _Reader:
    """Reads one text."""

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())  # one line, however it was written
        self.kinds = kinds()
        self.generator = torch.Generator(device="cpu").manual_seed(SEED)
        self.depth = 0

    def bias(self) -> AttnBias:
        tree = self.tree()
        value = self.value(tree)
        if isinstance(value, AttnBias):
            return value
        if isinstance(value, Tensor):
            made = self.made(tree, as_bias, value)
            assert isinstance(made, AttnBias)
            return made
        raise self.refused(tree, f"a bias is wanted, got {shown(value)}")

    def tree(self) -> ast.expr:
        if len(self.text) > MAX_CHARACTERS:
            many = f"an expression has at most {MAX_CHARACTERS} characters, got {len(self.text)}"
            raise ExpressionError(f"bias: {many}\n{accepted()}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Python thinks of its style is nothing to the user
                return ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            start = min(max((error.offset or 1) - 1, 0), len(self.text))
            raise self.error(f"not an expression: {error.msg.partition(';')[0]}", start, start + 1) from None
        except (ValueError, RecursionError, MemoryError) as error:
            what = str(error) if isinstance(error, ValueError) else "nested too deeply"
            raise ExpressionError(f"bias: not an expression: {what}\n{accepted()}") from None

    # Parts

    def value(self, node: ast.expr) -> Any:
        """What a part stands for: a bias, a tensor, or plain values."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.refused(node, f"nested too deeply: {MAX_DEPTH} levels at most")
        try:
            read: Callable[[Any], Any] | None = getattr(self, f"_{type(node).__name__}", None)
            if read is None:
                raise self.refused(node, f"{_said(node)} is not understood")
            return read(node)
        finally:
            self.depth -= 1

    def _Constant(self, node: ast.Constant) -> Any:  # noqa: N802
        value = node.value
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int) and value > MAX_INT:
            raise self.refused(node, f"a whole number is at most {MAX_INT}")
        if isinstance(value, (int, float)):
            return value
        raise self.refused(node, f"{shown(value)} is not understood")

    def _Name(self, node: ast.Name) -> Any:  # noqa: N802
        if node.id == "inf":
            return math.inf
        if node.id in self.kinds or node.id in TENSORS:
            raise self.refused(node, f"{node.id} is to be called: {node.id}(...)")
        raise self.unknown(node, node.id)

    def _List(self, node: ast.List) -> list[Any]:  # noqa: N802
        return [self.value(each) for each in node.elts]

    def _Tuple(self, node: ast.Tuple) -> tuple[Any, ...]:  # noqa: N802
        return tuple([self.value(each) for each in node.elts])

    def _UnaryOp(self, node: ast.UnaryOp) -> Any:  # noqa: N802
        value = self.value(node.operand) if isinstance(node.op, (ast.USub, ast.UAdd)) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refused(node, "a sign stands before a number; nothing else changes one value")
        return -value if isinstance(node.op, ast.USub) else value

    def _BinOp(self, node: ast.BinOp) -> AttnBias:  # noqa: N802
        if not isinstance(node.op, (ast.BitAnd, ast.Add)):
            raise self.refused(node, "biases are joined by & and +, and numbers are written out")
        # `a & b & c` nests to the left, however many there are: that is no depth.
        chain = [node.right]
        left = node.left
        while isinstance(left, ast.BinOp) and type(left.op) is type(node.op):
            chain.append(left.right)
            left = left.left
        chain.append(left)
        biases = [self.operand(part, node.op) for part in reversed(chain)]
        joined = biases[0]
        for part, bias in zip(chain[-2::-1], biases[1:]):
            joined = self.made(part, operator.add if isinstance(node.op, ast.Add) else operator.and_, joined, bias)
        return joined

    def operand(self, node: ast.expr, joined_by: ast.operator) -> AttnBias:
        """A bias to be joined; a tensor is one, too."""
        value = self.value(node)
        if isinstance(value, Tensor):
            value = self.made(node, as_bias, value)
        if not isinstance(value, AttnBias):
            raise self.refused(node, f"a bias is wanted, got {shown(value)}")
        if isinstance(joined_by, ast.BitAnd) and not isinstance(value, Mask):
            hint = "; + binds before &, so put the masks in parentheses" if isinstance(value, Joint) else ""
            raise self.refused(node, f"& takes masks, and {type(value).__name__} is none: write a + b{hint}")
        return value

    def _Call(self, node: ast.Call) -> Any:  # noqa: N802
        if isinstance(node.func, ast.Name) and node.func.id in TENSORS:
            values, options = self.arguments(node)
            return self.made(node, TENSORS[node.func.id], self.generator, *values, **options)
        make = self.callee(node.func)
        values, options = self.arguments(node)
        given = None
        try:
            given = inspect.signature(make).bind(*values, **options)
        except TypeError as error:
            raise self.refused(node, f"{error}; it is {_signature(make, ast.unparse(node.func))}") from None
        if "lengths" in given.arguments:
            raise self.refused(node, "lengths are given by .bind(seqlen_q, seqlen_kv), which checks them")
        value = self.made(node, make, *values, **options)
        if not isinstance(value, AttnBias):
            raise self.refused(node, f"a bias is wanted, got {shown(value)}")
        return value

    def callee(self, node: ast.expr) -> Callable[..., Any]:
        """What is called: a kind, another way of a kind to make one, or `bind` of a bias."""
        if isinstance(node, ast.Name):
            if node.id in self.kinds:
                return self.kinds[node.id]
            raise self.unknown(node, node.id)
        if not isinstance(node, ast.Attribute):
            raise self.refused(node, f"{_said(node)} cannot be called; a kind of bias can")
        if isinstance(node.value, ast.Name):
            name = node.value.id
            if name not in self.kinds:
                raise self.unknown(node.value, name)
            ways = _ways(self.kinds[name])
            if node.attr not in ways:
                has = f"; it has {', '.join(sorted(ways))}" if ways else ""
                raise self.refused(
                    node, f"{name} has no way {node.attr!r} to make one{has}.{suggestion(node.attr, ways)}"
                )
            return ways[node.attr]
        if node.attr != "bind":
            raise self.refused(node, f".{node.attr} is not understood; a bias has .bind(seqlen_q, seqlen_kv)")
        bias = self.value(node.value)
        if not isinstance(bias, AttnBias):
            raise self.refused(node.value, f"a bias is wanted before .bind, got {shown(bias)}")
        return bias.bind

    def arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        values = [self.value(each) for each in node.args]
        options: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.refused(keyword.value, "** is not understood; write the arguments out")
            if keyword.arg in options:
                raise self.refused(keyword.value, f"{keyword.arg} is given twice")
            options[keyword.arg] = self.value(keyword.value)
        return values, options

    # Errors

    def made(self, node: ast.expr, make: Callable[..., Any], *values: Any, **options: Any) -> Any:
        """What `make` gives. What it raises becomes an error about this part."""
        try:
            return make(*values, **options)
        except ExpressionError:
            raise
        except AttnError as error:
            raise self.refused(node, str(error)) from None
        except Exception as error:  # constructors are not written for any literal that there is
            raise self.refused(node, f"{type(error).__name__}: {error}") from error

    def unknown(self, node: ast.expr, name: str) -> ExpressionError:
        why = f": {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        return self.refused(node, f"{name!r} is no kind of bias{why}.{suggestion(name, [*self.kinds, *TENSORS])}")

    def refused(self, node: ast.expr, message: str) -> ExpressionError:
        """The error that points at this part."""
        start, end = (self.place(offset or 0) for offset in (node.col_offset, node.end_col_offset))
        return self.error(message, start, end)

    def error(self, message: str, start: int, end: int) -> ExpressionError:
        first = max(0, start - SHOWN // 2)
        part = self.text[first : first + SHOWN]
        marks = " " * (start - first) + "^" * max(min(end, first + SHOWN) - start, 1)
        return ExpressionError(f"bias: {message}\n  {part}\n  {marks}\n{accepted()}")

    def place(self, offset: int) -> int:
        """An offset in bytes, as Python's trees have it, in characters."""
        return len(self.text.encode()[:offset].decode(errors="ignore"))


def _ways(kind: type[AttnBias]) -> dict[str, Callable[..., Any]]:
    """A kind's class methods that make one, beside those that every kind has."""
    return {
        name: getattr(kind, name)
        for cls in kind.__mro__
        if cls not in AttnBias.__mro__
        for name, member in vars(cls).items()
        if isinstance(member, classmethod) and not name.startswith("_") and not hasattr(AttnBias, name)
    }


def _signature(make: Callable[..., Any], name: str) -> str:
    """As one would type it: names and defaults."""
    texts, star = [], False
    for parameter in inspect.signature(make).parameters.values():
        if parameter.name == "lengths":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            texts.append("*")
            star = True
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        texts.append(f"{parameter.name}{default}")
    return f"{name}({', '.join(texts)})"


#: What the parts of Python that people may try are called.
NAMES = {
    ast.Attribute: "an attribute",
    ast.BoolOp: "and/or (& joins masks)",
    ast.Compare: "a comparison",
    ast.Dict: "a dict",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.IfExp: "if/else",
    ast.JoinedStr: "an f-string",
    ast.Lambda: "a function",
    ast.ListComp: "a comprehension",
    ast.NamedExpr: "an assignment",
    ast.Set: "a set",
    ast.SetComp: "a comprehension",
    ast.Starred: "* before a list",
    ast.Subscript: "[...] behind a value",
}


def _said(node: ast.expr) -> str:
    return NAMES.get(type(node), type(node).__name__)
