"""Name the first value at which a calibration run leaves the finite numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import NonFiniteActivation
from ..ir.interpret import run
from ..ir.program import Node, Program
from ..ir.text import value_names
from .calibration_stream import ancestors


class _Found(Exception):
    """Ends a watched run at the node that was looked for."""

    def __init__(self, node: Node | None) -> None:
        self.node = node


def nonfinite_activation(
    program: Program, batch: Sequence[Any], number: int, value: Node
) -> NonFiniteActivation:
    """The error for batch `number`, at whose `value` a NaN or infinity was seen.

    Names the first value holding NaN. Infinities alone are lawful in masks, so one is named only
    where `value` holds no NaN.
    """
    first = _first(program, batch, value, torch.isnan) or _first(program, batch, value, torch.isinf)
    node = first or value
    names = value_names(program.graph)
    module = node.meta.get("module", "")
    ill = [
        str(read.target)
        for read in node.all_input_nodes
        if read.op == "get_attr" and not _finite(program.weights[str(read.target)])
    ]
    read = ", ".join(f"%{names[source]}" for source in node.all_input_nodes)
    return NonFiniteActivation(
        f"calibration batch {number} makes %{names[node]} NaN or infinite",
        where=f"%{names[node]}, of {module or 'the root module'}",
        expected="finite activations",
        found=f"the first of them in {node.target}({read})",
        fix=f"repair the weight {ill[0]}, which is not finite itself"
        if ill
        else "leave the batch out, or run the model in a wider dtype",
    )


def _finite(weight: Tensor) -> bool:
    return bool(torch.isfinite(weight).all())


def _first(
    program: Program, batch: Sequence[Any], value: Node, test: Callable[[Tensor], Tensor]
) -> Node | None:
    """The first of the values that lead to `value`, itself included, that fails the test."""
    needed = ancestors([value])

    def watch(node: Node, result: Any) -> None:
        floating = isinstance(result, Tensor) and result.is_floating_point()
        if node in needed and floating and bool(test(result).any()):
            raise _Found(node)
        if node is value:
            raise _Found(None)

    try:
        run(program, batch, watch=watch)
    except _Found as found:
        return found.node
    return None
