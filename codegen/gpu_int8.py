"""Products on rounded activations as calls of linear_w8a8, which rounds what it reads itself.

Its own launch makes the codes that planish::quantize means: by token, or by a static scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.edit import Editor
from ..ir.encoded import Encoded
from ..ir.format_affine import AffineInt
from ..ir.format_two_four_codes import with_zeros
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from ..kernels.catalog import triton_kernels
from ..kernels.triton_spec import TritonSpec

_OPS = torch.ops.planish


def is_rounded(value: Node) -> bool:
    return value.target in (_OPS.dequantize.default, _OPS.round_regular.default)


def int8_arguments(
    editor: Editor, value: Node, weight: Node, entry: Encoded, axis: int
) -> tuple[TritonSpec, dict[str, Any]] | str:
    """The kernel and its arguments, x among them, for a rounded value; or why it takes floats.

    axis: of the weight, that the product sums over.
    """
    entry = with_zeros(entry)
    fmt = entry.format
    if entry.axis != axis:
        return "its groups do not lie along the axis that is summed"
    if not isinstance(fmt, AffineInt) or fmt.bits != 8 or not fmt.symmetric:
        return f"{fmt.name} is not symmetric int8"
    if fmt.groups(entry.rows_shape[-1]) != 1:
        return "its weight has groups"
    found = _source(value)
    if isinstance(found, str):
        return found
    x, scale, zero, shifted = found
    codes = (entry.codes().to(torch.int16) - 128).to(torch.int8)
    parts: dict[str, Tensor] = {"weight": codes, "weight_scale": entry.scale.float().reshape(-1)}
    if shifted:
        parts["weight_sums"] = codes.sum(1, dtype=torch.int32)
    nodes = {kind: _part(editor, f"{weight.target}.int8.{kind}", p) for kind, p in parts.items()}
    return triton_kernels()["linear_w8a8"], {"x": x, "x_scale": scale, "x_zero": zero, **nodes}


def _source(value: Node) -> tuple[Node, Node | None, Node | None, bool] | str:
    """(x, static scale, static zero point, whether codes have zero points) of a rounded value."""
    if value.target is _OPS.round_regular.default:
        return "no kernel finds outlier columns while it runs"
    made = bound_arguments(value)
    quantize: Node = made["codes"]
    if quantize.target is not _OPS.quantize.default:
        return "its codes come from elsewhere"
    scale, zero, x = made["scale"], made["zero"], bound_arguments(quantize)["x"]
    if scale.op == "get_attr":
        return x, scale, zero, zero is not None
    if scale.target is _OPS.activation_scale.default and bound_arguments(scale)["per"] == "token":
        return x, None, None, zero is not None
    return "a scale for the whole tensor is found by no kernel"


def _part(editor: Editor, name: str, part: Tensor) -> Node:
    known = name in editor.program.weights
    return editor.weight(name) if known else editor.weight(name, part)
