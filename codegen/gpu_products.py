"""Products with weights become calls of linear kernels, and what follows them their epilogues."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.edit import Editor, same_size
from ..ir.encoded import Encoded
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from ..ir.weights import Derived
from ..kernels.catalog import triton_kernels
from ..kernels.triton_spec import TritonSpec
from .find_regions import find_epilogue, keeps_rows
from .gpu_weights import packed_arguments
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


def lower_products(editor: Editor, archs: Sequence[str]) -> list[str]:
    """Every product with a weight that a kernel takes; a sentence for each that stays."""
    sentences: list[str] = []
    for node in list(editor.graph.nodes):
        if node.target not in _PRODUCTS:
            continue
        reason = _lower(editor, node, archs)
        if reason:
            sentences.append(f"%{node.name} is torch's product because {reason}")
    return sentences


def _lower(editor: Editor, node: Node, archs: Sequence[str]) -> str | None:
    activations, weight, bias, turned = _PRODUCTS[node.target]
    given = bound_arguments(node)
    weight_node, x = given[weight], given[activations]
    if weight_node.op != "get_attr" or weight_node.meta["val"].dim() != 2:
        return "its second operand is no weight matrix"
    if reason := _odd_sum(given, node):
        return reason
    wide = _source(x)
    call: dict[str, Any] = {"x": wide, "bias": given[bias] if bias else None}
    entry = editor.program.weights.entry(str(weight_node.target))
    if isinstance(entry, Encoded):
        packed = packed_arguments(editor, weight_node, entry, turned)
        if isinstance(packed, str):
            return packed
        spec, more = packed
        call |= more
    else:
        spec = triton_kernels()["linear_dense"]
        call["weight"] = _turned(editor, weight_node, entry) if turned else weight_node
    if reason := declined(spec, archs, call):
        return reason
    place = _result(node, wide)
    with editor.at(node):
        new = emit(editor, spec, call, place)
    editor.replace(place, new)
    return None


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
    lead = wide.meta["val"].shape[:-1]
    for user in node.users:
        mine = user.meta["val"].shape[:-1] if keeps_rows(user) else ()
        fits = len(mine) == len(lead) and all(
            same_size(a, b) for a, b in zip(mine, lead, strict=True)
        )
        if fits and len(node.users) == 1:
            return user
    return node


def _turned(editor: Editor, weight: Node, entry: Any) -> Node:
    """[in, out] as [out, in], written so in the package."""
    rows, columns = weight.meta["val"].shape
    name = f"{weight.target}.turned"
    if name in editor.program.weights:
        return editor.weight(name)
    shape = torch.Size((columns, rows))
    made = Derived(
        (entry,), lambda w: w.t().contiguous(), shape, weight.meta["val"].dtype, "turned"
    )
    return editor.weight(name, made)


def emit(editor: Editor, spec: TritonSpec, call: Mapping[str, Any], place: Node) -> Node:
    """A call of a kernel that stands for `place`, with its value."""
    node = editor.graph.call_function(KernelCall(spec), (), dict(call))
    node.meta["module"] = place.meta.get("module", "")
    node.meta["val"] = place.meta["val"]
    node.meta["stands_for"] = place.name
    return node


def emit_several(
    editor: Editor, spec: TritonSpec, call: Mapping[str, Any], place: Node
) -> tuple[Node, ...]:
    """A call of a kernel with several results, and the nodes that take each from it."""
    node = emit(editor, spec, call, place)
    with editor.mode, torch.no_grad():
        values: tuple[Tensor, ...] = node.target(**fake(call))  # type: ignore[operator]
    node.meta["val"] = values
    items = [editor.graph.call_function(operator.getitem, (node, i)) for i in range(len(values))]
    for made, value in zip(items, values, strict=True):
        made.meta = {"module": node.meta["module"], "val": value}
    return tuple(items)


def declined(spec: TritonSpec, archs: Sequence[str], call: Mapping[str, Any]) -> str | None:
    """Why a kernel cannot take a call on one of the architectures."""
    arguments = fake(call)
    for arch in archs:
        reason = spec.why_not(arch, **arguments)
        if reason:
            return f"{reason} ({arch})" if len(archs) > 1 else reason
    return None


def fake(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the fake values of nodes."""
    return {k: v.meta["val"] if isinstance(v, torch.fx.Node) else v for k, v in call.items()}


def fuse_epilogues(editor: Editor) -> list[Region]:
    """Give the linear kernels what they can do to their sums; returns the epilogues."""
    found: list[Region] = []
    for node in list(editor.graph.nodes):
        call = node.target
        if not isinstance(call, KernelCall) or not call.spec.name.startswith("linear_"):
            continue
        chain = find_epilogue(node, lambda user: False)
        if chain:
            found.append(_absorb(editor, node, chain))
    return found


def _absorb(editor: Editor, node: Node, chain: list[Node]) -> Region:
    call = node.target
    assert isinstance(call, KernelCall)
    region = cut_region(chain, "epilogue")
    last = chain[-1]
    with editor.graph.inserting_before(last):
        ordered = _sums_first(region, node)
        new = editor.graph.call_function(
            KernelCall(call.spec, ordered),
            (),
            {**node.kwargs, "operands": tuple(ordered.inputs[1:])},
        )
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    for member in reversed(chain):
        editor.graph.erase_node(member)
    editor.graph.erase_node(node)
    return ordered


def _sums_first(region: Region, product: Node) -> Region:
    """The same region with the matmul's result as its first input."""
    first = region.inner[product]
    head = next(iter(region.graph.nodes))
    if first is not head:
        head.prepend(first)
    region.inputs = [product, *(n for n in region.inputs if n is not product)]
    return region
