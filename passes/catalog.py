"""All passes: those in this folder, and those that other distributions publish.

A pass is found by being a concrete `Pass` in a module of this folder, or by an entry point of the
group `planish.passes` whose value is a `Pass` class.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path

from ..ir.errors import PlanishError, UnknownPass
from .contract import Pass

GROUP = "planish.passes"


class BadPlugin(PlanishError):
    """An entry point of group planish.passes is not a pass."""


@functools.cache
def passes() -> dict[str, type[Pass]]:
    """Every known pass class by name. Raises BadPlugin for an entry point that is none."""
    found: dict[str, type[Pass]] = {}
    folder = str(Path(__file__).parent)
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([folder]):
        found |= _own_passes(f"{package}.{module.name}")
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
        except (ImportError, AttributeError) as error:
            raise BadPlugin(
                f"the entry point {entry.name!r} of {GROUP} does not load",
                where=entry.value,
                found=str(error),
                fix="reinstall or remove the distribution that declares it",
            ) from error
        if not (inspect.isclass(loaded) and issubclass(loaded, Pass)):
            raise BadPlugin(
                f"the entry point {entry.name!r} of {GROUP} is not a Pass class",
                where=entry.value,
                found=repr(loaded),
            )
        found[loaded.pass_name()] = loaded
    return found


def _own_passes(module_name: str) -> dict[str, type[Pass]]:
    module = importlib.import_module(module_name)
    return {
        value.pass_name(): value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Pass)
        and value.__module__ == module_name
        and not inspect.isabstract(value)
        and hasattr(value, "contract")
    }


def find_pass(name: str) -> type[Pass]:
    """The pass of that name; raises UnknownPass with the nearest ones."""
    known = passes()
    if name not in known:
        raise UnknownPass.named(name, known)
    return known[name]
