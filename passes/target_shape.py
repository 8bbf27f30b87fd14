"""A target shape, `layers=24,heads=12,ffn=2048,hidden=640`: what must go to get just that.

The idea of structured pruning to a named architecture is that of Xia et al. 2023 ("Sheared LLaMA",
sec. 2.1). Every layer gets the same numbers; what is not named stays, and so does the head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ..ir.channel_map import ChannelMap
from ..ir.errors import PlanishError, WrongOption
from ..ir.prunable_units import Kind
from .choose_units import Counts, Group
from .why_no_units import why_no_units


class CannotReach(PlanishError):
    """Cutting this program cannot give the shape that was asked for."""


@dataclass(frozen=True)
class TargetShape:
    """What each layer is to have; None: as it is. hidden: channels of the residual stream.

    heads: query heads. layers: of all residual streams together.
    """

    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    hidden: int | None = None
    experts: int | None = None

    def __str__(self) -> str:
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ",".join(f"{name}={value}" for name, value in named if value is not None)

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of units that are counted."""
        wanted: list[tuple[Kind, bool]] = [
            ("heads", self.heads is not None or self.kv_heads is not None),
            ("ffn", self.ffn is not None),
            ("width", self.hidden is not None),
        ]
        return [kind for kind, asked in wanted if asked]


def parse_target_shape(text: str) -> TargetShape:
    """Raises WrongOption."""
    known = [f.name for f in fields(TargetShape)]
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known or name in found or not value.isdecimal() or int(value) < 1:
            raise WrongOption(
                f"option cut.shape cannot be {text!r}",
                expected=f"NUMBER of 1 or more for each of some of {', '.join(known)}, once",
                found=repr(part.strip()),
                fix="for example layers=24,heads=12,kv_heads=4,ffn=2048,hidden=640",
            )
        found[name] = int(value)
    return TargetShape(**found)


@dataclass(frozen=True)
class Present:
    """What a program has. layers, experts: numbers; groups: of units, their sizes.

    queries: whether query heads may go alone. multiple: what sizes are multiples of.
    """

    layers: int
    experts: Sequence[int]
    groups: Mapping[Group, int]
    queries: Mapping[Group, int]
    channels: ChannelMap
    multiple: int = 1


def counts_for_shape(shape: TargetShape, present: Present) -> Counts:
    """How many units go in each place, query heads included; raises CannotReach.

    All that cannot be reached is told at once, with the nearest shape that can.
    """
    check = _Check(shape, present)
    counts = check.counts()
    if check.problems:
        raise CannotReach(
            f"the target shape cannot be reached: {shape}",
            expected="; ".join(expected for _, expected in check.problems),
            found="; ".join(found for found, _ in check.problems),
            fix=f"the nearest legal shape is {check.nearest_shape() or 'the one that it has'}",
        )
    return counts


