"""Target compressed-tensors: a folder that vLLM and transformers load, codes bit for bit.

Integers are packed in words (pack-quantized), or, with activations=int8, kept a byte each for
products of 8 bits by 8 bits (int-quantized); float8 stays float8 (float-quantized), with
activations=fp8 for products of float8. Each token's activations are then rounded as they come.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..ir.format_fp8 import Float8
from ..ir.layout_words import WordPacked
from ..ir.program import Program
from ..ir.weights import Entry
from ..ir.write_safetensors import Planned
from .checkpoint_export import OPEN_OPTIONS, OPTIONS, CheckpointFormat, Layers
from .checkpoint_folder import made_later, planned_tensor
from .checkpoint_layers import Layer, affine_layer
from .compressed_tensors_config import per_token, quantization_config
from .compressed_tensors_float import float8_format
from .target import Target


def export(
    program: Program, folder: Path, profile: str, metadata: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """Write the folder. Raises UnsupportedByTarget."""
    weights = program.weights
    formats = [getattr(weights.entry(name), "format", None) for name in weights]
    if options["activations"] == "fp8" or any(isinstance(fmt, Float8) for fmt in formats):
        return float8_format(options["activations"]).write(program, folder, options)
    form = _WHOLE if options["activations"] == "int8" else _PACKED
    return form.write(program, folder, options)


def _packed_layer(name: str, entry: Entry) -> Layer | None:
    layer = affine_layer(name, entry)
    if layer is None or layer.ordered or tuple(entry.shape) != layer.shape:
        return None
    return layer


def _whole_layer(name: str, entry: Entry) -> Layer | None:
    layer = _packed_layer(name, entry)
    if layer is None or layer.bits != 8 or not layer.symmetric or layer.group_size is not None:
        return None
    return layer


def _packed(
    layer: Layer, settings: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Planned]:
    words, (rows, length) = WordPacked(layer.bits), layer.shape
    kept = dtype or layer.scale_dtype
    made = {
        "weight_packed": made_later(
            (rows, words.words(length)), torch.int32, lambda: words.pack(layer.codes())
        ),
        "weight_scale": made_later((rows, layer.groups), kept, lambda: layer.scale().to(kept)),
        "weight_shape": planned_tensor(torch.tensor([rows, length])),
    }
    if not layer.symmetric:
        made["weight_zero_point"] = made_later(
            (words.words(rows), layer.groups),
            torch.int32,
            lambda: words.pack(layer.zero_point().t().contiguous()).t(),
        )
    return {f"{layer.path}.{ending}": tensor for ending, tensor in made.items()}


def _whole(
    layer: Layer, settings: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Planned]:
    rows = layer.shape[0]
    kept = dtype or layer.scale_dtype
    made = {
        "weight": made_later(
            layer.shape, torch.int8, lambda: (layer.codes() ^ 128).view(torch.int8)
        ),
        "weight_scale": made_later((rows, 1), kept, lambda: layer.scale().to(kept)),
    }
    return {f"{layer.path}.{ending}": tensor for ending, tensor in made.items()}


def _packed_settings(layers: Layers[Layer]) -> dict[str, Any]:
    return _settings(layers, "pack-quantized", None)


def _whole_settings(layers: Layers[Layer]) -> dict[str, Any]:
    return _settings(layers, "int-quantized", per_token("int"))


def _settings(
    layers: Layers[Layer], form: str, activations: Mapping[str, Any] | None
) -> dict[str, Any]:
    kinds: dict[tuple[int, int, bool], list[str]] = {}
    for layer in layers.quantized.values():
        kind = (layer.bits, layer.group_size or -1, layer.symmetric)
        kinds.setdefault(kind, []).append(layer.path)
    groups = [(_weights(*kind), paths) for kind, paths in kinds.items()]
    return quantization_config(form, groups, activations, layers.dense)


def _weights(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size < 0 else "group",
        "group_size": None if group_size < 0 else group_size,
        "dynamic": False,
    }


_PACKED = CheckpointFormat(
    "compressed-tensors",
    _packed_layer,
    "integers of 2 to 8 bits along the inputs, not in the order of activations",
    "quantize with another format, or leave the layer dense (option skip)",
    _packed_settings,
    _packed,
)
_WHOLE = CheckpointFormat(
    "compressed-tensors",
    _whole_layer,
    "int8-channel-sym where activations are int8",
    "quantize with bits=8 and group_size=none, or leave out activations=int8",
    _whole_settings,
    _whole,
)

TARGET = Target(
    "compressed-tensors",
    export,
    profiles=("vllm",),
    doc="a compressed-tensors checkpoint for vLLM and transformers",
    options={"activations": ("none", "int8", "fp8"), **OPTIONS},
    open_options=OPEN_OPTIONS,
)
