"""The weights that a search decides about: which, what fits them, and which belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .ir.encoded import Format
from .ir.errors import UnsupportedFormat
from .ir.formats import parse_format
from .ir.program import Program
from .ir.weight_roles import weight_roles
from .passes.calibrate import Product, Site, product_sites
from .search_allocate import Choices
from .search_sensitivity import Costs


@dataclass(frozen=True)
class Class:
    """Weights that get one format: their names, how many values, and the candidates."""

    names: tuple[str, ...]
    count: int
    formats: tuple[str, ...]
    choices: Choices


def plain_sites(program: Program) -> list[Site]:
    """The sites of weights that the base's quantizer takes: no tables, one axis."""
    plain = {
        role.name
        for role in weight_roles(program)
        if role.matmuls and not role.tables and not role.others
    }
    sites = [
        Site(site.value, tuple(p for p in site.products if p.weight in plain))
        for site in product_sites(program)
    ]
    return [site for site in sites if site.products]


def fitting_formats(program: Program, product: Product, formats: Sequence[Format]) -> list[Format]:
    """The candidates whose groups divide the weight's width."""
    width = program.weights.shape(product.weight)[product.axis]
    found = [fmt for fmt in formats if width % fmt.grouping(width) == 0]
    if not found:
        raise UnsupportedFormat(
            f"no candidate's groups divide the {width} inputs of {product.weight}",
            where=product.weight,
            expected=f"a group size that divides {width}",
            found=", ".join(fmt.name for fmt in formats),
            fix="add a candidate such as int4-channel-asym-f16 with --formats",
        )
    return found


def group_weights(
    program: Program, costs: Costs, candidates: Sequence[str], together: bool
) -> list[Class]:
    """Weights that get one format, with the candidates that were priced for all of them."""
    axes = {p.weight: p.axis for site in plain_sites(program) for p in site.products}
    groups: dict[str, tuple[str, ...]] = {}
    for site in plain_sites(program):
        names = tuple(dict.fromkeys(product.weight for product in site.products))
        for unit in [names] if together else [(name,) for name in names]:
            fresh = tuple(name for name in unit if name not in groups)
            groups |= dict.fromkeys(fresh, fresh)
    classes: list[Class] = []
    for names in dict.fromkeys(groups.values()):
        formats = [n for n in candidates if all(n in costs[name] for name in names)]
        counts = [program.weights.shape(name).numel() for name in names]
        sizes = [
            sum(
                count * parse_format(fmt).bits_per_weight(program.weights.shape(name), axes[name])
                for name, count in zip(names, counts, strict=True)
            )
            for fmt in formats
        ]
        prices = [sum(costs[name][fmt] for name in names) for fmt in formats]
        classes.append(Class(names, sum(counts), tuple(formats), Choices(sizes, prices)))
    return classes


def uniform_points(
    classes: Sequence[Class], formats: Sequence[str]
) -> list[tuple[str, float, float]]:
    """What one format for all weights would take and cost, where it fits them all."""
    total = sum(each.count for each in classes)
    found: list[tuple[str, float, float]] = []
    for name in formats:
        if all(name in each.formats for each in classes):
            places = [each.formats.index(name) for each in classes]
            pairs = list(zip(classes, places, strict=True))
            size = sum(each.choices.sizes[i] for each, i in pairs) / total
            found.append((name, size, sum(each.choices.costs[i] for each, i in pairs)))
    return found


__all__ = ["Class", "fitting_formats", "group_weights", "plain_sites", "uniform_points"]
