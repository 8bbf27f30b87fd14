"""Prompt lookup: what followed the same words earlier in the text is proposed again.

Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, LLMA. Costs no model at all, and pays
where the answer repeats the prompt: edits, extracts, code.

The defaults are the fastest of those tried on benchmarks/repetitive_prompts.json with a decoder
to which each token more in a call costs a fifth of the first: there the length of a proposal has
to follow the length of the agreement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .speculate import Draft

LONGEST, SHORTEST, BOLDNESS = 8, 2, 1.0


class NgramDrafter:
    """Proposes what followed the latest earlier place with the longest suffix of the text.

    longest, shortest: how many tokens must agree. boldness: how many tokens to propose for each
    that agrees. An index grows with the text, so that a proposal costs the same however long the
    text is; another text starts a new one.
    """

    def __init__(
        self, longest: int = LONGEST, shortest: int = SHORTEST, boldness: float = BOLDNESS
    ) -> None:
        self.longest, self.shortest, self.boldness = longest, shortest, boldness
        self._text: list[int] = []
        self._follows: dict[tuple[int, ...], list[int]] = {}

    def propose(self, context: Sequence[int], count: int) -> Draft:
        """Up to `count` tokens; none where no suffix of the text occurred before."""
        self.read(context)
        return Draft(next(self.continuations(count), []))

    def continuations(self, count: int) -> Iterator[list[int]]:
        """What followed earlier places, the longest agreement and the latest place first."""
        for length in range(min(self.longest, len(self._text)), self.shortest - 1, -1):
            for place in reversed(self._follows.get(tuple(self._text[-length:]), [])):
                yield self._copied(place, min(count, int(length * self.boldness)))

    def _copied(self, place: int, count: int) -> list[int]:
        """`count` tokens from a place on; past the end of the text the copy goes on in itself."""
        period = len(self._text) - place
        return [self._text[place + step % period] for step in range(count)]

    def read(self, context: Sequence[int]) -> None:
        """Take in what the text has more than at the last call."""
        known = len(self._text)
        if list(context[:known]) != self._text:
            self._text, self._follows, known = [], {}, 0
        for token in context[known:]:
            end = len(self._text)
            for length in range(self.shortest, min(self.longest, end) + 1):
                self._follows.setdefault(tuple(self._text[end - length :]), []).append(end)
            self._text.append(token)


__all__ = ["BOLDNESS", "LONGEST", "SHORTEST", "NgramDrafter"]
