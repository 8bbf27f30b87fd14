"""The branches of a program's residual streams: what each attention and each MLP adds.

Where one residual sum follows another, they are one stream; the branches of a stream repeat, and
one turn of them is a layer. Branches may stand side by side, both computed from the value before
them; a branch may end in a norm, or a norm may follow the sum (post-norm blocks). Everything is
read from the data flow; no architecture is known by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .look_through import sole_reader
from .program import Node, Program
from .residual_sums import VIEWS, ResidualSum, ResidualSums, addends, alike

_NORMS = {
    torch.ops.planish.rms_norm.default,
    torch.ops.aten.rms_norm.default,
    torch.ops.aten.layer_norm.default,
}
BranchKind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Branch:
    """What one attention or one MLP adds to a residual stream.

    kind: "attention" if it mixes positions (attention, a scan, a convolution), else "mlp". enters:
    the value of the stream that it is computed from. terms: what it adds, mostly one value. sums:
    the additions in which the terms meet the stream; total: the last of them, the value of the
    stream behind the branch. norm: the norm that alone reads the total in a post-norm block, as the
    next branch reads it (None otherwise).
    """

    kind: BranchKind
    enters: Node
    terms: tuple[Node, ...]
    sums: frozenset[Node]
    total: Node
    norm: Node | None = None

    @property
    def module(self) -> str:
        return str(self.terms[0].meta.get("module", "")) or str(self.total.meta.get("module", ""))


@dataclass(frozen=True)
class Layer:
    """One turn of a stream's branches: enters and leaves are of the same shape."""

    branches: tuple[Branch, ...]
    enters: Node
    leaves: Node

    @property
    def module(self) -> str:
        """The module that holds all of its branches, and the end if that has a module."""
        paths = [branch.module.split(".") for branch in self.branches]
        if end := str(self.leaves.meta.get("module", "")):
            paths.append(end.split("."))
        common: list[str] = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common)


def streams(program: Program) -> list[list[Branch]]:
    """The branches of each residual stream, in graph order."""
    look = ResidualSums(program)
    chains: list[list[Branch]] = []
    chain_of: dict[Node, list[Branch]] = {}
    for total, found in look.sums.items():
        before = look.behind(found.rest)
        if before is None:
            chains.append([])
        chain = chain_of[total] = chains[-1] if before is None else chain_of[before]
        chain.extend(_branches(look, found))
    return [_with_norms(chain) for chain in chains]


def layers_of(stream: Sequence[Branch]) -> list[Layer]:
    """The layers of one stream; those whose ends differ in shape are left out."""
    found: list[Layer] = []
    turns = _turns(stream)
    normed = 0  # layers that end in a norm, also where their other sums have none
    for number, branches in enumerate(turns):
        enters, last = branches[0].enters, branches[-1]
        norms = [node for node in _norm_behind(last.total) if alike(node, enters)]
        after = turns[number + 1][0].enters if number + 1 < len(turns) else None
        if after is None and number and normed == number and norms:
            after = norms[-1]
        leaves = last.norm or (after if after in norms else _shaped_like(last.total, enters))
        normed += leaves in norms
        if leaves is not None and alike(leaves, enters):
            found.append(Layer(tuple(branches), enters, leaves))
    return found


def _turns(stream: Sequence[Branch]) -> list[list[Branch]]:
    """The shortest pattern of kinds that the stream repeats, maybe behind one branch alone (a
    convolution of positions); without a pattern, from attention to attention."""
    kinds = [branch.kind for branch in stream]
    for first in (0, 1):
        count = len(kinds) - first
        for size in range(1 + first, count // 2 + 1):
            if count % size == 0 and kinds[first:] == kinds[first : first + size] * (count // size):
                return [list(stream[at : at + size]) for at in range(first, len(kinds), size)]
    turns: list[list[Branch]] = []
    for place, branch in enumerate(stream):
        if not turns or (branch.kind == "attention" and kinds[place - 1] == "mlp"):
            turns.append([])
        turns[-1].append(branch)
    return turns


# the terms of one sum


def _branches(look: ResidualSums, found: ResidualSum) -> list[Branch]:
    parts: list[tuple[BranchKind, Node]] = []
    inner = {found.total}
    _part(look, found.enters, found.term, parts, inner)
    kinds: list[BranchKind] = []
    for kind, _ in parts:
        if kind not in kinds:
            kinds.append(kind)
    if len(kinds) == 1:
        sums = frozenset({found.total})
        return [Branch(kinds[0], found.enters, (found.term,), sums, found.total)]
    return [
        Branch(
            kind,
            found.enters,
            tuple(term for its, term in parts if its == kind),
            frozenset(inner),
            found.total,
        )
        for kind in kinds
    ]


def _part(
    look: ResidualSums,
    enters: Node,
    term: Node,
    parts: list[tuple[BranchKind, Node]],
    inner: set[Node],
) -> None:
    """Take apart what was added up, attention and MLP, before it met the stream."""
    pair = addends(term)
    mixing = look.mixes(enters, term)
    if pair and mixing and len(term.users) == 1:
        apart = all(look.ancestry.feeds(enters, part) for part in pair)
        if apart and all(look.multiplies(enters, part) for part in pair):
            inner.add(term)
            for part in pair:
                _part(look, enters, part, parts, inner)
            return
    parts.append(("attention" if mixing else "mlp", term))


# norms


def _with_norms(chain: list[Branch]) -> list[Branch]:
    """Post-norm streams: a norm alone reads each sum, and the next branch starts from it."""
    totals = list(dict.fromkeys(branch.total for branch in chain))
    norms: dict[Node, Node] = {}
    for total in totals[:-1]:
        readable = _norm_behind(total)
        after = [branch.enters for branch in chain if branch.enters in readable]
        if not after:
            return chain
        norms[total] = after[0]
    starts = [user.target for branch in chain for user in branch.enters.users]
    if len(totals) > 1 or not any(target in _NORMS for target in starts):
        last = [node for node in _norm_behind(totals[-1]) if alike(node, chain[0].enters)]
        if last:
            norms[totals[-1]] = last[-1]
    return [replace(branch, norm=norms.get(branch.total)) for branch in chain]


def _norm_behind(total: Node) -> list[Node]:
    """The norm that alone reads a sum, and the views that alone read it in turn."""
    reader = sole_reader(total)
    while reader is not None and reader.target in VIEWS:
        reader = sole_reader(reader)
    if reader is None or reader.target not in _NORMS:
        return []
    found = [reader]
    while (reader := sole_reader(found[-1])) is not None and reader.target in VIEWS:
        found.append(reader)
    return found


def _shaped_like(total: Node, enters: Node) -> Node | None:
    """The sum, or the view of it that alone reads it, if that has the shape of `enters`."""
    node: Node | None = total
    while node is not None and not alike(node, enters):
        reader = sole_reader(node)
        node = reader if reader is not None and reader.target in VIEWS else None
    return node


__all__ = ["Branch", "BranchKind", "Layer", "layers_of", "streams"]
