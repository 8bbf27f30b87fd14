"""The walk of axis flow over a graph: the channels of every value, and what rules do with them.

What an operation does to channels is a rule (`axes_layout`, `axes_arithmetic`, `axes_products`,
`axes_mixing`), written against this class; `axes` puts walk and rules together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from .axes_channels import Channels, carries, fit
from .axes_weights import WeightView
from .interpret import is_assertion
from .positional import contents_read, free_sizes, is_size, size_at
from .program import Node, Program
from .text import op_text

Mode = Literal["scale", "width", "cut"]
Reading = tuple[Node, Node]  # a product, and the activation that it multiplies
Rule = Callable[["ChannelWalk", Node], Any]


class Unfollowed(Exception):
    """A value whose channels cannot be followed through an operation; says why."""


def walk_sizes(program: Program) -> dict[Any, int]:
    """The numbers that a walk puts for free sizes: small and different."""
    symbols = sorted(free_sizes(program).items(), key=lambda item: str(item[0]))
    return {s: least + place for place, (s, (least, _, _)) in enumerate(symbols)}


class ChannelWalk:
    """The channels of one program, after one walk over its graph.

    produces: (weight, axis) whose entries make channels; absorbs: (weight, axis) whose entries
    read them, with the products that do. offsets: what is added to a weight before it multiplies
    (1 in norms that store weight - 1). bare: (reader, what it reads) -> the channels of a value
    that has none of its own, or whose readers may each leave some of it unread. rules: what each
    operation does to channels; pointwise: the rule of all other pointwise operations where factors
    do not matter.
    """

    def __init__(
        self,
        program: Program,
        mode: Mode,
        rules: Mapping[Any, Rule],
        pointwise: Rule,
        watch: Callable[[Node, Any], None] | None = None,
    ) -> None:
        self.program, self.mode = program, mode
        self.rules, self.pointwise = rules, pointwise
        self.channels = Channels()
        self.produces: dict[tuple[str, int], str] = {}
        self.absorbs: dict[tuple[str, int], list[Reading]] = {}
        self.offsets: dict[str, float] = {}
        self.pins: dict[tuple[str, int], str] = {}
        self.bare: dict[tuple[Node, Node], Tensor] = {}
        self._axes: dict[tuple[str, int], Tensor] = {}
        self._values: dict[Node, Any] = {}
        self._sizes = walk_sizes(program)
        self._walk(watch)

    @property
    def scale(self) -> bool:
        return self.mode == "scale"

    # what handlers use

    def shape(self, node: Node) -> list[int]:
        """The node's sizes, at the sizes of the walk."""
        return self._shape_of(node.meta["val"])

    def _shape_of(self, value: Tensor) -> list[int]:
        try:
            return [size_at(size, self._sizes) for size in value.shape]
        except TypeError as error:
            raise Unfollowed("its size follows from the data") from error

    def ids(self, value: Any) -> Tensor:
        """The channels of a value, int64 of its shape; a number or an absent value has none."""
        if not isinstance(value, fx.Node):
            return torch.zeros((), dtype=torch.int64)
        held = self._values.get(value)
        if isinstance(held, WeightView):
            return self.weight_ids(held)
        if isinstance(held, Tensor):
            return held
        try:
            return self.no_channels(value)
        except Unfollowed:
            return torch.zeros((), dtype=torch.int64)

    def view(self, value: Any) -> WeightView | None:
        """How a value shows a weight, if it is a weight that was at most turned or chosen from."""
        held = self._values.get(value) if isinstance(value, fx.Node) else None
        return held if isinstance(held, WeightView) else None

    def axis_ids(self, view: WeightView, axis: int) -> Tensor | None:
        """The channels along one axis of a weight as it is shown; None for an axis it lacks."""
        place = view.axes[axis]
        if place is None:
            return None
        return self.axis_channels(view.name, place.axis)[place.index]

    def axis_channels(self, name: str, axis: int) -> Tensor:
        """The channels of the entries of a weight's axis, int64 [size]; made when first asked."""
        key = (name, axis)
        if key not in self._axes:
            self._axes[key] = self.channels.new(int(self.program.weights.shape(name)[axis]))
        return self._axes[key]

    @property
    def weight_axes(self) -> dict[tuple[str, int], Tensor]:
        """The channels of every weight axis that has some."""
        return self._axes

    def weight_ids(self, view: WeightView, what: str = "value") -> Tensor:
        """The channels of a weight that is read as a value: those along its channel axis."""
        channel = view.channel_axis()
        if channel is None:
            return torch.zeros(view.shape, dtype=torch.int64)
        for axis, place in enumerate(view.axes):
            if place is not None and axis != channel:
                self.pins.setdefault((view.name, place.axis), f"{view.name} is also read whole")
        ids = self.axis_ids(view, channel)
        assert ids is not None
        self.produce(view, channel, what)
        ids = ids.reshape([-1 if a == channel else 1 for a in range(len(view.shape))])
        return ids.expand(view.shape)

    def produce(self, view: WeightView, axis: int, what: str) -> None:
        """Note that entries of a weight's axis make channels. what: product, norm, factor, bias,
        table or value."""
        place = view.axes[axis]
        assert place is not None
        ranks = ("product", "norm", "factor", "bias", "table", "value")
        known = self.produces.get((view.name, place.axis), "value")
        self.produces[view.name, place.axis] = min(known, what, key=ranks.index)
        if self.offsets.setdefault(view.name, view.offset) != view.offset:
            self.pins[view.name, place.axis] = f"{view.name} is read with different offsets"

    def block(self, ids: Tensor, reason: str) -> None:
        """Say why these channels may take no factor (the first reason of a channel counts)."""
        if self.scale:
            self.channels.block(ids, reason)

    def no_channels(self, node: Node) -> Tensor:
        none = torch.zeros((), dtype=torch.int64)
        return none.expand(self.shape(node)) if isinstance(node.meta.get("val"), Tensor) else none

    def fit(self, ids: Tensor, node: Node) -> Tensor:
        """Channels spread over the node's shape; raises Unfollowed."""
        return self.fit_to(ids, self.shape(node))

    def fit_to(self, ids: Tensor, shape: list[int]) -> Tensor:
        spread = fit(ids, shape)
        if spread is None:
            raise Unfollowed(f"shapes {list(ids.shape)} and {shape} do not meet")
        return spread

    def evaluate(self, node: Node, target: Any = None) -> Any:
        """Run the node's own operation on channel numbers; raises Unfollowed."""

        def read(value: Any) -> Any:
            if isinstance(value, torch.SymInt):
                return size_at(value, self._sizes)
            if not isinstance(value, fx.Node):
                return value
            held = value.meta.get("val")
            if is_size(held):
                return size_at(held, self._sizes)
            known = self._values.get(value)
            if known is None:
                return self.no_channels(value)
            return self.weight_ids(known) if isinstance(known, WeightView) else known

        args, kwargs = map_aggregate(node.args, read), map_aggregate(node.kwargs, read)
        try:
            return (target or node.target)(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, TypeError) as error:
            raise Unfollowed("it does not run on channel numbers") from error

    # the walk

    def _walk(self, watch: Callable[[Node, Any], None] | None) -> None:
        last: dict[Node, Node] = {}
        for node in self.program.graph.nodes:
            for read in node.all_input_nodes:
                last[read] = node
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                self._values[node] = self._weight(node)
            elif node.op == "call_function":
                self._values[node] = self._call(node)
            elif node.op == "output":
                self._returned(node)
            if watch is not None and node.op == "call_function":
                watch(node, self._values[node])
            for read in node.all_input_nodes:
                if last[read] is node:
                    self._values.pop(read, None)

    def _weight(self, node: Node) -> WeightView | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        name = self.program.weights.canonical(str(node.target))
        return WeightView.whole(name, [int(size) for size in value.shape])

    def _call(self, node: Node) -> Any:
        if is_size(node.meta.get("val")):
            return None
        if node.target is operator.getitem:
            held = self._values.get(node.args[0])  # type: ignore[arg-type]
            return held[int(node.args[1])] if isinstance(held, (tuple, list)) else None  # type: ignore[arg-type]
        if is_assertion(node) or not any(self._has_channels(r) for r in contents_read(node)):
            return None
        handler = self.rules.get(node.target)
        if handler is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            handler = None if self.scale else self.pointwise
        if handler is None:
            self._stop(node, f"{op_text(node)} %{node.name} does not pass a factor on")
            return None
        try:
            return handler(self, node)
        except Unfollowed as error:
            self._stop(node, f"{op_text(node)} %{node.name} is not followed: {error}")
            return None

    def _has_channels(self, node: Node) -> bool:
        held = self._values.get(node)
        if isinstance(held, (tuple, list)):
            return any(isinstance(part, Tensor) and carries(part) for part in held)
        return isinstance(held, WeightView) or (isinstance(held, Tensor) and carries(held))

    def _stop(self, node: Node, reason: str) -> None:
        for read in contents_read(node):
            self.channels.block(self.ids(read), reason)

    def _returned(self, node: Node) -> None:
        for value in self.program.results:
            if isinstance(value, fx.Node):
                self.channels.block(self.ids(value), f"%{value.name} is returned by the program")
