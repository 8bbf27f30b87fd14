"""GGUF files kept code by code: the values that converting gives, and the same bytes written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import planish
import pytest
import tokenizers
import torch
from planish.codegen.target import export_program
from planish.ir.encoded import Encoded
from planish.ir.errors import UnsupportedByTarget
from planish.ir.formats import parse_format
from planish.ir.gguf_header import read_gguf_header
from planish.ir.program import Program
from planish.ir.read_gguf import gguf_folder
from planish.ir.read_gguf_codes import read_gguf_codes
from planish.ir.read_safetensors import read_safetensors
from tiny_checkpoints import dense_llama, tiny_llama
from tiny_gguf import KINDS, VOCABULARY, write_tiny_gguf

_IDS = torch.arange(22).reshape(2, 11) % VOCABULARY
_WRITABLE = dict.fromkeys(KINDS, 2) | {"attn_k": 3, "ffn_down": 8}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANISH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def file(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(file: Path) -> Program:
    return planish.trace(file)


def _bytes(file: Path) -> dict[str, bytes]:
    header, content = read_gguf_header(file), file.read_bytes()
    return {n: content[p.start : p.start + p.nbytes] for n, p in header.places.items()}


def test_every_kind_of_block_is_kept_and_means_the_same(file: Path) -> None:
    """Against transformers' own conversion, the rows of queries and keys put in order by it."""
    read, theirs = read_gguf_codes(file), read_safetensors(gguf_folder(file))
    assert len(read.entries) == 8
    for name, entry in read.entries.items():
        assert torch.equal(entry.decode(), theirs[name]), name
    formats = {name.split(".")[-2]: entry.format.name for name, entry in read.entries.items()}
    assert formats == {
        "embed_tokens": "int8-g32-sym-full-f16",
        "q_proj": "int4-g32-sym-f16",
        "k_proj": "int4-g32-offset-f16",
        "v_proj": "int4-g32-offset-k",
        "o_proj": "int8-g32-sym-full-f16",
        "gate_proj": "int6-g16-sym-f32",
        "up_proj": "int5-g32-offset-k",
        "down_proj": "int5-g32-sym-f16",
    }


def test_a_program_of_codes_computes_what_the_converted_one_computes(
    file: Path, converted: Program
) -> None:
    kept = planish.trace(file, keep_codes=True)
    inputs = {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS)}
    expected = converted(**inputs).logits
    assert torch.equal(kept(**inputs).logits, expected)
    exact = planish.optimize(kept, recipe="exact")
    fused = [exact.program.weights.entry(name) for name in exact.program.weights]
    assert sum(isinstance(entry, Encoded) for entry in fused) == 8  # of as many formats
    onnx = exact.export(file.parent / "onnx")
    assert (onnx / "model.onnx").is_file()
    assert kept.nbytes() < converted.nbytes() / 4


