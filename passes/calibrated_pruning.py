"""The way of the pruning methods that look at a layer's inputs: Wanda, SparseGPT and OBC.

One sweep over the calibration batches; at each site the statistics of the values, the weights that
read them pruned, and what follows runs on the pruned weights. Weights that no site reaches (stacks
of experts) are pruned by magnitude before the sweep.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..ir.composite_format import back
from ..ir.errors import WrongOption
from ..ir.hessian import Hessian, damped
from ..ir.program import Program
from ..ir.sparsity_patterns import Sparsity
from ..ir.weight_roles import Role
from .calibrate import Activations, Site, observe, product_sites, sweep
from .contract import Context, contract
from .prune_plan import WeightPruner, note, rows_apart


class Statistics(Protocol):
    """What is summed over a site's values [tokens, in]."""

    tokens: int

    def add(self, rows: Tensor) -> None: ...
    def include(self, other: Statistics) -> None: ...
    def mean(self) -> Tensor: ...


class Squares:
    """The mean square of each input channel, [in]."""

    def __init__(self, width: int) -> None:
        self.sum, self.tokens = torch.zeros(width, dtype=torch.float64), 0

    def add(self, rows: Tensor) -> None:
        self.sum += rows.double().square().sum(0)
        self.tokens += len(rows)

    def include(self, other: Statistics) -> None:
        assert isinstance(other, Squares)
        self.sum += other.sum
        self.tokens += other.tokens

    def mean(self) -> Tensor:
        return self.sum / max(self.tokens, 1)


class Moments(Hessian):
    """The second moments, [in, in]."""

    def include(self, other: Statistics) -> None:
        assert isinstance(other, Hessian)
        self.sum += other.sum
        self.tokens += other.tokens


@dataclass(frozen=True)
class CalibratedPruner(WeightPruner):
    """Base of the methods that weigh a zero by the layer's inputs on calibration batches."""

    contract = contract(
        "lossy",
        requires=["functional", "dense_weights"],
        needs=["calibration"],
        min_sqnr=-20.0,
    )

    @abstractmethod
    def statistics(self, width: int) -> Statistics:
        """A new sum of what the method needs to know of the inputs."""

    @abstractmethod
    def prepared(self, found: Statistics) -> tuple[Tensor, str]:
        """What `prune` is given for weights that share an input, and what was unusual."""

    @abstractmethod
    def prune(self, rows: Tensor, inputs: Tensor, pattern: Sparsity) -> Tensor:
        """The pruned rows [rows, in]."""

    def run(self, program: Program, context: Context) -> None:
        _Run(self, program, context).run()


@dataclass(frozen=True)
class HessianPruner(CalibratedPruner):
    """Base of the methods that let other weights make up for what is set to zero.

    damp: added to the diagonal of each Hessian, as a part of its mean.
    """

    damp: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp <= 100:
            raise WrongOption(
                f"option {self.pass_name()}.damp is out of range",
                expected="0 to 100",
                found=f"{self.damp:g}",
                fix="leave it out for the default",
            )

    def statistics(self, width: int) -> Statistics:
        return Moments(width)

    def prepared(self, found: Statistics) -> tuple[Tensor, str]:
        matrix, said = damped(found.mean(), self.damp)
        if found.tokens < len(matrix):
            short = f"only {found.tokens} calibration tokens for {len(matrix)} inputs"
            said = f"{short}{'; ' if said else ''}{said}"
        return matrix, said


class _Run:
    """One run of a calibrated pruner."""

    def __init__(self, method: CalibratedPruner, program: Program, context: Context) -> None:
        self.method, self.program, self.context = method, program, context
        planned = method.planned(program, context.journal)
        self.planned = {role.name: (role, pattern) for role, pattern in planned}
        self.places: dict[str, list[Site]] = {}
        for site in product_sites(program):
            for product in site.products:
                self.places.setdefault(product.weight, []).append(site)
        self.left = [name for name in self.planned if name in self.places]
        self.shares: dict[str, tuple[Sparsity, int, int]] = {}
        self.shared: dict[str, Statistics] = {}

    def run(self) -> None:
        for name in self.planned:
            if name not in self.places and self.context.journal.offers():
                self._by_magnitude(name)
        wanted = set(self.left)
        sites = [s for s in product_sites(self.program) if wanted & {p.weight for p in s.products}]
        if sites:
            self._measure_shared()
            progress = self.context.progress
            sweep(
                self.program, self.context.calibration, self._visit, sites=sites, progress=progress
            )
        self.method.report(self.context.journal, self.shares)

    def _by_magnitude(self, name: str) -> None:
        role, pattern = self.planned[name]
        assert role.axis is not None
        rows = rows_apart(self.program.weights[name], role.axis, name)
        pruned = torch.where(pattern.mask(rows.abs(), self.method.scope), rows, 0)
        self._keep(role, pattern, pruned, "by magnitude: no single input is known")

    def _measure_shared(self) -> None:
        """The statistics of weights that several values meet, summed over all of them."""
        several = {name: self.places[name] for name in self.left if len(self.places[name]) > 1}
        nodes = {site.value: site.width for sites in several.values() for site in sites}
        if not nodes:
            return
        method, batches = self.method, self.context.calibration
        found = observe(
            self.program, batches, list(nodes), lambda n: _Observed(method.statistics(nodes[n]))
        )
        for name, sites in several.items():
            self.shared[name] = method.statistics(sites[0].width)
            for site in sites:
                self.shared[name].include(found[site.value].found)

    def _visit(self, site: Site, activations: Activations) -> None:
        here = dict.fromkeys(p.weight for p in site.products if p.weight in self.left)
        self.left = [name for name in self.left if name not in here]
        offered = [name for name in here if self.context.journal.offers()]
        own = [name for name in offered if name not in self.shared]
        if own:
            found = self.method.statistics(site.width)
            for rows in activations:
                found.add(rows)
            self._prune(own, found)
        for name in offered:
            if name in self.shared:
                self._prune([name], self.shared.pop(name))

    def _prune(self, names: Iterable[str], found: Statistics) -> None:
        inputs, said = self.method.prepared(found)
        for name in names:
            role, pattern = self.planned[name]
            assert role.axis is not None
            rows = rows_apart(self.program.weights[name], role.axis, name)
            self._keep(role, pattern, self.method.prune(rows, inputs, pattern), said)

    def _keep(self, role: Role, pattern: Sparsity, rows: Tensor, said: str) -> None:
        """Put pruned rows into the program, in the weight's own shape and dtype."""
        dtype, axis = self.program.weights.dtype(role.name), role.axis
        assert axis is not None
        rows = rows.to(dtype)
        shape = self.program.weights.shape(role.name)
        self.program.weights[role.name] = back(rows, shape, axis)
        zeros = int((rows == 0).sum())
        self.shares[role.name] = pattern, zeros, rows.numel()
        said = note(pattern, zeros, rows.numel(), said)
        self.context.journal.changed_weight(self.method.pass_name(), role.name, said)


class _Observed:
    """An observer that sums statistics."""

    def __init__(self, found: Statistics) -> None:
        self.found = found

    def __call__(self, value: Tensor) -> None:
        self.found.add(value.reshape(-1, value.shape[-1]))


__all__ = ["CalibratedPruner", "HessianPruner", "Moments", "Squares", "Statistics"]
