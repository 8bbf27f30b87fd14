"""Find what is fused: epilogues of matmuls first, then regions of pointwise and row operations.

An epilogue saves writing and reading a matmul's result. A region saves the values between its
operations: each that nobody else reads is neither written nor read, each other one is read once
less. A region is a unit in the order of execution, so it may not depend on what depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import same_size
from ..ir.program import Node
from .region import Region, nbytes
from .row_space import Space, form_of, is_one, space_of
from .triton_expressions import DTYPES, Call, Unfusible
from .triton_operations import HANDLERS, POINTWISE, ROW_WISE

MOST_COLUMNS = 16384
"""The longest row that a kernel holds at once."""

MOST_INPUTS = 14
MOST_OPERANDS = 3
"""Operands of an epilogue beside the matmul's result and bias."""


def why_not(node: Node) -> str | None:
    """Why an operation cannot be in a generated kernel; None if it can."""
    handler = HANDLERS.get(node.target)
    if handler is None:
        return "it is neither pointwise nor a row operation that has a Triton form"
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 1:
        return "it is no array"
    tensors = [value, *(n.meta["val"] for n in node.all_input_nodes if _tensor(n))]
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"it computes in {tensor.dtype}"
    if node.target in ROW_WISE:
        columns = _row_input(node).shape[-1]
        if not isinstance(columns, int) or not 0 < columns <= MOST_COLUMNS:
            return f"its rows have {columns} values, and a kernel holds up to {MOST_COLUMNS}"
    try:
        handler(Call(node, "y", lambda read: "x", lambda line: None, "1"))
    except Unfusible as reason:
        return str(reason)
    return None


def _tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _row_input(node: Node) -> Tensor:
    first: Any = node.args[0]
    return first.meta["val"]


def space_in(node: Node) -> Space:
    """The space that an operation runs over: of a reduction, that of its input."""
    return space_of(_row_input(node) if node.target in ROW_WISE else node.meta["val"])


@dataclass(eq=False)
class Draft:
    """A region in the making."""

    space: Space
    members: list[Node] = field(default_factory=list[Node])

    def add(self, node: Node, space: Space) -> None:
        self.members.append(node)
        if self.space.columns == 1:
            self.space = space


def find_regions(graph: fx.Graph) -> list[list[Node]]:
    """The members of every region worth a kernel, in graph order.

    A single operation is a region too: it is one launch either way, and ours needs no library.
    """
    return _Finder(graph).found()


class _Finder:
    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.draft: dict[Node, Draft] = {}

    def found(self) -> list[list[Node]]:
        for node in self.order:
            if node.op == "call_function" and why_not(node) is None:
                self._place(node)
        drafts = dict.fromkeys(self.draft.values())
        return [sorted(d.members, key=self.order.__getitem__) for d in drafts]

    def _place(self, node: Node) -> None:
        space = space_in(node)
        home: Draft | None = None
        near = [self.draft[read] for read in node.all_input_nodes if read in self.draft]
        for draft in dict.fromkeys(near):
            if not draft.space.joins(space) or len(_outside(draft.members, node)) > MOST_INPUTS:
                continue
            if home is None and not self._depends(node, draft):
                home = draft
                home.add(node, space)
                self.draft[node] = home
            elif home is not None and draft is not home and self._may_merge(home, draft):
                self._merge(home, draft)
        if home is None:
            self.draft[node] = Draft(space, [node])

    def _depends(self, node: Node, draft: Draft) -> bool:
        """Whether an input of the node that is not in the draft comes from it."""
        outer = [read for read in node.all_input_nodes if self.draft.get(read) is not draft]
        return self._reaches(draft, outer)

    def _may_merge(self, one: Draft, other: Draft) -> bool:
        if not one.space.joins(other.space):
            return False
        if len(_outside([*one.members, *other.members])) > MOST_INPUTS:
            return False
        return not self._indirect(one, other) and not self._indirect(other, one)

    def _indirect(self, source: Draft, sink: Draft) -> bool:
        """Whether the sink depends on the source through something outside of both."""
        outer = [
            read
            for member in sink.members
            for read in member.all_input_nodes
            if self.draft.get(read) not in (source, sink)
        ]
        return self._reaches(source, outer)

    def _reaches(self, source: Draft, nodes: list[Node]) -> bool:
        """Whether a value of the source is among what the nodes need, regions being units."""
        low = self._lowest(source)
        stack, seen = list(nodes), set[Any]()
        while stack:
            node = stack.pop()
            draft = self.draft.get(node)
            if draft is source:
                return True
            unit = draft or node
            if unit in seen:
                continue
            seen.add(unit)
            if draft is None and self.order[node] < low:
                continue
            inside = draft.members if draft else [node]
            stack += [read for member in inside for read in member.all_input_nodes]
        return False

    def _lowest(self, source: Draft) -> int:
        """Before this place nothing can depend on the source: no unit that reaches past it."""
        low = first = min(self.order[member] for member in source.members)
        for draft in dict.fromkeys(self.draft.values()):
            places = [self.order[member] for member in draft.members]
            if max(places) > first:
                low = min(low, *places)
        return low

    def _merge(self, home: Draft, other: Draft) -> None:
        for member in other.members:
            home.add(member, other.space)
            self.draft[member] = home


