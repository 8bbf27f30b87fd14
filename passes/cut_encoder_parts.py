"""The two halves of an encoder-decoder, each made in place from a copy of the whole.

What crosses from the encoder to the decoder: the keys and values of every cross attention, and
any other value of the encoder that the decoder reads, such as the mask of the source's padding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.edit import Editor, same_size, shape, value_of
from ..ir.pattern import bound_arguments
from ..ir.positional import is_size
from ..ir.program import Node, Program
from .cut_encoder_flow import CannotCut, Cut, find_cut, keys_and_values

_SIZE = torch.ops.aten.sym_size.int
_KINDS = ("key", "value")
_GONE = object()


@dataclass(frozen=True)
class Half:
    """inputs, results: which of the whole program's flat inputs and results this half keeps."""

    inputs: list[int]
    results: list[int]


def make_encoder(program: Program) -> Half:
    """Keep what the decoder needs; returns (the encoder's own results, {"cross": ..., ...})."""
    cut = find_cut(program)
    others = _others(program, cut)
    own = [place for place, node in enumerate(program.results) if node in cut.early]
    pairs = [keys_and_values(node) for node in cut.cross]
    flat = [program.results[place] for place in own]
    program.output.args = ([*flat, *(part for pair in pairs for part in pair), *others.values()],)
    _describe(program, cut, others, "encoder")
    foreign = [node for node in program.inputs if node not in cut.inputs]
    inputs = _drop_inputs(program, foreign)
    for node in foreign:
        if node in program.inputs:
            raise CannotCut(
                f"only the decoder's input {node.name} tells a size that the encoder needs",
                expected="an encoder that runs on its own inputs",
                fix="capture the model with the same size on an axis of an encoder's input",
            )
    result = _pruned(program.out_spec, own)
    program.out_spec = pytree.tree_structure((result, _crossing_form(cut, others)))
    return Half(inputs, own)


def make_decoder(program: Program) -> Half:
    """Keep what sees the decoder's inputs; what crosses comes as keywords after them."""
    cut = find_cut(program)
    others = _others(program, cut)
    kept = [place for place, node in enumerate(program.results) if node not in cut.early]
    _describe(program, cut, others, "decoder")
    editor = Editor(program)
    for place, attention in enumerate(cut.cross):
        made = [
            _placeholder(editor, f"cross_{kind}_{place}", source)
            for kind, source in zip(_KINDS, keys_and_values(attention), strict=True)
        ]
        attention.args = (attention.args[0], *made, *attention.args[3:])
    for name, value in others.items():
        value.replace_all_uses_with(_placeholder(editor, name, value))
    program.output.args = ([program.results[place] for place in kept],)
    inputs = _drop_inputs(program, [node for node in program.inputs if node in cut.inputs])
    args, kwargs = pytree.tree_unflatten([0] * program.in_spec.num_leaves, program.in_spec)
    named = {**kwargs, **_crossing_form(cut, others)}
    program.in_spec = pytree.tree_structure((args, named))
    program.out_spec = pytree.tree_structure(_pruned(program.out_spec, kept))
    return Half(inputs, kept)


def _crossing_form(cut: Cut, others: Mapping[str, Node]) -> dict[str, Any]:
    return {"cross": tuple((0, 0) for _ in cut.cross), **dict.fromkeys(others, 0)}


def _others(program: Program, cut: Cut) -> dict[str, Node]:
    """Encoder values besides the cross keys and values that the decoder reads, by their names."""
    found: set[Node] = set()
    masks: set[Node] = set()
    seen: set[Node] = set()
    left = [node for node in program.output.all_input_nodes if node not in cut.early]
    while left:
        node = left.pop()
        if node in seen or is_size(node.meta.get("val")):
            continue
        seen.add(node)
        reads = node.all_input_nodes
        if node in cut.cross:
            given = bound_arguments(node)
            reads = [part for part in (given["q"], given["mask"], given["sinks"]) if part]
            masks |= {given["mask"]} & cut.early
        crossing = [read for read in reads if read in cut.early and read.op != "placeholder"]
        found.update(crossing)
        left += [read for read in reads if read not in cut.early]
    ordered = [node for node in program.graph.nodes if node in found]
    hiding = [node for node in ordered if node in masks]
    states = [node for node in ordered if node not in masks]
    return {**_numbered("cross_mask", hiding), **_numbered("cross_state", states)}


def _numbered(name: str, nodes: Sequence[Node]) -> dict[str, Node]:
    if len(nodes) == 1:
        return {name: nodes[0]}
    return {f"{name}_{place}": node for place, node in enumerate(nodes)}


