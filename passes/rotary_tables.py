"""Cosine and sine tables of a rotary embedding, with one angle for each rotated pair.

Models duplicate the angles to the width of a head, then take cosine and sine, scale, cast and
reshape. A table is rebuilt from the angles before their duplication, by the same operations, next
to the nodes that it replaces; the duplicated one is then read by nobody.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from ..ir.edit import Editor, shape
from ..ir.look_through import same_value
from ..ir.pattern import bound_arguments, op
from ..ir.program import Node, Program
from .spelling import arguments, axis, calls, rank

aten = torch.ops.aten

Layout = Literal["half", "interleaved", "real", "imaginary"]
"""How a table of double width repeats its angles (f f, or f0 f0 f1 f1), or which part of a complex
table is wanted."""

_UNARY = (aten.cos.default, aten.sin.default, aten.neg.default, aten._to_copy.default)
_BINARY = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
"""Elementwise: a factor of one number for each row is no table."""
_RESIZING = (aten.reshape.default, aten.expand.default)


class Tables:
    """Single-angle forms of the tables of one program, each built once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._built: dict[tuple[Node, Layout], Node] = {}

    def fault(self, table: Node, layout: Layout) -> str:
        """Why a table does not provably repeat its angles in this layout; "" if it does."""
        if self._known(table, layout):
            return ""
        parts = [part for part in self._parts(table, layout) if part is not None]
        if not parts:
            what = str(getattr(table.target, "__name__", table.op)).split(".")[0]
            return f"the angle table is not proven to hold each angle twice: it comes from {what}"
        return next((fault for part in parts if (fault := self.fault(part, layout))), "")

    def component(self, table: Node, layout: Layout, editor: Editor) -> Node:
        """The real or the imaginary part of a complex table: cos and sin of its angles if known."""
        if not self.fault(table, layout):
            return self.single(table, layout, editor)
        return op.select(op.view_as_real(table), rank(table), 0 if layout == "real" else 1)

    def single(self, table: Node, layout: Layout, editor: Editor) -> Node:
        """The table with one angle per pair; call only where `fault` is ""."""
        key = (table, layout)
        if key not in self._built:
            self._built[key] = self._build(table, layout, editor)
        return self._built[key]

    def _known(self, table: Node, layout: Layout) -> bool:
        return (
            _source(table, layout) is not None
            or self._repeats(table, layout)
            or (layout in ("real", "imaginary") and _angle(table) is not None)
        )

    def _repeats(self, table: Node, layout: Layout) -> bool:
        """Whether a weight holds the same numbers twice."""
        if table.op != "get_attr" or layout not in ("half", "interleaved"):
            return False
        kept = self.program.weights[str(table.target)]
        half = kept.shape[-1] // 2
        if kept.shape[-1] != 2 * half:
            return False
        first, second = kept[..., 0::2], kept[..., 1::2]
        if layout == "half":
            first, second = kept[..., :half], kept[..., half:]
        return torch.equal(first, second)

    def _build(self, table: Node, layout: Layout, editor: Editor) -> Node:
        source = _source(table, layout)
        if source is not None:
            return source
        if layout in ("real", "imaginary") and (angle := _angle(table)) is not None:
            with editor.at(_after(table), table.meta["module"]):
                return op.cos(angle) if layout == "real" else op.sin(angle)
        if table.op == "get_attr":
            with editor.at(_after(table), table.meta["module"]):
                last, width = rank(table) - 1, shape(table)[-1]
                if layout == "half":
                    return op.slice(table, last, 0, width // 2)
                return op.slice(table, last, 0, width, 2)
        return self._rebuild(table, layout, editor)

    def _rebuild(self, table: Node, layout: Layout, editor: Editor) -> Node:
        """The same operation on the single-angle forms of what it reads."""
        parts = self._parts(table, layout)
        args = [
            value if part is None else self.single(part, layout, editor)
            for part, value in zip(parts, arguments(table), strict=True)
        ]
        if calls(table, *_RESIZING):
            sizes = list(arguments(table)[1])
            args[1] = [*sizes[:-1], _width(args[0])]
        with editor.at(_after(table), table.meta["module"]):
            return editor.emit(table.target, *args, **table.kwargs)

    def _parts(self, table: Node, layout: Layout) -> list[Node | None]:
        """For each argument the wide table that it is, or None; empty if not understood."""
        args = arguments(table)
        none: list[Node | None] = [None] * len(args)
        real = layout in ("half", "interleaved")
        if calls(table, *_BINARY) and real:
            wide = [a if isinstance(a, Node) and _width(a) != 1 else None for a in args]
            return wide if any(wide) else []
        if (calls(table, *_UNARY) and real) or _moves_other_axes(table):
            return [args[0], *none[1:]]
        return []


def _width(value: Any) -> Any:
    """The size of a table's last axis; 1 for a scalar."""
    return shape(value)[-1] if isinstance(value, Node) and rank(value) else 1


def _after(node: Node) -> Node:
    """The place right behind a node; behind all weights for a weight."""
    place = node.next
    while place.op in ("get_attr", "placeholder"):
        place = place.next
    return place


def _source(table: Node, layout: Layout) -> Node | None:
    """The angles that an operation repeats."""
    last = rank(table) - 1
    if layout == "half" and calls(table, aten.cat.default):
        parts, dim = arguments(table)[0], bound_arguments(table)["dim"]
        twice = len(parts) == 2 and axis(dim, last + 1) == last and same_value(*parts)
        return parts[0] if twice else None
    if layout == "interleaved" and calls(table, aten.repeat_interleave.self_int):
        given = bound_arguments(table)
        on_last = given["dim"] is not None and axis(given["dim"], last + 1) == last
        return given["self"] if on_last and given["repeats"] == 2 else None
    if calls(table, aten.reshape.default) and calls(arguments(table)[0], aten.stack.default):
        return _stacked(table, layout)
    return None


def _stacked(table: Node, layout: Layout) -> Node | None:
    """f, where the table is stack([f, f]) with the new axis merged into the last one."""
    stack = arguments(table)[0]
    parts, dim = stack.args[0], axis(bound_arguments(stack)["dim"], rank(stack))
    wanted = rank(stack) - 1 if layout == "interleaved" else rank(stack) - 2
    same = len(parts) == 2 and dim == wanted and same_value(*parts)
    if not same or rank(parts[0]) != rank(table) or _width(table) != 2 * _width(parts[0]):
        return None
    leading = zip(shape(parts[0])[:-1], shape(table)[:-1], strict=True)
    return parts[0] if all(str(a) == str(b) for a, b in leading) else None


def _angle(table: Node) -> Node | None:
    """The angles of a complex table of numbers of size one."""
    if not calls(table, aten.polar.default):
        return None
    size, angle = arguments(table)
    ones = calls(size, aten.full.default, aten.full_like.default) and size.args[1] == 1
    return angle if ones or calls(size, aten.ones_like.default) else None


def _moves_other_axes(node: Node) -> bool:
    """Whether a node only picks, repeats or reorders axes before the last."""
    if node.op != "call_function" or not arguments(node):
        return False
    source, args = arguments(node)[0], arguments(node)
    if calls(node, *_RESIZING):
        return _width(source) == _width(node) and rank(source) > 0
    if calls(node, aten.unsqueeze.default):
        return args[1] < rank(node) - 1
    if calls(node, aten.slice.Tensor, aten.select.int, aten.index_select.default):
        return args[1] < rank(source) - 1
    if calls(node, aten.transpose.int):
        return args[2] < rank(source) - 1
    if calls(node, aten.index.Tensor):
        return len(args[1]) < rank(source) and None not in args[1]
    return calls(node, aten.embedding.default)


def angles_differ(cos: Node, sin: Node) -> bool:
    """Whether the tables are provably not cosine and sine of the same angles."""
    found = [_trigonometric(table) for table in (cos, sin)]
    if found[0] is None and found[1] is None:
        return False
    if found[0] is None or found[1] is None:
        return True
    right = calls(found[0], aten.cos.default) and calls(found[1], aten.sin.default)
    return not (right and same_value(arguments(found[0])[0], arguments(found[1])[0]))


def _trigonometric(table: Any) -> Node | None:
    """The cosine or sine that a table comes from."""
    for _ in range(16):
        if calls(table, aten.cos.default, aten.sin.default):
            return table
        wide = [n for n in getattr(table, "all_input_nodes", ()) if _width_or_one(n) != 1]
        if not wide:
            return None
        table = wide[0]
    return None


def _width_or_one(node: Node) -> Any:
    return _width(node) if isinstance(node.meta.get("val"), torch.Tensor) else 1
