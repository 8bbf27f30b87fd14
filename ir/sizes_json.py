"""Sizes of inputs as JSON: a number, the name of a free axis, or sums and products of those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from .errors import CorruptFile, UnsupportedShape


def size_to_json(size: Any, where: str = "") -> Any:
    """128, "s3" or {"mul": [8, "s3"]}; raises UnsupportedShape for another relation."""
    if isinstance(size, int):
        return size
    return _expression_to_json(size.node.expr, where)


def _expression_to_json(expression: Any, where: str) -> Any:
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return str(expression)
    for kind, name in ((sympy.Add, "add"), (sympy.Mul, "mul")):
        if isinstance(expression, kind):
            return {name: [_expression_to_json(part, where) for part in expression.args]}
    raise UnsupportedShape(
        "an input's size is a function of others that cannot be saved",
        where=where,
        expected="a number, a free axis, or sums and products of them",
        found=str(expression),
        fix="trace the model with other dynamic_shapes",
    )


def free_axes(graph: fx.Graph) -> dict[str, int]:
    """The free axes that the inputs name, each with the size it had when it was traced."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        for size in (*getattr(value, "shape", ()), value):
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    known = size.node.shape_env.backed_var_to_val.get(symbol, 2)
                    found[str(symbol)] = int(known)
    return found


class Sizes:
    """The free axes of a program that is being read, as symbols of a new shape environment."""

    def __init__(self, axes: Mapping[str, Any], where: str) -> None:
        self.env, self.where = ShapeEnv(duck_shape=False), where
        self._symbols: dict[str, Any] = {}
        self._hints: dict[Any, int] = {}
        for name, hint in axes.items():
            if not isinstance(hint, int) or isinstance(hint, bool) or hint < 0:
                raise self._corrupt("a size for every free axis", f"{name}: {hint!r}")
            # 0 and 1 would be taken for constants; any other size stands for "some size"
            hint = max(hint, 2)
            symbol = self.env.create_symbol(hint, ConstantSource(name), DimDynamic.DYNAMIC)
            self._symbols[name], self._hints[symbol] = symbol, hint

    def size(self, form: Any) -> Any:
        """The size of a form: an int or a SymInt. Raises CorruptFile."""
        expression = self._expression(form)
        if isinstance(expression, int):
            return expression
        hint = int(expression.subs(self._hints))
        return self.env.create_symintnode(expression, hint=hint)

    def _expression(self, form: Any) -> Any:
        if isinstance(form, int) and not isinstance(form, bool) and form >= 0:
            return form
        if isinstance(form, str) and form in self._symbols:
            return self._symbols[form]
        if isinstance(form, dict) and len(form) == 1:
            ((kind, parts),) = form.items()
            if kind in ("add", "mul") and isinstance(parts, list):
                joined = sympy.Add if kind == "add" else sympy.Mul
                return joined(*(self._expression(part) for part in parts))
        raise self._corrupt("a size: a number or a free axis", repr(form)[:100])

    def check_free(self) -> None:
        """Raise CorruptFile if computing the values fixed an axis that was free."""
        for name, symbol in self._symbols.items():
            if self.env.replace(symbol).is_number:
                raise self._corrupt(f"the free axis {name}", f"{self.env.replace(symbol)} only")

    def _corrupt(self, expected: str, found: str) -> CorruptFile:
        return CorruptFile(
            "the saved sizes of the inputs do not fit the graph",
            where=self.where,
            expected=expected,
            found=found,
            fix="save the program again",
        )
