"""The way of all methods that choose weights by what their inputs are: GPTQ and its relatives.

One sweep over the calibration batches; at each site the second moments of the values, the weights
that read them solved together, and what follows runs on the new weights. Weights that no site
reaches (tables, stacks of experts) are rounded to nearest before the sweep.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ir.encoded import Encoded, Format
from ..ir.errors import WrongOption
from ..ir.grid import Grid
from ..ir.hessian import Hessian, cross_moment, damped
from ..ir.program import Program
from ..ir.weight_roles import Role
from .calibrate import Activations, Site, observe, product_sites, sweep
from .calibration_checkpoint import Checkpoint, open_checkpoint
from .contract import Context, contract
from .weight_plan import WeightQuantizer

_PRUNED = 0.2
"""The share of zeros from which on a weight counts as pruned."""


@dataclass(frozen=True)
class Problem:
    """Weights that share their input and format, stacked by rows.

    weight: float32 [rows, in]; hessian: of the input, damped so that it is positive definite,
    float64 [in, in]; dtype: of the weights in the model; where: names them in errors. zeros: bool
    [rows, in], what is zero in the pruned ones of the weights; None if none of them is pruned.
    """

    weight: Tensor
    hessian: Tensor
    format: Format
    dtype: torch.dtype
    where: str
    zeros: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """Values [rows, in] that lie on a grid of the problem's format."""

    values: Tensor
    grid: Grid


@dataclass(frozen=True)
class CalibratedQuantizer(WeightQuantizer):
    """Base of the methods that weigh errors by the layer's inputs on calibration batches.

    damp: added to the diagonal of each Hessian, as a part of its mean. upstream: how much of the
    error of earlier layers a layer shall make up for, 0 to 1; takes a second forward pass. (On
    MiniLM, GPTQ to 3 bits in groups of 64, the outputs' relative error was 0.32 at 0, 0.29 at 0.5
    and 0.33 at 1.)
    checkpoint: a folder that keeps finished weights, so that an interrupted run goes on from there.
    """

    contract = contract(
        "lossy",
        requires=["functional"],
        ensures=["quantized"],
        breaks=["dense_weights"],
        needs=["calibration"],
    )
    damp: float = 0.01
    upstream: float = 0.0
    checkpoint: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value, highest in (("damp", self.damp, 100.0), ("upstream", self.upstream, 1)):
            if not 0 <= value <= highest:
                raise WrongOption(
                    f"option {self.pass_name()}.{option} is out of range",
                    expected=f"0 to {highest:g}",
                    found=f"{value:g}",
                    fix="leave it out for the default",
                )

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """Round one problem's weights."""

    def run(self, program: Program, context: Context) -> None:
        planned = self.planned(program, context.journal)
        _Run(self, program, context, planned).run()


