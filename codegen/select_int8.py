"""Which products on quantized activations multiply integers, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..ir.affine_form import affine_form, why_not_affine
from ..ir.encoded import Encoded
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.weight_roles import _swaps_last_two
from ..kernels.catalog import kernels
from .select import described

_ATEN = torch.ops.aten
_OPS = torch.ops.planish
# operator: schema names of the activations, of the weight and of the bias; the summed axis
PRODUCTS: dict[Any, tuple[str, str, str | None, int]] = {
    _ATEN.linear.default: ("input", "weight", "bias", -1),
    _ATEN.addmm.default: ("mat1", "mat2", "self", -2),
    _ATEN.mm.default: ("self", "mat2", None, -2),
    _ATEN.matmul.default: ("self", "other", None, -2),
}
ROUNDED = {_OPS.dequantize.default, _OPS.round_regular.default}
_TRANSPOSES = {_ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default}
_RESHAPES = {_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default}


@dataclass(frozen=True)
class RoundedProduct:
    """A product that reads rounded activations.

    rounded: the node that dequantizes, or keeps outliers; views: the reshapes between, outermost
    last; weight: its node; axis: of the weight, that is summed; entry: how it is kept; bias: a
    vector or None; declined: why it is not computed on integers, or "".
    """

    node: Node
    rounded: Node
    views: tuple[Node, ...]
    weight: Node
    axis: int
    entry: Encoded | None
    bias: Node | None
    declined: str = ""

    @property
    def kept(self) -> Encoded:
        """The weight of a product that was not declined for a dense one."""
        assert self.entry is not None
        return self.entry

    @property
    def keeps_outliers(self) -> bool:
        return self.rounded.target is _OPS.round_regular.default

    @property
    def kernel(self) -> str:
        return "linear_llm_int8_cpu" if self.keeps_outliers else "linear_w8a8_cpu"


WhyNot = Callable[[RoundedProduct, Encoded], str | None]


def cpu_why_not(product: RoundedProduct, entry: Encoded) -> str | None:
    """Why this package's kernels cannot take a product; None if they can."""
    form = affine_form(entry)
    if form is None:
        return why_not_affine(entry)
    return kernels()[product.kernel].why_not(form.steps, product.node.meta["val"].dtype)


def rounded_products(program: Program, why_not: WhyNot = cpu_why_not) -> list[RoundedProduct]:
    """Every product whose left operand is rounded, in graph order.

    why_not: asked, of products of the right form, whether the target multiplies their integers.
    """
    found: list[RoundedProduct] = []
    for node in program.graph.nodes:
        if node.target in PRODUCTS:
            product = _product(program, node)
            if product is not None:
                reason = _why_not(product) or why_not(product, product.kept)
                found.append(replace(product, declined=reason or ""))
    return found


def _product(program: Program, node: Node) -> RoundedProduct | None:
    activations, weight_name, bias_name, axis = PRODUCTS[node.target]
    given = bound_arguments(node)
    views: list[Node] = []
    value = given[activations]
    while value.target in _RESHAPES and _same_rows(value):
        views.insert(0, value)
        value = value.args[0]
    if value.target not in ROUNDED:
        return None
    weight = given[weight_name]
    while weight.target in _TRANSPOSES and _swaps_last_two(weight):
        weight, axis = weight.args[0], -3 - axis
    entry = program.weights.entry(str(weight.target)) if weight.op == "get_attr" else None
    encoded = entry if isinstance(entry, Encoded) else None
    bias = given[bias_name] if bias_name else None
    return RoundedProduct(node, value, tuple(views), weight, axis, encoded, bias)


def _same_rows(view: Node) -> bool:
    """Whether a reshape leaves rows whole."""
    source: Any = view.args[0]
    before, after = source.meta["val"].shape, view.meta["val"].shape
    return bool(before) and bool(after) and before[-1] == after[-1]


def _why_not(product: RoundedProduct) -> str | None:
    """What is odd about a product, whatever the target."""
    node, entry = product.node, product.entry
    if product.weight.op != "get_attr" or entry is None:
        return "its weight is dense"
    if entry.axis != product.axis or len(entry.shape) != 2:
        return "its weight's groups do not lie along the axis that is summed"
    if node.target is _ATEN.addmm.default:
        given = bound_arguments(node)
        if given["beta"] != 1 or given["alpha"] != 1:
            return "it scales its product"
    if isinstance(product.bias, fx.Node) and product.bias.meta["val"].dim() != 1:
        return "it adds more than a bias"
    return None


def sentence(product: RoundedProduct, names: dict[Node, str]) -> str:
    """What computes a product, for people."""
    what = f"%{names[product.node]} (int8 activations)"
    if product.declined:
        return f"{what} multiplies floats because {product.declined}"
    assert product.entry is not None
    form = described(product.entry.format)
    return f"{what} on {product.entry.format.name} multiplies integers{form}: {product.kernel}"
