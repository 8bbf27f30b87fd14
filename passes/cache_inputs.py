"""Read a decoder: which attentions look back over the text, which inputs are text, which places.

Text is what follows from the contents of the tokens; it is computed for new tokens only. Places
are what follows from lengths, weights and a padding mask alone; they exist for the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import same_size, shape, value_of
from ..ir.errors import PlanishError
from ..ir.pattern import bound_arguments
from ..ir.positional import Positional, contents_read, free_symbols, is_size
from ..ir.program import Node, Program
from .cache_padding import counts_places, hides_future

aten = torch.ops.aten
ATTENTION = torch.ops.planish.attention.default
_RUNNING = {aten.cumsum.default, aten.flip.default, aten.roll.default, aten.cumprod.default}
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.convolution.default}
_REDUCTIONS = {aten.softmax.int, aten._softmax.default, aten.mean.dim, aten.sum.dim_IntList}
LEAVE_OUT = "leave insert_kv_cache out of the recipe for this model"


class CannotCache(PlanishError):
    """The program has no form with a KV cache that this pass can prove."""


@dataclass(frozen=True)
class Decoder:
    """What a program must show to take a cache.

    attentions: the self-attentions, in graph order; length: the free size of their queries and
    keys. tokens: inputs with one value for each new token, each with the axis that counts them.
    totals: inputs that count as places (a padding mask), with that axis or None. places: nodes
    that no token's contents reach.
    """

    attentions: tuple[Node, ...]
    length: Any
    tokens: dict[Node, int]
    totals: dict[Node, int | None]
    places: frozenset[Node]

    @property
    def mask(self) -> Node | None:
        """The padding mask: the first place input that has a value for each key."""
        return next((node for node, axis in self.totals.items() if axis is not None), None)


def read_decoder(program: Program) -> Decoder:
    """Raises CannotCache with the reason if the program is not a causal decoder of free length."""
    attentions, length = _self_attentions(program)
    totals = _place_inputs(program, attentions, length)
    positional = Positional(program, totals)
    tokens = {
        node: axis
        for node in program.inputs
        if node not in totals and (axis := _length_axis(node, length)) is not None
    }
    if not tokens:
        raise CannotCache(
            "the attention masks are made of the contents of the tokens themselves",
            where=attentions[0].meta.get("module", ""),
            expected="masks that follow from lengths and from an attention_mask",
            found=f"masks made of {', '.join(node.name for node in totals)}",
            fix="capture with an attention_mask; " + LEAVE_OUT,
        )
    places = _places(program, positional, length)
    for node in attentions:
        _refuse_mask(positional, places, node)
    for node in program.graph.nodes:
        if node not in places and mixes_length(node, length):
            raise CannotCache(
                f"%{node.name} = {node.target} mixes places of the text outside of attention",
                where=node.meta.get("module", ""),
                expected=f"only attention to mix the axis of size {length}",
                found=str(node.target),
                fix=LEAVE_OUT,
            )
    axes = {node: _length_axis(node, length) for node in totals}
    return Decoder(tuple(attentions), length, tokens, axes, places)


def _places(program: Program, positional: Positional, length: Any) -> frozenset[Node]:
    """Positional values, but for those in which the length is joined with the batch.

    Such a value (zeros for every token of a batch, numbers of flattened tokens) is one of a call,
    not of the text: it goes with the new tokens.
    """
    places: set[Node] = set()
    for node in program.graph.nodes:
        if node not in positional.nodes:
            continue
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else ()
        joined = any(isinstance(s, torch.SymInt) and _is_joined(s, length) for s in sizes)
        tensor = node.op == "call_function" and not is_size(value)
        read = contents_read(node) if tensor else []
        if not joined and all(source in places for source in read):
            places.add(node)
    return frozenset(places)


def _is_joined(size: torch.SymInt, length: Any) -> bool:
    return depends_on(size, length) and bool(size.node.expr.is_Mul)


def refusal(node: Node, why: str, fix: str = LEAVE_OUT) -> CannotCache:
    return CannotCache(
        f"the attention %{node.name} {why}",
        where=node.meta.get("module", ""),
        expected="causal self-attention over a text of free length",
        found=f"causal={bound_arguments(node)['causal']}, mask={bound_arguments(node)['mask']}",
        fix=fix,
    )


def _self_attentions(program: Program) -> tuple[list[Node], Any]:
    found = [node for node in program.graph.nodes if node.target is ATTENTION]
    if not found:
        raise CannotCache(
            "no attention was recognized, so there are no keys and values to keep",
            fix="see planish explain; recurrence (a loop unrolled over time) has no KV cache",
        )
    own = [n for n in found if same_size(_length_of(n, 0), _length_of(n, 1))]
    sure = [n for n in own if bound_arguments(n)["causal"]]
    first = next(iter(sure or own), found[0])
    length = _length_of(first, 0)
    if isinstance(length, int) or not length.node.expr.is_Symbol:
        why = "attends over a fixed length: a cache needs a text of free length"
        raise refusal(first, why, "trace with a free length; a loop unrolled over time has none")
    for node in found:
        queries, keys = (_length_of(node, place) for place in (0, 1))
        if not same_size(queries, length):
            why = "belongs to an encoder, whose keys would be computed again for every token"
            raise refusal(node, why, "cut the encoder off first: cut_encoder")
        if not same_size(keys, length) and depends_on(keys, length):
            raise refusal(node, "does not attend from a text of free length to the same text")
    return [n for n in found if same_size(_length_of(n, 1), length)], length


def _length_of(attention: Node, place: int) -> Any:
    return shape(attention.args[place])[2]  # type: ignore[arg-type]


def depends_on(size: Any, length: Any) -> bool:
    return bool(free_symbols(size) & free_symbols(length))


def _length_axis(node: Node, length: Any) -> int | None:
    """The axis of an input that counts places; raises CannotCache if there are two."""
    value = node.meta.get("val")
    axes = [i for i, s in enumerate(getattr(value, "shape", ())) if same_size(s, length)]
    if len(axes) > 1:
        raise CannotCache(
            f"the input {node.name} has a value for every pair of places",
            expected="a padding mask of one value for each place: [batch, length]",
            found=str(list(value.shape)) if isinstance(value, Tensor) else "",
            fix="capture with a mask of two axes",
        )
    return axes[0] if axes else None


def _place_inputs(program: Program, attentions: Sequence[Node], length: Any) -> list[Node]:
    """Inputs that masks are made of, or whose whole numbers are counted up along the length."""
    masks = [bound_arguments(node)["mask"] for node in attentions]
    found = _sources(mask for mask in masks if isinstance(mask, fx.Node))
    plain = Positional(program).nodes
    for node in program.inputs:
        if node in found or _length_axis(node, length) is None:
            continue
        reached = [n for n in Positional(program, [node]).nodes - plain if _is_tensor(n)]
        counted = [r for r in reached if not value_of(r).is_floating_point()]
        if any(mixes_length(reader, length) for reader in counted):
            found.add(node)
    return [node for node in program.inputs if node in found]


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _sources(todo: Iterable[Node]) -> set[Node]:
    """The inputs whose contents reach these values."""
    seen: set[Node] = set()
    rest = list(todo)
    while rest:
        node = rest.pop()
        if node not in seen and not is_size(node.meta.get("val")):
            seen.add(node)
            rest += contents_read(node) if node.op == "call_function" else []
    return {node for node in seen if node.op == "placeholder"}


def _refuse_mask(positional: Positional, places: frozenset[Node], node: Node) -> None:
    arguments = bound_arguments(node)
    mask, length = arguments["mask"], _length_of(node, 0)
    if isinstance(mask, fx.Node):
        if mask not in places:
            raise refusal(node, "has a mask in which places are joined with another axis")
        if counts_places(positional, mask, length):
            names = ", ".join(sorted(source.name for source in _sources([mask])))
            why = f"has a mask that tells texts apart by counting the places in {names}"
            raise refusal(node, why, "capture with attention_mask too")
    if not arguments["causal"] and not hides_future(positional, mask, length):
        raise refusal(node, "is not causal: text to come would change what is kept")


def mixes_length(node: Node, length: Any) -> bool:
    """Whether a value's places are computed from each other's contents along the length."""
    if node.target in _CONVOLUTIONS or node.target is aten.scaled_dot_product_attention.default:
        return True
    if node.target in _RUNNING or node.target in _REDUCTIONS:
        sizes = shape(node.args[0])  # type: ignore[arg-type]
        dims: Any = node.args[1] if len(node.args) > 1 else None
        dims = range(len(sizes)) if dims in (None, []) else dims
        if node.target is aten.roll.default:
            dims = node.args[2] if len(node.args) > 2 else range(len(sizes))
        axes = [dims] if isinstance(dims, int) else list(dims)
        return any(depends_on(sizes[axis], length) for axis in axes)
    return False
