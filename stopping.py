"""When a text ends: at an end token, or at a stop string, which may lie across tokens."""

from __future__ import annotations

from collections.abc import Sequence

from .ir.errors import WrongOption


class StopText:
    """Lets text through up to the first stop string, which it keeps back.

    `add` returns what is sure not to be the beginning of a stop string. Of several stop strings
    the one that is complete first ends the text, and of those that end together the longest, so
    that it does not matter in which pieces the text comes. Raises WrongOption for an empty one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            stops = (stops,)
        if not all(stops):
            raise WrongOption(
                "a stop string cannot be empty",
                expected="text that ends the generation where it appears",
                found=repr(list(stops)),
                fix="leave the empty one out",
            )
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """The text that can be shown now; afterwards `found` is the stop string, if there is."""
        self._held += piece
        starts = [(self._held.find(stop), stop) for stop in self._stops]
        hits = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if hits:
            _, first, self.found = min(hits)
            shown, self._held = self._held[:first], ""
            return shown
        kept = self._beginning()
        shown = self._held[: len(self._held) - kept]
        self._held = self._held[len(shown) :]
        return shown

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown

    def _beginning(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
