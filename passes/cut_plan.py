"""The steps of one `cut`: layers, experts, then channels, each chosen and told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ir.channel_map import ChannelMap, channel_map
from ..ir.cut_channels import Norms
from ..ir.errors import WrongOption
from ..ir.find_units import find_units
from ..ir.history import Measured
from ..ir.program import Program
from ..ir.prunable_units import Kind, Unit
from .apply_cut import apply_cut
from .choose_units import Choice, Counts
from .contract import Context
from .cut_budget import counts_for_budget
from .cut_experts import count_experts, cut_experts
from .cut_layers import count_layers, cut_layers
from .cut_options import KINDS, LEARNED, SHARES
from .learned_gates import learn_scores
from .target_shape import Present, TargetShape, counts_for_shape, parse_target_shape
from .unit_importance import OF_LOSS, unit_importance
from .whole_cost import WholeCost
from .why_no_units import why_no_units

_NAME = "cut"


class CutPlan:
    """One run of the pass. options: those of `Cut`. growth: see `apply_cut`."""

    def __init__(
        self, options: Mapping[str, Any], program: Program, context: Context, growth: float
    ) -> None:
        self.options, self.program, self.context = options, program, context
        self.growth = growth
        text = options["shape"]
        self.shape: TargetShape | None = parse_target_shape(text) if text else None
        self.ratios: dict[Kind, float] = {k: options[k] for k in KINDS if options[k] > 0}
        if options["budget"] is not None and not self.ratios:
            self.ratios = {"heads": 1.0, "ffn": 1.0}

    def run(self) -> None:
        self._check_wanted()
        parameters = self.program.parameter_count()
        channels = channel_map(self.program)
        if self.shape is not None:
            self._counts_for_shape(channels)  # refused before anything goes
        whole = self._whole(channels)
        if self._cut_layers() | self._cut_experts():
            channels = channel_map(self.program)
        choice = self._choice(channels)
        counts = self._counts(channels, choice, whole)
        dead = self._chosen(channels, choice, counts)
        if dead:
            apply_cut(
                self.program,
                channels,
                dead,
                self.context,
                norms=self._norms(),
                growth=self.growth,
                reconstruct=self.options["reconstruct"],
            )
        self._measure(parameters, whole)

    def _check_wanted(self) -> None:
        wanted = self.options["shape"] or any(self.options[name] > 0 for name in SHARES)
        if not wanted and self.options["budget"] is None:
            raise WrongOption(
                "cut was not told what to cut",
                expected=f"a share of {', '.join(SHARES)}, a budget or a target shape",
                found="0 for all of them",
                fix="for example --set cut.ffn=0.25, or --target-shape layers=24,ffn=2048",
            )

    def _whole(self, channels: ChannelMap) -> WholeCost | None:
        if self.options["budget"] is None:
            return None
        measure = self.options["measure"]
        return WholeCost(measure, self.program, channels, self.context)

    # layers and experts

    def _cut_layers(self) -> bool:
        options, shape = self.options, self.shape
        if shape is not None:
            now = count_layers(self.program).layers if shape.layers is not None else 0
            numbers = [now - (shape.layers or 0), 0, 0]
        elif any(options[name] > 0 for name in ("layers", "attention_layers", "mlp_layers")):
            now = count_layers(self.program)
            shares = (
                ("layers", now.layers),
                ("attention_layers", now.attention),
                ("mlp_layers", now.mlp),
            )
            numbers = [int(count * options[name] + 1e-9) for name, count in shares]
            for (name, count), number in zip(shares, numbers, strict=True):
                if options[name] > 0 and number == 0:
                    self._declined(f"{options[name]:g} of {count} {name} is none that may go")
        else:
            return False
        if not any(numbers):
            return False
        layers, attention, mlp = numbers
        cut_layers(self.program, self.context, layers=layers, attention=attention, mlp=mlp)
        return True

    def _cut_experts(self) -> bool:
        share, shape = self.options["experts"], self.shape
        if share == 0 and (shape is None or shape.experts is None):
            return False
        now = count_experts(self.program)
        if shape is not None:
            counts = [count - (shape.experts or count) for count in now]
        else:
            counts = [int(count * share + 1e-9) for count in now]
        if not any(counts):
            if share > 0:
                found = f"{now} experts" if now else "experts, as no routed layer was found"
                self._declined(f"{share:g} of {found} is none that may go")
            return False
        cut_experts(self.program, self.context, counts)
        return True

    # channels

    def _units(self, channels: ChannelMap) -> list[Unit]:
        kinds = list(self.ratios) if self.shape is None else self.shape.kinds
        units = find_units(self.program, channels, kinds)
        if self.shape is not None and "heads" in kinds:
            units += find_units(self.program, channels, ["queries"])
        return units

    def _choice(self, channels: ChannelMap) -> Choice:
        """The units with their scores; learned ones are learned when the numbers are known."""
        units, measure = self._units(channels), self.options["importance"]
        scores = [0.0] * len(units)
        if measure != LEARNED:
            # a query head belongs to its group too, so the two are scored one after the other
            for queries in (False, True):
                places = [i for i, u in enumerate(units) if (u.kind == "queries") == queries]
                some = [units[i] for i in places]
                found = (
                    unit_importance(self.program, channels, some, measure, self.context)
                    if some
                    else []
                )
                for place, score in zip(places, found, strict=True):
                    scores[place] = score
        return Choice(
            units,
            scores,
            self.options["multiple"],
            self.options["scope"],
            normalized=measure not in OF_LOSS,
        )

    def _counts(self, channels: ChannelMap, choice: Choice, whole: WholeCost | None) -> Counts:
        if self.shape is not None:
            return self._counts_for_shape(channels)
        for kind in self.ratios:
            if not any(unit.kind == kind for unit in choice.units):
                self._declined(f"no {kind} may be cut: {why_no_units(channels, kind)}")
        found = {unit.kind for unit in choice.units}
        ratios: dict[Kind, float] = {k: share for k, share in self.ratios.items() if k in found}
        if whole is None or not ratios:
            return choice.counts(ratios)
        lost = whole.lost(self.program, channels, choice, self._norms())
        budget = self.options["budget"]
        return counts_for_budget(choice, ratios, budget, lost, steps=whole.steps)

    def _counts_for_shape(self, channels: ChannelMap) -> Counts:
        assert self.shape is not None
        sizes: Counts = {}
        for unit in self._units(channels):
            sizes[unit.kind, unit.group] = sizes.get((unit.kind, unit.group), 0) + 1
        present = Present(
            count_layers(self.program).layers if self.shape.layers is not None else 0,
            count_experts(self.program) if self.shape.experts is not None else (),
            {group: n for group, n in sizes.items() if group[0] != "queries"},
            {group: n for group, n in sizes.items() if group[0] == "queries"},
            channels,
            self.options["multiple"],
        )
        return counts_for_shape(self.shape, present)

    def _chosen(self, channels: ChannelMap, choice: Choice, counts: Counts) -> set[int]:
        """The channel classes that go, each place offered to the journal."""
        sizes = {group: len(places) for group, places in choice.groups.items()}
        if self.options["importance"] == LEARNED and any(counts.values()):
            keep = {group: size - counts.get(group, 0) for group, size in sizes.items()}
            scores = learn_scores(self.program, channels, choice.units, keep, self.context)
            choice = Choice(choice.units, scores, choice.multiple, choice.scope)
        taken: Counts = {}
        for (kind, group), size in sizes.items():
            count = counts.get((kind, group), 0)
            if count > 0 and self.context.journal.offers():
                taken[kind, group] = count
                told = f"{count} of {size} {kind} of {group}"
                self.context.journal.noted(_NAME, self.program.results[0], told)
            elif count == 0 and self.shape is None:
                asked = "the budget" if self.options["budget"] else f"{self.ratios[kind]:g}"
                self._declined(f"{asked} of {size} {kind} of {group} is none that may go")
        return choice.dead(taken)

    def _norms(self) -> Norms:
        chosen = self.options["norms"]
        if chosen == "auto":
            narrowed = self.shape is not None and self.shape.hidden is not None
            layer_norm = torch.ops.aten.layer_norm.default
            centred = any(node.target is layer_norm for node in self.program.graph.nodes)
            return "own" if narrowed and centred else "kept"
        return "own" if chosen == "own" else "kept"

    def _measure(self, parameters: int, whole: WholeCost | None) -> None:
        measured = self.context.journal.measured
        share = self.program.parameter_count() / parameters
        if whole is None or whole.measure != "parameters":
            measured.append(Measured("parameters that stay, of those before", 1.0, share, 1.0))
        if whole is not None:
            measured.append(whole.measured(self.program, self.options["budget"]))

    def _declined(self, why: str) -> None:
        self.context.journal.declined(_NAME, self.program.results[0], why)


__all__ = ["CutPlan"]