class _Check:
    """Goes through the numbers and collects what is wrong, and what would be right."""

    def __init__(self, shape: TargetShape, present: Present) -> None:
        self.shape, self.present = shape, present
        self.problems: list[tuple[str, str]] = []
        self.nearest: dict[str, int | None] = {}

    def nearest_shape(self) -> str:
        named = {f.name: getattr(self.shape, f.name) for f in fields(TargetShape)}
        return str(TargetShape(**(named | self.nearest)))

    def counts(self) -> Counts:
        self._number("layers", self.shape.layers, [self.present.layers])
        self._number("experts", self.shape.experts, self.present.experts)
        counts: Counts = {}
        named: list[tuple[str, Kind, int | None]] = [
            ("ffn", "ffn", self.shape.ffn),
            ("hidden", "width", self.shape.hidden),
        ]
        for name, kind, wanted in named:
            sizes = {group: n for group, n in self.present.groups.items() if group[0] == kind}
            if wanted is None:
                continue
            tile = self.present.multiple
            if not sizes:
                self._not_cut(name, wanted, why_no_units(self.present.channels, kind))
            elif self._number(name, wanted, list(sizes.values()), tile):
                counts |= {group: size - wanted for group, size in sizes.items()}
        if self.shape.heads is not None or self.shape.kv_heads is not None:
            counts |= self._heads()
        return counts

    def _number(self, name: str, wanted: int | None, sizes: Sequence[int], tile: int = 1) -> bool:
        if wanted is None:
            return False
        most = min((size for size in sizes if size > 0), default=0)
        if most == 0:
            self._not_cut(name, wanted, f"the program has no {name} that are told apart")
            return False
        if wanted <= most and (wanted % tile == 0 or wanted == most):
            return True
        nearest = min(most, max(tile, round(wanted / tile) * tile))
        self.nearest[name] = nearest
        multiples = f", multiples of {tile}" if tile > 1 else ""
        self.problems.append((f"{name}={wanted}", f"{name} from 1 to {most}{multiples}"))
        return False

    def _not_cut(self, name: str, wanted: int, why: str) -> None:
        self.problems.append((f"{name}={wanted}", f"{name} as it is: {why}"))
        self.nearest[name] = None

    def _heads(self) -> Counts:
        """Key heads with all their query heads, then query heads of every key head."""
        counts: Counts = {}
        if not self.present.channels.attentions:
            named = "heads" if self.shape.heads is not None else "kv_heads"
            self._not_cut(named, getattr(self.shape, named), "the program has no attention")
            self.nearest |= {"heads": None, "kv_heads": None}
        for place in self.present.channels.attentions:
            where = str(place.node.meta.get("module", "")) or place.node.name
            now = (len(place.query), len(place.key))
            legal = self._legal(where, now)
            wanted = self._pair(now, legal)
            if wanted is None:
                self._no_heads(where, now, legal)
                continue
            heads, key_heads = wanted
            if now[1] > 1:
                counts["heads", where] = now[1] - key_heads
                counts["queries", where] = now[0] // now[1] - heads // key_heads
            else:
                counts["heads", where] = now[0] - heads
        return {group: count for group, count in counts.items() if count > 0}

    def _legal(self, where: str, now: tuple[int, int]) -> list[tuple[int, int]]:
        """(heads, key heads) that cutting can leave, whole groups before single query heads."""
        heads, key_heads = now
        each = heads // key_heads
        groups = self.present.groups.get(("heads", where), 0)
        if key_heads == 1:
            return [(n, 1) for n in range(1, heads + 1)] if groups else [now]
        kept = range(1, key_heads + 1) if groups else [key_heads]
        whole = [(n * each, n) for n in kept]
        if not self.present.queries.get(("queries", where), 0):
            return whole
        return whole + [(n * q, n) for n in reversed(kept) for q in range(1, each)]

    def _pair(
        self, now: tuple[int, int], legal: Sequence[tuple[int, int]]
    ) -> tuple[int, int] | None:
        heads, key_heads = self.shape.heads, self.shape.kv_heads
        for pair in legal:
            if heads in (None, pair[0]) and key_heads in (None, pair[1]):
                return pair
        return None

    def _no_heads(self, where: str, now: tuple[int, int], legal: Sequence[tuple[int, int]]) -> None:
        heads, key_heads = self.shape.heads, self.shape.kv_heads

        def far(pair: tuple[int, int]) -> tuple[int, int]:
            by_heads = abs(pair[0] - (pair[0] if heads is None else heads))
            return by_heads, abs(pair[1] - (pair[1] if key_heads is None else key_heads))

        best = min(legal, key=far)
        named = ",".join(part for part in str(self.shape).split(",") if "heads=" in part)
        each = now[0] // now[1]
        told = f"{named}, where {where} has {now[1]} key heads of {each} query heads each"
        if len(legal) == 1:
            why = why_no_units(self.present.channels, "heads")
            expected = f"heads as they are: {why}"
        else:
            expected = "heads that leave each key head as many query heads"
        if not any(named in found for found, _ in self.problems):
            self.problems.append((told, expected))
            self.nearest |= {"heads": best[0], "kv_heads": best[1]}


__all__ = [
    "CannotReach",
    "Present",
    "TargetShape",
    "counts_for_shape",
    "parse_target_shape",
]
