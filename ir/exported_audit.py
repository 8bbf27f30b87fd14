"""What a saved ExportedProgram may hold, so that reading it runs nothing but tensor operations.

A .pt2 archive describes its graph in JSON, which sounds harmless, but loading it looks operations
up by dotted name anywhere under `torch`, evaluates shape expressions as Python, and puts the names
of values into generated source. So all three are checked against what torch.export itself writes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, cast

_TARGET = re.compile(
    r"torch\.ops\.higher_order\.\w+|torch\.ops\.\w+\.\w+\.\w+|torch\.(_sym|sym)_[a-z_]+"
    r"|math\.(ceil|floor|trunc|sqrt|pow)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge"
    r"|and_|or_|not_|lshift|rshift)"
)
_IDENTIFIER = re.compile(r"\w*", re.ASCII)
_QUOTED = re.compile(r"[\w.+-]*", re.ASCII)
_SHAPE_NAMES = """
    Symbol Integer Rational Float Half One Zero NegativeOne Infinity NegativeInfinity
    IntInfinity NegativeIntInfinity Add Mul Pow Abs Max Min Mod Piecewise ExprCondPair
    Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not
    Eq Ne Lt Le Gt Ge floor ceiling sqrt true false BooleanTrue BooleanFalse oo int_oo
    FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift
    PowByNatural FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator
    TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity
"""
_SHAPE_FUNCTIONS = frozenset(_SHAPE_NAMES.split())
_SYMBOL = re.compile(r"(s|u|zf|zuf)\d+")
_SHAPE_NODES = (
    ast.Expression,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.keyword,
    ast.Constant,
    ast.Tuple,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
)


def audit_graph(model: Any) -> Iterator[tuple[str, str]]:
    """Every entry that torch.export does not write: (what it is, its text).

    model: the parsed `models/model.json`.
    """
    if isinstance(model, list):
        for item in cast("list[Any]", model):
            yield from audit_graph(item)
    elif isinstance(model, dict):
        for key, value in cast("dict[str, Any]", model).items():
            if not _harmless(key, value):
                yield key, str(value)
            yield from audit_graph(value)


def _harmless(key: str, value: Any) -> bool:
    if key == "target" and isinstance(value, str):
        return _TARGET.fullmatch(value) is not None
    if key == "expr_str":
        return _is_shape(value)
    if key in ("name", "forward_arg_names"):
        names = cast("list[Any]", value) if isinstance(value, list) else [value]
        return all(n is None or _IDENTIFIER.fullmatch(str(n)) is not None for n in names)
    return True


def _is_shape(text: Any) -> bool:
    """Whether a text is arithmetic over symbols and numbers, as sympy prints it."""
    try:
        tree = ast.parse(str(text), mode="eval")
    except (SyntaxError, ValueError):
        return False
    return all(_is_arithmetic(node) for node in ast.walk(tree))


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _SHAPE_FUNCTIONS or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _QUOTED.fullmatch(node.value) is not None
    return isinstance(node, _SHAPE_NODES)
