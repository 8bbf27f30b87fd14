"""The folder of a decoder: what is written from which source, what GenAI is told; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import planish
import pytest
import tiny_decoders as tiny
import tokenizers
import transformers
from planish.decode_onnx import OnnxDecoder
from planish.decoder_folder import (
    FORMAT,
    NotADecoderFolder,
    OtherVersion,
    read_decoder_folder,
    write_decoder_files,
)
from planish.decoder_source import DecoderSource
from planish.genai_config import genai_config, why_not_genai
from planish.ir.errors import CorruptFile, PlanishError, SourceNotFound, TruncatedFile
from planish.tokenizer import NoChatTemplate, Tokenizer
from tokenizers import models, pre_tokenizers

SECTION: dict[str, Any] = {
    "cache": "shared",
    "layers": 3,
    "shapes": [[2, 16, 16]] * 3,
    "dtype": "float32",
    "mask": "attention_mask",
    "context": 64,
    "vocabulary": 97,
    "logits": "all",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoders")


def test_a_folder_says_what_it_is(base: Path) -> None:
    folder = tiny.exported(base)
    found = read_decoder_folder(folder)
    assert found.cache == "shared" and found.shapes == ((2, 16, 16),) * 2
    assert found.context == tiny.CONTEXT and found.vocabulary == len(tiny.tokenizer())
    assert (found.begin, found.ends) == (tiny.BEGIN, {tiny.END})
    assert found.has_tokenizer and found.logits is None
    manifest = json.loads((folder / "planish.json").read_text())
    assert manifest["decoder"]["format"] == FORMAT and manifest["genai"] == "decoder"
    assert {"tokenizer.json", "genai_config.json"} <= set(manifest["files"])
    growing = read_decoder_folder(tiny.exported(base, "growing", 4, text=False))
    assert (growing.cache, growing.logits, growing.mask) == ("growing", 4, None)
    assert not growing.has_tokenizer and growing.ends == {tiny.END}


# sources ------------------------------------------------------------------------------------


def test_a_module_tells_its_tokens_but_has_no_tokenizer(tmp_path: Path) -> None:
    source = DecoderSource.of(tiny.model())
    assert source.token_ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert source.context == tiny.CONTEXT
    assert source.copy_tokenizer(tmp_path) == [] and not list(tmp_path.iterdir())
    nothing = DecoderSource.of(None)
    assert nothing.token_ids() == {} and nothing.context is None


def test_generation_config_goes_before_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"eos_token_id": 2, "text_config": {"bos_token_id": 5, "n_positions": 48}})
    )
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8], "temperature": 0.6})
    )
    source = DecoderSource.of(tmp_path)
    assert source.token_ids() == {"bos_token_id": 5, "eos_token_id": [7, 8]}
    assert source.context == 48
    out = tmp_path / "out"
    out.mkdir()
    told = write_decoder_files(source, out, SECTION)
    assert told["decoder"]["context"] == 48 and told["decoder"]["format"] == FORMAT
    written = json.loads((out / "generation_config.json").read_text())
    assert written == {"eos_token_id": [7, 8], "temperature": 0.6, "bos_token_id": 5}


def test_only_tokenizer_files_are_copied(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny.source(base), source)
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")
    out = tmp_path / "out"
    out.mkdir()
    copied = DecoderSource.of(source).copy_tokenizer(out)
    assert {file.name for file in out.iterdir()} == set(copied)
    assert set(copied) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for text in ("then the end", "  früh \U0001f600\n"):
        assert Tokenizer(out).encode(text) == tiny.tokenizer()(text)["input_ids"]


def test_a_tokenizer_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s", "world", ","]
    (source / "vocab.txt").write_text("\n".join(words))
    (source / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert "tokenizer.json" in DecoderSource.of(source).copy_tokenizer(out)
    theirs = transformers.AutoTokenizer.from_pretrained(str(source))
    assert Tokenizer(out).encode("hellos, world") == theirs("hellos, world")["input_ids"]


def test_what_transformers_knows_better_is_written_by_it(tmp_path: Path) -> None:
    """Its class for this tokenizer puts no space before a text, whatever tokenizer.json says."""
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz",
        "\u2581t",
    ]
    made = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("\u2581", "t")], unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)  # pyright: ignore
    made.save(str(source / "tokenizer.json"))
    (source / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(str(source))("to it")["input_ids"]
    assert Tokenizer(source).encode("to it") != theirs
    DecoderSource.of(source).copy_tokenizer(out)
    assert Tokenizer(out).encode("to it") == theirs


# GenAI --------------------------------------------------------------------------------------


def test_genai_config_golden() -> None:
    tokens = {"bos_token_id": 1, "eos_token_id": [2, 96, 97], "pad_token_id": 200}
    assert genai_config(SECTION, tokens, "model.onnx") == {
        "model": {
            "type": "decoder",
            "bos_token_id": 1,
            "eos_token_id": [2, 96],
            "vocab_size": 97,
            "context_length": 64,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "num_hidden_layers": 3,
                "num_key_value_heads": 2,
                "head_size": 16,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": 64, "past_present_share_buffer": True},
    }
    growing = SECTION | {"cache": "growing", "mask": None, "logits": 8, "context": None}
    found = genai_config(growing, {}, "model.onnx")
    assert "attention_mask" not in found["model"]["decoder"]["inputs"]
    assert "eos_token_id" not in found["model"]
    assert found["search"]["chunk_size"] == 8
    assert found["search"]["past_present_share_buffer"] is False
    assert "chunk_size" not in genai_config(SECTION | {"logits": 1}, {}, "model.onnx")["search"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"shapes": [[2, 16, 16], [1, 16, 16]]}, "the layers' caches differ"),
        ({"shapes": [[2, 24, 16]] * 2}, "keys are 24 wide but values 16"),
        ({"dtype": "int8"}, "the cache is int8"),
        ({"shapes": []}, "no cache"),
    ],
)
def test_what_genai_cannot_run_is_said(
    change: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    section = SECTION | change
    found = why_not_genai(section)
    assert found is None if reason is None else found is not None and reason in found
    told = write_decoder_files(DecoderSource(), tmp_path, section)
    assert (tmp_path / "genai_config.json").exists() == (reason is None)
    assert told["genai"] == (found or "decoder")


# refusals -----------------------------------------------------------------------------------


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(tiny.exported(base, "growing"), tmp_path / "folder")


def refused(error: type[PlanishError], sentence: str, folder: Path) -> None:
    for reader in (planish.Generator, OnnxDecoder):
        with pytest.raises(error) as caught:
            reader(folder)
        assert sentence in caught.value.what and caught.value.where and caught.value.fix


def change(folder: Path, **entries: Any) -> None:
    file = folder / "planish.json"
    manifest = json.loads(file.read_text())
    manifest["decoder"].update(entries)
    file.write_text(json.dumps(manifest))


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    refused(SourceNotFound, "there is no folder", tmp_path / "none")
    (tmp_path / "file.txt").write_text("x")
    refused(SourceNotFound, "there is no folder", tmp_path / "file.txt")
    refused(NotADecoderFolder, "was not exported by planish", tmp_path)


def test_an_export_without_a_cache(folder: Path) -> None:
    file = folder / "planish.json"
    manifest = json.loads(file.read_text())
    del manifest["decoder"]
    file.write_text(json.dumps(manifest))
    refused(NotADecoderFolder, "holds no decoder with a KV cache", folder)


def test_another_version(folder: Path) -> None:
    change(folder, format=FORMAT + 1)
    refused(OtherVersion, "is a decoder folder of another version of planish", folder)


def test_an_incomplete_section(folder: Path) -> None:
    change(folder, vocabulary=None)
    refused(NotADecoderFolder, "section 'decoder' is incomplete", folder)
    (folder / "planish.json").write_text("{")
    with pytest.raises(CorruptFile, match=r"planish.json is damaged"):
        read_decoder_folder(folder)


def test_missing_and_cut_files(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-4])
    refused(TruncatedFile, "model.onnx.data does not have the size", folder)
    data.unlink()
    refused(SourceNotFound, "the folder lacks model.onnx.data", folder)


def test_a_damaged_model(folder: Path) -> None:
    file = folder / "model.onnx"
    file.write_bytes(b"\xff" * file.stat().st_size)
    refused(CorruptFile, "onnxruntime cannot read the model", folder)


def test_a_manifest_of_another_model(folder: Path) -> None:
    change(folder, shapes=[[2, 16, 16]] * 3)
    refused(NotADecoderFolder, "does not have the inputs and outputs", folder)


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[1")
    with pytest.raises(CorruptFile, match=r"tokenizer.json is damaged"):
        planish.Generator(folder)


def test_chat_templates(folder: Path) -> None:
    talk = [{"role": "user", "content": "hi"}]
    template = folder / "chat_template.jinja"
    for text, sentence in [
        ("{{ raise_exception('only two speakers') }}", "only two speakers"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages.__class__ }}{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ]:
        template.write_text(text)
        with pytest.raises(NoChatTemplate, match="cannot spell this conversation") as caught:
            Tokenizer(folder).spell_chat(talk)
        assert sentence in caught.value.found
    template.write_text(
        "{% generation %}{{ messages | tojson }}{% endgeneration %} <{{ eos_token }}>"
    )
    assert Tokenizer(folder).spell_chat(talk) == '[{"role": "user", "content": "hi"}] <</s>>'
    template.unlink()
    with pytest.raises(NoChatTemplate, match="has no chat template"):
        Tokenizer(folder).spell_chat(talk)
