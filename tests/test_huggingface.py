"""A program as a plain model folder: the configuration is found from the weights' shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import planish
import pytest
import torch
import transformers
import zoo
from planish.api import trace
from planish.codegen.target import export_program
from planish.ir.errors import UnsupportedByTarget
from planish.ir.program import Program
from planish.ir.read_hf_folder import read_hf_folder
from planish.recipes import pipeline

_SMALLER: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
    },
    "qwen2": {"intermediate_size": 72, "num_attention_heads": 4},
    "gemma2": {"intermediate_size": 24, "hidden_size": 36},
    "gpt2": {"n_inner": 64},
    "bert": {"intermediate_size": 40},
    "mixtral": {"intermediate_size": 64},
    "phi3": {"intermediate_size": 33},
    "whisper": {"encoder_ffn_dim": 48, "decoder_ffn_dim": 40},
}


def smaller(name: str, **sizes: Any) -> tuple[Program, transformers.PreTrainedModel]:
    """A program whose weights are smaller than the configuration that it remembers says."""
    sample = zoo.build(name, "eager")
    config = sample.model.config
    small = type(config).from_dict({**config.to_dict(), **sizes})
    torch.manual_seed(0)
    model = type(sample.model)._from_config(small, attn_implementation="eager").eval()
    if name == "mixtral":
        model.set_experts_implementation("batched_mm")
    program = trace(model, sample.args, sample.kwargs)
    large = json.loads(config.to_json_string(use_diff=False))
    large["architectures"] = [type(sample.model).__name__]
    program.metadata["model_config"] = json.dumps(large)
    return program, model


@pytest.mark.parametrize("name", _SMALLER)
def test_the_configuration_follows_from_the_shapes(name: str, tmp_path: Path) -> None:
    program, model = smaller(name, **_SMALLER[name])
    # whisper's positions are a weight of its class that folding makes a constant
    fused = pipeline("raise" if name == "whisper" else "exact").run(program)
    folder = export_program(fused, tmp_path / "out", "huggingface")
    written = json.loads((folder / "config.json").read_text())
    assert {key: written[key] for key in _SMALLER[name]} == _SMALLER[name]
    loaded = read_hf_folder(folder).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded[key], tensor), key


def test_dropped_layers_leave_no_gap(tmp_path: Path) -> None:
    sample = zoo.build("gemma2", "eager")
    config = sample.model.config
    deep = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 4, "layer_types": None})
    torch.manual_seed(0)
    model = type(sample.model)._from_config(deep, attn_implementation="eager").eval()
    program = trace(model, sample.args, sample.kwargs)
    kept = type(sample.model)._from_config(deep, attn_implementation="eager").eval()
    kept.load_state_dict(model.state_dict())
    kept.model.layers = torch.nn.ModuleList(kept.model.layers[i] for i in (0, 3))
    kept.config.num_hidden_layers = 2
    cut = trace(kept, sample.args, sample.kwargs)
    new = {f"model.layers.{old}.": f"model.layers.{at}." for at, old in enumerate((0, 3))}
    for node in cut.weight_nodes():  # what is left keeps the names it had
        name = str(node.target)
        if name.startswith("model.layers.1."):
            node.target = name.replace("layers.1.", "layers.3.")
            cut.weights[node.target] = cut.weights[name]
            del cut.weights[name]
    cut.metadata["model_config"] = program.metadata["model_config"]
    folder = export_program(cut, tmp_path / "out", "huggingface")
    written = json.loads((folder / "config.json").read_text())
    assert written["num_hidden_layers"] == 2
    assert written["layer_types"] == [deep.layer_types[i] for i in (0, 3)]
    loaded = read_hf_folder(folder).state_dict()
    for old, at in new.items():
        for key, tensor in model.state_dict().items():
            if key.startswith(old):
                assert torch.equal(loaded[at + key.removeprefix(old)], tensor)


def test_layers_of_different_sizes_are_no_configuration(tmp_path: Path) -> None:
    program, _ = smaller("llama")
    for name in list(program.weights):
        if name.startswith("model.layers.1.mlp"):
            axis = 1 if "down" in name else 0
            program.weights[name] = program.weights[name].narrow(axis, 0, 64)
    with pytest.raises(UnsupportedByTarget) as raised:
        export_program(program, tmp_path / "out", "huggingface")
    assert "no configuration of the model's class has these shapes" in str(raised.value)
    assert "model.layers" in str(raised.value) and "mlp" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_what_the_class_does_not_compute_is_refused(tmp_path: Path) -> None:
    program, _ = smaller("llama")
    target = next(n for n in program.graph.nodes if n.target is torch.ops.aten.silu.default)
    target.target = torch.ops.aten.relu.default
    with pytest.raises(UnsupportedByTarget, match="computes something else"):
        export_program(program, tmp_path / "out", "huggingface")
    assert not (tmp_path / "out").exists()


def test_a_program_that_names_no_model_is_refused(tmp_path: Path) -> None:
    program = planish.trace(torch.nn.Linear(3, 5), (torch.randn(2, 3),))
    with pytest.raises(UnsupportedByTarget, match="does not know of which model"):
        export_program(program, tmp_path / "out", "huggingface")