def _placeholder(editor: Editor, name: str, value: Node) -> Node:
    """An input of the form of `value`, after the inputs there are."""
    with editor.graph.inserting_after(editor.program.inputs[-1]):
        node = editor.graph.placeholder(name)
    like = value_of(value)
    with editor.mode:
        node.meta["val"] = torch.empty(like.shape, dtype=like.dtype)
    node.meta["module"] = value.meta.get("module", "")
    return node


def _drop_inputs(program: Program, unwanted: Collection[Node]) -> list[int]:
    """Remove unread inputs among `unwanted`; returns the places of those that stay.

    A size that was read from one of them is read from another input that has it.
    """
    editor = Editor(program)
    editor.sweep()
    _find_sizes_elsewhere(editor, unwanted)
    editor.sweep()
    places: list[int] = []
    for place, node in enumerate(program.inputs[: program.in_spec.num_leaves]):
        if node in unwanted and not node.users:
            program.graph.erase_node(node)
        else:
            places.append(place)
    args, kwargs = pytree.tree_unflatten(list(range(program.in_spec.num_leaves)), program.in_spec)
    pruned = (_pruned_tree(args, places, ()), _pruned_tree(kwargs, places, {}))
    program.in_spec = pytree.tree_structure(pruned)
    return places


def _find_sizes_elsewhere(editor: Editor, unwanted: Collection[Node]) -> None:
    kept = [node for node in editor.program.inputs if node not in unwanted]
    first = next(n for n in editor.graph.nodes if n.op not in ("placeholder", "get_attr"))
    made: dict[tuple[Node, int], Node] = {}
    tainted = set(unwanted)
    for node in list(editor.graph.nodes):
        if not any(read in tainted for read in node.all_input_nodes):
            continue
        place = _axis_of_size(node, kept)
        if place is None:
            tainted.add(node)
            continue
        if place not in made:
            with editor.at(first, ""):
                made[place] = editor.emit(_SIZE, *place)
        node.replace_all_uses_with(made[place])


def _axis_of_size(size: Node, inputs: Sequence[Node]) -> tuple[Node, int] | None:
    """An input and the axis of it that has this size, if the node is a size."""
    wanted = size.meta.get("val")
    if not isinstance(wanted, torch.SymInt):
        return None
    for node in inputs:
        if isinstance(node.meta.get("val"), Tensor):
            for axis, found in enumerate(shape(node)):
                if same_size(found, wanted):
                    return node, axis
    return None


def _pruned(spec: pytree.TreeSpec, kept: Collection[int]) -> Any:
    """A tree of the leaves that stay, () if none does."""
    return _pruned_tree(pytree.tree_unflatten(list(range(spec.num_leaves)), spec), kept, ())


def _pruned_tree(tree: Any, kept: Collection[int], empty: Any) -> Any:
    found = _without(tree, frozenset(kept))
    return empty if found is _GONE else found


def _without(tree: Any, kept: frozenset[int]) -> Any:
    if isinstance(tree, Mapping):
        entries = {key: _without(part, kept) for key, part in tree.items()}
        entries = {key: part for key, part in entries.items() if part is not _GONE}
        if not entries:
            return _GONE
        return entries if type(tree) is dict else type(tree)(**entries)
    if isinstance(tree, (tuple, list)):
        parts = [part for part in (_without(part, kept) for part in tree) if part is not _GONE]
        return type(tree)(parts) if parts and type(tree) in (tuple, list) else parts or _GONE
    return 0 if tree in kept else _GONE


def _names(cut: Cut, others: Mapping[str, Node]) -> list[str]:
    """What crosses, in order, by the names of the decoder's inputs."""
    pairs = [f"cross_{kind}_{place}" for place in range(len(cut.cross)) for kind in _KINDS]
    return [*pairs, *others]


def _describe(program: Program, cut: Cut, others: Mapping[str, Node], part: str) -> None:
    """metadata["cross"]: which half this is, and the form and names of what crosses."""
    layers: list[dict[str, Any]] = []
    for attention in cut.cross:
        key, value = (value_of(node) for node in keys_and_values(attention))
        form = {"kv_heads": key.shape[1], "head": key.shape[3], "value_head": value.shape[3]}
        layers.append({**form, "dtype": str(key.dtype).removeprefix("torch.")})
    program.metadata["cross"] = {"part": part, "layers": layers, "names": _names(cut, others)}
