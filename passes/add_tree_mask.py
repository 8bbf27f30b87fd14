"""Let a cached decoder look at a tree of tokens: several continuations of a text in one call.

Before: `%y = attention(%q, %keys, %values, causal=True)`, positions `arange(length) + past`.
After: `%y = attention(%q, %keys, %values, mask=[all of the past | %tree_mask])`, positions
`%tree_positions + past`, with two more inputs: tree_mask bool[length, length], whose row i marks
token i and its ancestors in the tree, and tree_positions int64[length], the depths of the tokens.
For a chain (a lower triangle, depths 0, 1, ...) it computes what it did before; a branch of a tree
gets what it would get alone (Miao et al. 2023, SpecInfer, sec. 4.2). A window counts positions,
not places: siblings have the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.edit import Editor, same_size, shape
from ..ir.errors import PlanishError
from ..ir.interpret import run
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .contract import Context, Pass, contract
from .insert_kv_cache import empty_past

TREE_MASK = "tree_mask"
TREE_POSITIONS = "tree_positions"

_ATEN = torch.ops.aten
_ATTENTION = torch.ops.planish.attention.default
_COUNTS = {_ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step}


class CannotBranch(PlanishError):
    """The program cannot look at several continuations in one call, as far as this pass can see."""


@dataclass(frozen=True)
class AddTreeMask(Pass):
    """Give a cached decoder the inputs tree_mask and tree_positions."""

    contract = contract(
        "bounded", requires=["cached"], ensures=["branching"], changes_interface=True
    )

    def run(self, program: Program, context: Context) -> None:
        attentions = _causal_attentions(program)
        if not context.journal.offers():
            return
        before = program.copy()
        editor = Editor(program)
        length = shape(attentions[0].args[0])[2]  # type: ignore[arg-type]
        inputs = _add_inputs(program, editor, length)
        _place_by_depth(program, editor, length, inputs[1])
        masks = _Masks(program, editor, *inputs)
        for attention in attentions:
            _open(attention, masks)
            context.journal.noted(self.pass_name(), attention)
        editor.sweep()
        _extend_interface(program, before)
        _check_against(before, program)


def _causal_attentions(program: Program) -> list[Node]:
    found: list[Node] = []
    for node in program.graph.nodes:
        if node.target is not _ATTENTION or not bound_arguments(node)["causal"]:
            continue
        if bound_arguments(node)["mask"] is not None:
            raise CannotBranch(
                f"the attention %{node.name} has an explicit mask, which may count places",
                where=node.meta.get("module", ""),
                expected="causal attention without another mask",
                found=f"mask=%{bound_arguments(node)['mask']}",
                fix="capture from token ids alone, or leave add_tree_mask out for this model",
            )
        found.append(node)
    if not found:
        raise CannotBranch("no causal attention was found", fix="run insert_kv_cache first")
    return found


def _add_inputs(program: Program, editor: Editor, length: Any) -> tuple[Node, Node]:
    """Placeholders tree_mask bool[length, length] and tree_positions int64[length], at the end."""
    made: list[Node] = []
    last = program.inputs[-1]
    for name, sizes, dtype in (
        (TREE_MASK, (length, length), torch.bool),
        (TREE_POSITIONS, (length,), torch.int64),
    ):
        with program.graph.inserting_after(last):
            last = program.graph.placeholder(name)
        with editor.mode:
            last.meta["val"] = torch.empty(sizes, dtype=dtype)
        last.meta["module"] = ""
        made.append(last)
    return made[0], made[1]


def _place_by_depth(program: Program, editor: Editor, length: Any, depths: Node) -> None:
    """Where tokens were counted, or rows of a table taken in order, the depths decide."""
    for node in list(program.graph.nodes):
        if node.target in _COUNTS and same_size(shape(node)[0], length):
            start = bound_arguments(node).get("start", 0)
            with editor.at(node):
                places = depths if start == 0 else editor.emit(_ATEN.add.Tensor, depths, start)
                dtype = node.meta["val"].dtype
                if dtype != torch.int64:
                    places = editor.emit(_ATEN._to_copy.default, places, dtype=dtype)
            editor.replace(node, places)
        elif _takes_rows(node, length):
            arguments = bound_arguments(node)
            with editor.at(node):
                rows = editor.emit(_ATEN.add.Tensor, depths, arguments["start"] or 0)
                taken = editor.emit(
                    _ATEN.index_select.default, arguments["self"], arguments["dim"], rows
                )
            editor.replace(node, taken)


def _takes_rows(node: Node, length: Any) -> bool:
    """slice(weight, axis, start, start + length): consecutive rows of a table of positions."""
    if node.target is not _ATEN.slice.Tensor:
        return False
    arguments = bound_arguments(node)
    return (
        arguments["self"].op == "get_attr"
        and arguments["step"] == 1
        and same_size(shape(node)[arguments["dim"]], length)
    )


class _Masks:
    """The masks bool[1, 1, length, past + length], one for each width of window, made once."""

    def __init__(self, program: Program, editor: Editor, tree: Node, depths: Node) -> None:
        self.editor, self.tree, self.depths = editor, tree, depths
        self.past_key = next(n for n in program.inputs if n.name.startswith("past_key_"))
        self.first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
        self._made: dict[int, Node] = {}
        with editor.at(self.first, ""):
            self.past = editor.emit(_ATEN.sym_size.int, self.past_key, 2)
            length = editor.emit(_ATEN.sym_size.int, tree, 0)
            old = editor.emit(_ATEN.ones.default, [length, self.past], dtype=torch.bool)
            self.visible = editor.emit(_ATEN.cat.default, [old, tree], 1)

    def of(self, window: int) -> Node:
        if window not in self._made:
            with self.editor.at(self.first, ""):
                seen = self._within(window) if window else self.visible
                seen = self.editor.emit(_ATEN.unsqueeze.default, seen, 0)
                self._made[window] = self.editor.emit(_ATEN.unsqueeze.default, seen, 0)
        return self._made[window]

    def _within(self, window: int) -> Node:
        """visible, and the key's position is above the query's position minus the window."""
        emit = self.editor.emit
        queries = emit(_ATEN.add.Tensor, self.depths, self.past)
        keys = emit(_ATEN.cat.default, [emit(_ATEN.arange.default, self.past), queries], 0)
        lowest = emit(_ATEN.unsqueeze.default, emit(_ATEN.sub.Tensor, queries, window), 1)
        near = emit(_ATEN.gt.Tensor, emit(_ATEN.unsqueeze.default, keys, 0), lowest)
        return emit(_ATEN.bitwise_and.Tensor, self.visible, near)


def _open(attention: Node, masks: _Masks) -> None:
    arguments = bound_arguments(attention)
    mask = masks.of(arguments["window"])
    rest = {k: arguments[k] for k in ("scale", "softcap", "uniform_if_blind")}
    attention.args = (*attention.args[:3], mask, arguments["sinks"])
    attention.kwargs = rest


def _extend_interface(program: Program, before: Program) -> None:
    args, kwargs = pytree.tree_unflatten([0] * program.in_spec.num_leaves, program.in_spec)
    kwargs = {**kwargs, TREE_MASK: 0, TREE_POSITIONS: 0}
    program.in_spec = pytree.tree_structure((args, kwargs))
    if before.examples:
        count = before.examples[0].shape[1]
        chain = torch.ones(count, count, dtype=torch.bool).tril()
        program.examples = (*before.examples, chain, torch.arange(count))


def _check_against(before: Program, after: Program) -> None:
    """In float64, each branch of a tree as if it stood alone; raises CannotBranch."""
    if not before.examples:
        return
    ids = before.examples[0]
    texts, tokens = ids[:, :-4], ids[:, -4:]
    known = len(before.results) - len(empty_past(before, 1))
    past = run(before, [texts, *empty_past(before, len(ids))], float64=True)[known:]
    parents, paths = (-1, 0, 0, 1), ([0, 1, 3], [0, 2])
    mask = torch.eye(4, dtype=torch.bool)
    for token, parent in enumerate(parents[1:], 1):
        mask[token] |= mask[parent]
    depths = torch.tensor([0, 1, 1, 2])
    found: Tensor = run(after, [tokens, *past, mask, depths], float64=True)[0]
    for path in paths:
        wanted: Tensor = run(before, [tokens[:, path], *past], float64=True)[0]
        gap = _gap(found[:, path], wanted)
        if not gap <= 1e-10:
            raise CannotBranch(
                "in a tree the program does not compute what each branch gives alone",
                expected="equal float64 runs on the example inputs",
                found=f"a relative difference of {gap:.2g}",
                fix="leave add_tree_mask out: something besides attention looks at other places",
            )


def _gap(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())


__all__: Sequence[str] = ["TREE_MASK", "TREE_POSITIONS", "AddTreeMask", "CannotBranch"]
