"""Patterns: the shape of a piece of graph, written as the Python expression it came from.

Inside a pattern, `op.silu(gate) * up` builds a tree; inside a replacement the same spelling emits
nodes. Arguments are compared by the operator's schema, so positional, keyword and default
spellings are the same, and `add` and `mul` match in both orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from . import activation_ops as _activation_ops  # registers its operations, as ops does
from . import adapter_op as _adapter_op  # likewise
from . import cache_ops as _cache_ops  # likewise
from . import ops as _ops  # registers the planish namespace
from .edit import current_editor
from .errors import PatternError
from .program import Node

_COMMUTATIVE = {"aten::add", "aten::mul", "aten::logical_and", "aten::maximum", "aten::minimum"}
_OVERLOADS = ("default", "Tensor", "Tensor_Scalar", "dim", "int", "Scalar")  # tried in this order

SEMANTIC_OPS = (_ops.__name__, _cache_ops.__name__, _activation_ops.__name__, _adapter_op.__name__)


class Expression:
    """A node of a pattern; arithmetic on it builds bigger patterns."""

    def __add__(self, other: Any) -> OpPattern:
        return op.add(self, other)

    def __radd__(self, other: Any) -> OpPattern:
        return op.add(other, self)

    def __mul__(self, other: Any) -> OpPattern:
        return op.mul(self, other)

    def __rmul__(self, other: Any) -> OpPattern:
        return op.mul(other, self)

    def __sub__(self, other: Any) -> OpPattern:
        return op.sub(self, other)

    def __truediv__(self, other: Any) -> OpPattern:
        return op.div(self, other)

    def __neg__(self) -> OpPattern:
        return op.neg(self)

    def __pow__(self, other: Any) -> OpPattern:
        return op.pow(self, other)

    def __matmul__(self, other: Any) -> OpPattern:
        return op.matmul(self, other)


@dataclass(frozen=True, eq=False)
class Wild(Expression):
    """A parameter of the pattern: binds a node, or a number where annotated so."""

    name: str
    kinds: tuple[type, ...]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, self.kinds) and not isinstance(value, bool)


@dataclass(frozen=True, eq=False)
class OpPattern(Expression):
    """A call of an operator, any overload unless one is named."""

    packet: Any
    overload: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.packet._qualified_op_name


class OpSpelling:
    """`op.name` or `op.name.overload`: a pattern if given patterns, a new node if given nodes."""

    def __init__(self, packet: Any, overload: str | None = None) -> None:
        self._packet, self._overload = packet, overload

    def __getattr__(self, overload: str) -> OpSpelling:
        if overload.startswith("__") or overload not in self._packet.overloads():
            raise AttributeError(overload)
        return OpSpelling(self._packet, overload)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves: list[Any] = []
        map_aggregate((args, kwargs), leaves.append)
        if any(isinstance(leaf, Expression) for leaf in leaves):
            return OpPattern(self._packet, self._overload, args, kwargs)
        return current_editor().emit(self._target(args, kwargs), *args, **kwargs)

    def _target(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The overload that is emitted: the named one, or the first that takes these arguments."""
        known = self._packet.overloads()
        if self._overload:
            return getattr(self._packet, self._overload)
        order = [name for name in _OVERLOADS if name in known]
        order += [name for name in known if name not in order]
        targets = [getattr(self._packet, name) for name in order]
        return next((t for t in targets if _takes(t._schema, args, kwargs)), targets[0])


