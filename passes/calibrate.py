"""Calibration: what the matmuls of a program read when it runs on the user's batches.

`product_sites` finds the values that products with weights read. `sweep` runs one forward pass
over all batches, stops at every site, and lets a method replace the weights there: what runs
afterwards runs on the new weights (the "true sequential" order of GPTQ) at no extra cost. Memory
is one segment's weights and the live activations of the batches; nothing after the last site is
run. `observe` runs batch by batch for statistics that change nothing.

Products with stacks of matrices (experts, chosen by routing) are no sites: which tokens reach which
matrix is only known while running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from ..ir.errors import CalibrationTooSmall, WrongInput
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.weight_roles import Role, weight_roles
from ..ir.weights import Weights
from .calibration_stream import Stream, schedule
from .nonfinite_activation import nonfinite_activation

_ATEN = torch.ops.aten
# operator: the arguments that hold a weight and an activation [..., in] with it
_PRODUCTS: dict[Any, tuple[str, str]] = {
    _ATEN.linear.default: ("weight", "input"),
    _ATEN.addmm.default: ("mat2", "mat1"),
    _ATEN.mm.default: ("mat2", "self"),
    _ATEN.matmul.default: ("other", "self"),
}
_TRANSPOSES = {_ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default}
_RESHAPES = {_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default}

Batches = Sequence[Sequence[Any]]
Observer = TypeVar("Observer", bound=Callable[[Tensor], None])


@dataclass(frozen=True)
class Product:
    """One matmul of an activation with a weight.

    axis: of the weight, the one it sums over (-1: [out, in], -2: [in, out]).
    """

    node: Node
    weight: str
    axis: int


@dataclass(frozen=True)
class Site:
    """A value [..., in] that products read: q, k and v share one."""

    value: Node
    products: tuple[Product, ...]

    @property
    def module(self) -> str:
        """The module of the first product, or of the value."""
        return self.products[0].node.meta.get("module", "") or self.value.meta.get("module", "")

    @property
    def width(self) -> int:
        return int(self.value.meta["val"].shape[-1])


class Activations:
    """A site's values, batch by batch, as often as they are iterated: tensors [tokens, in].

    reference: of a paired sweep, the same values when all weights are the original ones.
    """

    def __init__(self, site: Site, stream: Stream, reference: Activations | None = None) -> None:
        self.site, self.reference, self._stream = site, reference, stream

    @property
    def module(self) -> str:
        return self.site.module

    def __len__(self) -> int:
        return self._stream.count

    def beside(self, value: Node) -> Iterator[Tensor] | None:
        """Another value [tokens, width], batch by batch; None if it is not kept at this site."""
        return self._stream.rows(value)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in range(self._stream.count):
            value = self._stream.value(self.site.value, batch)
            yield value.reshape(-1, value.shape[-1])

    @property
    def tokens(self) -> int:
        return sum(rows.shape[0] for rows in self)


def product_sites(program: Program) -> list[Site]:
    """Every value that a product with a weight matrix reads, in graph order."""
    place = {node: number for number, node in enumerate(program.graph.nodes)}
    found: dict[Node, list[Product]] = {}
    for role in weight_roles(program):
        if role.value.dim() != 2 or role.axis is None:
            continue
        for node in role.matmuls:
            value = _activation(node, role)
            if value is not None:
                found.setdefault(value, []).append(Product(node, role.name, role.axis))
    return [
        Site(value, tuple(sorted(found[value], key=lambda p: place[p.node])))
        for value in sorted(found, key=place.__getitem__)
    ]


def _activation(node: Node, role: Role) -> Node | None:
    """What a matmul multiplies with the weight from the left; None if that is not an activation."""
    if node.target not in _PRODUCTS:
        return None
    arguments = bound_arguments(node)
    weight, value = (arguments[name] for name in _PRODUCTS[node.target])
    while weight is not role.node:
        if not isinstance(weight, fx.Node) or weight.target not in _TRANSPOSES:
            return None
        weight = weight.args[0]
    while value.target in _RESHAPES and _width(value.args[0]) == _width(value):
        value = value.args[0]
    return None if value.op == "get_attr" else value


def _width(node: Any) -> Any:
    shape = node.meta["val"].shape
    return shape[-1] if len(shape) else None


def sweep(
    program: Program,
    batches: Batches,
    visit: Callable[[Site, Activations], None],
    *,
    sites: Sequence[Site] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    paired: bool = False,
    original: Weights | None = None,
) -> None:
    """Run all batches once through the graph; at each site, when all have arrived, call `visit`.

    batches: flat input lists. visit: may replace entries of `program.weights` that the site's
    products read. sites: some of `product_sites`, in graph order. paired: run a second stream
    beside it on the `original` weights (by default those of now), which `activations.reference`
    shows: twice the time and memory. Raises CalibrationTooSmall and NonFiniteActivation.
    """
    chosen = list(product_sites(program) if sites is None else sites)
    check_batches(program, batches)
    plan = schedule(program, [site.value for site in chosen])
    stream = Stream(program, batches, plan, program.weights.__getitem__)
    original = program.weights.copy() if original is None else original
    twin = Stream(program, batches, plan, original.__getitem__) if paired else None
    for number, site in enumerate(chosen):
        progress(number, len(chosen), site.module)
        stream.advance(number)
        activations = Activations(site, stream)
        _check_finite(program, batches, activations)
        if twin is not None:
            twin.advance(number)
            activations.reference = Activations(site, twin)
        visit(site, activations)
        for each in (stream, twin):
            if each is not None:
                each.leave(number)
    progress(len(chosen), len(chosen), "calibrated")


def observe(
    program: Program,
    batches: Batches,
    values: Sequence[Site] | Sequence[Node],
    make_observer: Callable[[Node], Observer],
) -> dict[Node, Observer]:
    """Show every batch's value of each site or node to an observer of its own.

    make_observer: called once with each node; what it returns is called with each batch's value,
    in the value's own shape. Only what the observed values need is run. Raises CalibrationTooSmall.
    """
    nodes = [value.value if isinstance(value, Site) else value for value in values]
    observers = {node: make_observer(node) for node in nodes}
    place = {node: number for number, node in enumerate(program.graph.nodes)}
    stops = sorted(observers, key=place.__getitem__)
    check_batches(program, batches)
    plan = schedule(program, stops)
    for batch in batches:
        stream = Stream(program, [batch], plan, program.weights.__getitem__)
        for number, node in enumerate(stops):
            stream.advance(number)
            observers[node](stream.value(node, 0))
            stream.leave(number)
    return observers


def check_batches(program: Program, batches: Batches) -> None:
    """Raise CalibrationTooSmall if nothing would be measured, WrongInput for other inputs."""
    wanted = len(program.inputs)
    for number, batch in enumerate(batches):
        if len(batch) != wanted:
            raise WrongInput(
                f"calibration batch {number} does not fit the program",
                expected=f"{wanted} flat inputs",
                found=str(len(batch)),
                fix="lay it out with Program.flatten_inputs",
            )
    sizes = [value.numel() for batch in batches for value in batch if isinstance(value, Tensor)]
    if not batches or (sizes and 0 in sizes):
        raise CalibrationTooSmall(
            "a calibration batch is empty" if batches else "there are no calibration batches",
            expected="inputs like those the model will see, for example 32 texts of 512 tokens",
            found=f"{len(batches)} batches" + (", one without elements" if batches else ""),
            fix="pass calibration=[(ids,), ...]",
        )


def _check_finite(program: Program, batches: Batches, activations: Activations) -> None:
    for number, rows in enumerate(activations):
        # The sum of finite numbers may overflow, so a suspicion is looked into.
        if not bool(rows.sum().isfinite()) and not bool(rows.isfinite().all()):
            raise nonfinite_activation(program, batches[number], number, activations.site.value)
