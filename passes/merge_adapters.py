"""Merge PEFT adapter folders into the weights of their base: W + s B A, once, and its relatives.

Before: `%q = linear(%x, %W)`. After: the same graph, with the adapter's change in `%W`. The order
of operations is PEFT's own, so the weights are those of its `merge_and_unload`. Several folders are
merged one after the other, so that their weighted deltas add up (PEFT's `cat`), or combined first.
Hu et al. 2022 (LoRA, sec. 4.1); the other kinds: `ir/adapter_lora.py`, `ir/adapter_products.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..ir.adapter_change import wide_dtype
from ..ir.adapter_combine import FACTORS, PRODUCTS, Combination, Combined
from ..ir.adapter_lora import LowRank
from ..ir.adapter_plan import plan_adapter
from ..ir.adapter_step import Step, weighted
from ..ir.adapter_ties import spread
from ..ir.errors import NonFiniteWeight, WrongOption
from ..ir.program import Program
from ..ir.read_adapter import read_adapter
from ..ir.untie import untie
from .contract import Context, Pass, contract


@dataclass(frozen=True)
class MergeAdapters(Pass):
    """Merge the folders of `adapters`: "PATH; PATH=WEIGHT", into dense weights.

    combine: how several LoRA adapters of a weight become one: "add" their deltas, or a method of
    `ir/adapter_combine.py`: linear, ties, dare_linear, dare_ties, magnitude_prune (on the factors),
    svd, ties_svd, ... (on the deltas). density: what trimming and dropping keep. sign: elected by
    "total" or "frequency". rank: of the methods on deltas, 0 for any.
    untie: an adapter of a tied weight changes what its own name reads, and the tie ends there;
    without it only adapters that keep the tie are merged.
    A quantized base is refused by the facts: merge first, then quantize.
    """

    adapters: str = ""
    combine: str = "add"
    density: float = 0.5
    sign: str = "total"
    rank: int = 0
    seed: int = 0
    untie: bool = False

    contract = contract("lossy", requires=["functional", "dense_weights"], min_sqnr=-200.0)

    def __post_init__(self) -> None:
        known = ("add", *FACTORS, *PRODUCTS)
        for option, value, fine, expected in (
            ("combine", self.combine, self.combine in known, " or ".join(known)),
            ("density", self.density, 0 < self.density < 1, "more than 0 and less than 1"),
            ("sign", self.sign, self.sign in ("total", "frequency"), "total or frequency"),
            ("rank", self.rank, self.rank >= 0, "0 for any rank, or a rank"),
        ):
            if not fine:
                raise WrongOption(
                    f"option merge_adapters.{option} cannot be {value!r}",
                    expected=expected,
                    found=repr(value),
                    fix="leave it out for the default",
                )

    def run(self, program: Program, context: Context) -> None:
        wanted = self.folders()
        if not wanted:
            raise WrongOption(
                "merge_adapters was given no adapters",
                expected="adapters=FOLDER; FOLDER=WEIGHT",
                fix="name one or more folders that PEFT's save_pretrained wrote",
            )
        every: list[tuple[Step, float]] = []
        for folder, factor in wanted:
            adapter = read_adapter(folder)
            planned = plan_adapter(adapter, program, untie=self.untie)
            if self.combine == "add":
                planned = weighted(planned, factor, adapter.name)
            every += [(step, factor) for step in planned]
        steps: dict[str, list[Step]] = {}
        factors: dict[str, list[float]] = {}
        for step, factor in spread(program, every):
            steps.setdefault(step.spot.name, []).append(step)
            factors.setdefault(step.spot.name, []).append(factor)
        if self.combine != "add":
            steps = {name: [self._one(found, factors[name])] for name, found in steps.items()}
        self.put(program, self._untied(program, steps, context), context)

    def _untied(
        self, program: Program, steps: Mapping[str, list[Step]], context: Context
    ) -> dict[str, list[Step]]:
        """End the ties of weights that change under one of their names."""
        found: dict[str, list[Step]] = {}
        for name, changes in steps.items():
            kept = program.weights.names_of(name)
            if len(kept) > 1 and not changes[0].tied:
                if not context.journal.offers():
                    continue
                untie(program, name)
                note = f"no longer tied to {next(n for n in kept if n != name)}"
                context.journal.changed_weight(self.pass_name(), name, note)
            found[name] = changes
        return found

    def put(self, program: Program, steps: Mapping[str, list[Step]], context: Context) -> None:
        """Change the weights; a subclass may keep some of them in other ways."""
        for done, (name, changes) in enumerate(steps.items()):
            context.progress(done, len(steps), self.pass_name())
            if context.journal.offers():
                program.weights[name] = merged(program, name, changes)
                kinds = ", ".join(dict.fromkeys(type(s.change).__name__ for s in changes))
                context.journal.changed_weight(self.pass_name(), name, kinds)

    def _one(self, steps: list[Step], factors: list[float]) -> Step:
        """The branches of one weight, combined; raises WrongOption for what is no LoRA."""
        branches = tuple(s.change for s in steps if isinstance(s.change, LowRank))
        how = Combination(self.combine, self.density, self.sign, self.rank, self.seed)
        made = Combined(branches, tuple(factors), how)
        whole = len(branches) == len(steps)
        wrong = made.misfit(steps[0].spot) if whole else "not all of its adapters are plain LoRA"
        if wrong:
            raise WrongOption(
                f"the adapters of {steps[0].spot.name} cannot be combined by {self.combine}",
                where=steps[0].module,
                expected="LoRA branches",
                found=wrong,
                fix="use combine=add, or a method on deltas such as combine=ties_svd",
            )
        return replace(steps[0], change=made)

    def folders(self) -> list[tuple[str, float]]:
        """The folders and their weights; raises WrongOption for a weight that is no number."""
        found: list[tuple[str, float]] = []
        for part in self.adapters.split(";"):
            path, equals, text = part.strip().rpartition("=")
            if not equals:
                path, text = text, "1"
            if not path:
                continue
            try:
                found.append((path.strip(), float(text)))
            except ValueError as error:
                raise WrongOption(
                    f"the weight of the adapter {path} is no number",
                    expected="PATH or PATH=WEIGHT",
                    found=part.strip(),
                    fix="for example adapters='style/=0.7; facts/'",
                ) from error
        return found


def merged(program: Program, name: str, steps: list[Step]) -> Tensor:
    """A weight with its changes, in its dtype; raises NonFiniteWeight."""
    kept = program.weights[name]
    base = kept.to(wide_dtype(kept.dtype))
    weight = base
    for step in steps:
        weight = step.change.apply(weight, base, step.spot)
    changed = weight.to(kept.dtype).contiguous()
    if not bool(changed.isfinite().all()):
        raise NonFiniteWeight(
            "a merged weight is not finite",
            where=name,
            expected="finite numbers",
            found=f"{int((~changed.isfinite()).sum())} others",
            fix="check the adapter's tensors, or merge into a wider dtype",
        )
    return changed
