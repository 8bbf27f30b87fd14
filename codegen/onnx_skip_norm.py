"""A residual sum and the norm that reads it as one node, whose second result is the sum.

Before: `%s = add(%x, %y); %n = rms_norm(%s, %w)`, %s read again by the next residual.
After: `%n, %s = skip_rms_norm(%x, %y, %w)`: the sum is normed while it is in the cache.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from ..ir.edit import Editor, same_shape
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .onnx_builder import CONTRIB, Value
from .onnx_call import Call, Table
from .onnx_fused import SKIP_LAYER_NORM, SKIP_RMS_NORM
from .onnx_weights import is_weight, shifted_weight

_ADD = torch.ops.aten.add.Tensor
_RMS_NORM = torch.ops.planish.rms_norm.default
_LAYER_NORM = torch.ops.aten.layer_norm.default


def fuse_skip_norms(program: Program, editor: Editor) -> None:
    """Let every norm of a sum that can be one node with it become so; the first norm, if many."""
    fused: set[Node] = set()
    for norm in list(program.graph.nodes):
        if norm.target not in (_RMS_NORM, _LAYER_NORM):
            continue
        total = norm.args[0]
        if total in fused or not _is_plain_sum(total):
            continue
        arguments = _operands(norm)
        if arguments is not None:
            fused.add(total)
            _fuse(editor, norm, total, arguments)


def _is_plain_sum(node: Any) -> bool:
    """x + y of one float32 shape [batch, length, channels] with known channels."""
    if node.target is not _ADD or node.kwargs or not all(isinstance(a, Node) for a in node.args):
        return False
    left, right = node.args
    values = [operand.meta.get("val") for operand in (left, right)]
    if not all(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in values):
        return False
    return values[0].dim() == 3 and isinstance(values[0].shape[2], int) and same_shape(left, right)


def _operands(norm: Node) -> tuple[Any, ...] | None:
    """The target and what follows the two summands; None where the node has no such form."""
    arguments = bound_arguments(norm)
    weight = arguments["weight"]
    if not is_weight(weight) or weight.meta["val"].dtype != torch.float32:
        return None
    if norm.target is _RMS_NORM:
        return SKIP_RMS_NORM, weight, arguments["eps"], arguments["offset"]
    bias = arguments["bias"]
    if len(arguments["normalized_shape"]) != 1 or not (bias is None or is_weight(bias)):
        return None
    return SKIP_LAYER_NORM, weight, bias, arguments["eps"]


def _fuse(editor: Editor, norm: Node, total: Node, operands: tuple[Any, ...]) -> None:
    target, *rest = operands
    with editor.at(total, norm.meta.get("module", "")):
        both = editor.emit(target, *total.args, *rest)
        normed, summed = (editor.emit(operator.getitem, both, place) for place in (0, 1))
    summed.meta["module"] = total.meta.get("module", "")
    editor.replace(norm, normed)
    editor.replace(total, summed)


def _skip_rms_norm(call: Call) -> list[Value]:
    offset = call["offset"]
    weight = call.value("weight")
    if offset:
        weight = shifted_weight(call.b, call["weight"], offset)
    return _skip_norm(call, "SkipSimplifiedLayerNormalization", [weight])


def _skip_layer_norm(call: Call) -> list[Value]:
    inputs = [call.value("weight"), call.optional("bias")]
    return _skip_norm(call, "SkipLayerNormalization", inputs)


def _skip_norm(call: Call, op_type: str, parameters: list[Value | None]) -> list[Value]:
    """The norm and the sum; the sum is no output where nobody reads it."""
    inputs = [call.value("x"), call.value("skip"), *parameters]
    read = any(user.args[1] == 1 and user.users for user in call.node.users)
    dtypes = [None] * (4 if read else 1)
    found = call.b.ops(op_type, inputs, dtypes, CONTRIB, epsilon=float(call["eps"]))
    for statistic in found[1:3]:
        statistic.name = ""  # saved for training only
    return [found[0], found[-1]]


TABLE: Table = {
    "planish_onnx.skip_rms_norm": _skip_rms_norm,
    "planish_onnx.skip_layer_norm": _skip_layer_norm,
}
