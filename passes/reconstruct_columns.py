"""Make the columns that stay do the work of those that go: least squares after a structured cut.

Before: `%y = linear(%x, %w)` with columns of `%w` about to be cut. After: those columns are zero
and the others hold what makes `%y` on the calibration batches nearest to what the whole program
computes there, given the inputs as the cuts before have left them; a bias moves along. Where
`%y` is added to a stream of values, it also makes up for what the stream has lost so far. In closed
form, layer by layer in one pass over the batches; nothing is trained. The idea of He et al. 2017
("Channel Pruning", eq. 4), here with the answer held to the old weights by a ridge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ..ir.edit import same_shape, same_size, shape
from ..ir.errors import WrongInput
from ..ir.held_out_damp import held_out_damp
from ..ir.paired_moments import PairedMoments
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .calibrate import Activations, Product, Site, observe, product_sites, sweep
from .contract import Context

_NAME = "reconstruct_columns"
_ATEN = torch.ops.aten
_SAME = {_ATEN.view.default, _ATEN.reshape.default, _ATEN.clone.default, _ATEN.alias.default}

Halves = tuple[PairedMoments, PairedMoments]
Columns = Mapping[str, Mapping[int, Tensor]]
"""For each weight and axis of it, bool [size]: what is going to be cut."""


def reconstruct_columns(
    program: Program,
    dead_columns: Columns,
    context: Context,
    *,
    dead_rows: Columns | None = None,
    damp: float = 0.01,
) -> None:
    """Zero the dead input columns of weights and solve the remaining ones anew, in place.

    program: raised, dense, not yet cut. dead_columns: of weights that matmuls read, along the axis
    that they sum over. dead_rows: what else will be cut (a cut width: rows of producers, tables,
    norms); zero from the start, so that inputs are what the cut program will see. damp: of each
    input's own second moment, the least; more is taken where that does better on the half of the
    batches that was not solved for (`held_out_damp`). Weights that no single input is known of
    (tables, stacks of experts) are zeroed only, and declined in the journal. Raises
    CalibrationTooSmall, NonFiniteActivation, and WrongInput for a mask that does not fit.
    """
    masks = _checked(program, dead_columns)
    original = program.weights.copy()
    for name, places in _checked(program, dead_rows or {}).items():
        _zero(program, name, places)
    work = _Reconstruction(program, context, masks, damp)
    for name in masks:
        if name not in work.reached:
            _zero(program, name, masks[name])
            why = "no single input of its own is known, so its other columns stay as they are"
            context.journal.declined(_NAME, name, why)
    if work.sites:
        sweep(
            program,
            context.calibration,
            work.visit,
            sites=work.sites,
            progress=context.progress,
            paired=True,
            original=original,
        )


class _Reconstruction:
    """One sweep; weights met at several sites are solved at the first, on the original inputs."""

    def __init__(
        self,
        program: Program,
        context: Context,
        masks: Mapping[str, dict[int, Tensor]],
        damp: float,
    ) -> None:
        self.program, self.context, self.damp = program, context, damp
        places: dict[str, list[Site]] = {}
        axes: dict[str, set[int]] = {}
        for site in product_sites(program):
            for product in site.products:
                found = places.setdefault(product.weight, [])
                if site not in found:
                    found.append(site)
                axes.setdefault(product.weight, set()).add(product.axis % 2)
        self.masks = {
            name: next(iter(mask.values()))
            for name, mask in masks.items()
            if axes.get(name) == set(mask)
        }
        self.reached = frozenset(self.masks)
        self.sites = _sites(program, self.masks)
        self.several = {name: places[name] for name in self.masks if len(places[name]) > 1}
        self.done: set[str] = set()

    def visit(self, site: Site, activations: Activations) -> None:
        here = {p.weight: p for p in site.products if p.weight in self.masks}
        for name, product in here.items():
            if name in self.done:
                continue
            self.done.add(name)
            if not self.context.journal.offers():
                _zero(self.program, name, {product.axis % 2: self.masks[name]})
            elif name in self.several:
                self._replace(product, self._over_all(name), activations)
            else:
                self._replace(product, _moments(activations, product.node), activations)

    def _over_all(self, name: str) -> Halves:
        """Of a weight that several values meet, over all of them, as they were before any cut."""
        halves = PairedMoments(self.several[name][0].width), PairedMoments(0)
        sites = self.several[name]
        observe(self.program, self.context.calibration, sites, lambda node: _Rows(halves[0]))
        return halves

    def _replace(self, product: Product, halves: Halves, activations: Activations) -> None:
        weights, name = self.program.weights, product.weight
        old = weights[name]
        matrix = old.movedim(product.axis, -1).double()
        bias = (
            _own_bias(self.program, product.node, len(matrix)) if name not in self.several else ""
        )
        damp = held_out_damp(halves, matrix, self.masks[name], self.damp, centred=bool(bias))
        moments = halves[0].joined(halves[1]) if halves[1].tokens else halves[0]
        solved = moments.solved(matrix, self.masks[name], damp, centred=bool(bias))
        new = solved.weight.movedim(-1, product.axis).to(old.dtype).contiguous()
        weights[name] = new
        if bias:
            weights[bias] = (weights[bias].double() + solved.shift).to(weights.dtype(bias))
        note = _note(self.masks[name], moments)
        if name not in self.several:
            gone, left = _errors(matrix, self.masks[name], solved.weight, solved.shift, activations)
            note += f"; output error {gone:.1%} -> {left:.1%}"
        self.context.journal.changed_weight(_NAME, name, f"{note}; damping {solved.damp:.2g}")


class _Rows:
    """An observer that adds a value's rows to moments."""

    def __init__(self, moments: PairedMoments) -> None:
        self.moments = moments

    def __call__(self, value: Tensor) -> None:
        self.moments.add(value.reshape(-1, value.shape[-1]))


