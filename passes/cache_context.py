"""How long a text a decoder takes: the rows of its tables of positions tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.edit import same_size, shape
from ..ir.positional import Positional, free_sizes
from ..ir.program import Node, Program
from .cache_inputs import Decoder
from .cache_padding import place_value

aten = torch.ops.aten
_PLACES = 5
_UNBOUNDED = 1 << 30


def longest_text(program: Program, decoder: Decoder) -> int | None:
    """The most tokens of a text; None where nothing in the program limits it."""
    positional = Positional(program, decoder.totals)
    limits = [
        limit
        for node in program.graph.nodes
        if node in decoder.places and (limit := _limit(node, positional, decoder)) is not None
    ]
    symbol = decoder.length.node.expr
    captured = free_sizes(program).get(symbol)
    if captured is not None and captured[1] < _UNBOUNDED:
        limits.append(captured[1])
    return min(limits, default=None)


def _limit(node: Node, positional: Positional, decoder: Decoder) -> int | None:
    if not any(same_size(size, decoder.length) for size in _sizes(node)):
        return None
    table: Any = node.args[0] if node.args else None
    if node.target is aten.embedding.default:
        places = place_value(positional, node.args[1], decoder.length, _PLACES)  # type: ignore[arg-type]
        return None if places is None else _rows_after(places, int(shape(table)[0]))
    is_head = node.target is aten.slice.Tensor and table.op == "get_attr"
    return int(shape(table)[int(node.args[1])]) if is_head else None  # type: ignore[arg-type]


def _sizes(node: Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _rows_after(places: Tensor, rows: int) -> int | None:
    """The table's rows less those before the first place's; None if the table does not count."""
    flat = places.reshape(-1, _PLACES) if places.shape[-1] == _PLACES else None
    if flat is None or not bool((flat.diff(dim=-1) == 1).all()):
        return None
    return rows - int(flat[0, 0])
