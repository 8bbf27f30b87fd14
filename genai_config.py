"""genai_config.json: how ONNX Runtime GenAI runs an exported decoder.

The type is "decoder", GenAI's name for any decoder-only model: its other types name families and
are run the same way, so nothing has to be known about where the graph came from. GenAI feeds
attention_mask and position_ids only to a graph that has them. It takes logits of all positions,
or of the last one if the graph's output says so by a fixed size of 1. Of the last n > 1 it takes
them only if prompts come in pieces of at most n (`chunk_size`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GENAI = "genai_config.json"

_UNLIMITED = 32768  # GenAI needs a length; this one bounds a text of a model without a limit


def why_not_genai(section: Mapping[str, Any]) -> str | None:
    """Why GenAI cannot run a decoder, or None if it can; it knows one cache shape for all layers.

    section: the manifest's "decoder".
    """
    shapes = {tuple(shape) for shape in section["shapes"]}
    if not shapes:
        return "the decoder has no cache"
    if len(shapes) > 1:
        return f"the layers' caches differ: {sorted(shapes)} (heads, key width, value width)"
    _, head, value_head = shapes.pop()
    if head != value_head:
        return f"keys are {head} wide but values {value_head}"
    if section["dtype"] not in ("float32", "float16"):
        return f"the cache is {section['dtype']}"
    return None


def genai_config(section: Mapping[str, Any], tokens: Mapping[str, Any], model: str) -> Any:
    """The file's content.

    section: the manifest's "decoder". tokens: bos_token_id, eos_token_id, pad_token_id as far as
    known. model: the ONNX file's name.
    """
    heads, head, _ = section["shapes"][0]
    context = section["context"] or _UNLIMITED
    search: dict[str, Any] = {
        "do_sample": False,
        "max_length": context,
        "past_present_share_buffer": section["cache"] == "shared",
    }
    rows = section["logits"]
    if isinstance(rows, int) and rows > 1:
        search["chunk_size"] = rows
    inputs = {"input_ids": "input_ids"}
    if section["mask"]:
        inputs["attention_mask"] = section["mask"]
    inputs |= {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    outputs = {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")}
    return {
        "model": {
            "type": "decoder",
            **_known_tokens(tokens, section["vocabulary"]),
            "vocab_size": section["vocabulary"],
            "context_length": context,
            "decoder": {
                "filename": model,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "num_hidden_layers": section["layers"],
                "num_key_value_heads": heads,
                "head_size": head,
                "inputs": inputs,
                "outputs": {"logits": "logits", **outputs},
            },
        },
        "search": search,
    }


def _known_tokens(tokens: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """GenAI refuses a folder that names a token beyond its vocabulary."""
    kept: dict[str, Any] = {}
    for name, value in tokens.items():
        ids = [token for token in token_list(value) if token < vocabulary]
        if ids:
            kept[name] = ids if isinstance(value, list) else ids[0]
    return kept


def token_list(value: Any) -> list[int]:
    """One token id, several, or None as a list."""
    if value is None:
        return []
    return [int(token) for token in value] if isinstance(value, (list, tuple)) else [int(value)]
