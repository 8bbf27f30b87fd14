"""The metadata of a GGUF file from a model folder: sizes from its config.json, a BPE tokenizer.

Which entry holds which setting is taken from transformers' tables for reading GGUF. What those do
not say (scaled rotary embeddings, tokenizers of other kinds) is refused: then a GGUF file of the
same model must tell (the target's option source).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ir.errors import UnsupportedByTarget
from ..ir.write_gguf import entry_bytes
from .checkpoint_source import CheckpointModel

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def gguf_metadata(model: CheckpointModel, pretokenizer: str) -> dict[str, bytes]:
    """Entries by key. pretokenizer: llama.cpp's name for how the tokenizer splits texts."""
    assert model.folder is not None  # `checkpoint_model` always knows one
    config: Any = model.module.config
    architecture = str(config.model_type)
    found: dict[str, Any] = {
        "general.architecture": architecture,
        "general.name": str(model.settings.get("_name_or_path") or model.folder.name),
        "general.quantization_version": 2,
        **_sizes(architecture, config.to_dict()),
        **_tokenizer(model.folder, int(config.vocab_size), pretokenizer),
    }
    for name, short in _IDS.items():
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list) else value
        if value is not None:
            found[f"tokenizer.ggml.{short}_token_id"] = int(value)
    return {key: entry_bytes(key, value) for key, value in found.items()}


def _sizes(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    theirs: Any = GGUF_CONFIG_MAPPING
    table: Mapping[str, str | None] = theirs.get(architecture, {})
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    if not table or rope.get("rope_type", "default") != "default":
        kind = rope.get("rope_type", "default")
        raise _untold(f"model_type {architecture} with rotary embeddings of type {kind}")
    flat = {**config, **rope}
    wanted = {key: name for key, name in table.items() if name is not None}
    if flat.get("head_dim"):
        wanted |= {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
    missing = [name for name in wanted.values() if flat.get(name) is None]
    if missing:
        raise _untold(f"a configuration without {missing[0]}")
    return {f"{architecture}.{key}": flat[name] for key, name in wanted.items()}


def _tokenizer(folder: Path, size: int, pretokenizer: str) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    told: Any = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    model: Any = told.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _untold(f"a tokenizer of type {model.get('type', 'unknown')}")
    if not pretokenizer:
        raise UnsupportedByTarget(
            "a GGUF file names the rule by which texts are split before they become tokens",
            expected="the name that llama.cpp has for the rule (its tokenizer.ggml.pre)",
            found="no option pretokenizer",
            fix="pass --target-set pretokenizer=NAME, or a GGUF of the model as option source",
        )
    tokens, kinds = [f"[PAD{place}]" for place in range(size)], [_UNUSED] * size
    for token, place in model["vocab"].items():
        tokens[place], kinds[place] = token, _NORMAL
    for added in told.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    found = {
        "tokenizer.ggml.model": "gpt2",  # what the file format calls byte-level BPE
        "tokenizer.ggml.pre": pretokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": _adds_bos(folder),
    }
    template = folder / "chat_template.jinja"
    if template.is_file():
        found["tokenizer.chat_template"] = template.read_text("utf-8")
    return found


def _adds_bos(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    settings: Any = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return bool(settings.get("add_bos_token", False))


def _untold(found: str) -> UnsupportedByTarget:
    return UnsupportedByTarget(
        "planish cannot write the metadata of a GGUF file for this model folder",
        expected="an architecture of transformers' tables, plain rotary embeddings, a tokenizer "
        "of byte-level BPE in tokenizer.json",
        found=found,
        fix="pass --target-set source=MODEL.gguf, a GGUF file of the same model",
    )
