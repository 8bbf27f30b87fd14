"""Drafters of trees: several guesses for each place, checked in one call.

Miao et al. 2023, "SpecInfer": a tree of tokens from a small model, each level with its own width.
The same trees come from a text's n-grams, where earlier places went on in different ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .decoder import Decoder
from .draft_model import TextFollower, independent
from .draft_ngram import BOLDNESS, LONGEST, SHORTEST, NgramDrafter
from .sampling import Sampling, draw
from .speculate import Draft


class NgramTreeDrafter:
    """Prompt lookup with the continuations of several places at once, as one tree.

    branches: how many different continuations; the rest as in `NgramDrafter`.
    """

    def __init__(
        self,
        branches: int = 3,
        longest: int = LONGEST,
        shortest: int = SHORTEST,
        boldness: float = BOLDNESS,
    ) -> None:
        self.branches = branches
        self._lookup = NgramDrafter(longest, shortest, boldness)

    def propose(self, context: Sequence[int], count: int) -> Draft:
        """Up to `branches` continuations of `count` tokens, merged where they begin alike."""
        self._lookup.read(context)
        different: dict[tuple[int, ...], None] = {}
        for tokens in self._lookup.continuations(count):
            different.setdefault(tuple(tokens))
            if len(different) == self.branches:
                break
        return merged(list(different))


def merged(continuations: Sequence[Sequence[int]]) -> Draft:
    """One tree of several continuations; tokens after the same beginning are one token."""
    tokens: list[int] = []
    parents: list[int] = []
    places: dict[tuple[int, int], int] = {}
    for continuation in continuations:
        here = -1
        for token in continuation:
            if (here, token) not in places:
                places[here, token] = len(tokens)
                tokens.append(token)
                parents.append(here)
            here = places[here, token]
    return Draft(tokens, parents)


class ModelTreeDrafter:
    """A tree from a smaller decoder: `widths[d]` children for each token at depth d.

    sampling: as for the text itself. Greedy trees hold the likeliest tokens; otherwise children
    are drawn independently, as the rule that judges them demands, and may be equal.
    """

    def __init__(
        self,
        decoder: Decoder,
        widths: Sequence[int] = (3, 2, 1, 1),
        sampling: Sampling | None = None,
    ) -> None:
        self.decoder, self.widths = decoder, widths
        self.sampling = sampling or Sampling()
        self.chance = independent(self.sampling)
        self.text = TextFollower(decoder)

    def propose(self, context: Sequence[int], count: int) -> Draft:
        """A tree of depth min(count, len(widths)), within the draft model's own context."""
        limit = self.decoder.context
        if limit is not None:
            count = min(count, limit - len(context) + 1)
        if count < 1:
            return Draft()
        tree = _Tree()
        self._grow(tree, self.text.follow(context), list(context), -1, self.widths[:count])
        drawn = None if self.sampling.greedy else tree.probabilities
        return Draft(tree.tokens, tree.parents, drawn)

    def _grow(
        self, tree: _Tree, row: Tensor, text: list[int], parent: int, widths: Sequence[int]
    ) -> None:
        q = self.sampling.probabilities(row[None], text)[0]
        if self.sampling.greedy:
            children = row.topk(min(widths[0], len(row))).indices.tolist()
        else:
            children = [draw(q, self.chance) for _ in range(widths[0])]
        length = self.decoder.length
        for rank, token in enumerate(children):
            place = tree.add(token, parent, q)
            # A second equal child is never accepted after the first one was refused.
            if len(widths) > 1 and token not in children[:rank]:
                below = self.text.append(token)
                self._grow(tree, below, [*text, token], place, widths[1:])
                self.text.back_to(length)


@dataclass
class _Tree:
    tokens: list[int] = field(default_factory=list[int])
    parents: list[int] = field(default_factory=list[int])
    probabilities: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, token: int, parent: int, q: Tensor) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.probabilities.append(q)
        return len(self.tokens) - 1
