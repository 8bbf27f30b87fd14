"""What the options of `cut` may be, refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ir.errors import WrongOption
from ..ir.prunable_units import Kind
from .choose_units import SCOPES
from .cut_budget import MEASURES as BUDGETS
from .target_shape import parse_target_shape
from .unit_importance import MEASURES

LEARNED = "learned"
KINDS: tuple[Kind, ...] = ("heads", "queries", "ffn", "width", "embedding")
SHARES = (*KINDS, "experts", "layers", "attention_layers", "mlp_layers")
_IMPORTANCE = (*MEASURES, LEARNED)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises WrongOption."""
    share = "a share such as 0.25 is what goes; 1 would leave nothing"
    budget = "a budget such as 0.3 is the part that goes; 0 would cut nothing and 1 leave nothing"
    for option, fine, expected, fix in (
        *((name, 0 <= options[name] < 1, "0 to less than 1", share) for name in SHARES),
        _among(options, "importance", _IMPORTANCE),
        _among(options, "measure", BUDGETS),
        _among(options, "scope", SCOPES),
        _among(options, "norms", ("auto", "kept", "own")),
        ("multiple", options["multiple"] >= 1, "1 or more", "1 leaves any number"),
        (
            "budget",
            options["budget"] is None or 0 < options["budget"] < 1,
            "more than 0 and less than 1",
            budget,
        ),
    ):
        if not fine:
            value = repr(options[option])
            raise WrongOption(
                f"option cut.{option} cannot be {value}", expected=expected, found=value, fix=fix
            )
    if options["shape"]:
        parse_target_shape(options["shape"])
    _check_together(options)


def _among(options: Mapping[str, Any], name: str, known: tuple[str, ...]) -> tuple[Any, ...]:
    return name, options[name] in known, " or ".join(known), f"choose one of {', '.join(known)}"


def _check_together(options: Mapping[str, Any]) -> None:
    shares = [name for name in SHARES if options[name] > 0]
    if options["shape"] and (shares or options["budget"] is not None):
        raise WrongOption(
            "cut.shape says all numbers itself",
            expected="a shape, or shares and a budget",
            found=", ".join(["shape", *shares, *(["budget"] * (options["budget"] is not None))]),
            fix="leave the shares and the budget out, or the shape",
        )
    if options["shape"] and options["scope"] != "uniform":
        raise WrongOption(
            "a target shape has the same numbers in every layer",
            expected="scope=uniform",
            found=f"scope={options['scope']}",
            fix="use a budget with scope=global, or the shape alone",
        )
    if options["importance"] == LEARNED and options["scope"] != "uniform":
        raise WrongOption(
            "learned gates are pulled to numbers that are fixed for each layer",
            expected="scope=uniform",
            found=f"scope={options['scope']}",
            fix="use importance=taylor, fisher or wanda with scope=global",
        )


__all__ = ["KINDS", "LEARNED", "SHARES", "check_options"]
