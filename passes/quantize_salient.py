"""Quantize weights but keep the few that matter most in 16 bits.

Before: `%w` is f32[out, in]. After: `%w` is stored as codes, and beside them in float16 the 1% of
input columns that meet the largest activations (or single values of the largest effect, by rows);
the graph does not change. Lossy within half a step of each weight that is not kept.
Source: AWQ, Lin et al. 2023, sec. 3.1 and table 1 (columns by mean magnitude of the activations);
single values: SqueezeLLM, Kim et al. 2023, sec. 4.2, and SpQR, Dettmers et al. 2023, sec. 3.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.encoded import Encoded, Format
from ..ir.errors import WrongOption
from ..ir.format_columns import WithColumns
from ..ir.format_sparse import WithOutliers
from ..ir.program import Program
from ..ir.weight_roles import Role
from .calibrate import observe, product_sites
from .contract import Context
from .weight_plan import WeightQuantizer


class _Sizes:
    """The sums over all tokens of the magnitudes and squares of a value's channels."""

    def __init__(self) -> None:
        self.magnitude: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def __call__(self, value: Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1]).float()
        self.magnitude = self.magnitude + rows.abs().sum(0, dtype=torch.float64)
        self.square = self.square + rows.square().sum(0, dtype=torch.float64)


@dataclass(frozen=True)
class QuantizeSalient(WeightQuantizer):
    """Quantize weights, a share of them kept in 16 bits.

    For the shared options see `WeightQuantizer`. keep: "columns" of the input, or single "values",
    which cost twice as much each. fraction: the share that is kept. by: "activations" on
    calibration batches, or "weights", their own magnitudes.
    """

    bits: int = 3
    group_size: int | None = 64
    keep: str = "columns"
    fraction: float = 0.01
    by: str = "activations"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value, known in (
            ("keep", self.keep, ("columns", "values")),
            ("by", self.by, ("activations", "weights")),
        ):
            if value not in known:
                raise WrongOption(
                    f"option quantize_salient.{option} cannot be {value!r}",
                    expected=" or ".join(known),
                    found=repr(value),
                    fix=f"choose one of {', '.join(known)}",
                )
        _ = self._kept(self.linear_format)
        if self.by == "activations":
            needing = dataclasses.replace(type(self).contract, needs=frozenset({"calibration"}))
            object.__setattr__(self, "contract", needing)

    def run(self, program: Program, context: Context) -> None:
        chosen = self.planned(program, context.journal)
        sizes = self._sizes(program, context) if self.by == "activations" else {}
        for done, (role, fmt) in enumerate(chosen):
            context.progress(done, len(chosen), role.name)
            if not context.journal.offers():
                continue
            if role.tables or (self.by == "activations" and role.name not in sizes):
                reason = "looked up" if role.tables else "read by no product that calibration sees"
                context.journal.declined(self.pass_name(), role.name, f"{reason}: nothing is kept")
                encoded = self._plain(program, role, fmt)
            else:
                assert role.axis is not None
                kept = self._kept(fmt)
                weight = program.weights[role.name]
                importance = sizes.get(role.name)
                encoded = kept.encode_by(weight, importance, role.axis, where=role.name)
            program.weights[role.name] = encoded
            context.journal.changed_weight(self.pass_name(), role.name, encoded.format.name)

    def _kept(self, fmt: Format) -> WithColumns | WithOutliers:
        kind = WithColumns if self.keep == "columns" else WithOutliers
        return kind(fmt, self.fraction)

    def _plain(self, program: Program, role: Role, fmt: Format) -> Encoded:
        assert role.axis is not None
        return fmt.encode(program.weights[role.name], role.axis, where=role.name)

    def _sizes(self, program: Program, context: Context) -> dict[str, Tensor]:
        """For each weight what its input channels hold: mean magnitude, or mean square for values.

        A weight of several readers takes their sum.
        """
        sites = product_sites(program)
        observed = observe(program, context.calibration, sites, lambda _: _Sizes())
        found: dict[str, Tensor] = {}
        for site in sites:
            seen = observed[site.value]
            mine = seen.magnitude if self.keep == "columns" else seen.square
            assert isinstance(mine, Tensor)
            for product in site.products:
                before = found.get(product.weight)
                found[product.weight] = mine if before is None else before + mine
        return {name: size.float() for name, size in found.items()}
