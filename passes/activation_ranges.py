"""Static activation scales: what calibration says of the values that are to be rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..ir.activation_grid import ActivationGrid
from ..ir.observer_names import make_observer
from ..ir.observers import Observer
from ..ir.program import Node, Program
from .activation_sites import RoundedSite
from .calibrate import observe
from .nonfinite_activation import nonfinite_activation


@dataclass(frozen=True)
class RangeOptions:
    """observer: its name; share: of the values within a percentile's range; leave_out: positions
    at the start of a text that do not count."""

    observer: str
    symmetric: bool
    share: float
    leave_out: int


class _Watch:
    """Shows an observer one site's value of each batch in turn; raises what `refuse` makes."""

    def __init__(
        self, observer: Observer, leave_out: int, refuse: Callable[[int], Exception]
    ) -> None:
        self.observer, self.leave_out, self.refuse = observer, leave_out, refuse
        self.batches = 0

    def __call__(self, value: Tensor) -> None:
        # The sum of finite numbers may overflow, so a suspicion is looked into.
        if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
            raise self.refuse(self.batches)
        self.batches += 1
        if self.leave_out and value.dim() > 2:
            value = value[..., self.leave_out :, :]
        self.observer.see(value.reshape(-1, value.shape[-1]))


def observed_grids(
    program: Program,
    sites: Sequence[RoundedSite],
    batches: Sequence[Sequence[Any]],
    options: RangeOptions,
) -> dict[RoundedSite, ActivationGrid]:
    """A grid for every site, from one forward pass over all batches.

    Raises CalibrationTooSmall, NonFiniteActivation.
    """
    if not sites:
        return {}
    by_value = {site.value: site for site in sites}

    def watch(node: Node) -> _Watch:
        site = by_value[node]
        weigh = partial(_gram, program, site)
        observer = make_observer(options.observer, options.symmetric, weigh, options.share)

        def refuse(number: int) -> Exception:
            return nonfinite_activation(program, batches[number], number, node)

        return _Watch(observer, options.leave_out, refuse)

    watches = observe(program, batches, list(by_value), watch)
    grids: dict[RoundedSite, ActivationGrid] = {}
    for site in sites:
        low, high = watches[site.value].observer.range()
        grids[site] = ActivationGrid.of(low, high, options.symmetric)
    return grids


def _gram(program: Program, site: RoundedSite) -> Tensor:
    """W^T W [in, in] summed over the site's weights, each [out, in]: errors times it are squared
    errors of the products."""
    total: Tensor | None = None
    for product in site.products:
        weight = program.weights[product.weight].float()
        rows = weight if product.axis == -1 else weight.t()
        gram = rows.t() @ rows
        total = gram if total is None else total + gram
    assert total is not None, "a site has products"
    return total


__all__ = ["RangeOptions", "observed_grids"]
