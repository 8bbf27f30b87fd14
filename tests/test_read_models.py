"""Models read from disk: mapped, not copied; ties kept; equal to what was saved."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
import zoo
from planish.ir.example_inputs import example_inputs
from planish.ir.gguf_header import read_gguf_header
from planish.ir.read_exported import read_exported
from planish.ir.read_gguf import gguf_folder, read_gguf
from planish.ir.read_hf_folder import read_hf_folder
from planish.ir.read_safetensors import read_safetensors
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_MEASURE = """
import sys, time
import psutil, torch
from planish.ir.read_hf_folder import read_hf_folder
from planish.ir.read_safetensors import locate_tensors
import transformers.models.bert.modeling_bert, transformers.models.llama.modeling_llama
process = psutil.Process()
before, start = process.memory_info().rss, time.perf_counter()
model = read_hf_folder(sys.argv[1])
grown = process.memory_info().rss - before
seconds = time.perf_counter() - start
maps = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith(".safetensors")]
ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
stray = [
    name
    for name, p in model.named_parameters()
    if not any(start <= p.data_ptr() < stop for start, stop in ranges)
]
print(grown, seconds, sum(p.nbytes for p in model.parameters()), len(stray))
"""


def _measure(folder: Path) -> tuple[int, float, int, int]:
    """Bytes of memory grown, seconds, bytes of weights, weights that are not mapped."""
    command = [sys.executable, "-c", _MEASURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.home())
    grown, seconds, size, stray = done.stdout.split()[-4:]
    return int(grown), float(seconds), int(size), int(stray)


def _leaves(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, Tensor)]


def _assert_same(model: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> None:
    for mine, theirs in zip(_leaves(model, inputs), _leaves(other, inputs), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_a_real_folder_is_mapped_not_copied(minilm_folder: Path) -> None:
    grown, _, size, stray = _measure(minilm_folder)
    assert size > 90e6
    assert stray == 0
    assert grown < size / 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_a_real_gguf_file_loads_fast_and_mapped_from_the_cache(smollm2_folder: Path) -> None:
    grown, seconds, size, stray = _measure(smollm2_folder)
    assert size > 530e6
    assert stray == 0
    assert grown < size / 10
    assert seconds < 5  # 0.5 s on an idle core


def test_a_real_gguf_file_knows_a_fact(smollm2_gguf: Path, smollm2_folder: Path) -> None:
    start = time.perf_counter()
    assert gguf_folder(smollm2_gguf) == smollm2_folder
    assert time.perf_counter() - start < 1
    assert read_gguf_header(smollm2_gguf).tensors["token_embd.weight"] == (49152, 576)
    model = read_gguf(smollm2_gguf)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_tensors_equal_the_saved_ones_and_writing_leaves_the_file_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved = {
        "matrix": torch.randn(5, 7),
        "half": torch.randn(3, 2).to(torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "small": torch.randn(9).to(torch.float8_e4m3fn),
    }
    file = tmp_path / "model.safetensors"
    save_file(saved, file)
    read = read_safetensors(tmp_path)
    assert read.keys() == saved.keys()
    for name, tensor in saved.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        bytes_read = read[name].reshape(-1).view(torch.uint8)
        assert torch.equal(bytes_read, tensor.reshape(-1).view(torch.uint8))
        assert read[name].untyped_storage().nbytes() == tensor.nbytes
    read["matrix"].zero_()
    assert torch.equal(load_file(file)["matrix"], saved["matrix"])


def test_unaligned_tensors_are_read_right(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}'
    )
    values = np.array([1.5, -2.0], dtype="<f4").tobytes()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\1\2\3" + values)
    read = read_safetensors(file)
    assert read["a"].tolist() == [1, 2, 3]
    assert read["b"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("name", ["gemma", "gpt2", "t5", "mixtral", "deepseek_v3", "whisper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_read_back_equal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sample = zoo.build(name)
    model = sample.model.to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read = read_hf_folder(tmp_path, attention="sdpa")
    assert type(read) is type(model)
    assert not read.training
    assert read.config.use_cache is False
    stored = model.state_dict()
    assert read.state_dict().keys() == stored.keys()
    for key, value in read.state_dict().items():
        # A router's bias may be kept in float32 by the architecture's own wish.
        assert value.dtype in (dtype, torch.float32)
        assert torch.equal(value.to(stored[key].dtype), stored[key]), key
    assert next(read.parameters()).dtype == dtype
    if dtype == torch.float32:
        _assert_same(read, model, sample.kwargs)


@pytest.mark.parametrize("name", ["gemma", "gpt2", "t5"])
def test_ties_are_kept(name: str, tmp_path: Path) -> None:
    model = zoo.build(name).model
    model.save_pretrained(tmp_path)
    read = read_hf_folder(tmp_path)
    assert read.get_output_embeddings().weight is read.get_input_embeddings().weight
    assert len(list(read.parameters())) == len(list(model.parameters()))


def test_another_dtype_on_request(tmp_path: Path) -> None:
    sample = zoo.build("llama")
    sample.model.to(torch.float16).save_pretrained(tmp_path)
    read = read_hf_folder(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    assert torch.isfinite(_leaves(read, sample.kwargs)[0]).all()


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_example_inputs_run(name: str) -> None:
    sample = zoo.build(name, zoo.ARCHITECTURES[name].attentions[0], layers=1)
    inputs = example_inputs(sample.model)
    assert inputs.keys() == sample.kwargs.keys()
    assert all(len(value) == 2 for value in inputs.values())
    assert torch.isfinite(_leaves(sample.model, inputs)[0]).all()


def test_example_inputs_of_a_module_without_known_names() -> None:
    from planish.ir.errors import WrongInput

    with pytest.raises(WrongInput, match="no example inputs can be derived for Linear"):
        example_inputs(nn.Linear(3, 5))


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """The order in which GGUF keeps the rows of query and key projections."""
    out, width = weight.shape
    halves = weight.view(heads, 2, out // heads // 2, width)
    return halves.transpose(1, 2).reshape(out, width)


def write_tiny_gguf(file: Path) -> zoo.Sample:
    """A GGUF file of a one-layer model whose key heads are fewer than its query heads."""
    sample = zoo.build("llama", layers=1)
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        **sizes, intermediate_size=80, vocab_size=97, num_hidden_layers=1, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(48)
    writer.add_block_count(1)
    writer.add_feed_forward_length(80)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(97)
    block, names = "model.layers.0.", {"model.embed_tokens.weight": "token_embd.weight"}
    names |= {"model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    for letter in ("q", "k", "v"):
        names[f"{block}self_attn.{letter}_proj.weight"] = f"blk.0.attn_{letter}.weight"
    names[f"{block}self_attn.o_proj.weight"] = "blk.0.attn_output.weight"
    for part in ("gate", "up", "down"):
        names[f"{block}mlp.{part}_proj.weight"] = f"blk.0.ffn_{part}.weight"
    names[f"{block}input_layernorm.weight"] = "blk.0.attn_norm.weight"
    names[f"{block}post_attention_layernorm.weight"] = "blk.0.ffn_norm.weight"
    for key, value in model.state_dict().items():
        heads = 6 if ".q_proj" in key else 2 if ".k_proj" in key else 0
        writer.add_tensor(names[key], (_interleave(value, heads) if heads else value).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return zoo.Sample(**{**vars(sample), "model": model})


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    sample = write_tiny_gguf(file)
    header = read_gguf_header(file)
    assert header.architecture == "llama"
    assert header.tensors["blk.0.ffn_gate.weight"] == (80, 48)
    model = read_gguf(file)
    _assert_same(model, sample.model, sample.kwargs)
    folder = gguf_folder(file)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    read_gguf(file)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    file.touch()
    assert gguf_folder(file) != folder


def test_a_saved_program_is_read_back_equal(tmp_path: Path) -> None:
    sample = zoo.build("llama", layers=1)
    file = tmp_path / "program.pt2"
    with torch.no_grad():
        exported = torch.export.export(
            sample.model, (), sample.kwargs, dynamic_shapes=sample.dynamic_shapes
        )
    torch.export.save(exported, file)
    _assert_same(read_exported(file).module(), sample.model, sample.other_inputs())
