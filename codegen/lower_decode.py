"""Lower a cached program to a decoding plan: steps in C where a kernel serves, torch elsewhere.

Keys and values are not inputs and outputs of a plan: a new token's are written behind those of
the text, in buffers that stay, and attention reads them there.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate, map_arg

from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..kernels import attention_decode
from ..kernels.plan_cpu import Kind
from .decode_graph import is_append, looks, may_alias, needed_for
from .decode_native import Shape, Site, lower_native
from .decode_places import Place, new_place, viewed, width_of
from .decode_plan import COUNTS, Called, Native, Plan, Size, Slot
from .decode_sizes import PAST, CannotDecode, layers_of, symbols_of

_ATEN = torch.ops.aten
_COPY = torch.Tensor.copy_


@dataclass(frozen=True)
class _Cached:
    """The keys or values of a layer, old and new."""

    layer: int
    kind: str


@dataclass(frozen=True)
class _Past:
    """The keys or values of a layer that were there before."""

    layer: int
    kind: str


def lower_plan(program: Program, few: bool, rounded: bool = False) -> Plan:
    """The plan of a program whose weights are packed (lower_cpu.py), for one text.

    few: for a few tokens at a time, so that dense products also run in C. rounded: activations of
    more than eight tokens are rounded to 8 bits before packed products. Raises CannotDecode.
    """
    return _Lowering(program, few, rounded).run()


class _Lowering:
    def __init__(self, program: Program, few: bool, rounded: bool) -> None:
        self.program, self.few, self.rounded = program, few, rounded
        self.plan = Plan()
        self.values: dict[Node, Any] = {}
        self.loaded: dict[int, Place] = {}
        self.holds: dict[int, set[int]] = {0: set()}
        self.shapes: dict[int, Shape] = {}
        self.made: dict[int, int] = {0: -1}
        self.loose: set[int] = set()
        self.symbols = symbols_of(program)
        self.layers = layers_of(program)

    def run(self) -> Plan:
        result = self.program.results[0]
        needed = needed_for(result)
        for node in self.program.graph.nodes:
            if node in needed:
                self.values[node] = self._lower(node)
        self._finish(self.values[result])
        return self.plan

    # ---- one node ----

    def _lower(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return self.program.weights[str(node.target)]
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)):
            return self.symbols.size(value)
        args = map_arg(node.args, self.values.__getitem__)
        kwargs = map_arg(node.kwargs, self.values.__getitem__)
        if is_append(node):
            return self._append(node)
        if not _depends(args, kwargs):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.target is torch.ops.planish.attention.default:
            return self._attention(node)
        self._refuse_caches(node, args, kwargs)
        if node.target is operator.getitem and isinstance(args[0], list):
            return args[0][args[1]]  # type: ignore[index]
        if node.target is _ATEN.dropout.default:
            return args[0]
        return self._place(node, args, kwargs) or self._torch(node, args, kwargs)

    def _input(self, node: Node) -> Any:
        if match := PAST.fullmatch(node.name):
            return _Past(int(match[2]), match[1])
        return Slot(0, 1)

    def _place(self, node: Node, args: Any, kwargs: Any) -> Any:
        """A view of a place, or what native steps compute; None if torch must."""
        if looks(node.target):
            found = viewed(node.target, args, kwargs, _sized)  # type: ignore[arg-type]
            if found is not None:
                return found
        value = node.meta["val"]
        if not isinstance(value, Tensor) or not isinstance(node.target, torch._ops.OpOverload):
            return None
        given = {
            name: map_arg(argument, self.values.__getitem__)
            for name, argument in bound_arguments(node).items()
        }
        return lower_native(Site(node.target, given, self.symbols.shape(value), value.dtype), self)

    def _torch(self, node: Node, args: Any, kwargs: Any) -> Slot:
        slot = self._new_slot(node.meta["val"])
        if may_alias(node.target):
            for operand in _leaves(args, kwargs):
                if isinstance(operand, Place):
                    self.holds[slot.index].add(operand.buffer)
                elif isinstance(operand, Slot):
                    self.holds[slot.index] |= self.holds[operand.index]
        self._step(Called(node.target, args, kwargs, slot.index))  # type: ignore[arg-type]
        return slot

    def _append(self, node: Node) -> _Cached:
        past, new = (self.values[part] for part in node.args[0])  # type: ignore[union-attr]
        place = self.place(new)
        layer = self.layers[past.layer]
        width = layer.head if past.kind == "key" else layer.value_head
        if place is None or len(place.shape) != 4 or (place.strides[3] != 1 and width > 1):
            raise self._refusal(node, "its new keys or values are no float32 rows of tokens")
        kind = Kind.APPEND_KEY if past.kind == "key" else Kind.APPEND_VALUE
        sizes = [place.token_stride, place.strides[1], layer.kv_heads, width, past.layer]
        self.native(kind, [place], None, sizes)
        return _Cached(past.layer, past.kind)

    def _attention(self, node: Node) -> Place:
        given = {
            name: map_arg(argument, self.values.__getitem__)
            for name, argument in bound_arguments(node).items()
        }
        keys, values, sinks = given["k"], given["v"], given["sinks"]
        q = self.place(given["q"])
        own = isinstance(keys, _Cached) and isinstance(values, _Cached)
        if q is None or not own or (keys.kind, values.kind) != ("key", "value"):
            raise self._refusal(node, "it does not attend from new tokens to their own cache")
        layer = self.layers[keys.layer]
        why = attention_decode.why_not(
            node.meta["val"].dtype, given["mask"], given["causal"], layer.head, layer.value_head
        )
        if why is not None or keys.layer != values.layer or q.strides[3] != 1:
            raise self._refusal(node, why or "its keys and values are of different layers")
        heads = q.shape[1] or 1
        inner = self.buffer((1, None, heads, layer.value_head))
        out = Place(
            inner.buffer, 0, (1, heads, None, layer.value_head),
            (inner.strides[0], inner.strides[2], inner.strides[1], 1),
        )  # fmt: skip
        strides = [q.token_stride, q.strides[1], out.token_stride, out.strides[1]]
        sizes = [heads, layer.kv_heads, layer.head, layer.value_head, keys.layer, given["window"]]
        numbers = [given["scale"], given["softcap"]]
        sinks = None if sinks is None else sinks.float().contiguous()
        self.native(Kind.ATTENTION, [q, sinks], out, [*strides, *sizes], numbers)
        return out

    # ---- what matches of native steps ask for ----

    def place(self, value: Any) -> Place | None:
        if isinstance(value, Place):
            return value
        if not isinstance(value, Slot) or value.axis is None or value.index not in self.shapes:
            return None
        if value.index not in self.loaded:
            made = self.buffer(self.shapes[value.index])
            self._step(Called(_COPY, (made, value), {}, None))
            self.loaded[value.index] = made
        return self.loaded[value.index]

    def compact(self, place: Place) -> Place | None:
        width = width_of(place.shape)
        found = place.rows()
        if found is not None and found[:2] == (1, width) and place.token_stride == width:
            return place
        made = self.buffer(place.shape)
        self._step(Called(_COPY, (made, place), {}, None))
        return made

    def buffer(self, shape: Shape) -> Place:
        self.plan.buffers.append(width_of(shape))
        self.plan.last_use.append(len(self.plan.steps))
        return new_place(len(self.plan.buffers) - 1, shape)

    def native(
        self,
        kind: Kind,
        inputs: Sequence[Place | Tensor | None],
        out: Place | None,
        size: Sequence[int],
        number: Sequence[float] = (),
    ) -> None:
        self._step(Native(kind, tuple(inputs), out, tuple(size), tuple(number)))
        if kind in (Kind.APPEND_KEY, Kind.APPEND_VALUE):
            self.plan.tail = len(self.plan.steps)

    # ---- bookkeeping ----

    def _step(self, step: Native | Called) -> None:
        index = len(self.plan.steps)
        operands = step.inputs if isinstance(step, Native) else _leaves(step.args, step.kwargs)
        buffers = {operand.buffer for operand in operands if isinstance(operand, Place)}
        for operand in operands:
            if isinstance(operand, Slot):
                buffers |= self.holds[operand.index]
        for buffer in buffers:
            self.plan.last_use[buffer] = index
        self.plan.steps.append(step)
        if isinstance(step, Called) and step.out is not None:
            self.made[step.out] = index

    def _new_slot(self, value: Any) -> Slot:
        shape = self.symbols.shape(value) if isinstance(value, Tensor) else ()
        slot = Slot(self.plan.slots, shape.index(None) if shape.count(None) == 1 else None)
        self.plan.slots += 1
        self.holds[slot.index] = set()
        if slot.axis is not None and value.dtype == torch.float32:
            self.shapes[slot.index] = shape
        if not isinstance(value, Tensor) or (slot.axis is None and _is_free(value)):
            self.loose.add(slot.index)
        return slot

    def _finish(self, result: Any) -> None:
        self.plan.result = result
        if isinstance(result, Place):
            self.plan.last_use[result.buffer] = len(self.plan.steps)
        elif isinstance(result, Slot):
            for buffer in self.holds[result.index]:
                self.plan.last_use[buffer] = len(self.plan.steps)
        if not all(self._tokenwise(step) for step in self.plan.steps[self.plan.tail :]):
            self.plan.tail = len(self.plan.steps)

    def _tokenwise(self, step: Native | Called) -> bool:
        """Whether a step after the last cache computes the same for the last tokens alone."""
        if isinstance(step, Native):
            return True
        if step.call in COUNTS:
            return False
        for operand in _leaves(step.args, step.kwargs):
            if isinstance(operand, Size) and operand.past:
                return False
            early = isinstance(operand, Slot) and self.made.get(operand.index, 0) < self.plan.tail
            if early and operand.index in self.loose:  # type: ignore[union-attr]
                return False
        return True

    def _refuse_caches(self, node: Node, args: Any, kwargs: Any) -> None:
        if any(isinstance(leaf, (_Past, _Cached)) for leaf in _leaves(args, kwargs)):
            raise self._refusal(node, "it reads kept keys or values, and is no attention")

    def _refusal(self, node: Node, why: str) -> CannotDecode:
        return CannotDecode(
            f"%{node.name} = {node.target} has no decoding step: {why}",
            where=node.meta.get("module", ""),
            expected="float32 causal attention from new tokens to their own cache",
            found=str(node.meta.get("val")),
            fix="use the reference interpreter (ProgramDecoder) for this program",
        )


def _sized(argument: Any, tokens: int) -> Any:
    return argument.of(tokens, 5) if isinstance(argument, Size) else argument


def _leaves(args: Any, kwargs: Any) -> list[Any]:
    found: list[Any] = []
    map_aggregate((args, kwargs), found.append)
    return found


def _depends(args: Any, kwargs: Any) -> bool:
    kinds = (Place, Slot, Size, _Past, _Cached)
    return any(isinstance(leaf, kinds) for leaf in _leaves(args, kwargs))


def _is_free(value: Tensor) -> bool:
    return any(isinstance(size, torch.SymInt) for size in value.shape)
