"""Exported ONNX models compute what their programs compute, and look as they should."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import captured
import numpy as np
import onnx
import pytest
import torch
import zoo
from onnx_checks import (
    assert_equal_to_rounding,
    domains,
    exported,
    graph_of,
    op_counts,
    run_exported,
)
from planish.api import optimize
from planish.codegen.onnx import build
from planish.codegen.onnx_builder import Options
from planish.codegen.run_onnx import OnnxModel
from planish.ir.capture import capture_module
from planish.ir.errors import SourceNotFound, UnsupportedByTarget, WrongInput
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.weights import Derived
from torch import Tensor, nn

_CASES = [
    pytest.param(
        name,
        attention,
        marks=() if attention == zoo.ARCHITECTURES[name].attentions[0] else pytest.mark.slow,
    )
    for name, attention in zoo.CASES
]


@pytest.mark.parametrize(("name", "attention"), _CASES)
def test_a_captured_architecture_equals_its_program_at_another_shape(
    name: str, attention: zoo.Attention, tmp_path: Path
) -> None:
    program, sample = captured.captured(name, attention), captured.sample(name, attention)
    flat = program.flatten_inputs((), sample.other_inputs())
    folder = exported(program, tmp_path / "out", profile="standard")
    assert domains(folder) == {""}
    assert_equal_to_rounding(program, folder, flat)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt_oss", "deepseek_v3", "t5"])
def test_an_optimized_architecture_equals_its_program_at_another_shape(
    name: str, tmp_path: Path
) -> None:
    attention = zoo.ARCHITECTURES[name].attentions[-1]
    sample = captured.sample(name, attention)
    program = optimize(captured.captured(name, attention), recipe="exact").program
    flat = program.flatten_inputs((), sample.other_inputs())
    assert_equal_to_rounding(program, exported(program, tmp_path / "out"), flat)


def test_semantic_operations_become_single_nodes(tmp_path: Path) -> None:
    program = optimize(captured.captured("llama"), recipe="exact").program
    counts = op_counts(exported(program, tmp_path / "out", profile="standard"))
    wanted = {"RMSNormalization": 5, "RotaryEmbedding": 4, "Attention": 2, "Softmax": 0}
    assert {name: counts[name] for name in wanted} == wanted


def test_a_real_encoder_equals_its_program(minilm_folder: Path, tmp_path: Path) -> None:
    from planish.api import trace

    program = trace(minilm_folder)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1000, 20000, (2, 23), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    known: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    flat = [known.get(spec.name, torch.zeros_like(ids)) for spec in program.input_specs]
    folder = exported(program, tmp_path / "out", metadata={"recipe": "none"})
    assert_equal_to_rounding(program, folder, flat)


class _Tied(nn.Module):
    """A table that is also the output matrix, and two layers in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(101, 24)
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)
        self.head = nn.Linear(24, 101, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.down(torch.relu(self.up(self.table(ids))))
        return {"logits": self.head(hidden), "hidden": hidden}


@pytest.fixture(scope="module")
def tied() -> Program:
    program = capture_module(_Tied(), (torch.randint(0, 101, (2, 7)),))
    program.metadata["source"] = "tied"
    return program


def test_inputs_and_outputs_have_names_and_free_axes(tied: Program, tmp_path: Path) -> None:
    graph = graph_of(exported(tied, tmp_path / "out"))
    (ids,) = graph.input
    axes = [dim.dim_param or dim.dim_value for dim in ids.type.tensor_type.shape.dim]
    assert (ids.name, axes) == ("ids", ["batch", "length"])
    assert [value.name for value in graph.output] == ["logits", "hidden"]


def test_nodes_carry_the_program_s_names_and_modules(tied: Program, tmp_path: Path) -> None:
    graph = graph_of(exported(tied, tmp_path / "out"))
    product = next(node for node in graph.node if "up.weight.transposed" in node.input)
    added = next(node for node in graph.node if "up.bias" in node.input)
    assert [list(product.output), list(added.output)] == [["up/MatMul"], ["up"]]
    assert {p.key: p.value for p in added.metadata_props} == {"source_module": "up"}


def test_a_tied_weight_is_stored_once(tied: Program, tmp_path: Path) -> None:
    folder = exported(tied, tmp_path / "out")
    stored = [tensor.name for tensor in graph_of(folder).initializer if "weight" in tensor.name]
    assert sorted(stored) == ["down.weight.transposed", "table.weight", "up.weight.transposed"]
    assert (folder / "model.onnx.data").stat().st_size <= tied.nbytes()


def test_properties_tell_recipe_history_and_version(tied: Program, tmp_path: Path) -> None:
    folder = exported(tied, tmp_path / "out", metadata={"recipe": "mine", "options": {"a": 1}})
    told = OnnxModel(folder).metadata
    assert told["planish.recipe"] == "mine"
    assert json.loads(told["planish.options"]) == {"a": 1}
    assert json.loads(told["planish.history"]) == tied.history.to_json()
    assert told["planish.version"] and told["planish.activations"] == "float"


def test_weights_are_computed_one_at_a_time_while_they_are_written(tied: Program) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def compute(weight: Tensor) -> Tensor:
        nonlocal most
        made = weight.clone()
        most = max(most, 1 + sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(made))
        return made

    program = tied.copy()
    names = ["table.weight", "up.weight", "down.weight"]
    for name in names:
        weight = program.weights[name]
        derived = Derived((weight,), compute, weight.shape, weight.dtype, "copied")
        program.weights[name] = derived
    model = build(program, Options(), {})
    assert alive == []
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value.tobytes()
    assert (len(alive), most) == (len(names), 1)


class _Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_operation_without_translation_is_named(tmp_path: Path) -> None:
    program = capture_module(_Unknown(), (torch.randn(3, 5),))
    with pytest.raises(UnsupportedByTarget, match="special_bessel_j0") as told:
        exported(program, tmp_path / "out")
    assert "%special_bessel_j0 in the root module" in told.value.where
    assert not (tmp_path / "out").exists()


class _Bfloat16(nn.Module):
    """Arithmetic for which onnxruntime has no bfloat16 kernels."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.bfloat16()
        return torch.cat([half * 3 + 1, half.cumsum(1)], 1).softmax(-1).float()


def test_bfloat16_is_rounded_as_in_the_program(tmp_path: Path) -> None:
    inputs = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),)
    program = capture_module(_Bfloat16(), inputs)
    folder = exported(program, tmp_path / "out")
    found, wanted = run_exported(program, folder, inputs)[0], run(program, inputs)[0]
    # Both round each step to 8 bits; a last bit of float32 may tip one rounding.
    assert torch.allclose(found, wanted, rtol=2**-7, atol=0)


class _Sizes(nn.Module):
    """Sizes that only arithmetic on other sizes gives."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, length = x.shape
        joined = torch.cat([x, x[:, : length // 2]], 1)
        counted = torch.arange(2 * rows + length, dtype=torch.float32)
        return joined.reshape(-1), counted, x.new_full((rows, length - 1), rows * 0.5)


def test_sizes_follow_the_inputs(tmp_path: Path) -> None:
    free = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = capture_module(_Sizes(), (torch.randn(3, 6),), dynamic_shapes=free)
    folder = exported(program, tmp_path / "out")
    for shape in ((2, 9), (5, 4)):
        flat = [torch.randn(*shape)]
        for ours, theirs in zip(
            run_exported(program, folder, flat), run(program, flat), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_the_callable_takes_arrays_and_refuses_what_does_not_fit(
    tied: Program, tmp_path: Path
) -> None:
    model = OnnxModel(exported(tied, tmp_path / "out"))
    ids = np.zeros((2, 3), np.int64)
    assert isinstance(model(ids)["logits"], np.ndarray)
    assert isinstance(model(ids=torch.from_numpy(ids))["logits"], Tensor)
    for args, kwargs in (((), {}), ((ids, ids), {}), ((ids,), {"ids": ids}), ((), {"other": ids})):
        wrong: dict[str, Any] = dict(kwargs)
        with pytest.raises(WrongInput, match="do not fit the exported model"):
            model(*args, **wrong)
    with pytest.raises(SourceNotFound, match="no exported ONNX model"):
        OnnxModel(tmp_path / "missing")


def test_the_model_says_which_operators_it_needs(tied: Program, tmp_path: Path) -> None:
    model = onnx.load(exported(tied, tmp_path / "out") / "model.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 23}
    assert model.producer_name == "planish"
