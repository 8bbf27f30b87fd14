"""The recipes named after the field's methods: each runs whole, and both targets compute it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from captured import captured
from planish import Optimized, optimize
from planish.codegen.run_onnx import OnnxModel
from planish.codegen.torch_cpu import lower
from planish.ir.encoded import Encoded
from planish.ir.errors import UnknownOption, WrongOrder
from planish.ir.interpret import run
from planish.recipes import find_recipe
from torch import Tensor

CALIBRATED = ("gptq4", "gptq3", "awq4", "smooth-w8a8", "smooth-w8a8-static")
METHODS = (
    *CALIBRATED,
    "rtn4",
    "hqq4",
    "nf4",
    "mxfp4",
    "fp8",
    "int8",
    "llm-int8",
    "ternary",
    "zeroquant",
    "q4k",
)
EIGHT_BITS = ("fp8", "int8", "smooth-w8a8", "smooth-w8a8-static", "zeroquant", "llm-int8")


def batches() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 19, dtype=torch.int64)
    ids = [torch.randint(3, 97, (2, 19), generator=random) for _ in range(6)]
    return [{"input_ids": i, "attention_mask": mask} for i in ids]


@functools.cache
def optimized(name: str) -> Optimized:
    steps = find_recipe(name).passes()
    short = any("remainder" in step.options() for step in steps)
    options = {"remainder": "short"} if short else {}
    calibration = batches() if name in CALIBRATED else None
    return optimize(captured("llama"), recipe=name, calibration=calibration, options=options)


def distance(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", METHODS)
def test_every_linear_layer_is_quantized_and_the_logits_stay_near(name: str) -> None:
    program = optimized(name).program
    assert "quantized" in program.facts
    kept = [n for n in program.weights if isinstance(program.weights.entry(n), Encoded)]
    rows = sum(program.weights.shape(n)[0] for n in kept if ".layers." in n)
    assert rows == 2 * (60 + 20 + 20 + 48 + 80 + 80 + 48)
    if name == "ternary":
        return  # it destroys a model that was not trained for it, and must only run
    # Logits of zero are at distance 1; eight bits must be nearer than four rounded ones.
    assert 0 < error_of(name) < (error_of("rtn4") if name in EIGHT_BITS else 1)


def error_of(name: str) -> float:
    """Relative distance of the logits to those of the float model, in float64."""
    flat = list(captured("llama").examples)
    reference = run(captured("llama"), flat, float64=True)[0]
    return distance(run(optimized(name).program, flat)[0], reference)


@pytest.mark.parametrize("name", METHODS)
def test_both_targets_compute_the_program(name: str, tmp_path: Path) -> None:
    done = optimized(name)
    flat = list(done.program.examples)
    wide = run(done.program, flat, float64=True)[0]
    own = distance(run(done.program, flat)[0], wide)
    module = lower(done.program)
    assert distance(module(*flat)[0], wide) <= 8 * own
    assert module.meta["choices"]
    done.export(tmp_path / "out", target="onnx")
    named = {node.name: value for node, value in zip(done.program.inputs, flat, strict=True)}
    logits = torch.as_tensor(OnnxModel(tmp_path / "out")(**named)["logits"])
    assert distance(logits, wide) <= 8 * own


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_method_that_calibrates_says_so_before_anything_runs(name: str) -> None:
    with pytest.raises(WrongOrder, match="needs calibration batches"):
        optimize(captured("llama"), recipe=name)


def test_gptq_is_nearer_than_rounding() -> None:
    flat = batches()
    program = captured("llama")
    errors: dict[str, float] = {}
    for name in ("rtn4", "gptq4"):
        done = optimized(name).program
        pairs = [(program.flatten_inputs((), b), b) for b in flat]
        errors[name] = sum(
            distance(run(done, given)[0], run(program, given, float64=True)[0])
            for given, _ in pairs
        )
    assert errors["gptq4"] < errors["rtn4"]


def test_overrides_reach_single_layers_and_unknown_ones_are_named() -> None:
    options = {"remainder": "short", "overrides": "model.layers.0.mlp.down_proj=int8-g16-sym"}
    done = optimize(captured("llama"), recipe="rtn4", options=options)
    entry = done.program.weights.entry("model.layers.0.mlp.down_proj.weight")
    assert isinstance(entry, Encoded)
    assert entry.format.name == "int8-g16-sym"
    with pytest.raises(UnknownOption, match="did you mean"):
        wrong = {"remainder": "short", "overrides": "model.layers.0.mlp.down_prj=int8-g16-sym"}
        optimize(captured("llama"), recipe="rtn4", options=wrong)
