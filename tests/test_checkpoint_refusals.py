"""Checkpoints that are damaged, of other kinds, or that a program cannot be: refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planish
import pytest
import torch
from planish.codegen.target import export_program
from planish.ir.errors import (
    MissingTensor,
    PlanishError,
    TensorMismatch,
    UnsupportedByTarget,
    UnsupportedCheckpoint,
)
from planish.ir.program import Program
from planish.ir.quantized_checkpoint import read_quantized_folder
from planish.ir.read_safetensors import read_safetensors
from safetensors.torch import save_file
from tiny_checkpoints import dense_llama, quantized, tiny_llama
from torch import Tensor


@pytest.fixture
def dense() -> Program:
    return dense_llama()


def _changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(folder).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


_DAMAGES: dict[str, tuple[str, str, type[PlanishError], str]] = {
    "no scales": ("gptq", "scales", MissingTensor, "lacks model.layers.0.mlp.down_proj.scales"),
    "no zeros": ("awq", "qzeros", MissingTensor, "lacks model.layers.0.mlp.down_proj.qzeros"),
    "no shape": (
        "compressed-tensors",
        "weight_shape",
        MissingTensor,
        "lacks model.layers.0.mlp.down_proj.weight_shape",
    ),
    "short zeros": ("gptq", "qzeros", TensorMismatch, "qzeros does not fit"),
    "short scales": ("awq", "scales", TensorMismatch, "scales does not fit"),
    "short codes": ("compressed-tensors", "weight_packed", TensorMismatch, "weight_packed"),
    "short groups": ("gptq", "g_idx", TensorMismatch, "does not fit"),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_layers_are_refused_by_name(damage: str, dense: Program, tmp_path: Path) -> None:
    target, ending, error, message = _DAMAGES[damage]
    folder = export_program(quantized(dense, "int4-g32-asym-f16"), tmp_path / "out", target)
    name = f"model.layers.0.mlp.down_proj.{ending}"

    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(name)
        if damage.startswith("short"):
            tensors[name] = tensor[..., :-1].contiguous()

    _changed(folder, change)
    with pytest.raises(error, match=message.replace(".", r"\.")):
        read_quantized_folder(folder)


def _retold(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(settings))


def test_other_methods_and_kinds_are_refused(dense: Program, tmp_path: Path) -> None:
    folder = export_program(quantized(dense, "int4-g32-asym-f16"), tmp_path / "out", "gptq")
    for changes, found in (
        ({"quant_method": "aqlm"}, "already quantized .aqlm."),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "version gemv"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
    ):
        _retold(folder, **changes)
        with pytest.raises(UnsupportedCheckpoint, match=found):
            planish.trace(folder)


def test_a_bias_without_a_place_must_be_zero(dense: Program, tmp_path: Path) -> None:
    folder = export_program(quantized(dense, "int4-g32-asym-f16"), tmp_path / "out", "gptq")
    name = "model.layers.1.self_attn.q_proj.bias"
    _changed(folder, lambda tensors: tensors.update({name: torch.zeros(128)}))
    read_quantized_folder(folder)
    _changed(folder, lambda tensors: tensors.update({name: torch.ones(128)}))
    with pytest.raises(TensorMismatch, match=f"a tensor {name} that the model has no place for"):
        read_quantized_folder(folder)


def test_programs_that_are_no_checkpoint_are_refused(dense: Program, tmp_path: Path) -> None:
    def refuse(program: Program, message: str, **options: str) -> None:
        with pytest.raises(UnsupportedByTarget, match=message):
            export_program(program, tmp_path / "out", "gptq", options=options)
        assert not (tmp_path / "out").exists()

    refuse(dense, "no matrix of this program is quantized")
    refuse(quantized(dense, "int5-g32-sym"), "cannot hold the codes of model.layers.0")
    lost = quantized(dense, "int4-g32-sym")
    lost.metadata.pop("origin")
    refuse(lost, "does not know of which model")
    refuse(lost, "does not know of which model", source=str(tmp_path / "nowhere"))
    other = tiny_llama(tmp_path / "other", num_hidden_layers=3, num_key_value_heads=4)
    refuse(lost, "k_proj.weight is", source=str(other))
