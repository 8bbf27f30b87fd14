"""Quantized checkpoints: what is written is read again with the same codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import planish
import pytest
import torch
import transformers
from planish.codegen.target import export_program
from planish.ir.encoded import Encoded
from planish.ir.errors import UnsupportedByTarget, UnsupportedCheckpoint
from planish.ir.formats import parse_format
from planish.ir.layout_gptq import GptqLayout
from planish.ir.program import Program
from planish.ir.quantized_checkpoint import read_quantized_folder
from planish.ir.read_safetensors import read_safetensors
from safetensors.torch import save_file
from tiny_checkpoints import assert_same_codes, dense_llama, encoded_weights, quantized
from torch import Tensor
from transformers.integrations.bitnet import pack_weights

_IDS = torch.arange(22).reshape(2, 11)
_CASES = {
    "gptq": ("int4-g32-sym-f16", {}),
    "gptq-asym": ("int4-g32-asym-f16", {}),
    "gptq-old": ("int4-g32-asym-f16", {"checkpoint_format": "gptq"}),
    "gptq-3": ("int3-channel-asym-f16", {}),
    "gptq-8": ("int8-g32-sym-full-f16", {}),
    "awq": ("int4-g32-asym-f16", {}),
    "awq-sym": ("int4-channel-sym-f16", {}),
    "compressed-tensors": ("int4-g32-sym-f16", {}),
    "compressed-tensors-asym": ("int4-g32-asym-f16", {}),
    "compressed-tensors-5": ("int5-channel-asym-f32", {}),
    "compressed-tensors-fp8": ("fp8-e4m3-channel", {"activations": "fp8"}),
    "compressed-tensors-fp8-tensor": ("fp8-e4m3-tensor-f16", {}),
    "compressed-tensors-w8a8": ("int8-channel-sym-f32", {"activations": "int8"}),
}


@pytest.fixture
def dense() -> Program:
    return dense_llama()


@pytest.mark.parametrize("case", _CASES)
def test_what_is_written_is_read_with_the_same_codes(
    case: str, dense: Program, tmp_path: Path
) -> None:
    fmt, options = _CASES[case]
    target = next(name for name in ("compressed-tensors", "gptq", "awq") if case.startswith(name))
    program = quantized(dense, fmt)
    folder = export_program(program, tmp_path / "out", target, options=options)
    read = read_quantized_folder(folder)
    mine = encoded_weights(program)
    assert read.entries.keys() == mine.keys() and len(mine) == 14
    for name, entry in mine.items():
        assert_same_codes(entry, read.entries[name])
    assert {file.name for file in folder.iterdir()} >= {"tokenizer.json", "config.json"}
    state = read.module.state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(state[name], dense.weights[name])


def test_a_checkpoint_computes_what_the_program_computed(dense: Program, tmp_path: Path) -> None:
    program = quantized(dense, "int4-g32-asym-f16")
    folder = export_program(program, tmp_path / "out", "gptq")
    read = planish.trace(folder)
    assert "dense_weights" not in read.facts and "quantized" in read.facts
    inputs = {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS)}
    assert torch.equal(read(**inputs).logits, program(**inputs).logits)
    exact = planish.optimize(read, recipe="exact")
    fused = encoded_weights(exact.program)
    assert {len(entry.shape) for entry in fused.values()} == {2} and len(fused) == 8
    again = export_program(exact.program, tmp_path / "again", "awq")
    for name, entry in read_quantized_folder(again).entries.items():
        assert_same_codes(entry, encoded_weights(program)[name])


def test_shards_have_an_index(dense: Program, tmp_path: Path) -> None:
    program = quantized(dense, "int4-g32-sym-f16")
    folder = export_program(program, tmp_path / "out", "gptq", options={"shard_gb": "0.00005"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in read_safetensors(folder).values()
    )
    assert len(read_quantized_folder(folder).entries) == 14


def test_layers_may_differ(dense: Program, tmp_path: Path) -> None:
    """Other bits for one layer and none for another; each format says so in its own words."""
    program = quantized(dense, "int4-g32-sym-f16")
    names = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight")
    program.weights[names[0]] = parse_format("int8-g32-asym-f16").encode(dense.weights[names[0]])
    program.weights[names[1]] = dense.weights[names[1]]
    for target in ("gptq", "compressed-tensors"):
        folder = export_program(program, tmp_path / target, target)
        read = read_quantized_folder(folder)
        assert read.entries.keys() == encoded_weights(program).keys()
        for name, entry in read.entries.items():
            assert_same_codes(entry, encoded_weights(program)[name])
    with pytest.raises(UnsupportedByTarget, match="target awq cannot hold the codes of model"):
        export_program(program, tmp_path / "awq", "awq")
    settings = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert settings["dynamic"] == {
        "+:^model\\.layers\\.0\\.mlp\\.down_proj$": {"bits": 8, "group_size": 32},
        "-:^model\\.layers\\.1\\.self_attn\\.k_proj$": {},
    }


def test_groups_in_the_order_of_activations_are_kept(dense: Program, tmp_path: Path) -> None:
    """g_idx of GPTQ's act-order: the groups of a layer hold columns that lie apart."""
    folder = export_program(quantized(dense, "int4-g32-asym-f16"), tmp_path / "out", "gptq")
    tensors = read_safetensors(folder)
    order: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("g_idx"):
            shuffled = tensor[torch.randperm(tensor.numel())].contiguous()
            tensors[name] = order[name[:-6]] = shuffled
    save_file(tensors, folder / "model.safetensors")
    read = read_quantized_folder(folder)
    for name, entry in read.entries.items():
        layer = name.removesuffix(".weight")
        plain = read_quantized_folder  # the values by hand, from the file's own tensors
        assert plain is not None and entry.format.name.endswith("-ordered")
        codes, zeros, scale = entry.codes().double(), entry.zero_point, entry.scale.double()
        assert zeros is not None
        group = order[layer].long()
        byhand = (codes - zeros.double()[:, group]) * scale[:, group]
        assert torch.equal(entry.decode(torch.float64), byhand)
    program = planish.trace(folder)
    again = export_program(program, tmp_path / "again", "gptq")
    rewritten = read_safetensors(again)
    for name, tensor in tensors.items():
        assert torch.equal(rewritten[name], tensor), name


