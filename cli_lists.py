"""The lists of passes and recipes that the command line prints."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from typing import Any

from .cli_print import show
from .passes.catalog import passes
from .passes.contract import Contract, Pass
from .recipes import recipes


def list_passes() -> list[dict[str, Any]]:
    """Print every pass with its options, contract and first docstring line; the same as data."""
    described = [describe_pass(name, cls) for name, cls in sorted(passes().items())]
    for entry in described:
        show(f"{entry['name']} ({entry['contract']['fidelity']}): {entry['summary']}")
        for option in entry["options"]:
            show(f"    {option['name']}: {option['type']} = {option['default']!r}")
        facts = contract_line(entry["contract"])
        if facts:
            show(f"    {facts}")
    return described


def describe_pass(name: str, cls: type[Pass]) -> dict[str, Any]:
    """One pass as plain data."""
    return {
        "name": name,
        "summary": first_line(cls),
        "options": describe_options(cls),
        "contract": describe_contract(cls.contract),
        "module": cls.__module__,
    }


def describe_options(cls: type[Pass]) -> list[dict[str, Any]]:
    """The options of a pass: its dataclass fields."""
    if not dataclasses.is_dataclass(cls):
        return []
    return [
        {
            "name": field.name,
            "type": str(field.type),
            "default": None if field.default is dataclasses.MISSING else field.default,
        }
        for field in dataclasses.fields(cls)
    ]


def describe_contract(contract: Contract) -> dict[str, Any]:
    """A contract as plain data."""
    return {
        "fidelity": contract.fidelity.value,
        **{
            name: sorted(getattr(contract, name))
            for name in ("requires", "ensures", "breaks", "needs")
        },
        "growth": contract.growth,
        "min_sqnr": contract.min_sqnr,
    }


def contract_line(contract: dict[str, Any]) -> str:
    """requires a, b; ensures c; breaks d"""
    parts = [
        f"{name} {', '.join(contract[name])}"
        for name in ("requires", "ensures", "breaks", "needs")
        if contract[name]
    ]
    return "; ".join(parts)


def first_line(cls: type[Pass]) -> str:
    """The first sentence of the docstring, or of the module's where the class has none."""
    own = cls.__doc__ or ""
    if own.startswith(f"{cls.__name__}("):  # the signature that dataclass puts there
        own = ""
    text = own or inspect.getdoc(inspect.getmodule(cls)) or ""
    return inspect.cleandoc(text).split("\n")[0] if text else ""


def list_recipes() -> list[dict[str, Any]]:
    """Print every recipe with its passes; the same as data."""
    described: list[dict[str, Any]] = []
    for recipe in recipes().values():
        spelled = [step.spelling() for step in recipe.passes()]
        described.append(
            {"name": recipe.name, "description": recipe.description, "passes": spelled}
        )
        show(f"{recipe.name}: {recipe.description}")
        show(textwrap.fill(", ".join(spelled), 96, initial_indent="    ", subsequent_indent="    "))
    return described
