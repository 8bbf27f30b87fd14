"""The lists of passes and recipes that the command line prints."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from .cli_print import show, table
from .ir.errors import PlanishError
from .passes.catalog import passes
from .passes.contract import Contract, Pass
from .recipes import recipes


def list_passes() -> list[dict[str, Any]]:
    """Print every pass with its options, contract and first docstring line; the same as data."""
    described = [describe_pass(name, cls) for name, cls in sorted(passes().items())]
    rows = [
        [
            entry["name"],
            entry["contract"]["fidelity"],
            entry["summary"],
            "\n".join(f"{o['name']}: {o['type']} = {o['default']}" for o in entry["options"]),
            contract_line(entry["contract"]),
        ]
        for entry in described
    ]
    show(table(["pass", "fidelity", "what it does", "options", "facts"], rows))
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
    return "\n".join(parts)


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
    rows: list[list[str]] = []
    for recipe in recipes().values():
        try:
            spelled, missing = [step.spelling() for step in recipe.passes()], ""
        except PlanishError as error:  # a recipe may name a pass of a distribution not installed
            spelled, missing = [step.name for step in recipe.steps], f"\nunusable: {error.what}"
        described.append(
            {"name": recipe.name, "description": recipe.description, "passes": spelled}
        )
        rows.append([recipe.name, recipe.description + missing, ", ".join(spelled)])
    show(table(["recipe", "what it is for", "passes"], rows))
    return described
