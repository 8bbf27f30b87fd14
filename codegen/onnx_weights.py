"""Dense weights as initializers, each read and written when its turn comes; ties stored once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import onnx_ir as oir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, fx

from ..ir.encoded import Encoded
from ..ir.formats import AffineInt
from ..ir.program import Node
from .onnx_builder import Builder, Value, onnx_dtype
from .onnx_coded import coded_weight

_MATRIX_READERS = (
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
)


def is_weight(argument: Any) -> TypeGuard[Node]:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def weight_name(b: Builder, node: Node) -> str:
    """The one name under which a weight is kept."""
    return b.program.weights.canonical(str(node.target))


def packed(b: Builder, node: Any) -> Encoded | None:
    """The weight as integers on an affine grid, if it is kept so."""
    if not is_weight(node):
        return None
    entry = b.program.weights.entry(str(node.target))
    if isinstance(entry, Encoded) and isinstance(entry.format, AffineInt):
        return entry
    return None


def packed_entry(b: Builder, node: Any) -> Encoded | None:
    """The weight as it is kept, if it is kept in a number format."""
    entry = b.program.weights.entry(str(node.target)) if is_weight(node) else None
    return entry if isinstance(entry, Encoded) else None


def only_matrix(node: Node) -> bool:
    """Whether every reader multiplies by the weight, in its place for weights."""
    return all(is_matrix_reader(user, node) for user in node.users)


def is_matrix_reader(user: Node, weight: Node) -> bool:
    """Whether `user` multiplies by `weight`, in its place for weights and nowhere else."""
    if user.target not in _MATRIX_READERS:
        return False
    place = 2 if user.target is torch.ops.aten.addmm.default else 1
    return len(user.args) > place and user.args[place] is weight and user.args.count(weight) == 1


def dense_weight(b: Builder, node: Node) -> Value:
    """The weight as the model knows it."""
    name = weight_name(b, node)
    entry = b.program.weights.entry(name)
    if isinstance(entry, Encoded) and not isinstance(entry.format, AffineInt):
        found = b.once(("coded", name), lambda: _decoded(b, name, entry))
        if found is not None:
            return found
    return _stored(b, name, name, lambda weight: weight)


def _decoded(b: Builder, name: str, entry: Encoded) -> Value | None:
    """A weight of another format, decoded from its codes when a session starts; a remark if not."""
    found, fmt = coded_weight(b, name, entry), entry.format.name
    if found is None:
        b.notes.append(f"{name}: stored dense, ONNX has no form of {fmt}")
    else:
        b.notes.append(f"{name}: stored as {fmt}, dense in memory: ONNX has no product with it")
    return found


def transposed_weight(b: Builder, node: Node) -> Value:
    """The transpose [in, out] of a matrix [out, in]: what MatMul multiplies by.

    Stored transposed where every reader wants it so, else computed from the stored matrix.
    """
    name = weight_name(b, node)
    if only_matrix(node) and not isinstance(b.program.weights.entry(name), Encoded):
        return _stored(b, name, f"{name}.transposed", lambda weight: weight.t())
    stored = dense_weight(b, node)
    return b.once(("transpose", name), lambda: b.op("Transpose", stored, perm=[1, 0]))


def shifted_weight(b: Builder, node: Node, offset: float) -> Value:
    """weight + offset, stored."""
    name = weight_name(b, node)
    return _stored(b, name, f"{name}.plus_{offset:g}", lambda weight: weight + offset)


def _stored(b: Builder, name: str, stored_name: str, change: Callable[[Tensor], Tensor]) -> Value:
    weights = b.program.weights
    dtype = onnx_dtype(weights.dtype(name))
    with torch.device("meta"):
        shape = change(torch.empty(weights.shape(name), dtype=weights.dtype(name))).shape

    def make() -> oir.Tensor:
        with torch.no_grad():
            return TorchTensor(change(weights[name]).contiguous())

    key = ("weight", stored_name)
    return b.once(key, lambda: b.lazy(stored_name, dtype, tuple(shape), make))
