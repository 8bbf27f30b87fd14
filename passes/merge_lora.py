"""Merge adapters that are in the graph into the weights beside them.

Before: `%b = linear(%x, %W); %a = linear(%x, %A); %d = linear(%a, %B); %s = mul(%d, 2.0);
%y = add(%b, %s)`. After: `%y = linear(%x, %W)` with W + 2 B A in the place of W.

Equal because a sum of branches that are linear in one value is linear in it. That holds in every
spelling: LoRA (Hu et al. 2021, eq. 3), DoRA (Liu et al. 2024, eq. 5; its norm follows from weights
alone), LoHa, LoKr, VeRA, (IA)^3 (Liu et al. 2022, sec. 3.3: channels scaled by a weight),
convolutions, embeddings, and expressions that make a weight out of several. The matrix is computed
in float64 and rounded once. A sum is left alone where one product costs more than its branches, as
in a layer that is low-rank by design.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from ..ir.edit import Editor, shape
from ..ir.program import Node, Program
from ..ir.weight_expressions import constant_nodes, evaluate, sources
from .branch_matrix import merged, why_not_one
from .contract import Context, Pass, contract
from .find_adapter_branch import Finder, Region
from .find_added_bias import added_biases
from .merge_packed import change_rows, find_packed, why_not_packed
from .merged_product import Base, find_base, put_in_place, stored


@dataclass(frozen=True)
class MergeLora(Pass):
    """Fold low-rank branches, channel scalings and added biases where they belong."""

    contract = contract("bounded", requires=["functional"], rounds_weights=True)

    def run(self, program: Program, context: Context) -> None:
        Merger(program, context, self.pass_name()).all()


class Merger:
    """The merges of one pass run on one program."""

    def __init__(self, program: Program, context: Context, name: str) -> None:
        self.program, self.context, self.name = program, context, name
        self.editor = Editor(program)
        self.constant = constant_nodes(program)

    def all(self) -> None:
        self._fold_expressions()
        finder = Finder(self.program.graph, self.constant)
        sums = finder.sums()
        taken = {node for region in sums for node in (*region.steps, *region.sums)}
        self._merge_packed(finder, taken)
        scaled = finder.scalings(taken)
        taken |= {node for region in scaled for node in region.steps}
        regions = [*sums, *scaled, *added_biases(finder, taken)]
        groups: dict[Node, list[tuple[Region, Base]]] = {}
        for region in regions:
            base = find_base(region)
            reason = self.why_not(region, base)
            if reason is not None or base is None:
                self.context.journal.declined(self.name, region.root, reason or "")
            else:
                groups.setdefault(base.weight, []).append((region, base))
        for done, group in enumerate(groups.values()):
            self.context.progress(done, len(groups), self.name)
            self.merge(group)
        if self.context.journal.count:
            self.editor.sweep()

    def _merge_packed(self, finder: Finder, taken: set[Node]) -> None:
        journal = self.context.journal
        for packed in find_packed(finder):
            root = packed.change.root
            if root in taken:
                continue
            taken.update((root, packed.product))
            reason = why_not_packed(packed, self.program)
            if reason is not None:
                journal.declined(self.name, root, reason)
            elif journal.offers():
                for name, tensor in change_rows(self.program, packed):
                    self.program.weights[name] = tensor
                self.editor.replace(root, packed.part)
                journal.replaced(self.name, root, packed.part, "a part of a packed product")

    def why_not(self, region: Region, base: Base | None) -> str | None:
        if len(region.products) > 1:
            reason = _why_not_cheaper(region)
            if reason:
                return reason
        reason = why_not_one(region) or self._encoded(region)
        if reason:
            return reason
        return None if base is not None else "no product in it can take the place of the others"

    def _encoded(self, region: Region) -> str | None:
        values = [step.weight for step in region.steps.values()]
        for node in sorted({n for v in values if isinstance(v, fx.Node) for n in sources(v)}):
            entry = self.program.weights.entry(str(node.target))
            kept = getattr(entry, "format", None)
            if kept is not None:
                return f"{node.target} is kept as {kept.name}: merge adapters before quantizing"
        return None

    def merge(self, group: Sequence[tuple[Region, Base]]) -> None:
        """Regions whose base is one weight: all of them merge alike, or none does."""
        region, base = group[0]
        inside = {node for r, _ in group for node in r.removed()}
        reason = None
        other = _reader_outside(base.weight, inside, self.constant)
        if other is not None:
            reason = f"%{base.weight.target} is read by %{other.name} too, and stays what it is"
        elif len({_key(r) for r, _ in group}) > 1:
            reason = f"%{base.weight.target} is read by {len(group)} branches with other adapters"
        if reason is not None:
            for r, _ in group:
                self.context.journal.declined(self.name, r.root, reason)
            return
        if not self.context.journal.offers():
            return
        total = merged(self.program, region)
        assert total.matrix is not None
        name = str(base.weight.target)
        dtype = self.program.weights.entry(name).dtype
        made = stored(base, total.matrix).to(dtype).contiguous()
        if not bool(made.isfinite().all()):
            for r, _ in group:
                self.context.journal.declined(self.name, r.root, f"{name} would not be finite")
            return
        bias = self._bias(base, total.bias, inside)
        self.program.weights[name] = made
        note = _told(region)
        for r, b in group:
            new = put_in_place(self.editor, r, b, bias)
            self.editor.replace(r.root, new)
            self.context.journal.replaced(self.name, r.root, new, note)

    def _bias(self, base: Base, bias: Tensor | None, inside: set[Node]) -> Node | None:
        """The weight node of the bias, or None where there is none."""
        if bias is None:
            return None
        dtype = base.product.meta["val"].dtype
        rounded = bias.expand(base.out_channels).to(dtype).contiguous()
        old = base.bias
        if old is not None and evaluate(self.program, old).equal(rounded):
            return old
        own = old is not None and old.op == "get_attr"
        if old is not None and own and _reader_outside(old, inside, self.constant) is None:
            self.program.weights[str(old.target)] = rounded
            return old
        name = str(base.weight.target).rpartition(".")[0]
        return self.editor.weight(f"{name}.bias" if name else "bias", rounded)

    def _fold_expressions(self) -> None:
        """Weights made of several, as W + s B A is: computed now, under the name of the first."""
        for node in list(self.program.graph.nodes):
            if node in self.constant and _is_edge(node, self.constant):
                base = self._expression_base(node)
                if base is None or not self.context.journal.offers():
                    continue
                name, dtype = str(base.target), node.meta["val"].dtype
                made = evaluate(self.program, node, float64=True).to(dtype)
                self.program.weights[name] = made.contiguous()
                self.editor.replace(node, base)
                self.context.journal.changed_weight(self.name, name, "computed from several")

    def _expression_base(self, node: Node) -> Node | None:
        """The weight of this shape that only this expression reads, if it reads others too."""
        value = node.meta["val"]
        if node.op != "call_function" or value.dim() < 2 or not value.is_floating_point():
            return None
        read = [n for n in sorted(sources(node)) if n.meta["val"].is_floating_point()]
        if len(read) < 2 or any(hasattr(self._entry(n), "format") for n in read):
            return None
        for source in read:
            same = source.meta["val"].shape == value.shape
            if same and source.meta["val"].dtype == value.dtype and self._only(source, node):
                return source
        return None

    def _entry(self, node: Node) -> object:
        return self.program.weights.entry(str(node.target))

    def _only(self, source: Node, node: Node) -> bool:
        """Whether a weight is read on the way to a node and nowhere else."""
        waiting, seen = [source], set[Node]()
        while waiting:
            value = waiting.pop()
            for user in value.users:
                if user is not node and user not in self.constant:
                    return False
                if user is not node and user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return True


def _is_edge(node: Node, constant: set[Node]) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and any(u not in constant for u in node.users)


def _why_not_cheaper(region: Region) -> str | None:
    """Multiplications for a row of x: of all branches that would go, against those of one."""
    removed = region.removed()
    costs = {node: _cost(region, node) for node in region.products}
    before = sum(cost for node, cost in costs.items() if node in removed)
    after = _whole_cost(region)
    if before > after:
        return None
    for node, cost in costs.items():
        if cost >= after and node not in removed:
            other = next(user for user in node.users if user not in removed)
            return f"%{node.name} is read by %{other.name} too, so it stays beside a merged one"
    return f"its branches take {before} multiplications a row, one product would take {after}"


def _cost(region: Region, node: Node) -> int:
    step = region.steps[node]
    if step.kind == "lookup":
        return int(shape(node)[-1])
    return math.prod(step.weight.meta["val"].shape)


def _whole_cost(region: Region) -> int:
    axis = 1 if region.style == "convolution" else -1
    out = int(shape(region.terms[0][0])[axis])
    bottom = [n for n in region.products if region.steps[n].reads[0][0] is region.source]
    if any(region.steps[n].kind == "lookup" for n in bottom):
        return out
    sizes = region.steps[bottom[0] if bottom else region.products[0]].weight.meta["val"].shape
    if region.style == "convolution":
        return out * math.prod(sizes[1:])
    return out * int(shape(region.source)[-1]) * math.prod(sizes[:-2])


def _reader_outside(weight: Node, inside: set[Node], constant: set[Node]) -> Node | None:
    """A reader of a weight, or of what is computed from it, that is not in a region."""
    waiting, seen = [weight], {weight}
    while waiting:
        for user in waiting.pop().users:
            if user in constant:
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
            elif user not in inside:
                return user
    return None


def _key(region: Region) -> str:
    """What a region computes, in terms of weights and of x: equal for equal matrices."""
    names = {region.source: "x"}

    def told(value: object) -> str:
        if not isinstance(value, fx.Node):
            return repr(value)
        if value in names:
            return names[value]
        if value.op == "get_attr":
            return f"%{value.target}"
        inner = ", ".join(told(argument) for argument in value.args)
        keywords = {key: told(given) for key, given in value.kwargs.items()}
        return f"{value.target}({inner}, {keywords})"

    for node, step in region.steps.items():
        reads = [(told(read), factor) for read, factor in step.reads]
        bias = [(told(value), factor) for value, factor in step.bias]
        names[node] = f"{step.kind}({reads}, {told(step.weight)}, {bias}, {step.turned})"
    added = [(told(value), factor) for value, factor in region.constants]
    return f"{[(names[node], factor) for node, factor in region.terms]} + {added}"


def _told(region: Region) -> str:
    count = len(region.products)
    if count > 1:
        return f"{count} products are one"
    scaled = any(step.kind == "scale" for step in region.steps.values())
    return "a scaling is in the weight" if scaled else "what is added is in the bias"