class _Run:
    """One run of a calibrated quantizer."""

    def __init__(
        self,
        method: CalibratedQuantizer,
        program: Program,
        context: Context,
        planned: Sequence[tuple[Role, Format]],
    ) -> None:
        self.method, self.program, self.context = method, program, context
        self.planned = {role.name: (role, fmt) for role, fmt in planned}
        self.places: dict[str, list[Site]] = {}
        for site in product_sites(program):
            for product in site.products:
                self.places.setdefault(product.weight, []).append(site)
        self.apart = [
            name
            for name, (role, _) in self.planned.items()
            if name not in self.places or role.tables
        ]
        self.left = [name for name in self.planned if name not in self.apart]
        self.shared: dict[str, Hessian] = {}

    def run(self) -> None:
        self._round_apart()
        wanted = set(self.left)
        sites = [s for s in product_sites(self.program) if wanted & {p.weight for p in s.products}]
        if not sites:
            return
        batches = self.context.calibration
        options = replace(self.method, checkpoint="").spelling()
        checkpoint = open_checkpoint(self.method.checkpoint, self.program, batches, options)
        self._measure_shared()

        def visit(site: Site, activations: Activations) -> None:
            self._visit(site, activations, checkpoint)

        sweep(
            self.program,
            batches,
            visit,
            sites=sites,
            progress=self.context.progress,
            paired=self.method.upstream > 0,
        )

    def _round_apart(self) -> None:
        journal = self.context.journal
        for name in self.apart:
            role, fmt = self.planned[name]
            why = "a table" if role.tables else "no single input is known"
            if journal.offers():
                assert role.axis is not None
                entry = fmt.encode(self.program.weights[name], role.axis, where=name)
                self.program.weights[name] = entry
                note = f"{fmt.name}; rounded to nearest: {why}"
                journal.changed_weight(self.method.pass_name(), name, note)

    def _measure_shared(self) -> None:
        """The second moments of weights that several values meet, summed over all of them."""
        several = {name: self.places[name] for name in self.left if len(self.places[name]) > 1}
        nodes = {site.value: site.width for sites in several.values() for site in sites}
        if not nodes:
            return
        found = observe(
            self.program, self.context.calibration, list(nodes), lambda node: _Moments(nodes[node])
        )
        for name, sites in several.items():
            total = self.shared[name] = Hessian(sites[0].width)
            for site in sites:
                total.sum += found[site.value].hessian.sum
                total.tokens += found[site.value].hessian.tokens

    def _visit(self, site: Site, activations: Activations, checkpoint: Checkpoint) -> None:
        here = dict.fromkeys(p.weight for p in site.products if p.weight in self.left)
        offered = [name for name in here if self.context.journal.offers()]
        self.left = [name for name in self.left if name not in here]
        finished = checkpoint.read(" ".join(offered)) if offered else {}
        if offered and not finished:
            finished = self._solve_all(offered, activations)
            checkpoint.write(" ".join(offered), finished)
        for name, (entry, note) in finished.items():
            self.program.weights[name] = entry
            self.context.journal.changed_weight(self.method.pass_name(), name, note)

    def _solve_all(
        self, names: list[str], activations: Activations
    ) -> dict[str, tuple[Encoded, str]]:
        finished: dict[str, tuple[Encoded, str]] = {}
        own: tuple[Tensor, str] | None = None
        pull: Tensor | None = None
        for group in self._together(names):
            if group[0] in self.shared:
                hessian, said = self._damped(self.shared[group[0]])
            else:
                if own is None:
                    own = self._damped(_hessian(activations))
                    pull = self._pull(activations, own[0])
                hessian, said = own
            for name, entry in self._solve(group, hessian, pull).items():
                note = f"{entry.format.name}{'; ' if said else ''}{said}"
                finished[name] = entry, note
        return finished

    def _together(self, names: Iterable[str]) -> list[list[str]]:
        """Weights to be solved at once: of one format whose groups know nothing of each other."""
        groups: dict[object, list[str]] = {}
        for name in names:
            fmt = self.planned[name][1]
            alone = name in self.shared or not (fmt.rows_apart and fmt.groups_apart)
            key = name if alone else (fmt, self.program.weights.dtype(name))
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _damped(self, hessian: Hessian) -> tuple[Tensor, str]:
        matrix, said = damped(hessian.mean(), self.method.damp)
        width = len(matrix)
        if hessian.tokens < width:
            short = f"only {hessian.tokens} calibration tokens for {width} inputs"
            said = f"{short}; {said}" if said else short
        return matrix, said

    def _pull(self, activations: Activations, hessian: Tensor) -> Tensor | None:
        """P [in, in] so that W + W P brings this layer's outputs back to the original model's.

        |(W + D) x - W y|^2 is least at D = W E[(y - x) x^T] H^-1, for the original input y, and
        grows around it with H: the target of GPTAQ (Li et al. 2025, eq. 4), without a grid.
        """
        if activations.reference is None:
            return None
        cross = cross_moment(activations.reference, activations, len(hessian))
        factor = torch.linalg.cholesky(hessian)
        return torch.cholesky_solve(cross.t().double(), factor).t() * self.method.upstream

    def _solve(self, names: list[str], hessian: Tensor, pull: Tensor | None) -> dict[str, Encoded]:
        weights = [self.program.weights[name] for name in names]
        axes = [self.planned[name][0].axis or -1 for name in names]
        rows = [w.movedim(axis, -1).float() for w, axis in zip(weights, axes, strict=True)]
        stacked = torch.cat(rows)
        if pull is not None:
            stacked = stacked + (stacked.double() @ pull).float()
        fmt, where = self.planned[names[0]][1], names[0]
        problem = Problem(stacked, hessian, fmt, weights[0].dtype, where, _zeros(rows))
        solution = self.method.solve(problem)
        encoded: dict[str, Encoded] = {}
        start = 0
        for name, axis, matrix in zip(names, axes, rows, strict=True):
            at = slice(start, start := start + len(matrix))
            values = solution.values[at].movedim(-1, axis)
            grid = solution.grid if len(names) == 1 else _rows(solution.grid, at)
            encoded[name] = fmt.encode_on(values, grid, axis, dtype=weights[0].dtype)
        return encoded


class _Moments:
    """An observer that sums second moments."""

    def __init__(self, width: int) -> None:
        self.hessian = Hessian(width)

    def __call__(self, value: Tensor) -> None:
        self.hessian.add(value.reshape(-1, value.shape[-1]))


def _hessian(activations: Activations) -> Hessian:
    found = Hessian(activations.site.width)
    for rows in activations:
        found.add(rows)
    return found


def _zeros(rows: Sequence[Tensor]) -> Tensor | None:
    """Where the matrices that are pruned hold zeros, stacked by rows; None if none is pruned."""
    zeros = [matrix == 0 for matrix in rows]
    pruned = [float(mask.float().mean()) >= _PRUNED for mask in zeros]
    if not any(pruned):
        return None
    return torch.cat([mask & is_pruned for mask, is_pruned in zip(zeros, pruned, strict=True)])


def _rows(grid: Grid, at: slice) -> Grid:
    """The grids of some rows."""
    return Grid(grid.format, {n: part[at] for n, part in grid.parameters.items()}, grid.dtype)


__all__ = ["CalibratedQuantizer", "Problem", "Solution"]
