"""Options that name layers: "pattern=choice; pattern=choice", matched on weights and modules."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from ..ir.errors import UnknownOption, WrongOption


@dataclass(frozen=True)
class LayerPatterns:
    """Choices for layers whose weight's name, or its module's path, fits a pattern.

    Of several patterns that fit the last counts.
    """

    choices: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str, where: str) -> LayerPatterns:
        """From "pattern=choice; ..."; raises WrongOption."""
        found: list[tuple[str, str]] = []
        for part in filter(None, (piece.strip() for piece in text.split(";"))):
            pattern, sign, choice = part.partition("=")
            if not sign or not pattern.strip() or not choice.strip():
                raise WrongOption(
                    f"option {where} cannot be read",
                    expected='"pattern=choice; pattern=choice"',
                    found=repr(part),
                    fix="write for example *.down_proj=none",
                )
            found.append((pattern.strip(), choice.strip()))
        return cls(tuple(found))

    def of(self, weight: str) -> str | None:
        """The choice for a layer, by its weight's name."""
        fitting = [choice for pattern, choice in self.choices if fits(weight, pattern)]
        return fitting[-1] if fitting else None

    def check(self, weights: Iterable[str], where: str) -> None:
        """Raise UnknownOption for a pattern that fits none of the weights."""
        names = list(weights)
        for pattern, _ in self.choices:
            if not any(fits(name, pattern) for name in names):
                modules = [name.rpartition(".")[0] or name for name in names]
                near = difflib.get_close_matches(pattern, {*names, *modules}, n=3, cutoff=0.3)
                raise UnknownOption(
                    f"no layer is called {pattern!r}",
                    where=where,
                    found=pattern,
                    fix=f"did you mean {' or '.join(near)}?" if near else "see planish explain",
                )


def fits(weight: str, pattern: str) -> bool:
    """Whether a pattern fits a weight's name or the path of its module."""
    return fnmatch.fnmatchcase(weight, pattern) or fnmatch.fnmatchcase(
        weight.rpartition(".")[0], pattern
    )