def test_a_tied_head_is_told_to_be_dense(dense: Program, tmp_path: Path) -> None:
    program = quantized(dense, "int4-g32-sym-f16")
    for target, key in (("awq", "modules_to_not_convert"), ("compressed-tensors", "ignore")):
        folder = export_program(program, tmp_path / target, target)
        settings = json.loads((folder / "config.json").read_text())
        assert settings["quantization_config"][key] == ["lm_head"]
        assert settings["tie_word_embeddings"] is True


def test_a_head_that_a_pass_untied_is_written(dense: Program, tmp_path: Path) -> None:
    program = quantized(dense, "int4-g32-sym-f16")
    head = dense.weights["model.embed_tokens.weight"] * 2
    program.weights.aliases.pop("lm_head.weight")
    program.weights["lm_head.weight"] = head
    folder = export_program(program, tmp_path / "out", "compressed-tensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(read_quantized_folder(folder).module.state_dict()["lm_head.weight"], head)


def test_tensors_may_be_written_in_half_precision(dense: Program, tmp_path: Path) -> None:
    program = quantized(dense, "int4-g32-sym-f32")
    folder = export_program(program, tmp_path / "out", "gptq", options={"dtype": "float16"})
    kinds = {tensor.dtype for tensor in read_safetensors(folder).values()}
    assert kinds == {torch.int32, torch.float16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_convolutions_of_one_are_kept_as_the_model_has_them(tmp_path: Path) -> None:
    """GPT-2 keeps its weights [in, out]; the codes lie along the inputs all the same."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=101, n_embd=96, n_inner=160, n_layer=1, n_head=4, n_positions=32
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    program = planish.trace(tmp_path / "dense")
    for name in list(program.weights):
        if ".c_" in name and name.endswith("weight"):
            fmt = parse_format("int4-g32-asym-f16")
            program.weights[name] = fmt.encode(program.weights[name], -2)
    folder = export_program(program, tmp_path / "out", "gptq")
    read = read_quantized_folder(folder)
    mine = encoded_weights(program)
    assert len(mine) == 4 and read.entries.keys() == mine.keys()
    for name, entry in mine.items():
        assert entry.axis == -2
        assert_same_codes(entry, read.entries[name])


def test_blocks_of_float8_are_read(dense: Program, tmp_path: Path) -> None:
    """Fine-grained fp8: a scale for each block of 32 outputs by 32 inputs."""
    folder = _folder_of(dense, tmp_path)
    tensors = dict(read_safetensors(folder))
    expected: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, length = tensors[name].shape
        codes = (40 * tensors.pop(name)).to(torch.float8_e4m3fn)
        scale = torch.rand(rows // 32, length // 32)
        tensors |= {name: codes, f"{name}_scale_inv": scale}
        spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        expected[name] = codes.float() * spread
    save_file(tensors, folder / "model.safetensors")
    _tell(folder, quant_method="fp8", weight_block_size=[32, 32])
    read = read_quantized_folder(folder)
    assert read.entries.keys() == expected.keys()
    for name, entry in read.entries.items():
        assert entry.format.name == "fp8-e4m3-g32" and torch.equal(entry.decode(), expected[name])


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_bitnet_weights_are_read(kind: str, dense: Program, tmp_path: Path) -> None:
    folder = _folder_of(dense, tmp_path)
    tensors = dict(read_safetensors(folder))
    expected: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        ternary = (40 * tensors.pop(name)).round().clamp(-1, 1)
        scale = torch.rand(1) + 0.5
        tensors |= {name: pack_weights(ternary.clone()), f"{name}_scale": scale}
        expected[name] = ternary * (1 / scale if kind == "bitlinear" else scale)
    save_file(tensors, folder / "model.safetensors")
    _tell(folder, quant_method="bitnet", linear_class=kind)
    read = read_quantized_folder(folder)
    assert read.entries.keys() == expected.keys()
    for name, entry in read.entries.items():
        assert entry.format.name == "ternary-tensor"
        assert torch.equal(entry.decode(), expected[name])
    _tell(folder, quant_method="bitnet", use_rms_norm=True)
    with pytest.raises(UnsupportedCheckpoint, match="use_rms_norm"):
        read_quantized_folder(folder)


def _folder_of(dense: Program, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense.metadata["origin"], tmp_path / "changed"))


def _tell(folder: Path, **how: object) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = how
    (folder / "config.json").write_text(json.dumps(settings))


def test_experts_are_put_together_from_their_files(tmp_path: Path) -> None:
    """A checkpoint has one layer an expert and projection; the model has them stacked."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=101,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "dense")
    fmt, state = parse_format("int4-g32-asym-f16"), read_safetensors(tmp_path / "dense")
    stored: dict[str, Tensor] = {}
    codes: dict[str, Encoded] = {}
    for name, tensor in state.items():
        if ".experts." in name:
            codes[name] = fmt.encode(tensor)
            stored |= _as_gptq(name.removesuffix(".weight"), codes[name])
        else:
            stored[name] = tensor
    folder = tmp_path / "out"
    shutil.copytree(tmp_path / "dense", folder)
    save_file(stored, folder / "model.safetensors")
    _tell(folder, quant_method="gptq", bits=4, group_size=32)
    read = read_quantized_folder(folder)
    prefix = "model.layers.0.mlp.experts"
    assert set(read.entries) == {f"{prefix}.gate_up_proj", f"{prefix}.down_proj"}
    for expert in range(3):
        parts = {
            kind: codes[f"model.layers.0.block_sparse_moe.experts.{expert}.{kind}.weight"].decode()
            for kind in ("w1", "w2", "w3")
        }
        both = torch.cat([parts["w1"], parts["w3"]])
        assert torch.equal(read.entries[f"{prefix}.gate_up_proj"].decode()[expert], both)
        assert torch.equal(read.entries[f"{prefix}.down_proj"].decode()[expert], parts["w2"])


def _as_gptq(layer: str, entry: Encoded) -> dict[str, Tensor]:
    layout, zeros = GptqLayout(4, 1), entry.zero_point
    assert zeros is not None
    return {
        f"{layer}.qweight": layout.pack(entry.codes()),
        f"{layer}.qzeros": layout.pack_zero_points(zeros),
        f"{layer}.scales": entry.scale.t().contiguous(),
    }


def test_fused_weights_are_taken_apart(dense: Program, tmp_path: Path) -> None:
    options = {"quantize_weights.scale_dtype": "float16"}
    done = planish.optimize(dense, recipe="int4", options=options)
    folder = done.export(tmp_path / "out", target="awq")
    manifest = json.loads((folder / "planish.json").read_text())
    assert manifest["checkpoint"]["quantized_layers"] == 14
    assert manifest["checkpoint"]["decoded"] == ["model.embed_tokens.weight"]
    read = read_quantized_folder(folder).entries
    fused = [name for name in done.program.weights if "+" in name]
    assert len(fused) == 4
    for name in fused:
        layer, joined, ending = name.rsplit(".", 2)
        parts = [read[f"{layer}.{part}.{ending}"] for part in joined.split("+")]
        whole = encoded_weights(done.program)[name]
        assert torch.equal(torch.cat([part.codes() for part in parts]), whole.codes())
        assert torch.equal(torch.cat([part.decode() for part in parts]), whole.decode())
