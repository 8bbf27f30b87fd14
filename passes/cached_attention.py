"""The attentions of a cached program, and the exchange of what it keeps between its calls.

A program that keeps whole keys and values says, for each attention,
`%keys = cat([%past_key, %new_key], 2)`, the same for values, `attention(%q, %keys, %values)`, and
returns %keys and %values. A pass that keeps something else reads those places here, and changes
the inputs and outputs with `exchange_cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from ..ir.edit import Editor, infer
from ..ir.errors import PlanishError
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .insert_kv_cache import empty_past

_ATEN = torch.ops.aten
_ATTENTION = torch.ops.planish.attention.default
PAST = "past_"


class CacheRefused(PlanishError):
    """A cached program whose cache cannot take the form that a pass was asked for."""


@dataclass(frozen=True)
class CachedAttention:
    """One attention over a growing cache; each pair is (key, value).

    past: the inputs; new: what this call computed; joined: past and new together.
    """

    place: int
    node: Node
    past: tuple[Node, Node]
    new: tuple[Node, Node]
    joined: tuple[Node, Node]

    @property
    def arguments(self) -> dict[str, Any]:
        return bound_arguments(self.node)


def cached_attentions(program: Program, fix: str) -> list[CachedAttention]:
    """The attentions in the order of the inputs past_key_0, past_key_1, ...

    Raises CacheRefused where the program's cache is not whole keys and values that grow.
    """
    inputs = {node.name: node for node in program.inputs}
    found: list[CachedAttention] = []
    while f"past_key_{len(found)}" in inputs:
        place = len(found)
        pair = (inputs.pop(f"past_key_{place}"), inputs.pop(f"past_value_{place}", None))
        read = _read(program, place, pair)
        if read is None:
            raise refusal(pair[0], "is not joined with new keys, read by one attention", fix)
        found.append(read)
    others = [name for name in inputs if name.startswith(PAST)]
    if not found or others:
        told = f"keeps {others[0]} besides" if others else "keeps no keys and values"
        raise refusal(program.inputs[0], f"belongs to a program that {told}", fix)
    flat = [node for layer in found for node in layer.joined]
    if program.results[-len(flat) :] != flat:
        raise refusal(found[0].past[0], "is not returned as it was joined", fix)
    return found


def refusal(node: Node, why: str, fix: str) -> CacheRefused:
    return CacheRefused(
        f"%{node.name} {why}",
        where=node.meta.get("module", ""),
        expected="keys and values as insert_kv_cache keeps them",
        found=str(node.format_node()),
        fix=fix,
    )


def _read(program: Program, place: int, pair: tuple[Node, Node | None]) -> CachedAttention | None:
    new: list[Node] = []
    joined: list[Node] = []
    for past in pair:
        cats = [] if past is None else [u for u in past.users if u.target is not _SIZE]
        if len(cats) != 1 or cats[0].target is not _ATEN.cat.default:
            return None
        parts, *axis = cats[0].args
        if axis != [2] or len(parts) != 2 or parts[0] is not past:  # type: ignore[arg-type,index]
            return None
        new.append(parts[1])  # type: ignore[index,arg-type]
        joined.append(cats[0])
    readers = [u for u in joined[0].users if u is not program.output]
    same = readers == [u for u in joined[1].users if u is not program.output]
    if not same or len(readers) != 1 or readers[0].target is not _ATTENTION:
        return None
    if list(readers[0].args[1:3]) != joined or pair[1] is None:
        return None
    return CachedAttention(
        place, readers[0], (pair[0], pair[1]), (new[0], new[1]), (joined[0], joined[1])
    )


_SIZE = _ATEN.sym_size.int


def free_size(editor: Editor, hint: int) -> torch.SymInt:
    """A new free size; `hint` is the size that shape rules may try it with, at least 2."""
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return editor.mode.from_tensor(torch.empty(hint), symbolic_context=context).shape[0]  # type: ignore[return-value]


def shape_input(editor: Editor, node: Node, sizes: Sequence[Any], dtype: torch.dtype) -> Node:
    """Give an input another shape and dtype; `refresh` then carries it through the graph."""
    with editor.mode:
        node.meta["val"] = torch.empty(tuple(sizes), dtype=dtype)
    return node


def add_input(
    editor: Editor, name: str, sizes: Sequence[Any], dtype: torch.dtype, after: Node
) -> Node:
    """A new input behind another one."""
    with editor.graph.inserting_after(after):
        node = editor.graph.placeholder(name)
    node.meta["module"] = after.meta.get("module", "")
    return shape_input(editor, node, sizes, dtype)


class LayerEmitter:
    """Emits the same operations for layer after layer; equal layers infer their values once.

    Shapes with several free sizes take long to infer, and a model has many equal layers.
    """

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._known: dict[Any, Any] = {}

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """As `Editor.emit`."""
        node = self.editor.graph.call_function(target, args, kwargs)
        node.meta["module"] = self.editor.module
        node.meta["val"] = self._infer(node)
        return node

    def refresh(self) -> None:
        """Infer every value of the graph again, after inputs changed their shapes."""
        for node in self.editor.graph.nodes:
            if node.op == "call_function":
                node.meta["val"] = self._infer(node)

    def _infer(self, node: Node) -> Any:
        key = (node.target, _form_of(node.args), _form_of(node.kwargs))
        if key not in self._known:
            self._known[key] = infer(node, self.editor.mode)
        return self._known[key]


def _form_of(value: Any) -> Any:
    """What the value inferred for a call depends on, of its arguments."""
    if isinstance(value, fx.Node):
        return _form_of(value.meta["val"])
    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride())
        return "tensor", value.dtype, value.device, tuple(_form_of(size) for size in sizes)
    if isinstance(value, torch.SymInt):
        return "size", value.node.expr
    if isinstance(value, dict):
        return tuple((name, _form_of(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_form_of(item) for item in value)
    return type(value), value


def exchange_cache(program: Program, kept: int, past: Any, present: Any) -> None:
    """Let `past` (a tuple of tuples of inputs) come in and `present` (likewise) go out.

    kept: how many of the flat results were the present until now. Inputs of the old past that
    `past` does not name must have lost their readers; they are removed.
    """
    leaves = pytree.tree_leaves(past)
    users = [node for node in program.inputs if not node.name.startswith(PAST)]
    for node in program.inputs:
        if node not in leaves and node not in users:
            program.graph.erase_node(node)
    flat = program.results[: len(program.results) - kept]
    program.output.args = ([*flat, *pytree.tree_leaves(present)],)
    args, kwargs = pytree.tree_unflatten([0] * program.in_spec.num_leaves, program.in_spec)
    program.in_spec = pytree.tree_structure((args, {**kwargs, "past": _form(past)}))
    result, _ = pytree.tree_unflatten([0] * program.out_spec.num_leaves, program.out_spec)
    program.out_spec = pytree.tree_structure((result, _form(present)))
    if program.examples:
        own = program.examples[: len(users)]
        batch = next(v.shape[0] for v in own if isinstance(v, Tensor))
        program.examples = (*own, *empty_past(program, batch))


def _form(nested: Any) -> Any:
    return pytree.tree_map_only(fx.Node, lambda node: 0, nested)


def describe_cache(program: Program, **entries: Any) -> None:
    """Add entries to the JSON-able description of the cache in the program's metadata."""
    old = program.metadata.get("cache")
    program.metadata["cache"] = {
        **(old if isinstance(old, dict) else {"form": "growing"}),
        **entries,
    }