def _outside(members: list[Node], extra: Node | None = None) -> set[Node]:
    inside = {*members, *([extra] if extra else [])}
    return {read for node in inside for read in node.all_input_nodes if read not in inside}


def find_epilogue(product: Node) -> list[Node]:
    """The chain of pointwise operations after a matmul that its kernel can do on its sums.

    Every link but the last is read by the next alone.
    """
    chain: list[Node] = []
    value, operands = product, 0
    while len(value.users) == 1:
        (user,) = value.users
        more = _operands(user, value)
        if more is None or operands + more > MOST_OPERANDS:
            break
        chain.append(user)
        operands += more
        value = user
    return chain


def _operands(user: Node, value: Node) -> int | None:
    """How many further operands a link of an epilogue reads; None if it cannot be one."""
    if user.target not in POINTWISE or why_not(user) is not None:
        return None
    mine = user.meta["val"]
    before = value.meta["val"]
    if mine.dtype != before.dtype or space_of(mine) != space_of(before):
        return None
    others = [read for read in user.all_input_nodes if read is not value]
    for other in others:
        given = other.meta.get("val")
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return None
        columns = given.shape[-1] if given.dim() else 1
        wide = not is_one(columns) or is_one(mine.shape[-1])
        if not wide or form_of(given, mine.shape) == "general" or not _lies_before(other, user):
            return None
    return len(set(others))


def _lies_before(node: Node, other: Node) -> bool:
    return node.op != "call_function" or node < other


MOST_SOURCES = 2
"""Tensors that a prologue reads beside the first."""


def may_prepare(region: Region) -> bool:
    """Whether a region can be the prologue of a matmul: every value from those at its place.

    The first input gives the product its rows and its dtype; the others have the same rows, or are
    one row for all.
    """
    if len(region.results) != 1 or not 1 <= len(region.inputs) <= 1 + MOST_SOURCES:
        return False
    made = region.results[0].meta["val"]
    first = region.inputs[0].meta.get("val")
    if not isinstance(first, Tensor) or first.dim() != made.dim() or first.dtype != made.dtype:
        return False
    if not all(map(same_size, first.shape, made.shape)):
        return False
    if any(node.target not in POINTWISE for node in region.operations):
        return False
    if any(space_of(n.meta["val"]) != space_of(made) for n in region.operations):
        return False
    return all(_is_source(node.meta.get("val"), made) for node in region.inputs[1:])


def _is_source(given: object, made: Tensor) -> bool:
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.dim() < 1:
        return False
    if not same_size(given.shape[-1], made.shape[-1]) or is_one(made.shape[-1]):
        return False
    return given.dim() == 1 or form_of(given, made.shape) == "rows"


def saved_bytes(members: list[Node]) -> Any:
    """Bytes of memory traffic that one kernel for the members saves against one for each."""
    inside, saved = set(members), 0
    for node in members:
        value = node.meta["val"]
        readers = sum(user in inside for user in node.users)
        saved += readers * nbytes(value)
        if readers and all(user in inside for user in node.users):
            saved += nbytes(value)
    return saved


def is_view(node: Node) -> bool:
    """Whether a node reads its input's memory at other places, or under another shape."""
    return node.target in _VIEWS


_ATEN = torch.ops.aten
_VIEWS = {
    _ATEN.reshape.default,
    _ATEN.view.default,
    _ATEN.flatten.using_ints,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.dim,
    _ATEN.alias.default,
}


def keeps_rows(node: Node) -> bool:
    """Whether a node views its input with the same rows and columns, in the same order."""
    if not is_view(node) or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    return before.dim() > 0 and after.dim() > 0 and space_of(before) == space_of(after)
