"""How much a unit matters: by its weights, by what reads do with its values, or by the loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ir.channel_map import ChannelMap
from ..ir.program import Node, Program
from ..ir.prunable_units import Unit
from .calibrate import observe, product_sites
from .choose_units import least
from .contract import Context
from .unit_gradients import unit_gradients

MEASURES = ("magnitude", "wanda", "taylor", "fisher")
CALIBRATED = ("wanda", "taylor", "fisher")
"""Those that take calibration batches."""
OF_LOSS = ("taylor", "fisher")
"""Those in units of the loss, comparable over all places as they are."""


def unit_importance(
    program: Program, channels: ChannelMap, units: Sequence[Unit], measure: str, context: Context
) -> list[float]:
    """One number for each unit, comparable within its group; the least go first.

    magnitude: the sum of squares of its weight entries (Li et al. 2017, sec. 3.1, squared).
    wanda: over the columns that read it, |column|^2 times the mean square of the value on the
    calibration batches (as Sun et al. 2023, eq. 1, for a whole column).
    taylor, fisher: from gradients of the next-token loss, see `unit_gradients`.
    """
    if measure in OF_LOSS:
        seen = unit_gradients(program, channels, units, context)
        return (seen.mean.abs() if measure == "taylor" else seen.square).tolist()
    scores: dict[int, float] = {}
    moments = _moments(program, context) if measure == "wanda" else {}
    for (name, axis), roots in channels.axes.items():
        if measure == "wanda" and (name, axis) not in channels.absorbs:
            continue
        weight = program.weights[name].double() + channels.offsets.get(name, 0.0)
        others = [a for a in range(weight.dim()) if a != axis]
        power = weight.square().sum(others) if others else weight.square()
        if measure == "wanda":
            if name not in moments or moments[name].shape != power.shape:
                continue
            power = power * moments[name]
        for root, value in zip(roots.tolist(), power.tolist(), strict=True):
            scores[root] = scores.get(root, 0.0) + value
    return [sum(scores.get(root, 0.0) for root in unit.roots) for unit in units]


class _MeanSquare:
    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def __call__(self, value: Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1]).double()
        power = rows.square().sum(0)
        self.total = power if self.total is None else self.total + power
        self.rows += len(rows)


def _moments(program: Program, context: Context) -> dict[str, Tensor]:
    """For each weight that a product reads the mean square of each of its inputs."""
    sites = product_sites(program)
    seen = observe(program, context.calibration, sites, _new)
    found: dict[str, Tensor] = {}
    for site in sites:
        kept = seen[site.value]
        assert isinstance(kept, _MeanSquare) and kept.total is not None
        for product in site.products:
            mean = kept.total / max(kept.rows, 1)
            before = found.get(product.weight)
            same = before is not None and before.shape == mean.shape
            found[product.weight] = before + mean if same and before is not None else mean
    return found


def _new(node: Node) -> _MeanSquare:
    return _MeanSquare()


__all__ = ["CALIBRATED", "MEASURES", "OF_LOSS", "least", "unit_importance"]
