"""Which values of a graph each value is computed from: one bit set for each node."""

from __future__ import annotations

from .program import Node, Program


class Ancestry:
    """Answers about one graph, as it was when this was made."""

    def __init__(self, program: Program) -> None:
        self.nodes: list[Node] = list(program.graph.nodes)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self._before = [0] * len(self.nodes)
        self._after = [0] * len(self.nodes)
        for number, node in enumerate(self.nodes):
            for read in node.all_input_nodes:
                above = self.place[read]
                self._before[number] |= self._before[above] | (1 << above)
        for number in reversed(range(len(self.nodes))):
            for user in self.nodes[number].users:
                below = self.place[user]
                self._after[number] |= self._after[below] | (1 << below)

    def feeds(self, source: Node, node: Node) -> bool:
        """Whether `node` is computed from `source`, and is not it."""
        return bool(self._before[self.place[node]] >> self.place[source] & 1)

    def between(self, source: Node, node: Node) -> list[Node]:
        """The values on the ways from `source` (not in it) to `node` (in it), in graph order."""
        end = self.place[node]
        bits = self._after[self.place[source]] & (self._before[end] | (1 << end))
        found: list[Node] = []
        while bits:
            low = bits & -bits
            found.append(self.nodes[low.bit_length() - 1])
            bits ^= low
        return found
