"""Leave whole layers and single branches out of a program: the graph and the weights shrink."""

from __future__ import annotations

from .block_branches import Branch, Layer
from .edit import Editor
from .program import Node, Program


class BlockCut:
    """Edits one program in place. First layers, then branches of the layers that stay, then
    `sweep`; all of them found in this program before the first cut."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._moved: dict[Node, Node] = {}

    def layer(self, layer: Layer) -> None:
        """What read the end of the layer reads its beginning; norms behind sums go along."""
        enters = layer.enters
        while enters in self._moved:
            enters = self._moved[enters]
        layer.leaves.replace_all_uses_with(enters)
        self._moved[layer.leaves] = enters

    def branch(self, branch: Branch) -> None:
        """Each sum of one of its terms gives way to its other side; norms behind it stay."""
        for term in branch.terms:
            total = next(user for user in term.users if user in branch.sums)
            (rest,) = (read for read in total.all_input_nodes if read is not term)
            total.replace_all_uses_with(rest)
            self.program.graph.erase_node(total)

    def sweep(self) -> None:
        """Drop what nobody reads any more, weights too."""
        Editor(self.program).sweep()


__all__ = ["BlockCut"]
