"""Questions about the nodes of a cached program that a decoding plan asks."""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..ir.program import Node
from .decode_sizes import PAST

_ATEN = torch.ops.aten
_MAY_ALIAS = {_ATEN.dropout.default, _ATEN._unsafe_view.default, operator.getitem}


def is_append(node: Node) -> bool:
    """cat([past, new], 2)"""
    if node.target is not _ATEN.cat.default or node.args[1:] not in ((2,), (-2,)):
        return False
    parts = node.args[0]
    first = parts[0] if isinstance(parts, (list, tuple)) and len(parts) == 2 else None
    return isinstance(first, Node) and bool(PAST.fullmatch(first.name))


def needed_for(result: Node) -> set[Node]:
    """The values that a result is computed from."""
    found: set[Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        value = node.meta.get("val")
        if not isinstance(value, (torch.SymInt, int)):
            pending += node.all_input_nodes
    return found


def looks(target: Any) -> bool:
    """Whether an operation may return its operand's memory in another form."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target in _MAY_ALIAS or any(r.alias_info is not None for r in target._schema.returns)


def may_alias(target: Any) -> bool:
    return not isinstance(target, torch._ops.OpOverload) or looks(target)
