"""Find the configuration with which a model class has weights of given names and shapes.

Which entry of a configuration decides which sizes is not looked up but tried out: the class is
built on the meta device with one number changed, and the shapes tell what it governs. So a cut
model is written for any architecture whose configuration can say what was cut.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, product
from typing import Any

import torch

Shapes = Mapping[str, torch.Size]
Build = Callable[[Mapping[str, Any]], "Shapes | None"]
"""build(settings): the names and shapes of the class's weights, None if it refuses them."""

_MOST_ROUNDS = 12
_REFUSED = (1 << 30, 1 << 30)


@dataclass(frozen=True)
class Fitted:
    """settings: the configuration found. renamed: {name in the new model: name in the program}.

    changes: {entry: (before, after)}. unfit: what no configuration explains, empty if all fits.
    """

    settings: dict[str, Any]
    renamed: dict[str, str]
    changes: dict[str, tuple[Any, Any]]
    unfit: list[str]


def fit_configuration(settings: Mapping[str, Any], found: Shapes, build: Build) -> Fitted:
    """Change whole numbers of `settings` until the class has the weights that were found.

    found: the shapes of a program's weights, by names of the model before it was cut. Layers that
    are missing count as dropped, and those behind them move up.
    """
    old = build(settings)
    assert old is not None
    fitted = copy.deepcopy(dict(settings))
    renamed = _drop_layers(fitted, old, found, build)
    wanted = {new: found[name] for new, name in renamed.items() if name in found}
    for _ in range(_MOST_ROUNDS):
        wrong = _wrong(build(fitted), wanted)
        if not wrong:
            break
        better = _best_change(fitted, wanted, wrong, build)
        if better is None:
            break
        fitted = better
    unfit = _wrong(build(fitted), wanted)
    before, after = dict(_numbers(settings)), dict(_numbers(fitted))
    changes = {
        ".".join(map(str, key)): (before.get(key), value)
        for key, value in after.items()
        if before.get(key) != value
    }
    return Fitted(fitted, renamed, changes, [_told(name, old, found, renamed) for name in unfit])


def _wrong(shapes: Shapes | None, wanted: Shapes) -> list[str]:
    """Names whose shapes differ, or that one side lacks."""
    if shapes is None:
        return sorted(wanted)
    names = shapes.keys() | wanted.keys()
    return sorted(name for name in names if shapes.get(name) != wanted.get(name))


def _told(name: str, old: Shapes, found: Shapes, renamed: Mapping[str, str]) -> str:
    kept = renamed.get(name, name)
    shape = list(found[kept]) if kept in found else "not there"
    return f"{kept} is {shape}, was {list(old[kept]) if kept in old else 'not there'}"


Key = tuple[Any, ...]


