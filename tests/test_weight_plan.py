"""Which weight gets which format: overrides, formats by name, and what is refused."""

from __future__ import annotations

import pytest
from captured import captured
from planish.ir.encoded import Encoded
from planish.ir.errors import UnknownFormat, UnknownOption, UnsupportedGroupSize, WrongOption
from planish.ir.program import Program
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights


def quantize(**options: object) -> Program:
    step = QuantizeWeights().with_options(options)
    return Pipeline([step], verify="numbers").run(captured("llama"))


def formats(program: Program) -> dict[str, str]:
    entries = {name: program.weights.entry(name) for name in program.weights}
    return {n: e.format.name for n, e in entries.items() if isinstance(e, Encoded)}


def test_a_format_by_name_takes_the_place_of_bits_and_group_size() -> None:
    found = formats(quantize(format="int5-g4-asym-f16"))
    assert set(found.values()) == {"int5-g4-asym-f16"}


def test_overrides_match_weights_and_modules_and_the_last_one_counts() -> None:
    found = formats(
        quantize(
            bits=4,
            group_size=4,
            overrides="*.down_proj=int8-g8-sym ; *.layers.1.mlp.*=none; "
            "*.1.mlp.up_proj=int3-g8-sym",
        )
    )
    assert found["model.layers.0.mlp.down_proj.weight"] == "int8-g8-sym"
    assert found["model.layers.1.mlp.up_proj.weight"] == "int3-g8-sym"
    assert found["model.layers.0.mlp.up_proj.weight"] == "int4-g4-sym-f32"
    assert "model.layers.1.mlp.down_proj.weight" not in found


def test_an_override_to_none_is_told() -> None:
    record = quantize(overrides="*.q_proj=none").history.records[-1]
    reasons = {d.value: d.reason for d in record.declined}
    assert (
        reasons["model.layers.0.self_attn.q_proj.weight"] == "set to none by the option overrides"
    )


def test_an_override_gives_a_table_a_format_of_its_own() -> None:
    found = formats(quantize(overrides="model.embed_tokens=int8-g16-sym"))
    assert found["model.embed_tokens.weight"] == "int8-g16-sym"


def test_an_override_that_names_nothing_offers_the_nearest_names() -> None:
    with pytest.raises(UnknownOption) as caught:
        quantize(overrides="model.layers.0.mlp.down_prj=int8-g16-sym")
    assert "did you mean model.layers.0.mlp.down_proj" in str(caught.value)
    assert "quantize_weights.overrides" in str(caught.value)


def test_an_override_is_checked_when_the_pass_is_made() -> None:
    with pytest.raises(UnknownFormat, match="int4-g32"):
        QuantizeWeights(overrides="*.q_proj=int4-g32-symm")
    with pytest.raises(WrongOption, match="cannot be read"):
        QuantizeWeights(overrides="int4-g32-sym")


def test_the_groups_of_an_override_must_divide_too() -> None:
    with pytest.raises(UnsupportedGroupSize, match="q_proj"):
        quantize(overrides="*.layers.1.self_attn.q_proj=int4-g32-sym")
