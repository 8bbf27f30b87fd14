"""Quantize activations: what a product on an integer weight reads becomes int8 codes and back.

Before: `%q = linear(%x, %wq); %k = linear(%x, %wk)` with int8 weights and a float `%x`.
After: `%codes = quantize(%x, scale); %d = dequantize(%codes, scale); %q = linear(%d, %wq); ...`.
One pair stands for a value, whoever reads it; targets multiply the codes and scale the sums.
Lossy within half a step of each value, and by what a static range cuts off.
Sources: Jacob et al. 2018, sec. 2.1; per token: Yao et al. 2022 (ZeroQuant), sec. 4.1, with weights
by group; the settings O1, O2 and O3 of Xiao et al. 2023 (SmoothQuant), table 2, are
dynamic_token, dynamic_tensor and static_tensor; llm_int8: Dettmers et al. 2022, sec. 3.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.activation_grid import ActivationGrid
from ..ir.edit import Editor, value_of
from ..ir.errors import UnknownOption, WrongOption
from ..ir.observer_names import OBSERVERS
from ..ir.program import Node, Program
from .activation_ranges import RangeOptions, observed_grids
from .activation_sites import NONE, RoundedSite, read_instead, rounded_sites
from .contract import Context, Pass, contract
from .layer_patterns import LayerPatterns

_OPS = torch.ops.planish
SCHEMES = ("dynamic_token", "dynamic_tensor", "static_tensor", "llm_int8")


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Round what products read to int8, once for each value.

    scheme: "dynamic_token": a scale for each row, found when it runs; "dynamic_tensor": one for
    all rows; "static_tensor": one that calibration decides; "llm_int8": by row, but columns in
    which a value reaches `threshold` stay as they are. symmetric: no zero point (llm_int8 has
    none). only: products with "quantized" weights, or "all" with a weight. observer: of static
    scales: minmax, percentile (of `percentile` %), mse, histogram, token_wise. leave_out: how many
    positions at the start of a text calibration does not count. skip: patterns of module or
    weight names, comma-separated, whose products go on reading floats. overrides:
    "pattern=scheme; ...", `none` leaves out; of several that fit the last counts.
    """

    contract = contract("lossy", requires=["functional"], ensures=["quantized_activations"])
    scheme: str = "dynamic_token"
    symmetric: bool = True
    only: str = "quantized"
    observer: str = "minmax"
    percentile: float = 99.99
    leave_out: int = 0
    threshold: float = 6.0
    skip: str = ""
    overrides: str = ""

    def __post_init__(self) -> None:
        known = (*SCHEMES, NONE)
        for option, value, names in (
            ("scheme", self.scheme, SCHEMES),
            ("only", self.only, ("quantized", "all")),
            ("observer", self.observer, OBSERVERS),
            *(("overrides", scheme, known) for _, scheme in self._layers.choices),
        ):
            if value not in names:
                raise UnknownOption.named(value, names, where=f"quantize_activations.{option}")
        for option, fits, expected in (
            ("percentile", 50 < self.percentile <= 100, "more than 50, at most 100"),
            ("leave_out", self.leave_out >= 0, "0 or more positions"),
            ("threshold", self.threshold > 0, "a positive number"),
        ):
            if not fits:
                raise WrongOption(
                    f"option quantize_activations.{option} cannot be {getattr(self, option)}",
                    expected=expected,
                    found=str(getattr(self, option)),
                    fix="see planish passes",
                )
        if "static_tensor" in (self.scheme, *(scheme for _, scheme in self._layers.choices)):
            needing = dataclasses.replace(type(self).contract, needs=frozenset({"calibration"}))
            object.__setattr__(self, "contract", needing)

    @property
    def _layers(self) -> LayerPatterns:
        """Schemes of single layers, those that are skipped last."""
        skipped = [(p.strip(), NONE) for p in self.skip.split(",") if p.strip()]
        named = LayerPatterns.parse(self.overrides, "quantize_activations.overrides")
        return LayerPatterns((*named.choices, *skipped))

    def run(self, program: Program, context: Context) -> None:
        named = LayerPatterns.parse(self.overrides, "quantize_activations.overrides")
        named.check(program.weights, "quantize_activations.overrides")
        rule = self.pass_name()
        sites = rounded_sites(program, self._layers, self.scheme, self.only, context.journal, rule)
        grids = observed_grids(
            program,
            [site for site in sites if site.scheme == "static_tensor"],
            context.calibration,
            RangeOptions(self.observer, self.symmetric, self.percentile / 100, self.leave_out),
        )
        editor = Editor(program)
        for number, site in enumerate(sites):
            context.progress(number, len(sites), site.layer)
            if context.journal.offers():
                made, note = self._rounded(editor, site, grids.get(site))
                read_instead(editor, site, made)
                context.journal.replaced(rule, site.value, made, f"{note}, read by {site.readers}")
        editor.sweep()

    def _rounded(
        self, editor: Editor, site: RoundedSite, grid: ActivationGrid | None
    ) -> tuple[Node, str]:
        """The value that stands for the site's, and how it was rounded."""
        value = site.value
        with editor.at(_after(value), value.meta.get("module", "")):
            if site.scheme == "llm_int8":
                made = editor.emit(_OPS.round_regular.default, value, self.threshold)
                return made, f"int8 by token but for outliers from {self.threshold:g}"
            if grid is not None:
                scale, zero = _stored(editor, site.layer, grid)
                note = f"int8 with the scale {grid.scale:.4g} ({self.observer})"
            else:
                per = site.scheme.removeprefix("dynamic_")
                scale, zero = self._found(editor, value, per)
                note = f"int8 by {per}"
            codes = editor.emit(_OPS.quantize.default, value, scale, zero)
            dtype = value_of(value).dtype
            made = editor.emit(_OPS.dequantize.default, codes, scale, zero, dtype=dtype)
        return made, note

    def _found(self, editor: Editor, value: Node, per: str) -> tuple[Node, Node | None]:
        """Scale and zero point computed from the value when it runs."""
        scale = editor.emit(_OPS.activation_scale.default, value, per, self.symmetric)
        if self.symmetric:
            return scale, None
        return scale, editor.emit(_OPS.activation_zero.default, value, scale, per)


def _stored(editor: Editor, layer: str, grid: ActivationGrid) -> tuple[Node, Node | None]:
    """A static scale float32 [1], and a zero point int32 [1], as weights of the first reader."""
    scale = editor.weight(f"{layer}.input_scale", torch.tensor([grid.scale]))
    if grid.zero is None:
        return scale, None
    zero = torch.tensor([grid.zero], dtype=torch.int32)
    return scale, editor.weight(f"{layer}.input_zero_point", zero)


def _after(value: Node) -> Node:
    """The node before which to emit what reads `value`: past all inputs and weights."""
    following: Any = value.next
    while following.op in ("placeholder", "get_attr"):
        following = following.next
    return following
