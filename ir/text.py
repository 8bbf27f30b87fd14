"""A program as text, and a readable diff of two programs, for people and for golden tests.

Values are named by the module they come from, so an edit in one layer renames nothing elsewhere.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .program import Node, Program

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def dtype_text(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def op_text(node: Node) -> str:
    """linear, rms_norm, add, ...: the operation without its namespace and overload."""
    if node.op != "call_function":
        return node.op
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
        return name if target._overloadname in ("default", "Tensor", "int") else _overload(target)
    return getattr(target, "__name__", str(target))


def _overload(target: torch._ops.OpOverload) -> str:
    return f"{target._schema.name.split('::')[-1]}.{target._overloadname}"


def value_names(graph: fx.Graph) -> dict[Node, str]:
    """A stable, readable name for every value of a graph."""
    per_module = Counter(
        node.meta.get("module", "") for node in graph.nodes if node.op == "call_function"
    )
    taken: Counter[str] = Counter()
    names: dict[Node, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
            continue
        if node.op != "call_function":
            names[node] = node.name
            continue
        module = node.meta.get("module", "")
        short = op_text(node).split(".")[0].strip("_")
        if module and per_module[module] == 1:
            name = module
        else:
            name = f"{module}.{short}" if module else short
        taken[name] += 1
        names[node] = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"
    return names


class _Sizes:
    """Symbolic sizes renamed n0, n1, ... in order of appearance; sums and products in their order.

    The symbols' own names depend on what else the process has traced, so nothing hangs on them.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._known: dict[str, str] = {}

    def text(self, size: Any) -> str:
        if isinstance(size, int):
            return str(size)
        told = str(size)
        if told not in self._known:
            self._known[told] = self._renamed(size)
        return self._known[told]

    def _renamed(self, size: torch.SymInt) -> str:
        expression: Any = size.node.expr
        names: dict[Any, Any] = {}
        for symbol in sorted(expression.free_symbols, key=str):
            if re.fullmatch(r"[su]\d+", str(symbol)):
                name = self._names.setdefault(str(symbol), f"n{len(self._names)}")
                names[symbol] = sympy.Symbol(name, **symbol.assumptions0)
        return str(expression.xreplace(names))


def _type_text(value: Any, sizes: _Sizes) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_text(value.dtype)}[{', '.join(sizes.text(s) for s in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_type_text(part, sizes) for part in value)})"  # type: ignore[reportUnknownVariableType]
    if isinstance(value, (torch.SymInt, int)):
        return f"int {sizes.text(value)}"
    return type(value).__name__


def _argument_text(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, fx.Node):
        return f"%{names[value]}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument_text(part, names) for part in value)}]"  # type: ignore[reportUnknownVariableType]
    if isinstance(value, torch.dtype):
        return dtype_text(value)
    if isinstance(value, float):
        return repr(value) if abs(value) < 1e16 else f"{value:.6g}"
    return repr(value)


def node_text(node: Node, names: dict[Node, str], sizes: _Sizes | None = None) -> str:
    """One line: %name = op(arguments) : type."""
    sizes = sizes or _Sizes()
    if node.op == "output":
        return f"return {_argument_text(node.args[0], names)}"
    typed = _type_text(node.meta.get("val"), sizes)
    if node.op == "placeholder":
        return f"%{names[node]} : {typed}"
    if node.op == "get_attr":
        return f"%{names[node]} = weight : {typed}"
    arguments = [_argument_text(value, names) for value in node.args]
    arguments += [f"{key}={_argument_text(value, names)}" for key, value in node.kwargs.items()]
    return f"%{names[node]} = {op_text(node)}({', '.join(arguments)}) : {typed}"


def program_text(program: Program, weights: bool = False) -> str:
    """The whole program; weight nodes are left out unless asked for."""
    names = value_names(program.graph)
    sizes = _Sizes()
    lines: list[str] = []
    for node in program.graph.nodes:
        text = node_text(node, names, sizes)
        if node.op != "get_attr" or weights:
            lines.append(text)
    return "\n".join(lines)


def program_diff(before: Program, after: Program, context: int = 1) -> str:
    """A unified diff of two programs' texts."""
    old, new = program_text(before).splitlines(), program_text(after).splitlines()
    lines: Iterable[str] = difflib.unified_diff(old, new, "before", "after", n=context, lineterm="")
    return "\n".join(lines)


def excerpt(node: Node, width: int = 1) -> str:
    """The fault at `node` and the values it reads, the fault marked by >."""
    names = value_names(node.graph)
    sizes = _Sizes()
    lines = [f"    {node_text(read, names, sizes)}" for read in node.all_input_nodes[-2 * width :]]
    return "\n".join([*lines, f" >  {node_text(node, names, sizes)}"])
