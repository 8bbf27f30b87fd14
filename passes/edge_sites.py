"""Where the consumers of scale edges read: what calibration has to look at to choose factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..ir.errors import WrongOption
from ..ir.move_scale import move_scale
from ..ir.program import Node, Program
from ..ir.scale_edges import EdgeEnd, ScaleEdge, scale_edges
from .calibrate import Activations, Product, Site, sweep
from .contract import Context

KINDS = ("norm->linear", "v->o", "up->down", "fc1->fc2", "linear->linear", "table->linear")
_ATEN = torch.ops.aten
_WIDENED = {_ATEN.unsqueeze.default, _ATEN.transpose.int, _ATEN.reshape.default}


@dataclass(frozen=True)
class EdgeSite:
    """One value that an edge's consumers read.

    channel: int64 [width], the factor of each of its channels, or -1. ends: the consumers.
    """

    value: Node
    channel: Tensor
    ends: tuple[EdgeEnd, ...]


@dataclass
class Seen:
    """An edge and what its sites left behind, by site; complete when all were visited."""

    edge: ScaleEdge
    sites: tuple[EdgeSite, ...]
    kept: dict[Node, object] = field(default_factory=dict[Node, object])


def edge_sites(edge: ScaleEdge) -> tuple[EdgeSite, ...]:
    """The values that the edge's consumers read, each once, in graph order."""
    found: dict[Node, list[EdgeEnd]] = {}
    for end in edge.consumers:
        for _, source in end.readings:
            rows = rows_of(source, len(end.channel))
            if rows is not None and end not in found.setdefault(rows, []):
                found[rows].append(end)
    return tuple(EdgeSite(v, found[v][0].channel, tuple(found[v])) for v in sorted(found))


def rows_of(source: Node, width: int) -> Node | None:
    """The value [..., width] that a product reads, behind turns that put its channels elsewhere."""
    while source.meta["val"].shape[-1] != width:
        if source.target not in _WIDENED or not isinstance(source.args[0], fx.Node):
            return None
        source = source.args[0]
    return source


def wanted_kinds(spelled: str, where: str) -> tuple[str, ...]:
    """The kinds of edges that an option names; all if it names none. Raises WrongOption."""
    kinds = tuple(filter(None, (part.strip() for part in spelled.split(","))))
    for kind in kinds:
        if kind not in KINDS:
            raise WrongOption(
                f"option {where}.kinds cannot hold {kind!r}",
                expected=", ".join(KINDS),
                found=kind,
                fix='for example kinds="norm->linear, up->down"',
            )
    return kinds or KINDS


def free_edges(
    program: Program, context: Context, rule: str, kinds: Sequence[str]
) -> list[ScaleEdge]:
    """Edges to work on; the blocked ones that have consumers are declined with their reason."""
    chosen: list[ScaleEdge] = []
    for edge in scale_edges(program):
        if edge.free and edge.kind in kinds:
            chosen.append(edge)
        elif edge.consumers and not edge.free:
            context.journal.declined(rule, edge.name, edge.sentence())
    return chosen


def choose_factors(
    program: Program,
    context: Context,
    edges: Sequence[ScaleEdge],
    keep: Callable[[ScaleEdge, EdgeSite, Activations], object],
    decide: Callable[[Seen], tuple[Tensor, str] | None],
) -> list[tuple[ScaleEdge, Tensor, str]]:
    """Run the calibration batches once; choose each edge's factors when its last site was seen.

    keep: what to remember of a site's activations. decide: from that, positive factors [factors]
    and a note; None to leave the edge alone.
    """
    waiting = [Seen(edge, edge_sites(edge)) for edge in edges]
    waiting = [seen for seen in waiting if seen.sites]
    at: dict[Node, list[tuple[Seen, EdgeSite]]] = {}
    for seen in waiting:
        for site in seen.sites:
            at.setdefault(site.value, []).append((seen, site))
    chosen: dict[int, tuple[ScaleEdge, Tensor, str]] = {}

    def visit(site: Site, activations: Activations) -> None:
        for seen, place in at[site.value]:
            seen.kept[place.value] = keep(seen.edge, place, activations)
            if len(seen.kept) == len(seen.sites):
                found = decide(seen)
                seen.kept.clear()
                if found is not None:
                    chosen[waiting.index(seen)] = (seen.edge, *found)

    sites = [Site(value, _products(at[value])) for value in sorted(at)]
    if sites:
        sweep(program, context.calibration, visit, sites=sites, progress=context.progress)
    return [chosen[number] for number in sorted(chosen)]


def _products(places: list[tuple[Seen, EdgeSite]]) -> tuple[Product, ...]:
    return tuple(
        Product(node, end.weight, end.axis - 2)
        for _, place in places
        for end in place.ends
        for node, _ in end.readings
    )


def fold(
    program: Program,
    context: Context,
    rule: str,
    chosen: Sequence[tuple[ScaleEdge, Tensor, str]],
) -> None:
    """Move the chosen factors, each edge one rewrite."""
    for edge, factors, note in chosen:
        if context.journal.offers():
            for name in dict.fromkeys(move_scale(program, edge, factors)):
                context.journal.changed_weight(rule, name, f"{edge.kind}; {note}")


def by_factor(values: Tensor, channel: Tensor, factors: int, how: str) -> Tensor:
    """Values of channels [width] brought together by factor, [factors]. how: "amax" or "mean"."""
    held = channel >= 0
    start = values.new_zeros(factors)
    return start.scatter_reduce(0, channel[held], values[held], how, include_self=how == "amax")
