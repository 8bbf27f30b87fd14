"""Lower a cached program to a decoding plan: steps in C where a kernel serves, torch elsewhere.

Keys and values are not inputs and outputs of a plan: a new token's are written behind those of
the text, in buffers that stay, and attention reads them there.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.node import map_aggregate, map_arg

from ..ir.errors import PlanishError
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..kernels import attention_decode
from ..kernels.plan_cpu import Kind
from .decode_native import Shape, Site, lower_native
from .decode_places import Place, new_place, viewed, width_of
from .decode_plan import COUNTS, Called, Native, Plan, Size, Slot

_ATEN = torch.ops.aten
_PAST = re.compile(r"past_(key|value)_(\d+)")
_MAY_ALIAS = {_ATEN.dropout.default, _ATEN._unsafe_view.default, operator.getitem}
_COPY = torch.Tensor.copy_


class CannotDecode(PlanishError):
    """A program that has no decoding plan."""


@dataclass(frozen=True)
class Layer:
    """Sizes of one attention's cache."""

    kv_heads: int
    head: int
    value_head: int


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


def layers_of(program: Program) -> list[Layer]:
    """The caches of a program, in order; raises CannotDecode if it has none."""
    found: dict[tuple[str, int], list[Any]] = {}
    for node in program.inputs:
        if match := _PAST.fullmatch(node.name):
            found[match[1], int(match[2])] = list(node.meta["val"].shape)
    if not found:
        raise CannotDecode(
            "the program has no KV cache",
            expected="inputs past_key_0, past_value_0, ...",
            found=", ".join(node.name for node in program.inputs),
            fix="run the pass insert_kv_cache, or optimize with kv_cache=True",
        )
    count = len(found) // 2
    return [
        Layer(found["key", i][1], found["key", i][3], found["value", i][3]) for i in range(count)
    ]


def most_rows(program: Program) -> int | None:
    """How many tokens' logits one call gives at most; None where it gives all."""
    size, many = program.results[0].meta["val"].shape[1], 1 << 20
    if not isinstance(size, int):
        size = size.node.expr.xreplace({_symbols(program).tokens: sympy.Integer(many)})
    return None if size == many else int(size)


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
        self.symbols = _symbols(program)
        self.layers = layers_of(program)

    def run(self) -> Plan:
        result = self.program.results[0]
        needed = _needed(result)
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
            return self._size(value)
        args = map_arg(node.args, self.values.__getitem__)
        kwargs = map_arg(node.kwargs, self.values.__getitem__)
        if _is_append(node):
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
        if match := _PAST.fullmatch(node.name):
            return _Past(int(match[2]), match[1])
        return Slot(0, 1)

    def _place(self, node: Node, args: Any, kwargs: Any) -> Any:
        """A view of a place, or what native steps compute; None if torch must."""
        if _looks(node.target):
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
        return lower_native(Site(node.target, given, self._shape(value), value.dtype), self)

    def _torch(self, node: Node, args: Any, kwargs: Any) -> Slot:
        slot = self._new_slot(node.meta["val"])
        if _may_alias(node.target):
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
        shape = self._shape(value) if isinstance(value, Tensor) else ()
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

    def _shape(self, value: Tensor) -> Shape:
        """Sizes with None for the tokens; () where a size depends on the call in another way."""
        sizes = [self._plain(size) for size in value.shape]
        tokens = self.symbols.tokens
        if any(not isinstance(size, int) and size != tokens for size in sizes):
            return ()
        return tuple(size if isinstance(size, int) else None for size in sizes)

    def _plain(self, size: Any) -> Any:
        """An int, or an expression of the call's symbols; the text's batch is one."""
        if isinstance(size, int):
            return size
        expression = size.node.expr.xreplace(dict.fromkeys(self.symbols.batch, sympy.S.One))
        return int(expression) if expression.is_number else expression

    def _size(self, value: Any) -> int | Size:
        plain = self._plain(value)
        if isinstance(plain, int):
            return plain
        tokens, past = self.symbols.tokens, self.symbols.past
        extra = plain.free_symbols - {tokens, *past}
        if extra:
            raise CannotDecode(
                f"a size {plain} depends on more than the number of tokens and of past ones",
                expected=f"{tokens} and {', '.join(map(str, past))}",
                found=", ".join(map(str, extra)),
                fix="use the reference interpreter for this program",
            )
        if plain == tokens:
            return Size(_tokens_alone, False)
        plain = plain.xreplace(dict.fromkeys(past, past[0]))
        of = sympy.lambdify([tokens, past[0]], plain, modules=["math"])
        return Size(lambda t, p: int(of(t, p)), bool(plain.free_symbols & {past[0]}))

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


@dataclass(frozen=True)
class _Symbols:
    tokens: sympy.Symbol
    batch: tuple[sympy.Symbol, ...]
    past: tuple[sympy.Symbol, ...]


def _symbols(program: Program) -> _Symbols:
    """The names of the free sizes; raises CannotDecode for inputs that a text does not have."""
    ids = [node for node in program.inputs if not _PAST.fullmatch(node.name)]
    value = ids[0].meta.get("val") if ids else None
    if len(ids) != 1 or not isinstance(value, Tensor) or value.dim() != 2:
        raise CannotDecode(
            "a decoder takes token ids [batch, tokens] and its cache, nothing else",
            expected="one input besides past",
            found=", ".join(node.name for node in ids),
            fix="capture the model from input_ids alone, then insert the cache",
        )
    past: list[Any] = [n.meta["val"].shape[2] for n in program.inputs if _PAST.fullmatch(n.name)]
    rows, tokens = (
        size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape
    )
    if isinstance(tokens, int):
        raise CannotDecode(
            "the number of tokens is fixed", expected="a free size", found=str(tokens)
        )
    kept = dict.fromkeys(size.node.expr for size in past)
    return _Symbols(tokens, () if isinstance(rows, int) else (rows,), tuple(kept))


def _tokens_alone(tokens: int, past: int) -> int:
    return tokens


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


def _is_append(node: Node) -> bool:
    """cat([past, new], 2)"""
    if node.target is not _ATEN.cat.default or node.args[1:] not in ((2,), (-2,)):
        return False
    parts = node.args[0]
    first = parts[0] if isinstance(parts, (list, tuple)) and len(parts) == 2 else None
    return isinstance(first, Node) and bool(_PAST.fullmatch(first.name))


def _needed(result: Node) -> set[Node]:
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


def _looks(target: Any) -> bool:
    """Whether an operation may return its operand's memory in another form."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target in _MAY_ALIAS or any(r.alias_info is not None for r in target._schema.returns)


def _may_alias(target: Any) -> bool:
    return not isinstance(target, torch._ops.OpOverload) or _looks(target)
