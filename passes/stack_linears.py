"""One matmul instead of several that read the same value: their weight rows, stacked.

[linear(x, A), linear(x, B)] = split(linear(x, [A; B])). Each output element is the same sum of the
same products; only the blocking of the matmul, and so the rounding, may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..ir.edit import Editor, shape
from ..ir.encoded import Encoded
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from ..ir.stack_encoded import stack_rows, why_not_row_stacked
from ..ir.weights import Derived, Weights

LINEAR = torch.ops.aten.linear.default
SLICE = torch.ops.aten.slice.Tensor


def why_not_stackable(linears: Sequence[Node], weights: Weights) -> str | None:
    """The sentence why these linears cannot become one, or None; weights: the program's."""
    first = bound_arguments(linears[0])
    for node in linears:
        arguments = bound_arguments(node)
        if arguments["input"] is not first["input"]:
            return f"%{node.name} reads another value than %{linears[0].name}"
        parts = [arguments["weight"], arguments["bias"]]
        if not _is_weight(parts[0]) or not (parts[1] is None or _is_weight(parts[1])):
            return f"the weight of %{node.name} is computed in the graph"
        if parts[0].meta["val"].dtype != first["weight"].meta["val"].dtype:
            return f"the weight of %{node.name} has another dtype than that of %{linears[0].name}"
    return _why_not_packed(linears, weights)


def _why_not_packed(linears: Sequence[Node], weights: Weights) -> str | None:
    """The sentence why the stored weights cannot be stacked, or None; dense ones always can."""
    names = [str(bound_arguments(node)["weight"].target) for node in linears]
    entries = [weights.entry(name) for name in names if name in weights]
    encoded = [entry for entry in entries if isinstance(entry, Encoded)]
    if not encoded:
        return None
    if len(encoded) < len(entries):
        dense = next(n for n, e in zip(names, entries, strict=True) if not isinstance(e, Encoded))
        return f"{dense} is dense and another of the weights is kept in a number format"
    return why_not_row_stacked(encoded)


def _is_weight(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def stack_linears(linears: Sequence[Node], editor: Editor) -> dict[Node, Node]:
    """Emit the stacked matmul and one slice for each old linear; returns {old: slice}.

    Weights [out_i, in] become [sum of out_i, in]; a missing bias is zeros beside a present one.
    """
    arguments = [bound_arguments(node) for node in linears]
    rows = [shape(a["weight"])[0] for a in arguments]
    label = joined_name([str(a["weight"].target) for a in arguments])
    weight = _stacked(editor, label, [a["weight"] for a in arguments], rows)
    bias = None
    if any(a["bias"] is not None for a in arguments):
        label = label.rpartition(".")[0] + ".bias"
        bias = _stacked(editor, label, [a["bias"] for a in arguments], rows)
    joined = editor.emit(LINEAR, arguments[0]["input"], weight, *([bias] if bias else []))
    replaced: dict[Node, Node] = {}
    start = 0
    for node, count in zip(linears, rows, strict=True):
        editor.module = node.meta.get("module", editor.module)
        replaced[node] = editor.emit(SLICE, joined, -1, start, start + count)
        start += count
    return replaced


def _stacked(editor: Editor, label: str, parts: Sequence[Node | None], rows: Sequence[int]) -> Node:
    weights = editor.program.weights
    names = [None if part is None else str(part.target) for part in parts]
    dtype = next(weights.dtype(name) for name in names if name is not None)
    entries = [
        torch.zeros(count, dtype=dtype) if name is None else weights.entry(name)
        for name, count in zip(names, rows, strict=True)
    ]
    encoded = [entry for entry in entries if isinstance(entry, Encoded)]
    if len(encoded) == len(entries):
        return editor.weight(label, stack_rows(encoded))
    total = torch.Size((sum(rows), *tuple(entries[0].shape)[1:]))
    return editor.weight(label, Derived(tuple(entries), _concatenate, total, dtype, "rows stacked"))


def _concatenate(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 0)


def joined_name(names: Sequence[str]) -> str:
    """model.layers.0.attn.{q+k+v}.weight becomes model.layers.0.attn.q+k+v.weight."""
    split = [name.split(".") for name in names]
    length = min(len(parts) for parts in split)
    prefix = 0
    while prefix < length - 1 and len({parts[prefix] for parts in split}) == 1:
        prefix += 1
    tail = split[0][-1]
    middles = ["_".join(parts[prefix:-1]) or parts[-1] for parts in split]
    return ".".join([*split[0][:prefix], "+".join(middles), tail])


def earliest(nodes: Sequence[Node]) -> Node:
    """The node that comes first in the graph."""
    return min(nodes)
