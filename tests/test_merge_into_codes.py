"""Adapters merged into weights that are kept in number formats."""

from __future__ import annotations

import copy
from pathlib import Path

import captured
import peft
import planish
import pytest
import torch
from planish.ir.encoded import Encoded
from planish.passes.merge_adapters import MergeAdapters
from planish.passes.merge_into_codes import AdapterLost, MergeIntoCodes
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights

_NAME = "model.layers.0.self_attn.q_proj.weight"


def adapter(folder: Path, size: float, name: str = "llama") -> str:
    torch.manual_seed(3)
    model = copy.deepcopy(captured.sample(name, "eager").model)
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data = size**0.5 * torch.randn(parameter.shape)
    adapted.save_pretrained(folder)
    return str(folder)


def coded(fmt: str):
    return Pipeline([QuantizeWeights(format=fmt, remainder="short")]).run(
        captured.captured("llama", "eager")
    )


@pytest.mark.parametrize("fmt", ["int8-channel-sym", "int4-g16-sym", "int4-g20-asym", "nf4"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_change_survives_in_the_same_format(fmt: str, calibrated: bool, tmp_path: Path) -> None:
    base = coded(fmt)
    folder = adapter(tmp_path, 0.2)
    batches = [list(base.flatten_inputs((), _inputs(seed))) for seed in range(6)]
    step = MergeIntoCodes(adapters=folder)
    made = Pipeline([step]).run(base, calibration=batches if calibrated else [])
    entry = made.weights.entry(_NAME)
    assert isinstance(entry, Encoded) and entry.format.name == base.weights.entry(_NAME).format.name
    # the same merge with decoded weights
    decoded = base.copy()
    for name in list(decoded.weights):
        decoded.weights[name] = decoded.weights[name].clone()
    decoded.facts |= {"dense_weights"}
    exact = Pipeline([MergeAdapters(adapters=folder)]).run(decoded)
    change = exact.weights[_NAME] - base.weights[_NAME]
    error = made.weights[_NAME] - exact.weights[_NAME]
    measured = made.history.records[-1].measured[-1]
    assert error.norm() < change.norm()
    assert "survival" in measured.measure and measured.after > 3
    plain = entry.format.encode(exact.weights[_NAME], entry.axis).decode() - exact.weights[_NAME]
    if not calibrated:  # then the weights alone count; compared in float64, summed here in float32
        assert error.norm() <= plain.norm() * (1 + 1e-6)
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert made.weights.entry(untouched) is base.weights.entry(untouched)


def _inputs(seed: int) -> dict[str, torch.Tensor]:
    return captured.sample("llama", "eager").other_inputs(4, 17, seed)


def test_an_adapter_that_rounding_would_lose_is_refused(tmp_path: Path) -> None:
    base, folder = coded("int4-g16-sym"), adapter(tmp_path, 1e-4)
    with pytest.raises(AdapterLost) as raised:
        Pipeline([MergeIntoCodes(adapters=folder)]).run(base)
    assert "at least 3 dB" in str(raised.value) and _NAME in str(raised.value)
    assert "serve_adapters" in str(raised.value)
    forced = Pipeline([MergeIntoCodes(adapters=folder, force=True)]).run(base)
    assert forced.history.records[-1].measured[-1].after < 3


def test_dense_weights_are_merged_as_ever(tmp_path: Path) -> None:
    base, folder = captured.captured("llama", "eager"), adapter(tmp_path, 0.1)
    one = Pipeline([MergeIntoCodes(adapters=folder)]).run(base)
    other = Pipeline([MergeAdapters(adapters=folder)]).run(base)
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in base.weights)


def test_optimize_merges_into_a_quantized_program(tmp_path: Path) -> None:
    base, folder = coded("int8-channel-sym"), adapter(tmp_path, 0.1)
    made = planish.optimize(base, recipe="raise", adapters=[folder]).program
    assert [record.name for record in made.history.records][1] == "merge_into_codes"
    assert isinstance(made.weights.entry(_NAME), Encoded)
