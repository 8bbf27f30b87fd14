"""Where a cut value meets one that is as it was: the reader takes the places that it needs of it.

A slope per head, a bias that several attentions read, a state that starts at 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cut_graph import cannot_cut, set_argument
from .edit import Editor
from .pattern import bound_arguments
from .program import Node

_ATEN = torch.ops.aten


def read_less(
    editor: Editor, node: Node, read: Node, wanted: Tensor, mask: Any, whole: bool
) -> None:
    """Let a node read only the wanted places of a value.

    wanted: bool of the value's shape before the cut. mask: what is kept of the value, None for all.
    whole: nothing of the value can ever go, so that nobody asks which places are read.
    """
    there = mask if isinstance(mask, Tensor) else torch.ones_like(wanted)
    taken = read
    for axis in range(wanted.dim()):
        stay, has = _along(wanted & there, axis), _along(there, axis)
        if bool((stay == has).all()):
            continue
        places = stay[has].nonzero().flatten()
        with editor.graph.inserting_before(node):
            taken = _choose(editor, taken, axis, places, whole)
        taken.meta = {"module": node.meta.get("module", "")}
    if taken is not read:
        node.replace_input_with(read, taken)


def _choose(editor: Editor, value: Node, axis: int, places: Tensor, whole: bool) -> Node:
    first, end = int(places[0]), int(places[-1]) + 1
    if whole and end - first == len(places):
        return editor.graph.call_function(_ATEN.slice.Tensor, (value, axis, first, end))
    kept = editor.weight("kept_places", places)
    return editor.graph.call_function(_ATEN.index_select.default, (value, axis, kept))


def choose_again(editor: Editor, node: Node, masks: Mapping[Node, Any]) -> None:
    """A choice of stored places (index_select) among channels of which some go, or are not taken.

    Raises CannotCut.
    """
    if node.target is not _ATEN.index_select.default:
        return
    source, axis, index = (bound_arguments(node)[name] for name in ("self", "dim", "index"))
    has, stay = (_lost_along(masks.get(value), axis) for value in (source, node))
    if has is None and stay is None:
        return
    if not (isinstance(index, Node) and index.op == "get_attr"):
        raise cannot_cut(node, "data chooses among its channels")
    places = editor.program.weights[str(index.target)]
    places = places if stay is None else places[stay]
    if has is not None:
        if not bool(has[places].all()):
            raise cannot_cut(node, "it takes places that would be gone")
        places = (has.cumsum(0) - 1)[places]
    set_argument(node, "index", editor.weight("kept_places", places))


def _lost_along(mask: Any, axis: int) -> Tensor | None:
    kept = _along(mask, axis % mask.dim()) if isinstance(mask, Tensor) else None
    return None if kept is None or bool(kept.all()) else kept


def _along(mask: Tensor, axis: int) -> Tensor:
    """bool [size of the axis], where anything is kept."""
    others = [a for a in range(mask.dim()) if a != axis]
    return mask.sum(others) > 0 if others else mask


__all__ = ["choose_again", "read_less"]
