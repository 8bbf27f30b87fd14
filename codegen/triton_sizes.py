"""Symbolic sizes in a generated model: n0, n1, ... read off the inputs, and expressions of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
from torch import Tensor
from torch.utils._sympy.printers import PythonPrinter

from ..ir.errors import UnsupportedByTarget
from ..ir.program import Node
from .row_space import expression


class Sizes:
    """The symbols of a program's inputs by the names that the generated code gives them."""

    def __init__(self) -> None:
        self._names: dict[Any, sympy.Symbol] = {}
        self._printer = PythonPrinter()

    def bind(self, node: Node) -> list[str]:
        """Lines that read the symbols off an input tensor; those known already are not repeated."""
        value: Tensor = node.meta["val"]
        lines: list[str] = []
        for axis, size in enumerate(value.shape):
            found = expression(size)
            if not isinstance(found, int) and found.is_symbol and found not in self._names:
                name = f"n{len(self._names)}"
                self._names[found] = sympy.Symbol(name, integer=True)
                lines.append(f"{name} = {node.name}.shape[{axis}]")
        return lines

    def text(self, found: Any, where: str) -> str:
        """An int or sympy expression as Python; raises UnsupportedByTarget if data decides it."""
        if isinstance(found, int):
            return str(found)
        if found.free_symbols - self._names.keys():
            raise UnsupportedByTarget(
                f"the size {found} depends on the data",
                where=where,
                fix="export without a recipe step that makes such a size, or to another target",
            )
        return self._printer.doprint(found.xreplace(self._names))

    def shape(self, shape: Iterable[Any], where: str) -> str:
        """A tuple of sizes."""
        sizes = [self.text(expression(size), where) for size in shape]
        return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
