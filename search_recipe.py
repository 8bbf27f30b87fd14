"""A search's allocation as an ordinary recipe: the base recipe with formats by layer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from .ir.errors import WrongOption
from .passes.catalog import find_pass
from .passes.weight_plan import WeightQuantizer
from .recipes import Recipe, Step, find_recipe
from .search_allocate import Allocation
from .search_classes import Class

_GRID_OPTIONS = ("bits", "group_size", "symmetric", "scale_dtype", "format", "overrides")


def base_recipe(name: str) -> tuple[Recipe, str]:
    """The base recipe and the name of its quantizing step; raises WrongOption."""
    recipe = find_recipe(name)
    found = [s.name for s in recipe.steps if isinstance(find_pass(s.name)(), WeightQuantizer)]
    if len(found) != 1:
        raise WrongOption(
            f"the recipe {recipe.name} has {len(found) or 'no'} steps that quantize weights",
            expected="one",
            fix="use --recipe gptq4 or rtn4",
        )
    return recipe, found[0]


def chosen_formats(classes: Sequence[Class], allocation: Allocation) -> dict[str, str]:
    """Weight name to format name."""
    return {
        name: each.formats[place]
        for each, place in zip(classes, allocation.chosen, strict=True)
        for name in each.names
    }


def allocated_recipe(
    base: Recipe, step: str, classes: Sequence[Class], allocation: Allocation, wish: str
) -> Recipe:
    """The base recipe with the allocation: the most frequent format, and overrides of it."""
    formats = chosen_formats(classes, allocation)
    usual = Counter(formats.values()).most_common(1)[0][0]
    special = "; ".join(f"{n}={f}" for n, f in formats.items() if f != usual)
    steps: list[Step] = []
    for each in base.steps:
        if each.name == step:
            options = {n: v for n, v in each.options if n not in _GRID_OPTIONS}
            changed = options | {"format": usual} | ({"overrides": special} if special else {})
            each = dataclasses.replace(each, options=tuple(changed.items()))
        steps.append(each)
    description = f"{base.description}; formats by layer, searched for {wish}"
    return Recipe(f"{base.name}-searched", description, tuple(steps))


__all__ = ["allocated_recipe", "base_recipe", "chosen_formats"]