def test_what_was_read_is_written_with_the_same_bytes(cache: None, tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", _WRITABLE)
    program = planish.trace(file, keep_codes=True)
    folder = export_program(program, tmp_path / "out", "gguf")
    again = folder / "model.gguf"
    assert _bytes(again) == _bytes(file)
    first, second = read_gguf_header(file), read_gguf_header(again)
    assert first.tensors == second.tensors
    assert {n: p.kind for n, p in first.places.items()} == {
        n: p.kind for n, p in second.places.items()
    }
    assert first.entries.keys() == second.entries.keys()
    assert second.entries["general.file_type"] == 2 and second.entries["general.name"] == "tiny"
    manifest = json.loads((folder / "planish.json").read_text())
    assert manifest["checkpoint"]["blocks"] == {"Q8_0": 2, "Q4_0": 5, "Q4_1": 1}


def _quantized(program: Program, fmt: str) -> Program:
    program = program.copy()
    for name in list(program.weights):
        if name.endswith("proj.weight"):
            program.weights[name] = parse_format(fmt).encode(program.weights[name])
    return program


@pytest.mark.parametrize(
    ("fmt", "kind"),
    [
        ("int4-g32-sym-f16", "int4-g32-sym-f16"),
        ("int3-g64-sym-f16", "int4-g32-sym-f16"),
        ("int8-g64-sym-f16", "int8-g32-sym-full-f16"),
        ("int6-channel-sym-f16", "int8-g32-sym-full-f16"),
        ("int4-g32-offset-f16", "int4-g32-offset-f16"),
    ],
)
def test_other_formats_are_widened_to_the_same_values(
    fmt: str, kind: str, converted: Program, tmp_path: Path
) -> None:
    program = _quantized(converted, fmt)
    export_program(program, tmp_path / "out", "gguf")
    read = read_gguf_codes(tmp_path / "out" / "model.gguf")
    for name in program.weights:
        if name.endswith("proj.weight"):
            assert torch.equal(read.entries[name].decode(), program.weights[name]), name
            assert read.entries[name].format.name == kind
    state = read.module.state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(state[name], program.weights[name])


def test_what_blocks_cannot_hold_is_refused(converted: Program, tmp_path: Path) -> None:
    program = converted.copy()

    def refuse(fmt: str, message: str) -> None:
        with pytest.raises(UnsupportedByTarget, match=message):
            export_program(_quantized(program, fmt), tmp_path / "out", "gguf")
        assert not (tmp_path / "out").exists()

    refuse("int4-g32-asym-f16", "no block of a GGUF file holds the codes of blk.0")
    refuse("int4-g32-sym-f32", "whose scales are no float16 numbers")
    refuse("int4-g16-sym-f16", "int4-g16-sym-f16")
    program.metadata["origin"] = str(tmp_path / "nowhere")
    refuse("int4-g32-sym-f16", "does not know of which model")


def _with_tokenizer(folder: Path) -> Path:
    """A folder with a byte-level BPE tokenizer of a few merges."""
    letters = {letter: place for place, letter in enumerate("abcdefghij")}
    vocabulary = {**letters, "ab": 10, "abc": 11}
    model = tokenizers.models.BPE(vocabulary, [("a", "b"), ("ab", "c")])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<end>"])
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_folder_becomes_a_file(cache: None, tmp_path: Path) -> None:
    folder = _with_tokenizer(tiny_llama(tmp_path / "folder", eos_token_id=12, bos_token_id=12))
    program = _quantized(planish.trace(folder), "int8-g32-sym-f16")
    with pytest.raises(UnsupportedByTarget, match="names the rule by which texts are split"):
        export_program(program, tmp_path / "out", "gguf")
    options = {"pretokenizer": "gpt-2"}
    export_program(program, tmp_path / "out", "gguf", options=options)
    file = tmp_path / "out" / "model.gguf"
    header = read_gguf_header(file)
    assert header.entries["llama.attention.head_count_kv"] == 2
    assert header.entries["llama.attention.key_length"] == 32
    assert header.entries["general.file_type"] == 7
    fields = gguf.GGUFReader(file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[10:14] == ["ab", "abc", "<end>", "[PAD13]"] and len(tokens) == 101
    assert fields["tokenizer.ggml.token_type"].contents()[10:14] == [1, 1, 3, 5]
    assert fields["tokenizer.ggml.merges"].contents() == ["a b", "ab c"]
    read = planish.trace(file, keep_codes=True)
    inputs = {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS)}
    assert torch.equal(read(**inputs).logits, program(**inputs).logits)


def test_a_folder_that_cannot_tell_is_refused(cache: None, tmp_path: Path) -> None:
    program = _quantized(dense_llama(), "int8-g32-sym-f16")
    for number, changes in enumerate(
        ({}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}})
    ):
        folder = tiny_llama(tmp_path / f"folder{number}", **changes)
        options = {"source": str(folder)}
        with pytest.raises(UnsupportedByTarget, match="cannot write the metadata of a GGUF file"):
            export_program(program, tmp_path / "out", "gguf", options=options)
