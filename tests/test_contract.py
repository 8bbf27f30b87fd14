"""Passes as dataclasses: names, options, their spelling and their errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from planish.ir.errors import UnknownOption, WrongOption
from planish.ir.program import Program
from planish.passes.contract import Context, Fidelity, Pass, contract, parse_option
from planish.passes.drop_dead import DropDead


@dataclass(frozen=True)
class RoundTheWeights(Pass):
    contract = contract("lossy", requires=["functional"], breaks=["dense_weights"], min_sqnr=12.0)

    bits: int = 8
    alpha: float = 0.5
    group_size: int | None = None
    symmetric: bool = True
    format: str = "int"
    layers: str | None = None

    def run(self, program: Program, context: Context) -> None:
        raise NotImplementedError


def test_a_contract_from_plain_lists() -> None:
    made = RoundTheWeights.contract
    assert made.fidelity is Fidelity.LOSSY
    assert made.requires == {"functional"}
    assert made.breaks == {"dense_weights"}
    assert made.ensures == made.needs == frozenset()
    assert (made.growth, made.min_sqnr) == (8.0, 12.0)
    with pytest.raises(ValueError, match="nearly"):
        contract("nearly")


def test_names_are_snake_case() -> None:
    assert RoundTheWeights.pass_name() == "round_the_weights"
    assert DropDead.pass_name() == "drop_dead"


def test_the_spelling_shows_what_differs_from_the_defaults() -> None:
    assert RoundTheWeights().spelling() == "round_the_weights"
    made = RoundTheWeights(bits=4, group_size=64)
    assert made.spelling() == "round_the_weights{bits=4, group_size=64}"


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("bits", "4", 4),
        ("bits", 4, 4),
        ("alpha", "0.7", 0.7),
        ("alpha", 1, 1.0),
        ("group_size", "128", 128),
        ("group_size", "none", None),
        ("group_size", None, None),
        ("symmetric", "false", False),
        ("symmetric", True, True),
        ("format", "true", "true"),
        ("layers", "layers.0", "layers.0"),
        ("layers", None, None),
    ],
)
def test_options_are_parsed_by_their_type(name: str, given: Any, kept: object) -> None:
    value = getattr(RoundTheWeights().with_options({name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("bits", "four"),
        ("bits", "4.5"),
        ("bits", 4.5),
        ("bits", None),
        ("bits", True),
        ("alpha", "half"),
        ("alpha", "none"),
        ("symmetric", "perhaps"),
        ("symmetric", 2),
        ("group_size", "many"),
        ("format", 3),
    ],
)
def test_values_that_do_not_fit_are_told(name: str, given: Any) -> None:
    with pytest.raises(WrongOption) as raised:
        RoundTheWeights().with_options({name: given})
    text = str(raised.value)
    assert f"option round_the_weights.{name} cannot be {given!r}" in text
    assert f"default {getattr(RoundTheWeights(), name)!r}" in text


def test_unknown_options_get_the_nearest_name() -> None:
    with pytest.raises(UnknownOption, match="did you mean group_size") as raised:
        RoundTheWeights().with_options({"groupsize": 64})
    assert raised.value.where == "pass round_the_weights"


def test_no_change_keeps_the_pass() -> None:
    made = RoundTheWeights(bits=3)
    assert made.with_options({}) is made
    assert made.with_options({"alpha": 0.1}) == RoundTheWeights(bits=3, alpha=0.1)


def test_whole_numbers_stay_whole_where_both_are_allowed() -> None:
    assert type(parse_option("int | float", "3", 0)) is int
    assert type(parse_option("int | float", "3.5", 0)) is float
