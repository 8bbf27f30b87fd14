"""Low-rank branches that a graph already holds, each one adapter of several that are kept apart.

y = W x + s1 B1 A1 x + s2 B2 A2 x: every branch goes down from the sum through two products and
numbers alone. Branches whose first weights are named alike beside their base are one adapter: PEFT
names `q_proj.lora_A.style.weight` and `v_proj.lora_A.style.weight` of one adapter `style`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..ir.edit import Editor
from ..ir.program import Node, Program
from ..ir.read_lora import CannotServe, LoraFactors
from ..ir.weight_expressions import constant_nodes
from .find_adapter_branch import Finder, Region
from .merged_product import added, plain_weight

_ATEN = torch.ops.aten
_MOST_TOLD = 10


@dataclass(frozen=True)
class Branching:
    """A sum with branches. base: the value of W x, and its factor; weight: the name of W.

    factors: of each adapter by its name.
    """

    region: Region
    base: Node
    factor: float
    weight: str
    factors: dict[str, LoraFactors]


@dataclass(frozen=True)
class _Path:
    """A term, taken apart. weights: of its products from the sum down, and whether [out, in]."""

    term: Node
    weights: tuple[tuple[Node, bool], ...]
    scale: float


def find_branches(program: Program) -> list[Branching]:
    """Every sum of a product and low-rank branches; raises CannotServe where one is no plain LoRA.

    What is left in the graph would stay active for every row, so all are taken or none.
    """
    finder = Finder(program.graph, constant_nodes(program))
    found: list[Branching] = []
    wrong: list[str] = []
    for region in finder.sums():
        made = _branching(program, region)
        if isinstance(made, Branching):
            found.append(made)
        elif made is not None:
            wrong.append(f"%{region.root.name}: {made}")
    if wrong or not found:
        more = f"; and {len(wrong) - _MOST_TOLD} more" if len(wrong) > _MOST_TOLD else ""
        raise CannotServe(
            "the branches of the graph cannot be kept apart",
            expected="sums of a product W x and products B (A x) of the same x",
            found="; ".join(wrong[:_MOST_TOLD]) + more or "no such sum",
            fix="name folders of adapters, or merge what is in the graph: merge_lora",
        )
    return found


def adapter_names(branchings: Sequence[Branching]) -> list[str]:
    """The adapters in the order of their numbers: that of their first branches."""
    return list(dict.fromkeys(name for found in branchings for name in found.factors))


def put_adapters(editor: Editor, one: Branching, stack: Sequence[Node], chosen: Node) -> Node:
    """The base, then the adapters in one operation, then what else the sum adds."""
    root, region = one.region.root, one.region
    with editor.at(root):
        value = one.base
        if one.factor != 1:
            value = editor.emit(_ATEN.mul.Tensor, value, one.factor)
        with_adapters = (value, region.source, *stack, chosen)
        new = value = editor.emit(torch.ops.planish.adapters.default, *with_adapters)
        for other, factor in (*region.others, *region.constants):
            value = added(editor, value, other, factor)
    editor.replace(root, value)
    return new


def _branching(program: Program, region: Region) -> Branching | str | None:
    """What a sum is; why it is none that can be served; None where no branch is low-rank."""
    paths = [_path(region, term, factor) for term, factor in region.terms]
    chains = [path for path in paths if not isinstance(path, str) and len(path.weights) == 2]
    if not chains:
        return None
    for path in paths:
        if isinstance(path, str):
            return path
    whole = [path for path in paths if not isinstance(path, str) and len(path.weights) == 1]
    if len(whole) != 1 or len(whole) + len(chains) != len(paths):
        return f"{len(whole)} of its {len(paths)} products are no branches, where one should be"
    (base,) = whole
    weight = str(base.weights[0][0].target)
    factors: dict[str, LoraFactors] = {}
    for path in chains:
        (second, b_turned), (first, a_turned) = path.weights
        a, b = program.weights[str(first.target)], program.weights[str(second.target)]
        a, b = a if a_turned else a.t(), b if b_turned else b.t()
        if a.shape[0] * (a.shape[1] + b.shape[0]) >= a.shape[1] * b.shape[0]:
            return f"its branch of rank {a.shape[0]} is no cheaper than [{len(b)}, {a.shape[1]}]"
        name = _adapter_name(str(first.target), weight)
        if name in factors:
            return f"two of its branches go by the name {name}"
        factors[name] = LoraFactors(a, b, path.scale)
    return Branching(region, base.term, base.scale, weight, factors)


def _path(region: Region, term: Node, factor: float) -> _Path | str:
    """The way from a term down to x, or what is on it that a low-rank branch has not."""
    weights: list[tuple[Node, bool]] = []
    scale, value, biased = factor, term, False
    while value is not region.source:
        step = region.steps.get(value)
        if step is None or step.kind in ("sum", "lookup", "convolution"):
            return f"%{value.name} is no product with a matrix"
        if step.kind == "product":
            weight, turned = plain_weight(step.weight, step.turned)
            if weight.op != "get_attr" or weight.meta["val"].dim() != 2:
                return f"%{value.name} multiplies by what is computed from several weights"
            weights.append((weight, turned))
        elif step.kind == "scale":
            if isinstance(step.weight, fx.Node):
                return f"%{value.name} scales by a weight"
            scale *= 1 / step.weight if step.inverse else step.weight
        biased = biased or bool(step.bias)
        value = step.reads[0][0]
    if len(weights) == 2 and biased:
        return f"the branch of %{term.name} has a bias"
    return _Path(term, tuple(weights), scale)


def _adapter_name(name: str, base: str) -> str:
    """What tells the weight of a branch from the base's, by their dotted names."""
    own, others = name.split("."), base.split(".")
    while own and others and own[0] == others[0]:
        own, others = own[1:], others[1:]
    return ".".join(part for part in own if part not in others) or name


__all__ = ["Branching", "adapter_names", "find_branches", "put_adapters"]
