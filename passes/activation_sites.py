"""Which values are rounded to int8, for which of the products that read them, by which scheme."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ir.affine_form import affine_form, why_not_affine
from ..ir.edit import Editor
from ..ir.encoded import Encoded
from ..ir.program import Node, Program
from ..ir.rewrite import Journal
from .calibrate import Product, product_sites
from .layer_patterns import LayerPatterns

NONE = "none"


@dataclass(frozen=True)
class RoundedSite:
    """A value [..., in], the products that are to read its codes, and how it is rounded."""

    value: Node
    scheme: str
    products: tuple[Product, ...]

    @property
    def layer(self) -> str:
        """The module of the first product's weight, or the weight where it has none."""
        return _layer(self.products[0].weight)

    @property
    def readers(self) -> str:
        """The layers of the products, for people."""
        return ", ".join(_layer(product.weight) for product in self.products)


def _layer(weight: str) -> str:
    return weight.rpartition(".")[0] or weight


def rounded_sites(
    program: Program, choose: LayerPatterns, scheme: str, only: str, journal: Journal, rule: str
) -> list[RoundedSite]:
    """In graph order; a decline for every product that goes on reading floats.

    choose: schemes of single layers, NONE to leave one out; scheme: of all others. only:
    "quantized" for products with integer weights, "all" for all.
    """
    found: list[RoundedSite] = []
    for site in product_sites(program):
        grouped: dict[str, list[Product]] = {}
        for product in site.products:
            wanted = choose.of(product.weight) or scheme
            reason = _why_not(program, product, wanted, only)
            if reason:
                journal.declined(rule, product.node, reason)
            else:
                grouped.setdefault(wanted, []).append(product)
        found += [RoundedSite(site.value, s, tuple(p)) for s, p in grouped.items()]
    return found


def _why_not(program: Program, product: Product, scheme: str, only: str) -> str | None:
    value = product.node.meta["val"]
    if scheme == NONE:
        return "left out by the options"
    if not value.is_floating_point():
        return f"it multiplies {value.dtype}"
    if only == "all":
        return None
    entry = program.weights.entry(product.weight)
    if not isinstance(entry, Encoded):
        return f"its weight {product.weight} is dense, so it computes in floats anyway"
    if affine_form(entry) is None:
        return f"its weight is kept as {entry.format.name}, and {why_not_affine(entry)}"
    return None


def read_instead(editor: Editor, site: RoundedSite, new: Node) -> None:
    """Let the site's products read `new`; views between value and product are made again."""
    again: dict[Node, Node] = {site.value: new}
    for product in site.products:
        for argument in product.node.all_input_nodes:
            if argument is site.value or _views(argument, site.value):
                changed = _viewed(editor, argument, again, product.node)
                product.node.replace_input_with(argument, changed)
                break


def _views(node: Node, value: Node) -> bool:
    """Whether `node` is `value` in another shape, as `product_sites` looks through."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        if getattr(node.target, "overloadpacket", None) is None or not _reshapes(node):
            return False
        node = node.args[0]
        if node is value:
            return True
    return False


def _reshapes(node: Node) -> bool:
    return str(node.target) in ("aten.view.default", "aten.reshape.default",
                                "aten._unsafe_view.default")  # fmt: skip


def _viewed(editor: Editor, node: Node, again: dict[Node, Node], at: Node) -> Node:
    """`node`, a chain of views of a value, made of what the value became."""
    if node not in again:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before = _viewed(editor, source, again, at)
        with editor.at(node):
            again[node] = editor.emit(node.target, before, *node.args[1:], **node.kwargs)
    return again[node]
