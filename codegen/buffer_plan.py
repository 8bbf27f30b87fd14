"""When each value of a lowered program lives, which memory it can share, and the peak.

Values are dropped after their last reader; a view keeps what it views. Slots are given greedily:
a value takes the free slot of its own size that was freed last (as a caching allocator does).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..ir.program import Node, Program
from .find_regions import is_view
from .region import nbytes
from .row_space import expression


def buffer_plan(program: Program, sizes: Mapping[Any, int]) -> dict[str, Any]:
    """values: name, bytes as an expression, first and last step, slot; peak: bytes at `sizes`.

    sizes: a number for each symbol of the inputs' shapes. Inputs and weights are not counted.
    """
    steps = [node for node in program.graph.nodes if node.op in ("call_function", "output")]
    place = {node: step for step, node in enumerate(steps)}
    last = {node: _last_use(node, place) for node in steps if node.op == "call_function"}
    slots: list[str] = []
    free: dict[str, list[int]] = {}
    live: list[tuple[int, str, int, Node]] = []
    values: list[dict[str, Any]] = []
    peak = used = 0
    for step, node in enumerate(steps):
        if (
            node.op != "call_function"
            or is_view(node)
            or not isinstance(node.meta.get("val"), Tensor)
        ):
            continue
        for end, text, slot, owner in [entry for entry in live if entry[0] < step]:
            live.remove((end, text, slot, owner))
            free.setdefault(text, []).append(slot)
            used -= _number(nbytes(owner.meta["val"]), sizes)
        size = nbytes(node.meta["val"])
        text = str(expression(size))
        if free.get(text):
            slot = free[text].pop()
        else:
            slot = len(slots)
            slots.append(text)
        live.append((last[node], text, slot, node))
        used += _number(size, sizes)
        peak = max(peak, used)
        values.append(
            {"name": node.name, "bytes": text, "first": step, "last": last[node], "slot": slot}
        )
    return {
        "values": values,
        "slots": slots,
        "peak": {"bytes": peak, "sizes": {str(k): v for k, v in sizes.items()}},
    }


def _last_use(node: Node, place: Mapping[Node, int]) -> int:
    """The step of the last reader, views of the value included."""
    end, stack = place[node], [node]
    while stack:
        for user in stack.pop().users:
            end = max(end, place[user])
            if user.op == "call_function" and (is_view(user) or not _owns(user)):
                stack.append(user)
    return end


def _owns(node: Node) -> bool:
    """Whether an operation makes memory of its own (by the aliases in its schema)."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or not any(r.alias_info is not None for r in schema.returns)


def _number(size: Any, sizes: Mapping[Any, int]) -> int:
    found = expression(size)
    return found if isinstance(found, int) else int(found.xreplace(dict(sizes)))
