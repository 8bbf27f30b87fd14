"""Prompt lookup: what followed the same words earlier in the text is proposed again.

Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, LLMA. Costs no model at all, and pays
where the answer repeats the prompt: edits, extracts, code.
"""

from __future__ import annotations

from collections.abc import Sequence

from .speculate import Draft

LONGEST, SHORTEST = 6, 2


class NgramDrafter:
    """Proposes what followed the latest earlier place with the longest suffix of the text.

    longest, shortest: how many tokens must agree. An index grows with the text, so that a
    proposal costs the same however long the text is; another text starts a new one.
    """

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST) -> None:
        self.longest, self.shortest = longest, shortest
        self._text: list[int] = []
        self._follows: dict[tuple[int, ...], list[int]] = {}

    def propose(self, context: Sequence[int], count: int) -> Draft:
        """Up to `count` tokens; none where no suffix of the text occurred before."""
        self._read(context)
        return Draft(next(iter(self.continuations(count)), []))

    def continuations(self, count: int) -> list[list[int]]:
        """What followed earlier places, the longest agreement and the latest place first."""
        found: list[list[int]] = []
        for length in range(min(self.longest, len(self._text)), self.shortest - 1, -1):
            places = self._follows.get(tuple(self._text[-length:]), [])
            found.extend(self._copied(place, count) for place in reversed(places))
        return found

    def _copied(self, place: int, count: int) -> list[int]:
        """`count` tokens from a place on; past the end of the text the copy goes on in itself."""
        period = len(self._text) - place
        return [self._text[place + step % period] for step in range(count)]

    def _read(self, context: Sequence[int]) -> None:
        known = len(self._text)
        if list(context[:known]) != self._text:
            self._text, self._follows, known = [], {}, 0
        for token in context[known:]:
            end = len(self._text)
            for length in range(self.shortest, min(self.longest, end) + 1):
                self._follows.setdefault(tuple(self._text[end - length :]), []).append(end)
            self._text.append(token)


__all__ = ["LONGEST", "SHORTEST", "NgramDrafter"]
