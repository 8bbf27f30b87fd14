"""Products with weights become calls of linear kernels, and what follows them their epilogues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ir.edit import same_size
from ..ir.encoded import Encoded
from ..ir.format_two_four_codes import CompressedCodes
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from ..ir.weights import Derived
from ..kernels.catalog import triton_kernels
from .find_regions import find_epilogue, keeps_rows, may_prepare
from .gpu_calls import Calls
from .gpu_int8 import int8_arguments, is_rounded
from .gpu_weights import integer_arguments, packed_arguments
from .kernel_call import KernelCall
from .region import Region, cut_region

_ATEN = torch.ops.aten
# operator: schema names of activations, weight and bias; whether the weight is [in, out]
_PRODUCTS: dict[Any, tuple[str, str, str | None, bool]] = {
    _ATEN.linear.default: ("input", "weight", "bias", False),
    _ATEN.addmm.default: ("mat1", "mat2", "self", True),
    _ATEN.mm.default: ("self", "mat2", None, True),
    _ATEN.matmul.default: ("self", "other", None, True),
}


def lower_products(calls: Calls, dense: bool = True) -> list[str]:
    """Every product with a weight that a kernel takes; a sentence for each that stays.

    dense: those with dense weights too; False leaves them to the vendor's library.
    """
    sentences: list[str] = []
    for node in list(calls.editor.graph.nodes):
        if node.target not in _PRODUCTS:
            continue
        spread = _spread(calls, node)
        reason = _lower(calls, node, dense)
        if reason:
            sentences.append(f"%{node.name} is torch's product because {reason}")
        elif spread:
            sentences.append(f"%{node.name} {spread}")
    return sentences


def _spread(calls: Calls, node: Node) -> str | None:
    """What is not read as it is stored: codes in half, for which no kernel pays."""
    weight = bound_arguments(node)[_PRODUCTS[node.target][1]]
    if weight.op != "get_attr":
        return None
    entry = calls.editor.program.weights.entry(str(weight.target))
    if not isinstance(entry, Encoded) or not isinstance(entry.format, CompressedCodes):
        return None
    base, name = entry.format.base.name, entry.format.name
    return f"reads {name} as {base}, zeros put back, because no kernel reads codes in half"


def _lower(calls: Calls, node: Node, dense: bool) -> str | None:
    activations, weight, bias, turned = _PRODUCTS[node.target]
    given = bound_arguments(node)
    weight_node, x = given[weight], given[activations]
    if weight_node.op != "get_attr" or weight_node.meta["val"].dim() != 2:
        return "its second operand is no weight matrix"
    if reason := _odd_sum(given, node):
        return reason
    wide = _source(x)
    result = _result(node, wide)
    if result is node and not _same_lead(node, wide):
        wide = x  # others read the rows as they are: the kernel must give them so
    call: dict[str, Any] = {"x": wide, "bias": given[bias] if bias else None}
    entry = calls.editor.program.weights.entry(str(weight_node.target))
    if isinstance(entry, Encoded):
        axis, editor = -2 if turned else -1, calls.editor
        if is_rounded(wide):
            packed = int8_arguments(editor, wide, weight_node, entry, axis)
        else:
            packed = packed_arguments(editor, weight_node, entry, axis)
        if isinstance(packed, str):
            return packed
        spec, more = packed
        call |= more
    elif not dense:
        return "its weight is dense"
    else:
        spec = triton_kernels()["linear_dense"]
        call["weight"] = _turned(calls, weight_node, entry) if turned else weight_node
    if reason := calls.declined(spec, call):
        return reason
    calls.replace(result, spec, call)
    return None


def lower_tables(calls: Calls) -> list[str]:
    """Look-ups in encoded tables, which share their packed parts with the products tied to them."""
    sentences: list[str] = []
    editor = calls.editor
    for node in editor.graph.find_nodes(op="call_function", target=_ATEN.embedding.default):
        given = bound_arguments(node)
        table: Node = given["weight"]
        if table.op != "get_attr":
            continue
        entry = editor.program.weights.entry(str(table.target))
        if not isinstance(entry, Encoded):
            continue
        packed = "its groups do not lie along its rows"
        if entry.axis == -1:
            packed = integer_arguments(editor, table, entry)
        if not isinstance(packed, str):
            call = {"ids": given["indices"], **packed[1]}
            call |= {"length": table.meta["val"].shape[1], "dtype": entry.dtype}
            packed = calls.declined(triton_kernels()["rows_int"], call)
            if packed is None:
                calls.replace(node, triton_kernels()["rows_int"], call)
                continue
        sentences.append(f"%{node.name} looks up a dense table because {packed}")
    return sentences


def _odd_sum(given: Mapping[str, Any], node: Node) -> str | None:
    if node.target is not _ATEN.addmm.default:
        return None
    if given["beta"] != 1 or given["alpha"] != 1:
        return "it scales its product"
    return None if given["self"].meta["val"].dim() == 1 else "it adds more than a bias"


def _source(x: Node) -> Node:
    """The value behind views that only flatten rows."""
    while x.op == "call_function" and keeps_rows(x):
        before = x.args[0]
        assert isinstance(before, torch.fx.Node)
        x = before
    return x


def _result(node: Node, wide: Node) -> Node:
    """The view that gives the product the rows of `wide` again, or the product itself."""
    for user in node.users:
        if len(node.users) == 1 and keeps_rows(user) and _same_lead(user, wide):
            return user
    return node


def _same_lead(a: Node, b: Node) -> bool:
    """Whether two values have the same sizes before their last axis."""
    mine, theirs = a.meta["val"].shape[:-1], b.meta["val"].shape[:-1]
    return len(mine) == len(theirs) and all(map(same_size, mine, theirs))


def _turned(calls: Calls, weight: Node, entry: Any) -> Node:
    """[in, out] as [out, in], written so in the package."""
    rows, columns = weight.meta["val"].shape
    name, shape = f"{weight.target}.turned", torch.Size((columns, rows))
    if name in calls.editor.program.weights:
        return calls.editor.weight(name)
    dtype = weight.meta["val"].dtype
    made = Derived((entry,), lambda w: w.t().contiguous(), shape, dtype, "turned")
    return calls.editor.weight(name, made)


def fuse_epilogues(calls: Calls) -> list[Region]:
    """Give the linear kernels what they can do to their sums; returns the epilogues."""
    found: list[Region] = []
    for node in list(calls.editor.graph.nodes):
        call = node.target
        if not isinstance(call, KernelCall) or not call.spec.name.startswith("linear_"):
            continue
        chain = find_epilogue(node)
        if chain:
            found.append(_absorb(calls, node, call, chain))
    return found


def _absorb(calls: Calls, node: Node, call: KernelCall, chain: list[Node]) -> Region:
    graph, last = calls.editor.graph, chain[-1]
    region = _sums_first(cut_region(chain, "epilogue"), node)
    arguments = {**node.kwargs, "operands": tuple(region.inputs[1:])}
    with graph.inserting_before(last):
        new = graph.call_function(KernelCall(call.spec, region), (), arguments)
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    for member in [*reversed(chain), node]:
        graph.erase_node(member)
    return region


def _sums_first(region: Region, product: Node) -> Region:
    """The same region with the matmul's result as its first input."""
    first, head = region.inner[product], next(iter(region.graph.nodes))
    if first is not head:
        head.prepend(first)
    region.inputs = [product, *(n for n in region.inputs if n is not product)]
    return region


PREPARED = ("linear_dense", "linear_int")
"""Kernels that take a prologue."""


def fuse_prologues(calls: Calls) -> list[Region]:
    """Give the linear kernels the regions that only make their x; returns these.

    A kernel applies one where it has few rows; elsewhere its plan launches the region first.
    """
    found: list[Region] = []
    for node in list(calls.editor.graph.nodes):
        call = node.target
        if not isinstance(call, KernelCall) or call.spec.name not in PREPARED:
            continue
        made: Node = node.kwargs["x"]  # type: ignore[assignment]
        region = made.target
        if isinstance(region, Region) and len(made.users) == 1 and may_prepare(region):
            first, *rest = region.inputs
            arguments = {**node.kwargs, "x": first, "sources": tuple(rest)}
            node.target = KernelCall(call.spec, call.epilogue, region)
            node.kwargs = arguments
            calls.editor.graph.erase_node(made)
            found.append(region)
    return found
