"""What computes each product with a weight on the CPU: the kernel, or why there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..ir.encoded import Encoded
from ..ir.program import Node, Program
from ..ir.text import dtype_text, value_names
from ..ir.weight_roles import Role, weight_roles
from .select import Choice, described, select
from .select_int8 import RoundedProduct, rounded_products


def product_sentences(program: Program) -> list[str]:
    """A sentence for each product with a weight, in graph order: what runs it, on which format."""
    names = value_names(program.graph)
    rounded = {product.node: product for product in rounded_products(program)}
    choices = {choice.name: choice for choice in select(program).choices}
    told: dict[Node, str] = {}
    for role in weight_roles(program):
        entry = program.weights.entry(role.name)
        for node in role.matmuls:
            what = _kernel(entry, role, choices.get(role.name), rounded.get(node))
            told[node] = f"%{names[node]}: {what}"
    return [told[node] for node in program.graph.nodes if node in told]


def _kernel(
    entry: object, role: Role, choice: Choice | None, product: RoundedProduct | None
) -> str:
    if not isinstance(entry, Encoded):
        kind = f"{dtype_text(role.value.dtype)} product, its weight is dense"
        return f"{kind}; activations are rounded to int8 first" if product else kind
    fmt = entry.format.name
    if product is not None and not product.declined:
        kept = ", outlier columns in floats" if product.keeps_outliers else ""
        return f"{product.kernel} on {fmt}{described(entry.format)}, int8 activations{kept}"
    after = f"; activations are rounded to int8 first: {product.declined}" if product else ""
    if choice is not None and not choice.declined:
        return f"linear_affine on {fmt}{choice.form}{after}"
    reason = choice.declined if choice is not None else "no kernel reads it"
    return f"{fmt} decoded to {dtype_text(role.value.dtype)} because {reason}{after}"


def grouped(sentences: Iterable[str]) -> list[str]:
    """Layers that differ in their number only, as one line with a count, in order."""
    counts: dict[str, int] = {}
    for sentence in sentences:
        name, _, rest = sentence.partition(": ")
        key = re.sub(r"(?<=[._])\d+(?=[._]|$)", "*", name) + ": " + rest
        counts[key] = counts.get(key, 0) + 1
    return [f"{count} x {key}" if count > 1 else key for key, count in counts.items()]
