"""Cut whole layers, or attention and MLP branches alone, the least influential ones first.

Before: `%x1 = add(%x0, %attn); %x2 = add(%x1, %mlp)`. After the attention branch is cut:
`%x2 = add(%x0, %mlp)`; after the whole layer is: what read `%x2` reads `%x0`. The weights of what
is gone go with it. A branch that is cut adds 0: where a norm follows the sum (post-norm blocks),
the norm stays, so the program equals the one whose branch gives 0. A whole layer takes such norms
along, as a student with fewer layers has it. Influence: see `block_influence`; of branches as in
He et al. 2024 ("What Matters in Transformers? Not All Attention is Needed", sec. 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..ir.block_branches import Branch, BranchKind, Layer, layers_of, streams
from ..ir.cut_blocks import BlockCut
from ..ir.errors import WrongOrder
from ..ir.program import Program
from .block_influence import block_influence
from .contract import Context
from .keep_layers import CannotCutLayers

_NAME = "cut_layers"
_Block = TypeVar("_Block", Layer, Branch)


@dataclass(frozen=True)
class LayerCounts:
    """How many whole layers, attention branches and MLP branches a program has.

    Of each, one stays in each residual stream (an encoder and a decoder are two streams).
    """

    layers: int
    attention: int
    mlp: int


def count_layers(program: Program) -> LayerCounts:
    """What `cut_layers` may cut of."""
    chains = streams(program)
    kinds = [branch.kind for chain in chains for branch in chain]
    layers = sum(len(layers_of(chain)) for chain in chains)
    return LayerCounts(layers, kinds.count("attention"), kinds.count("mlp"))


def cut_layers(
    program: Program, context: Context, *, layers: int = 0, attention: int = 0, mlp: int = 0
) -> None:
    """Cut so many layers, then so many branches of what is left, in place.

    Chosen by block influence on `context.calibration`, measured once, before anything goes. Raises
    CannotCutLayers, WrongOrder without calibration batches.
    """
    if not layers and not attention and not mlp:
        return
    if "cached" in program.facts:
        raise CannotCutLayers(
            "the program has a KV cache already, with an entry for each layer",
            expected="layers cut before insert_kv_cache",
            fix="cut the program that was captured without a cache",
        )
    choice = _Choice(program, context, layers, attention, mlp)
    cut = BlockCut(program)
    for layer, told in choice.layers():
        if context.journal.offers():
            context.journal.noted(_NAME, layer.leaves, told)
            cut.layer(layer)
    for branch, told in choice.branches():
        if context.journal.offers():
            context.journal.noted(_NAME, branch.total, told)
            cut.branch(branch)
    cut.sweep()


class _Choice:
    """Which blocks go. Measures the program as it is when made."""

    def __init__(
        self, program: Program, context: Context, layers: int, attention: int, mlp: int
    ) -> None:
        self.chains = streams(program)
        self.layers_of = [layers_of(chain) for chain in self.chains]
        self.wanted: dict[BranchKind, int] = {"attention": attention, "mlp": mlp}
        self.count = layers
        _check("layers", layers, [len(found) for found in self.layers_of])
        for kind, number in self.wanted.items():
            sizes = [sum(b.kind == kind for b in chain) for chain in self.chains]
            _check(f"{kind} branches", number, sizes)
        if not context.calibration:
            raise WrongOrder(
                "layers are cut by their influence on calibration batches, and there are none",
                fix="pass calibration=[(ids,), ...] with a few representative inputs",
            )
        blocks: list[Layer | Branch] = []
        if layers:
            blocks += [layer for found in self.layers_of for layer in found]
        kinds = {kind for kind, number in self.wanted.items() if number}
        blocks += [b for chain in self.chains for b in chain if b.kind in kinds]
        self.influence = dict(zip(blocks, block_influence(program, blocks, context), strict=True))
        self.gone: set[Branch] = set()

    def layers(self) -> list[tuple[Layer, str]]:
        """The layers that go, in graph order, and what to tell of each."""
        chosen = self._least(self.layers_of, self.count)
        self.gone |= {branch for layer in chosen for branch in layer.branches}
        return [(layer, self._told(layer, "layer")) for layer in chosen]

    def branches(self) -> list[tuple[Branch, str]]:
        """The branches that go of the layers that stay."""
        found: list[tuple[Branch, str]] = []
        for kind, count in self.wanted.items():
            left = [[b for b in c if b.kind == kind and b not in self.gone] for c in self.chains]
            _check(f"{kind} branches", count, [len(chain) for chain in left])
            chosen = self._least(left, count)
            found += [(branch, self._told(branch, f"{kind} branch")) for branch in chosen]
        return found

    def _least(self, chains: Sequence[Sequence[_Block]], count: int) -> list[_Block]:
        """The blocks of least influence; one stays in each stream."""
        left = [len(chain) for chain in chains]
        ranked = [(number, block) for number, chain in enumerate(chains) for block in chain]
        if count:
            ranked.sort(key=lambda pair: self.influence[pair[1]])
        chosen: set[_Block] = set()
        for number, block in ranked:
            if len(chosen) < count and left[number] > 1:
                chosen.add(block)
                left[number] -= 1
        return [block for chain in chains for block in chain if block in chosen]

    def _told(self, block: Layer | Branch, what: str) -> str:
        return f"{what} of {block.module or 'the root'}, influence {self.influence[block]:.4g}"


def _check(what: str, count: int, sizes: Sequence[int]) -> None:
    most = sum(max(size - 1, 0) for size in sizes)
    if 0 <= count <= most:
        return
    several = f", in {len(sizes)} streams" if len(sizes) > 1 else ""
    raise CannotCutLayers(
        f"{count} of {sum(sizes)} {what} cannot be cut{several}",
        expected=f"from 0 to {most}: one stays in each stream",
        found=str(count),
        fix="cut fewer"
        if most
        else "cut channels instead: the data flow shows no blocks that add to one stream",
    )


__all__ = ["LayerCounts", "count_layers", "cut_layers"]
