"""Where an encoder-decoder is cut, read from its data flow: which value is made of which inputs.

A cross attention is one whose keys and values do not see all the inputs that its queries see: the
text that grows reaches the queries only. What its keys and values are made of is the encoder's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.edit import same_size, shape
from ..ir.errors import PlanishError
from ..ir.pattern import bound_arguments
from ..ir.positional import contents_read, free_symbols, is_size
from ..ir.program import Node, Program

_ATTENTION = torch.ops.planish.attention.default

Sources = Mapping[Node, frozenset[Node]]
"""For each value the inputs whose contents it is made of (a size is no content)."""


class CannotCut(PlanishError):
    """The program is no encoder-decoder that can be cut in two."""


@dataclass(frozen=True)
class Cut:
    """cross: the cross attentions in graph order. inputs: what their keys and values are made of.
    early: the values made of these inputs alone, at sizes that these inputs tell."""

    cross: tuple[Node, ...]
    inputs: frozenset[Node]
    early: frozenset[Node]


def find_cut(program: Program) -> Cut:
    """The cut of a raised encoder-decoder; raises CannotCut."""
    if "cached" in program.facts:
        raise CannotCut(
            "the program has a KV cache already",
            fix="cut the encoder off first: cut_encoder, then insert_kv_cache on the decoder",
        )
    attentions = [node for node in program.graph.nodes if node.target is _ATTENTION]
    sources = _sources(program)
    cross = _cross_attentions(program, attentions, sources)
    inputs = _encoder_inputs(program, cross, sources)
    for node in attentions:
        if node not in cross and _is_fed(node, sources) and sources[_query(node)] - inputs:
            raise _fed(node, sources)
    return Cut(tuple(cross), inputs, _early(program, inputs, sources))


def _query(attention: Node) -> Node:
    return attention.args[0]  # type: ignore[return-value]


def keys_and_values(attention: Node) -> tuple[Node, Node]:
    return attention.args[1], attention.args[2]  # type: ignore[return-value]


def _sources(program: Program, query_only: Iterable[Node] = ()) -> dict[Node, frozenset[Node]]:
    """query_only: attentions that are taken to be made of their queries alone."""
    cut = set(query_only)
    found: dict[Node, frozenset[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = frozenset((node,))
        elif node.op != "call_function" or is_size(node.meta.get("val")):
            found[node] = frozenset()
        else:
            reads = [_query(node)] if node in cut else contents_read(node)
            found[node] = frozenset[Node]().union(*(found[read] for read in reads))
    return found


def _seen(attention: Node, sources: Sources) -> tuple[frozenset[Node], frozenset[Node]]:
    """The inputs that reach the queries, and those that reach keys or values."""
    key, value = keys_and_values(attention)
    return sources[_query(attention)], sources[key] | sources[value]


def _same_length(attention: Node) -> bool:
    key, _ = keys_and_values(attention)
    return same_size(shape(_query(attention))[2], shape(key)[2])


def _cross_attentions(program: Program, attentions: list[Node], sources: Sources) -> list[Node]:
    candidates = [node for node in attentions if _sees_less(*_seen(node, sources))]
    apart = _sources(program, candidates)
    found = [
        node
        for node in candidates
        if not _same_length(node) or not _seen(node, sources)[1] & apart[_query(node)]
    ]
    if found:
        return found
    for node in attentions:
        if _is_fed(node, sources):
            raise _fed(node, sources)
    raise CannotCut(
        "the program has no cross attention, so there is no encoder to cut off",
        expected="an attention whose queries see an input that its keys and values do not see",
        found=f"{len(attentions)} recognized attentions, none of that kind",
        fix="leave cut_encoder out for a model that is not an encoder-decoder",
    )


def _sees_less(queries: frozenset[Node], keys: frozenset[Node]) -> bool:
    return bool(keys) and bool(queries - keys)


def _is_fed(attention: Node, sources: Sources) -> bool:
    """Whether it looks across (to another length), but its keys see all that its queries see."""
    queries, keys = _seen(attention, sources)
    return bool(queries) and queries < keys and not _same_length(attention)


def _fed(attention: Node, sources: Sources) -> CannotCut:
    names = ", ".join(sorted(node.name for node in sources[_query(attention)]))
    return CannotCut(
        f"the decoder's input {names} feeds the keys of the cross attention %{attention.name}, "
        "so they cannot be computed before decoding",
        where=attention.meta.get("module", ""),
        expected="keys and values that are made of the encoder's inputs alone",
        fix="decode with the whole program",
    )


def _encoder_inputs(program: Program, cross: Iterable[Node], sources: Sources) -> frozenset[Node]:
    """What the cross keys and values are made of, and a source mask that hides some of them."""
    cross = list(cross)
    inputs = frozenset[Node]().union(*(_seen(node, sources)[1] for node in cross))
    apart = _sources(program, cross)
    decoder = frozenset[Node]().union(*(apart[_query(node)] for node in cross))
    masks = [bound_arguments(node)["mask"] for node in cross]
    hiding = frozenset[Node]().union(*(sources[mask] for mask in masks if mask is not None))
    return inputs | (hiding - decoder)


def _early(program: Program, inputs: frozenset[Node], sources: Sources) -> frozenset[Node]:
    known = {symbol for node in inputs for symbol in _symbols(node)}
    sizes: dict[Node, set[Any]] = {}
    early: set[Node] = set()
    for node in program.graph.nodes:
        reads = [] if is_size(node.meta.get("val")) else node.all_input_nodes
        sizes[node] = _symbols(node).union(*(sizes[read] for read in reads))
        if sources[node] and sources[node] <= inputs and sizes[node] <= known:
            early.add(node)
    return frozenset(early)


def _symbols(node: Node) -> set[Any]:
    """The free sizes in the shape of a tensor, or in a size."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    return {symbol for size in sizes for symbol in free_symbols(size)}
