"""Target shapes: exactly that architecture, as a folder that transformers loads; or the nearest."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import planish
import pytest
import torch
import zoo
from captured import captured
from hypothesis import given
from hypothesis import strategies as st
from planish.api import Optimized
from planish.ir.errors import WrongOption, WrongOrder
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.read_hf_folder import read_hf_folder
from planish.passes.cut import Cut
from planish.passes.pipeline import Pipeline
from planish.passes.target_shape import CannotReach, TargetShape, parse_target_shape
from planish.recipes import pipeline

number = st.none() | st.integers(1, 10**6)


@functools.cache
def raised(name: str) -> Program:
    return pipeline("raise").run(captured(name, zoo.ARCHITECTURES[name].attentions[0]))


def inputs(name: str, seed: int = 7) -> dict[str, torch.Tensor]:
    return zoo.build(name, zoo.ARCHITECTURES[name].attentions[0]).other_inputs(3, 13, seed)


@given(st.builds(TargetShape, number, number, number, number, number, number))
def test_shapes_are_read_as_they_are_written(shape: TargetShape) -> None:
    if shape != TargetShape():
        assert parse_target_shape(str(shape)) == shape
        assert parse_target_shape(str(shape).replace(",", " , ").replace("=", " = ")) == shape


@pytest.mark.parametrize(
    ("text", "guilty"),
    [
        ("layers=0", "layers=0"),
        ("layers", "layers"),
        ("layers=2,layers=3", "layers=3"),
        ("ffn=1.5", "ffn=1.5"),
        ("ffn=-4", "ffn=-4"),
        ("depth=3", "depth=3"),
        ("layers=2,,ffn=3", "''"),
    ],
)
def test_what_is_no_shape_is_refused(text: str, guilty: str) -> None:
    with pytest.raises(WrongOption, match=r"cut\.shape") as told:
        Cut(shape=text)
    assert guilty in told.value.found


@pytest.mark.parametrize("more", [{"ffn": 0.25}, {"budget": 0.3}, {"scope": "global"}])
def test_a_shape_says_all_numbers_itself(more: dict[str, Any]) -> None:
    with pytest.raises(WrongOption):
        Cut(shape="ffn=64", **more)


def exported(name: str, shape: str, folder: Path) -> tuple[Optimized, Any]:
    """The optimized model, and what transformers loads of its folder."""
    sample = zoo.build(name, zoo.ARCHITECTURES[name].attentions[0])
    made = planish.optimize(
        sample.model,
        sample.args,
        sample.kwargs,
        recipe="cut",
        options={"cut.shape": shape},
        calibration=[inputs(name, seed) for seed in range(2)],
    )
    return made, read_hf_folder(made.export(folder / "cut", target="huggingface"))


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        (
            "llama",
            "layers=1,heads=3,ffn=64,hidden=36",
            {
                "num_hidden_layers": 1,
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "intermediate_size": 64,
                "hidden_size": 36,
                "head_dim": 10,
            },
        ),
        (
            "llama",
            "heads=4,kv_heads=2,hidden=40",
            {
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 80,
                "hidden_size": 40,
            },
        ),
        (
            "gpt2",
            "layers=1,heads=4,ffn=64,hidden=32",
            {"n_layer": 1, "n_head": 4, "n_inner": 64, "n_embd": 32},
        ),
    ],
)
def test_a_folder_has_the_shape_and_the_programs_own_logits(
    name: str, shape: str, wanted: dict[str, int], tmp_path: Path
) -> None:
    made, loaded = exported(name, shape, tmp_path)
    config = loaded.config.to_dict()
    assert {key: config[key] for key in wanted} == wanted
    count = sum(p.numel() for p in {id(p): p for p in loaded.parameters()}.values())
    assert count < 0.9 * captured(name).parameter_count()
    given = inputs(name)
    flat = made.program.flatten_inputs((), given)
    wide = run(made.program, flat, float64=True)[0]
    own = (run(made.program, flat)[0] - wide).norm()
    with torch.no_grad():
        theirs = loaded(**given)[0]
    seen = given["attention_mask"].bool()  # the two forms of attention fill blind rows differently
    assert (theirs - wide)[seen].norm() <= 8 * own


def test_experts_and_heads_are_cut_to_the_shape() -> None:
    shape = "heads=3,ffn=40,experts=3"
    program = raised("mixtral")
    batch = program.flatten_inputs((), inputs("mixtral"))
    made = Pipeline([Cut(shape=shape)]).run(program, calibration=[batch])
    shapes = {tuple(made.weights.shape(n)) for n in made.weights if "gate.weight" in n}
    assert shapes == {(3, 48)}
    assert {tuple(made.weights.shape(n)) for n in made.weights if "q_proj" in n} == {(30, 48)}


def refused(name: str, shape: str, **more: Any) -> CannotReach:
    with pytest.raises(CannotReach) as told:
        Pipeline([Cut(shape=shape, **more)]).run(raised(name))
    return told.value


@pytest.mark.parametrize(
    ("name", "shape", "nearest"),
    [
        ("llama", "heads=5", "heads=6,kv_heads=2"),
        ("llama", "heads=7,kv_heads=2", "heads=6,kv_heads=2"),
        ("llama", "heads=6,kv_heads=1", "heads=6,kv_heads=2"),
        ("llama", "kv_heads=9", "heads=6,kv_heads=2"),
        ("llama", "layers=3,ffn=64", "layers=2,ffn=64"),
        ("llama", "ffn=81,hidden=32", "ffn=80,hidden=32"),
        ("llama", "hidden=100", "hidden=48"),
        ("gpt2", "heads=8", "heads=6,kv_heads=6"),
        ("gemma", "heads=4,kv_heads=2", "heads=4,kv_heads=1"),
    ],
)
def test_the_nearest_legal_shape_is_told(name: str, shape: str, nearest: str) -> None:
    told = refused(name, shape)
    assert told.fix == f"the nearest legal shape is {nearest}"
    assert shape in str(told)
    counts = Cut(shape=nearest)  # and it is one that can be cut to
    if "layers" not in nearest:
        Pipeline([counts]).run(raised(name))


def test_heads_and_sizes_that_are_wrong_are_told_together() -> None:
    told = refused("llama", "layers=9,heads=5,ffn=100,hidden=64")
    assert told.fix.endswith("layers=2,heads=6,kv_heads=2,ffn=80,hidden=48")
    for part in ("layers=9", "heads=5", "2 key heads of 3 query heads", "ffn=100", "hidden=64"):
        assert part in told.found


def test_tiles_are_part_of_what_is_legal() -> None:
    assert refused("llama", "ffn=60", multiple=16).fix.endswith("ffn=64")
    assert refused("llama", "ffn=3", multiple=16).fix.endswith("ffn=16")


def test_a_stream_that_is_returned_cannot_get_narrower() -> None:
    told = refused("bert", "hidden=32")
    assert "embeddings.word_embeddings.weight cannot lose channels" in told.expected
    assert "returned by the program" in told.expected
    assert told.fix.endswith("the one that it has")
    made = Pipeline([Cut(width=0.25)]).run(raised("bert"))
    (declined,) = made.history.records[-1].declined
    assert "embeddings.word_embeddings.weight cannot lose channels" in declined.reason


def test_models_without_experts_say_so() -> None:
    assert "no experts" in refused("llama", "experts=2").expected


def test_models_without_attention_say_so() -> None:
    told = refused("mamba", "heads=3,hidden=40")
    assert "no attention" in told.expected and told.fix.endswith("is hidden=40")


def test_fewer_layers_need_calibration() -> None:
    with pytest.raises(WrongOrder, match="influence"):
        Pipeline([Cut(shape="layers=1")]).run(raised("llama"))


@pytest.mark.slow
def test_learned_gates_choose_the_shape(tmp_path: Path) -> None:
    program = raised("llama")
    given = [program.flatten_inputs((), inputs("llama", seed)) for seed in range(8)]
    step = Cut(shape="heads=4,kv_heads=2,ffn=48,hidden=40", importance="learned")
    made = Pipeline([step]).run(program, calibration=given)
    assert made.weights.shape("model.layers.1.mlp.up_proj.weight") == (48, 40)
    assert made.weights.shape("model.layers.0.self_attn.q_proj.weight") == (40, 40)


@pytest.mark.slow
def test_smollm2_becomes_the_shape_and_transformers_runs_it(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 67).reshape(2, 32)
    made = planish.optimize(
        smollm2_folder,
        (ids,),
        recipe="cut",
        options={"cut.shape": "layers=24,heads=6,ffn=1024,hidden=480"},
        calibration=[(ids,)],
    )
    folder = made.export(tmp_path / "cut", target="huggingface")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = loaded.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (24, 6)
    assert (config.num_key_value_heads, config.head_dim) == (2, 64)
    assert (config.intermediate_size, config.hidden_size) == (1024, 480)
    other = torch.arange(500, 545).reshape(3, 15)
    flat = made.program.flatten_inputs((other,), {})
    native = run(made.program, flat)[0]
    wide = run(made.program, flat, float64=True)[0]
    with torch.no_grad():
        theirs = loaded(other).logits
    assert (theirs - wide).norm() <= 8 * (native - wide).norm()
