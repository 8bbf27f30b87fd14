"""Insert a KV cache: a full-sequence causal decoder becomes a program for prefill and decode.

Before: `%y = attention(%q, %k, %v, causal=True)` over the whole text, positions `arange(length)`.
After: `%k2 = cat(%past_key, %k)`, `%v2 = cat(%past_value, %v)`, `%y = attention(%q, %k2, %v2,
causal=True)`, positions `arange(length) + past`, and %k2, %v2 returned for the next call.
Equal because a causal query sees only keys at or before its own place, and those do not change
when the text grows (the operation counts places from the last key).

The new program takes one more keyword, `past`: a tuple of (key, value) for each attention, each
[batch, kv_heads, past, head] with any `past` from 0 on, and returns (result, present) where
present has the form of `past`. What the graph shows decides what is position and what is text;
the pass then runs both programs on the example inputs and refuses if they differ.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from ..ir.edit import Editor, same_size, shape
from ..ir.errors import PlanishError
from ..ir.interpret import run
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .contract import Context, Pass, contract

_ATEN = torch.ops.aten
_ATTENTION = torch.ops.planish.attention.default
_COUNTS = {_ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step}
_MIXES_LENGTH = {
    _ATEN.cumsum.default,
    _ATEN.flip.default,
    _ATEN.roll.default,
    _ATEN.conv1d.default,
    _ATEN.conv2d.default,
    _ATEN.scaled_dot_product_attention.default,
}


class CannotCache(PlanishError):
    """The program has no form with a KV cache that this pass can prove."""


@dataclass(frozen=True)
class InsertKvCache(Pass):
    """Let a causal decoder keep its keys and values between calls."""

    contract = contract(
        "bounded",
        requires=["raised", "no_dead_values"],
        ensures=["cached"],
        changes_interface=True,
    )

    def run(self, program: Program, context: Context) -> None:
        plain = program.copy()
        attentions = _attentions(program)
        length = _query_length(attentions)
        _refuse_mixing(program, length)
        if not context.journal.offers():
            return
        editor = Editor(program)
        past = _add_inputs(program, editor, attentions)
        past_length = _emit_length(editor, past[0][0])
        _shift_positions(program, editor, length, past_length)
        present = [
            _lengthen(editor, attention, key, value)
            for attention, (key, value) in zip(attentions, past, strict=True)
        ]
        for attention in attentions:
            context.journal.noted(self.pass_name(), attention)
        _extend_interface(program, present)
        _check_against(plain, program)


def _attentions(program: Program) -> list[Node]:
    found = [node for node in program.graph.nodes if node.target is _ATTENTION]
    if not found:
        raise CannotCache(
            "no attention was recognized, so there are no keys and values to keep",
            fix="see planish explain; a recurrent model has no KV cache",
        )
    for node in found:
        arguments = bound_arguments(node)
        if not arguments["causal"]:
            raise _refusal(node, "is not causal: text to come would change what is kept")
        if arguments["mask"] is not None:
            raise _refusal(node, "has an explicit mask: capture without attention_mask")
    return found


def _refusal(node: Node, why: str) -> CannotCache:
    return CannotCache(
        f"the attention %{node.name} {why}",
        where=node.meta.get("module", ""),
        expected="causal self-attention without another mask",
        found=f"causal={bound_arguments(node)['causal']}, mask={bound_arguments(node)['mask']}",
        fix="leave insert_kv_cache out of the recipe for this model",
    )


def _query_length(attentions: Sequence[Node]) -> Any:
    length = shape(attentions[0].args[0])[2]  # type: ignore[arg-type]
    for node in attentions:
        queries, keys = shape(node.args[0])[2], shape(node.args[1])[2]  # type: ignore[arg-type]
        if isinstance(queries, int) or not (same_size(queries, length) and same_size(keys, length)):
            raise _refusal(node, "does not attend from a text of free length to the same text")
    return length


def _refuse_mixing(program: Program, length: Any) -> None:
    for node in program.graph.nodes:
        if node.target in _MIXES_LENGTH:
            raise CannotCache(
                f"%{node.name} = {node.target} mixes places of the text outside of attention",
                where=node.meta.get("module", ""),
                expected=f"only attention to mix the axis of size {length}",
                found=str(node.target),
                fix="leave insert_kv_cache out of the recipe for this model",
            )


def _add_inputs(
    program: Program, editor: Editor, attentions: Sequence[Node]
) -> list[tuple[Node, Node]]:
    """Placeholders past_key_i, past_value_i [batch, kv_heads, past, head] after the inputs."""
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    size = editor.mode.from_tensor(torch.empty(5), symbolic_context=context).shape[0]
    last = program.inputs[-1]
    pairs: list[tuple[Node, Node]] = []
    for place, attention in enumerate(attentions):
        made: list[Node] = []
        for kind, source in zip(("key", "value"), attention.args[1:3], strict=True):
            value = source.meta["val"]  # type: ignore[union-attr]
            with program.graph.inserting_after(last):
                node = program.graph.placeholder(f"past_{kind}_{place}")
            batch, heads, _, width = value.shape
            with editor.mode:
                node.meta["val"] = torch.empty((batch, heads, size, width), dtype=value.dtype)
            node.meta["module"] = attention.meta.get("module", "")
            made.append(node)
            last = node
        pairs.append((made[0], made[1]))
    return pairs


def _emit_length(editor: Editor, past_key: Node) -> Node:
    first = next(n for n in editor.graph.nodes if n.op not in ("placeholder", "get_attr"))
    with editor.at(first, ""):
        return editor.emit(_ATEN.sym_size.int, past_key, 2)


def _shift_positions(program: Program, editor: Editor, length: Any, past: Node) -> None:
    """Places counted from 0, or read from the head of a table, start at `past` instead."""
    for node in list(program.graph.nodes):
        after = node.next
        if node.target in _COUNTS and same_size(shape(node)[0], length):
            with editor.at(after, node.meta.get("module", "")):
                moved = editor.emit(_ATEN.add.Tensor, node, past)
            node.replace_all_uses_with(
                moved, delete_user_cb=lambda user, new=moved: user is not new
            )
        elif _is_head_of_table(node, length):
            _shift_slice(editor, node, past)


def _is_head_of_table(node: Node, length: Any) -> bool:
    """slice(weight, axis, 0, length): the first rows of a table of positions."""
    if node.target is not _ATEN.slice.Tensor:
        return False
    arguments = bound_arguments(node)
    source, axis = arguments["self"], arguments["dim"]
    return (
        source.op == "get_attr"
        and arguments["start"] in (None, 0)
        and arguments["step"] == 1
        and same_size(shape(node)[axis], length)
    )


def _shift_slice(editor: Editor, node: Node, past: Node) -> None:
    arguments = bound_arguments(node)
    with editor.at(node, node.meta.get("module", "")):
        end = editor.emit(operator.add, arguments["end"], past)
        moved = editor.emit(_ATEN.slice.Tensor, arguments["self"], arguments["dim"], past, end, 1)
    editor.replace(node, moved)


def _lengthen(editor: Editor, attention: Node, key: Node, value: Node) -> tuple[Node, Node]:
    query, new_key, new_value, *rest = attention.args
    with editor.at(attention):
        keys = editor.emit(_ATEN.cat.default, [key, new_key], 2)
        values = editor.emit(_ATEN.cat.default, [value, new_value], 2)
    attention.args = (query, keys, values, *rest)
    return keys, values


def _extend_interface(program: Program, present: Sequence[tuple[Node, Node]]) -> None:
    old = program.output
    flat = [*old.args[0], *(node for pair in present for node in pair)]  # type: ignore[misc]
    old.args = (flat,)
    args, kwargs = pytree.tree_unflatten([0] * program.in_spec.num_leaves, program.in_spec)
    pairs = tuple((0, 0) for _ in present)
    program.in_spec = pytree.tree_structure((args, {**kwargs, "past": pairs}))
    result = pytree.tree_unflatten([0] * program.out_spec.num_leaves, program.out_spec)
    program.out_spec = pytree.tree_structure((result, pairs))
    program.metadata["cache"] = len(present)
    if program.examples:
        batch = next(v.shape[0] for v in program.examples if isinstance(v, Tensor))
        program.examples = (*program.examples, *empty_past(program, batch))


def empty_past(program: Program, batch: int) -> list[Tensor]:
    """The flat `past` of a text not yet begun: [batch, kv_heads, 0, head] for each input."""
    nodes = [node for node in program.inputs if node.name.startswith("past_")]
    values = [node.meta["val"] for node in nodes]
    return [torch.zeros(batch, v.shape[1], 0, v.shape[3], dtype=v.dtype) for v in values]


def _check_against(plain: Program, cached: Program) -> None:
    """Run the examples whole and in two parts, in float64; raise CannotCache if they differ."""
    inputs = list(cached.examples[: len(plain.inputs)])
    texts = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and v.dim() >= 2]
    if not texts:
        return
    wanted = run(plain, inputs, float64=True)
    past: list[Any] = empty_past(cached, inputs[texts[0]].shape[0])
    whole = inputs[texts[0]].shape[1]
    parts: list[Any] = []
    for start, end in ((0, whole // 2), (whole // 2, whole - 1), (whole - 1, whole)):
        piece = [v[:, start:end] if i in texts else v for i, v in enumerate(inputs)]
        found = run(cached, [*piece, *past], float64=True)
        parts.append(found[0])
        past = found[len(wanted) :]
    gap = (torch.cat(parts, 1) - wanted[0]).norm() / wanted[0].norm()
    if not gap <= 1e-10:
        raise CannotCache(
            "token by token the cached program does not compute what the whole text gives",
            expected="equal float64 runs on the example inputs",
            found=f"a relative difference of {float(gap):.2g}",
            fix="leave insert_kv_cache out: something besides attention looks at other places",
        )
