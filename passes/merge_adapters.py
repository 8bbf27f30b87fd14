"""Merge PEFT adapter folders into the weights of their base: W + s B A, once, and its relatives.

Before: `%q = linear(%x, %W)`. After: the same graph, with the adapter's change in `%W`. The order
of operations is PEFT's own, so the weights are those of its `merge_and_unload`. Several folders are
merged one after the other: their weighted deltas add up, as in PEFT's combination `cat`.
Hu et al. 2022 (LoRA, sec. 4.1); the other kinds: `ir/adapter_lora.py`, `ir/adapter_products.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ir.adapter_change import wide_dtype
from ..ir.adapter_plan import Step, plan_adapter, weighted
from ..ir.errors import NonFiniteWeight, WrongOption
from ..ir.program import Program
from ..ir.read_adapter import read_adapter
from .contract import Context, Pass, contract


@dataclass(frozen=True)
class MergeAdapters(Pass):
    """Merge the folders of `adapters`: "PATH; PATH=WEIGHT", into dense weights.

    A quantized base is refused by the facts: merge first, then quantize.
    """

    adapters: str = ""

    contract = contract("lossy", requires=["functional", "dense_weights"], min_sqnr=-200.0)

    def run(self, program: Program, context: Context) -> None:
        wanted = self.folders()
        if not wanted:
            raise WrongOption(
                "merge_adapters was given no adapters",
                expected="adapters=FOLDER; FOLDER=WEIGHT",
                fix="name one or more folders that PEFT's save_pretrained wrote",
            )
        steps: dict[str, list[Step]] = {}
        for folder, factor in wanted:
            adapter = read_adapter(folder)
            for step in weighted(plan_adapter(adapter, program), factor, adapter.name):
                steps.setdefault(step.spot.name, []).append(step)
        for done, (name, changes) in enumerate(steps.items()):
            context.progress(done, len(steps), self.pass_name())
            if context.journal.offers():
                program.weights[name] = _changed(program, name, changes)
                kinds = ", ".join(dict.fromkeys(type(s.change).__name__ for s in changes))
                context.journal.changed_weight(self.pass_name(), name, kinds)

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


def _changed(program: Program, name: str, steps: list[Step]) -> torch.Tensor:
    kept = program.weights[name]
    base = kept.to(wide_dtype(kept.dtype))
    weight = base
    for step in steps:
        weight = step.change.apply(weight, base, step.spot)
    merged = weight.to(kept.dtype).contiguous()
    if not bool(merged.isfinite().all()):
        raise NonFiniteWeight(
            "a merged weight is not finite",
            where=name,
            expected="finite numbers",
            found=f"{int((~merged.isfinite()).sum())} others",
            fix="check the adapter's tensors, or merge into a wider dtype",
        )
    return merged
