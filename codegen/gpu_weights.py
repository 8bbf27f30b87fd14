"""Encoded weights as the arguments of the kernel that reads them packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.affine_form import affine_form
from ..ir.edit import Editor
from ..ir.encoded import Encoded
from ..ir.format_affine import AffineInt
from ..ir.format_two_four import Compressed
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
    fmt = entry.format
    coded = _sparse(entry) if isinstance(fmt, Compressed) else coded_arguments(entry)
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


def _sparse(entry: Encoded) -> tuple[str, dict[str, Any]] | str:
    """The arguments of `linear_sparse24`, laid out again for its tiles."""
    from ..kernels.linear_sparse24 import pack

    if entry.format != Compressed(2, 4):
        return f"no kernel reads {entry.format.name}"
    if len(entry.shape) != 2:
        return f"it is a stack of matrices {list(entry.shape)}"
    if entry.dtype == torch.float64:
        return "it is float64, and the kernel computes in float32"
    rows = entry.decode().movedim(entry.axis, -1).contiguous()
    return "linear_sparse24", dict(vars(pack(rows)))


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
