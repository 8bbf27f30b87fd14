"""Symbolic sizes in ONNX: int64 vectors of one element, computed from the shapes of values.

A size is a sympy expression over the symbols of the capture. A symbol is read off the first
value that has it as an axis, so no size depends on how the program spelled its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy import functions as sizes_of_torch

from ..ir.errors import UnsupportedByTarget
from .onnx_builder import DOUBLE, FLOAT, INT64, Builder, Value

Size = int | sympy.Expr
SIZES = (torch.SymInt, torch.SymFloat)
"""What a capture knows as an expression; no node of the program is needed to compute it."""


def size(value: Any) -> Size:
    """An int, a SymInt, an expression or a node of one as an int or a sympy expression."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    expression = value.node.expr if isinstance(value, torch.SymInt) else value
    if isinstance(expression, sympy.Expr):
        return int(expression) if expression.is_number else expression
    return int(expression)


def sizes(values: Sequence[Any]) -> list[Size]:
    return [size(value) for value in values]


def is_size(value: Any) -> bool:
    """Whether an argument is a size that is known only at run time."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    return isinstance(value, SIZES)


def bind_symbols(b: Builder, value: Value, shape: Sequence[Any]) -> None:
    """Note where symbols can be read: `value` has the given shape."""
    for axis, length in enumerate(sizes(shape)):
        if isinstance(length, sympy.Symbol):
            b.memo.setdefault(("symbol", length), (value, axis))


def size_vector(b: Builder, value: Any) -> Value:
    """A size (int, SymInt, node or expression) as an int64 vector of one element."""
    expression = size(value)
    if isinstance(expression, int):
        return b.ints([expression])
    return b.once(("size", expression), lambda: _emit(b, expression))


def size_scalar(b: Builder, value: Any) -> Value:
    """A size as an int64 scalar, or a number computed from sizes as a float32 scalar."""
    known = value.meta["val"] if isinstance(value, fx.Node) else value
    if isinstance(known, torch.SymFloat):
        vector = b.cast(_number(b, known.node.expr), FLOAT)
        return b.op("Squeeze", vector, b.ints([0]))
    expression = size(value)
    if isinstance(expression, int):
        return b.constant(expression, INT64)
    vector = size_vector(b, expression)
    key = ("scalar", expression)
    return b.once(key, lambda: b.op("Squeeze", vector, b.ints([0])))


def size_list(b: Builder, values: Sequence[Any]) -> Value:
    """Sizes as one int64 vector: a constant where all are known."""
    listed = sizes(values)
    if all(isinstance(value, int) for value in listed):
        return b.ints([int(value) for value in listed])
    key = ("sizes", tuple(listed))
    return b.once(key, lambda: _concat(b, listed))


def _concat(b: Builder, listed: Sequence[Any]) -> Value:
    parts = [size_vector(b, value) for value in listed]
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=0)


def _emit(b: Builder, expression: sympy.Expr) -> Value:
    if isinstance(expression, sympy.Symbol):
        return _read(b, expression)
    parts = [size_vector(b, part) for part in expression.args]
    rule = _RULES.get(type(expression))
    if rule is None:
        raise _unknown(b, expression)
    return rule(b, expression, parts)


def _number(b: Builder, expression: Any) -> Value:
    """An expression with fractions as a float64 vector of one element."""
    if expression.is_number:
        return b.constant([float(expression)], DOUBLE)
    if isinstance(expression, sympy.Symbol):
        return b.cast(size_vector(b, expression), DOUBLE)
    parts = [_number(b, part) for part in expression.args]
    rule = _NUMBER_RULES.get(type(expression))
    if rule is None:
        raise _unknown(b, expression)
    return rule(b, expression, parts)


def _unknown(b: Builder, expression: sympy.Expr) -> UnsupportedByTarget:
    return UnsupportedByTarget(
        f"ONNX cannot compute a size of the form {type(expression).__name__}",
        where=f"%{b.base} in {b.module or 'the root module'}",
        found=str(expression),
        fix="capture the model with this axis fixed",
    )


def _read(b: Builder, symbol: sympy.Symbol) -> Value:
    found: Any = b.memo.get(("symbol", symbol))
    if found is None:
        raise UnsupportedByTarget(
            f"the size {symbol} is not the length of any axis",
            where=f"%{b.base}",
            fix="capture the model with this axis fixed",
        )
    value, axis = found
    if axis is None:
        return value if isinstance(value, Value) else value()
    return b.op("Shape", value, dtype=INT64, start=axis, end=axis + 1)


Rule = Callable[[Builder, sympy.Expr, list[Value]], Value]


def _fold(op_type: str) -> Rule:
    def rule(b: Builder, expression: sympy.Expr, parts: list[Value]) -> Value:
        return reduce(lambda left, right: b.op(op_type, left, right), parts)

    return rule


def _ceiling(b: Builder, expression: sympy.Expr, parts: list[Value]) -> Value:
    above = b.op("Sub", b.op("Add", parts[0], parts[1]), b.ints([1]))
    return b.op("Div", above, parts[1])


def _power(b: Builder, expression: sympy.Expr, parts: list[Value]) -> Value:
    return b.op("Pow", parts[0], parts[1])


def _modular(b: Builder, expression: sympy.Expr, parts: list[Value]) -> Value:
    return b.op("Mod", b.op("Div", parts[0], parts[1]), parts[2])


# Sizes are not negative, so ONNX's division, which rounds towards zero, is a floor here.
_RULES: dict[Any, Rule] = {
    sympy.Add: _fold("Add"),
    sympy.Mul: _fold("Mul"),
    sympy.Pow: _power,
    sympy.Max: _fold("Max"),
    sympy.Min: _fold("Min"),
    sizes_of_torch.Max: _fold("Max"),
    sizes_of_torch.Min: _fold("Min"),
    sizes_of_torch.FloorDiv: _fold("Div"),
    sizes_of_torch.CleanDiv: _fold("Div"),
    sizes_of_torch.CeilDiv: _ceiling,
    sizes_of_torch.Mod: _fold("Mod"),
    sizes_of_torch.PythonMod: _fold("Mod"),
    sizes_of_torch.ModularIndexing: _modular,
    sizes_of_torch.PowByNatural: _power,
}


_NUMBER_RULES: dict[Any, Rule] = {
    sympy.Add: _fold("Add"),
    sympy.Mul: _fold("Mul"),
    sympy.Pow: _power,
    sizes_of_torch.IntTrueDiv: _fold("Div"),
    sizes_of_torch.FloatTrueDiv: _fold("Div"),
    sizes_of_torch.FloatPow: _power,
    sizes_of_torch.ToFloat: lambda b, expression, parts: parts[0],
    sizes_of_torch.OpaqueUnaryFn_sqrt: lambda b, expression, parts: b.op("Sqrt", parts[0]),
}


def dimension_text(value: Any, names: dict[sympy.Symbol, str]) -> int | str:
    """A size for people: symbols under the names given to the input axes they come from."""
    expression = size(value)
    if isinstance(expression, int):
        return expression
    known = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}
    return str(expression.xreplace(known))
