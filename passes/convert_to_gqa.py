"""Convert attention to grouped queries: fewer key and value heads, each the mean of a group.

Before: `%k = linear(%x, %K)`, reshaped to `heads` heads, `%y = attention(%q, %k, %v)`. After:
`%k = linear(%x, mean of each group's rows of %K)`, reshaped to `groups` heads; queries of a group
share its head. The cache of keys and values shrinks by heads / groups.
Ainslie et al. 2023 (GQA), section 2.1: the projection matrices for key and value heads are mean
pooled into single projection matrices, the best start for the training that should follow. It is
equal only where the heads of each group were equal; the history tells how much of the weights
was kept, and what became of the outputs.

Groups are contiguous. A projection that query, key and value share, however interleaved, is taken
apart; fuse_qkv joins the parts again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..ir.edit import Editor, same_size, shape
from ..ir.errors import WrongOption
from ..ir.history import Measured
from ..ir.program import Node, Program
from ..ir.rewrite import Decline, Match, Rule, apply_rules
from .contract import Context, Pass, contract
from .find_projection import NotTraceable
from .head_channels import HeadTracer, Operand
from .pool_heads import Pooling, check, emit, kept

_ATTENTION = torch.ops.planish.attention.default
_SIZE = torch.ops.aten.sym_size.int
_PLACES = {"queries": 0, "keys": 1, "values": 2}


class _Pool(Rule):
    name = kind = "convert_to_gqa"

    def __init__(self, program: Program, groups: int) -> None:
        self.program, self.groups = program, groups
        self.kept: dict[str, float] = {}
        self.tracer = HeadTracer(program)

    def look(self, node: Node) -> Match | Decline | None:
        if node.target is not _ATTENTION:
            return None
        if "cached" in self.program.facts:
            return Decline("it reads a KV cache: convert_to_gqa goes before insert_kv_cache")
        heads = shape(node.args[1])[1]  # type: ignore[arg-type]
        if heads <= self.groups:
            return Decline(f"it has {heads} key and value heads, not more than {self.groups}")
        if heads % self.groups:
            return Decline(f"{heads} key and value heads do not make {self.groups} equal groups")
        try:
            found = self._poolings(node)
        except NotTraceable as reason:
            return Decline(reason.what)
        left = {p.operand.name: kept(self.program, p) for p in found[:2]}
        told = ", ".join(f"{name} {ratio:.1f} dB" for name, ratio in left.items())
        note = f"{heads} heads to {self.groups}, SQNR of the pooled weights: {told}"
        return Match(node, {"poolings": found, "kept": left}, note=note)

    def _poolings(self, node: Node) -> list[Pooling]:
        """How keys and values are pooled, and how the queries leave a projection they share."""
        keys, values = (self._trace(node, name) for name in ("keys", "values"))
        taken = [keys, values]
        shared = {keys.projection.node, values.projection.node}
        try:
            queries = self._trace(node, "queries")
        except NotTraceable:
            queries = None
        if queries is not None and queries.projection.node in shared:
            taken.append(queries)
        _refuse_other_readers(node, taken)
        poolings = [Pooling(part, self.groups) for part in (keys, values)]
        poolings += [Pooling(part, part.heads) for part in taken[2:]]
        for pooling in poolings:
            check(pooling)
        return poolings

    def _trace(self, node: Node, name: str) -> Operand:
        return self.tracer.trace(name, node.args[_PLACES[name]])  # type: ignore[arg-type]

    def build(self, found: Match, editor: Editor) -> Node:
        attention, arguments = found.root, list(found.root.args)
        poolings: Sequence[Pooling] = found.found["poolings"]
        self.kept[attention.name] = min(found.found["kept"].values())
        for pooling in poolings:
            _move_sizes(editor, pooling.operand)
        for pooling in poolings:
            arguments[_PLACES[pooling.operand.name]] = emit(editor, attention, pooling)
        editor.module = attention.meta.get("module", "")
        return editor.emit(_ATTENTION, *arguments, **attention.kwargs)


def _refuse_other_readers(attention: Node, operands: Iterable[Operand]) -> None:
    """Raise NotTraceable where somebody else reads what is to be pooled, or its weight."""
    own: set[Node] = {attention}
    for operand in operands:
        own |= {operand.projection.node, *operand.path}
    for operand in operands:
        for value in (operand.projection.node, *operand.path):
            for reader in value.users:
                if reader not in own and _size_before(reader, operand) is None:
                    raise NotTraceable(f"%{reader.name} reads its {operand.name} as well")
        projection = operand.projection
        for read in (projection.weight, *projection.readers[1:]):
            for reader in read.users:
                if reader not in projection.readers:
                    raise NotTraceable(
                        f"the weight {projection.weight.target} of its {operand.name} is tied: "
                        f"%{reader.name} reads it as well"
                    )


def _size_before(reader: Node, operand: Operand) -> tuple[Node, int] | None:
    """The axis of the projection's input that has the size that `reader` reads, if it reads one."""
    size = reader.meta.get("val")
    if isinstance(size, torch.SymInt):
        source = operand.projection.input
        for axis, found in enumerate(shape(source)):
            if same_size(found, size):
                return source, axis
    return None


def _move_sizes(editor: Editor, operand: Operand) -> None:
    """Sizes that were read from values to go are read from the projection's input."""
    for value in (operand.projection.node, *operand.path):
        for reader in list(value.users):
            place = _size_before(reader, operand)
            if place is not None:
                with editor.at(reader):
                    reader.replace_all_uses_with(editor.emit(_SIZE, *place))
                editor.graph.erase_node(reader)


@dataclass(frozen=True)
class ConvertToGqa(Pass):
    """Mean-pool key and value heads into `groups` heads (LOSSY; train afterwards).

    groups: how many key and value heads each attention keeps; 1 makes it multi-query.
    """

    groups: int = 8

    contract = contract("lossy", requires=["raised", "dense_weights"])

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise WrongOption(
                f"option convert_to_gqa.groups cannot be {self.groups}",
                expected="a positive number of key and value heads",
                found=str(self.groups),
            )

    def run(self, program: Program, context: Context) -> None:
        rule = _Pool(program, self.groups)
        apply_rules(program, [rule], context.journal)
        if rule.kept:
            where = min(rule.kept, key=lambda name: rule.kept[name])
            what = "least SQNR of pooled weights (dB)"
            measured = Measured(what, math.inf, rule.kept[where], 0.0, where)
            context.journal.measured.append(measured)