def _sites(program: Program, masks: Mapping[str, Tensor]) -> list[Site]:
    """Sites of weights that are cut, and the one after them: until there, all values are kept."""
    every = product_sites(program)
    places = [i for i, site in enumerate(every) if any(p.weight in masks for p in site.products)]
    if places and places[-1] + 1 < len(every):
        places.append(places[-1] + 1)
    return [every[place] for place in places]


def _moments(activations: Activations, product: Node) -> Halves:
    """Of the product's inputs, and of what the stream that it adds to has lost before; of every
    other batch, and of the others."""
    assert activations.reference is not None
    halves = PairedMoments(activations.site.width), PairedMoments(activations.site.width)
    stream = _joined_stream(product)
    now = then = None
    if stream is not None:
        now, then = activations.beside(stream), activations.reference.beside(stream)
    pairs = zip(activations, activations.reference, strict=True)
    for number, (rows, before) in enumerate(pairs):
        owed = None if now is None or then is None else next(then) - next(now)
        halves[number % 2].add(rows, before, owed)
    return halves


def _joined_stream(product: Node) -> Node | None:
    """The value that the product's output is added to, if nothing else reads that output."""
    node = product
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is _ATEN.add.Tensor and not user.kwargs:
            other = user.args[1] if user.args[0] is node else user.args[0]
            if isinstance(other, fx.Node) and other is not node and same_shape(other, node):
                return other
            return None
        if user.target not in _SAME or not same_size(shape(user)[-1], shape(product)[-1]):
            return None
        node = user
    return None


def _errors(
    old: Tensor, dead: Tensor, new: Tensor, shift: Tensor, activations: Activations
) -> tuple[float, float]:
    """What the cut alone changes of the outputs and what is left, of their root mean square."""
    assert activations.reference is not None
    whole, cut, answer = old.float(), old.float().masked_fill(dead, 0.0), new.float()
    size = gone = left = 0.0
    for now, before in zip(activations, activations.reference, strict=True):
        wanted = before.float() @ whole.t()
        size += float(wanted.double().square().sum())
        gone += float((now.float() @ cut.t() - wanted).double().square().sum())
        left += float((now.float() @ answer.t() + shift.float() - wanted).double().square().sum())
    size = size or 1.0
    return math.sqrt(gone / size), math.sqrt(left / size)


def _note(dead: Tensor, moments: PairedMoments) -> str:
    note = f"{int(dead.sum())} of {len(dead)} columns"
    if moments.tokens < int((~dead).sum()):
        note += f"; only {moments.tokens} calibration tokens"
    return note


def _own_bias(program: Program, node: Node, rows: int) -> str:
    """The name of a bias [out] that only this product reads, or ""."""
    arguments = bound_arguments(node)
    if node.target is _ATEN.addmm.default:
        if arguments["beta"] != 1 or arguments["alpha"] != 1:
            return ""
        bias = arguments["self"]
    else:
        bias = arguments.get("bias")
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or len(bias.users) != 1:
        return ""
    name = program.weights.canonical(str(bias.target))
    readers = [
        n for n in program.weight_nodes() if program.weights.canonical(str(n.target)) == name
    ]
    return name if len(readers) == 1 and tuple(program.weights.shape(name)) == (rows,) else ""


def _checked(program: Program, masks: Columns) -> dict[str, dict[int, Tensor]]:
    """The masks by the weights' canonical names and axes counted from the front."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, places in masks.items():
        shape = tuple(program.weights.shape(name))
        for axis, mask in places.items():
            fits = -len(shape) <= axis < len(shape) and tuple(mask.shape) == (shape[axis],)
            if not fits or mask.dtype != torch.bool:
                raise WrongInput(
                    f"what is to be cut of {name} does not fit it",
                    expected=f"a bool for each entry of one axis of {list(shape)}",
                    found=f"{mask.dtype} {list(mask.shape)} for axis {axis}",
                    fix="make the masks from the shapes of this program's weights",
                )
            kept = found.setdefault(program.weights.canonical(name), {})
            kept[axis % len(shape)] = mask
    return found


def _zero(program: Program, name: str, places: Mapping[int, Tensor]) -> None:
    weight = program.weights[name].clone()
    for axis, mask in places.items():
        weight.movedim(axis, 0)[mask] = 0
    program.weights[name] = weight


__all__ = ["Columns", "reconstruct_columns"]