def _takes(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an overload has a place of the right kind for every argument, and needs no other."""
    places = {argument.name: argument for argument in schema.arguments}
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    if schema.is_mutable or len(args) > len(positional) or not kwargs.keys() <= places.keys():
        return False
    given = dict(zip((argument.name for argument in positional), args, strict=False)) | kwargs
    short = schema.name.split("::")[-1]
    numbers_too = torch._C._should_allow_numbers_as_tensors(short)  # add(x, 1), but not gt(x, 1)
    needed = {name for name, argument in places.items() if not argument.has_default_value()}
    return needed <= given.keys() and all(
        _fits(str(places[name].type), value, numbers_too and name != schema.arguments[0].name)
        for name, value in given.items()
    )


def _fits(kind: str, value: Any, number_for_tensor: bool) -> bool:
    """Whether a value can stand where a schema wants `kind`."""
    if value is None:
        return kind.startswith("Optional")
    listed = "List[" in kind
    if isinstance(value, (list, tuple)):
        return listed
    if isinstance(value, fx.Node):
        held = value.meta.get("val")
        wants_tensor = "Tensor" in kind and not listed
        return wants_tensor if isinstance(held, Tensor) else "Tensor" not in kind
    return ("Tensor" not in kind or number_for_tensor) and not listed


class _Operators:
    """`op.linear`, `op.rms_norm`, ...: planish's operators first, then ATen's."""

    def __getattr__(self, name: str) -> Any:
        for namespace in (torch.ops.planish, torch.ops.aten):
            packet = getattr(namespace, name, None)
            if packet is not None:
                return OpSpelling(packet)
        raise PatternError(f"there is no operation {name!r} in planish or ATen")


op = _Operators()


def bound_arguments(node: Node) -> dict[str, Any]:
    """The node's arguments by the names in its operator's schema, defaults filled in."""
    target: Any = node.target
    return _bind(target, node.args, node.kwargs)


def _bind(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


@dataclass
class Attempt:
    """Bookkeeping of one match: how far it came and what stopped it.

    depth: operations matched on the way that is being tried; deepest: on the best way so far, whose
    reason is the one that is told.
    """

    depth: int = 0
    deepest: int = 0
    reason: str = ""
    _best: tuple[int, int] = (-1, -1)

    def fail(self, reason: str, bound: int) -> None:
        if (self.depth, bound) > self._best:
            self._best, self.reason = (self.depth, bound), reason


Bindings = dict[str, Any]


def match(pattern: Any, value: Any, bindings: Bindings, attempt: Attempt) -> Iterator[Bindings]:
    """All ways in which `value` (a node or a constant) is an instance of `pattern`."""
    if isinstance(pattern, Wild):
        yield from _match_wild(pattern, value, bindings, attempt)
    elif isinstance(pattern, OpPattern):
        yield from _match_op(pattern, value, bindings, attempt)
    elif isinstance(pattern, (list, tuple)):
        yield from _match_sequence(list(pattern), value, bindings, attempt)  # type: ignore[reportUnknownArgumentType]
    elif _equal_constant(pattern, value):
        yield bindings
    else:
        attempt.fail(f"expected {pattern!r}, found {_told(value)}", len(bindings))


def _match_wild(wild: Wild, value: Any, bindings: Bindings, attempt: Attempt) -> Iterator[Bindings]:
    if wild.name in bindings:
        if bindings[wild.name] is value or _equal_constant(bindings[wild.name], value):
            yield bindings
        else:
            was = _told(bindings[wild.name])
            attempt.fail(
                f"{wild.name} is {was} in one place, {_told(value)} in another", len(bindings)
            )
    elif wild.accepts(value):
        yield {**bindings, wild.name: value}
    else:
        attempt.fail(f"{wild.name} cannot be {_told(value)}", len(bindings))


def _match_op(
    pattern: OpPattern, value: Any, bindings: Bindings, attempt: Attempt
) -> Iterator[Bindings]:
    target = value.target if isinstance(value, fx.Node) else None
    packet = getattr(target, "overloadpacket", None)
    if packet is not pattern.packet or (
        pattern.overload and getattr(target, "_overloadname", "") != pattern.overload
    ):
        attempt.fail(f"expected {pattern.name.split('::')[1]}, found {_told(value)}", len(bindings))
        return
    attempt.depth += 1
    attempt.deepest = max(attempt.deepest, attempt.depth)
    reached = attempt.depth
    for wanted, given in _argument_pairs(pattern, value):
        attempt.depth = reached
        yield from _match_sequence(wanted, given, bindings, attempt)


def _argument_pairs(pattern: OpPattern, node: Node) -> Iterator[tuple[list[Any], list[Any]]]:
    wanted = _bind(node.target, pattern.args, pattern.kwargs)
    given = bound_arguments(node)
    names = list(wanted)
    yield [wanted[n] for n in names], [given[n] for n in names]
    if pattern.name in _COMMUTATIVE and len(names) >= 2:
        first, second = names[0], names[1]
        swapped = {**given, first: given[second], second: given[first]}
        yield [wanted[n] for n in names], [swapped[n] for n in names]


def _match_sequence(
    wanted: list[Any], given: Any, bindings: Bindings, attempt: Attempt
) -> Iterator[Bindings]:
    if not isinstance(given, (list, tuple)) or len(wanted) != len(given):  # type: ignore[reportUnknownArgumentType]
        attempt.fail(f"expected {len(wanted)} values, found {_told(given)}", len(bindings))
        return
    if not wanted:
        yield bindings
        return
    for extended in match(wanted[0], given[0], bindings, attempt):
        yield from _match_sequence(wanted[1:], list(given[1:]), extended, attempt)  # type: ignore[reportUnknownArgumentType]


def _equal_constant(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return False
    return (type(a) is type(b) and a == b) or (_number(a) and _number(b) and a == b)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _told(value: Any) -> str:
    if isinstance(value, fx.Node):
        target: Any = value.target
        return f"{getattr(target, '__name__', value.op).split('.')[0]} (%{value.name})"
    return repr(value)
