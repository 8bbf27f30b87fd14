"""Encoded weights as the arguments of the kernel that reads them packed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ir.affine_form import affine_form
from ..ir.edit import Editor
from ..ir.encoded import Encoded
from ..ir.format_affine import AffineInt
from ..ir.program import Node
from ..kernels.catalog import triton_kernels
from ..kernels.triton_spec import TritonSpec
from .gpu_coded import coded_arguments


def packed_arguments(
    editor: Editor, weight: Node, entry: Encoded, axis: int
) -> tuple[TritonSpec, dict[str, Any]] | str:
    """The kernel and its arguments for an encoded weight, or why there is none.

    axis: of the weight, that the product sums over. The packed parts become weights of their own,
    shared by all readers of one weight.
    """
    if entry.axis != axis:
        return "its groups do not lie along the axis that is summed"
    coded = coded_arguments(entry)
    if coded is None:
        return integer_arguments(editor, weight, entry)
    if isinstance(coded, str):
        return coded
    name, arguments = coded
    nodes = {
        kind: _part(editor, f"{weight.target}.{name}.{kind}", part)
        if isinstance(part, Tensor)
        else part
        for kind, part in arguments.items()
    }
    return triton_kernels()[name], nodes


def integer_arguments(
    editor: Editor, weight: Node, entry: Encoded
) -> tuple[TritonSpec, dict[str, Any]] | str:
    """The arguments of `linear_int` for a weight that is integers, or the same values as some."""
    from ..kernels.linear_int import pack, why_not_pack

    if not isinstance(entry.format, AffineInt):
        form = affine_form(entry)
        if form is not None and not form.plain:
            return f"no kernel adds what {entry.format.name} has beside its integers"
        entry = entry if form is None else form.steps
    if reason := why_not_pack(entry):
        return reason
    packed = pack(entry)
    parts = {"words": packed.words, "scale": packed.scale, "zero": packed.zero}
    nodes = {
        kind: None if part is None else _part(editor, f"{weight.target}.{kind}", part)
        for kind, part in parts.items()
    }
    return triton_kernels()["linear_int"], {**nodes, "bits": packed.bits, "group": packed.group}


def _part(editor: Editor, name: str, part: Any) -> Node:
    return editor.weight(name) if name in editor.program.weights else editor.weight(name, part)
