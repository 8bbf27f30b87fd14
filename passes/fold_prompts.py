"""Fold trained prompts into a program: virtual tokens before its text.

Prompt tuning (Lester et al. 2021, sec. 2) and P-tuning (Liu et al. 2021, sec. 3) train the
embeddings of some virtual tokens. In a program without a cache, before: `%e = embedding(%W, %ids)`;
after: `%e = cat(%prompts, embedding(%W, %ids))`, with longer lengths and masks, and results cut to
the rows of the text. In a decoder with a KV cache the prompts do not depend on the text that
follows them, so their keys and values are computed now and precede the cache as constants.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.edit import Editor, same_size, shape, value_of
from ..ir.errors import WrongOption
from ..ir.interpret import run
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.read_virtual_tokens import PROMPTS, read_virtual_tokens
from .captured_prompts import fold_captured
from .constant_past import CannotFold, past_inputs, precede, refresh
from .contract import Context, Pass, contract

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class FoldPrompts(Pass):
    """Fold the prompts of a PEFT folder (`adapter`) into constants before the text.

    Without a folder, the prompts that were captured with the model are computed once.
    """

    adapter: str = ""

    contract = contract("bounded", requires=["functional"], changes_interface=True)

    def run(self, program: Program, context: Context) -> None:
        if not self.adapter:
            if fold_captured(program, context.journal, self.pass_name()) or context.journal.count:
                return
            raise WrongOption(
                "fold_prompts was given no adapter, and the program has no prompts of its own",
                expected="adapter=FOLDER, or a model that was captured with its prompts",
                fix="name the folder of a prompt-tuned adapter",
            )
        tokens = read_virtual_tokens(self.adapter, PROMPTS)
        ids, embedded = _embedding(program, int(tokens.values.shape[1]))
        if not context.journal.offers():
            return
        note = f"{tokens.count} virtual tokens"
        if "cached" in program.facts:
            constants = _keys_and_values(program, ids, embedded, tokens.values)
            joined = precede(program, constants, "prompts")
            context.journal.noted(self.pass_name(), joined[0], f"{note} as keys and values")
        else:
            _put_before(program, ids, embedded, tokens.values)
            context.journal.noted(self.pass_name(), embedded, note)


def _embedding(program: Program, width: int) -> tuple[Node, Node]:
    """The token ids, and what their rows of the table are when the next module reads them."""
    lookups = [
        node
        for node in program.graph.find_nodes(op="call_function", target=_ATEN.embedding.default)
        if bound_arguments(node)["indices"] is program.inputs[0]
    ]
    if len(lookups) != 1:
        raise CannotFold(
            "there is no one place where tokens become embeddings",
            expected=f"one lookup of {program.inputs[0].name} in a table",
            found=f"{len(lookups)} of them",
            fix="fold prompts into a program that was captured from token ids",
        )
    node = lookups[0]
    found = int(value_of(node).shape[-1])
    if found != width:
        raise CannotFold(
            "the prompts belong to another base",
            where=node.meta.get("module", ""),
            expected=f"embeddings of {found} numbers",
            found=str(width),
            fix="fold prompts that were trained for this model",
        )
    while len(node.users) == 1 and _of_same_module(node, next(iter(node.users))):
        node = next(iter(node.users))
    return program.inputs[0], node


def _of_same_module(node: Node, user: Node) -> bool:
    """Whether the embedding's own module goes on (it may scale its rows)."""
    module = node.meta.get("module", "")
    inner = bool(module) and user.meta.get("module", "") == module
    return inner and user.op == "call_function" and user.target is _ATEN.mul.Tensor


def _keys_and_values(program: Program, ids: Node, embedded: Node, prompts: Tensor) -> list[Tensor]:
    """What the decoder would keep of the prompts, each [1, kv_heads, tokens, head]."""
    past = past_inputs(program)
    alone = program.copy()
    count = int(prompts.shape[0])
    twin = next(n for n in alone.graph.nodes if n.name == embedded.name)
    stand_in = Editor(alone).weight("prompts", prompts[None].to(value_of(embedded).dtype))
    twin.replace_all_uses_with(stand_in)
    inputs = [_input_for(n, n in past, n is ids, count, program) for n in program.inputs]
    return [value.contiguous() for value in run(alone, inputs)[-len(past) :]]


def _input_for(node: Node, past: bool, ids: bool, count: int, program: Program) -> Tensor:
    dtype = value_of(node).dtype
    if past:
        _, heads, _, head = shape(node)
        return torch.zeros(1, heads, 0, head, dtype=dtype)
    if ids:
        return torch.zeros(1, count, dtype=dtype)
    if node.name == program.metadata["cache"].get("mask"):
        return torch.ones(1, count, dtype=dtype)
    if "position" in node.name:
        return torch.arange(count, dtype=dtype)[None]
    raise CannotFold(
        f"the decoder reads {node.name} too, which prompts do not have",
        expected="token ids, a padding mask, positions and a past",
        fix="capture it from token ids alone",
    )


def _put_before(program: Program, ids: Node, embedded: Node, prompts: Tensor) -> None:
    """Longer ids and masks stand for the old ones; the table is asked for the text alone."""
    editor = Editor(program)
    count = int(prompts.shape[0])
    length = shape(ids)[1]
    weight = editor.weight("prompts", prompts[None].to(value_of(embedded).dtype).contiguous())
    results = list(program.results)
    axes = [_length_axis(value, length) for value in results]
    first = next(n for n in program.graph.nodes if n.op == "call_function")
    own = {embedded, *_lookup_chain(embedded, ids)}
    for node in program.inputs:
        if _length_axis(node, length) == 1 and value_of(node).dim() == 2:
            _longer(editor, node, int(node is not ids), count, first, own)
    with editor.at(embedded.next, embedded.meta.get("module", "")):
        batch = editor.emit(_ATEN.sym_size.int, ids, 0)
        wide = editor.emit(_ATEN.expand.default, weight, [batch, -1, -1])
        joined = editor.emit(_ATEN.cat.default, [wide, embedded], 1)
    embedded.replace_all_uses_with(joined, delete_user_cb=lambda user: user is not joined)
    refresh(program)
    with editor.at(program.output, ""):
        for place, axis in enumerate(axes):
            if axis is not None:
                results[place] = editor.emit(
                    _ATEN.slice.Tensor, program.results[place], axis, count, sys.maxsize
                )
            else:
                results[place] = program.results[place]
    program.output.args = (results,)


def _lookup_chain(embedded: Node, ids: Node) -> list[Node]:
    chain: list[Node] = []
    node = embedded
    while ids not in node.all_input_nodes:
        node = next(n for n in node.all_input_nodes if n.op == "call_function")
        chain.append(node)
    return chain


def _length_axis(value: object, length: object) -> int | None:
    if not isinstance(value, Node) or not isinstance(value.meta.get("val"), Tensor):
        return None
    return next((i for i, size in enumerate(shape(value)) if same_size(size, length)), None)


def _longer(editor: Editor, node: Node, fill: int, count: int, first: Node, own: set[Node]) -> None:
    """Ids get placeholders that nobody looks up; a mask lets the prompts be seen."""
    with editor.at(first, ""):
        batch = editor.emit(_ATEN.sym_size.int, node, 0)
        dtype = value_of(node).dtype
        filled = editor.emit(_ATEN.full.default, [batch, count], fill, dtype=dtype)
        new = editor.emit(_ATEN.cat.default, [filled, node], 1)
    node.replace_all_uses_with(
        new, delete_user_cb=lambda user: user is not new and user is not batch and user not in own
    )
