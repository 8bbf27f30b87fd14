"""Lower a program for the CPU: packed kernels where they serve, references elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from ..ir.affine_form import affine_form
from ..ir.edit import Editor, value_of
from ..ir.pattern import bound_arguments
from ..ir.program import Program
from ..kernels.attention_cpu import why_not as attention_why_not
from .lower_affine import affine_parts, affine_product, affine_rows
from .lower_cpu_int8 import lower_int8
from .select import Choice, select

_ATEN = torch.ops.aten
# operator: (schema names of the activations, of the weight and of the bias)
_PARTS: dict[Any, tuple[str, str | None]] = {
    _ATEN.linear.default: ("input", "bias"),
    _ATEN.addmm.default: ("mat1", "self"),
    _ATEN.mm.default: ("self", None),
    _ATEN.matmul.default: ("self", None),
}


def lower_for_cpu(program: Program) -> tuple[Program, list[str]]:
    """A copy with packed kernels, and a sentence for each encoded weight and each attention.

    The copy's weights hold the packed parts in place of the encoded ones; a table and the head
    tied to it share theirs.
    """
    lowered, sentences = pack_weights(program)
    editor = Editor(lowered)
    sentences += _lower_attention(editor)
    editor.sweep()
    return lowered, sentences


def pack_weights(program: Program) -> tuple[Program, list[str]]:
    """A copy with packed kernels for encoded weights, and a sentence for each of these."""
    lowered = program.copy()
    editor = Editor(lowered)
    sentences = lower_int8(editor)
    selection = select(lowered)
    for choice in selection.choices:
        if not choice.declined:
            _use_packed(editor, choice)
    editor.sweep()
    return lowered, sentences + selection.sentences


def _use_packed(editor: Editor, choice: Choice) -> None:
    form = affine_form(choice.entry)
    assert form is not None
    parts = affine_parts(editor, choice.name, form)
    for product in choice.products:
        given = bound_arguments(product)
        activations, bias = _PARTS[product.target]
        with editor.at(product):
            new = affine_product(editor, parts, given[activations], given[bias] if bias else None)
        editor.replace(product, new)
    for table in choice.tables:
        with editor.at(table):
            new = affine_rows(editor, parts, bound_arguments(table)["indices"])
            if choice.entry.dtype != torch.float32:
                new = editor.emit(_ATEN._to_copy.default, new, dtype=choice.entry.dtype)
        editor.replace(table, new)


def _lower_attention(editor: Editor) -> list[str]:
    sentences: list[str] = []
    attentions = editor.graph.find_nodes(
        op="call_function", target=torch.ops.planish.attention.default
    )
    for node in attentions:
        if value_of(node).device.type != "cpu":
            continue
        given = bound_arguments(node)
        reason = attention_why_not(given["sinks"], given["softcap"])
        if reason is not None:
            sentences.append(f"%{node.name} keeps its scores in memory because {reason}")
            continue
        names = ["q", "k", "v", "mask", "scale", "causal", "window", "uniform_if_blind"]
        with editor.at(node):
            arguments = [given[name] for name in names]
            new = editor.emit(torch.ops.planish.attention_cpu.default, *arguments)
        editor.replace(node, new)
    return sentences
