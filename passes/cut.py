"""Cut heads, FFN channels and residual width out of a program: it really becomes smaller.

Before: `%g = linear(%x, %G) : f32[.., 80]`. After: `%g = linear(%x, %G) : f32[.., 64]`, with the
rows of `%G` and the columns that read them gone, and every size that follows. What goes together is
found by axis flow: a gate's row with the up row and the down column; a key head with its value head
and all query heads that read it. The result equals, in float64, the program with those weights set
to 0, which is checked before anything is kept.
Structured pruning as in LLM-Pruner (Ma et al. 2023, sec. 3.1), with groups from the data flow;
reconstruction: see `reconstruct_columns`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ir.channel_map import ChannelMap, channel_map
from ..ir.compare import relative_deviation
from ..ir.cut_channels import CannotCut, cut_channels, masked
from ..ir.errors import WrongOption, WrongOrder
from ..ir.find_units import find_units
from ..ir.history import Measured
from ..ir.interpret import run
from ..ir.program import Program
from ..ir.prunable_units import Kind, Unit
from ..ir.yardstick import WIDE_LIMIT
from .contract import Context, Pass, contract
from .reconstruct_columns import reconstruct_columns
from .unit_importance import MEASURES, least, unit_importance

_KINDS: tuple[Kind, ...] = ("heads", "ffn", "width")


@dataclass(frozen=True)
class Cut(Pass):
    """Remove shares of units, the least important of each place.

    ffn, heads, width: what share of the FFN channels of each layer, of the head groups of each
    attention, of the channels of the residual stream goes; at least one stays. importance:
    magnitude, or wanda, which takes calibration batches. multiple: what the numbers of FFN and
    width channels that stay are multiples of (kernels like 8 to 64). reconstruct: solve what reads
    the cut channels anew by least squares on the calibration batches. norms: "kept" divides by the
    number of channels before the cut, which keeps the function; "own" by what is left. Raises
    WrongOption, WrongOrder, CannotCut.
    """

    ffn: float = 0.0
    heads: float = 0.0
    width: float = 0.0
    importance: str = "magnitude"
    multiple: int = 1
    reconstruct: bool = False
    norms: str = "kept"

    contract = contract("lossy", requires=["raised", "dense_weights"], min_sqnr=-200.0)

    def __post_init__(self) -> None:
        for option, fine, expected in (
            *((kind, 0 <= getattr(self, kind) < 1, "0 to less than 1") for kind in _KINDS),
            ("importance", self.importance in MEASURES, " or ".join(MEASURES)),
            ("multiple", self.multiple >= 1, "1 or more"),
            ("norms", self.norms in ("kept", "own"), "kept or own"),
        ):
            if not fine:
                raise WrongOption(
                    f"option cut.{option} cannot be {getattr(self, option)!r}",
                    expected=expected,
                    found=repr(getattr(self, option)),
                    fix="a share such as 0.25 is what goes; 1 would leave nothing",
                )

    def run(self, program: Program, context: Context) -> None:
        shares: dict[Kind, float] = {"heads": self.heads, "ffn": self.ffn, "width": self.width}
        wanted: list[Kind] = [kind for kind in _KINDS if shares[kind] > 0]
        if not wanted:
            raise WrongOption(
                "cut was not told what to cut",
                expected=f"a share of {', '.join(_KINDS)}, more than 0 and less than 1",
                found="0 for all of them",
                fix="for example --set cut.ffn=0.25",
            )
        if (self.reconstruct or self.importance == "wanda") and not context.calibration:
            raise WrongOrder(
                "cut needs calibration batches for importance=wanda and reconstruct=true",
                fix="pass calibration=[(ids,), ...] with a few representative inputs",
            )
        channels = channel_map(program)
        units = find_units(program, channels, wanted)
        self._decline_missing(program, units, wanted, context)
        scores = unit_importance(program, channels, units, self.importance, context)
        dead: set[int] = set()
        groups = _groups(units)
        for (kind, group), places in groups.items():
            count = self._count(kind, len(places), shares[kind])
            if count == 0:
                told = f"{shares[kind]:g} of {len(places)} {kind} of {group} is none that may go"
                context.journal.declined(self.pass_name(), program.results[0], told)
            elif context.journal.offers():
                chosen = least([scores[place] for place in places], count)
                dead |= {root for i in chosen for root in units[places[i]].roots}
                told = f"{count} of {len(places)} {kind} of {group}"
                context.journal.noted(self.pass_name(), program.results[0], told)
        if dead:
            self._apply(program, channels, dead, context)

    def _count(self, kind: Kind, size: int, share: float) -> int:
        """How many of a group go."""
        kept = max(size - int(size * share + 1e-9), 1)
        if kind != "heads" and self.multiple > 1:
            kept = min(size, math.ceil(kept / self.multiple) * self.multiple)
        return size - kept

    def _decline_missing(
        self, program: Program, units: Sequence[Unit], wanted: Sequence[Kind], context: Context
    ) -> None:
        for kind in wanted:
            if not any(unit.kind == kind for unit in units):
                context.journal.declined(
                    self.pass_name(), program.results[0], f"no {kind} were found that may be cut"
                )

    def _apply(
        self, program: Program, channels: ChannelMap, dead: set[int], context: Context
    ) -> None:
        before = program.parameter_count()
        if self.reconstruct:
            entries = channels.dead_entries(dead)
            columns: dict[str, dict[int, Tensor]] = {}
            rows: dict[str, dict[int, Tensor]] = {}
            for name, axes in entries.items():
                for axis, gone in axes.items():
                    into = columns if (name, axis) in channels.absorbs else rows
                    into.setdefault(name, {})[axis] = gone
            reconstruct_columns(program, columns, context, dead_rows=rows)
        twin = masked(program, channels, dead)
        norms: Literal["kept", "own"] = "own" if self.norms == "own" else "kept"
        cut_channels(program, dead, channels=channels, norms=norms)
        if self.norms == "kept":
            self._verify(program, twin, context)
        what = "parameters that stay, of those before"
        share = program.parameter_count() / before
        context.journal.measured.append(Measured(what, 1.0, share, 1.0))

    def _verify(self, program: Program, twin: Program, context: Context) -> None:
        """Raise CannotCut unless the program is what its masked twin is, on its examples."""
        if not program.examples:
            return
        flat = list(program.examples)
        with torch.no_grad():
            ours, theirs = run(program, flat, float64=True), run(twin, flat, float64=True)
            native = run(twin, flat) if self.width else theirs
        gap = _deviation(theirs, ours)
        # norms that lose channels get a factor, rounded to their dtype: as far as the twin's own
        # rounding may grow; all else computes the same function
        limit = max(WIDE_LIMIT, self.contract.growth * _deviation(theirs, native))
        if not gap <= limit:
            raise CannotCut(
                "the cut program differs from the one with these weights set to 0",
                expected=f"a relative difference of at most {limit:.2g} in float64",
                found=f"{gap:.2g}",
                fix="cut less, or other kinds of units, and report this model",
            )
        what = "difference from the program with weights set to 0"
        context.journal.measured.append(Measured(what, 0.0, gap, limit))


def _deviation(reference: Sequence[Any], values: Sequence[Any]) -> float:
    pairs = zip(reference, values, strict=True)
    return max((relative_deviation(a, b) for a, b in pairs), default=0.0)


def _groups(units: Sequence[Unit]) -> dict[tuple[Kind, str], list[int]]:
    found: dict[tuple[Kind, str], list[int]] = {}
    for place, unit in enumerate(units):
        found.setdefault((unit.kind, unit.group), []).append(place)
    return found