def _numbers(settings: Any, above: Key = ()) -> list[tuple[Key, int]]:
    """The whole numbers of a configuration, also of the configurations within it."""
    found: list[tuple[Key, int]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += _numbers(value, (*above, name))
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(((*above, name), value))
    return found


def _with(settings: Mapping[str, Any], key: Key, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(dict(settings))
    place: Any = changed
    for name in key[:-1]:
        place = place[name]
    place[key[-1]] = value
    return changed


def _best_change(
    settings: Mapping[str, Any], wanted: Shapes, wrong: list[str], build: Build
) -> dict[str, Any] | None:
    """The change that leaves the fewest wrong sizes; of two numbers where no one number helps.

    Classes refuse numbers that do not go together (a width that heads do not divide), so one of
    two changes may be impossible alone, and the other may change no size. Of such pairs those that
    change in the same proportion come first.
    """
    now = build(settings)
    if now is None:
        return None
    start = _distance(now, wanted)
    candidates = [
        (key, int(value * ratio))
        for key, value in _numbers(settings)
        for ratio in _ratios(now, wanted, wrong)
        if (value * ratio).denominator == 1 and value > 0
    ]
    tried = [(_distance(build(_with(settings, *one)), wanted), one) for one in candidates]
    best = min(tried, key=lambda pair: pair[0], default=None)
    if best is not None and best[0] < start:
        return _with(settings, *best[1])
    refused = [one for distance, one in tried if distance == _REFUSED]
    silent = [one for distance, one in tried if distance == start]
    pairs = [*combinations(refused, 2), *product(refused, silent)]
    before = dict(_numbers(settings))

    def uneven(pair: tuple[tuple[Key, int], tuple[Key, int]]) -> bool:
        (first, a), (second, b) = pair
        return a * before[second] != b * before[first]

    for first, second in sorted(pairs, key=uneven):
        if first[0] != second[0]:
            both = _with(_with(settings, *first), *second)
            if _distance(build(both), wanted) < start:
                return both
    return None


def _ratios(now: Shapes, wanted: Shapes, wrong: list[str]) -> set[Fraction]:
    """By what the sizes that are wrong would have to be multiplied."""
    found: set[Fraction] = set()
    for name in wrong:
        if name in now and name in wanted and len(now[name]) == len(wanted[name]):
            for a, b in zip(now[name], wanted[name], strict=True):
                if a != b and a > 0:
                    found.add(Fraction(b, a))
    return found


def _distance(shapes: Shapes | None, wanted: Shapes) -> tuple[int, int]:
    if shapes is None:
        return _REFUSED
    wrong = _wrong(shapes, wanted)
    sizes = 0
    for name in wrong:
        a, b = shapes.get(name, ()), wanted.get(name, ())
        sizes += sum(x != y for x, y in zip(a, b, strict=True)) if len(a) == len(b) else 9
    return sizes, len(wrong)


# layers


def _drop_layers(
    settings: dict[str, Any], old: Shapes, found: Shapes, build: Build
) -> dict[str, str]:
    """Lower the numbers of layers; returns the new names of what is left."""
    renamed = {name: name for name in old}
    for stem, kept, count in _dropped(old, found):
        for key, value in _numbers(settings):
            if value != count:
                continue
            fewer = _with(settings, key, len(kept))
            _shorten(fewer, count, kept)
            shapes = build(fewer)
            if shapes is not None and _count(shapes, stem) == len(kept):
                settings.clear()
                settings.update(fewer)
                place = {layer: number for number, layer in enumerate(kept)}
                renamed = _moved(renamed, stem, place)
                break
    return renamed


def _dropped(old: Shapes, found: Shapes) -> list[tuple[str, list[int], int]]:
    """Stems of numbered modules of which some are gone: stem, the numbers left, how many were."""
    gone: list[tuple[str, list[int], int]] = []
    for stem in sorted(
        {match[1] for name in old for match in re.finditer(r"(?=(.*?\.)\d+\.)", name)}
    ):
        before = _members(old, stem)
        after = sorted(n for n in before if any(name in found for name in before[n]))
        if len(before) > 1 and 0 < len(after) < len(before):
            gone.append((stem, after, len(before)))
    return gone


def _members(shapes: Shapes, stem: str) -> dict[int, list[str]]:
    members: dict[int, list[str]] = {}
    for name in shapes:
        match = re.match(re.escape(stem) + r"(\d+)\.", name)
        if match:
            members.setdefault(int(match[1]), []).append(name)
    return members


def _count(shapes: Shapes, stem: str) -> int:
    return len(_members(shapes, stem))


def _moved(renamed: Mapping[str, str], stem: str, place: Mapping[int, int]) -> dict[str, str]:
    moved: dict[str, str] = {}
    for new, name in renamed.items():
        match = re.match(re.escape(stem) + r"(\d+)(\..*)", new)
        if match is None:
            moved[new] = name
        elif int(match[1]) in place:
            moved[f"{stem}{place[int(match[1])]}{match[2]}"] = name
    return moved


def _shorten(settings: Any, count: int, kept: list[int]) -> None:
    """Lists with an entry for each layer keep those of the layers that stay."""
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == count:
            settings[name] = [value[layer] for layer in kept]
        elif isinstance(value, dict):
            _shorten(value, count, kept)
