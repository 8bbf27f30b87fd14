"""Recipes: YAML in and out, includes, options laid over, wrong orders refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planish import trace
from planish.ir.errors import UnknownOption, UnknownPass, UnknownRecipe, WrongOption, WrongOrder
from planish.passes.catalog import passes
from planish.passes.contract import Fidelity
from planish.passes.pipeline import Pipeline
from planish.recipes import BadRecipe, Recipe, Step, find_recipe, pipeline, read_recipe, recipes
from tiny_program import ids, tiny


@pytest.mark.parametrize("name", recipes())
def test_a_built_in_recipe_survives_yaml(name: str) -> None:
    recipe = recipes()[name]
    again = read_recipe(recipe.to_yaml())
    assert again == recipe
    assert again.passes() == recipe.passes()


@given(
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 16, 32, 64, 128]),
    symmetric=st.booleans(),
    skip=st.text(st.characters(categories=["L", "N", "P", "S", "Z"]), max_size=20),
)
def test_options_survive_yaml(
    bits: int, group_size: int | None, symmetric: bool, skip: str
) -> None:
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "skip": skip}
    recipe = Recipe("mine", "of a test", (Step("quantize_weights", tuple(options.items())),))
    (step,) = read_recipe(recipe.to_yaml()).passes()
    assert step.options() == {**passes()["quantize_weights"]().options(), **options}


@pytest.mark.parametrize("name", recipes())
def test_a_built_in_recipe_is_in_order(name: str) -> None:
    Pipeline(recipes()[name].passes()).check_order(frozenset({"functional", "dense_weights"}))


def test_the_recipes_that_promise_it_have_nothing_lossy() -> None:
    for name in ("raise", "exact"):
        for step in recipes()[name].passes():
            assert step.contract.fidelity is not Fidelity.LOSSY


def test_a_recipe_includes_another(tmp_path: Path) -> None:
    text = "name: mine\npasses:\n  - recipe: exact\n  - quantize_weights: {bits: 4}\n"
    mine = read_recipe(text)
    assert mine.steps[:-1] == recipes()["exact"].steps
    (tmp_path / "mine.yaml").write_text(text)
    outer = read_recipe(f"passes: [drop_dead, {{recipe: {tmp_path / 'mine.yaml'}}}]")
    assert outer.steps == (Step("drop_dead"), *mine.steps)
    assert find_recipe(tmp_path / "mine.yaml") == mine
    assert find_recipe(mine) is mine


def test_an_unknown_included_recipe_is_named() -> None:
    with pytest.raises(UnknownRecipe, match="did you mean exact"):
        read_recipe("passes: [{recipe: exakt}]")


def test_options_are_laid_over_every_step_of_the_pass() -> None:
    recipe = Recipe("twice", "", (Step("quantize_weights", (("bits", 4),)), Step("drop_dead")))
    built = recipe.passes({"quantize_weights.group_size": "64", "quantize_weights.bits": 3})
    assert (built[0].options()["bits"], built[0].options()["group_size"]) == (3, 64)
    assert recipe.passes()[0].options()["bits"] == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [("none", None), ("None", None), ("32", 32)],
)
def test_option_texts_are_parsed_by_type(text: str, value: int | None) -> None:
    recipe = Recipe("mine", "", (Step("quantize_weights"),))
    (step,) = recipe.passes({"quantize_weights.group_size": text})
    assert step.options()["group_size"] == value
    (step,) = recipe.passes({"quantize_weights.symmetric": "false"})
    assert step.options()["symmetric"] is False


@pytest.mark.parametrize(
    ("name", "value"),
    [("bits", "4.5"), ("bits", 4.5), ("bits", True), ("bits", None), ("symmetric", "maybe")],
)
def test_values_of_the_wrong_type_are_refused(name: str, value: object) -> None:
    recipe = Recipe("mine", "", (Step("quantize_weights"),))
    with pytest.raises(WrongOption, match=f"quantize_weights.{name}"):
        recipe.passes({f"quantize_weights.{name}": value})


def test_unknown_names_are_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(UnknownPass, match="did you mean drop_dead"):
        read_recipe("passes: [drop_dad]")
    with pytest.raises(UnknownOption, match="did you mean bits"):
        read_recipe("passes: [{quantize_weights: {bit: 4}}]")
    with pytest.raises(BadRecipe, match="options of drop_dead"):
        read_recipe("passes: [{drop_dead: 4}]")


def test_a_wrong_order_is_refused_before_anything_runs() -> None:
    program = trace(tiny(), (ids(),))
    text = str(program)
    wrong = Recipe("wrong", "", (Step("quantize_weights"), Step("smooth")))
    with pytest.raises(WrongOrder, match="before quantize_weights") as caught:
        pipeline(wrong).run(program)
    assert "step 2 of 2" in str(caught.value)
    assert str(program) == text
    assert not len(program.history)


def test_a_recipe_runs_and_leaves_its_source_alone() -> None:
    program = trace(tiny(), (ids(),))
    text, nbytes = str(program), program.nbytes()
    recipe = Recipe("mine", "", (Step("canonicalize"), Step("quantize_weights")))
    done = pipeline(recipe, {"quantize_weights.bits": 8}).run(program)
    assert [record.name for record in done.history] == ["canonicalize", "quantize_weights"]
    assert done.nbytes() < nbytes / 2
    assert (str(program), program.nbytes()) == (text, nbytes)
    torch.testing.assert_close(done(ids()), program(ids()), rtol=0.05, atol=0.05)
