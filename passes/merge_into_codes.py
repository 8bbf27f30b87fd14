"""Merge PEFT adapter folders into weights that are kept in a number format.

Before: `%w` is stored in codes. After: the same format, codes of the decoded weight plus the
adapter's change. It is merged in float32 and rounded again so that the error of the outputs is
least: by GPTQ's second moments where calibration batches are given, else by the weights alone.
Rounding may lose more than an adapter adds. How much of each change survives is measured (its power
against that of the rounding, in dB), and a merge that loses too much is refused: kept apart, as
`serve_adapters` does, an adapter loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ir.adapter_step import Step
from ..ir.encoded import Encoded
from ..ir.errors import PlanishError, UnsupportedFormat
from ..ir.hessian import Hessian, damped
from ..ir.history import Measured
from ..ir.program import Program
from .calibrate import Activations, Site, product_sites, sweep
from .calibrated_weights import Problem
from .contract import Context, contract
from .merge_adapters import MergeAdapters, merged
from .quantize_gptq import QuantizeGptq

_MOST_TOLD = 10


class AdapterLost(PlanishError):
    """Rounding would lose more of an adapter than was allowed."""


@dataclass
class _Merge:
    """A weight's change: what is to be encoded, float32, and what it was before."""

    before: Tensor
    after: Tensor
    hessian: Hessian | None = field(default=None)


@dataclass(frozen=True)
class MergeIntoCodes(MergeAdapters):
    """Merge the folders of `adapters` into a base that may be quantized; see `merge_adapters`.

    min_survival: the least power of all changes against that of what rounding adds to them, in dB;
    codes that did not change at all would have 0, and at 3 half the power is lost. force: merge
    whatever is lost. damp: as for `quantize_gptq`.
    """

    min_survival: float = 3.0
    force: bool = False
    damp: float = 0.01

    contract = contract("lossy", requires=["functional"], min_sqnr=-200.0)

    def put(self, program: Program, steps: Mapping[str, list[Step]], context: Context) -> None:
        """Dense weights as `merge_adapters` does; the others through their formats."""
        coded = {n: s for n, s in steps.items() if isinstance(program.weights.entry(n), Encoded)}
        super().put(program, {n: s for n, s in steps.items() if n not in coded}, context)
        merges = {
            name: _Merge(program.weights[name].float(), merged(program, name, found).float())
            for name, found in coded.items()
        }
        self._measure(program, merges, context)
        lost: list[tuple[float, str]] = []
        signal = noise = 0.0
        entries: dict[str, Encoded] = {}
        for done, (name, merge) in enumerate(merges.items()):
            context.progress(done, len(merges), name)
            entries[name] = self._encoded(program, name, merge)
            power = float((merge.after - merge.before).double().square().sum())
            error = float((entries[name].decode().double() - merge.after).square().sum())
            lost.append((_decibels(power, error), name))
            signal, noise = signal + power, noise + error
        whole = _decibels(signal, noise)
        if merges and whole < self.min_survival and not self.force:
            raise self._lost(whole, sorted(lost))
        survival = {name: value for value, name in lost}
        for name, entry in entries.items():
            if context.journal.offers():
                program.weights[name] = entry
                note = f"{entry.format.name}; {survival[name]:.1f} dB of the change survive"
                context.journal.changed_weight(self.pass_name(), name, note)
        if merges:
            what = "survival of the adapters' changes (dB); kept apart they would be exact"
            context.journal.measured.append(Measured(what, math.inf, whole, self.min_survival))

    def _measure(self, program: Program, merges: Mapping[str, _Merge], context: Context) -> None:
        """Second moments of what reads each weight, where batches are given."""
        if not context.calibration or not merges:
            return
        sites = [
            site
            for site in product_sites(program)
            if any(product.weight in merges for product in site.products)
        ]

        def visit(site: Site, activations: Activations) -> None:
            for name in {product.weight for product in site.products} & merges.keys():
                moments = merges[name].hessian or Hessian(site.width)
                for rows in activations:
                    moments.add(rows)
                merges[name].hessian = moments

        sweep(program, context.calibration, visit, sites=sites, progress=context.progress)

    def _encoded(self, program: Program, name: str, merge: _Merge) -> Encoded:
        """In the format it had, by GPTQ with the moments or (without) with none preferred."""
        old = program.weights.entry(name)
        assert isinstance(old, Encoded)
        axis = old.axis
        rows = merge.after.movedim(axis, -1)
        if rows.dim() != 2:
            return old.format.encode(merge.after.to(old.dtype), axis, where=name)
        width = rows.shape[1]
        hessian = torch.eye(width, dtype=torch.float64)
        if merge.hessian is not None:
            hessian, _ = damped(merge.hessian.mean(), self.damp)
        try:
            problem = Problem(rows.contiguous(), hessian, old.format, old.dtype, name)
            solution = QuantizeGptq().solve(problem)
            values = solution.values.movedim(-1, axis)
            solved = old.format.encode_on(values, solution.grid, axis, dtype=old.dtype)
        except UnsupportedFormat:  # a format without a grid that is fixed beforehand
            return old.format.encode(merge.after.to(old.dtype), axis, where=name)
        plain = old.format.encode(merge.after.to(old.dtype), axis, where=name)
        return min((solved, plain), key=lambda one: _error(one, rows, hessian))

    def _lost(self, whole: float, lost: list[tuple[float, str]]) -> AdapterLost:
        told = "; ".join(f"{name} {value:.1f} dB" for value, name in lost[:_MOST_TOLD])
        more = f"; and {len(lost) - _MOST_TOLD} more" if len(lost) > _MOST_TOLD else ""
        return AdapterLost(
            f"rounding would lose the adapter: its changes survive with {whole:.1f} dB",
            expected=f"at least {self.min_survival:g} dB",
            found=told + more,
            fix="merge before quantizing, keep the adapter apart (serve_adapters), give "
            "calibration batches, or pass force=true",
        )


def _error(entry: Encoded, rows: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) of the rounding E."""
    gap = entry.decode(torch.float32).movedim(entry.axis, -1).double() - rows.double()
    return float(((gap @ hessian) * gap).sum())


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
