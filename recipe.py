"""A recipe: a named order of passes with options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from .ir.errors import PlanishError, UnknownOption
from .passes.catalog import find_pass
from .passes.contract import Pass


class BadRecipe(PlanishError):
    """A recipe file that does not say what it should."""


_MERGES = ("merge_adapters", "merge_into_codes")
"""What merges adapters into dense weights, and into those of a quantized model."""


@dataclass(frozen=True)
class Step:
    """One pass by name, with the options that differ from its defaults."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def build(self) -> Pass:
        return find_pass(self.name)().with_options(dict(self.options))


@dataclass(frozen=True)
class Recipe:
    """A named order of passes."""

    name: str
    description: str
    steps: tuple[Step, ...]

    def passes(self, options: Mapping[str, Any] | None = None) -> list[Pass]:
        """The passes, with `options` laid over the recipe's own.

        options: {"pass.option": value}, or {"option": value} for every step that has the option.
        Raises UnknownPass, UnknownOption (with the nearest name) and WrongOption.
        """
        changes, shared = _by_pass(options or {})
        names = {step.name for step in self.steps}
        for name in changes:
            if name not in names:
                raise UnknownOption.named(name, names, where=f"options of recipe {self.name}")
        built = [step.build() for step in self.steps]
        known = {option for step in built for option in step.options()}
        for name in shared:
            if name not in known:
                raise UnknownOption.named(name, known, where=f"options of recipe {self.name}")
        for place, step in enumerate(built):
            own = {name: value for name, value in shared.items() if name in step.options()}
            built[place] = step.with_options(own | changes.get(step.pass_name(), {}))
        return built

    def with_kv_cache(self) -> Recipe:
        """This recipe, and then the cache; itself if it already inserts one."""
        if any(step.name == "insert_kv_cache" for step in self.steps):
            return self
        description = f"{self.description}; with a KV cache"
        return Recipe(self.name, description, (*self.steps, Step("insert_kv_cache")))

    def with_adapters(self, folders: Sequence[str], dense: bool = True) -> Recipe:
        """PEFT folders merged, and then this recipe; itself if there are none.

        dense: whether the weights are; into others an adapter is merged through their codes.
        """
        if not folders:
            return self
        name = _MERGES[0] if dense else _MERGES[1]
        merge = Step(name, (("adapters", "; ".join(folders)),))
        return Recipe(self.name, f"adapters merged; {self.description}", (merge, *self.steps))

    def check_options(self, options: Mapping[str, Any] | None, folders: Sequence[str] = ()) -> None:
        """Raise for wrong options as `passes` does, before the model is known.

        Which pass merges `folders` depends on the model's weights, so either one's are taken.
        """
        for dense, other in zip((True, False), reversed(_MERGES), strict=True):
            given = (options or {}).items()
            kept = {k: v for k, v in given if not folders or not k.startswith(f"{other}.")}
            self.with_adapters(folders, dense).passes(kept)

    def to_yaml(self) -> str:
        body = [
            {step.name: dict(step.options)} if step.options else step.name for step in self.steps
        ]
        data = {"name": self.name, "description": self.description, "passes": body}
        return yaml.safe_dump(data, sort_keys=False)


def _by_pass(options: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The options of single passes, and those that name no pass."""
    grouped: dict[str, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    for key, value in options.items():
        name, dot, option = key.partition(".")
        if dot:
            grouped.setdefault(name, {})[option] = value
        else:
            shared[key] = value
    return grouped, shared
