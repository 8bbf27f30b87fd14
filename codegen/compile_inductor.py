"""Compile a lowered graph with Inductor, once for every batch and length.

The graph is traced with sizes of its own, apart from the program's, so that nothing Inductor
learns or assumes of a size can change the program. There are no guards at run time: a size that
got fixed while compiling is found before the callable is handed out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ..ir.program import Program

_LOG = logging.getLogger(__name__)
_SMALLEST = 2  # a size of 1 or 0 in an example would be compiled as a constant


def compile_graph(module: fx.GraphModule, program: Program) -> Callable[..., tuple[Any, ...]]:
    """The compiled module over the program's flat inputs.

    If Inductor fixes a free size, the uncompiled module is returned and a warning is logged.
    """
    from torch._inductor.compile_fx import compile_fx

    shapes = ShapeEnv()
    inputs = _symbolic_inputs(program, FakeTensorMode(shape_env=shapes))
    with torch.no_grad():
        compiled = cast("Callable[..., Any]", compile_fx(module, inputs))
    fixed = [str(s) for s, v in shapes.replacements.items() if v.is_number]
    if fixed:
        _LOG.warning("Inductor fixed the sizes %s: the graph runs uncompiled", ", ".join(fixed))
        compiled = module

    def run(*flat: Any) -> tuple[Any, ...]:
        given = [v.contiguous() if isinstance(v, Tensor) else v for v in flat]
        with torch.no_grad():
            return tuple(compiled(*given))

    return run


def _symbolic_inputs(program: Program, mode: FakeTensorMode) -> list[Any]:
    """Fake inputs: free axes get new symbols, shared where the program's axes share one."""
    hints = _Hints(program)
    inputs: list[Any] = []
    for place, node in enumerate(program.inputs):
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            inputs.append(value)
            continue
        sizes = [hints.size(size) for size in value.shape]
        free = [DimDynamic.STATIC if isinstance(s, int) else DimDynamic.DUCK for s in value.shape]
        inputs.append(
            mode.from_tensor(
                torch.empty(sizes, dtype=value.dtype, device=value.device),
                source=ConstantSource(f"input_{place}"),
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=free),
            )
        )
    return inputs


class _Hints:
    """An example length for every symbol: all different, none that is a fixed size of an input."""

    def __init__(self, program: Program) -> None:
        values = [node.meta["val"] for node in program.inputs]
        sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape]
        self._taken = {size for size in sizes if isinstance(size, int)}
        self._chosen: dict[sympy.Symbol, int] = {}
        for size in sizes:
            if isinstance(size, torch.SymInt):
                for symbol in sorted(size.node.expr.free_symbols, key=str):
                    self._choose(symbol, size.node.shape_env)

    def _choose(self, symbol: sympy.Symbol, shapes: ShapeEnv) -> None:
        if symbol in self._chosen:
            return
        lowest = shapes.var_to_range[symbol].lower if symbol in shapes.var_to_range else 0
        length = max(_SMALLEST, int(lowest))
        while length in self._taken:
            length += 1
        self._taken.add(length)
        self._chosen[symbol] = length

    def size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        return int(size.node.expr.xreplace(self._chosen))
